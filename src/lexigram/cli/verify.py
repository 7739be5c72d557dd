"""`lexigram verify`: whether a compressed folder is what its record says."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lexigram.cli.arguments import Against, Device, Folder, JsonFile, texts
from lexigram.cli.screen import console, errors
from lexigram.devices import resolve_device
from lexigram.errors import LexigramError
from lexigram.jsonfiles import check_writable, write_json
from lexigram.progress import drawing
from lexigram.verification import Verification
from lexigram.verification import verify as run_verify

EXAMPLES = (
    "lexigram verify smaller",
    "lexigram verify smaller --against Qwen/Qwen3-0.6B",
    "lexigram verify smaller --against demo --text demo --json verified.json",
)
_OUTCOMES = {True: "[green]passed[/]", False: "[bold red]failed[/]", None: "not judged"}


def verify(
    folder: Folder,
    against: Against = None,
    text: Annotated[list[str] | None, texts("To measure every layer's output error on (needs --against)")] = None,
    sequences: Annotated[int | None, typer.Option(help="How many sequences of it. [default: those of the run]")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence. [default: those of the run]")] = None,
    calibration_seed: Annotated[
        int | None, typer.Option(help="Decides which sequences are drawn. [default: that of the run]")
    ] = None,
    json_file: JsonFile = None,
    device: Device = "auto",
) -> None:
    """Check that DIR is what was written: hashes of every tensor and file, forms, sizes; and, with --against, what it is worth.

    Ends in 1 where anything is wrong, and names it. A text of the run's own calibration has the recorded errors, too.
    """
    if json_file:
        check_writable(json_file)
    with drawing(errors) as bars:
        found = run_verify(
            folder,
            against=against,
            texts=text or (),
            sequences=sequences,
            length=length,
            calibration_seed=calibration_seed,
            device=resolve_device(device),
            progress=bars,
        )
    if json_file:
        write_json(json_file, {"passed": found.passed, **found.model_dump(mode="json")})
    console.print(_table(found))
    if found.failed:
        raise LexigramError(f"{folder} is not as it should be: {found.failed[0].message}; fetch it or compress again")


def _table(found: Verification) -> Table:
    table = Table(title=escape(found.folder))
    for column in ("check", "outcome", "what was found"):
        table.add_column(column, overflow="fold")
    for check in found.checks:
        table.add_row(check.name, _OUTCOMES[check.passed], escape(check.message))
    return table
