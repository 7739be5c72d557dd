"""Arguments and options that several commands have and that mean the same in all of them."""

from enum import Enum
from typing import Annotated

import typer

from lexigram.cli.fields import choices
from lexigram.recipe import Recipe

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
