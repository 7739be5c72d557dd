"""A folder of named tensors on their way between two stages of a run: one safetensors file an entry, whole or not there.

What the tensors mean, and when the folder is complete, is the business of those who write and read them.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lexigram.errors import LexigramError
from lexigram.shards import raw
from lexigram.staging import replacing

_HASH = "sha256"


class TensorFiles:
    """Entries by name, read back on `device`.

    Args:
        folder: made where it does not exist.
        device: of what is read.
        kind: what an entry is called in an error message.
    """

    def __init__(self, folder: Path, device: torch.device, kind: str) -> None:
        self.folder = folder
        self._device = device
        self._kind = kind
        with self.writing():
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write an entry, in place of one of the same name.

        Raises:
            LexigramError: where the folder cannot be written.
        """
        stored = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        with self.writing(), replacing(self._file(name)) as file:
            save_file(stored, file, metadata={**(metadata or {}), _HASH: _sha256(stored)})

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the metadata of an entry.

        Raises:
            LexigramError: where its file is missing or damaged.
        """
        file = self._file(name)
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
                metadata = dict(opened.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise self.damaged(name, error) from error
        if metadata.pop(_HASH, None) not in (None, _sha256(tensors)):
            raise self.damaged(name, "its values are not those that were written")
        return {key: tensor.to(self._device) for key, tensor in tensors.items()}, metadata

    def has(self, name: str) -> bool:
        """Whether there is such an entry."""
        return self._file(name).is_file()

    def remove(self, name: str) -> None:
        """Forget an entry, if there is one."""
        self._file(name).unlink(missing_ok=True)

    def damaged(self, name: str, reason: object) -> LexigramError:
        """What to raise for an entry that is not as it was written."""
        return LexigramError(
            f"the {self._kind} {self._file(name)} cannot be read: {reason}; delete its folder and run again"
        )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what can go wrong with a disk into a LexigramError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LexigramError(
                f"{self.folder} cannot be written: {reason}; free some space and go on with --resume, or name another --cache"
            ) from error

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}:".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()
