"""`lexigram inspect` and `lexigram report`: what earlier commands wrote, as tables. Nothing is computed."""

from pathlib import Path
from types import NoneType
from typing import Annotated

import typer
from pydantic import ValidationError

from lexigram import report
from lexigram.cli.screen import console
from lexigram.errors import LexigramError
from lexigram.jsonfiles import read_json
from lexigram.recipe import explain
from lexigram.records import RunRecord, versions
from lexigram.staging import RUN_FILE

REPORT_EXAMPLES = ("lexigram report dense.json smaller.json",)
INSPECT_EXAMPLES = ("lexigram inspect smaller", "lexigram inspect smaller --json")


def report_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What `lexigram eval --json` wrote.")],
) -> None:
    """Print evaluations side by side."""
    rows = [read_json(file) for file in files]
    for file, row in zip(files, rows, strict=True):
        if not isinstance(row.get("token_perplexity", ""), (int, float, NoneType)):
            raise LexigramError(f"{file} holds no evaluation; name what `lexigram eval --json` wrote")
    console.print(*report.evaluation_tables(rows))


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `lexigram compress` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print run.json instead.")] = False,
) -> None:
    """Show where the bytes are, and each layer's form and error."""
    content = read_json(folder / RUN_FILE)
    try:
        record = RunRecord.model_validate(content)
    except ValidationError as error:
        raise LexigramError(
            f"{folder / RUN_FILE} was not written by lexigram {versions()['lexigram']}: {explain(error)}"
        ) from error
    if as_json:
        print(record.model_dump_json(indent=1))
        return
    console.print(report.bytes_table(record))
    console.print(report.forms_table(record.layers))
    console.print(report.error_map(record.layers))
