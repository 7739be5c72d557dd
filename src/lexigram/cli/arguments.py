"""Arguments and options that several commands have and that mean the same in all of them."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lexigram.cli.fields import choices
from lexigram.recipe import Recipe
from lexigram.shown import CALIBRATION, MACHINE

_DTYPES = choices(Recipe.model_fields["dtype"])
DtypeName = Enum("DtypeName", {name: name for name in ("auto", *_DTYPES)}, type=str)  # type: ignore[misc]
AUTO_DTYPE = DtypeName("auto")

Model = Annotated[str, typer.Argument(metavar="MODEL", help=Recipe.model_fields["model"].description)]
Device = Annotated[str, typer.Option(help=Recipe.model_fields["device"].description)]
Dtype = Annotated[
    DtypeName,
    typer.Option(
        metavar="DTYPE",
        help=f"Of what is not compressed: {', '.join(_DTYPES)}, or `auto`, what the checkpoint has.",
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Keep what is measured on the text in this folder, for other runs on the same model and text.",
        rich_help_panel=CALIBRATION,
    ),
]
Count = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Matrices that are fitted at once, each by a process with one thread; the result is the same. "
        "[default: one a core, for models worth it]",
        rich_help_panel=MACHINE,
    ),
]
MaxRam = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Take no more memory than this, such as 4GiB; refused where it cannot be kept.",
        rich_help_panel=MACHINE,
    ),
]
