"""Drawings into files: what can be written is checked before the work, and what is written appears whole.

Matplotlib is optional (`pip install 'lexigram[plot]'`) and imported only where a picture is asked for. No display is needed.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lexigram.errors import LexigramError
from lexigram.jsonfiles import check_writable
from lexigram.staging import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS = 150  # an inch, in the PNG
_DATELESS = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""The formats by suffix, and what to leave out of each: one drawing should give the same file every time."""


def missing() -> str | None:
    """Why there can be no picture, and the remedy; None where there can."""
    try:
        import_module("matplotlib.figure")
    except ImportError:
        return "matplotlib is not installed; run: pip install 'lexigram[plot]'"
    return None


def check_picture(file: Path) -> None:
    """Raise, before any work, where `file` cannot become a picture in the end.

    Raises:
        LexigramError: for a suffix that names no format, a folder that does not exist or cannot be written to, and where
            matplotlib is not installed.
    """
    if file.suffix.lower() not in _DATELESS:
        raise LexigramError(
            f"{file} has the ending {file.suffix!r}, which is no known format; end it in {', '.join(_DATELESS)}"
        )
    if not file.absolute().parent.exists():
        raise LexigramError(
            f"{file} cannot be written: there is no folder {file.parent}; make it, or name another file"
        )
    check_writable(file)
    if why := missing():
        raise LexigramError(f"{file} cannot be drawn: {why}")


def save(drawing: Figure, file: Path) -> None:
    """Write `drawing` into `file`, in the format that its suffix names, whole or not at all.

    Raises:
        LexigramError: where the file cannot be written.
    """
    import matplotlib

    form = file.suffix.lower()
    try:
        # Without the salt the names inside of an SVG are random.
        with replacing(file) as partial, matplotlib.rc_context({"svg.hashsalt": "lexigram"}):
            drawing.savefig(partial, format=form.removeprefix("."), dpi=_DOTS, metadata=_DATELESS[form])
    except OSError as error:
        raise LexigramError(f"{file} cannot be written: {error.strerror or error}; free some space") from error
