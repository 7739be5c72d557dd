"""What safetensors files say of themselves: names, dtypes, shapes and places of their tensors, and hashes of what lies there.

Nothing here takes more memory than a header and a block of bytes, whatever a file claims.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lexigram.errors import LexigramError

_LENGTH = 8  # bytes at the start of a file that hold the header's length
_LONGEST = 100_000_000  # bytes of a header; the safetensors package refuses longer ones too
_BLOCK = 1 << 20

DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names, in the order in which the safetensors package writes them: wide ones first, so that all are aligned."""


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
    """Every tensor of `files` by its name; they fill the files without a gap or an overlap, as the format asks.

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


def read_metadata(file: Path) -> dict[str, str]:
    """What a file says of itself beside its tensors.

    Raises:
        LexigramError: where it cannot be read.
    """
    return {str(key): str(value) for key, value in (_content(file)[0].get("__metadata__") or {}).items()}


def _headers(file: Path) -> Mapping[str, Header]:
    content, start, size = _content(file)
    found = {name: _header(file, name, entry, start, size) for name, entry in content.items() if name != "__metadata__"}
    end = start
    for name, header in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if header.begin != end:
            raise _unreadable(file, f"there is a gap or an overlap before {name}")
        end = header.end
    if end != size:
        raise _unreadable(file, f"it has {size} bytes, by its header {end}")
    return found


def _content(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header as it stands there, where the tensors begin, and the file's size. The file is never mapped."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH), "little")
            if size < _LENGTH or length > min(size - _LENGTH, _LONGEST):
                raise _unreadable(file, f"its header would have {length} bytes, and it has {size} in all")
            content = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, error) from error
    metadata = content.get("__metadata__") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(metadata, dict | None):
        raise _unreadable(file, "its header is no JSON object")
    return content, _LENGTH + length, size


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no key stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _header(file: Path, name: str, entry: object, begin: int, size: int) -> Header:
    """One entry, held against the file's size: nothing is ever allocated that the file does not hold."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _unreadable(file, f"what its header says of {name} is not dtype, shape and place")
    shape, places = entry["shape"], entry["data_offsets"]
    lists = isinstance(shape, list) and isinstance(places, list) and len(places) == 2
    if not lists or not all(type(number) is int and 0 <= number <= size for number in [*shape, *places]):
        raise _unreadable(file, f"the shape or the place of {name} in its header is none")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _unreadable(file, f"{name} has the dtype {entry['dtype']!r}, which this version does not know")
    if places[1] - places[0] != math.prod(shape) * dtype.itemsize:
        raise _unreadable(file, f"the shape of {name} in its header does not fit its place")
    return Header(file, entry["dtype"], tuple(shape), begin + places[0], begin + places[1])


def _unreadable(file: Path, error: object) -> LexigramError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return LexigramError(f"the weight file {file} cannot be read: {reason}; fetch or write the model again")
