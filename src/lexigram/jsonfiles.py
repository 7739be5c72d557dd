"""JSON objects in files: checked before the work, written whole, read with one sentence on what is wrong."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lexigram.errors import LexigramError


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
    text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise LexigramError(f"{file} cannot be written: {error.strerror or error}; name another file") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`.

    Raises:
        LexigramError: where the file cannot be read or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LexigramError(f"{file} cannot be read: {error.strerror or error}; name what lexigram wrote") from error
    except ValueError as error:
        raise LexigramError(f"{file} is not JSON ({error}); name what lexigram wrote") from error
    if not isinstance(content, dict):
        raise LexigramError(f"{file} holds no JSON object; name what lexigram wrote")
    return content


def _finite(content: dict[str, Any]) -> dict[str, Any]:
    """The same with None for what JSON has no number for."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in content.items()
    }
