"""Low rank plus sparse in the metric of the Gram, with values in few bits: what CAP (arXiv 2505.03801) leaves on the table.

The support is searched with the values (alternating directions, `lexigram.linalg.pruning`), or in turns with a low-rank part
(`lexigram.linalg.low_rank_sparse`); values of few bits are improved together with their scales (`lexigram.linalg.integers`).
How large each part is, in how many bits, or whether a weight is better off with neither, is for an allocation to choose:
`variants` offers the forms.
"""

import math
import time
from typing import Annotated, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from lexigram.factors import Factor, FactorSpec, Sparse, SparseSpec
from lexigram.gram import Gram
from lexigram.linalg.integers import ROUNDS as SWEEPS
from lexigram.linalg.low_rank_sparse import low_rank_sparse
from lexigram.linalg.pruning import ROUNDS, prune, refit
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
    useful,
    variants,
)
from lexigram.methods.quantize import QuantizeConfig, QuantizedBits
from lexigram.methods.storing import BITS, Damping, ValueBits, ValueGroup, prune_rounding, store_pruned
from lexigram.methods.sums import largest_sum, sizes, stored_sum
from lexigram.shown import FORM, Shown

_BITS: tuple[ValueBits, ...] = (16, 8, 6, 4, 3, 2)
_OFFERED: tuple[ValueBits, ...] = (8, 6, 4, 3)
_OFFERED_WHOLE: tuple[ValueBits, ...] = (8, 6, 4)
"""Bits of weights of which no entry is dropped."""
_RANK_SHARES: dict[ValueBits, float] = {4: 0.2, 3: 0.1}
"""The rank share that is offered beside none, by the bits of an entry, where the allocation chooses.

Squared errors of a key projection of a real model with shares .05 / .1 / .2, over the least of entries alone at equal bytes:
.88 / .88 / .82 at ratio .7 in 4 bits, 1.01 / .92 / 1.00 at .8 in 3 bits (of a query projection by sketches .81 with .1). In 16
bits no share gains 1 % from .6 on, and none in any at .9. In 8 bits they gain up to .5 only, where a model hardly feels it.
On a model of matrices 64 wide, where ranks are dear, they make no difference: perplexity 12.1 and 12.7 with them, 12.4 and 12.4
without, at .8 and two seeds.
"""
_RANKS_USEFUL = (0.6, 0.8)
"""Ratios between which such a form is measured; see above."""
_SKETCH_ROUNDS = 12
"""Of the start in one pass: at .8 removed the squared error is 2 % above that of 40 rounds, in half of the time."""
_REFITTED = 0.4
"""What is left of the energy of dropped entries once the others make up for it; of layers of a real model."""

Support = Literal["search", "surgeon", "one-pass"]


class LowRankSparseConfig(MethodConfig):
    """Form and effort.

    Without `value_bits` an allocation chooses them; where each layer has its own budget, what loses least of normally
    distributed weights. Without `rank_share` it chooses that too; where each layer has its own budget, there is no low-rank
    part. Low-rank factors have 8 bits or more.
    """

    allocation: ClassVar[str] = "knapsack"

    name: Literal["lowrank-sparse"] = "lowrank-sparse"
    rank_share: Annotated[float | None, Shown(FORM, none="as the knapsack chooses")] = Field(
        default=None, ge=0, le=1, description="Share of the bytes that goes to the low-rank part."
    )
    value_bits: Annotated[ValueBits | None, Shown(FORM, none="as the ratio allows")] = Field(
        default=None, description=BITS
    )
    value_group: ValueGroup = 128
    support: Support = Field(
        default="search",
        description="How entries are chosen: by a `search`, in SparseGPT's pass (`surgeon`) before they are rounded, or in "
        "`one-pass` with their rounding by GPTQ.",
    )
    rounds: int = Field(default=ROUNDS, ge=1, description="Of the search for a support.")
    sweeps: int = Field(
        default=SWEEPS,
        ge=0,
        description="Over values of few bits once they are rounded, each with a refit of their scales.",
    )
    damping: Damping = DAMPING


@layout.register
def _(config: LowRankSparseConfig, shape: tuple[int, int], budget: Budget) -> FactorSpec:
    """Few values may cost more in integers, with their scale, than in bfloat16: the best bits of those that fit."""
    offered = _BITS if config.value_bits is None else (config.value_bits,)
    if budget.unit == "parameters" and config.value_bits is None:  # of any bits they cost the same
        offered = (16,)
    too_small: list[BudgetTooSmallError] = []
    found: list[tuple[float, FactorSpec]] = []
    for bits in offered:
        try:
            spec = largest_sum(
                shape, budget, config.rank_share or 0.0, bits, config.value_group, low_rank_bits=_low_rank_bits(bits)
            )
        except BudgetTooSmallError as error:
            too_small.append(error)
        else:
            found.append((_lost(spec, bits), spec))
    if not found:
        raise min(too_small, key=lambda error: error.needed)
    return min(found, key=lambda each: each[0])[1]


@variants.register
def _(config: LowRankSparseConfig) -> list[MethodConfig]:
    """Entries in every number of bits, alone and beside a low-rank part; and no entry dropped. bfloat16 is offered to all."""
    told = () if config.value_bits is None else (config.value_bits,)
    offered = told or _OFFERED
    forms = [(bits, 0.0) for bits in offered]
    for bits in offered:
        share = _RANK_SHARES.get(bits, 0.0) if config.rank_share is None else config.rank_share
        forms += [(bits, share)] if share else []
    sparse: list[MethodConfig] = [
        config.model_copy(update={"value_bits": bits, "rank_share": share}) for bits, share in forms
    ]
    whole: list[MethodConfig] = [
        QuantizeConfig(value_bits=bits, value_group=config.value_group, damping=config.damping)
        for bits in get_args(QuantizedBits)
        if bits in (told or _OFFERED_WHOLE) and bits < 16
    ]
    return sparse + whole


@useful.register
def _(config: LowRankSparseConfig) -> tuple[float, float]:
    """Low-rank parts that nobody asked for, where they have helped."""
    offered = config.value_bits is not None and config.rank_share == _RANK_SHARES.get(config.value_bits)
    return _RANKS_USEFUL if offered else (0.0, 1.0)


@sketch.register
def _(config: LowRankSparseConfig) -> LowRankSparseConfig:
    """One pass."""
    return config.model_copy(update={"support": "surgeon", "sweeps": 0})


@fit.register
def _(
    config: LowRankSparseConfig, weight: Tensor, gram: Gram, spec: FactorSpec, generator: torch.Generator
) -> tuple[Factor, FitReport]:
    start = time.perf_counter()
    weight = checked_weight(weight)
    rank, entries = sizes(spec)
    inputs = metric(gram)
    left, right, found = _low_rank(config, weight, inputs, rank, entries)

    def sparse(kept: SparseSpec, rest: Tensor) -> Sparse:
        if found is None:
            wanted = _entries(config, rest, inputs, kept)
        else:  # values that were found beside the low-rank part know nothing of its rounding
            values = refit(rest, inputs, found.support, found.values, damping=config.damping)
            wanted = Pruned(values, found.support)
        return store_pruned(rest, wanted, kept, inputs, sweeps=config.sweeps, damping=config.damping)

    factor = stored_sum(spec, weight, inputs, (left, right), sparse)
    message = f"rank {rank}, {entries / weight.numel():.1%} of the entries"
    return factor, direct_report(message, weight, factor, gram, time.perf_counter() - start)


def _low_rank(
    config: LowRankSparseConfig, weight: Tensor, gram: Tensor, rank: int, entries: int
) -> tuple[Tensor, Tensor, Pruned | None]:
    """Left (out, r) and right factor (r, in), and the entries where they were searched together with these.

    In one pass they are not: the low-rank part is then the start of the search, and the pass is over what it leaves, so that
    one pass with ranks loses as much against a search as one without.
    """
    if not rank:
        return weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1]), None
    damped = gram.clone()
    damped.diagonal().add_(config.damping * gram.diagonal().mean())
    if config.support != "search":
        begun = low_rank_sparse(
            weight, damped, rank, entries, by_row=False, rounds=0, refits=0, start_rounds=_SKETCH_ROUNDS
        )
        return begun.left, begun.right, None
    found = low_rank_sparse(weight, damped, rank, entries, by_row=False, rounds=config.rounds)
    return found.left, found.right, Pruned(found.sparse, found.support)


def _entries(config: LowRankSparseConfig, rest: Tensor, gram: Tensor, spec: SparseSpec) -> Pruned:
    if config.support == "surgeon":
        return surgeon(rest, gram, spec.nonzeros, damping=config.damping)
    if config.support == "one-pass":
        return prune_rounding(rest, spec, gram, damping=config.damping)
    return prune(rest, gram, spec.nonzeros, rounds=config.rounds, damping=config.damping)


def _low_rank_bits(bits: ValueBits) -> ValueBits:
    """A rank-one part is in every entry: rounding it is no matter of a few."""
    return bits if bits > 8 else 8


def _lost(spec: FactorSpec, bits: ValueBits) -> float:
    """The share of the energy of normally distributed weights that is lost where so many entries are kept, in so many bits.

    What is dropped is ``erf(t) - 2 t exp(-t^2) / sqrt(pi)`` of the energy, with ``erf(t)`` the share that is dropped; rounding
    to b bits over six deviations loses some ``3 / 4^b`` of what is kept.
    """
    dropped = min(1 - sizes(spec)[1] / (spec.rows * spec.cols), 1 - 1e-9)
    t = float(torch.erfinv(torch.tensor(dropped, dtype=torch.float64)))
    energy = dropped - 2 * t * math.exp(-t * t) / math.sqrt(math.pi)
    return _REFITTED * energy + 3 * 4.0**-bits
