"""`lexigram compare`: several recipes on one calibration, into one table and one plot."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lexigram.cli.arguments import DtypeName, Model
from lexigram.cli.options import Option
from lexigram.cli.recipes import OPTIONS, declared
from lexigram.cli.screen import console, errors, say
from lexigram.comparison.order import Comparison, run_comparison
from lexigram.comparison.planning import ComparisonPlan, ComparisonSettings, plan_comparison
from lexigram.comparison.table import DENSE, Row, perplexity, table
from lexigram.errors import LexigramError
from lexigram.progress import Bars, drawing
from lexigram.recipe import Recipe, merge
from lexigram.reporting import tables
from lexigram.shown import MACHINE

EXAMPLES = (
    "lexigram compare demo --recipes svd.yaml wanda.yaml --ratio 0.2 0.4 --calibration demo --text demo --out compared",
    "lexigram compare ./model --recipes *.yaml --seeds 0 1 --calibration c4.jsonl --text wiki.test.txt --out compared",
)
_OWN = {key: Option("settings", key, {"comparison": field}) for key, field in ComparisonSettings.model_fields.items()}
_RECIPES = (
    "YAML files with any of the settings of a recipe.yaml, such as `method: {name: wanda}`; a row has its file's name."
)
_OUT = "Folder for rows, models, table and plot. What is there already is not made again."
_OVERWRITE = "Replace rows that were made from other recipes, texts or windows."


def compare(
    model: Model,
    recipes: Annotated[list[Path], typer.Option(metavar="FILE...", help=_RECIPES)],
    out: Annotated[Path, typer.Option("--out", "-o", help=_OUT)],
    texts: Annotated[list[str], declared(_OWN["texts"], rich_help_panel=None)],
    ratios: Annotated[list[float] | None, declared(_OWN["ratios"])] = None,
    calibration: Annotated[list[str] | None, declared(OPTIONS["calibration"], metavar="TEXT...")] = None,
    sequences: Annotated[int | None, declared(OPTIONS["sequences"])] = None,
    length: Annotated[int | None, declared(OPTIONS["length"])] = None,
    seeds: Annotated[list[int] | None, declared(_OWN["seeds"])] = None,
    context: Annotated[int | None, declared(_OWN["context"])] = None,
    windows: Annotated[int | None, declared(_OWN["windows"])] = None,
    dtype: Annotated[DtypeName | None, declared(_OWN["dtype"])] = None,
    device: Annotated[str | None, declared(OPTIONS["device"])] = None,
    drop_models: Annotated[bool, declared(_OWN["drop_models"])] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help=_OVERWRITE, rich_help_panel=MACHINE)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Print the plan and stop.", rich_help_panel=MACHINE)
    ] = False,
) -> None:
    """Compress MODEL by several recipes on one calibration; measure every result, and MODEL itself.

    OUT gets one table (table.md, table.json) and a plot of perplexity against stored bits a weight. A comparison that was
    interrupted goes on at the next row. A recipe that fails is a row with its error, and the exit code is 1 in the end.
    MODEL stands before the options that take several values.
    """
    common = {"text": calibration or None, "sequences": sequences, "length": length}
    given = {
        "texts": texts,
        "ratios": ratios,
        "seeds": seeds,
        "context": context,
        "windows": windows,
        "dtype": dtype and dtype.value,
        "drop_models": drop_models,
    }
    settings = ComparisonSettings.model_validate({key: value for key, value in given.items() if value is not None})
    read = _recipes(recipes, {"model": model, "device": device}, common)
    prepared = plan_comparison(read, out, settings, overwrite=overwrite)
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


def _recipes(files: Sequence[Path], settings: dict[str, Any], calibration: dict[str, Any]) -> dict[str, Recipe]:
    """By the names of their files, options over what stands in them.

    Raises:
        LexigramError: for two files of one name, and as `Recipe.read` and `merge` do.
    """
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise LexigramError(
                f"{found[file.stem]} and {file} would both be the row {file.stem!r}; rename one of them"
            )
        found[file.stem] = file
    return {
        name: merge(
            Recipe.read(file), preset=None, method={}, calibration=calibration, settings=settings, where=str(file)
        )
        for name, file in found.items()
    }


def _show_plan(prepared: ComparisonPlan) -> None:
    console.print(tables.comparison_plan_table(prepared))
    for job in prepared.jobs:
        if job.error is not None:
            say(f"{job.name} cannot be made: {job.error}")
    if prepared.plotless:
        say(prepared.plotless)


@contextmanager
def _watched(name: str) -> Iterator[Bars]:
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
