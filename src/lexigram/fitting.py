"""One unit to fit, with all that this takes: what travels to a worker, and what comes back."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lexigram.allocation.units import Unit
from lexigram.errors import LexigramError
from lexigram.gram import Gram
from lexigram.memory import short_of_memory
from lexigram.methods import FitReport, Fitted, Member, fit_group
from lexigram.methods.base import Candidates, assemble

LESS_MEMORY = "free some, or take fewer --workers, a smaller --max-ram or --device cpu"
"""What helps a run that memory does not suffice for."""

OTHERWISE = "take more calibration tokens (--sequences), another --method, or leave it out with --exclude"
"""What helps where the numbers of a unit misbehave."""


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
        LexigramError: as `naming` does, and where a number of the report is not finite.
    """
    with naming(task.unit.members, "compressed"):
        found = task.fitted()
        for name, (_, report) in zip(task.unit.members, found.members, strict=True):
            _check_finite(name, report)
        return task.unit, found


@contextmanager
def naming(members: Iterable[str], what: str) -> Iterator[None]:
    """Turn what a unit fails by into an error that names it; what nobody can mend stays as it is.

    Args:
        members: of the unit.
        what: cannot be done with it: "compressed".

    Raises:
        LexigramError: for a ValueError, linear algebra that finds no solution, and memory that does not suffice.
    """
    try:
        yield
    except (ValueError, MemoryError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise LexigramError(f"{' + '.join(members)} cannot be {what}: {reason}") from error


def _check_finite(name: str, report: FitReport) -> None:
    """Refuse numbers that JSON does not have, and with them values that stand for nothing."""
    numbers = [("relative error", report.relative_error), *report.details.items()]
    for key, value in [*numbers, *(("objective", value) for value in report.objective)]:
        if not math.isfinite(value):
            raise ValueError(f"the {key} of {name} is {value}; {OTHERWISE}")


def _reason(error: Exception) -> str | None:
    """What an error says, with what helps; None for what nobody can mend."""
    short = short_of_memory(error)
    if short is not None:
        return f"{short}; {LESS_MEMORY}"
    said = " ".join(str(error).split())
    if isinstance(error, torch.linalg.LinAlgError):
        return f"{said.rstrip('.')}; {OTHERWISE}"
    return said if isinstance(error, ValueError) else None


def _generator(seed: int, name: str) -> torch.Generator:
    """One stream of random numbers a layer, whatever the order in which layers are fitted."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
