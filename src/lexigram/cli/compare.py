"""`lexigram compare`: several recipes on one calibration, into one table and one plot."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lexigram import report
from lexigram.cli.arguments import AUTO_DTYPE, DtypeName, Model
from lexigram.cli.recipes import OPTIONS
from lexigram.cli.screen import console, errors, say
from lexigram.comparing import Comparison, run_comparison
from lexigram.comparison import DENSE, Row, perplexity, table
from lexigram.comparison_planning import ComparisonPlan, plan_comparison
from lexigram.errors import LexigramError
from lexigram.progress import Bars, drawing
from lexigram.recipe import Recipe, merge
from lexigram.shown import MACHINE

EXAMPLES = (
    "lexigram compare demo --recipes svd.yaml wanda.yaml --ratio 0.2 0.4 --calibration demo --text demo --out compared",
    "lexigram compare ./model --recipes *.yaml --seeds 0 1 --calibration c4.jsonl --text wiki.test.txt --out compared",
)
_EVALUATION = "Evaluation"


def _of_field(name: str, *spellings: str, **changes: Any) -> Any:
    """The option of a recipe's field, as `lexigram compress` has it."""
    option = OPTIONS[name]
    told = {"metavar": option.metavar, "help": option.help, "rich_help_panel": option.panel, **changes}
    return typer.Option(option.written, *spellings, **told)


def compare(
    model: Model,
    recipes: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE...",
            help="YAML files with any of the settings of a recipe.yaml, such as `method: {name: wanda}`; a row has its file's "
            "name.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for rows, models, table and plot. What is there already is not made again."
        ),
    ],
    text: Annotated[
        list[str],
        typer.Option(
            "--text", "-t", metavar="TEXT...", help="To evaluate on: .txt or .jsonl files, `demo`, or `hub:NAME`."
        ),
    ],
    ratio: Annotated[
        list[float] | None,
        _of_field(
            "ratio",
            "-r",
            metavar="RATIO...",
            help="Every recipe at each of these. [default: each recipe's own, or 0.2]",
        ),
    ] = None,
    calibration: Annotated[list[str] | None, _of_field("calibration", "-c", metavar="TEXT...")] = None,
    sequences: Annotated[int | None, _of_field("sequences")] = None,
    length: Annotated[int | None, _of_field("length")] = None,
    calibration_seed: Annotated[
        list[int] | None,
        _of_field(
            "calibration_seed",
            "--seeds",
            metavar="SEED...",
            help="Decides which sequences are drawn. Of several the table shows means. [default: the recipes' own, or 0]",
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens a window.", rich_help_panel=_EVALUATION)] = 1024,
    windows: Annotated[
        int | None, typer.Option(help="Only the first so many windows.", rich_help_panel=_EVALUATION)
    ] = None,
    dtype: Annotated[
        DtypeName,
        typer.Option(
            metavar="DTYPE",
            help=f"Of what is not compressed while it is evaluated: {', '.join(name.value for name in DtypeName)}.",
            rich_help_panel=_EVALUATION,
        ),
    ] = AUTO_DTYPE,
    device: Annotated[str | None, _of_field("device")] = None,
    drop_models: Annotated[
        bool,
        typer.Option(
            "--drop-models", metavar="", help="Remove each model once it is evaluated.", rich_help_panel=MACHINE
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            metavar="",
            help="Replace rows that were made from other recipes, texts or windows.",
            rich_help_panel=MACHINE,
        ),
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
    prepared = plan_comparison(
        _recipes(recipes, {"model": model, "device": device}, common),
        out,
        text,
        ratios=ratio or (),
        seeds=calibration_seed or (),
        context=context,
        windows=windows,
        dtype=dtype.value,
        overwrite=overwrite,
        drop_models=drop_models,
    )
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
    console.print(report.comparison_plan_table(prepared))
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
    console.print(report.comparison_table(shown))
    for note in shown.notes:
        say(note)
    say(f"written: {', '.join(map(str, found.files))}")
