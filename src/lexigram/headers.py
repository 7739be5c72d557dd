"""What safetensors files say of themselves: names, dtypes, shapes and places of their tensors, and hashes of what lies there.

Nothing here takes more memory than a header and a block of bytes, whatever a file claims.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from lexigram.errors import LexigramError

_LENGTH = 8  # bytes at the start of a file that hold the header's length
_BLOCK = 1 << 20


class Header(NamedTuple):
    """One tensor of a file: `begin` and `end` are its bytes' places, counted from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """What it weighs, the header aside."""
        return self.end - self.begin


def read_headers(files: Iterable[str | Path]) -> dict[str, Header]:
    """Every tensor of `files` by its name; the library has checked that they fill the files without a gap or an overlap.

    Raises:
        LexigramError: naming a file that cannot be read or is no such file, or a tensor that stands in two of them.
    """
    found: dict[str, Header] = {}
    for file in map(Path, files):
        for name, header in _headers(file).items():
            if not name.isprintable():
                raise LexigramError(f"{file} holds a tensor of the name {name!r}; fetch or write the model again")
            if name in found:
                raise LexigramError(
                    f"{name} stands in {found[name].file.name} and in {file.name}; fetch or write the model again"
                )
            found[name] = header
    return found


def tensor_sha256(header: Header) -> str:
    """SHA-256 of dtype and shape as the text ``DTYPE RxC:``, then the bytes as they lie in the file.

    Raises:
        LexigramError: where the file cannot be read.
    """
    digest = hashlib.sha256(f"{header.dtype} {'x'.join(map(str, header.shape))}:".encode("ascii"))
    try:
        with header.file.open("rb") as stream:
            stream.seek(header.begin)
            left = header.bytes
            while left and (block := stream.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
    except OSError as error:
        raise _unreadable(header.file, error) from error
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        LexigramError: where it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise _unreadable(file, error) from error
    return digest.hexdigest()


def _headers(file: Path) -> Mapping[str, Header]:
    try:
        with safe_open(file, framework="pt"):  # checks everything that is relied on below
            pass
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(_LENGTH), "little")
            content = json.loads(stream.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, error) from error
    start = _LENGTH + size
    return {
        name: Header(file, each["dtype"], tuple(each["shape"]), *(start + place for place in each["data_offsets"]))
        for name, each in content.items()
        if name != "__metadata__"
    }


def _unreadable(file: Path, error: Exception) -> LexigramError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return LexigramError(f"the weight file {file} cannot be read: {reason}; fetch or write the model again")
