"""CoSpaDi: a dense dictionary times column-sparse coefficients, fitted in the metric of the Gram (arXiv 2509.22075).

The paper's ``W (in x out) ~ D S`` is ``W (out, in) ~ S^T D^T`` here: the sparse leaf is ``S^T (out x k)`` with `s` non-zeros
a row, the dense one ``D^T (k x in)``. The fit is an ordinary dictionary learning problem on ``W L^T``; ``D^T = D_L^T L^-T``
brings the dictionary back (the paper's "Gram orthonormalisation").
"""

import math
import time
from typing import Literal, TypedDict

import torch
from pydantic import Field
from torch import Tensor

from lexigram.factors import Bfloat, DenseSpec, Product, ProductSpec, SparseSpec, encode
from lexigram.factors.bits import packed_bytes
from lexigram.gram import Gram
from lexigram.linalg.dictionary_learning import (
    HTP,
    ITERATIONS,
    KSVD,
    MOD,
    OMP,
    TOLERANCE,
    Coding,
    Start,
    Update,
    learn_dictionary,
)
from lexigram.linalg.dictionary_update import POWER_ITERATIONS, mod
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
)

_RHO_SLACK = 0.03  # how far k/s may move from rho to fill a budget of bytes, besides one step of s


class SolverParts(TypedDict):
    """The exchangeable parts of `learn_dictionary`."""

    coding: Coding
    update: Update
    start: Start
    accelerate: bool
    iterations: int
    tolerance: float


class CospadiConfig(MethodConfig):
    """The parts of the solver and the form. The defaults are the preset `fast`; see `PRESETS`.

    `rho` is k/s. `coefficient_bits` below 16 drops the lowest mantissa bits of every coefficient: 14 is the paper's
    quantisation, 12 spends the same bytes better (measured: `results/`). `accelerate` extrapolates both factors along their
    last change. `tolerance` stops when an outer iteration improves the squared error by a smaller share.
    """

    name: Literal["cospadi"] = "cospadi"
    rho: float = Field(default=2.0, ge=1.0)
    coefficient_bits: Literal[10, 12, 14, 16] = 12
    coding: Literal["htp", "omp"] = "htp"
    htp_rounds: int = Field(default=HTP().rounds, ge=1)
    cg_steps: int = Field(default=HTP().cg_steps, ge=1)
    update: Literal["mod", "ksvd", "ksvd-exact"] = "mod"
    power_iterations: int = Field(default=POWER_ITERATIONS, ge=1)
    start: Start = "svd"
    accelerate: bool = True
    iterations: int = Field(default=ITERATIONS, ge=1)
    tolerance: float = Field(default=TOLERANCE, ge=0)
    plain: bool = False


PRESETS: dict[str, CospadiConfig] = {
    "fast": CospadiConfig(),
    "published": CospadiConfig(
        coefficient_bits=14,
        coding="omp",
        update="ksvd",
        start="columns",
        accelerate=False,
        iterations=60,
        tolerance=0.0,
    ),
}
"""`published` is the paper's solver (its tolerance is open; 0 runs all 60 iterations), `fast` the one chosen by measurement."""


@layout.register
def _(config: CospadiConfig, shape: tuple[int, int], budget: Budget) -> ProductSpec:
    """For parameters the paper's formula: ``k = K / (in + out / rho)``, ``s = k / rho``, both rounded down, 14-bit
    coefficients. For bytes the same with the mask's bits counted; then the pair with k/s close to rho that leaves the fewest
    bytes over.
    """
    out_features, in_features = shape
    if budget.unit == "parameters":
        atom = in_features + out_features / config.rho
        atoms = int(budget.amount / atom)
        if atoms < config.rho:
            raise BudgetTooSmallError(math.ceil(math.ceil(config.rho) * atom), budget)
        return _spec(shape, atoms, int(atoms / config.rho), 14)
    bits = config.coefficient_bits
    most = int(8 * budget.amount / (16 * in_features + out_features + bits * out_features / config.rho))
    fewest = max(1, int(most * (1 - _RHO_SLACK) - config.rho))
    best = None
    for atoms in (most, *range(int(most * (1 + _RHO_SLACK)) + 1, fewest - 1, -1)):
        left = budget.amount - packed_bytes(atoms * in_features, 16) - packed_bytes(atoms * out_features, 1)
        wanted = atoms / config.rho
        sparsity = min(8 * left // (bits * out_features), int((wanted + 1) / (1 - _RHO_SLACK)), atoms)
        if sparsity < max(1.0, (wanted - 1) / (1 + _RHO_SLACK)):
            continue
        spec = _spec(shape, atoms, sparsity, bits)
        if best is None or spec.bytes > best.bytes:
            best = spec
    if best is None:
        raise BudgetTooSmallError(_spec(shape, 1, 1, bits).bytes, budget)
    return best


@fit.register
def _(
    config: CospadiConfig, weight: Tensor, gram: Gram, spec: ProductSpec, generator: torch.Generator
) -> tuple[Product, FitReport]:
    start = time.perf_counter()
    weight = checked_weight(weight)
    whitening = plain_whitening(weight) if config.plain else gram.whitening
    signals = whitening.whiten(weight)
    outputs = gram.whitening.whiten(weight) if config.plain else signals
    assert isinstance(spec.left, SparseSpec)
    learned = learn_dictionary(
        signals,
        atoms=spec.left.cols,
        sparsity=spec.left.nonzeros // spec.left.rows,
        generator=generator,
        **solver(config),
    )
    coefficients = encode(learned.codes, spec.left)
    dictionary, ridge = _refitted(signals, coefficients.to_dense(), learned.dictionary)
    factors = Product(coefficients, encode(whitening.unwhiten(dictionary), spec.right))
    scale = float(signals.double().square().sum()) or 1.0
    last = learned.stop == "iterations"
    return factors, FitReport(
        status="iterations" if last else "converged",
        message=f"all {config.iterations} outer iterations used; more may still improve it"
        if last
        else f"the improvement fell below {config.tolerance:g} a step"
        if learned.stop == "tolerance"
        else "the dictionary represents the weight exactly",
        relative_error=relative_error(outputs, factors, gram.whitening),
        objective=[value / scale for value in learned.objective],
        iterations=learned.iterations,
        seconds=time.perf_counter() - start,
        gram_rank=gram.whitening.rank,
        gram_damping=gram.whitening.damping,
        details={"replaced_atoms": learned.replaced, "ridge": max(learned.ridge, ridge)},
    )


def _refitted(signals: Tensor, codes: Tensor, dictionary: Tensor) -> tuple[Tensor, float]:
    """The best dictionary for the codes as they were rounded: it takes up about k/n of the rounding error's energy."""
    return mod(codes, dictionary, torch.addmm(signals, codes, dictionary, alpha=-1.0))


def solver(config: CospadiConfig) -> SolverParts:
    """The parts that `config` names, as arguments of `learn_dictionary`."""
    power = config.power_iterations if config.update == "ksvd" else None
    return {
        "coding": OMP() if config.coding == "omp" else HTP(config.htp_rounds, config.cg_steps),
        "update": MOD() if config.update == "mod" else KSVD(power),
        "start": config.start,
        "accelerate": config.accelerate,
        "iterations": config.iterations,
        "tolerance": config.tolerance,
    }


def _spec(shape: tuple[int, int], atoms: int, sparsity: int, bits: Literal[10, 12, 14, 16]) -> ProductSpec:
    return ProductSpec(
        left=SparseSpec(rows=shape[0], cols=atoms, nonzeros=sparsity * shape[0], codec=Bfloat(bits=bits)),
        right=DenseSpec(rows=atoms, cols=shape[1]),
    )
