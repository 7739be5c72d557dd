"""Both factors sparse: a sparse dictionary times sparse coefficients, in the metric of the calibration Gram.

``W ~ C D`` with ``C (out, k)`` and ``D (k, in)`` is found by proximal alternating linearised minimisation of
``||X W^T - X (C D)^T||^2 + R(C) + R(D)`` (`lexigram.linalg.palm`), for ratios at which no more than a bit or two is left of a
weight. It begins as low rank does; as most of what two dense factors of a greater rank hold can be dropped, more ranks fit into
the same bytes. Of layers of a real model, 40 to 50 % kept on both sides lose least, from .9 to .99 removed. Atoms that are
sparse over a fixed fast transform of the inputs instead are no better anywhere (`benchmarks/fixed_base.py`).
"""

import time
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lexigram.factors import Product, ProductSpec, SparseSpec
from lexigram.gram import Gram
from lexigram.linalg.palm import (
    ITERATIONS,
    L0,
    L1,
    REFITS,
    TIGHTENING,
    TOLERANCE,
    Fitting,
    Kind,
    Penalty,
    SparseProduct,
    balanced,
    sparse_product,
)
from lexigram.linalg.pruning import refit
from lexigram.linalg.surgeon import Pruned
from lexigram.linalg.whitening import whiten
from lexigram.methods.base import (
    Budget,
    BudgetTooSmallError,
    FitReport,
    MethodConfig,
    checked_weight,
    factored,
    fit,
    layout,
    metric,
    relative_error,
    size,
    sketch,
    variants,
)
from lexigram.methods.storing import BITS, Damping, ValueBits, ValueGroup, codec, store_pruned
from lexigram.shown import FORM, Shown

_BITS: tuple[tuple[float, tuple[ValueBits, ValueBits]], ...] = (
    (2.5, (4, 3)),
    (5.5, (4, 4)),
    (7.0, (6, 4)),
    (9.5, (6, 6)),
    (12.0, (8, 6)),
    (float("inf"), (16, 16)),
)
"""Stored bits of a coefficient and of a dictionary's entry up to so many bits a weight.

Relative errors of a query and a gate projection of a real model at equal bytes, in 4 and 3, 4 and 4, 6 and 4, 6 and 6, 8 and 6
bits:

| bits a weight | 4, 3 | 4, 4 | 6, 4 | 6, 6 | 8, 6 |
|---|---|---|---|---|---|
| 1.6 | .165 .313 | .167 | | | |
| 4.8 | | .069 .082 | .063 .110 | .067 .124 | |
| 6.4 | | .054 .072 | .041 .044 | .041 .045 | .049 .085 |
| 8 | | .052 .071 | | .021 .019 | .029 .031 |
| 11.2 | | .070 .071 | .017 .018 | .013 .018 | .008 .006 |

A dictionary's rounding is carried on in the metric of correlated inputs; atoms are hardly correlated.
"""
_OFFERED: tuple[tuple[ValueBits, ValueBits], ...] = ((4, 3), (6, 4), (8, 6))
_SHARE = 0.3
"""Of an atom's importance that its coefficients carry while they are rounded, the rest in the dictionary.

Coefficients of several atoms share a scale. Relative errors of a query projection at .9 removed by this share, 0 / .3 / .5 /
.7 / 1: .175 / .167 / .170 / .184 / .229.
"""
_RIDGE = 1e-7
"""Share of the mean diagonal that is added to the atoms' Gram, whose atoms may be none."""


class DoubleSparseConfig(MethodConfig):
    """Form and solver.

    `density` holds as long as k stays within the rank of the weight: beyond that the bytes go into more entries. Without prices
    the thresholds are those that leave as many entries as there is room for: by `l0` on both sides in proportion to their
    places; by `l1` the least price, the same for both, at which what stays fits, found by bisection. With `code_penalty` or
    `dictionary_penalty` an entry is kept where it is worth its price, and the budget is a cap: the result may weigh less than
    was asked for, never more. Prices are in units of the relative squared error: by `l0` of a stored entry, by `l1` of its
    size, in coordinates where outputs and inputs have a mean square of one, each over the number of weights.
    """

    name: Literal["double-sparse"] = "double-sparse"
    density: Annotated[float, Shown(FORM)] = Field(
        default=0.4,
        gt=0,
        le=1,
        description="Share of the entries that is stored, of coefficients and dictionary alike.",
    )
    value_bits: Annotated[ValueBits | None, Shown(FORM, none="as the ratio allows")] = Field(
        default=None, description=BITS
    )
    dictionary_bits: Annotated[ValueBits | None, Shown(FORM, none="as the ratio allows")] = Field(
        default=None, description="Stored bits of a dictionary's entry."
    )
    value_group: ValueGroup = 128
    penalty: Kind = Field(
        default="l0",
        description="What is penalised: the number of entries, or their sizes; l1 takes many more iterations.",
    )
    code_penalty: float = Field(default=0.0, ge=0, description="Price of a coefficient; 0 leaves it to the budget.")
    dictionary_penalty: float = Field(
        default=0.0, ge=0, description="Price of a dictionary's entry; 0 leaves it to the budget."
    )
    tightening: int = Field(
        default=TIGHTENING, ge=0, description="Sizes on the way from all entries to the final ones."
    )
    iterations: int = Field(default=ITERATIONS, ge=1, description="Outer iterations at most.")
    refits: int = Field(default=REFITS, ge=1, description="Of coefficients and dictionary in turns on their supports.")
    inertia: bool = Field(default=False, description="Begin the steps beyond the present point.")
    tolerance: float = Field(default=TOLERANCE, ge=0, description="Stop below this relative improvement.")
    damping: Damping = 1e-3

    @model_validator(mode="after")
    def _bounded(self) -> "DoubleSparseConfig":
        if self.penalty == "l1" and (self.code_penalty > 0) != (self.dictionary_penalty > 0):
            raise ValueError(
                "sizes of one side alone have no price, as the other takes them on; give both penalties or none"
            )
        return self


@layout.register
def _(config: DoubleSparseConfig, shape: tuple[int, int], budget: Budget) -> ProductSpec:
    """The most atoms with `density` on both sides that fit, up to the rank, and as many entries as there is room for.

    Few values may cost more in integers, with their scale, than in bfloat16: the usual bits, or others that fit.
    """
    too_small: list[BudgetTooSmallError] = []
    for bits in _ranked_bits(config, shape, budget):
        try:
            return _largest(shape, budget, config.density, bits, config.value_group)
        except BudgetTooSmallError as error:
            too_small.append(error)
    raise min(too_small, key=lambda error: error.needed)


@variants.register
def _(config: DoubleSparseConfig) -> list[MethodConfig]:
    """Values of few, some and many bits, where none are told."""
    if config.value_bits is not None or config.dictionary_bits is not None:
        return [config]
    return [config.model_copy(update={"value_bits": code, "dictionary_bits": entry}) for code, entry in _OFFERED]


@sketch.register
def _(config: DoubleSparseConfig) -> DoubleSparseConfig:
    """Few sizes on the way, one iteration there."""
    effort = {"tightening": min(3, config.tightening), "iterations": 1, "refits": 1}
    return config.model_copy(update=effort)


@fit.register
def _(
    config: DoubleSparseConfig, weight: Tensor, gram: Gram, spec: ProductSpec, generator: torch.Generator
) -> tuple[Product, FitReport]:
    start = time.perf_counter()
    left, right = factored(spec, SparseSpec, SparseSpec)
    weight = checked_weight(weight).contiguous()
    inputs = _damped(metric(gram), config.damping)
    scale = inputs.diagonal().sqrt()
    whitening = whiten(inputs / scale / scale[:, None])
    signals = whitening.whiten(weight * scale)
    energy = float(signals.square().sum(dtype=torch.float64))
    unit = (energy / signals.numel()) ** 0.5 or 1.0
    found = sparse_product(
        signals / unit,
        whitening,
        left.cols,
        left.nonzeros,
        right.nonzeros,
        penalties=_penalties(config, left, right),
        iterations=config.iterations,
        tightening=config.tightening,
        refits=config.refits,
        inertia=config.inertia,
        tolerance=config.tolerance,
    )
    codes, dictionary = unit * found.codes, (found.dictionary / scale).to(weight.dtype)
    left = _holding(left, int(found.code_support.sum()))
    right = _holding(right, int(found.dictionary_support.sum()))
    codes, dictionary = balanced(codes, dictionary, inputs, _SHARE)
    factor = _stored(
        weight,
        inputs,
        (Pruned(codes, found.code_support), left),
        (Pruned(dictionary, found.dictionary_support), right),
    )
    last = found.stop == "iterations"
    own = gram.whitening
    return factor, FitReport(
        status="iterations" if last else "converged",
        message=f"all {config.iterations} iterations used at the final sizes; more may still improve it"
        if last
        else f"the improvement fell below {config.tolerance:g} a step",
        relative_error=relative_error(own.whiten(weight), factor, own),
        objective=[value / signals.numel() for value in found.history],
        iterations=len(found.history),
        seconds=time.perf_counter() - start,
        gram_rank=own.rank,
        gram_damping=own.damping,
        details={"code_entries": left.nonzeros, "dictionary_entries": right.nonzeros, **_told(found, signals.numel())},
    )


def _told(found: SparseProduct, size: int) -> dict[str, float]:
    """How the minimisation under penalties went, where there was one; objectives and the weight in the units of prices."""
    if not found.penalised:
        return {}
    told = {
        "penalised_iterations": float(len(found.penalised)),
        "penalised_objective": found.penalised[-1] / size,
        "penalised_converged": float(found.penalised_stop == "tolerance"),
    }
    return told if found.weight is None else {**told, "price": found.weight}


def _stored(
    weight: Tensor, gram: Tensor, codes: tuple[Pruned, SparseSpec], dictionary: tuple[Pruned, SparseSpec]
) -> Product:
    """The dictionary first; then the coefficients, refitted to it as it is stored."""
    entries, right = dictionary
    atoms = store_pruned(entries.values, entries, right, gram)
    seen = atoms.to_dense(torch.float64)
    wanted = seen @ gram
    products = wanted @ seen.T
    products.diagonal().add_(_RIDGE * products.diagonal().mean() or 1.0)
    best = torch.linalg.solve(products, wanted @ weight.double().T).T.to(weight.dtype)
    coefficients, left = codes
    values = refit(best, products, coefficients.support, coefficients.values)
    pruned = Pruned(values, coefficients.support)
    return Product(store_pruned(best, pruned, left, products, damping=0.0), atoms)


def _holding(spec: SparseSpec, count: int) -> SparseSpec:
    """The leaf of a form that has room for so many entries: where penalties kept others, the lightest that holds them."""
    return spec if count == spec.nonzeros else SparseSpec.lightest(spec.rows, spec.cols, count, spec.codec)


def _damped(gram: Tensor, damping: float) -> Tensor:
    """The Gram with `damping` of its mean diagonal, and of an input that never occurs any positive one."""
    gram = gram.clone()
    energy = gram.diagonal()
    energy.add_(damping * energy.mean())
    energy.clamp_min_(torch.finfo(gram.dtype).eps * float(energy.mean()))
    return gram


def _penalties(
    config: DoubleSparseConfig, left: SparseSpec, right: SparseSpec
) -> tuple[Penalty, Penalty] | Fitting | None:
    """Those that have a price; without one, by sizes, that of which `left` and `right` have room for the entries."""
    prices = config.code_penalty, config.dictionary_penalty

    def room(codes: int, entries: int) -> float:
        needed = sum(_holding(leaf, count).bytes for leaf, count in ((left, codes), (right, entries)))
        return needed / (left.bytes + right.bytes)

    if not any(prices):
        return Fitting(L1, room) if config.penalty == "l1" else None
    kind: Callable[[float], Penalty] = L1 if config.penalty == "l1" else L0
    return kind(prices[0]), kind(prices[1])


def _ranked_bits(
    config: DoubleSparseConfig, shape: tuple[int, int], budget: Budget
) -> list[tuple[ValueBits, ValueBits]]:
    """Of a coefficient and of a dictionary's entry; those first that are usual at so many bits a weight."""
    a_weight = 8 * budget.amount / (shape[0] * shape[1])
    usual = next(number for number, (limit, _) in enumerate(_BITS) if a_weight < limit)
    if budget.unit == "parameters":  # of any bits they cost the same
        usual = len(_BITS) - 1
    ranked = [_BITS[usual], *_BITS[:usual], *_BITS[usual + 1 :]]
    return [(config.value_bits or code, config.dictionary_bits or entry) for _, (code, entry) in ranked]


class _Sizes(NamedTuple):
    """Atoms, and entries of both sides together."""

    atoms: int
    entries: int


@lru_cache(maxsize=4096)  # layers of one shape are asked for at the same ratios
def _largest(
    shape: tuple[int, int], budget: Budget, density: float, bits: tuple[ValueBits, ValueBits], group: int
) -> ProductSpec:
    rows, cols = shape

    def needed(sizes: _Sizes) -> int:
        return size(_spec(shape, sizes, bits, group), budget.unit)

    def dense_as_wanted(atoms: int) -> _Sizes:
        return _Sizes(atoms, max(2, round(density * atoms * (rows + cols))))

    rank = min(shape)
    atoms = bisect_right(range(1, rank + 1), budget.amount, key=lambda count: needed(dense_as_wanted(count)))
    atoms = max(1, atoms)
    counts = range(2, atoms * (rows + cols) + 1)
    fitting = bisect_right(counts, budget.amount, key=lambda count: needed(_Sizes(atoms, count)))
    if not fitting:
        raise BudgetTooSmallError(needed(_Sizes(1, 2)), budget)
    return _spec(shape, _Sizes(atoms, counts[fitting - 1]), bits, group)


def _spec(shape: tuple[int, int], sizes: _Sizes, bits: tuple[ValueBits, ValueBits], group: int) -> ProductSpec:
    """Entries in proportion to the rows and columns, one at least on each side."""
    rows, cols = shape
    codes = max(1, sizes.entries * rows // (rows + cols))
    return ProductSpec(
        left=SparseSpec.lightest(rows, sizes.atoms, codes, codec(bits[0], group)),
        right=SparseSpec.lightest(sizes.atoms, cols, sizes.entries - codes, codec(bits[1], group)),
    )
