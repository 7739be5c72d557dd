"""Low rank plus sparse as a stored form, for every method that makes it: its spec, its sizes, and its values into leaves.

A part of size nothing is left out: rank 0 is a sparse leaf alone, no entries a product alone, and neither an empty sparse leaf.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import lru_cache

from torch import Tensor

from lexigram.factors import (
    DenseSpec,
    Factor,
    FactorSpec,
    ProductSpec,
    SparseSpec,
    Sum,
    SumSpec,
)
from lexigram.methods.base import Budget, BudgetTooSmallError, size, wrong_form
from lexigram.methods.storing import ValueBits, codec, store_low_rank


def sum_spec(
    shape: tuple[int, int],
    rank: int,
    entries: int,
    bits: ValueBits,
    group: int,
    *,
    low_rank_bits: ValueBits | None = None,
) -> FactorSpec:
    """The form of so many ranks and entries.

    Args:
        shape: (out, in).
        rank: of the low-rank part.
        entries: of the sparse part.
        bits: of every stored value.
        group: how many values share a scale, where they are integers.
        low_rank_bits: of those of the low-rank part, where they are others.
    """
    rows, cols = shape
    fine = low_rank_bits or bits
    kept = SparseSpec.lightest(rows, cols, entries, codec(bits, group))
    if not rank:
        return kept
    low = ProductSpec(
        left=DenseSpec(rows=rows, cols=rank, codec=codec(fine, group)),
        right=DenseSpec(rows=rank, cols=cols, codec=codec(fine, group, cols)),
    )
    return SumSpec(left=low, right=kept) if entries else low


@lru_cache(maxsize=4096)  # layers of one shape are asked for at the same ratios
def largest_sum(
    shape: tuple[int, int],
    budget: Budget,
    rank_share: float,
    bits: ValueBits,
    group: int,
    *,
    grain: int = 1,
    low_rank_bits: ValueBits | None = None,
) -> FactorSpec:
    """The form with `rank_share` of a budget in its low-rank part, rounded down, and as many entries as the rest has room for.

    Args:
        shape: (out, in).
        budget: for both parts.
        rank_share: from 0, no low-rank part, to 1.
        bits: of every stored value.
        group: how many values share a scale, where they are integers.
        grain: entries come in multiples of this.
        low_rank_bits: of the values of the low-rank part, where they are others.

    Raises:
        BudgetTooSmallError: where neither `grain` entries fit, nor rank 1 into its share.
    """

    def needed(rank: int, entries: int) -> int:
        return size(sum_spec(shape, rank, entries, bits, group, low_rank_bits=low_rank_bits), budget.unit)

    def share(amount: int) -> int:
        return int(amount * rank_share)

    rank = bisect_right(range(1, min(shape) + 1), share(budget.amount), key=lambda count: needed(count, 0))
    counts = range(grain, shape[0] * shape[1] + 1, grain)
    fitting = bisect_right(counts, budget.amount, key=lambda count: needed(rank, count))
    if not rank and not fitting:
        alone = needed(0, grain)
        raise BudgetTooSmallError(bisect_left(range(alone), needed(1, 0), key=share), budget)
    entries = counts[fitting - 1] if fitting else 0
    return sum_spec(shape, rank, entries, bits, group, low_rank_bits=low_rank_bits)


def sum_parts(spec: FactorSpec) -> tuple[ProductSpec | None, SparseSpec | None]:
    """The low-rank and the sparse part of a form that `sum_spec` made.

    Raises:
        ValueError: for any other form; an allocation file can ask for it.
    """
    first, second = (spec.left, spec.right) if isinstance(spec, SumSpec) else (spec, spec)
    low = first if isinstance(first, ProductSpec) else None
    kept = second if isinstance(second, SparseSpec) else None
    dense = low is None or (isinstance(low.left, DenseSpec) and isinstance(low.right, DenseSpec))
    if not dense or (low is None and kept is None) or (isinstance(spec, SumSpec) and None in (low, kept)):
        raise wrong_form(spec)
    return low, kept


def sizes(spec: FactorSpec) -> tuple[int, int]:
    """Rank and number of entries."""
    low, kept = sum_parts(spec)
    return low.left.cols if low else 0, kept.nonzeros if kept else 0


def stored_sum(
    spec: FactorSpec,
    weight: Tensor,
    gram: Tensor,
    low_rank: tuple[Tensor, Tensor],
    sparse: Callable[[SparseSpec, Tensor], Factor],
) -> Factor:
    """The factor of a form, from its low-rank part and what stores the sparse one, which is not asked for where there is none.

    Args:
        spec: of a sum, or of either part alone.
        weight: (out, in), what both parts stand for.
        gram: (in, in), in whose metric values of few bits are rounded.
        low_rank: left (out, r) and right factor (r, in).
        sparse: stores the sparse part, given what is left of the weight, (out, in), once the low-rank part is taken off as it
            is stored: entries can make up for the rounding of ranks at no cost.
    """
    low, kept = sum_parts(spec)
    if low is None:
        assert kept is not None
        return sparse(kept, weight)
    product = store_low_rank(*low_rank, low, gram)
    return Sum(product, sparse(kept, weight - product.to_dense().to(weight.dtype))) if kept else product
