"""`lexigram compare`: several recipes on one calibration, into one table and one plot."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lexigram.cli.arguments import Count, DryRun, DtypeName, MaxRam, Model
from lexigram.cli.options import Option
from lexigram.cli.parameters import declared
from lexigram.cli.plan import short_memory
from lexigram.cli.recipes import OPTIONS, merged
from lexigram.cli.screen import console, errors, say
from lexigram.comparison.order import Comparison, run_comparison
from lexigram.comparison.planning import ComparisonPlan, ComparisonSettings, Job, plan_comparison
from lexigram.comparison.table import DENSE, Row, perplexity, table
from lexigram.errors import LexigramError
from lexigram.memory import parsed
from lexigram.progress import drawing
from lexigram.recipe import Recipe
from lexigram.reporting import tables
from lexigram.running import Stages
from lexigram.shown import MACHINE
from lexigram.training import HealingSettings

EXAMPLES = (
    "lexigram compare demo --recipes svd.yaml wanda.yaml --ratio 0.2 0.4 --calibration demo --text demo --out compared",
    "lexigram compare ./model --recipes *.yaml --seeds 0 1 --calibration c4.jsonl --text wiki.test.txt --out compared",
    "lexigram compare demo --recipes svd.yaml --calibration demo --text demo --heal demo --heal-steps 100 --out compared",
)
_OWN = {key: Option("settings", key, {"comparison": field}) for key, field in ComparisonSettings.model_fields.items()}
_HEALING = "Healing"
_RECIPES = (
    "YAML files with any of the settings of a recipe.yaml, such as `method: {name: wanda}`; a row has its file's name."
)
_OUT = "Folder for rows, models, table and plot. What is there already is not made again."
_OVERWRITE = "Replace rows that were made from other recipes, texts or windows, other weights, or by another version."
_HEAL_TEXTS = (
    "Train the stored values of every compressed model on these, too, for a second row of the same bytes: NAME, healed."
)


def _heals_by(key: str) -> Any:
    """What typer is told of a setting of healing."""
    option = Option("settings", key, {"healing": HealingSettings.model_fields[key]})
    return typer.Option(f"--heal-{key}", metavar=option.metavar, help=option.help, rich_help_panel=_HEALING)


def compare(
    model: Model,
    recipes: Annotated[list[Path], typer.Option(metavar="FILE...", help=_RECIPES)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help=_OUT)],
    texts: Annotated[list[str], declared(_OWN["texts"], rich_help_panel=None)],
    ratios: Annotated[list[float] | None, declared(_OWN["ratios"])] = None,
    calibration: Annotated[list[str] | None, declared(OPTIONS["calibration"], metavar="TEXT...")] = None,
    sequences: Annotated[int | None, declared(OPTIONS["sequences"])] = None,
    length: Annotated[int | None, declared(OPTIONS["length"])] = None,
    seeds: Annotated[list[int] | None, declared(_OWN["seeds"])] = None,
    context: Annotated[int | None, declared(_OWN["context"])] = None,
    windows: Annotated[int | None, declared(_OWN["windows"])] = None,
    bos: Annotated[bool, declared(_OWN["bos"])] = False,
    dtype: Annotated[DtypeName | None, declared(_OWN["dtype"])] = None,
    heal: Annotated[
        list[str] | None, typer.Option("--heal", metavar="TEXT...", help=_HEAL_TEXTS, rich_help_panel=_HEALING)
    ] = None,
    heal_objective: Annotated[str | None, _heals_by("objective")] = None,
    heal_steps: Annotated[int | None, _heals_by("steps")] = None,
    heal_minutes: Annotated[float | None, _heals_by("minutes")] = None,
    heal_batch: Annotated[int | None, _heals_by("batch")] = None,
    heal_rate: Annotated[float | None, _heals_by("rate")] = None,
    device: Annotated[str | None, declared(OPTIONS["device"])] = None,
    drop_models: Annotated[bool, declared(_OWN["drop_models"])] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help=_OVERWRITE, rich_help_panel=MACHINE)
    ] = False,
    workers: Count = None,
    max_ram: MaxRam = None,
    dry_run: DryRun = False,
) -> None:
    """Compress MODEL by several recipes on one calibration; measure every result, and MODEL itself.

    OUT gets one table (table.md, table.json) and a plot of perplexity against stored bits a weight. A comparison that was
    interrupted goes on at the next row. A recipe that fails is a row with its error, and the exit code is 1 in the end.
    MODEL stands before the options that take several values.
    """
    healing = {
        "objective": heal_objective,
        "steps": heal_steps,
        "minutes": heal_minutes,
        "batch": heal_batch,
        "rate": heal_rate,
    }
    everywhere = {"bos": True} if bos else {}
    common = {
        "calibration": calibration or None,
        "sequences": sequences,
        "length": length,
        "device": device,
        **everywhere,
    }
    given = {
        "texts": texts,
        "ratios": ratios,
        "seeds": seeds,
        "context": context,
        "windows": windows,
        **everywhere,
        "dtype": dtype and dtype.value,
        "heal": _heals(heal, {**healing, **(everywhere if heal else {})}),
        "drop_models": drop_models,
    }
    settings = ComparisonSettings.model_validate({key: value for key, value in given.items() if value is not None})
    read = _recipes(recipes, model, {name: value for name, value in common.items() if value is not None})
    limit = None if max_ram is None else parsed(max_ram)
    prepared = plan_comparison(read, out, settings, overwrite=overwrite, workers=workers, max_ram=limit)
    _show_plan(prepared)
    if dry_run:
        return
    found = run_comparison(prepared, watch=_watched, tell=_tell)
    _show(found)
    if found.failed:
        raise typer.Exit(1)


class TakesSeveral(TyperCommand):
    """A command whose repeatable options take several values at once: `--recipes a.yaml b.yaml`.

    Arguments stand before them.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `repeated`."""
        flags = {flag for option in self.params if getattr(option, "multiple", False) for flag in option.opts}
        return super().parse_args(ctx, repeated(args, flags))


def repeated(args: Sequence[str], flags: Collection[str]) -> list[str]:
    """The same with the flag, where it is one of `flags`, before every value that follows it."""
    found: list[str] = []
    flag, values = "", 0
    for arg in args:
        if arg.startswith("-"):
            flag, values = arg if arg in flags else "", 0
        else:
            values += 1
            if flag and values > 1:
                found.append(flag)
        found.append(arg)
    return found


def _recipes(files: Sequence[Path], model: str, given: dict[str, Any]) -> dict[str, Recipe]:
    """By the names of their files, options (by their parameters' names) over what stands in them.

    Raises:
        LexigramError: for two files of one name, and as `Recipe.read` and `merged` do.
    """
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise LexigramError(
                f"{found[file.stem]} and {file} would both be the row {file.stem!r}; rename one of them"
            )
        found[file.stem] = file
    return {name: merged(Recipe.read(file), model, given, where=str(file)) for name, file in found.items()}


def _heals(texts: list[str] | None, settings: dict[str, Any]) -> HealingSettings | None:
    """None where nobody asks for it.

    Raises:
        LexigramError: for settings without a text, and as `HealingSettings.parse` does.
    """
    told = {key: value for key, value in settings.items() if value is not None}
    if told and not texts:
        raise LexigramError(f"--heal-{next(iter(told))} says how to heal, and nothing on what; name a text with --heal")
    return HealingSettings.parse({"texts": texts, **told}) if texts else None


def _show_plan(prepared: ComparisonPlan) -> None:
    console.print(tables.comparison_plan_table(prepared))
    for name, why in prepared.again.items():
        say(f"{name} is made again: {why}")
    for job in prepared.jobs:
        if job.error is not None:
            say(f"{job.name} cannot be made: {job.error}")
        elif job.healed is not None:
            say(f"{job.healed.name}: {_healing_state(job, job.healed)}")
        if job.plan is not None and job.compresses and (warning := short_memory(job.plan)):
            say(f"{job.name}: {warning}")
    if prepared.plotless:
        say(prepared.plotless)


def _healing_state(job: Job, healed: Job) -> str:
    if healed.done is not None:
        return "there already"
    if healed.kept:
        return "to evaluate"
    if job.done is None or job.kept:
        return "to heal"
    return f"to heal; {job.name} was dropped, and is compressed again for it"


@contextmanager
def _watched(name: str) -> Iterator[Stages]:
    errors.print(name, markup=False, highlight=False)
    with drawing(errors) as bars:
        yield bars


def _tell(row: Row) -> None:
    if row.error is not None:
        say(f"{row.label} failed: {row.error}")
    elif row.recipe != DENSE:
        say(
            f"{row.label}: {row.bits_per_weight:.2f} bits a weight, token perplexity {perplexity(row.token_perplexity)}"
        )


def _show(found: Comparison) -> None:
    shown = table(found.rows, brief=True)
    console.print(tables.comparison_table(shown))
    for note in shown.notes:
        say(note)
    say(f"written: {', '.join(map(str, found.files))}")
