"""Hidden states that wait in files."""

import tempfile
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexigram.errors import LexigramError
from lexigram.shards import fill, raw


class Spilled:
    """A tensor in a file of its own, which goes away with this object.

    Raises:
        LexigramError: where the folder cannot be written.
    """

    def __init__(self, tensor: Tensor, folder: Path) -> None:
        self.dtype, self.shape, self._device = tensor.dtype, tuple(tensor.shape), tensor.device
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".hidden", delete=False) as file:
                self._file = Path(file.name)
                weakref.finalize(self, self._file.unlink, missing_ok=True)
                file.write(raw(tensor.detach().cpu().contiguous()))
        except OSError as error:
            raise LexigramError(
                f"{folder} cannot be written: {error.strerror or error}; free some space and go on with --resume"
            ) from error

    def read(self) -> Tensor:
        """The tensor as it was, on its device."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        try:
            with self._file.open("rb", buffering=0) as file:
                fill(file, tensor)
        except OSError as error:
            raise LexigramError(f"{self._file} cannot be read: {error.strerror or error}; run again") from error
        return tensor.to(self._device)


def spilling(folder: Path) -> Any:
    """What keeps tensors as files in `folder`, for `LayerRunner`."""
    return partial(Spilled, folder=folder)
