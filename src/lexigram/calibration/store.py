"""Grams kept in a folder between their making and their use: one file a site, and only those in use are in memory."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from lexigram.gram import Gram
from lexigram.tensorfiles import TensorFiles

_COMPLETE = "complete.json"


class GramStore:
    """Grams by input site, read back on `device`. The folder is complete when `seal` has written its list of sites."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self._files = TensorFiles(folder, device, "Gram")
        self._latest: dict[str, Gram] = {}

    def update(self, grams: Mapping[str, Gram]) -> None:
        """Keep Grams by their sites' names; a file appears whole or not at all."""
        for site, gram in grams.items():
            cross = {} if gram.cross is None else {"cross": gram.cross}
            self._files.put(site, {"matrix": gram.matrix, **cross}, {"tokens": str(gram.tokens)})

    def forget(self) -> None:
        """Keep no Gram in memory, nor what was computed from it."""
        self._latest = {}

    def drop(self, sites: Iterable[str]) -> None:
        """Remove the Grams of sites that nothing needs any more."""
        for site in sites:
            self._latest.pop(site, None)
            self._files.remove(site)

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
        with self._files.writing():
            (self.folder / _COMPLETE).write_text(json.dumps(sorted(set(sites))), encoding="utf-8")

    def missing(self, sites: Iterable[str]) -> set[str]:
        """Those of `sites` whose Grams are not here: of a calibration that ended early, the others stay."""
        return {site for site in sites if not self._files.has(site)}

    def holds(self, sites: Iterable[str]) -> bool:
        """Whether the folder is sealed and has the Grams of all `sites`."""
        return (self.folder / _COMPLETE).is_file() and not self.missing(sites)

    def _read(self, site: str) -> Gram:
        tensors, metadata = self._files.get(site)
        try:
            return Gram(tensors["matrix"], int(metadata["tokens"]), tensors.get("cross"))
        except (KeyError, ValueError) as error:
            raise self._files.damaged(site, error) from error
