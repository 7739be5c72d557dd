"""Quantisation alone: every value of the weight as an integer of few bits, a scale and a zero a group of inputs.

`gptq` rounds column after column and lets the columns to come make up for the error in the metric of the Gram (Frantar et
al., arXiv 2210.17323; see `storing` for how we differ). `nearest` rounds every value by itself.
"""

import time
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lexigram.factors import Dense, DenseSpec, Integer, group_size
from lexigram.gram import Gram
from lexigram.linalg.rounding import DAMPING
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
    variants,
    wrong_form,
)
from lexigram.methods.storing import BITS, Damping, ValueGroup, store_dense
from lexigram.shown import FORM, Shown

QuantizedBits = Literal[2, 3, 4, 6, 8, 16]
_WIDTHS: tuple[QuantizedBits, ...] = (16, 8, 6, 4, 3, 2)


class QuantizeConfig(MethodConfig):
    """Integers of `value_bits` bits with one scale, and one zero unless `symmetric`, a `value_group` of inputs of an output.

    Without `value_bits` it is the most bits that the budget allows; 16 keeps bfloat16. A group is the largest divisor of the
    inputs that is not above `value_group`. The search of `clip` weighs errors by the strength of the inputs.
    """

    name: Literal["quantize"] = "quantize"
    value_bits: Annotated[QuantizedBits | None, Shown(FORM, none="as the ratio allows")] = Field(
        default=None, description=BITS
    )
    value_group: ValueGroup = 128
    symmetric: bool = Field(default=False, description="Store a scale a group and no zero.")
    rounding: Literal["gptq", "nearest"] = Field(default="gptq", description="How values are rounded.")
    order: Literal["activation", "natural"] = Field(
        default="activation", description="Of the columns for `gptq`: the strongest inputs first, or as they stand."
    )
    sweeps: int = Field(
        default=0, ge=0, description="Over values of few bits once they are rounded, each with a refit of their scales."
    )
    clip: bool = Field(default=True, description="Search how much of each group's range is worth representing.")
    damping: Damping = DAMPING


@layout.register
def _(config: QuantizeConfig, shape: tuple[int, int], budget: Budget) -> DenseSpec:
    """The sizes come in steps: the bits alone decide them."""
    widths = _WIDTHS if config.value_bits is None else (config.value_bits,)
    specs = [_spec(config, shape, bits) for bits in widths]
    sizes = [size(spec, budget.unit) for spec in specs]
    for spec, needed in zip(specs, sizes, strict=True):
        if needed <= budget.amount:
            return spec
    raise BudgetTooSmallError(min(sizes), budget)  # of a few values scales are dearer than 16 bits


@variants.register
def _(config: QuantizeConfig) -> list[MethodConfig]:
    """One for each number of bits."""
    if config.value_bits is not None:
        return [config]
    return [config.model_copy(update={"value_bits": bits}) for bits in _WIDTHS if bits < 16]


@fit.register
def _(
    config: QuantizeConfig, weight: Tensor, gram: Gram, spec: DenseSpec, generator: torch.Generator
) -> tuple[Dense, FitReport]:
    start = time.perf_counter()
    if not isinstance(spec, DenseSpec):
        raise wrong_form(spec)
    weight = checked_weight(weight)
    carry = config.rounding == "gptq" and spec.codec.bits < 16
    factors = store_dense(
        weight,
        spec,
        lambda: metric(gram),
        carry=carry,
        order=config.order,
        clip=config.clip,
        sweeps=config.sweeps,
        damping=config.damping,
    )
    message = f"{spec.codec.bits} bits, {f'errors carried in {config.order} order' if carry else 'rounded to nearest'}"
    details = {"damping": config.damping} if carry else {}
    return factors, direct_report(message, weight, factors, gram, time.perf_counter() - start, details)


def _spec(config: QuantizeConfig, shape: tuple[int, int], bits: QuantizedBits) -> DenseSpec:
    rows, cols = shape
    if bits == 16:
        return DenseSpec(rows=rows, cols=cols)
    codec = Integer(bits=bits, group=group_size(cols, config.value_group), symmetric=config.symmetric)
    return DenseSpec(rows=rows, cols=cols, codec=codec)
