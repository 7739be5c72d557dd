"""Safetensors files read and written one tensor at a time, so that memory never holds more than one of them.

The `safetensors` package maps whole files, or takes a dictionary of all tensors that a file is to hold; under a memory limit
neither will do. What is written here is what that package writes, byte for byte. Knows no models.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, NamedTuple

import torch
from torch import Tensor

from lexigram.errors import LexigramError
from lexigram.headers import DTYPES, Header, read_headers

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_ALIGNMENT = 8
_NO_METADATA: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class FileTensor:
    """A tensor that lies in a file."""

    name: str
    header: Header

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""
        return DTYPES[self.header.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.header.shape

    def read(self) -> Tensor:
        """Its values, in memory of their own.

        Raises:
            LexigramError: where the file is gone, or shorter than it was.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        try:
            with self.header.file.open("rb", buffering=0) as file:
                file.seek(self.header.begin)
                fill(file, tensor)
        except OSError as error:
            reason = error.strerror or error
            raise LexigramError(
                f"{self.name} cannot be read from {self.header.file}: {reason}; fetch or write the model again"
            ) from error
        return tensor


class Entry(NamedTuple):
    """A tensor to write; `read` is called when it is its turn."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def file_tensors(*files: Path) -> dict[str, FileTensor]:
    """What `files` hold, by name; only their headers are read.

    Raises:
        LexigramError: where one cannot be read, is not such a file, or two hold a tensor of the same name.
    """
    return {name: FileTensor(name, header) for name, header in read_headers(files).items()}


def write_tensors(file: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] = _NO_METADATA) -> None:
    """Write a new file of `entries`: the bytes that the `safetensors` package would write.

    Raises:
        ValueError: where a tensor is not what its entry says.
        OSError: where the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    ordered = dict(sorted(entries.items(), key=lambda item: (_RANKS[item[1].dtype], item[0])))
    for name, entry in ordered.items():
        span = [end, end := end + entry.bytes]
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name, entry in ordered.items():
            _write(opened, name, entry)


def split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in their order, in parts of at most `most` bytes each; a larger one has a part of its own."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > most:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def fill(file: IO[bytes], tensor: Tensor) -> None:
    """Read the bytes of a contiguous tensor on the CPU from where an unbuffered file stands.

    Raises:
        OSError: where the file ends before.
    """
    left = raw(tensor)
    while len(left):
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise OSError("the file ends too early")
        left = left[count:]


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, as they are stored."""
    if not tensor.numel():
        return memoryview(b"")
    flat = tensor.reshape(-1)
    if flat.stride() != (1,):  # a single value may have any
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def _write(opened: IO[bytes], name: str, entry: Entry) -> None:
    tensor = entry.read().detach()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {entry.dtype} {entry.shape}")
    opened.write(raw(tensor.cpu().contiguous()))
