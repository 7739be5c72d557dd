"""One unit to fit, with all that this takes: what travels to a worker, and what comes back."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lexigram.allocation.units import Unit
from lexigram.errors import LexigramError
from lexigram.gram import Gram
from lexigram.methods import Fitted, Member, fit_group
from lexigram.methods.base import Candidates, assemble


@dataclass(frozen=True)
class FitTask:
    """Weights (out, in) of a unit's members with the Grams of their inputs; `correction` is that of `Gram.aim`."""

    unit: Unit
    weights: list[Tensor]
    grams: list[Gram]
    correction: float
    seed: int

    def fitted(self) -> Fitted:
        """Factors of all members."""
        pairs = zip(self.weights, self.grams, strict=True)
        members = [Member(gram.aim(weight, self.correction), gram) for weight, gram in pairs]
        return fit_group(self.unit.method, members, self.unit.spec, _generator(self.seed, self.unit.members[0]))


@dataclass(frozen=True)
class AssembleTask:
    """The parts of a weight (out, in) that a choice over the whole model left."""

    unit: Unit
    weight: Tensor
    gram: Gram
    parts: Candidates

    def fitted(self) -> Fitted:
        """Factors of the one member."""
        return Fitted([assemble(self.unit.method, self.weight, self.gram, self.parts, self.unit.spec.members[0])])


Task = FitTask | AssembleTask


def fitted(task: Task) -> tuple[Unit, Fitted]:
    """The unit of a task and its factors.

    Raises:
        LexigramError: naming the unit, where it cannot be fitted.
    """
    try:
        return task.unit, task.fitted()
    except ValueError as error:
        raise LexigramError(f"{' + '.join(task.unit.members)} cannot be compressed: {error}") from error


def _generator(seed: int, name: str) -> torch.Generator:
    """One stream of random numbers a layer, whatever the order in which layers are fitted."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
