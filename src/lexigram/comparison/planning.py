"""What a comparison will do: every row planned, and those found that an earlier comparison left. Nothing is written here.

As in `planning`, every error that a user can make is raised before any work; what only one recipe's own is becomes its row.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lexigram.allocation.units import Allocation
from lexigram.calibration.text import read_texts
from lexigram.calibration.tokens import TokenSequences, token_ids
from lexigram.comparison.plot import missing
from lexigram.comparison.table import DENSE, Row, difference
from lexigram.devices import resolve_device
from lexigram.errors import LexigramError
from lexigram.jsonfiles import check_writable, read_json
from lexigram.planning import Plan, plan
from lexigram.recipe import GLOBAL, KNAPSACK, SELF, UNIFORM, Names, Recipe
from lexigram.running import check_context
from lexigram.shown import BUDGET, CALIBRATION, EVALUATION, MACHINE, Shown
from lexigram.source import Source
from lexigram.staging import RUN_FILE, check_target

TABLE = "table.json"
ROWS, MODELS, CACHE = "rows", "models", "cache"
"""Folders in that of a comparison."""


class ComparisonSettings(BaseModel):
    """What is compared besides the recipes, and on which text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: Annotated[Names, Shown(name="text", short="-t", metavar="TEXT...")] = Field(
        description="To evaluate on: .txt or .jsonl files, `demo`, or `hub:NAME`."
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
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], Shown(EVALUATION)] = Field(
        default="auto", description="Of what is not compressed while it is evaluated."
    )
    drop_models: Annotated[bool, Shown(MACHINE)] = Field(
        default=False, description="Remove each model once it is evaluated."
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
    dtype: str
    device: torch.device

    @property
    def steps(self) -> int:
        """Windows that there will be."""
        whole, rest = divmod(self.tokens, self.context)
        return min(whole + (rest > 1), self.windows or sys.maxsize)

    @property
    def made_from(self) -> dict[str, Any]:
        """What of it decides the figures."""
        digest = hashlib.sha256(self.content.encode()).hexdigest()
        return {"text_sha256": digest, "context": self.context, "windows": self.windows, "dtype": self.dtype}


@dataclass(frozen=True)
class Job:
    """One row to be: a recipe at a ratio and a calibration seed.

    Either `plan` or `error` is None. `done` is the row that an earlier comparison left, `kept` whether it left the model
    without a row.
    """

    name: str
    recipe_name: str
    ratio: float | None
    seed: int | None
    recipe: Recipe
    plan: Plan | None
    error: str | None
    made_from: Mapping[str, Any]
    done: Row | None = None
    kept: bool = False

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
    jobs: list[Job]
    overwrite: bool
    drop_models: bool
    """Remove every model as soon as its row is there."""
    plotless: str | None


def plan_comparison(
    recipes: Mapping[str, Recipe], out: str | Path, settings: ComparisonSettings, *, overwrite: bool = False
) -> ComparisonPlan:
    """Plan every row, and find those that an earlier comparison left in `out`; nothing is written.

    A recipe that cannot be planned by itself, such as for a budget that is too small, becomes a row with its error.

    Args:
        recipes: by the names of their rows; of one model, with one calibration.
        out: a folder that does not exist, is empty, or holds a comparison.
        settings: the texts to evaluate on, and how; at which ratios, with which calibration seeds.
        overwrite: make rows again that were made from something else.

    Raises:
        LexigramError: for what all rows have in common (model, text, calibration, folder), where no recipe can be planned, and
            for a row in `out` that was made from something else.
    """
    out = Path(out)
    _check_recipes(recipes)
    _check_folder(out)
    first = next(iter(recipes.values()))
    source = Source.resolve(first.model)
    reading = _read(source, settings, first.device)
    origin = {**reading.made_from, "model_file_bytes": source.file_bytes()}
    jobs = _planned(_jobs(recipes, settings, origin), out / CACHE)
    from_dense = {"model": first.model, "device": first.device, **origin}
    prepared = ComparisonPlan(
        model=first.model,
        out=out,
        reading=reading,
        made_from=from_dense,
        dense=_found(out, DENSE, from_dense, overwrite=overwrite),
        jobs=[_resumed(job, out, overwrite=overwrite) for job in jobs],
        overwrite=overwrite,
        drop_models=settings.drop_models,
        plotless=missing(),
    )
    _check_disk(prepared)
    return prepared


def _check_recipes(recipes: Mapping[str, Recipe]) -> None:
    """Raise where the recipes are none, or differ in what all rows have in common."""
    if not recipes:
        raise LexigramError("there are no recipes to compare; name one or more")
    if DENSE in recipes:
        raise LexigramError(f"{DENSE!r} is the row of the uncompressed model; give that recipe another name")
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
    if context < 2 or (windows is not None and windows < 1):
        raise LexigramError(f"context {context} with windows {windows} leaves nothing to score; raise the lower one")
    content = read_texts(settings.texts, demo_part="evaluation")
    check_context(source.skeleton(), context, "context")
    tokens = token_ids(source.tokenizer(), content).numel()
    return Reading(settings.texts, content, context, windows, tokens, settings.dtype, resolve_device(device))


def _jobs(recipes: Mapping[str, Recipe], settings: ComparisonSettings, origin: Mapping[str, Any]) -> list[Job]:
    """Every recipe at every ratio with every seed, not yet planned."""
    found = []
    for stem, recipe in recipes.items():
        for ratio in dict.fromkeys(settings.ratios) or (None,):
            for seed in dict.fromkeys(settings.seeds) or (None,):
                own = _changed(recipe, stem, ratio, seed)
                parts = (stem, None if ratio is None else f"{ratio:g}", None if seed is None else f"seed{seed}")
                found.append(
                    Job(
                        name="-".join(filter(None, parts)),
                        recipe_name=stem,
                        ratio=own.ratio,
                        seed=own.calibration.seed,
                        recipe=own,
                        plan=None,
                        error=None,
                        made_from={"recipe": own.model_dump(mode="json"), **origin},
                    )
                )
    return found


def _changed(recipe: Recipe, name: str, ratio: float | None, seed: int | None) -> Recipe:
    content = recipe.model_dump()
    if ratio is not None:
        content["ratio"] = ratio
    if seed is not None:
        content["calibration"] = {**content["calibration"], "seed": seed}
    return Recipe.parse(content, where=name)


def _planned(jobs: Sequence[Job], cache: Path) -> list[Job]:
    """The same with their plans, or what is wrong with their recipes.

    Raises:
        LexigramError: where there is something wrong with all of them; what most of them say.
    """
    tokens: dict[int, TokenSequences] = {}
    found = []
    for job in jobs:
        try:
            prepared = _plan(job.recipe, cache, tokens)
        except LexigramError as error:
            found.append(replace(job, error=str(error)))
            continue
        found.append(replace(job, plan=prepared, made_from={**job.made_from, **_contents(prepared)}))
    errors = Counter(job.error for job in found if job.error is not None)
    if sum(errors.values()) == len(found):
        raise LexigramError(errors.most_common(1)[0][0])
    return found


def _plan(recipe: Recipe, cache: Path, tokens: dict[int, TokenSequences]) -> Plan:
    """The plan of one recipe; its calibration text is read and tokenised only where no row with its seed was before it."""
    seed = recipe.calibration.seed
    if seed not in tokens:
        prepared = plan(recipe, cache=cache)
        if prepared.tokens is not None:
            tokens[seed] = prepared.tokens
        return prepared
    textless = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"text": (SELF,)})})
    return replace(plan(textless, cache=cache), recipe=recipe, tokens=tokens[seed])


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
    """The same with what an earlier comparison left of it."""
    if job.plan is None:
        return job
    row = _found(out, job.name, job.made_from, overwrite=overwrite)
    if row is not None:
        return replace(job, done=row)
    folder = out / MODELS / job.name
    if not (folder / RUN_FILE).is_file():
        return job
    run = read_json(folder / RUN_FILE)
    there = {"recipe": run.get("recipe"), "calibration_sha256": run.get("calibration_sha256")}
    here = {"recipe": job.made_from["recipe"], "calibration_sha256": job.made_from["calibration_sha256"]}
    if here["calibration_sha256"] is None:  # sampled from the model, and not yet
        del there["calibration_sha256"], here["calibration_sha256"]
    found = difference(there, here)
    if found and not overwrite:
        raise _stale(folder, found)
    return replace(job, kept=found is None)


def _found(out: Path, name: str, made_from: Mapping[str, Any], *, overwrite: bool) -> Row | None:
    """The row that lies there, where it was made from the same; with `overwrite` none where it was not.

    Raises:
        LexigramError: where it was made from something else or cannot be read, and may not be replaced.
    """
    file = out / ROWS / f"{name}.json"
    if not file.exists():
        return None
    try:
        content = read_json(file)
        row = Row.model_validate(content)
    except (LexigramError, ValidationError) as error:
        if overwrite:
            return None
        reason = error if isinstance(error, LexigramError) else "other keys and values than a row has"
        raise LexigramError(f"{file} is damaged ({reason}); delete it, or give --overwrite") from error
    found = difference(row.made_from, dict(made_from))
    if found and not overwrite:
        raise _stale(file, found)
    return None if found else row


def _stale(place: Path, found: tuple[str, str, str]) -> LexigramError:
    path, old, new = found
    return LexigramError(
        f"{place} was made from something else: {path} was {old} and is {new}; name another --out, or replace what differs "
        "with --overwrite"
    )


def _check_disk(prepared: ComparisonPlan) -> None:
    """Raise where the models, or the Grams beside them, could not be written."""
    waiting = [job for job in prepared.jobs if job.plan is not None and job.done is None and not job.kept]
    plans = [job.plan for job in waiting if job.plan is not None]
    if not plans:
        return
    needed = (max if prepared.drop_models else sum)(each.disk_bytes for each in plans)
    if not (prepared.out / CACHE).is_dir():
        needed += sum(_gram_bytes(each) for each in {each.recipe.calibration.seed: each for each in plans}.values())
    for job in waiting:
        check_target(prepared.out / MODELS / job.name, overwrite=prepared.overwrite, needed_bytes=needed)


def _gram_bytes(prepared: Plan) -> int:
    """Of one calibration in the cache, in float64."""
    return sum(8 * width**2 for width in {target.site: target.shape[1] for target in prepared.targets}.values())
