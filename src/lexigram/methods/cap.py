"""CAP: robust PCA splits the plain weight into low rank and sparse; which parts stay is chosen over the whole model at once.

arXiv 2505.03801. Stage 1, `decompose`, is here, and so is `assemble`, which turns what was chosen into stored factors; stage 2,
the choice, is in `lexigram.choice`. What the paper leaves open is an option: the penalty of robust PCA and how it goes on
(`mu`, `growth`, `rise`, `relaxation`; as its authors' related code has it: `candes`, 1, any, 1), its stop, the start of the
probabilities, the loss, how many sequences and models a step of the policy gradient sees, what the unequal costs of candidates
mean for scores and for the projection. Kept values are used as they are, as published, unless `refit` moves them. What every
option does is measured in `results/README.md` (`benchmarks/cap_options.py`): ways of robust PCA differ by no more than seeds
do, so the soonest to converge is the default; of the policy gradient nothing is better than none.

A loss is one number for some 3e5 candidates, and two dozen of them rank none: on stories260K at ratio .5 perplexity is 104
without the policy gradient, 121 with it and 658 with `eps` 1e-8, as it adds noise, which the default `eps` keeps small. Values
of less than 8 bits are rounded in the metric of the Gram.
"""

import time
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lexigram.factors import Factor, FactorSpec, Sparse, SparseSpec
from lexigram.gram import Gram
from lexigram.linalg.budget import Projection
from lexigram.linalg.policy_gradient import EPS, LEARNING_RATE, MEMORY
from lexigram.linalg.pruning import refit
from lexigram.linalg.robust_pca import (
    GROWTH,
    ITERATIONS,
    RELAXATION,
    RISE,
    TOLERANCE,
    candes_penalty,
    robust_pca,
)
from lexigram.linalg.rounding import DAMPING
from lexigram.linalg.surgeon import Pruned
from lexigram.losses import LossName
from lexigram.methods.base import (
    Candidates,
    FitReport,
    MethodConfig,
    Trials,
    assemble,
    checked_weight,
    decompose,
    decomposition_key,
    direct_report,
    fit,
    metric,
    scores,
    trials,
)
from lexigram.methods.storing import Damping, Refit, StoredBits, ValueGroup, store_pruned
from lexigram.methods.sums import sizes, stored_sum
from lexigram.shown import Shown


class CapConfig(MethodConfig):
    """Robust PCA, the policy and the form."""

    allocation: ClassVar[str] = "global"

    name: Literal["cap"] = "cap"
    value_bits: StoredBits = 16
    value_group: ValueGroup = 128
    refit: Refit = False
    damping: Damping = DAMPING
    sparse_weight: Annotated[float | None, Shown(none="1 / sqrt(the longer side)")] = Field(
        default=None, gt=0, description="Lambda of robust PCA."
    )
    mu: Literal["mean", "candes"] = Field(
        default="mean",
        description="First penalty of robust PCA: cuts entries at their mean, or m n / (4 ||W||_1), Candes et al.",
    )
    growth: float = Field(default=GROWTH, ge=1, description="Of the penalty, an iteration; 1 keeps it.")
    rise: float = Field(default=RISE, ge=1, description="Where growth ends, in units of the first penalty.")
    relaxation: float = Field(default=RELAXATION, ge=1, lt=2, description="Over-relaxation of robust PCA; 1 is none.")
    iterations: int = Field(default=ITERATIONS, ge=1, description="Of robust PCA, at most.")
    tolerance: float = Field(default=TOLERANCE, gt=0, description="Share of the weight that robust PCA may miss.")
    score: Literal["magnitude", "energy", "wanda"] = Field(
        default="wanda", description="What a candidate's first probability is made of."
    )
    first: Literal["uniform", "random", "sigmoid", "largest"] = Field(
        default="sigmoid", description="How scores become first probabilities."
    )
    together: bool = Field(default=False, description="Level the scores over the whole model, not matrix by matrix.")
    per_bit: bool = Field(default=True, description="Compare scores over the whole model, as energy per stored bit.")
    passes: int = Field(
        default=3, ge=0, description="Of the policy gradient over the calibration text; 0 leaves it out."
    )
    objective: LossName = Field(
        default="tokens",
        description="What the policy gradient lowers: the loss of the next token, or the divergence from the original's "
        "predictions (`kl`).",
    )
    batch: int = Field(default=16, ge=1, description="Sequences a step of the policy gradient.")
    samples: int = Field(default=1, ge=1, description="Models drawn for a step of the policy gradient.")
    rate: float = Field(default=LEARNING_RATE, gt=0, description="Of the policy gradient.")
    memory: float = Field(default=MEMORY, ge=0, lt=1, description="Of the moving average of the loss.")
    eps: float = Field(default=EPS, gt=0, description="Added to s (1 - s) in the policy gradient.")
    projection: Projection = Field(
        default="weighted",
        description="Of the probabilities on the budget: each distance counted once, or by its cost.",
    )

    @property
    def power(self) -> int:
        """Of a part's size in its score: 1, or 2 where scores are energies."""
        return 2 if self.score == "energy" else 1


DECOMPOSING = "sparse_weight", "mu", "growth", "rise", "relaxation", "iterations", "tolerance"
"""The fields that `decompose` reads: parts of configs that agree in them are the same."""

_VERSION = 1
"""Of what `decompose` makes of a weight and these fields, and of the names of its tensors: a number for each."""


@trials.register
def _(config: CapConfig) -> Trials:
    return Trials(config.passes * config.samples * (2 if config.objective == "kl" else 1), config.samples)


@decomposition_key.register
def _(config: CapConfig) -> str:
    return f"cap {_VERSION} " + config.model_dump_json(include=set(DECOMPOSING))


@decompose.register
def _(config: CapConfig, weight: Tensor, gram: Gram) -> Candidates:
    """The paper's stage 1 knows no activations: `gram` is not used."""
    weight = checked_weight(weight)
    parts = robust_pca(
        weight,
        weight=config.sparse_weight,
        mu=candes_penalty(weight) if config.mu == "candes" and bool(weight.any()) else None,
        growth=config.growth,
        rise=config.rise,
        relaxation=config.relaxation,
        tolerance=config.tolerance,
        iterations=config.iterations,
    )
    support = parts.sparse != 0
    return Candidates(
        parts.left,
        parts.values,
        parts.right,
        parts.sparse[support],
        support,
        torch.tensor(parts.iterations),
        torch.tensor(parts.residual, dtype=torch.float64),
        torch.tensor(parts.stop == "tolerance"),
    )


@scores.register
def _(config: CapConfig, candidates: Candidates, gram: Gram) -> tuple[Tensor, Tensor]:
    """Of the singular values and of the entries: their size, its square, or their size at the outputs, inputs uncorrelated.

    Where they are compared over the whole model, sizes are those in a weight whose entries have a mean square of 1.
    """
    values, entries = candidates.values, candidates.entries.abs()
    weight = candidates.to_dense() if config.per_bit else None
    if config.score == "wanda":
        strength = metric(gram).diagonal().clamp_min(0).to(entries.dtype)
        # The energy of a rank-one part at the outputs: ``sigma^2 sum_j v_j^2 G_jj``.
        values = values * (candidates.right.square() @ strength).sqrt()
        entries = entries * strength.sqrt()[candidates.support.nonzero()[:, 1]]
        weight = None if weight is None else weight * strength.sqrt()
    if weight is not None and (mean := float(weight.square().mean().sqrt())):
        values, entries = values / mean, entries / mean
    return values**config.power, entries**config.power


@fit.register
def _(
    config: CapConfig, weight: Tensor, gram: Gram, spec: FactorSpec, generator: torch.Generator
) -> tuple[Factor, FitReport]:
    """For a form that is given, as in a replayed allocation: the best by their first scores."""
    candidates = decompose(config, weight, gram)
    found = scores(config, candidates, gram)
    wanted = sizes(spec)
    if any(count > len(each) for count, each in zip(wanted, found, strict=True)):
        raise ValueError(
            f"the form has rank {wanted[0]} and {wanted[1]} entries, and robust PCA finds {len(found[0])} and {len(found[1])}; "
            "make the allocation again"
        )
    masks = [torch.zeros_like(each, dtype=torch.bool) for each in found]
    for mask, each, count in zip(masks, found, wanted, strict=True):
        mask[each.topk(count).indices] = True
    return assemble(config, weight, gram, candidates.only(*masks), spec)


@assemble.register
def _(
    config: CapConfig, weight: Tensor, gram: Gram, candidates: Candidates, spec: FactorSpec
) -> tuple[Factor, FitReport]:
    start = time.perf_counter()
    weight, inputs = checked_weight(weight), metric(gram)
    roots = candidates.values.sqrt()
    left, right = candidates.left * roots, roots[:, None] * candidates.right
    entries = torch.zeros_like(weight).masked_scatter_(candidates.support, candidates.entries)

    def sparse(kept: SparseSpec, rest: Tensor) -> Sparse:
        values = entries
        if config.refit:
            values = refit(rest, inputs, candidates.support, entries, damping=config.damping)
        # What entries stand for is what robust PCA made of them, and not what is left of the weight.
        wanted = rest if config.refit else entries
        return store_pruned(wanted, Pruned(values, candidates.support), kept, inputs, damping=config.damping)

    factor = stored_sum(spec, weight, inputs, (left, right), sparse)
    return factor, _told(candidates, spec, direct_report("", weight, factor, gram, time.perf_counter() - start))


def _told(candidates: Candidates, spec: FactorSpec, report: FitReport) -> FitReport:
    """A report that says how robust PCA ended."""
    rank, entries = sizes(spec)
    iterations, residual = int(candidates.iterations), float(candidates.residual)
    message = f"rank {rank}, {entries / (spec.rows * spec.cols):.1%} of the entries"
    if not bool(candidates.converged):
        message += f"; robust PCA stopped after {iterations} iterations and misses {residual:.1e} of the weight"
    return report.model_copy(
        update={
            "status": "converged" if bool(candidates.converged) else "iterations",
            "message": message,
            "details": {"robust_pca_iterations": float(iterations), "robust_pca_residual": residual},
        }
    )
