"""Low rank plus sparse as a stored form, for every method that makes it: its spec, its sizes, and its values into leaves.

A part of size nothing is left out: rank 0 is a sparse leaf alone, no entries a product alone, and neither an empty sparse leaf.
"""

from bisect import bisect_right
from collections.abc import Callable

from lexigram.factors import (
    DenseSpec,
    Factor,
    FactorSpec,
    Product,
    ProductSpec,
    SparseSpec,
    Sum,
    SumSpec,
)
from lexigram.methods.base import Budget, BudgetTooSmallError, size
from lexigram.methods.storing import ValueBits, codec


def sum_spec(shape: tuple[int, int], rank: int, entries: int, bits: ValueBits, group: int) -> FactorSpec:
    """The form of so many ranks and entries.

    Args:
        shape: (out, in).
        rank: of the low-rank part.
        entries: of the sparse part.
        bits: of every stored value.
        group: how many values share a scale, where they are integers.
    """
    rows, cols = shape
    kept = SparseSpec.lightest(rows, cols, entries, codec(bits, group))
    if not rank:
        return kept
    low = ProductSpec(
        left=DenseSpec(rows=rows, cols=rank, codec=codec(bits, group)),
        right=DenseSpec(rows=rank, cols=cols, codec=codec(bits, group, cols)),
    )
    return SumSpec(left=low, right=kept) if entries else low


def largest_sum(
    shape: tuple[int, int], budget: Budget, rank_share: float, bits: ValueBits, group: int, grain: int = 1
) -> FactorSpec:
    """The form with `rank_share` of a budget in its low-rank part, rounded down, and as many entries as the rest has room for.

    Args:
        shape: (out, in).
        budget: for both parts.
        rank_share: from 0, no low-rank part, to 1.
        bits: of every stored value.
        group: how many values share a scale, where they are integers.
        grain: entries come in multiples of this.

    Raises:
        BudgetTooSmallError: where not even `grain` entries fit, or rank 1 where that is all there may be.
    """

    def needed(rank: int, entries: int) -> int:
        return size(sum_spec(shape, rank, entries, bits, group), budget.unit)

    share = int(budget.amount * rank_share)
    rank = bisect_right(range(1, min(shape) + 1), share, key=lambda count: needed(count, 0))
    counts = range(grain, shape[0] * shape[1] + 1, grain)
    fitting = bisect_right(counts, budget.amount, key=lambda count: needed(rank, count))
    if not rank and not fitting:
        raise BudgetTooSmallError(needed(1, 0) if rank_share == 1 else needed(0, grain), budget)
    return sum_spec(shape, rank, counts[fitting - 1] if fitting else 0, bits, group)


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
        raise ValueError(
            f"the method does not make the form {spec.form!r} that is asked for; make the allocation again"
        )
    return low, kept


def sizes(spec: FactorSpec) -> tuple[int, int]:
    """Rank and number of entries."""
    low, kept = sum_parts(spec)
    return low.left.cols if low else 0, kept.nonzeros if kept else 0


def stored_sum(
    spec: FactorSpec,
    low_rank: Callable[[ProductSpec], Product],
    sparse: Callable[[SparseSpec], Factor],
) -> Factor:
    """The factor of a form, from what stores each part; a part that the form has not is not asked for."""
    low, kept = sum_parts(spec)
    if low is None:
        assert kept is not None
        return sparse(kept)
    return Sum(low_rank(low), sparse(kept)) if kept else low_rank(low)
