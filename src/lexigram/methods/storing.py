"""Fitted matrices into stored leaves, with the error of rounding carried forward in the metric of what stands beside them.

What is fine enough is rounded to nearest; whatever is coarser goes value by value, each making up for the errors before it
(`lexigram.linalg.rounding`).
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lexigram.factors import (
    Bfloat,
    Codec,
    Dense,
    DenseSpec,
    Grid,
    Integer,
    Product,
    ProductSpec,
    Sparse,
    SparseSpec,
    group_size,
)
from lexigram.linalg.integers import ROUNDS, Steps, to_steps
from lexigram.linalg.rounding import DAMPING, activation_order, round_carrying, round_carrying_on_support
from lexigram.linalg.selection import largest_indicator
from lexigram.linalg.support import Rows, wanda
from lexigram.linalg.surgeon import Pruned, settling_order, surgeon
from lexigram.methods.base import factored
from lexigram.shown import FORM, Shown

ValueBits = Literal[2, 3, 4, 6, 8, 10, 12, 14, 16]
"""Stored bits of a value: integers with a scale and a zero a group up to 8, above that bfloat16 with so many bits kept."""

BITS = "Stored bits of a value: of a coefficient, a low-rank factor, a quantised weight."

# Fields that several methods have.
StoredBits = Annotated[ValueBits, Shown(FORM), Field(description=BITS)]
ValueGroup = Annotated[
    int,
    Shown(FORM),
    Field(ge=1, le=2**24, description="How many values share a scale where they are stored as integers."),
]
Refit = Annotated[bool, Field(description="Move the kept values to where the outputs on the text stay closest.")]
Damping = Annotated[float, Field(ge=0, description="Share of the Gram's mean diagonal that is added to its diagonal.")]


def codec(bits: ValueBits, group: int, cols: int | None = None) -> Codec:
    """The codec of so many bits. Groups divide rows of `cols` values; without `cols` they run through."""
    if bits == 10 or bits == 12 or bits == 14 or bits == 16:
        return Bfloat(bits=bits)
    return Integer(bits=bits, group=group if cols is None else group_size(cols, group))


def store_dense(
    matrix: Tensor,
    spec: DenseSpec,
    gram_of: Callable[[], Tensor],
    *,
    carry: bool = True,
    order: Literal["activation", "natural"] = "activation",
    clip: bool = True,
    sweeps: int = 0,
    damping: float = DAMPING,
) -> Dense:
    """Round `matrix` (rows, cols) so that ``(M - M^) gram (M - M^)^T`` stays small, row by row (GPTQ, arXiv 2210.17323).

    The grids are chosen once, from the matrix as it is, so that the columns may be taken in any order; GPTQ as published
    chooses those of a group when it comes to it.

    Args:
        matrix: any float dtype.
        spec: the leaf; bfloat16 of 16 bits is rounded to nearest.
        gram_of: gives the Gram (cols, cols) of what the matrix is applied to, where it is needed.
        carry: False rounds every value by itself.
        order: of the columns; `activation` takes those with the strongest inputs first.
        clip: search for each group how much of its range is worth representing, errors weighted by the inputs' strength.
        sweeps: over the values once they are rounded, each with a refit of the scales (`lexigram.linalg.integers`).
        damping: share of the Gram's mean diagonal that is added to its diagonal.
    """
    if spec.codec.bits == 16:
        return Dense.encode(matrix, spec)
    gram = gram_of()
    strength = gram.diagonal()
    # The grid serves inputs that the calibration text does not have as well, hence the damping here too.
    grid = spec.codec.grid(matrix, strength + damping * strength.mean(), clip=clip)
    if not carry:
        return Dense.encode(matrix, spec, grid)
    rounded = round_carrying(
        matrix,
        gram,
        lambda targets, column: spec.codec.round(targets, grid.at((slice(None), column))),
        order=activation_order(gram) if order == "activation" else None,
        damping=damping,
    )
    if sweeps and isinstance(spec.codec, Integer):
        everywhere = Pruned(rounded, torch.ones_like(rounded, dtype=torch.bool))
        rounded, grid = _stepped(matrix, everywhere, spec.codec, grid, gram, sweeps, damping)
    return Dense.encode(rounded, spec, grid)


def store_sparse(codes: Tensor, spec: SparseSpec, gram_of: Callable[[], Tensor]) -> Sparse:
    """Round `codes` (n, k), equally many a row, so that ``(C - C^) gram (C - C^)^T`` stays small on their supports.

    Among atoms that are nearly orthogonal there is little for the others to make up for: carrying wins 1 to 3 % of the error
    at 4 and 6 bits and nothing measurable above, so there it is left out.

    Args:
        codes: with at most ``spec.nonzeros / n`` non-zeros a row.
        spec: the leaf; values of 8 bits and more are rounded to nearest.
        gram_of: gives the Gram (k, k) of the atoms in the metric of the inputs, where it is needed.
    """
    if spec.codec.bits >= 8:
        return Sparse.encode(codes, spec)
    support = largest_indicator(codes.abs(), spec.nonzeros // spec.rows).bool()
    positions = support.nonzero()[:, 1].view(spec.rows, -1)
    values = codes.gather(1, positions)
    grid = spec.codec.grid(values)
    rounded = round_carrying_on_support(
        values, positions, gram_of(), lambda targets, at: spec.codec.round(targets, grid.at(at)), damping=0.0
    )
    return Sparse.encode(torch.zeros_like(codes).scatter_(1, positions, rounded), spec, support, grid)


def store_pruned(
    weight: Tensor,
    pruned: Pruned,
    spec: SparseSpec,
    gram: Tensor,
    *,
    sweeps: int = ROUNDS,
    damping: float = DAMPING,
) -> Sparse:
    """Round kept entries of a weight so that ``(W - V) gram (W - V)^T`` stays small (`lexigram.linalg.integers`).

    Args:
        weight: (out, in), what the entries stand for.
        pruned: the values wanted, and their support.
        spec: the leaf; values of 8 bits and more, and those of blocks, are rounded to nearest.
        gram: (in, in).
        sweeps: over the values, each with a refit of their scales.
        damping: share of the Gram's mean diagonal that is added to its diagonal.
    """
    codec = _coarse(spec)
    if codec is None:
        return Sparse.encode(pruned.values, spec, pruned.support)
    strength = gram.diagonal() + damping * gram.diagonal().mean()
    grid = codec.grid(pruned.values[pruned.support], strength.expand_as(weight)[pruned.support])
    values, grid = _stepped(weight, pruned, codec, grid, gram, sweeps, damping)
    return Sparse.encode(values, spec, pruned.support, grid)


def prune_rounding(weight: Tensor, spec: SparseSpec, gram: Tensor, *, damping: float = DAMPING) -> Pruned:
    """Support and values of few bits in one pass: SparseGPT's choice inside GPTQ's rounding, in activation order.

    Which values share a scale where they are stored is not known before the support is. So the pass has a grid for every row
    and run of inputs, as wide as that many kept values take on average, its clipping searched over the entries that Wanda
    would keep; `store_pruned` then gives the values scales of their own.

    Args:
        weight: (out, in).
        spec: the leaf; values that `store_pruned` rounds to nearest are not rounded here.
        gram: (in, in).
        damping: share of the Gram's mean diagonal that is added to its diagonal.
    """
    kept, codec, order = spec.nonzeros, _coarse(spec), settling_order(gram)
    if codec is None or not kept:
        return surgeon(weight, gram, kept, order=order, damping=damping)
    rows, cols = weight.shape
    likely = wanda(weight, gram, -(-kept // rows) * rows, Rows())
    alike = Integer(bits=codec.bits, group=group_size(cols, codec.group * weight.numel() // kept))
    strength = gram.diagonal() + damping * gram.diagonal().mean()
    grid = alike.grid(weight * likely, strength)
    return surgeon(
        weight,
        gram,
        kept,
        order=order,
        round_column=lambda targets, column: alike.round(targets, grid.at((slice(None), column))),
        damping=damping,
    )


def store_low_rank(left: Tensor, right: Tensor, spec: ProductSpec, gram: Tensor) -> Product:
    """Round factors ``L (out, r)`` and ``R (r, in)`` so that ``(L R - L^ R^) gram (L R - L^ R^)^T`` stays small.

    Args:
        left: L.
        right: R.
        spec: of two dense leaves.
        gram: (in, in).

    Raises:
        ValueError: for a spec of other leaves.
    """
    outer, inner = factored(spec, DenseSpec, DenseSpec)
    stored = store_dense(right, inner, lambda: gram)

    def seen() -> Tensor:
        rows = stored.to_dense(torch.float64)
        return rows @ gram.double() @ rows.T

    return Product(store_dense(left, outer, seen), stored)


def _coarse(spec: SparseSpec) -> Integer | None:
    """The codec of entries that are rounded one after the other; None where each is rounded to nearest."""
    return spec.codec if isinstance(spec.codec, Integer) and spec.codec.bits < 8 and spec.block == (1, 1) else None


def _stepped(
    weight: Tensor, wanted: Pruned, codec: Integer, grid: Grid, gram: Tensor, sweeps: int, damping: float
) -> tuple[Tensor, Grid]:
    """Values on the support of `wanted` that a grid with other scales than `grid` can store, and that grid."""
    assert grid.scale is not None
    assert grid.zero is not None
    scale, zero = (part.reshape(-1)[:: codec.group] for part in (grid.scale, grid.zero))
    steps = Steps(scale, zero, (1 << codec.bits) - 1, codec.group)
    found = to_steps(weight, gram, wanted.support, wanted.values, steps, rounds=sweeps, damping=damping)
    scale = found.scale.bfloat16().repeat_interleave(codec.group)[: grid.scale.numel()]
    return found.values, Grid(scale.view(grid.scale.shape), grid.zero)
