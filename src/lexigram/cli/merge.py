"""`lexigram merge`: a LoRA adapter made a part of the compressed model that it was trained beside."""

from pathlib import Path
from typing import Annotated

import typer

from lexigram.cli.arguments import Folder, Out, Overwrite
from lexigram.cli.screen import errors, say, tell
from lexigram.merging import merge as run_merge
from lexigram.progress import drawing
from lexigram.reporting import tables

EXAMPLES = ("lexigram merge smaller --adapter lora --out tuned",)


def merge(
    folder: Folder,
    adapter: Annotated[
        Path,
        typer.Option("--adapter", "-a", metavar="ADAPTER", help="What PEFT's `save_pretrained` wrote; needs peft."),
    ],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Merge a LoRA adapter into DIR, which it was trained beside, and write a compressed model that needs no PEFT.

    Each compressed layer that has an adapter takes it as one more term of low rank, in bfloat16, and grows by that.
    """
    with drawing(errors) as bars:
        record = run_merge(folder, adapter, out, overwrite=overwrite, progress=bars)
    merged = record.merged[-1]
    say(
        f"{out}: {tables.size(record.model_bytes_after)}; the forms grew by {tables.size(merged.bytes)}, to "
        f"{record.bits_per_weight:.2f} bits a weight"
    )
    if merged.changed:
        tell(f"not compressed, and no longer the original's: {', '.join(merged.changed)}")
