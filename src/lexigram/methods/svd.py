"""SVD-LLM: truncated singular value decomposition of the whitened weight (arXiv 2403.07378).

``W L^T ~ U_r S_r V_r^T`` gives the factors ``U_r S_r (out x r)`` and ``V_r^T L^-T (r x in)``. With `plain` there is no
whitening: the best low-rank approximation of the weight itself. Over several matrices, one below the other, with the sum of
their Grams, this is Basis Sharing (arXiv 2410.03765): one right factor for all of them.
"""

import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lexigram.factors import DenseSpec, Factor, GroupSpec, Product, ProductSpec, Shared, SharedSpec
from lexigram.gram import Gram
from lexigram.linalg.svd import truncated_svd
from lexigram.methods.base import (
    Budget,
    BudgetTooSmallError,
    FitReport,
    Fitted,
    Member,
    MethodConfig,
    Plain,
    checked_weight,
    factored,
    fit,
    fit_shared,
    layout,
    layout_shared,
    plain_whitening,
    pooled,
    relative_error,
    size,
)
from lexigram.methods.storing import StoredBits, ValueGroup, codec, store_dense


class SvdConfig(MethodConfig):
    """Low rank in the metric of the calibration Gram; `plain` in that of the weights.

    `value_bits` are those of both factors; below 10 they are integers with a scale and a zero a group.
    """

    name: Literal["svd"] = "svd"
    value_bits: StoredBits = 16
    value_group: ValueGroup = 128
    plain: Plain = False


@layout.register
def _(config: SvdConfig, shape: tuple[int, int], budget: Budget) -> ProductSpec:
    right, (left,) = _largest(config, [shape], budget)
    return ProductSpec(left=left, right=right)


@layout_shared.register
def _(config: SvdConfig, shapes: Sequence[tuple[int, int]], budget: Budget, name: str) -> GroupSpec:
    right, lefts = _largest(config, shapes, budget)
    reference = SharedSpec(name=name, rows=right.rows, cols=right.cols)
    return GroupSpec(members=tuple(ProductSpec(left=left, right=reference) for left in lefts), shared=right)


@fit.register
def _(
    config: SvdConfig, weight: Tensor, gram: Gram, spec: ProductSpec, generator: torch.Generator
) -> tuple[Product, FitReport]:
    outer, inner = factored(spec, DenseSpec, DenseSpec)
    right, ((left, report),) = _fitted(config, [Member(weight, gram)], [outer], inner)
    return Product(left, right), report


@fit_shared.register
def _(config: SvdConfig, members: Sequence[Member], spec: GroupSpec, generator: torch.Generator) -> Fitted:
    assert isinstance(spec.shared, DenseSpec)
    sides = [factored(member, DenseSpec, SharedSpec) for member in spec.members]
    right, parts = _fitted(config, members, [left for left, _ in sides], spec.shared)
    return Fitted(
        [
            (Product(left, Shared(reference, right)), report)
            for (left, report), (_, reference) in zip(parts, sides, strict=True)
        ],
        right,
    )


def _fitted(
    config: SvdConfig, members: Sequence[Member], lefts: Sequence[DenseSpec], right: DenseSpec
) -> tuple[Factor, list[tuple[Factor, FitReport]]]:
    """The right factor for all members, and each one's left factor."""
    start = time.perf_counter()
    weights = [checked_weight(member.weight) for member in members]
    gram = pooled([member.gram for member in members])
    metric, unit = (plain_whitening(weights[0]), 1.0) if config.plain else (gram.whitening, gram.token_unit)
    signals = metric.whiten(torch.cat(weights))
    coefficients, basis = truncated_svd(signals, right.rows)
    lost = float((signals - coefficients @ basis).square().sum() / signals.square().sum().clamp_min(torch.finfo().tiny))
    coefficients, basis = coefficients / unit, basis * unit
    stored = store_dense(metric.unwhiten(basis), right, lambda: metric.factor.T @ metric.factor)
    if config.value_bits < 16:
        basis = metric.whiten(stored.to_dense())
        coefficients = _refitted(signals, basis)
    seconds = time.perf_counter() - start
    found: list[tuple[Factor, FitReport]] = []
    for part, weight, member, left in zip(
        coefficients.split([len(weight) for weight in weights]), weights, members, lefts, strict=True
    ):
        start = time.perf_counter()
        factor = store_dense(part, left, lambda: basis.double() @ basis.double().T)
        own = member.gram.whitening
        report = FitReport(
            status="converged",
            message=f"rank {right.rows} of {min(len(signals), signals.shape[1])}, exact",
            relative_error=relative_error(own.whiten(weight), Product(factor, stored), own),
            objective=[lost],
            iterations=1,
            seconds=seconds / len(members) + time.perf_counter() - start,
            gram_rank=own.rank,
            gram_damping=own.damping,
        )
        found.append((factor, report))
    return stored, found


def _refitted(signals: Tensor, basis: Tensor) -> Tensor:
    """The best coefficients (n, r) for a basis (r, d) that was rounded."""
    return torch.linalg.lstsq(basis.T.double(), signals.T.double()).solution.T.to(signals.dtype)


def _largest(config: SvdConfig, shapes: Sequence[tuple[int, int]], budget: Budget) -> tuple[DenseSpec, list[DenseSpec]]:
    """The right and the left leaves of the largest rank within `budget`."""
    cols = shapes[0][1]

    def at(rank: int) -> tuple[DenseSpec, list[DenseSpec]]:
        right = DenseSpec(rows=rank, cols=cols, codec=codec(config.value_bits, config.value_group, cols))
        lefts = [
            DenseSpec(rows=rows, cols=rank, codec=codec(config.value_bits, config.value_group)) for rows, _ in shapes
        ]
        return right, lefts

    def needed(rank: int) -> int:
        right, lefts = at(rank)
        return size(right, budget.unit) + sum(size(left, budget.unit) for left in lefts)

    rank = min(cols, sum(rows for rows, _ in shapes))
    rank = min(rank, int(budget.amount * rank // max(1, needed(rank))) + 1)
    while rank and needed(rank) > budget.amount:
        rank -= 1
    if rank < 1:
        raise BudgetTooSmallError(needed(1), budget)
    return at(rank)
