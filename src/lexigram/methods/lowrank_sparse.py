"""Low rank plus sparse in the metric of the Gram, with values in few bits: what CAP (arXiv 2505.03801) leaves on the table.

The support is searched with the values (alternating directions, `lexigram.linalg.pruning`), or in turns with a low-rank part
(`lexigram.linalg.low_rank_sparse`); values of few bits are improved together with their scales (`lexigram.linalg.integers`).
How large each part is, in how many bits, or whether a weight is better off with neither, is for an allocation to choose:
`variants` offers the forms.
"""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from lexigram.factors import Factor, FactorSpec, Sparse, SparseSpec
from lexigram.factors.indices import INDICES, index_prices
from lexigram.gram import Gram
from lexigram.linalg.integers import ROUNDS as SWEEPS
from lexigram.linalg.low_rank_sparse import low_rank_sparse
from lexigram.linalg.pruning import ROUNDS, prune, refit
from lexigram.linalg.ranking import Kept, Limit, input_prices, ranked
from lexigram.linalg.rounding import DAMPING
from lexigram.linalg.surgeon import Pruned, surgeon
from lexigram.methods.base import (
    Budget,
    BudgetTooSmallError,
    Estimate,
    FitReport,
    MethodConfig,
    checked_weight,
    direct_report,
    estimates,
    fit,
    layout,
    metric,
    sketch,
    useful,
    variants,
)
from lexigram.methods.quantize import QuantizeConfig, QuantizedBits
from lexigram.methods.storing import BITS, Damping, ValueBits, ValueGroup, codec, prune_rounding, store_pruned
from lexigram.methods.sums import largest_sum, sizes, stored_sum, sum_spec
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
_SEARCHED, _SEARCHED_BESIDE = 0.85, 0.6
"""What a search for entries alone, and for both parts, leaves of the error that a ranking of single parts tells.

Of three kinds of matrices in two layers of a real model, with 50 to 65 % of the entries: .72 to .96 in 8, 4 and 3 bits, and
beside ranks .4 to .5 in 4 and .58 to .73 in 3 bits. Whole matrices that are rounded in the metric of the Gram: .66 to .94.
"""
_REFITTED = 0.4
"""What is left of the energy of dropped entries once the others make up for it; of layers of a real model."""

Support = Literal["search", "surgeon", "one-pass"]


class LowRankSparseConfig(MethodConfig):
    """Form and effort.

    Without `value_bits` an allocation chooses them; where each layer has its own budget, what loses least of normally
    distributed weights. Without `rank_share` it chooses that too; where each layer has its own budget, there is no low-rank
    part. Low-rank factors have 8 bits or more. The allocation `global` takes what `rank_share` comes to, at the middle of the
    ratios, for the most ranks.

    One pass is over values of fewer than 8 bits; finer ones are not rounded in it. Its values are rounded once more where they
    get the scales that are stored, since these depend on the support.
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


@estimates.register
def _(config: LowRankSparseConfig, weight: Tensor, gram: Gram, amounts: Sequence[int]) -> list[Estimate]:
    """Singular values and entries of a weight are ranked by energy per stored bit, by each number of bits anew."""
    weight, inputs = checked_weight(weight), metric(gram)
    shape, dense = (weight.shape[0], weight.shape[1]), 2 * weight.numel()
    price = input_prices(inputs, damping=config.damping).float()
    whole = float(torch.linalg.vecdot(weight.double(), weight.double() @ inputs).sum()) or 1.0
    left, right = _pool(config, weight, inputs)
    beside = _energies(left, right, inputs).float()
    missed: dict[tuple[ValueBits, bool], Tensor] = {}
    found: list[Estimate] = []
    for variant in variants(config):
        assert isinstance(variant, LowRankSparseConfig | QuantizeConfig)
        bits = variant.value_bits or 16
        ranked_too = isinstance(variant, LowRankSparseConfig) and bool(variant.rank_share)
        rest, values = (weight - left @ right, beside) if ranked_too else (weight, beside[:0])
        if (bits, ranked_too) not in missed:
            missed[bits, ranked_too] = _missed(rest, inputs, variant)
        coarse = missed[bits, ranked_too]
        if isinstance(variant, QuantizeConfig):
            lost = float((coarse * price).sum(dtype=torch.float64))
            with suppress(BudgetTooSmallError):  # groups of few values may cost more than bfloat16
                found.append(Estimate(variant, layout(variant, shape, Budget(dense)), _SEARCHED * lost / whole))
            continue
        energy = rest.square()
        worth = (energy - coarse).clamp_min_(0.0).mul_(price)
        total = float((energy * price).sum(dtype=torch.float64) + values.sum(dtype=torch.float64))
        least, most = useful(variant)
        sought = [amount for amount in amounts if least <= 1 - amount / dense <= most]
        share = _SEARCHED_BESIDE if ranked_too else _SEARCHED
        for kept in _best(shape, variant, values, worth, sought):
            # Where no rank is kept the weight itself tells more than what ranks have left of it.
            if bool(kept.values) == ranked_too:
                fine = _low_rank_bits(bits)
                spec = sum_spec(shape, kept.values, kept.entries, bits, variant.value_group, low_rank_bits=fine)
                found.append(Estimate(variant, spec, share * max(0.0, total - kept.worth) / whole))
    return found


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


def _pool(config: LowRankSparseConfig, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """The low-rank part whose singular values are ranked: of the ranks that forms with one have in the middle of their use."""
    beside = [each for each in variants(config) if isinstance(each, LowRankSparseConfig) and each.rank_share]
    if not beside:
        return weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1])
    ratio, shape = sum(useful(beside[0])) / 2, (weight.shape[0], weight.shape[1])
    try:
        spec = layout(beside[0], shape, Budget(int((1 - ratio) * 2 * weight.numel())))
    except BudgetTooSmallError:
        return weight.new_zeros(shape[0], 0), weight.new_zeros(0, shape[1])
    left, right, _ = _low_rank(config.model_copy(update={"support": "surgeon"}), weight, gram, *sizes(spec))
    return left, right


def _energies(left: Tensor, right: Tensor, gram: Tensor) -> Tensor:
    """The squared singular values of the outputs of ``left (out, r) right (r, in)``, descending."""
    rows = right.double()
    values, vectors = torch.linalg.eigh(rows @ gram @ rows.T)
    signals = left.double() @ (vectors * values.clamp_min(0).sqrt())
    return torch.linalg.svdvals(signals).square()


def _missed(rest: Tensor, gram: Tensor, config: LowRankSparseConfig | QuantizeConfig) -> Tensor:
    """What entries lose, squared, by rounding each to the nearest value of a grid of its row."""
    bits = config.value_bits or 16
    stored, strength = codec(bits, config.value_group, rest.shape[1]), gram.diagonal()
    grid = stored.grid(rest, (strength + config.damping * strength.mean()).expand_as(rest))
    return (rest - stored.round(rest, grid)).square_()


def _best(
    shape: tuple[int, int], config: LowRankSparseConfig, values: Tensor, worth: Tensor, amounts: Sequence[int]
) -> list[Kept]:
    """The parts that stay within each number of bytes, by the index of the entries that leaves room for more of them."""
    bits = config.value_bits or 16
    column, row = (codec(_low_rank_bits(bits), config.value_group, width).bits_per_value for width in (None, shape[1]))
    entry = codec(bits, config.value_group).bits_per_value
    prices = [index_prices(index, *shape) for index in INDICES]
    limits = []
    for amount in amounts:
        each = [
            Limit(8.0 * (amount - fixed), column * shape[0] + row * shape[1], entry + more) for fixed, more in prices
        ]
        limits.append(max(each, key=lambda limit: limit.total / limit.entry))
    return [kept for kept in dict.fromkeys(ranked(values, worth, limits)) if kept.values or kept.entries]


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
