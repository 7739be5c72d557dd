"""Pruning: entries of the weight are dropped, the others stay, as they are or refitted. One sparse leaf, no factors.

`magnitude` keeps the largest entries, `wanda` the largest ``|W_ij| sqrt(G_jj)`` of every output (Sun et al., arXiv 2306.11695),
`sparsegpt` drops column after column and lets the columns to come make up for it (Frantar and Alistarh, arXiv 2301.00774).
`refit` moves what is kept to where the outputs stay closest.
"""

import re
import time
from bisect import bisect_right
from functools import singledispatch
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from lexigram.factors import Sparse, SparseSpec
from lexigram.gram import Gram
from lexigram.linalg.pruning import refit
from lexigram.linalg.rounding import DAMPING
from lexigram.linalg.support import ANYWHERE, Consecutive, Pattern, Rows, Tiles, wanda
from lexigram.linalg.surgeon import Pruned, settling_order, surgeon
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
    size,
    wrong_form,
)
from lexigram.methods.storing import Damping, Refit, StoredBits, ValueGroup, codec, store_pruned
from lexigram.shown import FORM, Shown

_PATTERN = re.compile(r"any|rows|(\d+):(\d+)|(\d+)x(\d+)")

PatternName = Annotated[
    str,
    Shown(FORM, metavar="any|rows|N:M|RxC"),
    Field(
        description="Where entries are kept: anywhere, equally many an output, N of every M inputs, or whole blocks."
    ),
]


class PruningConfig(MethodConfig):
    """What the ways of pruning have in common.

    A `pattern` is `any` (so many of the whole matrix), `rows` (equally many of every output), `N:M` (N of every M consecutive
    inputs of an output; this decides the size whatever the ratio) or `RxC` (whole blocks of R outputs x C inputs).
    """

    pattern: PatternName = "any"
    refit: Refit = False
    damping: Damping = DAMPING
    value_bits: StoredBits = 16
    value_group: ValueGroup = 128

    @field_validator("pattern")
    @classmethod
    def _known(cls, text: str) -> str:
        match = _PATTERN.fullmatch(text)
        numbers = [int(number) for number in match.groups() if number] if match else []
        if match is None or 0 in numbers or (":" in text and numbers[0] > numbers[1]):
            raise ValueError("write any, rows, N:M such as 2:4, or RxC such as 16x16")
        return text


class MagnitudeConfig(PruningConfig):
    """The largest entries."""

    name: Literal["magnitude"] = "magnitude"


class WandaConfig(PruningConfig):
    """The largest ``|W_ij| sqrt(G_jj)``; as published equally many of every output."""

    name: Literal["wanda"] = "wanda"
    pattern: PatternName = "rows"


class SparseGptConfig(PruningConfig):
    """Optimal brain surgeon, column after column; in blocks of `columns` as published."""

    name: Literal["sparsegpt"] = "sparsegpt"
    columns: int = Field(default=128, ge=1, description="How many inputs are chosen among at a time.")
    order: Literal["activation", "natural"] = Field(
        default="natural", description="Of the columns: the strongest inputs first, or as they stand."
    )


@layout.register
def _(config: PruningConfig, shape: tuple[int, int], budget: Budget) -> SparseSpec:
    return largest_sparse(config, shape, budget)


@fit.register
def _(
    config: PruningConfig, weight: Tensor, gram: Gram, spec: SparseSpec, generator: torch.Generator
) -> tuple[Sparse, FitReport]:
    start = time.perf_counter()
    if not isinstance(spec, SparseSpec):
        raise wrong_form(spec)
    weight = checked_weight(weight)
    inputs = metric(gram)
    pruned = chosen(config, weight, inputs, spec.nonzeros)
    if config.refit:
        values = refit(weight, inputs, pruned.support, pruned.values, damping=config.damping)
        pruned = Pruned(values, pruned.support)
    factors = store_pruned(weight, pruned, spec, inputs, damping=config.damping)
    message = f"{spec.nonzeros / weight.numel():.1%} kept{', refitted' if config.refit else ''}"
    return factors, direct_report(message, weight, factors, gram, time.perf_counter() - start)


@singledispatch
def chosen(config: PruningConfig, weight: Tensor, gram: Tensor, kept: int) -> Pruned:
    """The support of a weight (out, in) with `kept` entries, and the values there before any refit."""
    raise NotImplementedError(f"no choice is registered for {type(config).__name__}")


@chosen.register
def _(config: MagnitudeConfig, weight: Tensor, gram: Tensor, kept: int) -> Pruned:
    support = pattern_of(config).choose(weight.abs(), kept)
    return Pruned(weight * support, support)


@chosen.register
def _(config: WandaConfig, weight: Tensor, gram: Tensor, kept: int) -> Pruned:
    support = wanda(weight, gram, kept, pattern_of(config))
    return Pruned(weight * support, support)


@chosen.register
def _(config: SparseGptConfig, weight: Tensor, gram: Tensor, kept: int) -> Pruned:
    pattern = pattern_of(config)
    order = settling_order(gram, pattern) if config.order == "activation" else None
    return surgeon(weight, gram, kept, pattern=pattern, order=order, block=config.columns, damping=config.damping)


def pattern_of(config: PruningConfig) -> Pattern:
    """Where entries may be kept."""
    match = _PATTERN.fullmatch(config.pattern)
    assert match is not None
    keep, of, rows, cols = (int(number) if number else 0 for number in match.groups())
    if of:
        return Consecutive(keep, of)
    if rows:
        return Tiles(rows, cols)
    return Rows() if config.pattern == "rows" else ANYWHERE


def largest_sparse(config: PruningConfig, shape: tuple[int, int], budget: Budget) -> SparseSpec:
    """The leaf with the most entries within a budget that the pattern allows.

    Raises:
        BudgetTooSmallError: where not even the fewest fit.
        ValueError: where the shape does not fit the pattern.
    """
    pattern, values = pattern_of(config), codec(config.value_bits, config.value_group)
    block = (pattern.rows, pattern.cols) if isinstance(pattern, Tiles) else (1, 1)
    total = pattern.total(shape, None if pattern.fixed else 0)
    grain = pattern.grain(shape)
    counts = range(total, total + 1) if pattern.fixed else range(grain, shape[0] * shape[1] + 1, grain)

    def at(count: int) -> SparseSpec:
        return SparseSpec.lightest(shape[0], shape[1], count, values, block)

    fitting = bisect_right(counts, budget.amount, key=lambda count: size(at(count), budget.unit))
    if not fitting:
        raise BudgetTooSmallError(size(at(counts[0]), budget.unit), budget)
    return at(counts[fitting - 1])
