"""Pruning in one pass: the error of what is dropped in a column is carried on to the columns still to come.

This is SparseGPT (Frantar and Alistarh, arXiv 2301.00774), an optimal brain surgeon that goes from column to column in
one order for all rows, as `rounding` does: with the damped Gram ``H = L^T L``, ``L`` lower triangular in that order, the
squared error of values ``q`` for a row ``c`` is ``sum_j L_jj^2 (t_j - q_j)^2``, where ``t_j = c_j + sum_{i < j} L_ji / L_jj
(c_i - q_i)`` is what column j is asked for once those before it are settled. Dropping it costs ``L_jj^2 t_j^2``: SparseGPT's
score, its diagonal of the factored inverse being ``1 / L_jj``. No inverse is formed.

A kept value need not be what it is asked for: where it can only be stored rounded to ``r_j``, the same pass is GPTQ's, and what
keeping an entry gains is ``L_jj^2 (t_j^2 - (t_j - r_j)^2)``. Support and few-bit values are then chosen together.

A support that was chosen elsewhere is fitted better by `pruning.refit`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lexigram.linalg.rounding import DAMPING, FLOOR, activation_order
from lexigram.linalg.support import ANYWHERE, Pattern


class Pruned(NamedTuple):
    """Values (out, in), zero outside of the support, and the support, bool (out, in), which may hold zeros too."""

    values: Tensor
    support: Tensor


def surgeon(
    weight: Tensor,
    gram: Tensor,
    kept: int | None = None,
    *,
    pattern: Pattern = ANYWHERE,
    order: Tensor | None = None,
    round_column: Callable[[Tensor, int], Tensor] | None = None,
    block: int = 128,
    damping: float = DAMPING,
) -> Pruned:
    """Keep exactly `kept` entries of a weight, chosen block by block of columns, so that the error of its outputs is small.

    Args:
        weight: (out, in), any float dtype; products are done in float32, or in float64 if that is what it is.
        gram: (in, in), positive semi-definite; factored in float64.
        kept: how many entries in all; every block of columns gets its share. `pattern` may tell.
        pattern: where they may be.
        order: the columns (in,) in the order in which they are settled; by default from left to right. Columns that belong
            together in `pattern` stay together: see `settling_order`.
        round_column: ``(targets (out,), column) -> (out,)``: the nearest storable values of that column of the weight; by
            default values are kept as they are asked for.
        block: columns among which entries are chosen together, rounded down to whole groups of the pattern.
        damping: share of the mean diagonal of the Gram that is added to its diagonal; `rounding.FLOOR` of the trace where
            this is too little.

    Raises:
        ValueError: where the shapes contradict each other, so many entries cannot be kept, `order` is not a permutation
            or parts what belongs together, or the Gram is not positive semi-definite.
    """
    rows, cols = weight.shape
    shape = (rows, cols)
    kept = pattern.total(shape, kept)
    if gram.shape != (cols, cols):
        raise ValueError(f"a Gram {tuple(gram.shape)} does not fit a weight {shape}")
    order = torch.arange(cols, device=weight.device) if order is None else order.to(weight.device)
    _check_order(order, cols, pattern)
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    factor = lower(gram.to(torch.float64)[order][:, order], damping)
    pivots = factor.diagonal().clone()
    carry, price = (factor / pivots[:, None]).to(work), pivots.square().to(work)

    # Columns lie as rows, so that each is one stretch of memory.
    wanted = weight.T[order].to(work)
    targets = wanted.clone()
    support = torch.empty(wanted.shape, dtype=torch.bool, device=weight.device)
    grain = pattern.grain(shape)
    columns = order.tolist()
    block = max(1, block // pattern.width) * pattern.width
    window = pattern.width if pattern.fixed else block
    for low in range(0, cols, block):
        high = min(cols, low + block)
        lost = torch.empty_like(wanted[low:high])
        for row in range(low, high):
            inside = row - low
            if inside % window == 0:
                end = min(high, row + window)
                asked = targets[row:end] + carry[row:end, low:row] @ lost[:inside]
                asked = _settled(wanted[row:end], asked, carry[row:end, row:end])
                gain = asked.square()
                if round_column is not None:
                    gain.sub_(_missed(asked, columns[row:end], round_column).square_()).clamp_min_(0.0)
                gain.mul_(price[row:end, None])
                share = (kept // grain * end // cols - kept // grain * row // cols) * grain
                support[row:end] = pattern.choose(gain.T, share).T
            target = targets[row] + carry[row, low:row] @ lost[:inside]
            if round_column is not None:
                target = round_column(target, columns[row])
            targets[row] = target.where(support[row], 0.0)
            lost[inside] = wanted[row] - targets[row]
        targets[high:].addmm_(carry[high:, low:high], lost)
    back = order.argsort()
    return Pruned(targets[back].T.to(weight.dtype).contiguous(), support[back].T.contiguous())


def settling_order(gram: Tensor, pattern: Pattern = ANYWHERE) -> Tensor:
    """The columns (in,) by decreasing diagonal of the Gram (in, in), those that belong together in one piece.

    Groups go by the sum of their diagonals, and the columns inside of each as in `activation_order`.
    """
    if pattern.width == 1:
        return activation_order(gram)
    strength = gram.diagonal().view(-1, pattern.width)
    inside = strength.argsort(dim=1, descending=True, stable=True)
    groups = strength.sum(1).argsort(descending=True, stable=True)
    return (inside + torch.arange(len(inside), device=gram.device)[:, None] * pattern.width)[groups].view(-1)


def _settled(wanted: Tensor, asked: Tensor, carry: Tensor) -> Tensor:
    """What the columns of a window (w, n) are asked for if each before it gets what it is asked for.

    With ``l = wanted - result`` and the carry ``I + N``: ``result = asked + N l``, so that ``(I + N) l = wanted - asked``.
    """
    return wanted - torch.linalg.solve_triangular(carry, wanted - asked, upper=False, unitriangular=True)


def _missed(asked: Tensor, columns: list[int], round_column: Callable[[Tensor, int], Tensor]) -> Tensor:
    """What kept values are off by, (w, n), of what the columns of a window are asked for."""
    return asked - torch.stack([round_column(row, column) for row, column in zip(asked, columns, strict=True)])


def lower(gram: Tensor, damping: float) -> Tensor:
    """``L``, lower triangular, with ``L^T L`` the Gram, damped as in `surgeon`; an all-zero Gram counts as 1s."""
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the Gram has entries that are not finite; the calibration activations overflowed")
    trace = gram.trace()
    trace = torch.where(trace > 0, trace, float(len(gram)))
    for added in (damping * trace / len(gram), FLOOR * trace):
        damped = gram.flip(0, 1)
        damped.diagonal().add_(added)
        upper, failed = torch.linalg.cholesky_ex(damped, upper=True)
        if not failed:
            return upper.flip(0, 1)
    raise ValueError("the Gram is not positive semi-definite; pass X^T X of the inputs, summed in float64")


def _check_order(order: Tensor, cols: int, pattern: Pattern) -> None:
    if not torch.equal(order.sort().values, torch.arange(cols, device=order.device)):
        raise ValueError(f"the order must name each of the {cols} columns once")
    groups = order.view(-1, pattern.width) // pattern.width
    if not bool((groups == groups[:, :1]).all()):
        raise ValueError(f"the order parts groups of {pattern.width} columns; take it from `settling_order`")
