"""What a comparison will do: every row planned, and those found that an earlier comparison left. Nothing is written here.

As in `planning`, every error that a user can make is raised before any work; what only one recipe's own is becomes its row.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from lexigram.allocation.units import Allocation
from lexigram.calibration.text import read_texts
from lexigram.calibration.tokens import TokenSequences, token_ids
from lexigram.comparison.earlier import CACHE, HASHED, MODELS, ROWS, model_left, row_left
from lexigram.comparison.origin import Hashed, hashed, origin
from lexigram.comparison.plot import missing
from lexigram.comparison.table import DENSE, HEALED, Row, difference
from lexigram.devices import resolve_device
from lexigram.errors import LexigramError
from lexigram.evaluation.perplexity import check_windowing
from lexigram.jsonfiles import check_writable
from lexigram.planning import Plan, plan
from lexigram.recipe import AMOUNTS, BOS, GLOBAL, KNAPSACK, UNIFORM, Names, Recipe
from lexigram.runfolder import held_bytes, run_folder
from lexigram.running import check_context
from lexigram.shown import BUDGET, CALIBRATION, EVALUATION, MACHINE, Shown
from lexigram.source import Source
from lexigram.staging import check_target
from lexigram.training import HealingSettings

TABLE = "table.json"


class ComparisonSettings(BaseModel):
    """What is compared besides the recipes, and on which text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: Annotated[Names, Shown(name="text", short="-t", metavar="TEXT...")] = Field(
        description="To evaluate on: .txt or .jsonl files (or .gz), `demo`, or `hub:NAME`."
    )
    ratios: Annotated[
        tuple[float, ...], Shown(BUDGET, "ratio", "-r", metavar="RATIO...", none="each recipe's own, or 0.2")
    ] = Field(default=(), description="Every recipe at each of these.")
    seeds: Annotated[
        tuple[int, ...],
        Shown(CALIBRATION, "calibration-seed", "--seeds", metavar="SEED...", none="the recipes' own, or 0"),
    ] = Field(default=(), description="Decides which sequences are drawn. Of several the table shows means.")
    context: Annotated[int, Shown(EVALUATION)] = Field(default=1024, description="Tokens a window.")
    windows: Annotated[int | None, Shown(EVALUATION)] = Field(
        default=None, description="Only the first so many windows."
    )
    bos: Annotated[bool, Shown(EVALUATION)] = Field(default=False, description=BOS)
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], Shown(EVALUATION)] = Field(
        default="auto", description="Of what is not compressed while it is evaluated."
    )
    heal: Annotated[HealingSettings | None, Shown(option=False)] = Field(
        default=None, description="How every compressed model is healed, for a second row of it."
    )
    drop_models: Annotated[bool, Shown(MACHINE)] = Field(
        default=False, description="Remove each model that is made once it is evaluated."
    )


@dataclass(frozen=True)
class Reading:
    """What every row is evaluated on, and how."""

    texts: tuple[str, ...]
    content: str
    context: int
    windows: int | None
    tokens: int
    """Of the whole text."""
    bos: bool
    dtype: str
    device: torch.device

    @property
    def steps(self) -> int:
        """Windows that there will be."""
        whole, rest = divmod(self.tokens, self.context - self.bos)
        return min(whole + (rest > 1 - self.bos), self.windows or sys.maxsize)

    @property
    def made_from(self) -> dict[str, Any]:
        """What of it decides the figures."""
        digest = hashlib.sha256(self.content.encode()).hexdigest()
        decided = {"text_sha256": digest, "context": self.context, "windows": self.windows, "dtype": self.dtype}
        return {**decided, "bos": True} if self.bos else decided  # rows of before were all without


@dataclass(frozen=True)
class Job:
    """One row to be: a recipe at a ratio and a calibration seed.

    Either `plan` or `error` is None. `done` is the row that an earlier comparison left, `kept` whether it left the model
    that this row is of, `other` in what an earlier row or model differs that is to be replaced. `origin` is all that decides
    the model, `made_from` all that decides the figures. `healed` is the row of the same model once its values are trained: of
    the same plan, with `heals` for how, and none of its own.
    """

    name: str
    recipe_name: str
    seed: int
    recipe: Recipe
    plan: Plan | None = None
    error: str | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    made_from: Mapping[str, Any] = field(default_factory=dict)
    done: Row | None = None
    kept: bool = False
    other: str | None = None
    heals: HealingSettings | None = None
    healed: "Job | None" = None

    @property
    def ratio(self) -> float | None:
        """What is asked for; None where the recipe says it in another way, which takes a plan to tell."""
        return self.recipe.ratio if self.plan is None else self.plan.ratio

    @property
    def waits(self) -> bool:
        """Whether its row is to be made, and the model for it."""
        return self.plan is not None and self.done is None and not self.kept

    @property
    def compresses(self) -> bool:
        """Whether the model is to be made: for this row, or to be healed."""
        needed = self.done is None or (self.healed is not None and self.healed.waits)
        return self.plan is not None and not self.kept and needed

    @property
    def family(self) -> "tuple[Job, ...]":
        """It and what is made of its model."""
        return (self,) if self.healed is None else (self, self.healed)

    def failed(self, error: str) -> Row:
        """The row of a job that came to nothing."""
        return Row(label=self.name, error=error, **self.who)

    @property
    def who(self) -> dict[str, Any]:
        """The keys by which its row is found in the table."""
        return {"recipe": self.recipe_name, "requested_ratio": self.ratio, "calibration_seed": self.seed}


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison will do. `plotless` says why there will be no plot."""

    model: str
    out: Path
    reading: Reading
    made_from: Mapping[str, Any]
    """All that decides the figures of the dense row."""
    dense: Row | None
    """That row, where an earlier comparison left it."""
    hashed: Hashed | None
    """The weights as they are; None of a model on the hub."""
    jobs: list[Job]
    planner: Callable[..., Plan]
    """`lexigram.planning.plan` with all that rows have in common besides their recipes."""
    overwrite: bool
    again: Mapping[str, str]
    """In what rows or models differ that are to be replaced, by name."""
    drop_models: bool
    """Remove every model that is made as soon as its row is there; what was there before stays."""
    plotless: str | None


def plan_comparison(
    recipes: Mapping[str, Recipe],
    out: str | Path,
    settings: ComparisonSettings,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    max_ram: int | None = None,
) -> ComparisonPlan:
    """Plan every row, and find those that an earlier comparison left in `out`; nothing is written.

    A recipe that cannot be planned by itself, such as for a budget that is too small, becomes a row with its error. The
    model's weights are read once, to be hashed, unless an earlier comparison has hashed the same files.

    Args:
        recipes: by the names of their rows; of one model, with one calibration.
        out: a folder that does not exist, is empty, or holds a comparison.
        settings: the texts to evaluate on, and how; at which ratios, with which calibration seeds; whether to heal.
        overwrite: make rows again that were made from something else.
        workers: see `lexigram.plan`; of every compression.
        max_ram: see there; of every compression. Evaluation and healing hold whole models.

    Raises:
        LexigramError: for what all rows have in common (model, texts, calibration, folder), names that cannot be those of
            rows, where no recipe can be planned, and for a row in `out` that was made from something else: other weights or
            another version too.
    """
    out = Path(out)
    _check_recipes(recipes, heals=settings.heal is not None)
    jobs = _jobs(recipes, settings)
    _check_folder(out)
    first = next(iter(recipes.values()))
    source = Source.resolve(first.model)
    reading = _read(source, settings, first.device)
    healing = {} if settings.heal is None else _healing(settings.heal)
    planner = partial(plan, cache=out / CACHE, workers=workers, max_ram=max_ram)
    jobs = _planned(jobs, planner)
    weights = hashed(source, out / HASHED)
    common = origin(source, weights)
    from_dense = {**common, "model": first.model, "device": first.device, **reading.made_from}
    dense = row_left(out, DENSE, from_dense, overwrite=overwrite)
    jobs = [_resumed(_with_origin(job, common, healing, reading), out, overwrite=overwrite) for job in jobs]
    differ = {DENSE: dense.other, **{each.name: each.other for job in jobs for each in job.family}}
    prepared = ComparisonPlan(
        model=first.model,
        out=out,
        reading=reading,
        made_from=from_dense,
        dense=dense.row,
        hashed=weights,
        jobs=jobs,
        planner=planner,
        overwrite=overwrite,
        again={name: other for name, other in differ.items() if other is not None},
        drop_models=settings.drop_models,
        plotless=missing(),
    )
    _check_disk(prepared)
    return prepared


def _check_recipes(recipes: Mapping[str, Recipe], *, heals: bool) -> None:
    """Raise where the recipes are none, have names that no file can have, or differ in what all rows have in common."""
    if not recipes:
        raise LexigramError("there are no recipes to compare; name one or more")
    if DENSE in recipes:
        raise LexigramError(f"{DENSE!r} is the row of the uncompressed model; give that recipe another name")
    for name in recipes:
        if not name or not name.isprintable() or name.startswith(".") or set(name) & set("/\\"):
            raise LexigramError(
                f"the recipe's name {name!r} cannot be that of a file, which its row and its model have; give it another one, "
                "without '/' and '\\' and without a dot at the beginning"
            )
        if heals and f"{name}{HEALED}" in recipes:
            raise LexigramError(
                f"{name + HEALED!r} is the row of {name!r} once it is healed; give that recipe another name, or leave the "
                "healing out"
            )
    (name, first), *others = recipes.items()
    common = _common(first)
    for other, recipe in others:
        if found := difference(common, _common(recipe)):
            raise LexigramError(
                f"{name} and {other} differ in {found[0]}: {found[1]} and {found[2]}; all rows share one model and one "
                "calibration, so give that as an option of the comparison, or alike in all recipes"
            )


def _common(recipe: Recipe) -> dict[str, Any]:
    """What decides the Grams."""
    return recipe.model_dump(mode="json", include={"model", "calibration", "compute_dtype", "device"})


def _check_folder(out: Path) -> None:
    """Raise where `out` cannot hold a comparison, or holds something else."""
    if out.is_file():
        raise LexigramError(f"{out} exists and is not a folder; name another output folder")
    if out.is_dir() and any(out.iterdir()) and not (out / ROWS).is_dir():
        raise LexigramError(f"{out} is not empty and holds no comparison; name another output folder")
    check_writable(out / TABLE)


def _read(source: Source, settings: ComparisonSettings, device: str) -> Reading:
    context, windows = settings.context, settings.windows
    check_windowing(context, windows=windows)
    content = read_texts(settings.texts, demo_part="evaluation", characters=None)
    check_context(source.skeleton(), context, "context")
    tokens = token_ids(source.tokenizer(), content).numel()
    return Reading(
        settings.texts, content, context, windows, tokens, settings.bos, settings.dtype, resolve_device(device)
    )


def _healing(settings: HealingSettings) -> dict[str, Any]:
    """What decides a healed model besides the one that is healed: settings, and what the texts hold now.

    Raises:
        LexigramError: for a text that cannot be read.
    """
    digest = hashlib.sha256(read_texts(settings.texts).encode()).hexdigest()
    # How often the state is saved is of no effect on the result.
    return {"healing": settings.model_dump(mode="json", exclude={"save_every"}), "healing_text_sha256": digest}


def _jobs(recipes: Mapping[str, Recipe], settings: ComparisonSettings) -> list[Job]:
    """Every recipe at every ratio with every seed, not yet planned.

    Raises:
        LexigramError: where two rows would have one name.
    """
    found = [
        _job(recipe, stem, ratio, seed, settings.heal)
        for stem, recipe in recipes.items()
        for ratio in dict.fromkeys(settings.ratios) or (None,)
        for seed in dict.fromkeys(settings.seeds) or (None,)
    ]
    named: dict[str, Job] = {}
    for job in found:
        other = named.setdefault(job.name, job)
        if other is not job:
            raise LexigramError(
                f"{other.recipe_name} at ratio {other.ratio!r} and {job.recipe_name} at ratio {job.ratio!r} would both be the "
                f"row {job.name!r}, which has six digits of a ratio; leave one of them out"
            )
    return found


def _job(recipe: Recipe, stem: str, ratio: float | None, seed: int | None, heals: HealingSettings | None) -> Job:
    own = _changed(recipe, stem, ratio, seed)
    ending = [*([] if ratio is None else [f"{ratio:g}"]), *([] if seed is None else [f"seed{seed}"])]
    job, healed = (
        Job(name="-".join([name, *ending]), recipe_name=name, seed=own.calibration.seed, recipe=own)
        for name in (stem, f"{stem}{HEALED}")
    )
    return job if heals is None else replace(job, healed=replace(healed, heals=heals))


def _changed(recipe: Recipe, name: str, ratio: float | None, seed: int | None) -> Recipe:
    content = recipe.model_dump()
    if ratio is not None:
        content |= {**dict.fromkeys(AMOUNTS), "ratio": ratio}
    if seed is not None:
        content["calibration"] = {**content["calibration"], "seed": seed}
    return Recipe.parse(content, where=name)


def _planned(jobs: Sequence[Job], planner: Callable[..., Plan]) -> list[Job]:
    """The same with their plans, or what is wrong with their recipes.

    The calibration text is read and tokenised only where no row with its seed was before.

    Raises:
        LexigramError: where there is something wrong with all of them; what most of them say.
    """
    tokens: dict[int, TokenSequences | None] = {}
    found = []
    for job in jobs:
        try:
            prepared = planner(job.recipe, tokens=tokens.get(job.seed))
        except LexigramError as error:
            found.append(unmade(job, str(error)))
            continue
        tokens[job.seed] = prepared.tokens
        found.append(planned(job, prepared))
    errors = Counter(job.error for job in found if job.error is not None)
    if sum(errors.values()) == len(found):
        raise LexigramError(errors.most_common(1)[0][0])
    return found


def planned(job: Job, prepared: Plan) -> Job:
    """The same with a plan."""
    return replace(job, plan=prepared, healed=job.healed and planned(job.healed, prepared))


def unmade(job: Job, error: str) -> Job:
    """The same with an error that leaves nothing to do."""
    return replace(job, plan=None, error=error, healed=job.healed and unmade(job.healed, error))


def _with_origin(job: Job, common: Mapping[str, Any], healing: Mapping[str, Any], reading: Reading) -> Job:
    """The same with what decides its model and its figures."""
    own = {**common, "recipe": job.recipe.model_dump(mode="json"), **(_contents(job.plan) if job.plan else {})}
    healed = job.healed and replace(
        job.healed, origin={**own, **healing}, made_from={**own, **healing, **reading.made_from}
    )
    return replace(job, origin=own, made_from={**own, **reading.made_from}, healed=healed)


def _contents(prepared: Plan) -> dict[str, Any]:
    """What lies in the files that a recipe names, so that a row does not outlive a change in them."""
    replayed = prepared.recipe.allocation not in (UNIFORM, KNAPSACK, GLOBAL)
    return {
        "calibration_sha256": prepared.tokens.sha256 if prepared.tokens is not None else None,
        "allocation_sha256": _digest(prepared.allocation) if replayed and prepared.allocation else None,
    }


def _digest(allocation: Allocation) -> str:
    return hashlib.sha256(allocation.model_dump_json().encode()).hexdigest()


def _resumed(job: Job, out: Path, *, overwrite: bool) -> Job:
    """The same with what an earlier comparison left of it.

    Raises:
        LexigramError: where something was made from something else, and may not be replaced.
    """
    if job.plan is None:
        return job
    healed = job.healed and _resumed(job.healed, out, overwrite=overwrite)
    row = row_left(out, job.name, job.made_from, overwrite=overwrite)
    found = replace(job, done=row.row, healed=healed, other=row.other)
    if not found.compresses:
        return found
    model = model_left(out, job.name, job.origin, overwrite=overwrite)
    return replace(found, kept=model.model, other=row.other or model.other)


def _check_disk(prepared: ComparisonPlan) -> None:
    """Raise where the models, or the Grams beside them, could not be written."""
    models = [_disk_bytes(job, prepared.out) for job in prepared.jobs]
    needed = (max if prepared.drop_models else sum)(sum(each.values()) for each in models)
    if not (prepared.out / CACHE).is_dir():
        plans = {job.seed: job.plan for job in prepared.jobs if job.compresses and job.plan is not None}
        needed += sum(sum(each.gram_bytes.values()) for each in plans.values())
    for name in (name for each in models for name in each):
        check_target(prepared.out / MODELS / name, overwrite=prepared.overwrite, needed_bytes=needed)


def _disk_bytes(job: Job, out: Path) -> dict[str, int]:
    """What the models of a job take that are to be made, by their names, beside what is there of them."""
    if job.plan is None:
        return {}
    found = {job.name: job.plan.disk_bytes - held_bytes(run_folder(out / MODELS / job.name))} if job.compresses else {}
    if job.healed is not None and job.healed.waits:
        found[job.healed.name] = job.plan.uncompressed_bytes + job.plan.bytes_after
    return found
