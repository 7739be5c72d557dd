"""`lexigram inspect` and `lexigram report`: what earlier commands wrote, as tables and a picture. Nothing is computed."""

from pathlib import Path
from types import NoneType
from typing import Annotated

import typer

from lexigram.cli.arguments import Folder
from lexigram.cli.screen import console, say
from lexigram.errors import LexigramError
from lexigram.jsonfiles import read_json
from lexigram.pictures import check_picture
from lexigram.records import read_run
from lexigram.reporting import heat_maps, tables

REPORT_EXAMPLES = ("lexigram report dense.json smaller.json",)
INSPECT_EXAMPLES = (
    "lexigram inspect smaller",
    "lexigram inspect smaller --json",
    "lexigram inspect smaller --plot smaller.svg",
)


def report_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What `lexigram eval --json` wrote.")],
) -> None:
    """Print evaluations side by side."""
    remedy = "name what `lexigram eval --json` wrote"
    rows = [read_json(file, remedy=remedy) for file in files]
    for file, row in zip(files, rows, strict=True):
        if not isinstance(row.get("token_perplexity", ""), (int, float, NoneType)):
            raise LexigramError(f"{file} holds no evaluation; {remedy}")
    console.print(*tables.evaluation_tables(rows))


def inspect(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print run.json instead.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the same by kind and decoder layer into a .png, .svg or .pdf; needs matplotlib."
        ),
    ] = None,
) -> None:
    """Show where the bytes are, and each layer's form and error."""
    if plot is not None:
        check_picture(plot)
    record = read_run(folder)
    if plot is not None:
        heat_maps.draw(record, plot)
    if as_json:
        print(record.model_dump_json(indent=1))
        return
    console.print(tables.bytes_table(record))
    console.print(tables.kinds_table(record))
    console.print(tables.forms_table(record.layers, before=record.done_since_fit))
    console.print(tables.error_map(record.layers, before=record.done_since_fit))
    if plot is not None:
        say(f"written: {plot}")
