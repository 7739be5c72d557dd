"""The knapsack's costs, moved by the loss of the models that they lead to: an allocation is tried out before it is taken.

Costs add up over the units, a model's errors do not. Two numbers a unit change them: all its forms cost ``exp(theta)`` times as
much, those with a low-rank part beside entries ``exp(phi)`` times that. Both are drawn around a mean. A draw's allocation is
the knapsack's under its costs, within the same budget, and its loss that of the model with sketches in the place of the
weights. The mean follows the losses (`lexigram.linalg.policy_gradient`), and the knapsack under it is taken unless sequences
that were held back lose more by it. A form between measured ones has the nearest one's sketch, its error scaled to what the
curve tells: every draw has forms of its own, while the measured ones are few, and their sketches are used again.

It is off unless asked for, because it has not helped so far. On a model of 35 units, two seeds, the perplexity of other text
with 0 / 20 / 60 steps was 12.08 / 12.31 / 12.02 and 12.65 / 12.64 / 12.84 (lowrank-sparse, ratio .8), 8.09 / 8.09 / 8.09 and
8.14 / 8.13 / 8.13 (.7), 7.73 / 7.73 / 7.72 and 7.74 / 7.74 / 7.72 (.5), 7.81 / 7.78 / 7.81 and 7.79 / 7.79 / 7.78 (cospadi,
.4). The .03 to .06 nats a token that models of sketches gain at .8 are no gain of the models that are fitted in the end: there
a model of sketches loses .15 more than these.

What a sketch is and where it lies is in `lexigram.curves`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lexigram.allocation.knapsack import choose
from lexigram.allocation.units import Allocation, Unit
from lexigram.calibration.loss import loss_a_token
from lexigram.factors import SumSpec
from lexigram.linalg.policy_gradient import GaussianPolicy, update_by_pair
from lexigram.planning import Plan
from lexigram.running import Stages

DEVIATION = 0.3
"""Of both numbers of a unit: costs are taken to be off by a third.

Measured once, on a model of 35 units with ratio .8, as nats a token that held-back sequences lose by sketches: 2.473 at the
start, 2.446 after 20 steps, 2.486 with .1 in place of .3.
"""

RATE = 0.1
"""How far a step goes where the losses differ as usual, in ``sigma |z|``. There, .3 had lost the way after 10 steps: 2.516."""

BATCH = 4
"""Sequences that a pair of draws is tried out on. There, 12 of them brought no more: 2.453, and 2.451 at rate .03."""

HELD_BACK = 4
"""One sequence in so many is held back, and tells whether the outcome is taken."""


class Offer(NamedTuple):
    """A form that a unit may take, and its cost.

    `measured` is the form whose sketch stands for it, each member's error times one of the `scales`; None for weights that
    are kept as they are.
    """

    unit: Unit
    cost: float
    measured: Unit | None = None
    scales: tuple[float, ...] = ()


def allocated(offers: Sequence[Sequence[Offer]], amount: int, exponents: Tensor | None = None) -> Allocation:
    """Spend `amount` bytes where they lower the cost most.

    Args:
        offers: the forms of every unit.
        amount: bytes for all of them.
        exponents: ``theta`` and ``phi`` of every unit, (2, units); by default zeros, the costs as they are.

    Raises:
        LexigramError: where the smallest forms of all units need more than `amount`.
    """
    return Allocation(units=tuple(offer.unit for offer in chosen(offers, amount, exponents)))


def chosen(offers: Sequence[Sequence[Offer]], amount: int, exponents: Tensor | None = None) -> list[Offer]:
    """The offers behind an allocation: see `allocated`."""
    moves = [[0.0, 0.0]] * len(offers) if exponents is None else exponents.T.tolist()
    moved = [
        [(offer.unit.spec.bytes, _moved(offer, theta, phi)) for offer in unit]
        for unit, (theta, phi) in zip(offers, moves, strict=True)
    ]
    return [unit[pick] for unit, pick in zip(offers, choose(moved, amount).picks, strict=True)]


def refine(
    plan: Plan,
    offers: Sequence[Sequence[Offer]],
    amount: int,
    weights: Callable[[Offer], dict[str, Tensor]],
    model: PreTrainedModel,
    ids: Tensor,
    progress: Stages,
) -> Allocation:
    """The knapsack's allocation, or that under costs moved by the losses, whichever loses less where nothing was moved by.

    Args:
        plan: its recipe says how many steps, and the seed.
        offers: the forms of every unit.
        amount: bytes for all of them.
        weights: what the weights of a unit become by an offer, (out, in) by name.
        model: the original model, which stays as it is.
        ids: the calibration tokens (sequences, length), two or more.
        progress: is told about the stages; the last one's name says which allocation was taken.

    Raises:
        LexigramError: for a budget that is too small, or a loss that is not finite.
    """
    held, used = ids[::HELD_BACK], ids[torch.arange(len(ids)) % HELD_BACK != 0]
    generator = torch.Generator().manual_seed(plan.recipe.seed)
    policy = GaussianPolicy(torch.zeros(2, len(offers), dtype=torch.float64), DEVIATION)

    def loss_of(exponents: Tensor | None, batch: Tensor) -> float:
        """Nats a token."""
        drawn = {name: tensor for offer in chosen(offers, amount, exponents) for name, tensor in weights(offer).items()}
        remedy = "lower the ratio, or leave --refine out"
        return loss_a_token(model, batch, plan.compute_dtype, drawn, what="a model with sketches", remedy=remedy)

    with progress.stage("refine the allocation", plan.recipe.refine) as step, torch.no_grad():
        batches = _batches(used, plan.recipe.refine, generator)
        for batch in batches:
            noise, up, down = policy.pair(generator)
            update_by_pair(policy, noise, loss_of(up, batch), loss_of(down, batch), rate=RATE)
            step()
        before, after = loss_of(None, held), loss_of(policy.mean, held)
    taken = after <= before
    said = f"{'the refined' if taken else 'the first'} allocation, of losses {after:.4f} and {before:.4f} a token"
    with progress.stage(said, 1) as step:
        step()
    return allocated(offers, amount, policy.mean if taken else None)


def _batches(ids: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """So many batches of sequences: all of these in random order, again and again."""
    size = min(BATCH, len(ids))
    orders = [torch.randperm(len(ids), generator=generator) for _ in range(-(-count * size // len(ids)))]
    return list(ids[torch.cat(orders)[: count * size]].split(size))


def _moved(offer: Offer, theta: float, phi: float) -> float:
    """The cost, by two numbers of the unit."""
    beside = any(isinstance(member, SumSpec) for member in offer.unit.spec.members)
    return offer.cost * math.exp(theta + phi * beside)
