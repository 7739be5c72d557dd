"""Which parts of all decomposed weights stay: probabilities, moved by the loss of sampled models, under one budget.

Stage 2 of CAP (arXiv 2505.03801), for every method that `chooses`. All weights are split first, and the parts lie on disk;
in memory are a probability and a mask a candidate. How a weight is split, and what a part is worth at first, is the method's.
"""

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
from lexigram.factors import GroupSpec, SparseSpec
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
    policies = []
    for members in groups:
        tensors = [tensor for target in members for tensor in first.pop(target.name)]
        allowed = _allowed(config, members, budget(members, recipe.ratio, recipe.accounting))
        found = started(tensors, config.first, together=config.together, generator=generator)
        policies.append(BernoulliPolicy(found, _costs(config, members, recipe.accounting), allowed))
    if config.passes:
        _move(plan, config, policies, parts, model, ids, generator, progress)
    units = []
    with progress.stage("choose", len(plan.targets)) as step:
        for members, policy in zip(groups, policies, strict=True):
            masks = iter(keep_best(policy.probabilities, policy.costs, policy.budget, per_cost=config.per_bit))
            for target in members:
                kept = _read(parts, target.name).only(next(masks), next(masks))
                parts.put(target.name, kept._asdict())
                spec = sum_spec(
                    target.shape,
                    len(kept.values),
                    len(kept.entries),
                    config.value_bits,
                    config.value_group,
                )
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
            for policy, mask in zip(policies, drawn, strict=True):
                update(policy, [mask], [loss], rate=config.rate, memory=config.memory)
            step()


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
    bits = 1.0 if accounting == "paper" else codec(config.value_bits, config.value_group).bits_per_value
    return [cost for target in members for cost in (bits * sum(target.shape), bits)]


def _allowed(config: CapConfig, members: Sequence[Target], whole: Budget) -> float:
    """What candidates may cost: in bytes, without a bitmask for each member and what packing may round up."""
    if whole.unit == "parameters":
        return float(whole.amount)
    fixed = 0
    for target in members:
        rows, cols = target.shape
        empty = SparseSpec(rows=rows, cols=cols, nonzeros=0)
        # Three leaves, each with a last group that may be nearly empty and up to three tensors padded to bytes.
        fixed += empty.bytes + 3 * (0 if config.value_bits >= 10 else 6)
    if 8 * (whole.amount - fixed) < 0:
        raise LexigramError(
            f"a budget of {whole.amount} bytes is too small for {config.name}: the bitmasks alone need {fixed}; lower the ratio"
        )
    return 8.0 * (whole.amount - fixed)
