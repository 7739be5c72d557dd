"""CAP: robust PCA splits the plain weight into low rank and sparse; which parts stay is chosen over the whole model at once.

arXiv 2505.03801. Stage 1, `decompose`, is here, and so is `assemble`, which turns what was chosen into stored factors;
stage 2, the choice, is in `lexigram.choice`. What the paper leaves open is an option: the penalty's growth and the stop of
robust PCA, the start of the probabilities, how many sequences a step of the policy gradient sees, whether ranking is
by probability or by probability per stored bit. Kept values are used as they are, as published, unless `refit` moves them.
"""

import time
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lexigram.factors import Factor, FactorSpec, Product, Sparse, encode
from lexigram.gram import Gram
from lexigram.linalg.policy_gradient import LEARNING_RATE, MEMORY
from lexigram.linalg.pruning import refit
from lexigram.linalg.robust_pca import ITERATIONS, TOLERANCE, robust_pca
from lexigram.methods.base import (
    Candidates,
    FitReport,
    MethodConfig,
    assemble,
    checked_weight,
    decompose,
    direct_report,
    fit,
    metric,
    scores,
)
from lexigram.methods.storing import BITS, ValueBits, ValueGroup
from lexigram.methods.sums import sizes, stored_sum
from lexigram.shown import FORM, Shown


class CapConfig(MethodConfig):
    """Robust PCA, the policy and the form."""

    allocation: ClassVar[str] = "global"

    name: Literal["cap"] = "cap"
    value_bits: Annotated[ValueBits, Shown(FORM)] = Field(default=16, description=BITS)
    value_group: ValueGroup = 128
    refit: bool = Field(
        default=False, description="Move the kept values to where the outputs on the text stay closest."
    )
    sparse_weight: Annotated[float | None, Shown(none="1 / sqrt(the longer side)")] = Field(
        default=None, gt=0, description="Lambda of robust PCA."
    )
    growth: float = Field(default=1.0, ge=1, description="Of robust PCA's penalty, a factor an iteration.")
    iterations: int = Field(default=ITERATIONS, ge=1, description="Of robust PCA, at most.")
    tolerance: float = Field(default=TOLERANCE, gt=0, description="Share of the weight that robust PCA may miss.")
    score: Literal["magnitude", "energy", "wanda"] = Field(
        default="wanda", description="What a candidate's first probability is made of."
    )
    first: Literal["uniform", "random", "sigmoid", "largest"] = Field(
        default="sigmoid", description="How scores become first probabilities."
    )
    together: bool = Field(default=False, description="Level the scores over the whole model, not matrix by matrix.")
    passes: int = Field(
        default=3, ge=0, description="Of the policy gradient over the calibration text; 0 leaves it out."
    )
    batch: int = Field(default=16, ge=1, description="Sequences a step of the policy gradient.")
    rate: float = Field(default=LEARNING_RATE, gt=0, description="Of the policy gradient.")
    memory: float = Field(default=MEMORY, ge=0, lt=1, description="Of the moving average of the loss.")
    per_bit: bool = Field(default=False, description="Rank candidates by probability per stored bit.")


@decompose.register
def _(config: CapConfig, weight: Tensor, gram: Gram) -> Candidates:
    """The paper's stage 1 knows no activations: `gram` is not used."""
    parts = robust_pca(
        checked_weight(weight),
        weight=config.sparse_weight,
        growth=config.growth,
        tolerance=config.tolerance,
        iterations=config.iterations,
    )
    support = parts.sparse != 0
    return Candidates(parts.left, parts.values, parts.right, parts.sparse[support], support)


@scores.register
def _(config: CapConfig, candidates: Candidates, gram: Gram) -> tuple[Tensor, Tensor]:
    """Of the singular values and of the entries: their size, their energy, or that in the metric of the inputs' diagonal."""
    values, entries = candidates.values, candidates.entries.abs()
    if config.score == "magnitude":
        return values, entries
    if config.score == "energy":
        return values.square(), entries.square()
    strength = metric(gram).diagonal().clamp_min(0).to(entries.dtype)
    columns = candidates.support.nonzero()[:, 1]
    # The energy of a rank-one part at the outputs, inputs taken as uncorrelated: ``sigma^2 sum_j v_j^2 G_jj``.
    return values * (candidates.right.square() @ strength).sqrt(), entries * strength.sqrt()[columns]


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
    weight = checked_weight(weight)
    roots = candidates.values.sqrt()
    left, right = candidates.left * roots, roots[:, None] * candidates.right
    sparse = torch.zeros_like(weight).masked_scatter_(candidates.support, candidates.entries)
    if config.refit:
        sparse = refit(weight - left @ right, metric(gram), candidates.support, sparse)
    factor = stored_sum(
        spec,
        lambda low: Product(encode(left, low.left), encode(right, low.right)),
        lambda kept: Sparse.encode(sparse, kept, candidates.support),
    )
    rank, entries = sizes(spec)
    message = f"rank {rank}, {entries / weight.numel():.1%} of the entries"
    return factor, direct_report(message, weight, factor, gram, time.perf_counter() - start)
