"""Arguments and options that several commands have and that mean the same in all of them."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from lexigram.cli.fields import choices
from lexigram.recipe import Recipe
from lexigram.shown import CALIBRATION, MACHINE

_DTYPES = choices(Recipe.model_fields["dtype"])
DtypeName = Enum("DtypeName", {name: name for name in ("auto", *_DTYPES)}, type=str)  # type: ignore[misc]
AUTO_DTYPE = DtypeName("auto")

Model = Annotated[str, typer.Argument(metavar="MODEL", help=Recipe.model_fields["model"].description)]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="What `lexigram compress`, `heal` or `merge` wrote.")]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to write; it appears when it is complete.")
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", metavar="", help="Replace OUT if it is an earlier result of ours.", rich_help_panel=MACHINE
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        metavar="",
        help="Go on with a run that was ended early, from OUT.unfinished; the result is the same.",
        rich_help_panel=MACHINE,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Print the plan and stop.", rich_help_panel=MACHINE)
]
Against = Annotated[
    str | None, typer.Option("--against", metavar="MODEL", help="The original: the model that DIR was made from.")
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write what was found there, too; an infinite figure is null."),
]


def texts(purpose: str) -> Any:
    """What typer is told of the option for texts, in the words of the fields that make the same option elsewhere.

    Args:
        purpose: what the texts are for: `To evaluate on`.
    """
    told = f"{purpose}: .txt or .jsonl files (or .gz), `demo`, or `hub:NAME`. Repeatable."
    return typer.Option("--text", "-t", metavar="TEXT", help=told)


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
        "[default: one a core, for models worth it, or as many as memory holds]",
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
