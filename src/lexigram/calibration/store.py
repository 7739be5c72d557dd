"""Grams kept in a folder between their making and their use: one file a site, and only those in use are in memory."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lexigram.errors import LexigramError
from lexigram.gram import Gram

_COMPLETE = "complete.json"


class GramStore:
    """Grams by input site, read back on `device`. The folder is complete when `seal` has written its list of sites."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self._device = device
        self._latest: dict[str, Gram] = {}
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def update(self, grams: Mapping[str, Gram]) -> None:
        """Keep Grams by their sites' names; a file appears whole or not at all."""
        for site, gram in grams.items():
            file = self._file(site)
            partial = file.with_suffix(".partial")
            with _writing(self.folder):
                save_file({"matrix": gram.matrix.cpu().contiguous()}, partial, metadata={"tokens": str(gram.tokens)})
                partial.replace(file)

    @contextmanager
    def using(self, sites: Iterable[str]) -> Iterator[dict[str, Gram]]:
        """The Grams of `sites`. They stay in memory until others are asked for: neighbours often share a site, and what was
        computed from it.

        Raises:
            LexigramError: where a file is missing or damaged.
        """
        self._latest = {site: self._latest.get(site) or self._read(site) for site in dict.fromkeys(sites)}
        yield self._latest

    def seal(self, sites: Iterable[str]) -> None:
        """Say that the Grams of all `sites` are there."""
        with _writing(self.folder):
            (self.folder / _COMPLETE).write_text(json.dumps(sorted(set(sites))), encoding="utf-8")

    def holds(self, sites: Iterable[str]) -> bool:
        """Whether the folder is sealed and has the Grams of all `sites`."""
        return (self.folder / _COMPLETE).is_file() and all(self._file(site).is_file() for site in sites)

    def _file(self, site: str) -> Path:
        return self.folder / f"{site}.safetensors"

    def _read(self, site: str) -> Gram:
        file = self._file(site)
        try:
            with safe_open(file, framework="pt") as opened:
                return Gram(opened.get_tensor("matrix").to(self._device), int(opened.metadata()["tokens"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise LexigramError(f"the Gram {file} cannot be read: {error}; delete its folder and run again") from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LexigramError(
            f"{folder} cannot be written: {reason}; free some space, or name another folder with --cache"
        ) from error
