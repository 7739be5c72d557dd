"""The multiple-choice knapsack: one option a unit within a budget of bytes, total cost minimal. Knows no models or files.

A unit is whatever gets one budget, a matrix or a group of them; its options are the sizes that it could take with the cost
of each, as measured or as interpolated between measurements. ROCKET (arXiv 2602.11008) spends its budget this way, by a
dynamic programme over rounded bytes; here bytes are exact and the cost left on the table is known.

The relaxation that allows shares of neighbouring options is solved by walking down the lower convex hulls of all units in
the order of cost saved per byte. Its value bounds the cost from below, and every corner of the walk is a choice. A search
over the units one after the other, pruned by these two, closes the gap between them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lexigram.errors import LexigramError

_WIDTHS = (64, 1024, 16384)
"""How many partial choices the search carries from unit to unit: a round that had to drop some is followed by the next."""

_WORK = 8_000_000
"""How many partial choices a round may form at most, about two seconds; a narrower search is the only one on the clock."""

_ROUNDING = 1e-12
"""Choices are told apart by cost down to this share of it; sums of float64 costs are not exact much below."""

_Bytes = NDArray[np.int64]
_Costs = NDArray[np.float64]
_Indices = NDArray[np.intp]


class Choice(NamedTuple):
    """An option for every unit, by its index in the unit's curve, and what they come to.

    No choice within the budget costs less than `bound`; where `bound` equals `cost` this one is optimal.
    """

    picks: tuple[int, ...]
    bytes: int
    cost: float
    bound: float


def choose(curves: Sequence[Sequence[tuple[int, float]]], budget: int) -> Choice:
    """One option for every unit, at most `budget` bytes together, at the least total cost.

    The budget is never exceeded. The choice is optimal, to the rounding of sums in float64, and says so by
    ``bound == cost``, unless the search outgrows its limit; then it is the best one found, and ``cost - bound`` is below
    what one unit saves by one step down its hull, in practice by orders of magnitude. A larger budget never costs more
    where both choices are optimal. Equal arguments give equal picks; of a unit's options with equal cost the smallest is
    taken, of equal ones the first.

    Args:
        curves: for every unit its options as (bytes, cost), in any order. Cost may rise with bytes; an infinite one
            forbids the option.
        budget: bytes for all units together.

    Raises:
        LexigramError: where even the smallest options need more than the budget.
        ValueError: for a unit without an option of finite cost, or a cost that is NaN or minus infinity.
    """
    fronts = [_front(curve, unit) for unit, curve in enumerate(curves)]
    needed = sum(int(front.bytes[0]) for front in fronts)
    if needed > budget:
        raise LexigramError(
            f"a budget of {budget} bytes is too small: the smallest options of all {len(fronts)} units need {needed}; "
            "lower the ratio, or offer smaller options"
        )
    picks, bound = _solve(fronts, budget)
    chosen = [curve[pick] for curve, pick in zip(curves, picks, strict=True)]
    cost = math.fsum(cost for _, cost in chosen)
    return Choice(tuple(picks), sum(size for size, _ in chosen), cost, min(cost, bound))


def interpolated(sizes: Sequence[int], errors: Sequence[float], at: Sequence[int]) -> list[float]:
    """Errors at sizes in between measured ones: the logarithm of the error is linear in bytes.

    More bytes cannot hurt, as a smaller fit can be kept: an error counts as the least one measured at that size or below, so
    the curve never rises. At a measured size it is exactly that. A stretch that ends in an error of zero, where there is no
    logarithm, is linear in the error itself, which is never below. Past the largest size the error stays what it was there;
    below the smallest nothing is known, and it is infinite.

    Args:
        sizes: measured sizes in bytes, in any order; of equal ones the smaller error counts.
        errors: the error at each of them.
        at: sizes in bytes to give errors for.

    Raises:
        ValueError: where nothing was measured, lengths differ, or an error is negative or not finite.
    """
    if not sizes or len(sizes) != len(errors):
        raise ValueError(f"{len(sizes)} sizes and {len(errors)} errors are no curve; measure both at one size or more")
    if not all(math.isfinite(error) and error >= 0 for error in errors):
        raise ValueError(f"errors must be finite and not negative, got {list(errors)}; leave failed fits out")
    order = np.lexsort((errors, sizes))
    size, first = np.unique(np.asarray(sizes, np.int64)[order], return_index=True)
    error = np.minimum.accumulate(np.asarray(errors, np.float64)[order])[first]

    wanted = np.asarray(at, np.int64)
    left = (np.searchsorted(size, wanted, side="right") - 1).clip(0)
    right = (left + 1).clip(max=len(size) - 1)
    share = ((wanted - size[left]) / np.maximum(size[right] - size[left], 1)).clip(0)
    above, below = error[left], error[right]
    with np.errstate(divide="ignore", invalid="ignore"):
        geometric = above * (below / above) ** share
    value = np.where(below > 0, geometric, above * (1 - share)).clip(below, above)
    return np.where(wanted < size[0], np.inf, value).tolist()


class _Front(NamedTuple):
    """The options of a unit worth having: bytes ascend, costs strictly descend; `origin` is their index in the curve."""

    bytes: _Bytes
    cost: _Costs
    origin: _Indices

    def only(self, kept: _Indices | NDArray[np.bool_]) -> "_Front":
        return _Front(self.bytes[kept], self.cost[kept], self.origin[kept])


class _Steps(NamedTuple):
    """All steps down the hulls of some fronts, most cost saved per byte first.

    `unit` is the position of the front, `level` the index in it that the step leads to.
    """

    unit: _Indices
    level: _Indices
    bytes: _Bytes
    saved: _Costs
    slope: _Costs


class _Walk(NamedTuple):
    """The relaxation of some units by the bytes that they get: its corners, bytes ascending and costs descending."""

    bytes: _Bytes
    cost: _Costs

    def corner(self, room: _Bytes | int) -> _Indices:
        """The last corner within `room` bytes; -1 where there is none."""
        return np.searchsorted(self.bytes, room, side="right") - 1

    def reached(self, room: _Bytes) -> _Costs:
        """The cost of the choice at that corner."""
        corner = self.corner(room)
        return np.where(corner < 0, np.inf, self.cost[corner])

    def below(self, room: _Bytes | int) -> _Costs:
        """What no choice within `room` bytes can go below."""
        return np.asarray(np.interp(room, self.bytes, self.cost, left=np.inf), np.float64)


def _front(curve: Sequence[tuple[int, float]], unit: int) -> _Front:
    cost = np.array([cost for _, cost in curve], np.float64)
    if np.isnan(cost).any() or np.isneginf(cost).any():
        raise ValueError(
            f"unit {unit} has a cost that is NaN or minus infinity; mend the measurement, or forbid by inf"
        )
    usable = np.isfinite(cost).nonzero()[0]
    if not usable.size:
        raise ValueError(f"unit {unit} has {len(curve)} options and none of finite cost; offer it one that is allowed")
    options = _Front(np.array([size for size, _ in curve], np.int64), cost, np.arange(len(curve))).only(usable)
    return options.only(_undominated(options.bytes, options.cost))


def _undominated(size: _Bytes, cost: _Costs) -> _Indices:
    """Indices of what nothing else beats or equals in both, by ascending bytes; of equal ones the first."""
    order = np.lexsort((cost, size))
    least = np.minimum.accumulate(cost[order])
    falls = np.ones(len(order), bool)
    falls[1:] = least[1:] < least[:-1]
    return order[falls]


def _solve(fronts: list[_Front], budget: int) -> tuple[list[int], float]:
    """The option index for every front, and a lower bound on the cost: infinite where the choice is optimal."""
    budget = _reachable(fronts, budget)
    steps = _steps(fronts)
    walk = _walk(fronts, steps)
    corner = int(walk.corner(budget))
    levels, cost, bound = _levels(fronts, steps, corner), float(walk.cost[corner]), float(walk.below(budget))
    price = float(steps.slope[corner]) if corner < len(steps.slope) else 0.0
    # At this price of a byte the relaxation is the sum of every unit's cheapest option; each other one raises it.
    penalties = [priced - priced.min() for priced in (front.cost + price * front.bytes for front in fronts)]

    for width in _WIDTHS:
        margin = _ROUNDING * math.fsum(abs(front.cost[level]) for front, level in zip(fronts, levels, strict=True))
        if cost - bound <= margin:
            return _indices(fronts, levels), math.inf
        kept = [(penalty < cost - bound + margin).nonzero()[0] for penalty in penalties]
        width = min(width, _WORK // sum(map(len, kept)))
        worth = [front.only(options) for front, options in zip(fronts, kept, strict=True)]
        found, left_out = _search(worth, budget, cost - margin, width)
        if found is not None:
            levels = [int(options[level]) for options, level in zip(kept, found, strict=True)]
            cost = math.fsum(front.cost[level] for front, level in zip(fronts, levels, strict=True))
        if left_out >= cost - margin:
            return _indices(fronts, levels), math.inf
        bound = max(bound, left_out)
    return _indices(fronts, levels), bound


def _search(fronts: list[_Front], budget: int, to_beat: float, width: int) -> tuple[list[int] | None, float]:
    """Partial choices of the first fronts, then of one more at a time, as long as they can still beat `to_beat`.

    At most `width` of them go on, those with the least bound. Every one is also completed by the walk of the fronts to come,
    which is where better choices are found.

    Returns:
        A level for every front that costs less than `to_beat`, if there is one, and a lower bound on what any choice costs
        that descends from the partial choices left out for lack of width.
    """
    steps = _steps(fronts)
    size, cost = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[_Indices, _Indices]] = []
    found, left_out = None, math.inf
    for position, front in enumerate(fronts):
        size, cost = (size[:, None] + front.bytes).ravel(), (cost[:, None] + front.cost).ravel()
        chosen = _undominated(size, cost)
        size, cost = size[chosen], cost[chosen]
        trail.append(np.divmod(chosen, len(front.bytes)))
        rest = _walk(fronts, steps, position + 1)
        reached = cost + rest.reached(budget - size)
        best = int(reached.argmin())
        if reached[best] < to_beat:
            to_beat = float(reached[best])
            found = _levels(fronts, steps, int(rest.corner(budget - size[best])), position + 1)
            found[: position + 1] = _walked(trail, best)
        below = cost + rest.below(budget - size)
        alive = (below < to_beat).nonzero()[0]
        if len(alive) > width:
            ranked = alive[below[alive].argsort(kind="stable")]
            left_out = min(left_out, float(below[ranked[width]]))
            alive = np.sort(ranked[:width])
        size, cost, trail[-1] = size[alive], cost[alive], (trail[-1][0][alive], trail[-1][1][alive])
        if not alive.size:
            break
    return found, left_out


def _reachable(fronts: list[_Front], budget: int) -> int:
    """The largest total within the budget that sums of options could come to, by their common divisor."""
    smallest = sum(int(front.bytes[0]) for front in fronts)
    largest = sum(int(front.bytes[-1]) for front in fronts)
    divisor = math.gcd(*(int(size - front.bytes[0]) for front in fronts for size in front.bytes))
    return min(budget, largest) - (min(budget, largest) - smallest) % divisor if divisor else smallest


def _indices(fronts: list[_Front], levels: list[int]) -> list[int]:
    return [int(front.origin[level]) for front, level in zip(fronts, levels, strict=True)]


def _steps(fronts: list[_Front]) -> _Steps:
    rows = [(unit, *step) for unit, front in enumerate(fronts) for step in _hull_steps(front)]
    # Stable, so that the steps of a unit stay in their order.
    rows.sort(key=lambda row: -row[-1])
    unit, level, size, saved, slope = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    return _Steps(
        np.array(unit, np.intp),
        np.array(level, np.intp),
        np.array(size, np.int64),
        np.array(saved, np.float64),
        np.array(slope, np.float64),
    )


def _hull_steps(front: _Front) -> list[tuple[int, int, float, float]]:
    """Level, bytes, cost saved and cost saved per byte of the steps down the lower convex hull; the last descend."""
    sizes, costs = front.bytes.tolist(), front.cost.tolist()
    corners, slopes = [0], [math.inf]
    for level in range(1, len(sizes)):
        # A corner that is left on a steeper step than it was reached by lies above the hull.
        while (slope := (costs[corners[-1]] - costs[level]) / (sizes[level] - sizes[corners[-1]])) > slopes[-1]:
            corners.pop()
            slopes.pop()
        corners.append(level)
        slopes.append(slope)
    return [
        (end, sizes[end] - sizes[start], costs[start] - costs[end], slope)
        for start, end, slope in zip(corners[:-1], corners[1:], slopes[1:], strict=True)
    ]


def _walk(fronts: list[_Front], steps: _Steps, first: int = 0) -> _Walk:
    """The walk of the fronts from position `first` on."""
    taken = steps.unit >= first
    start = sum(int(front.bytes[0]) for front in fronts[first:])
    size = start + np.concatenate([[0], np.cumsum(steps.bytes[taken])])
    # Summed up from the cheap end, where the budget is met; the other end may be larger by any order of magnitude.
    end = math.fsum(front.cost[-1] for front in fronts[first:])
    cost = end + np.concatenate([np.cumsum(steps.saved[taken][::-1])[::-1], [0.0]])
    return _Walk(size, cost)


def _levels(fronts: list[_Front], steps: _Steps, corner: int, first: int = 0) -> list[int]:
    """The level of every front at a corner of the walk from `first` on; 0 for those before."""
    taken = (steps.unit >= first).nonzero()[0][:corner]
    levels = np.zeros(len(fronts), np.int64)
    np.maximum.at(levels, steps.unit[taken], steps.level[taken])
    return levels.tolist()


def _walked(trail: list[tuple[_Indices, _Indices]], end: int) -> list[int]:
    """The levels that led to partial choice `end` of the last front on the trail."""
    levels: list[int] = []
    for parents, chosen in reversed(trail):
        levels.append(int(chosen[end]))
        end = int(parents[end])
    return levels[::-1]
