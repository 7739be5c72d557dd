"""Low rank plus sparse in the metric of the Gram, with values in few bits: what CAP (arXiv 2505.03801) leaves on the table.

The support is searched with the values (alternating directions, `lexigram.linalg.pruning`), or in turns with a low-rank part
(`lexigram.linalg.low_rank_sparse`); values of few bits are improved together with their scales (`lexigram.linalg.integers`).
How large each part is, in how many bits, or whether a weight is better off with neither, is for an allocation to choose:
`variants` offers the forms.
"""

import math
import time
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lexigram.factors import Factor, FactorSpec, Product, encode
from lexigram.gram import Gram
from lexigram.linalg.integers import ROUNDS as SWEEPS
from lexigram.linalg.low_rank_sparse import low_rank_sparse
from lexigram.linalg.pruning import ROUNDS, prune
from lexigram.linalg.rounding import DAMPING
from lexigram.linalg.surgeon import Pruned, surgeon
from lexigram.methods.base import (
    Budget,
    BudgetTooSmallError,
    FitReport,
    MethodConfig,
    checked_weight,
    direct_report,
    fit,
    layout,
    metric,
    sketch,
    variants,
)
from lexigram.methods.quantize import QuantizeConfig
from lexigram.methods.storing import BITS, ValueBits, ValueGroup, store_pruned
from lexigram.methods.sums import largest_sum, sizes, stored_sum
from lexigram.shown import FORM, Shown

_BITS: tuple[ValueBits, ...] = (16, 8, 6, 4, 3, 2)
_REFITTED = 0.4
"""What is left of the energy of dropped entries once the others make up for it; of layers of a real model."""


class LowRankSparseConfig(MethodConfig):
    """Form and effort.

    Without `value_bits` an allocation chooses them; where each layer has its own budget, what loses least of normally
    distributed weights. Low-rank factors have 8 bits or more.
    """

    allocation: ClassVar[str] = "knapsack"

    name: Literal["lowrank-sparse"] = "lowrank-sparse"
    rank_share: Annotated[float, Shown(FORM)] = Field(
        default=0.0, ge=0, le=1, description="Share of the bytes that goes to the low-rank part."
    )
    value_bits: Annotated[ValueBits | None, Shown(FORM, none="as the ratio allows")] = Field(
        default=None, description=BITS
    )
    value_group: ValueGroup = 128
    rounds: int = Field(
        default=ROUNDS, ge=0, description="Of the search for a support; 0 takes SparseGPT's pass instead."
    )
    sweeps: int = Field(
        default=SWEEPS,
        ge=0,
        description="Over values of few bits once they are rounded, each with a refit of their scales.",
    )
    damping: float = Field(
        default=DAMPING, ge=0, description="Share of the Gram's mean diagonal that is added to its diagonal."
    )


@layout.register
def _(config: LowRankSparseConfig, shape: tuple[int, int], budget: Budget) -> FactorSpec:
    """Few values may cost more in integers, with their scale, than in bfloat16: the best bits of those that fit."""
    too_small: list[BudgetTooSmallError] = []
    ranked: list[ValueBits]
    if config.value_bits is not None:
        ranked = [config.value_bits]
    elif budget.unit == "parameters":  # of any bits they cost the same
        ranked = [16]
    else:
        ranked = _ranked_bits(8 * budget.amount / (shape[0] * shape[1]), config.value_group)
    for bits in ranked:
        try:
            return largest_sum(
                shape, budget, config.rank_share, bits, config.value_group, low_rank_bits=_low_rank_bits(bits)
            )
        except BudgetTooSmallError as error:
            too_small.append(error)
    raise min(too_small, key=lambda error: error.needed)


@variants.register
def _(config: LowRankSparseConfig) -> list[MethodConfig]:
    """Entries in every number of bits, beside a low-rank part where one is asked for and alone; and no entry dropped."""
    shares = dict.fromkeys((config.rank_share, 0.0))
    offered: tuple[ValueBits, ...] = (8, 6, 4, 3) if config.value_bits is None else (config.value_bits,)
    sparse: list[MethodConfig] = [
        config.model_copy(update={"value_bits": bits, "rank_share": share}) for share in shares for bits in offered
    ]
    dense: list[MethodConfig] = [QuantizeConfig(value_bits=bits) for bits in (8, 6, 4)]
    return sparse if config.value_bits else sparse + dense


@sketch.register
def _(config: LowRankSparseConfig) -> LowRankSparseConfig:
    """One pass."""
    return config.model_copy(update={"rounds": 0, "sweeps": 0})


@fit.register
def _(
    config: LowRankSparseConfig, weight: Tensor, gram: Gram, spec: FactorSpec, generator: torch.Generator
) -> tuple[Factor, FitReport]:
    start = time.perf_counter()
    weight = checked_weight(weight)
    rank, entries = sizes(spec)
    inputs = metric(gram)
    left, right, pruned = _parts(config, weight, inputs, rank, entries)
    rest = weight - left @ right
    factor = stored_sum(
        spec,
        lambda low: Product(encode(left, low.left), encode(right, low.right)),
        lambda kept: store_pruned(rest, pruned, kept, inputs, sweeps=config.sweeps, damping=config.damping),
    )
    message = f"rank {rank}, {entries / weight.numel():.1%} of the entries"
    return factor, direct_report(message, weight, factor, gram, time.perf_counter() - start)


def _parts(
    config: LowRankSparseConfig, weight: Tensor, gram: Tensor, rank: int, entries: int
) -> tuple[Tensor, Tensor, Pruned]:
    """Left (out, r) and right factor (r, in), and the entries beside them."""
    if not rank:
        none = weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1])
        if not config.rounds:
            return *none, surgeon(weight, gram, entries, damping=config.damping)
        return *none, prune(weight, gram, entries, rounds=config.rounds, damping=config.damping)
    damped = gram.clone()
    damped.diagonal().add_(config.damping * gram.diagonal().mean())
    found = low_rank_sparse(weight, damped, rank, entries, by_row=False, rounds=max(1, config.rounds))
    return found.left, found.right, Pruned(found.sparse, found.support)


def _low_rank_bits(bits: ValueBits) -> ValueBits:
    """A rank-one part is in every entry: rounding it is no matter of a few."""
    return bits if bits > 8 else 8


def _ranked_bits(bits_a_weight: float, group: int) -> list[ValueBits]:
    """The bits of a value, those first that lose least where so many bits a weight are spent on a bitmask and values.

    Of normally distributed weights: what is dropped loses ``erf(t) - 2 t exp(-t^2) / sqrt(pi)`` of the energy, with ``erf(t)``
    the share that is dropped, and rounding to b bits over six deviations some ``3 / 4^b`` of what is kept.
    """

    def lost(bits: ValueBits) -> float:
        a_value = bits if bits >= 10 else bits + (16 + bits) / group
        dropped = min(max(1 - (bits_a_weight - 1) / a_value, 0.0), 1 - 1e-9)
        t = float(torch.erfinv(torch.tensor(dropped, dtype=torch.float64)))
        energy = dropped - 2 * t * math.exp(-t * t) / math.sqrt(math.pi)
        return _REFITTED * energy + 3 * 4.0**-bits

    return sorted(_BITS, key=lost)
