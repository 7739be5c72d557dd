"""A budget over candidates of unequal cost: the projection of probabilities on it, and the best candidates within it.

CAP (arXiv 2505.03801) keeps singular values, at ``m + n`` parameters each, and single entries, at one, out of one pool for
the whole model. Candidates come as a list of tensors with one cost a tensor, so that 1e8 of them need neither a tensor of
costs nor a copy: everything runs through the tensors in pieces. What the costs are counted in, and where the probabilities
come from, is not decided here; `lexigram.linalg.policy_gradient` moves them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

PIECE = 2**18
"""Candidates that are worked on together: few enough to stay in the processor's cache, and to be counted in float32."""

TOLERANCE = 1e-7
"""Share of the budget that a projection may leave over: the rounding of a float32 probability."""

Projection = Literal["euclidean", "weighted"]
"""What a projection measures distance in: ``sum (s - s')^2``, or ``sum c (s - s')^2`` with the costs ``c``."""

_PASSES = 200

_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def project(
    probabilities: Sequence[Tensor],
    costs: Sequence[float],
    budget: float,
    *,
    metric: Projection = "euclidean",
    spend_all: bool = False,
) -> float:
    """Move probabilities, in place, to the nearest ones with ``0 <= s <= 1`` and ``sum c s <= budget``.

    These are ``clamp(s - v c, 0, 1)``, with ``v = 0`` where that is within the budget, and else the ``v > 0`` that spends it
    (the conditions of Karush, Kuhn and Tucker). A candidate that costs a thousand times as much as another is moved a
    thousand times as far: a singular value is at 0 before an entry has moved at all. Nearest by ``sum c (s - s')^2``
    are ``clamp(s - v, 0, 1)``: all candidates move alike, and their ranking stays.

    What is spent is piecewise linear and falls with ``v``: bisection, with Newton steps instead where they stay within the
    bracket, which end as soon as one hits the right piece. The sum is taken in float64 over the values as they are stored,
    and ends at or below the budget, by no more than `TOLERANCE` of it where the dtype can express that.

    Args:
        probabilities: contiguous; any real values to begin with.
        costs: of a candidate of each tensor, above zero.
        budget: in the unit of the costs.
        metric: of the distance.
        spend_all: ``sum c s = budget`` instead; then ``v`` may be negative.

    Returns:
        ``v``.

    Raises:
        ValueError: for a budget below zero, or above the cost of all candidates where all is to be spent; for costs that do
            not fit the tensors; for tensors that cannot be changed in place in pieces.
    """
    _check(probabilities, costs, budget)
    if spend_all and budget > (total := _price(probabilities, costs)):
        raise ValueError(f"a budget of {budget:g} cannot be spent on candidates that cost {total:g}; pass at most that")
    normal = list(costs) if metric == "euclidean" else [1.0] * len(costs)
    value = _multiplier(probabilities, costs, normal, budget, spend_all)
    for tensor, along in zip(probabilities, normal, strict=True):
        for piece in pieces(tensor):
            piece.sub_(value * along).clamp_(0.0, 1.0)
    return value


def spent(probabilities: Sequence[Tensor], costs: Sequence[float]) -> float:
    """``sum c s``, in float64."""
    return math.fsum(
        cost * float(piece.sum(dtype=torch.float64))
        for tensor, cost in zip(probabilities, costs, strict=True)
        for piece in pieces(tensor)
    )


def keep_best(
    scores: Sequence[Tensor],
    costs: Sequence[float],
    budget: float,
    *,
    fill: bool = True,
) -> list[Tensor]:
    """Boolean masks over the candidates: the best of them within the budget, exactly and without chance.

    The rule: candidates are ranked by score, the highest first, equal ones by position (the earlier tensor, then the lower
    index). Going down this ranking, each is kept if the budget has room for it beside those kept before, and passed over
    if not; without `fill`, the first that has no room ends it. So the budget is never exceeded, and with `fill` nothing
    that was left out has room at the end. It is a greedy rule: no claim that the sum of the scores is the highest possible.

    Args:
        scores: contiguous, finite or infinite, without NaN; any float dtype, the same for all.
        costs: of a candidate of each tensor, above zero. Whole numbers (up to 2^53 in sum) are counted exactly.
        budget: in the unit of the costs.
        fill: go on after the first candidate without room.

    Raises:
        ValueError: for a budget below zero, costs that do not fit the tensors, or scores of several dtypes.
    """
    _check(scores, costs, budget)
    if len({tensor.dtype for tensor in scores}) > 1:
        raise ValueError(f"one ranking needs scores of one dtype, got {sorted({str(t.dtype) for t in scores})}")
    kept = [torch.zeros_like(tensor, dtype=torch.bool) for tensor in scores]
    if not fill:
        _keep_prefix(scores, costs, [i for i, each in enumerate(scores) if each.numel()], budget, kept)
        return kept
    # A round ends at a candidate without room, and no later one of that cost has room either: few costs, few rounds.
    room = budget
    while affordable := [i for i, cost in enumerate(costs) if cost <= room and not bool(kept[i].all())]:
        room = _keep_prefix(scores, costs, affordable, room, kept)
    return kept


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Flat views of at most `PIECE` entries; a ValueError where the tensor is not contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous; pass it through .contiguous()")
    yield from tensor.view(-1).split(PIECE)


def _check(tensors: Sequence[Tensor], costs: Sequence[float], budget: float) -> None:
    if not budget >= 0:
        raise ValueError(f"a budget must be at least 0, got {budget}")
    if len(tensors) != len(costs):
        raise ValueError(f"{len(tensors)} tensors but {len(costs)} costs; pass one cost for each tensor")
    if any(not (cost > 0 and math.isfinite(cost)) for cost in costs):
        raise ValueError(f"costs must be above 0 and finite, got {sorted(set(costs))}")
    for tensor in tensors:
        if tensor.dtype not in _INTEGERS:
            raise ValueError(f"candidates are real numbers of 16, 32 or 64 bits, got {tensor.dtype}")


def _price(tensors: Sequence[Tensor], costs: Sequence[float]) -> float:
    return math.fsum(cost * tensor.numel() for tensor, cost in zip(tensors, costs, strict=True))


def _multiplier(
    probabilities: Sequence[Tensor],
    costs: Sequence[float],
    normal: Sequence[float],
    budget: float,
    spend_all: bool,
) -> float:
    """The ``v`` of `project`, where all moves along ``-v normal``: the highest end of a bracket, where the budget is kept."""
    value = 0.0
    found, slope = _spent_at(probabilities, costs, normal, value)
    if found <= budget and (not spend_all or found >= budget * (1 - TOLERANCE)):
        return value
    # Twice as far as where all are 0, or all 1, lest rounding leaves one of them short of it.
    ends = [
        (float(tensor.max()) / along, (float(tensor.min()) - 1) / along)
        for tensor, along in zip(probabilities, normal, strict=True)
        if tensor.numel()
    ]
    low, high = (0.0, 2 * max(end[0] for end in ends)) if found > budget else (2 * min(end[1] for end in ends), 0.0)
    # Just below the budget: a Newton step that lands a rounding error above it would have to be repeated.
    aim = budget * (1 - TOLERANCE / 2)
    best, excess, stretch = value, found - aim, 1.0
    for _ in range(_PASSES):
        newton = best + stretch * excess / slope if slope > 0 else low
        value = newton if low < newton < high else (low + high) / 2
        if not low < value < high:
            break
        found, falling = _spent_at(probabilities, costs, normal, value)
        # A step may be too short to change any stored probability, and too short where the slope was steeper.
        stretch = 4 * stretch if abs(found - aim) > abs(excess) / 2 else 1.0
        if abs(found - aim) < abs(excess):
            best, excess, slope = value, found - aim, falling
        if found > budget:
            low = value
        else:
            high = value
            if found >= budget * (1 - TOLERANCE):
                break
    return high


def _spent_at(
    probabilities: Sequence[Tensor], costs: Sequence[float], normal: Sequence[float], value: float
) -> tuple[float, float]:
    """``sum c clamp(s - v n, 0, 1)``, and how fast it falls with ``v``: ``sum c n`` over what is not clamped."""
    totals, slopes = [], []
    for tensor, cost, along in zip(probabilities, costs, normal, strict=True):
        for piece in pieces(tensor):
            moved = piece - value * along
            clamped = moved.clamp(0.0, 1.0)
            totals.append(cost * float(clamped.sum(dtype=torch.float64)))
            slopes.append(cost * along * float(torch.eq(clamped, moved, out=moved).sum(dtype=torch.float32)))
    return math.fsum(totals), math.fsum(slopes)


def _keep_prefix(
    scores: Sequence[Tensor],
    costs: Sequence[float],
    members: list[int],
    room: float,
    kept: list[Tensor],
) -> float:
    """Keep the best of the members' candidates that are not kept yet, up to the first without room; the room left.

    What is kept of the members already must be the top of their ranking, up to equal scores.
    """

    def walk() -> Iterator[tuple[float, Tensor, Tensor]]:
        for member in members:
            for piece, mask in zip(pieces(scores[member]), pieces(kept[member]), strict=True):
                yield costs[member], piece, mask

    # Nothing but sums of whole numbers where costs are whole: all of this is exact.
    before = math.fsum(cost * int(mask.count_nonzero()) for cost, _, mask in walk())
    total = math.fsum(costs[member] * scores[member].numel() for member in members)
    if total - before <= room:
        for member in members:
            kept[member].fill_(True)
        return room - (total - before)
    dtype = scores[members[0]].dtype
    ends = [[float(end) for end in keys.aminmax()] for _, keys, _ in walk()]
    # Bisection over the numbers of the dtype: the lowest threshold such that all above it have room.
    low = _rank(min(end[0] for end in ends), dtype) - 1
    high = _rank(max(end[1] for end in ends), dtype)
    while high - low > 1:
        middle = (low + high) // 2
        if _price_above(_number(middle, dtype), walk()) - before > room:
            low = middle
        else:
            high = middle
    threshold = _number(high, dtype)
    for cost, keys, mask in walk():
        above = (keys > threshold) & ~mask
        room -= cost * int(above.count_nonzero())
        mask |= above
    for cost, keys, mask in walk():
        equal = (keys == threshold) & ~mask
        count, fitting = int(equal.count_nonzero()), max(0, int(room // cost))
        if count > fitting:
            mask |= equal & (equal.cumsum(0) <= fitting)
            return room - cost * fitting
        mask |= equal
        room -= cost * count
    return room


def _price_above(threshold: float, candidates: Iterator[tuple[float, Tensor, Tensor]]) -> float:
    # Ones and zeros as float32: compared and summed in a fraction of the time of booleans.
    return math.fsum(
        cost * float(torch.gt(keys, threshold, out=torch.empty_like(keys)).sum(dtype=torch.float32))
        for cost, keys, _ in candidates
    )


def _rank(number: float, dtype: torch.dtype) -> int:
    """The place of a number in the order of all of a floating-point dtype, with 0 for both zeros."""
    integer = _INTEGERS[dtype]
    bits = int(torch.tensor(number, dtype=dtype).view(integer))
    return bits if bits >= 0 else torch.iinfo(integer).min - bits


def _number(rank: int, dtype: torch.dtype) -> float:
    """The inverse of `_rank`."""
    integer = _INTEGERS[dtype]
    bits = rank if rank >= 0 else torch.iinfo(integer).min - rank
    return float(torch.tensor(bits, dtype=integer).view(dtype))
