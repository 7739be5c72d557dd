"""The ``s`` largest entries of every row, exactly: the one step of hard thresholding that is not a matrix product.

Sorting a row finds far more than is asked for. A threshold between the ``s``-th and the next value is enough, and a
pass that compares and counts costs a fiftieth of a partial sort; so the threshold is searched by interpolation, a fixed
number of passes for all rows at once, and only the rows where it was not found are ordered.
"""

import torch
from torch import Tensor

_PASSES = 11
_EXACT = 2**24  # ones that a sum in float32 still counts


def keep_largest(values: Tensor, count: int) -> Tensor:
    """Boolean mask ``(n, k)`` with exactly ``count`` True in every row, at the largest values of that row.

    Equal values at the border are resolved for the lowest index, so the mask is a function of the values alone.
    The values must be finite.
    """
    return largest_indicator(values, count).bool()


def largest_indicator(values: Tensor, count: int) -> Tensor:
    """`keep_largest` as zeros and ones in the dtype of the values, ready to multiply with."""
    k = values.shape[1]
    if not 0 <= count <= k:
        raise ValueError(f"cannot keep {count} of {k} entries a row; choose a count between 0 and {k}")
    if count == 0:
        return torch.zeros_like(values)
    if count == k:
        return torch.ones_like(values)
    kept = torch.empty_like(values)
    threshold = _search(values, count, kept)
    torch.gt(values, threshold, out=kept)
    missed = (_ones(kept).squeeze(1) != count).nonzero().squeeze(1)
    if missed.numel():
        kept[missed] = _by_order(values[missed], count)
    return kept


def _search(values: Tensor, count: int, scratch: Tensor) -> Tensor:
    """A threshold ``(n, 1)`` that ``count`` values of the row exceed, in most rows."""
    low, high = (bound[:, None] for bound in values.aminmax(dim=1))
    above_low, above_high = torch.full_like(low, values.shape[1]), torch.zeros_like(high)
    threshold = values.mean(dim=1, keepdim=True)
    for step in range(_PASSES):
        above = _ones(torch.gt(values, threshold, out=scratch))
        many, few = above > count, above < count
        low, above_low = torch.where(many, threshold, low), torch.where(many, above, above_low)
        high, above_high = torch.where(few, threshold, high), torch.where(few, above, above_high)
        # Interpolate the count, aiming between count and count + 1; halve now and then lest one side never moves.
        share = 0.5 if step % 4 == 3 else (above_low - count + 0.5) / (above_low - above_high + 1)
        threshold = torch.where(many | few, low + (high - low) * share, threshold)
    return threshold


def _ones(indicator: Tensor) -> Tensor:
    """How many ones there are in each row, (n, 1)."""
    return indicator.sum(1, keepdim=True, dtype=torch.float64 if indicator.shape[1] > _EXACT else None)


def _by_order(values: Tensor, count: int) -> Tensor:
    border = values.kthvalue(values.shape[1] - count + 1, dim=1, keepdim=True).values
    above, equal = values > border, values == border
    wanted = count - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1) <= wanted))).to(values.dtype)
