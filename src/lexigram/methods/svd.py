"""SVD-LLM: truncated singular value decomposition of the whitened weight (arXiv 2403.07378).

``W L^T ~ U_r S_r V_r^T`` gives the factors ``U_r S_r (out x r)`` and ``V_r^T L^-T (r x in)``. With `plain` there is no
whitening: the best low-rank approximation of the weight itself.
"""

import time
from typing import Literal

import torch
from torch import Tensor

from lexigram.factors import DenseSpec, FactorSpec, Product, ProductSpec, encode
from lexigram.gram import Gram
from lexigram.linalg.svd import truncated_svd
from lexigram.methods.base import (
    Budget,
    BudgetTooSmallError,
    FitReport,
    MethodConfig,
    checked_weight,
    fit,
    layout,
    plain_whitening,
    relative_error,
    size,
)


class SvdConfig(MethodConfig):
    """Low rank in the metric of the calibration Gram; `plain` in that of the weights."""

    name: Literal["svd"] = "svd"
    plain: bool = False


@layout.register
def _(config: SvdConfig, shape: tuple[int, int], budget: Budget) -> ProductSpec:
    one = _spec(shape, 1)
    rank = min(budget.amount // size(one, budget.unit), *shape)
    if rank < 1:
        raise BudgetTooSmallError(size(one, budget.unit), budget)
    return _spec(shape, rank)


@fit.register
def _(
    config: SvdConfig, weight: Tensor, gram: Gram, spec: ProductSpec, generator: torch.Generator
) -> tuple[Product, FitReport]:
    start = time.perf_counter()
    weight = checked_weight(weight)
    whitening = plain_whitening(weight) if config.plain else gram.whitening
    signals = whitening.whiten(weight)
    outputs = gram.whitening.whiten(weight) if config.plain else signals
    left, right = truncated_svd(signals, spec.left.cols)
    lost = float((signals - left @ right).square().sum() / signals.square().sum().clamp_min(torch.finfo().tiny))
    factors = Product(encode(left, spec.left), encode(whitening.unwhiten(right), spec.right))
    return factors, FitReport(
        status="converged",
        message=f"rank {spec.left.cols} of {min(weight.shape)}, exact",
        relative_error=relative_error(outputs, factors, gram.whitening),
        objective=[lost],
        iterations=1,
        seconds=time.perf_counter() - start,
        gram_rank=gram.whitening.rank,
        gram_damping=gram.whitening.damping,
    )


def _spec(shape: tuple[int, int], rank: int) -> ProductSpec:
    left: FactorSpec = DenseSpec(rows=shape[0], cols=rank)
    return ProductSpec(left=left, right=DenseSpec(rows=rank, cols=shape[1]))
