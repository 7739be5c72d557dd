"""`lexigram eval`: a model's figures on a text."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from lexigram.calibration.text import read_texts
from lexigram.calibration.tokens import token_ids
from lexigram.cli.arguments import AUTO_DTYPE, Device, Dtype, Model
from lexigram.cli.screen import console, errors
from lexigram.devices import resolve_device
from lexigram.errors import LexigramError
from lexigram.evaluation import bits_per_weight, evaluate, stored_bytes
from lexigram.jsonfiles import check_writable, write_json
from lexigram.progress import drawing
from lexigram.records import versions
from lexigram.reporting import tables
from lexigram.transformers_io import open_model

EXAMPLES = (
    "lexigram eval smaller --text wiki.test.txt --reference demo",
    "lexigram eval smaller --text demo --windows 20 --json smaller.json",
)


def eval_(
    model: Model,
    text: Annotated[
        list[str], typer.Option("--text", "-t", help="A .txt or .jsonl file (repeatable), `demo`, or `hub:NAME`.")
    ],
    context: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows. [default: the context, no overlap]")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="A MODEL to measure KL divergence and agreement against.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there; an infinite one is null.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Name of the row in reports. [default: MODEL]")] = None,
    device: Device = "auto",
    dtype: Dtype = AUTO_DTYPE,
) -> None:
    """Measure MODEL's perplexity on a text and, with --reference, its distance from another model."""
    if json_file:
        check_writable(json_file)
    content = read_texts(text, demo_part="evaluation")
    place = resolve_device(device)
    opened, tokenizer = open_model(model, device=place, dtype=dtype.value)
    other = None
    if reference:
        other, its_tokenizer = open_model(reference, device=place, dtype=dtype.value)
        if not torch.equal(token_ids(tokenizer, content), token_ids(its_tokenizer, content)):
            raise LexigramError(
                f"{model} and {reference} split the text into different tokens, so their predictions cannot be compared; name "
                "the model that was compressed as --reference"
            )
    with drawing(errors) as bars, bars.steps("evaluate") as update:
        result = evaluate(
            opened,
            tokenizer,
            content,
            context=context,
            stride=stride,
            windows=windows,
            reference=other,
            progress=update,
        )
    figures = {
        "label": label or model,
        "model": model,
        "reference": reference,
        "text": ", ".join(Path(name).name for name in text),
        "model_bytes": stored_bytes(opened),
        "bits_per_weight": bits_per_weight(opened),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "device": str(place),
        **result.model_dump(),
        "versions": versions(),
        "command": " ".join(sys.argv),
    }
    if json_file:
        write_json(json_file, figures)
    console.print(*tables.evaluation_tables([figures]))
