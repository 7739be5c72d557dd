"""OATS: low rank plus sparse, with each input weighed by the energy that it has on the calibration text (arXiv 2409.13652).

Truncated SVD and hard thresholding of every output in turns, on ``W D`` with ``D = diag(G)^(1/2)``; then both parts are
taken back to the weight's own coordinates. Correlations between inputs are not used, unless `refit` does so at the end.
"""

import time
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lexigram.factors import Factor, FactorSpec, Sparse, SparseSpec
from lexigram.gram import Gram
from lexigram.linalg.low_rank_sparse import OATS_ROUNDS, oats
from lexigram.linalg.pruning import refit
from lexigram.linalg.rounding import DAMPING
from lexigram.linalg.surgeon import Pruned
from lexigram.methods.base import Budget, FitReport, MethodConfig, checked_weight, direct_report, fit, layout, metric
from lexigram.methods.storing import Damping, Refit, StoredBits, ValueGroup, store_pruned
from lexigram.methods.sums import largest_sum, sizes, stored_sum
from lexigram.shown import FORM, Shown


class OatsConfig(MethodConfig):
    """`rank_share` is that of the stored bytes; of the kept parameters, as published, it is the same but for the bitmask."""

    name: Literal["oats"] = "oats"
    rank_share: Annotated[float, Shown(FORM)] = Field(
        default=0.25, ge=0, le=1, description="Share of the bytes that goes to the low-rank part."
    )
    rounds: int = Field(default=OATS_ROUNDS, ge=1, description="Of singular values and entries in turns.")
    refit: Refit = False
    damping: Damping = DAMPING
    value_bits: StoredBits = 16
    value_group: ValueGroup = 128


@layout.register
def _(config: OatsConfig, shape: tuple[int, int], budget: Budget) -> FactorSpec:
    """Equally many entries in every output."""
    return largest_sum(shape, budget, config.rank_share, config.value_bits, config.value_group, grain=shape[0])


@fit.register
def _(
    config: OatsConfig, weight: Tensor, gram: Gram, spec: FactorSpec, generator: torch.Generator
) -> tuple[Factor, FitReport]:
    start = time.perf_counter()
    weight = checked_weight(weight)
    rank, entries = sizes(spec)
    inputs = metric(gram)
    parts = oats(weight, inputs.diagonal(), rank, entries, rounds=config.rounds)

    def sparse(kept: SparseSpec, rest: Tensor) -> Sparse:
        # On their support the entries are what is left of the weight, as in OATS, but of the stored low-rank part.
        values = rest * parts.support
        if config.refit:
            values = refit(rest, inputs, parts.support, damping=config.damping)
        return store_pruned(rest, Pruned(values, parts.support), kept, inputs, damping=config.damping)

    # Entries that are not refitted make up for each error by itself, and would spoil errors that make up for each other.
    ranked = inputs if config.refit else inputs.diagonal().diag()
    factor = stored_sum(spec, weight, ranked, (parts.left, parts.right), sparse)
    message = f"rank {rank}, {entries / weight.numel():.1%} of the entries, {len(parts.history)} rounds"
    return factor, direct_report(message, weight, factor, gram, time.perf_counter() - start)
