"""`lexigram eval`: a model's figures on a text."""

from typing import Annotated

import typer

from lexigram.calibration.text import read_texts
from lexigram.cli.arguments import AUTO_DTYPE, Device, Dtype, JsonFile, Model, texts
from lexigram.cli.screen import console, errors
from lexigram.devices import resolve_device
from lexigram.evaluation.perplexity import check_windowing
from lexigram.evaluation.records import evaluated
from lexigram.jsonfiles import check_writable, write_json
from lexigram.progress import drawing
from lexigram.recipe import BOS
from lexigram.reporting import tables

EXAMPLES = (
    "lexigram eval smaller --text wiki.test.txt --reference demo",
    "lexigram eval smaller --text demo --windows 20 --json smaller.json",
)


def eval_(
    model: Model,
    text: Annotated[list[str], texts("To evaluate on")],
    context: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows. [default: the context, no overlap]")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Only the first so many windows.")] = None,
    bos: Annotated[bool, typer.Option("--bos", help=BOS)] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", "--against", metavar="MODEL", help="To measure KL divergence and agreement against."
        ),
    ] = None,
    json_file: JsonFile = None,
    label: Annotated[str | None, typer.Option(help="Name of the row in reports. [default: MODEL]")] = None,
    device: Device = "auto",
    dtype: Dtype = AUTO_DTYPE,
) -> None:
    """Measure MODEL's perplexity on a text and, with --reference, its distance from another model."""
    if json_file:
        check_writable(json_file)
    check_windowing(context, stride, windows)
    content = read_texts(text, demo_part="evaluation", characters=None)
    place = resolve_device(device)
    with drawing(errors) as bars, bars.steps("evaluate") as update:
        found = evaluated(
            model,
            text,
            content,
            reference=reference,
            context=context,
            stride=stride,
            windows=windows,
            bos=bos,
            device=place,
            dtype=dtype.value,
            progress=update,
        )
    figures = {"label": label or model, **found}
    if json_file:
        write_json(json_file, figures)
    console.print(*tables.evaluation_tables([figures]))
