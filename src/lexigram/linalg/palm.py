"""A product of two sparse matrices: proximal alternating linearised minimisation (PALM).

The problem is ``min ||Y - C D L^T||_F^2 + R_C(C) + R_D(D)`` for signals ``Y = W L^T (n, d)`` in the metric of a Gram
``G = L^T L``: dictionary ``D (k, d)`` and codes ``C (n, k)`` are both sparse, ``D`` in the coordinates of the inputs. PALM
(Bolte, Sabach, Teboulle, Math. Program. 146, 2014, problem (M)) takes a gradient step in one factor, of a length that the
Lipschitz constant of that block allows, and the proximal map of its penalty; then the same in the other. Neither raises the
objective (their Lemma 2). iPALM (Pock, Sabach 2016, arXiv 1702.02505) takes the step from a point beyond the present one, along
the last change.

Three things differ. Steps are taken in a diagonal metric ``H`` that is above the block's Hessian: ``2 l diag(A)`` for ``A = D G
D^T``, with ``l`` the largest eigenvalue of ``A`` scaled to ones on its diagonal, and the same for ``C^T C`` and ``G``; so no
scale of an atom or an input matters. Where a penalty counts entries and not their size, a few conjugate gradient steps on the
support follow. And a step that raises the objective is not taken: it is tried again from the present point at the proven
length, then shorter. The first try is longer than proven, as a bound for all directions is too careful for most.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypedDict

import torch
from torch import Tensor

from lexigram.linalg.selection import largest_indicator
from lexigram.linalg.svd import truncated_svd
from lexigram.linalg.whitening import Whitening

ITERATIONS = 8
"""At the final sizes. With 43,176 entries a side of a query projection 40 lose 4 % less in squares, in twice the time."""
TIGHTENING = 16
REFITS = 4
CG_STEPS = 2
REFIT_STEPS = 6
TOLERANCE = 1e-3

_STEPS = (4.0, 1.0, 0.25)
"""Lengths that are tried, in units of the proven one; the first from the extrapolated point."""
_POWER_STEPS = 16
_LIPSCHITZ_SLACK = 1.02  # power iteration comes from below

_WEIGHT_RANGE = 1e-5
"""The least weight of a penalty that is tried, as a share of the largest."""
_WEIGHTS = 12
_FULL = 0.99
"""So much of the room for entries is close enough to all of it."""

Kind = Literal["l0", "l1"]
Stop = Literal["iterations", "tolerance"]


class Penalty(Protocol):
    """``R`` and its proximal map."""

    @property
    def counts(self) -> bool:
        """Whether values on the support may be refitted without a change of ``R``."""
        ...

    def value(self, x: Tensor) -> float:
        """``R(x)``; infinite where x is not allowed."""
        ...

    def prox(self, x: Tensor, h: Tensor) -> Tensor:
        """``argmin_u R(u) + 1/2 sum h (u - x)^2``, `h` not negative, of the shape of `x`; zero where `h` is."""
        ...


@dataclass(frozen=True)
class L1:
    """``weight ||x||_1``: soft thresholding."""

    weight: float
    counts = False

    def value(self, x: Tensor) -> float:
        """See `Penalty.value`."""
        return self.weight * float(x.abs().sum(dtype=torch.float64))

    def prox(self, x: Tensor, h: Tensor) -> Tensor:
        """See `Penalty.prox`."""
        return torch.where(h > 0, torch.sign(x) * (x.abs() - self.weight / h).clamp_min(0.0), 0.0)


@dataclass(frozen=True)
class L0:
    """``weight ||x||_0``: hard thresholding."""

    weight: float
    counts = True

    def value(self, x: Tensor) -> float:
        """See `Penalty.value`."""
        return self.weight * int(x.count_nonzero())

    def prox(self, x: Tensor, h: Tensor) -> Tensor:
        """See `Penalty.prox`."""
        return torch.where(h * x.square() > 2 * self.weight, x, 0.0)


@dataclass(frozen=True)
class Largest:
    """At most `count` entries: those with the largest ``h x^2``, the first of equal ones."""

    count: int
    counts = True

    def value(self, x: Tensor) -> float:
        """See `Penalty.value`."""
        return 0.0 if int(x.count_nonzero()) <= self.count else float("inf")

    def prox(self, x: Tensor, h: Tensor) -> Tensor:
        """See `Penalty.prox`."""
        return torch.where(most_important(h * x.square(), self.count) & (h > 0), x, 0.0)


@dataclass(frozen=True)
class Within:
    """Entries on `support`, bool, alone."""

    support: Tensor
    counts = True

    def value(self, x: Tensor) -> float:
        """See `Penalty.value`."""
        return float("inf") if bool(x[~self.support].any()) else 0.0

    def prox(self, x: Tensor, h: Tensor) -> Tensor:
        """See `Penalty.prox`."""
        return torch.where(self.support & (h > 0), x, 0.0)


@dataclass(frozen=True)
class SparsePair:
    """Codes (n, k), dictionary (k, d), and how the minimisation went: the objective after each iteration, and why it ended."""

    codes: Tensor
    dictionary: Tensor
    history: tuple[float, ...] = ()
    stop: Stop = "iterations"


@dataclass(frozen=True)
class SparseProduct:
    """Codes (n, k) and dictionary (k, d), zero outside of their supports, bool of the same shapes.

    `history` is the squared error after each iteration once the supports had their final sizes; `penalised` the objective
    after each iteration under the penalties that decided them, if any did, `penalised_stop` why these ended, and `weight` of
    the penalties where it was found.
    """

    codes: Tensor
    dictionary: Tensor
    code_support: Tensor
    dictionary_support: Tensor
    history: tuple[float, ...]
    stop: Stop
    penalised: tuple[float, ...] = ()
    penalised_stop: Stop | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Fitting:
    """Penalties of both factors whose weight, the same for both, is found: the least at which the entries that stay fit.

    `kind` makes a penalty of a weight, `room` tells what share of the room so many entries of codes and dictionary take.
    """

    kind: Callable[[float], Penalty]
    room: Callable[[int, int], float]


def most_important(importance: Tensor, count: int) -> Tensor:
    """Mask with exactly `count` True where `importance` (any shape) is largest; all where there are not more."""
    if count >= importance.numel():
        return torch.ones_like(importance, dtype=torch.bool)
    return largest_indicator(importance.reshape(1, -1), count).bool().view(importance.shape)


def palm(
    signals: Tensor,
    factor: Tensor,
    start: SparsePair,
    code_penalty: Penalty,
    dictionary_penalty: Penalty,
    *,
    iterations: int = ITERATIONS,
    inertia: bool = False,
    cg_steps: int = CG_STEPS,
    tolerance: float = TOLERANCE,
) -> SparsePair:
    """``min ||Y - C D L^T||_F^2 + R_C(C) + R_D(D)`` from a start; from the first allowed point on the objective never rises.

    Args:
        signals: ``Y (n, d)``; computed with in its own dtype.
        factor: ``L (d, d)``.
        start: need not be allowed by the penalties.
        code_penalty: ``R_C``.
        dictionary_penalty: ``R_D``.
        iterations: at most, each of one step in either factor.
        inertia: begin the steps beyond the present point; by ``(t - 1) / (t + 2)`` of the last change in iteration t. Where
            supports are refitted it has not helped: of a query projection at 90 % removed 2 % more is lost in squares.
        cg_steps: on the support after each step, where the penalty counts entries.
        tolerance: an iteration that lowers the objective by a smaller share is the last.

    Raises:
        ValueError: where the shapes contradict each other.
    """
    _check(signals, factor, start)
    problem = _Problem(signals, _Metric.of(factor), code_penalty, dictionary_penalty, cg_steps)
    return _descended(problem, start, iterations=iterations, inertia=inertia, tolerance=tolerance)


def sparse_product(
    signals: Tensor,
    whitening: Whitening,
    atoms: int,
    code_count: int,
    dictionary_count: int,
    *,
    penalties: tuple[Penalty, Penalty] | Fitting | None = None,
    iterations: int = ITERATIONS,
    tightening: int = TIGHTENING,
    refits: int = REFITS,
    inertia: bool = False,
    tolerance: float = TOLERANCE,
) -> SparseProduct:
    """Codes and dictionary with so many entries at most, of least error, from the truncated SVD of the signals.

    From all entries the supports are tightened to their sizes geometrically, one iteration of `palm` for each size. Penalties
    come first, where there are any: they decide what is kept, and what they keep beyond the sizes is tightened in the same way.
    Where their weight is to be found (`Fitting`), they alone decide, and not the counts. What they leave is biased, so the
    values are refitted in turns on the final supports. Without an iteration at the final sizes this is a start and its refit.

    Args:
        signals: ``W L^T (n, d)``; computed in float32, or in float64 if that is what it is.
        whitening: the metric, ``L``.
        atoms: k, from 1 to the smaller side of the signals.
        code_count: entries of the codes at most; without penalties exactly so many places.
        dictionary_count: of the dictionary.
        penalties: of codes and dictionary, or of both with a weight that is found.
        iterations: with the penalties, and at the final sizes.
        tightening: sizes on the way.
        refits: of both factors, at least one.
        inertia: see `palm`.
        tolerance: see `palm`.

    Raises:
        ValueError: where the shapes contradict each other or a size is out of range.
    """
    left, right = truncated_svd(signals, atoms)
    factor = whitening.factor.to(signals.dtype)
    pair = SparsePair(left, whitening.unwhiten(right))
    counts = code_count, dictionary_count
    for name, count, part in zip(("codes", "dictionary"), counts, (pair.codes, pair.dictionary), strict=True):
        if not 1 <= count <= part.numel():
            raise ValueError(f"cannot keep {count} of the {part.numel()} entries of the {name}")
    effort: _Effort = {"iterations": iterations, "inertia": inertia, "tolerance": tolerance}
    problem = _Problem(signals, _Metric.of(factor), Largest(counts[0]), Largest(counts[1]))
    penalised: SparsePair | None = None
    weight: float | None = None
    if isinstance(penalties, Fitting):
        weight, penalised = _fitted(problem, pair, penalties, effort)
        counts = _kept(penalised)
    elif penalties is not None:
        penalised = _descended(problem.under(*penalties), pair, **effort)
        counts = min(counts[0], _kept(penalised)[0]), min(counts[1], _kept(penalised)[1])
    pair = penalised or pair
    for many in _tightened(pair, counts, tightening):
        pair = _descended(problem.under(*map(Largest, many)), pair, iterations=1)
    settled = _descended(problem.under(*map(Largest, counts)), pair, **effort)
    code_support = most_important(settled.codes.abs(), counts[0])
    dictionary_support = most_important(settled.dictionary.abs(), counts[1])
    refitted = refit(signals, factor, settled, code_support, dictionary_support, rounds=refits)
    history = settled.history + refitted.history
    found = SparseProduct(refitted.codes, refitted.dictionary, code_support, dictionary_support, history, settled.stop)
    if penalised is None:
        return found
    return replace(found, penalised=penalised.history, penalised_stop=penalised.stop, weight=weight)


def refit(
    signals: Tensor,
    factor: Tensor,
    pair: SparsePair,
    code_support: Tensor,
    dictionary_support: Tensor,
    *,
    rounds: int = REFITS,
) -> SparsePair:
    """Values on supports that are given: alternating least squares by conjugate gradients, which never raises the error.

    Arguments as in `palm`; of `pair`, what lies on the supports (bool, of the shapes of codes and dictionary) is the start.
    """
    supports = Within(code_support), Within(dictionary_support)
    inside = replace(pair, codes=pair.codes * code_support, dictionary=pair.dictionary * dictionary_support)
    return palm(
        signals, factor, inside, *supports, iterations=rounds, inertia=False, cg_steps=REFIT_STEPS, tolerance=0.0
    )


def balanced(codes: Tensor, dictionary: Tensor, gram: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The same product with `share` of every atom's importance in its column of codes, the rest in its row of the dictionary.

    The importance of atom j is ``|c_j| (d_j G d_j^T)^(1/2)``; its codes get that to the power of `share` for a norm. An atom
    without importance stays as it is.
    """
    ours = codes.norm(dim=0)
    theirs = torch.linalg.vecdot(dictionary @ gram.to(dictionary), dictionary).clamp_min(0.0).sqrt()
    alive = (ours > 0) & (theirs > 0)
    scale = torch.where(alive, (ours * theirs) ** share / torch.where(alive, ours, 1.0), 1.0)
    return codes * scale, dictionary / scale[:, None]


def _fitted(problem: "_Problem", start: SparsePair, penalties: Fitting, effort: "_Effort") -> tuple[float, SparsePair]:
    """The weight, by bisection of its logarithm, and what it leads to; each try begins at `start`."""
    # Of orthonormal atoms the first step, four times as long as proven, leaves no coefficient at a weight above half of this.
    high = float(start.codes.abs().max())
    low = _WEIGHT_RANGE * high
    nothing = SparsePair(torch.zeros_like(start.codes), torch.zeros_like(start.dictionary))
    best = high, nothing
    for _ in range(_WEIGHTS):
        weight = math.sqrt(low * high)
        penalty = penalties.kind(weight)
        pair = _descended(problem.under(penalty, penalty), start, **effort)
        room = penalties.room(*_kept(pair))
        if room > 1:
            low = weight
            continue
        high, best = weight, (weight, pair)
        if room >= _FULL:
            break
    return best


def _kept(pair: SparsePair) -> tuple[int, int]:
    """Entries of codes and dictionary that are not zero; one at least, which is where a factor of zeros is stored."""
    return max(1, int(pair.codes.count_nonzero())), max(1, int(pair.dictionary.count_nonzero()))


class _Effort(TypedDict):
    iterations: int
    inertia: bool
    tolerance: float


def _descended(
    problem: "_Problem", start: SparsePair, *, iterations: int, inertia: bool = False, tolerance: float = 0.0
) -> SparsePair:
    """See `palm`."""
    point = problem.at(start.codes, start.dictionary)
    before = point
    history: list[float] = []
    stop: Stop = "iterations"
    for iteration in range(iterations):
        here = point
        beyond = iteration / (iteration + 3) if inertia else 0.0
        point = problem.step_codes(point, before.codes, beyond)
        point = problem.step_dictionary(point, before.dictionary, beyond)
        before = here
        history.append(point.objective)
        if here.objective - point.objective <= tolerance * here.objective < float("inf"):
            stop = "tolerance"
            break
    return SparsePair(point.codes, point.dictionary, tuple(history), stop)


@dataclass(frozen=True)
class _Metric:
    """``L``, ``G = L^T L``, and a diagonal above ``2 G``."""

    factor: Tensor
    gram: Tensor
    bound: Tensor

    @classmethod
    def of(cls, factor: Tensor) -> "_Metric":
        gram = factor.T @ factor
        return cls(factor, gram, 2 * _spectral(gram) * gram.diagonal())


@dataclass(frozen=True)
class _Point:
    """Codes, dictionary, its atoms in the metric ``D L^T``, the residual, and the objective."""

    codes: Tensor
    dictionary: Tensor
    seen: Tensor
    residual: Tensor
    objective: float


@dataclass(frozen=True)
class _Block:
    """One factor with the other fixed, about a point: ``descent`` is half of the negative gradient there.

    `image` is half of the Hessian; `bound`, broadcastable, the diagonal above the Hessian; `by_row` tells that rows do not
    depend on each other.
    """

    values: Tensor
    descent: Tensor
    image: Callable[[Tensor], Tensor]
    bound: Tensor
    by_row: bool


@dataclass(frozen=True)
class _Problem:
    """What `palm` minimises."""

    signals: Tensor
    metric: _Metric
    code_penalty: Penalty
    dictionary_penalty: Penalty
    cg_steps: int = CG_STEPS

    def under(self, code_penalty: Penalty, dictionary_penalty: Penalty) -> "_Problem":
        """The same with other penalties."""
        return replace(self, code_penalty=code_penalty, dictionary_penalty=dictionary_penalty)

    def at(self, codes: Tensor, dictionary: Tensor, seen: Tensor | None = None) -> _Point:
        """The point, its objective summed in float64."""
        seen = dictionary @ self.metric.factor.T if seen is None else seen
        residual = torch.addmm(self.signals, codes, seen, alpha=-1.0)
        error = float(torch.linalg.vecdot(residual, residual).sum(dtype=torch.float64))
        objective = error + self.code_penalty.value(codes) + self.dictionary_penalty.value(dictionary)
        return _Point(codes, dictionary, seen, residual, objective)

    def step_codes(self, point: _Point, before: Tensor, beyond: float) -> _Point:
        """A step in the codes, from `beyond` times their last change beyond them."""
        gram = point.seen @ point.seen.T
        block = _Block(
            values=point.codes,
            descent=point.residual @ point.seen.T,
            image=lambda change: change @ gram,
            bound=2 * _spectral(gram) * gram.diagonal(),
            by_row=True,
        )
        return self._stepped(
            point, block, before, beyond, self.code_penalty, lambda codes: self.at(codes, point.dictionary, point.seen)
        )

    def step_dictionary(self, point: _Point, before: Tensor, beyond: float) -> _Point:
        """A step in the dictionary, alike."""
        gram = point.codes.T @ point.codes
        block = _Block(
            values=point.dictionary,
            descent=(point.codes.T @ point.residual) @ self.metric.factor,
            image=lambda change: gram @ change @ self.metric.gram,
            bound=_spectral(gram) * gram.diagonal()[:, None] * self.metric.bound,
            by_row=False,
        )
        return self._stepped(
            point, block, before, beyond, self.dictionary_penalty, lambda rows: self.at(point.codes, rows)
        )

    def _stepped(
        self,
        point: _Point,
        block: _Block,
        before: Tensor,
        beyond: float,
        penalty: Penalty,
        at: Callable[[Tensor], _Point],
    ) -> _Point:
        for number, length in enumerate(_STEPS):
            moved = 0.0 if number else beyond
            found = at(self._proximal(block, before, moved, length, penalty))
            if found.objective <= point.objective:
                return found
        return point

    def _proximal(self, block: _Block, before: Tensor, beyond: float, length: float, penalty: Penalty) -> Tensor:
        """The gradient step, the proximal map, and the refit on the support that it leaves."""
        here, descent = block.values, block.descent
        if beyond:
            change = beyond * (here - before)
            here, descent = here + change, descent - block.image(change)
        bound = (block.bound / length).expand_as(here)
        found = penalty.prox(torch.where(bound > 0, here + 2 * descent / bound, here), bound)
        if not penalty.counts or not self.cg_steps:
            return found
        return _conjugate(block, found, descent - block.image(found - here), found != 0, self.cg_steps)


def _conjugate(block: _Block, values: Tensor, descent: Tensor, support: Tensor, steps: int) -> Tensor:
    """Conjugate gradients on a support, preconditioned by the diagonal; rows, where they are independent, by themselves."""
    inverse = torch.where(block.bound > 0, 1 / block.bound, 0.0) * support
    tiny = torch.finfo(values.dtype).tiny

    def inner(one: Tensor, other: Tensor) -> Tensor:
        return torch.linalg.vecdot(one, other)[:, None] if block.by_row else (one * other).sum()

    residual = descent
    direction = inverse * residual
    power = inner(residual, direction)
    for step in range(steps):
        image = block.image(direction)
        curvature = inner(direction, image)
        length = torch.where(curvature > tiny, power / curvature.clamp_min(tiny), 0.0)
        values = values + length * direction
        if step + 1 < steps:
            residual = residual - length * image
            scaled = inverse * residual
            last, power = power, inner(residual, scaled)
            direction = scaled + torch.where(last > tiny, power / last.clamp_min(tiny), 0.0) * direction
    return values


def _spectral(gram: Tensor) -> float:
    """The largest eigenvalue of a Gram scaled to ones on its diagonal, by power iteration; 1 of nothing.

    It begins with random numbers, always the same: ones may be orthogonal to what is sought, as of two opposite atoms. No such
    eigenvalue is below 1.
    """
    scale = gram.diagonal().clamp_min(0.0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    begun = 1.0 + torch.randn(len(gram), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = torch.where(scale > 0, begun.to(gram), 0.0)
    value = torch.ones(())
    for _ in range(_POWER_STEPS):
        image = inverse * (gram @ (inverse * vector))
        value = image.norm() / vector.norm().clamp_min(torch.finfo(gram.dtype).tiny)
        vector = image
        if not bool(value > 0):
            return 1.0
        vector = vector / image.norm()
    return _LIPSCHITZ_SLACK * max(1.0, float(value))


def _tightened(pair: SparsePair, counts: tuple[int, int], rounds: int) -> list[tuple[int, int]]:
    """Sizes between the present ones and `counts`, falling geometrically; none where nothing has to go."""
    codes, dictionary = int(pair.codes.count_nonzero()), int(pair.dictionary.count_nonzero())
    if codes <= counts[0] and dictionary <= counts[1]:
        return []
    shares = [(number + 1) / (rounds + 1) for number in range(rounds)]
    return [(_between(codes, counts[0], share), _between(dictionary, counts[1], share)) for share in shares]


def _between(many: int, count: int, share: float) -> int:
    return max(count, round(many ** (1 - share) * count**share))


def _check(signals: Tensor, factor: Tensor, pair: SparsePair) -> None:
    (rows, cols), atoms = signals.shape, pair.codes.shape[1]
    if factor.shape != (cols, cols) or pair.codes.shape != (rows, atoms) or pair.dictionary.shape != (atoms, cols):
        raise ValueError(
            f"codes {tuple(pair.codes.shape)}, a dictionary {tuple(pair.dictionary.shape)} and a metric "
            f"{tuple(factor.shape)} do not fit signals {tuple(signals.shape)}"
        )
