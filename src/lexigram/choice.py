"""Which parts of all decomposed weights stay: probabilities, moved by the loss of sampled models, under one budget.

Stage 2 of CAP (arXiv 2505.03801), and of no other method. All weights are split first, and the parts lie on disk; in memory
are a probability and a mask a candidate. How a weight is split, and what a part is worth at first, is in `methods.cap`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lexigram.allocation.uniform import budget
from lexigram.allocation.units import Allocation, Unit
from lexigram.calibration.loss import loss_a_token
from lexigram.calibration.store import GramStore
from lexigram.errors import LexigramError
from lexigram.factors import FactorSpec, GroupSpec
from lexigram.factors.indices import INDICES, IndexName, index_prices
from lexigram.fitting import naming
from lexigram.gram import Gram
from lexigram.linalg.budget import keep_best, project
from lexigram.linalg.policy_gradient import BernoulliPolicy, sample, started, update
from lexigram.methods import Budget, CapConfig
from lexigram.methods.base import Candidates, MethodConfig, decompose, scores
from lexigram.methods.storing import codec
from lexigram.methods.sums import sum_spec
from lexigram.planning import Plan
from lexigram.recipe import UNIFORM
from lexigram.running import Stages
from lexigram.targets import Target
from lexigram.tensorfiles import TensorFiles
from lexigram.workers import Workers

_LEFT = 0.002
"""Share of a budget that is not worth another look at all candidates."""

_ROUNDS = 12


@dataclass(frozen=True)
class SplitTask:
    """One weight (out, in) to be split, by its name, with the Gram of its inputs."""

    name: str
    config: MethodConfig
    weight: Tensor
    gram: Gram


class Chosen(NamedTuple):
    """The allocation that the choice comes to, the parts of every weight by its name, and which of them stay.

    `masks` are bool, of the singular values and of the entries.
    """

    allocation: Allocation
    parts: TensorFiles
    masks: dict[str, tuple[Tensor, Tensor]]

    def of(self, name: str) -> Candidates:
        """The parts of a weight that stay."""
        return _read(self.parts, name).only(*self.masks[name])


def split(task: SplitTask) -> tuple[str, Candidates]:
    """The weight's name and its parts.

    Raises:
        LexigramError: as `naming` does.
    """
    with naming([task.name], "decomposed"):
        return task.name, decompose(task.config, task.weight, task.gram)


def choose_parts(
    plan: Plan,
    weight: Callable[[str], Tensor],
    store: GramStore,
    folder: Path,
    model: PreTrainedModel,
    ids: Tensor,
    pool: Workers,
    progress: Stages,
) -> Chosen:
    """Split all weights, then choose among the parts.

    Args:
        plan: of a recipe whose method is CAP. Its allocation says whether all weights stand under one budget (`global`), or
            each under its own (`uniform`).
        weight: a target's weight (out, in) by name.
        store: the Grams of all sites.
        folder: where the parts go, all of them, whatever is chosen. Those that lie there are not made again: they are to be of
            these weights and of a config that agrees with the plan's in `methods.cap.DECOMPOSING`.
        model: the original model, which stays as it is.
        ids: the calibration tokens (sequences, length).
        pool: splits the weights.
        progress: is told about the stages.

    Raises:
        LexigramError: for a weight that cannot be split, for a budget that not even the index of the smallest choice fits
            into, for parts in the folder that are damaged, or not of a weight of this shape.
    """
    recipe, config = plan.recipe, plan.recipe.method
    assert isinstance(config, CapConfig)
    parts = TensorFiles(folder, plan.device, "decomposition")
    _split(plan.targets, config, weight, store, parts, pool, progress)
    first: dict[str, list[Tensor]] = {}
    for target in plan.targets:
        with store.using([target.site]) as grams:
            found = scores(config, _read(parts, target.name, target.shape), grams[target.site])
        first[target.name] = list(found)
    generator = torch.Generator().manual_seed(recipe.seed)
    groups = [[target] for target in plan.targets] if recipe.allocation == UNIFORM else [plan.targets]
    policies, budgets = [], [budget(members, plan.ratio, recipe.accounting) for members in groups]
    for members, whole in zip(groups, budgets, strict=True):
        tensors = [tensor for target in members for tensor in first.pop(target.name)]
        allowed, costs = _prices(config, members, whole)
        if allowed < 0:
            raise LexigramError(
                f"a budget of {whole.amount} bytes is too small for {config.name}: it would not even hold the index of what is "
                "kept; lower the ratio"
            )
        if config.per_bit:
            tensors = [tensor / cost ** (config.power / 2) for tensor, cost in zip(tensors, costs, strict=True)]
        start = started(tensors, config.first, together=config.together or config.per_bit, generator=generator)
        policies.append(BernoulliPolicy(start, costs, allowed, projection=config.projection))
    if config.passes:
        _move(plan, config, policies, parts, model, ids, generator, progress)
    units, chosen = [], {}
    with progress.stage("choose", len(plan.targets)) as step:
        for members, policy, whole in zip(groups, policies, budgets, strict=True):
            kept = _kept(config, members, policy, whole)
            masks = iter(kept.masks)
            for target, spec in zip(members, kept.specs, strict=True):
                chosen[target.name] = next(masks), next(masks)
                units.append(Unit(members=(target.name,), method=config, spec=GroupSpec(members=(spec,))))
                step()
    return Chosen(Allocation(units=tuple(units)), parts, chosen)


def _split(
    targets: Sequence[Target],
    config: CapConfig,
    weight: Callable[[str], Tensor],
    store: GramStore,
    parts: TensorFiles,
    pool: Workers,
    progress: Stages,
) -> None:
    """All weights into parts on disk, but those that lie there."""
    missing = [target for target in targets if not parts.has(target.name)]

    def task(target: Target) -> SplitTask:
        with store.using([target.site]) as grams:
            return SplitTask(target.name, config, weight(target.name), grams[target.site])

    with progress.stage("decompose", len(targets)) as step:
        for _ in range(len(targets) - len(missing)):
            step()
        for name, candidates in pool.run(split, map(task, missing)):
            parts.put(name, candidates._asdict())
            step()


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
    """Policy gradient: every batch of sequences sees models with parts drawn at random, and tells their losses a token.

    Draws that no step is taken from tell the first baseline; otherwise the first step would be none, and a text of one batch
    would be run once for nothing.
    """
    batches = ids.split(config.batch)
    for policy in policies:
        project(policy.probabilities, policy.costs, policy.budget, metric=policy.projection)
    drawings = batches[:1] + batches * config.passes
    with progress.stage("move the probabilities", len(drawings)) as step, torch.no_grad():
        for number, batch in enumerate(drawings):
            drawn: list[list[list[Tensor]]] = []
            losses = []
            for _ in range(config.samples):
                drawn.append([sample(policy.probabilities, generator) for policy in policies])
                masks = iter([mask for each in drawn[-1] for mask in each])
                weights = {
                    target.name: _drawn(_read(parts, target.name), next(masks), next(masks)) for target in plan.targets
                }
                losses.append(
                    loss_a_token(
                        model,
                        batch,
                        plan.compute_dtype,
                        weights,
                        objective=config.objective,
                        what="a model with parts drawn at random",
                        remedy="lower the ratio, or leave the policy gradient out with --passes 0",
                    )
                )
            for policy, *samples in zip(policies, *drawn, strict=True):
                if number:
                    update(policy, samples, losses, rate=config.rate, memory=config.memory, eps=config.eps)
                else:
                    policy.baseline = sum(losses) / len(losses)
            step()


class _Kept(NamedTuple):
    """Masks over the singular values and the entries of every member in turn, and the form of each member."""

    masks: list[Tensor]
    specs: list[FactorSpec]


def _kept(config: CapConfig, members: Sequence[Target], policy: BernoulliPolicy, whole: Budget) -> _Kept:
    """The best candidates within the budget.

    What was set aside for indices is spent after all where a matrix has a lighter one, or needs none.
    """

    def best(allowed: float) -> _Kept:
        masks = keep_best(policy.probabilities, policy.costs, allowed)
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


def _read(parts: TensorFiles, name: str, shape: tuple[int, int] | None = None) -> Candidates:
    """The parts of a weight, of that shape where it is given."""
    tensors, _ = parts.get(name)
    try:
        found = Candidates(**tensors)
    except TypeError as error:
        raise parts.damaged(name, error) from error
    rows, cols = shape or found.support.shape
    rank, entries = len(found.values), int(found.support.count_nonzero())
    wanted = (rows, rank), (rank,), (rank, cols), (entries,), (rows, cols)
    if tuple(tuple(tensor.shape) for tensor in found[:5]) != wanted:
        raise parts.damaged(name, f"its tensors are not the parts of a weight {rows, cols}")
    return found


class _Prices(NamedTuple):
    """What candidates may cost in all, and what a singular value and an entry of every member in turn cost: in bits, or in the
    paper's parameters.
    """

    allowed: float
    costs: list[float]

    @property
    def entries(self) -> float:
        """How many of the cheapest entries would fit."""
        return self.allowed / min(self.costs[1::2])


def _prices(config: CapConfig, members: Sequence[Target], whole: Budget) -> _Prices:
    """With that index of the entries, a bitmask for every member or lists, which leaves room for more of them."""
    if whole.unit == "parameters":
        return _Prices(float(whole.amount), [price for target in members for price in (float(sum(target.shape)), 1.0)])
    return max((_indexed(config, members, whole, index) for index in INDICES), key=lambda prices: prices.entries)


def _indexed(config: CapConfig, members: Sequence[Target], whole: Budget, index: IndexName) -> _Prices:
    """What an index takes whatever it holds is set aside, with what packing may round up; the rest an entry pays."""
    fixed, costs = 0, []
    for rows, cols in (target.shape for target in members):
        none, each = index_prices(index, rows, cols)
        # Three leaves and a list may each fill up a byte; integers a last group too, with its scale, and a byte of zeros.
        fixed += none + (each > 0) + 3 * (0 if config.value_bits == 16 else 1 if config.value_bits >= 10 else 6)
        # Groups of a right factor divide its rows, and so may be smaller.
        running, dividing = (
            codec(config.value_bits, config.value_group, width).bits_per_value for width in (None, cols)
        )
        costs += [running * rows + dividing * cols, running + each]
    return _Prices(8.0 * (whole.amount - fixed), costs)
