"""Which model the rows of a comparison are of, by its content; nothing is written here.

A name or a path stays the same while what lies there changes. Of files the weights themselves are hashed, once: as long as
none of the files has changed, the hash that an earlier comparison left is taken. Of a model on the hub the commit tells,
and nothing is fetched for it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lexigram.errors import LexigramError
from lexigram.jsonfiles import read_json
from lexigram.records import versions
from lexigram.source import Source
from lexigram.weights import Digests, checked, model_sha256

_DECIDES = ("lexigram", "transformers")
"""Of the packages: whose code makes the rows, and whose config is part of the model's hash."""


class Hashed(BaseModel):
    """The hash of a model's weights, and of which files it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, tuple[int, int, int]]
    """By name: bytes, and when the content and when anything of the file was last changed, in nanoseconds."""
    weights_sha256: str
    """Of all weights, as `Digests` has it."""


def hashed(source: Source, earlier: Path) -> Hashed | None:
    """The hash of a model that lies in files here; None of one on the hub.

    Args:
        source: the model.
        earlier: where an earlier comparison may have left what it knew.

    Raises:
        LexigramError: where a weight cannot be read, is NaN or infinite.
    """
    files = _files(source)
    if files is None:
        return None
    before = _earlier(earlier)
    if before is not None and before.files == files:
        return before
    _, weights = source.opened()
    # In float64 nothing that is finite is beyond the largest value: in what weights are stored is for a recipe to say.
    return Hashed(files=files, weights_sha256=checked(weights, (), source.name, "float64").all)


def origin(source: Source, found: Hashed | None) -> dict[str, Any]:
    """What decides every row besides the recipe and the text: versions, and the model's content.

    `model_sha256` is that which Grams are kept under, of weights and config; of a model on the hub it is None, and
    `model_commit` is there.
    """
    config = source.config()
    there: Mapping[str, str] = versions()
    return {
        "versions": {name: there[name] for name in _DECIDES},
        "model_sha256": found and model_sha256(Digests("", found.weights_sha256), config),
        "model_commit": None if found else getattr(config, "_commit_hash", None),
    }


def _files(source: Source) -> dict[str, tuple[int, int, int]] | None:
    folder = Path(source.path)
    if not folder.is_dir():
        return None
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    stats = {file.name: file.stat() for file in files if source.gguf in (None, file.name)}
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats.items()}


def _earlier(file: Path) -> Hashed | None:
    """None where there is nothing that can be used: the weights are hashed again then."""
    try:
        return Hashed.model_validate(read_json(file, remedy="delete it")) if file.is_file() else None
    except (LexigramError, ValidationError):
        return None
