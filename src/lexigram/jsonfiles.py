"""JSON objects in files: checked before the work, written whole, read with one sentence on what is wrong."""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from lexigram.errors import LexigramError
from lexigram.staging import replacing

_MOST_BYTES = 2**28  # of a file to read: it takes some ten times as much memory


def check_writable(file: Path) -> None:
    """Raise, before any work, where `file` cannot become a file in the end."""
    if file.is_dir():
        raise LexigramError(f"{file} is a folder; name a file to write the figures to")
    parent = next(folder for folder in file.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise LexigramError(
            f"{file} cannot be written: {parent} is not a folder that one can write to; name another file"
        )


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write `content`, whole or not at all; a number at the top of it that is not finite becomes null.

    Raises:
        LexigramError: where the file cannot be written.
    """
    write_text(file, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write `text` in UTF-8, whole or not at all: beside `file`, and then in its place.

    Raises:
        LexigramError: where the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LexigramError(
            f"{file} cannot be written: {error.strerror or error}; free some space, or name another file"
        ) from error


def read_json(file: Path, *, finite: bool = True, remedy: str) -> dict[str, Any]:
    """The object in `file`.

    Args:
        file: to read; UTF-8.
        finite: refuse numbers that are NaN or infinite.
        remedy: what to do where it cannot be read.

    Raises:
        LexigramError: where the file cannot be read or holds something else, where a key stands twice in one object, of which
            every reader would believe another, and for text that cannot be written again (half of a surrogate pair).
    """

    def number(text: str) -> float:
        if finite and not math.isfinite(float(text)):
            raise ValueError(f"the number {text} is not finite")
        return float(text)

    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        text = file.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_unique, parse_float=number, parse_constant=number)
        json.dumps(content, ensure_ascii=False).encode()
    except OSError as error:
        raise LexigramError(f"{file} cannot be read: {error.strerror or error}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise LexigramError(f"{file} is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise LexigramError(f"{file} holds no JSON object; {remedy}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of an object as a mapping, each key once."""
    content = dict(pairs)
    if len(content) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} stands twice")
    return content


def _finite(content: dict[str, Any]) -> dict[str, Any]:
    """The same with None for what JSON has no number for."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in content.items()
    }
