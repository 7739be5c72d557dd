"""`lexigram export`: a compressed model for software that knows no lexigram."""

from pathlib import Path
from typing import Annotated

import typer

from lexigram.cli.arguments import AUTO_DTYPE, Dtype, Folder, Overwrite
from lexigram.cli.screen import say
from lexigram.reporting import tables
from lexigram.transformers_io import export_dense

EXAMPLES = ("lexigram export smaller --dense ordinary",)


def export(
    folder: Folder,
    out: Annotated[
        Path, typer.Option("--out", "-o", "--dense", metavar="OUT", help="Folder to write, with dense weights.")
    ],
    dtype: Dtype = AUTO_DTYPE,
    overwrite: Overwrite = False,
) -> None:
    """Write a compressed model as an ordinary checkpoint of the original size, for software that knows no lexigram."""
    export_dense(folder, out, dtype=dtype.value, overwrite=overwrite)
    say(f"{out}: an ordinary checkpoint, {tables.size(_folder_bytes(out))}")


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
