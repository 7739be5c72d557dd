"""What an earlier comparison left in the folder, and whether it was made from the same; nothing is written here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from lexigram.comparison.table import Row, difference
from lexigram.errors import LexigramError
from lexigram.jsonfiles import read_json
from lexigram.staging import RUN_FILE

ROWS, MODELS, ORIGINS, CACHE = "rows", "models", "origins", "cache"
"""Folders in that of a comparison: what was measured, on which models, what those were made from, Grams."""

HASHED = "weights.json"
"""The file with the hash of the model's weights."""


class Left(NamedTuple):
    """Something that is there: of use, or what it was made from besides. Neither where nothing is there."""

    row: Row | None = None
    model: bool = False
    other: str | None = None
    """In what its origin differs, where it is to be replaced."""


def row_left(out: Path, name: str, made_from: Mapping[str, Any], *, overwrite: bool) -> Left:
    """The row of this name.

    Raises:
        LexigramError: where it was made from something else or cannot be read, and may not be replaced.
    """
    file = out / ROWS / f"{name}.json"
    if not file.exists():
        return Left()
    try:
        row = Row.model_validate(read_json(file, remedy="make the row again"))
    except (LexigramError, ValidationError) as error:
        reason = str(error) if isinstance(error, LexigramError) else "other keys and values than a row has"
        if overwrite:
            return Left(other=f"{file} is damaged ({reason})")
        raise LexigramError(f"{file} is damaged ({reason}); delete it, or give --overwrite") from error
    other = _other(file, row.made_from, made_from, overwrite=overwrite)
    return Left(other=other) if other else Left(row=row)


def model_left(out: Path, name: str, origin: Mapping[str, Any], *, overwrite: bool) -> Left:
    """The model of this name.

    Raises:
        LexigramError: where it was made from something else, or nothing tells from what, and may not be replaced.
    """
    folder = out / MODELS / name
    if not (folder / RUN_FILE).is_file():
        return Left()
    file = origin_file(out, name)
    there = read_json(file, remedy=f"delete {folder} and run again") if file.is_file() else {}
    other = _other(folder, there, origin, overwrite=overwrite)
    return Left(other=other) if other else Left(model=True)


def origin_file(out: Path, name: str) -> Path:
    """Where it stands what the model of this name is made from."""
    return out / ORIGINS / f"{name}.json"


def _other(place: Path, there: Mapping[str, Any], here: Mapping[str, Any], *, overwrite: bool) -> str | None:
    """The first difference in words; None where there is none.

    Raises:
        LexigramError: where there is one, and what is there may not be replaced.
    """
    found = difference(dict(there), dict(here))
    if found is None:
        return None
    path, old, new = found
    said = f"{path} was {old} and is {new}"
    if not overwrite:
        raise LexigramError(
            f"{place} was made from something else: {said}; name another --out, or replace what differs with --overwrite"
        )
    return said
