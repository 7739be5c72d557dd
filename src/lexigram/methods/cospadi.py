"""CoSpaDi: a dense dictionary times column-sparse coefficients, fitted in the metric of the Gram (arXiv 2509.22075).

The paper's ``W (in x out) ~ D S`` is ``W (out, in) ~ S^T D^T`` here: the sparse leaf is ``S^T (out x k)`` with `s` non-zeros
a row, the dense one ``D^T (k x in)``. The fit is an ordinary dictionary learning problem on ``W L^T``; ``D^T = D_L^T L^-T``
brings the dictionary back (the paper's "Gram orthonormalisation").
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lexigram.factors import (
    DenseSpec,
    Factor,
    GroupSpec,
    Product,
    ProductSpec,
    Shared,
    SharedSpec,
    SparseSpec,
    encode,
)
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
    Threshold,
)
from lexigram.linalg.dictionary_update import POWER_ITERATIONS
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
    relative_error,
    sketch,
)
from lexigram.methods.dictionary import DictionaryProblem, SolverParts
from lexigram.methods.storing import StoredBits, ValueBits, ValueGroup, codec, store_dense, store_sparse
from lexigram.shown import FORM, Shown

_RHO_SLACK = 0.03  # how far k/s may move from rho to fill a budget of bytes, besides one step of s


class CospadiConfig(MethodConfig):
    """The parts of the solver and the form. The defaults are the preset `fast`; see `PRESETS`.

    `rho` holds as long as k stays within the rank of the weight: beyond that the bytes go to s. Bits from 10 to 16 are the
    highest of a bfloat16 (14 is the paper's quantisation of coefficients), below that integers with a scale and a zero a
    group. `htp_rounds` and `cg_steps` are more where metrics differ: shared atoms are more coherent. `mod-exact` solves the
    dictionary step of two different metrics in closed form, `mod` by a few conjugate gradients. `tolerance` is of the squared
    error.
    """

    name: Literal["cospadi"] = "cospadi"
    rho: float = Field(default=3.0, ge=1.0, description="k/s: atoms over non-zeros a column.")
    value_bits: StoredBits = 8
    dictionary_bits: Annotated[ValueBits, Shown(FORM)] = Field(
        default=6, description="Stored bits of a dictionary's entry."
    )
    value_group: ValueGroup = 128
    metric: Annotated[Literal["exact", "mean"], Shown(FORM)] = Field(
        default="exact", description="Of a shared dictionary: every layer its own, or the mean, as published."
    )
    coding: Literal["htp", "omp", "threshold"] = Field(default="htp", description="How coefficients are found.")
    htp_rounds: Annotated[int | None, Shown(none="1, or 2 where metrics differ")] = Field(
        default=None, ge=1, description="Rounds of `htp` in an outer iteration."
    )
    cg_steps: Annotated[int | None, Shown(none="2, or 4 where metrics differ")] = Field(
        default=None, ge=1, description="Conjugate gradient steps in a round of `htp`."
    )
    update: Literal["mod", "mod-exact", "ksvd", "ksvd-exact"] = Field(
        default="mod", description="How the dictionary is updated."
    )
    power_iterations: int = Field(default=POWER_ITERATIONS, ge=1, description="Power iterations for an atom of `ksvd`.")
    start: Start = Field(default="svd", description="The first dictionary.")
    accelerate: bool = Field(default=True, description="Extrapolate both factors along their last change.")
    iterations: int = Field(default=ITERATIONS, ge=1, description="Outer iterations at most.")
    tolerance: float = Field(default=TOLERANCE, ge=0, description="Stop below this relative improvement.")
    plain: Plain = False


PRESETS: dict[str, CospadiConfig] = {
    "fast": CospadiConfig(),
    "published": CospadiConfig(
        rho=2.0,
        value_bits=14,
        dictionary_bits=16,
        metric="mean",
        coding="omp",
        update="ksvd",
        start="columns",
        accelerate=False,
        iterations=60,
        tolerance=0.0,
    ),
    "one-shot": CospadiConfig(coding="threshold", accelerate=False, iterations=1),
}
"""`published` is the paper's solver (its tolerance is open; 0 runs all 60 iterations), `fast` the one chosen by measurement,
`one-shot` the start of ROCKET (arXiv 2602.11008): eigenvectors, the most important coefficients, one least-squares solve."""


@layout.register
def _(config: CospadiConfig, shape: tuple[int, int], budget: Budget) -> ProductSpec:
    """For parameters the paper's formula: ``k = K / (in + out / rho)``, ``s = k / rho``, both rounded down, 14-bit
    coefficients. For bytes the same with masks and scales counted; then the pair with k/s close to rho that leaves the fewest
    bytes over.
    """
    (spec,) = _largest(config, [shape], budget).members
    assert isinstance(spec, ProductSpec)
    return spec


@layout_shared.register
def _(config: CospadiConfig, shapes: Sequence[tuple[int, int]], budget: Budget, name: str) -> GroupSpec:
    """As for one matrix with the outputs of all: ``k = K / (in + sum out / rho)``."""
    return _largest(config, shapes, budget, name)


@fit.register
def _(
    config: CospadiConfig, weight: Tensor, gram: Gram, spec: ProductSpec, generator: torch.Generator
) -> tuple[Product, FitReport]:
    left, right = factored(spec, SparseSpec, DenseSpec)
    dictionary, ((codes, report),) = _fitted(config, [Member(weight, gram)], [left], right, generator)
    return Product(codes, dictionary), report


@fit_shared.register
def _(config: CospadiConfig, members: Sequence[Member], spec: GroupSpec, generator: torch.Generator) -> Fitted:
    assert isinstance(spec.shared, DenseSpec)
    sides = [factored(member, SparseSpec, SharedSpec) for member in spec.members]
    dictionary, parts = _fitted(config, members, [left for left, _ in sides], spec.shared, generator)
    return Fitted(
        [
            (Product(codes, Shared(reference, dictionary)), report)
            for (codes, report), (_, reference) in zip(parts, sides, strict=True)
        ],
        dictionary,
    )


@sketch.register
def _(config: CospadiConfig) -> CospadiConfig:
    """Two outer iterations: what they leave over the rest is about the same share at every size."""
    return config.model_copy(update={"iterations": min(2, config.iterations), "tolerance": 0.0})


def _fitted(
    config: CospadiConfig,
    members: Sequence[Member],
    lefts: Sequence[SparseSpec],
    right: DenseSpec,
    generator: torch.Generator,
) -> tuple[Factor, list[tuple[Factor, FitReport]]]:
    """The stored dictionary of all members, and each one's stored coefficients."""
    start = time.perf_counter()
    weights = [checked_weight(member.weight) for member in members]
    grams = [member.gram for member in members]
    problem = DictionaryProblem.of(weights, grams, "plain" if config.plain else config.metric)
    parts = solver(config, problem.inverse, metrics=len(problem.metrics))
    learned = problem.learned(parts, right.rows, lefts[0].nonzeros // lefts[0].rows, generator)
    codes, atoms = list(learned.codes), learned.dictionary
    dictionary: Factor | None = None
    if right.codec.bits < 16:
        dictionary = store_dense(atoms, right, problem.gram)
        atoms = dictionary.to_dense()
        codes = problem.recoded(codes, atoms)
    stored = [
        store_sparse(part, left, partial(problem.atom_gram, block, atoms))
        for (block, part), left in zip(problem.by_member(codes), lefts, strict=True)
    ]
    ridge = learned.ridge
    if dictionary is None:
        # The best dictionary for the codes as they were rounded takes up a part of the rounding error's energy.
        atoms, damped = problem.refitted(problem.by_block([part.to_dense() for part in stored]), atoms)
        dictionary, ridge = encode(atoms, right), max(ridge, damped)
    scale = problem.energy or 1.0
    last = learned.stop == "iterations"
    seconds = time.perf_counter() - start
    return dictionary, [
        (
            part,
            FitReport(
                status="iterations" if last else "converged",
                message=f"all {config.iterations} outer iterations used; more may still improve it"
                if last
                else f"the improvement fell below {config.tolerance:g} a step"
                if learned.stop == "tolerance"
                else "the dictionary represents the weight exactly",
                relative_error=relative_error(
                    member.gram.whitening.whiten(weight), Product(part, dictionary), member.gram.whitening
                ),
                objective=[value / scale for value in learned.objective],
                iterations=learned.iterations,
                seconds=seconds / len(members),
                gram_rank=member.gram.whitening.rank,
                gram_damping=member.gram.whitening.damping,
                details={"replaced_atoms": learned.replaced, "ridge": ridge},
            ),
        )
        for part, weight, member in zip(stored, weights, members, strict=True)
    ]


def solver(config: CospadiConfig, inverse: Tensor | None = None, *, metrics: int = 1) -> SolverParts:
    """The parts that `config` names, as arguments of `learn_dictionary`.

    Args:
        config: names them.
        inverse: ``L^-1`` of the metric, by which `threshold` weighs the atoms.
        metrics: how many different ones the dictionary is for.
    """
    usual = HTP() if metrics == 1 else HTP(rounds=2, cg_steps=4)
    coding: Coding = HTP(config.htp_rounds or usual.rounds, config.cg_steps or usual.cg_steps)
    if config.coding == "omp":
        coding = OMP()
    elif config.coding == "threshold":
        coding = Threshold(inverse=inverse)
    power = config.power_iterations if config.update == "ksvd" else None
    return {
        "coding": coding,
        "update": MOD(exact=config.update == "mod-exact") if config.update.startswith("mod") else KSVD(power),
        "start": config.start,
        "accelerate": config.accelerate,
        "iterations": config.iterations,
        "tolerance": config.tolerance,
    }


def _largest(
    config: CospadiConfig, shapes: Sequence[tuple[int, int]], budget: Budget, name: str | None = None
) -> GroupSpec:
    rows, cols = sum(rows for rows, _ in shapes), shapes[0][1]
    if budget.unit == "parameters":
        atom = cols + rows / config.rho
        atoms = int(budget.amount / atom)
        if atoms < config.rho:
            raise BudgetTooSmallError(math.ceil(math.ceil(config.rho) * atom), budget)
        config = config.model_copy(update={"value_bits": 14, "dictionary_bits": 16})
        return _spec(config, shapes, atoms, int(atoms / config.rho), name)
    value = codec(config.value_bits, config.value_group).bits_per_value
    entry = codec(config.dictionary_bits, config.value_group, cols).bits_per_value
    rank = min(rows, cols)
    most = int(8 * budget.amount / (entry * cols + rows + value * rows / config.rho))
    beyond, most = most > rank, min(most, rank)
    fewest = max(1, int(most * (1 - _RHO_SLACK) - config.rho))
    best = None
    for atoms in (most, *range(min(rank, int(most * (1 + _RHO_SLACK)) + 1), fewest - 1, -1)):
        if atoms < 1:
            continue
        left = budget.amount - _spec(config, shapes, atoms, 0, name).bytes
        wanted = atoms / config.rho
        highest = atoms if beyond else min(atoms, int((wanted + 1) / (1 - _RHO_SLACK)))
        least = max(1, math.ceil((wanted - 1) / (1 + _RHO_SLACK)))
        sparsity = min(int(8 * left / (value * rows)), highest)
        while sparsity >= least and _spec(config, shapes, atoms, sparsity, name).bytes > budget.amount:
            sparsity -= 1  # a scale or a padded byte more than the average says
        spec = _spec(config, shapes, atoms, max(sparsity, least), name)
        if spec.bytes <= budget.amount and (best is None or spec.bytes > best.bytes):
            best = spec
        if beyond and best is not None:
            break  # as many atoms as are of use, and the rest for s
    if best is None:
        raise BudgetTooSmallError(_spec(config, shapes, 1, 1, name).bytes, budget)
    return best


def _spec(
    config: CospadiConfig, shapes: Sequence[tuple[int, int]], atoms: int, sparsity: int, name: str | None
) -> GroupSpec:
    cols = shapes[0][1]
    values = codec(config.value_bits, config.value_group)
    shared = DenseSpec(rows=atoms, cols=cols, codec=codec(config.dictionary_bits, config.value_group, cols))
    right = SharedSpec(name=name, rows=atoms, cols=cols) if name else shared
    lefts = [SparseSpec(rows=rows, cols=atoms, nonzeros=sparsity * rows, codec=values) for rows, _ in shapes]
    return GroupSpec(
        members=tuple(ProductSpec(left=left, right=right) for left in lefts), shared=shared if name else None
    )
