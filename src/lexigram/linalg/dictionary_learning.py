"""Dictionary learning: sparse coding and dictionary update in turn, each part exchangeable.

The problem is ``min ||Y - C D||_F^2`` with at most ``s`` non-zeros in every row of ``C`` (CoSpaDi, arXiv 2509.22075,
with ``Y = W L^T``); for a group of members with one dictionary, ``min sum_l ||Y_l - C_l D L_l^T||_F^2``, every member in
its own metric. The paper's parts are ``OMP()``, ``KSVD()`` and ``start="columns"``; ``HTP()``, ``MOD()``, ``start="svd"``
and ``accelerate=True`` are those chosen here by measurement.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lexigram.linalg.parts import HTP, KSVD, MOD, OMP, STARTS, Coding, SharedUpdate, Start, Threshold, Update
from lexigram.linalg.shared_metrics import SharedMetrics, shared_metrics

__all__ = [
    "HTP",
    "KSVD",
    "MOD",
    "OMP",
    "Coding",
    "LearnedDictionary",
    "SharedDictionary",
    "SharedMetrics",
    "Start",
    "Threshold",
    "Update",
    "learn_dictionary",
    "learn_shared_dictionary",
    "refit_shared_dictionary",
    "shared_metrics",
]

ITERATIONS = 10
TOLERANCE = 1e-2

# Measured on the layers of a small language model. Hard thresholding gains by gradient steps beyond 1 until too many rows
# fail, so the step follows the share of failures; the extrapolation likewise follows its own success.
_FIRST_STEP = 1.2
# Atoms orthonormal in the mean of several metrics are coherent in each, where a bold first step stalls the next few.
_FIRST_SHARED_STEP = 0.8
_FIRST_STRETCH = 0.5
# An extrapolation may give back this share of the iteration's gain: the next coding returns more than that.
_PATIENCE = 0.9

Stop = Literal["iterations", "tolerance", "exact"]


@dataclass(frozen=True)
class _Course:
    """How an alternation went, which single and shared dictionaries report alike.

    ``objective`` is the squared error after every outer iteration, over all members of a group; ``stop`` says why there
    was no further one. ``ridge`` is the largest that a dictionary update needed, as a share of the diagonal.
    """

    objective: tuple[float, ...]
    iterations: int
    replaced: int
    ridge: float
    stop: Stop
    seconds: float


@dataclass(frozen=True)
class LearnedDictionary(_Course):
    """What `learn_dictionary` found: ``signals ~ codes @ dictionary``."""

    dictionary: Tensor
    codes: Tensor


@dataclass(frozen=True)
class SharedDictionary(_Course):
    """What `learn_shared_dictionary` found: ``signals ~ codes @ dictionary @ L^T`` for every member."""

    dictionary: Tensor
    codes: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Problem:
    """Signals of every member with the parts of the solver. Without metrics there is one member, which sees the dictionary
    itself; with them the dictionary is in their common coordinates.
    """

    signals: list[Tensor]
    metrics: SharedMetrics | None
    sparsity: int
    coding: Coding
    update: Update
    accelerate: bool
    iterations: int
    tolerance: float
    callback: Callable[[int, float], None] | None

    def seen(self, dictionary: Tensor) -> list[Tensor]:
        return [dictionary] if self.metrics is None else self.metrics.seen(dictionary)

    def coded(self, member: int, atoms: Tensor, codes: Tensor, residual: Tensor, step: float) -> Tensor:
        """New codes of a member; coders expect unit atoms, which a shared atom is to no member."""
        signals = self.signals[member]
        if self.metrics is None:
            return self.coding(signals, atoms, codes, residual, self.sparsity, step)
        norms = _norms(atoms)
        return self.coding(signals, atoms / norms[:, None], codes * norms, residual, self.sparsity, step).div_(norms)

    def updated(
        self, codes: list[Tensor], dictionary: Tensor, residuals: list[Tensor]
    ) -> tuple[list[Tensor], Tensor, float]:
        if self.metrics is None:
            new, dictionary, ridge = self.update(codes[0], dictionary, residuals[0])
            return [new], dictionary, ridge
        assert isinstance(self.update, SharedUpdate)
        return codes, *self.update.shared(codes, dictionary, residuals, self.metrics)

    def left(self, codes: list[Tensor], dictionary: Tensor) -> tuple[list[Tensor], float]:
        """Every member's residual, and the squares of all."""
        parts = zip(self.signals, codes, self.seen(dictionary), strict=True)
        residuals = [torch.addmm(signals, each, atoms, alpha=-1.0) for signals, each, atoms in parts]
        return residuals, _squares(residuals)


def learn_dictionary(
    signals: Tensor,
    atoms: int,
    sparsity: int,
    *,
    coding: Coding | None = None,
    update: Update | None = None,
    start: Start = "svd",
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    accelerate: bool = False,
    generator: torch.Generator | None = None,
    callback: Callable[[int, float], None] | None = None,
) -> LearnedDictionary:
    """Dictionary ``(k, d)`` of unit atoms and codes ``(n, k)`` for signals ``(n, d)``, by alternating minimisation.

    An outer iteration codes the signals and then updates the dictionary. The objective never rises: where a coder does
    worse on a row than the codes at hand (orthogonal matching pursuit starts from nothing and can), that row keeps its
    old codes. Atoms without a code become the residuals of the worst represented signals and are counted. Stops after
    ``iterations``, or when the relative improvement of the squared error falls below ``tolerance``, or at an exact fit.
    ``accelerate`` moves both factors on along their last change after every iteration but the last, as long as a tenth
    of the iteration's gain remains (the paper has nothing of the kind; it halves the time to a given error and more).
    Random numbers come from ``generator`` only, which may be left out when the start needs none.
    """
    began = time.perf_counter()
    _check([signals], atoms, sparsity, iterations)
    coding, update = coding or HTP(), update or MOD()
    work = signals.detach().to(torch.float32)
    basis = None
    # Thresholding weighs atoms in the coordinates that they come in, and its one pass would not win back a QR.
    if work.shape[1] > work.shape[0] and not isinstance(coding, Threshold):
        # Optimal atoms lie in the span of the signals: an isometry to n coordinates, exact and cheaper everywhere.
        basis, triangle = torch.linalg.qr(work.T)
        work = triangle.T.contiguous()
    dictionary = STARTS[start](work, atoms, generator)
    problem = _Problem([work], None, min(sparsity, atoms), coding, update, accelerate, iterations, tolerance, callback)
    dictionary, (codes,), course = _alternated(problem, dictionary, began)
    return LearnedDictionary(
        dictionary=(dictionary if basis is None else dictionary @ basis.T).to(signals.dtype),
        codes=codes.to(signals.dtype),
        **vars(course),
    )


def learn_shared_dictionary(
    signals: Sequence[Tensor],
    metrics: SharedMetrics,
    atoms: int,
    sparsity: int,
    *,
    coding: Coding | None = None,
    update: Update | None = None,
    start: Start = "svd",
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    accelerate: bool = False,
    generator: torch.Generator | None = None,
    callback: Callable[[int, float], None] | None = None,
) -> SharedDictionary:
    """One dictionary ``(k, in)`` and codes ``(n_l, k)`` for the signals ``W_l L_l^T (n_l, in)`` of several members.

    ``metrics`` is `shared_metrics` of the factors ``L_l`` in the order of the signals. The dictionary is in the original
    space of the inputs; the root mean square of an atom's norms in the members' metrics is 1. All else is as for the one
    member of `learn_dictionary`: an atom is without a code where no member uses it. Members count in the objective by their
    own scale; multiply signals and factor of one by a number to change that.
    """
    began = time.perf_counter()
    _check(signals, atoms, sparsity, iterations, metrics)
    coding, update = coding or HTP(), update or MOD()
    dtype = signals[0].dtype
    for part, fits in ((coding, not isinstance(coding, Threshold)), (update, isinstance(update, SharedUpdate))):
        if not fits:
            raise ValueError(
                f"{type(part).__name__} is defined for one metric and this group has {len(signals)}; "
                "use HTP() or OMP() with MOD(), or learn a dictionary for every member"
            )
    work = metrics.entered([each.detach().to(torch.float32) for each in signals])
    metrics = metrics.to(torch.float32)
    dictionary = STARTS[start](
        torch.cat([metrics.brought_back(member, rows) for member, rows in enumerate(work)]), atoms, generator
    )
    problem = _Problem(work, metrics, min(sparsity, atoms), coding, update, accelerate, iterations, tolerance, callback)
    dictionary, codes, course = _alternated(problem, dictionary, began)
    return SharedDictionary(
        dictionary=metrics.leave(dictionary).to(dtype), codes=tuple(each.to(dtype) for each in codes), **vars(course)
    )


def refit_shared_dictionary(
    signals: Sequence[Tensor],
    codes: Sequence[Tensor],
    dictionary: Tensor,
    metrics: SharedMetrics,
) -> tuple[Tensor, float]:
    """The best shared dictionary ``(k, in)`` of the original space for codes that were changed after learning, and the
    ridge that it needed. Arguments as `learn_shared_dictionary` takes and gives them.
    """
    work = metrics.entered([each.detach().to(torch.float32) for each in signals])
    metrics = metrics.to(torch.float32)
    start = metrics.enter(dictionary.to(torch.float32))
    codes = [each.to(torch.float32) for each in codes]
    parts = zip(work, codes, metrics.seen(start), strict=True)
    residuals = [torch.addmm(rows, each, atoms, alpha=-1.0) for rows, each, atoms in parts]
    found, ridge = MOD(cg_tolerance=1e-4, cg_steps=50).shared(codes, start, residuals, metrics)
    return metrics.leave(found).to(dictionary.dtype), ridge


def _alternated(problem: _Problem, dictionary: Tensor, began: float) -> tuple[Tensor, list[Tensor], _Course]:
    """The outer iterations from a start, whoever the members are."""
    codes = [signals.new_zeros(signals.shape[0], dictionary.shape[0]) for signals in problem.signals]
    residuals = [signals.clone() for signals in problem.signals]
    objective = _squares(residuals)
    exact = objective * 1e-12
    history: list[float] = []
    replaced, ridge, stretch = 0, 0.0, _FIRST_STRETCH
    step = _FIRST_STEP if problem.metrics is None else _FIRST_SHARED_STEP
    plain: tuple[list[Tensor], Tensor] | None = None
    stop: Stop = "iterations"
    for iteration in range(problem.iterations):
        before = objective
        worse = 0
        for member, atoms in enumerate(problem.seen(dictionary)):
            signals = problem.signals[member]
            found = problem.coded(member, atoms, codes[member], residuals[member], step)
            codes[member], residuals[member], kept = _better_rows(
                signals, atoms, codes[member], residuals[member], found
            )
            worse += kept
        share = worse / sum(map(len, residuals))
        # As bold as leaves most rows improved: the codes of a row that did not are lost work.
        step = min(2.0, step * (0.6 if share > 0.5 else 0.9 if share > 0.1 else 1.1))
        objective = min(before, _squares(residuals))
        new_codes, new_dictionary, damped = problem.updated(codes, dictionary, residuals)
        ridge = max(ridge, damped)
        updated = _normalised(new_codes, new_dictionary)
        left, after = problem.left(*updated)
        if after <= objective:  # else rounding: no update raises the error in exact arithmetic
            (codes, dictionary), residuals, objective = updated, left, after
        if objective <= exact:
            stop = "exact"
        elif before - objective < problem.tolerance * before:
            stop = "tolerance"
        ending = stop != "iterations" or iteration + 1 == problem.iterations
        if problem.accelerate and not ending:
            bound = objective + _PATIENCE * (before - objective)
            here = list(codes), dictionary
            if plain is not None:
                beyond = _extrapolated(*here, *plain, stretch)
                left, after = problem.left(*beyond)
                accepted = after < bound
                stretch *= 1.2 if accepted else 0.6
                if accepted:
                    (codes, dictionary), residuals, objective = beyond, left, after
            plain = here
        history.append(objective)
        if problem.callback is not None:
            problem.callback(iteration, objective)
        if ending:
            break
        dictionary, new = _unused_replaced(codes, dictionary, residuals, problem.metrics)
        replaced += new
    seconds = time.perf_counter() - began
    return dictionary, codes, _Course(tuple(history), len(history), replaced, ridge, stop, seconds)


def _better_rows(
    signals: Tensor, dictionary: Tensor, codes: Tensor, residual: Tensor, found: Tensor
) -> tuple[Tensor, Tensor, int]:
    """The better of found and old codes, row by row, their residual, and how many rows keep the old ones."""
    left = torch.addmm(signals, found, dictionary, alpha=-1.0)
    worse = (torch.linalg.vecdot(left, left) > torch.linalg.vecdot(residual, residual)).nonzero().squeeze(1)
    if worse.numel():
        found = found.index_copy(0, worse, codes[worse])
        left.index_copy_(0, worse, residual[worse])
    return found, left, worse.numel()


def _normalised(codes: list[Tensor], dictionary: Tensor) -> tuple[list[Tensor], Tensor]:
    norms = _norms(dictionary)
    return [each * norms for each in codes], dictionary / norms[:, None]


def _norms(rows: Tensor) -> Tensor:
    """Norms to divide by: 1 for a zero row."""
    norms = rows.norm(dim=1)
    return torch.where(norms > 0, norms, 1.0)


def _extrapolated(
    codes: list[Tensor], dictionary: Tensor, old_codes: list[Tensor], old_dictionary: Tensor, stretch: float
) -> tuple[list[Tensor], Tensor]:
    """A step further along the last change of both factors, on the present supports.

    With supports at rest the iteration is alternating least squares, slow along the valley that both factors share.
    """
    moved = [torch.lerp(each, old, -stretch).mul_(each != 0) for each, old in zip(codes, old_codes, strict=True)]
    return _normalised(moved, torch.lerp(dictionary, old_dictionary, -stretch))


def _unused_replaced(
    codes: list[Tensor], dictionary: Tensor, residuals: list[Tensor], metrics: SharedMetrics | None
) -> tuple[Tensor, int]:
    """Atoms without a code become the directions of the largest residuals; neither codes nor error change."""
    used = torch.stack([each.abs().amax(0) for each in codes]).amax(0)
    unused = (used == 0).nonzero().squeeze(1)
    if unused.numel() == 0:
        return dictionary, 0
    norms = torch.cat([residual.norm(dim=1) for residual in residuals])
    worst = norms.argsort(descending=True, stable=True)[: unused.numel()]
    worst = worst[norms[worst] > 0]
    unused = unused[: worst.numel()]
    chosen, begin = [], 0
    for member, residual in enumerate(residuals):
        rows = residual[worst[(worst >= begin) & (worst < begin + len(residual))] - begin]
        chosen.append(rows if metrics is None else metrics.brought_back(member, rows))
        begin += len(residual)
    atoms = torch.cat(chosen)
    return dictionary.index_copy(0, unused, atoms / _norms(atoms)[:, None]), unused.numel()


def _squares(residuals: list[Tensor]) -> float:
    # Rows in float32, their sum in float64: as exact as the residual and without a float64 copy of it.
    return sum(float(torch.linalg.vecdot(each, each).sum(dtype=torch.float64)) for each in residuals)


def _check(
    signals: Sequence[Tensor], atoms: int, sparsity: int, iterations: int, metrics: SharedMetrics | None = None
) -> None:
    if metrics is not None and len(signals) != len(metrics):
        raise ValueError(f"{len(signals)} members but {len(metrics)} metrics; pass one factor for each member")
    if metrics is not None and len(signals) == 1:
        raise ValueError("one member shares nothing; pass its signals to learn_dictionary")
    for each in signals:
        if each.ndim != 2 or 0 in each.shape:
            raise ValueError(f"signals are a matrix with one signal a row, got the shape {tuple(each.shape)}")
        if metrics is not None and each.shape[1] != metrics.size:
            raise ValueError(f"signals of width {each.shape[1]} in metrics of width {metrics.size}; pass W L^T")
        if not torch.isfinite(each).all():
            raise ValueError(
                "the signals have entries that are not finite; check the weight and the Gram they come from"
            )
    for name, value in (("atoms", atoms), ("sparsity", sparsity), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; raise the budget that it was computed from")
