"""Rounding in the metric of a Gram: the error made in one column is carried on to the columns that are still to come.

For rows ``c (d,)`` of the values and a Gram ``H = R^T R``, ``R`` upper triangular, the squared error of rounded values
``q`` is ``sum_j R_jj^2 (c_j + sum_{i > j} R_ji / R_jj (c_i - q_i) - q_j)^2``. Going from the last column to the first, what
is in the bracket but ``q_j`` is known, and ``q_j`` is the nearest storable value to it. This is Babai's nearest plane, and
it is GPTQ (Frantar et al., arXiv 2210.17323) with the columns in reverse and without the inverse of ``H`` that GPTQ
factors: it gives the same values.

The columns may be rounded in any order; `activation_order` takes the most important ones first, while there are still many
left to make up for them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the mean of the Gram's diagonal that is added to it; GPTQ's number.

It keeps corrections in proportion: where a direction hardly occurs in the inputs, the exact ones are huge.
"""

FLOOR = 1e-6
"""Share of the Gram's trace that is added where less leaves a pivot that is not positive.

Products in float32 leave eigenvalues below zero where there should be none, by some 1e-7 of the largest.
"""

_BATCH_ENTRIES = 2**23  # of the Grams of all rows that are factored together


def activation_order(gram: Tensor) -> Tensor:
    """The columns (d,) by decreasing diagonal of the Gram (d, d), equal ones from left to right."""
    return gram.diagonal().argsort(descending=True, stable=True)


def round_carrying(
    values: Tensor,
    gram: Tensor,
    round_column: Callable[[Tensor, int], Tensor],
    *,
    order: Tensor | None = None,
    block: int = 128,
    damping: float = DAMPING,
) -> Tensor:
    """Round values (n, d), one column after another, so that ``(values - rounded) G (values - rounded)^T`` stays small.

    Args:
        values: any float dtype; products are done in float32, or in float64 if that is what it is.
        gram: (d, d), positive semi-definite; factored in float64.
        round_column: ``(targets (n,), column) -> (n,)``: the nearest storable values of that column of `values`.
        order: the columns (d,) in the order in which they are rounded; by default from left to right.
        block: columns between two updates of all the columns to come.
        damping: share of the mean diagonal of the Gram that is added to its diagonal; `FLOOR` says what is added where this
            is too little.

    Returns:
        (n, d) in the dtype of `values`.

    Raises:
        ValueError: where the shapes contradict each other, `order` is not a permutation, or the Gram is not positive
            semi-definite.
    """
    size = values.shape[1]
    _check_gram(gram)
    if gram.shape[0] != size:
        raise ValueError(f"a Gram of {gram.shape[0]} columns does not fit values {tuple(values.shape)}")
    order = torch.arange(size, device=values.device) if order is None else order.to(values.device)
    if not torch.equal(order.sort().values, torch.arange(size, device=values.device)):
        raise ValueError(f"the order must name each of the {size} columns once")
    last_first = order.flip(0)
    ordered = gram.to(torch.float64)[last_first][:, last_first]
    work = _work_dtype(values)
    carry = _carry(ordered, *_added(gram, damping)).to(work)

    # Columns lie as rows, so that each is one stretch of memory.
    wanted = values.T[last_first].to(work)
    targets = wanted.clone()
    columns = last_first.tolist()
    for high in range(size, 0, -block):
        low = max(0, high - block)
        lost = torch.empty_like(wanted[low:high])
        for row in range(high - 1, low - 1, -1):
            inside = row - low
            target = targets[row] + carry[row, row + 1 : high] @ lost[inside + 1 :]
            targets[row] = round_column(target, columns[row])
            lost[inside] = wanted[row] - targets[row]
        targets[:low].addmm_(carry[:low, low:high], lost)
    return torch.empty_like(values).index_copy_(1, last_first, targets.T.to(values.dtype))


def round_carrying_on_support(
    values: Tensor,
    positions: Tensor,
    gram: Tensor,
    round_column: Callable[[Tensor, tuple[slice, int]], Tensor],
    *,
    batch: int | None = None,
    damping: float = DAMPING,
) -> Tensor:
    """Round the kept entries of sparse rows: `round_carrying` for each row by itself, with the Gram of its own columns.

    The entries of a row are rounded from left to right; for another order, sort the row's values and positions by it.

    Args:
        values: (n, s), the entries kept in each row; any float dtype, computed with as in `round_carrying`.
        positions: (n, s) int64, the columns that they are in.
        gram: (k, k), positive semi-definite; the Gram of row i is ``gram[positions[i]][:, positions[i]]``.
        round_column: ``(targets (b,), (rows, entry)) -> (b,)``: the nearest storable values for ``values[rows, entry]``,
            for a slice of rows at a time.
        batch: rows that are factored together, each with its own Gram (s, s); by default as many as have 64 MB of them.
        damping: as in `round_carrying`, of the whole Gram.

    Returns:
        (n, s) in the dtype of `values`.

    Raises:
        ValueError: where the shapes contradict each other or the Gram is not positive semi-definite.
    """
    rows, entries = values.shape
    _check_gram(gram)
    if positions.shape != values.shape:
        raise ValueError(f"positions {tuple(positions.shape)} must have the shape {tuple(values.shape)}")
    work = _work_dtype(values)
    gram = gram.to(torch.float64)
    added, floor = _added(gram, damping)
    batch = batch or max(1, _BATCH_ENTRIES // max(1, entries * entries))
    rounded = torch.zeros_like(values)
    for start in range(0, rows, batch):
        part = slice(start, min(start + batch, rows))
        wanted, columns = values[part].to(work), positions[part]
        own = gram[columns[:, :, None], columns[:, None, :]]
        lost = torch.zeros_like(wanted)
        # The factor runs from the last entry to the first: reversed, it ends where the rounding begins.
        carry = _carry(own.flip(1, 2), added, floor).to(work).flip(1, 2)
        for entry in range(entries):
            target = wanted[:, entry] + torch.linalg.vecdot(carry[:, entry, :entry], lost[:, :entry])
            found = round_column(target, (part, entry)).to(work)
            lost[:, entry] = wanted[:, entry] - found
            rounded[part, entry] = found.to(values.dtype)
    return rounded


def _carry(gram: Tensor, added: Tensor, floor: Tensor) -> Tensor:
    """``R_ji / R_jj`` for ``R^T R = gram + added I``, (..., d, d): what column j takes of the error of column i > j."""
    added = added.expand(gram.shape[:-2])
    upper, failed = _factor(gram, added)
    if bool(failed.any()):
        upper, failed = _factor(gram, torch.where(failed != 0, added.clamp_min(floor), added))
    if bool(failed.any()):
        raise ValueError("the Gram is not positive semi-definite; pass X^T X of the inputs, summed in float64")
    return upper.div_(upper.diagonal(dim1=-2, dim2=-1)[..., None].clone())


def _factor(gram: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    damped = gram.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(added[..., None])
    upper, failed = torch.linalg.cholesky_ex(damped, upper=True)
    return upper, failed


def _added(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """What is added to the diagonal at first, and what at least if that is too little; an all-zero Gram counts as 1s."""
    trace = gram.diagonal().to(torch.float64).sum()
    trace = torch.where(trace > 0, trace, float(len(gram)))
    return damping * trace / len(gram), FLOOR * trace


def _work_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _check_gram(gram: Tensor) -> None:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"a Gram is a square matrix, got the shape {tuple(gram.shape)}")
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the Gram has entries that are not finite; the calibration activations overflowed")
