"""Which parts of all decomposed weights stay: probabilities, moved by the loss of sampled models, under one budget.

Stage 2 of CAP (arXiv 2505.03801), for every method that `chooses`. All weights are split first, and the parts lie on disk;
in memory are a probability and a mask a candidate. How a weight is split, and what a part is worth at first, is the method's.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lexigram.allocation.uniform import budget
from lexigram.allocation.units import Allocation, Unit
from lexigram.calibration.loss import summed_loss
from lexigram.calibration.store import GramStore
from lexigram.errors import LexigramError
from lexigram.factors import FactorSpec, GroupSpec, SparseSpec
from lexigram.linalg.budget import keep_best, project
from lexigram.linalg.policy_gradient import BernoulliPolicy, sample, started, update
from lexigram.methods import Budget, CapConfig
from lexigram.methods.base import Candidates, decompose, scores
from lexigram.methods.storing import codec
from lexigram.methods.sums import sum_spec
from lexigram.planning import Plan
from lexigram.recipe import UNIFORM
from lexigram.running import Stages
from lexigram.targets import Target
from lexigram.tensorfiles import TensorFiles

_LEFT = 0.002
"""Share of a budget that is not worth another look at all candidates."""

_ROUNDS = 12


class Chosen(NamedTuple):
    """The allocation that the choice comes to, and the chosen parts of every weight by its name."""

    allocation: Allocation
    parts: TensorFiles

    def of(self, name: str) -> Candidates:
        """The parts of a weight that stay."""
        return _read(self.parts, name)


def choose_parts(
    plan: Plan,
    weight: Callable[[str], Tensor],
    store: GramStore,
    folder: Path,
    model: PreTrainedModel,
    ids: Tensor,
    progress: Stages,
) -> Chosen:
    """Split all weights, then choose among the parts.

    Args:
        plan: of a recipe whose method `chooses`. Its allocation says whether all weights stand under one budget (`global`), or
            each under its own (`uniform`).
        weight: a target's weight (out, in) by name.
        store: the Grams of all sites.
        folder: where the parts go.
        model: the original model, which stays as it is.
        ids: the calibration tokens (sequences, length).
        progress: is told about the stages.

    Raises:
        LexigramError: for a budget that not even the index of the smallest choice fits into.
    """
    recipe, config = plan.recipe, plan.recipe.method
    assert isinstance(config, CapConfig)
    parts = TensorFiles(folder, plan.device, "decomposition")
    first: dict[str, list[Tensor]] = {}
    with progress.stage("decompose", len(plan.targets)) as step:
        for target in plan.targets:
            with store.using([target.site]) as grams:
                candidates = decompose(config, weight(target.name), grams[target.site])
                first[target.name] = list(scores(config, candidates, grams[target.site]))
            parts.put(target.name, candidates._asdict())
            step()
    generator = torch.Generator().manual_seed(recipe.seed)
    groups = [[target] for target in plan.targets] if recipe.allocation == UNIFORM else [plan.targets]
    policies, budgets = [], [budget(members, recipe.ratio, recipe.accounting) for members in groups]
    for members, whole in zip(groups, budgets, strict=True):
        tensors = [tensor for target in members for tensor in first.pop(target.name)]
        allowed = _allowed(config, members, whole)
        found = started(tensors, config.first, together=config.together, generator=generator)
        policies.append(BernoulliPolicy(found, _costs(config, members, recipe.accounting), allowed))
    if config.passes:
        _move(plan, config, policies, parts, model, ids, generator, progress)
    units = []
    with progress.stage("choose", len(plan.targets)) as step:
        for members, policy, whole in zip(groups, policies, budgets, strict=True):
            kept = _kept(config, members, policy, whole)
            masks = iter(kept.masks)
            for target, spec in zip(members, kept.specs, strict=True):
                parts.put(target.name, _read(parts, target.name).only(next(masks), next(masks))._asdict())
                units.append(Unit(members=(target.name,), method=config, spec=GroupSpec(members=(spec,))))
                step()
    return Chosen(Allocation(units=tuple(units)), parts)


def _move(
    plan: Plan,
    config: CapConfig,
    policies: Sequence[BernoulliPolicy],
    parts: TensorFiles,
    model: PreTrainedModel,
    ids: Tensor,
    generator: torch.Generator,
    progress: Stages,
) -> None:
    """Policy gradient: every batch of sequences sees a model with parts drawn at random, and tells its loss a token."""
    for policy in policies:
        project(policy.probabilities, policy.costs, policy.budget)
    batches = ids.split(config.batch) * config.passes
    with progress.stage("move the probabilities", len(batches)) as step, torch.no_grad():
        for batch in batches:
            drawn = [sample(policy.probabilities, generator) for policy in policies]
            masks = iter([mask for each in drawn for mask in each])
            weights = {
                target.name: _drawn(_read(parts, target.name), next(masks), next(masks)) for target in plan.targets
            }
            total = sum(float(summed_loss(model, part, plan.compute_dtype, weights)) for part in batch.split(1))
            loss = total / (batch.shape[0] * (batch.shape[1] - 1))
            if not math.isfinite(loss):
                raise LexigramError(
                    f"the loss of a model with parts drawn at random is {loss}; lower the ratio, or leave the policy gradient "
                    "out with --passes 0"
                )
            for policy, mask in zip(policies, drawn, strict=True):
                update(policy, [mask], [loss], rate=config.rate, memory=config.memory)
            step()


class _Kept(NamedTuple):
    """Masks over the singular values and the entries of every member in turn, and the form of each member."""

    masks: list[Tensor]
    specs: list[FactorSpec]


def _kept(config: CapConfig, members: Sequence[Target], policy: BernoulliPolicy, whole: Budget) -> _Kept:
    """The best candidates within the budget.

    What was set aside for bitmasks is spent after all where a list of few entries, or none, takes less.
    """

    def best(allowed: float) -> _Kept:
        masks = keep_best(policy.probabilities, policy.costs, allowed, per_cost=config.per_bit)
        counts = [int(mask.count_nonzero()) for mask in masks]
        specs = [
            sum_spec(target.shape, rank, entries, config.value_bits, config.value_group)
            for target, rank, entries in zip(members, counts[::2], counts[1::2], strict=True)
        ]
        return _Kept(masks, specs)

    found, allowed, share = best(policy.budget), policy.budget, 1.0
    for _ in range(_ROUNDS if whole.unit == "bytes" else 0):
        left = whole.amount - sum(spec.bytes for spec in found.specs)
        if left <= _LEFT * whole.amount or all(bool(mask.all()) for mask in found.masks):
            break
        more = best(allowed + 8 * share * left)
        if sum(spec.bytes for spec in more.specs) <= whole.amount:
            found, allowed = more, allowed + 8 * share * left
        else:  # the index grew too, or became a bitmask
            share /= 2
    return found


def _drawn(candidates: Candidates, values: Tensor, entries: Tensor) -> Tensor:
    return candidates._replace(values=candidates.values * values, entries=candidates.entries * entries).to_dense()


def _read(parts: TensorFiles, name: str) -> Candidates:
    tensors, _ = parts.get(name)
    try:
        return Candidates(**tensors)
    except TypeError as error:
        raise parts.damaged(name, error) from error


def _costs(config: CapConfig, members: Sequence[Target], accounting: str) -> list[float]:
    """Of a singular value and of an entry, of every member in turn: bits, or the paper's parameters."""
    found = []
    for rows, cols in (target.shape for target in members):
        if accounting == "paper":
            found += [float(rows + cols), 1.0]
            continue
        # Groups of a right factor divide its rows, and so may be smaller.
        running, dividing = (
            codec(config.value_bits, config.value_group, width).bits_per_value for width in (None, cols)
        )
        found += [running * rows + dividing * cols, running]
    return found


def _allowed(config: CapConfig, members: Sequence[Target], whole: Budget) -> float:
    """What candidates may cost: in bytes, without a bitmask for each member and what packing may round up."""
    if whole.unit == "parameters":
        return float(whole.amount)
    fixed = 0
    for target in members:
        rows, cols = target.shape
        empty = SparseSpec(rows=rows, cols=cols, nonzeros=0)
        # Of three leaves each may fill up a byte; of integers a last group too, with its scale, and a byte of zeros.
        fixed += empty.bytes + 3 * (0 if config.value_bits == 16 else 1 if config.value_bits >= 10 else 6)
    if 8 * (whole.amount - fixed) < 0:
        raise LexigramError(
            f"a budget of {whole.amount} bytes is too small for {config.name}: the bitmasks alone need {fixed}; lower the ratio"
        )
    return 8.0 * (whole.amount - fixed)
