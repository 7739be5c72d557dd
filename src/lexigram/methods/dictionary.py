"""One dictionary for the weights that share it, in one metric or in several: learned, and refitted to what was rounded.

It knows the solver's parts as arguments, and no method's config; stored forms are `storing`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from lexigram.gram import Gram
from lexigram.linalg.dictionary_learning import (
    Coding,
    LearnedDictionary,
    SharedDictionary,
    SharedMetrics,
    Start,
    Update,
    learn_dictionary,
    learn_shared_dictionary,
    refit_shared_dictionary,
    shared_metrics,
)
from lexigram.linalg.dictionary_update import mod
from lexigram.linalg.htp import confine
from lexigram.linalg.whitening import Whitening
from lexigram.methods.base import plain_whitening, pooled

_REFIT_STEPS = 8  # of conjugate gradients, to fit the codes to a dictionary that was rounded

Metric = Literal["exact", "mean", "plain"]
"""Of each weight its own, of all of them the pooled one, or none."""


class SolverParts(TypedDict):
    """The exchangeable parts of `learn_dictionary`."""

    coding: Coding
    update: Update
    start: Start
    accelerate: bool
    iterations: int
    tolerance: float


class Learned(NamedTuple):
    """Codes by block, dictionary (k, in) in the space of the inputs, and how the solver ended."""

    codes: Sequence[Tensor]
    dictionary: Tensor
    objective: Sequence[float]
    iterations: int
    replaced: int
    ridge: float
    stop: str


@dataclass(frozen=True)
class DictionaryProblem:
    """Weights that share one dictionary, in blocks of one metric each: a block's weights stand one below the other.

    `signals` are the blocks' ``W L^T``, `members` names each member's block, in order; atoms are `unit` long in the metrics.
    """

    metrics: tuple[Whitening, ...]
    signals: tuple[Tensor, ...]
    members: tuple[int, ...]
    rows: tuple[int, ...]
    unit: float

    @classmethod
    def of(cls, weights: Sequence[Tensor], grams: Sequence[Gram], metric: Metric) -> "DictionaryProblem":
        """One block for each different Gram, or a single one in the metric of the pooled Gram (`mean`) or none (`plain`)."""
        if metric == "plain":
            metrics, members, unit = [plain_whitening(weights[0])], [0] * len(weights), 1.0
        elif metric == "mean":
            every = pooled(grams)
            metrics, members, unit = [every.whitening], [0] * len(weights), every.token_unit
        else:
            different = list({id(gram): gram for gram in grams}.values())
            metrics, unit = [gram.whitening for gram in different], different[0].token_unit
            members = [next(i for i, other in enumerate(different) if other is gram) for gram in grams]
        signals = [
            whitening.whiten(torch.cat([w for w, of in zip(weights, members, strict=True) if of == block]))
            for block, whitening in enumerate(metrics)
        ]
        return cls(tuple(metrics), tuple(signals), tuple(members), tuple(len(weight) for weight in weights), unit)

    @cached_property
    def shared(self) -> SharedMetrics:
        """The common coordinates of several metrics."""
        return shared_metrics([metric.factor for metric in self.metrics])

    @property
    def inverse(self) -> Tensor | None:
        """``L^-1`` of the only metric; None where there are several."""
        return self.metrics[0].inverse if len(self.metrics) == 1 else None

    def gram(self) -> Tensor:
        """The sum of the metrics' Grams, (in, in)."""
        return torch.stack([metric.factor.T @ metric.factor for metric in self.metrics]).sum(0)

    @property
    def energy(self) -> float:
        """Squared norm of all signals."""
        return sum(float(signals.square().sum(dtype=torch.float64)) for signals in self.signals)

    def learned(self, parts: SolverParts, atoms: int, sparsity: int, generator: torch.Generator) -> Learned:
        """Dictionary and codes before any rounding."""
        found: LearnedDictionary | SharedDictionary
        if len(self.metrics) > 1:
            found = learn_shared_dictionary(self.signals, self.shared, atoms, sparsity, generator=generator, **parts)
            codes, dictionary = found.codes, found.dictionary
        else:
            (metric,), (signals,) = self.metrics, self.signals
            found = learn_dictionary(signals, atoms, sparsity, generator=generator, **parts)
            codes, dictionary = (found.codes,), metric.unwhiten(found.dictionary)
        return Learned(
            [part / self.unit for part in codes],
            dictionary * self.unit,
            found.objective,
            found.iterations,
            found.replaced,
            found.ridge,
            found.stop,
        )

    def by_member(self, codes: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """(block, codes) of every member, in order, from the codes of the blocks."""
        parts = [
            iter(part.split([rows for rows, of in zip(self.rows, self.members, strict=True) if of == block]))
            for block, part in enumerate(codes)
        ]
        return [(block, next(parts[block])) for block in self.members]

    def by_block(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `by_member`."""
        return [
            torch.cat([part for part, of in zip(codes, self.members, strict=True) if of == block])
            for block in range(len(self.metrics))
        ]

    def atom_gram(self, block: int, atoms: Tensor) -> Tensor:
        """Inner products (k, k) of atoms (k, in) in the metric of a block."""
        seen = self.metrics[block].whiten(atoms)
        return seen @ seen.T

    def recoded(self, codes: Sequence[Tensor], atoms: Tensor) -> list[Tensor]:
        """The codes refitted on their supports to other atoms."""
        found = []
        for signals, part, metric in zip(self.signals, codes, self.metrics, strict=True):
            seen, refit = metric.whiten(atoms), part.clone()
            gradient = torch.addmm(signals, refit, seen, alpha=-1.0) @ seen.T
            confine(seen @ seen.T, gradient, refit, (part != 0).to(part.dtype), _REFIT_STEPS)
            found.append(refit)
        return found

    def refitted(self, codes: Sequence[Tensor], atoms: Tensor) -> tuple[Tensor, float]:
        """The best atoms (k, in) for these codes, and the ridge that they needed."""
        if len(self.metrics) > 1:
            return refit_shared_dictionary(self.signals, codes, atoms, self.shared)
        (metric,), (rows,), (part,) = self.metrics, self.signals, codes
        seen = metric.whiten(atoms)
        found, ridge = mod(part, seen, torch.addmm(rows, part, seen, alpha=-1.0))
        return metric.unwhiten(found), ridge
