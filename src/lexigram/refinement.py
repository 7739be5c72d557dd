"""Size and rank share of every unit, moved by the loss of the models that they lead to, from where the knapsack has put them.

Costs add up over the units, a model's errors do not. Two numbers a unit change an allocation: its size, and so the density of
what it keeps, becomes ``exp(theta)`` times as large, and ``phi`` is added to the share of its bytes that a low-rank part beside
entries has. Both are drawn around a mean. In a draw all sizes are brought to the budget by one factor, and every unit takes the
form that its curves say loses least at its size, with a low-rank part or without by whichever is nearer to the drawn share.
The loss is that of the model with sketches in the place of the weights. The mean follows the losses
(`lexigram.linalg.policy_gradient`), and where it leads is taken unless sequences that were held back lose more by it.
A form between measured ones has the nearest one's sketch, its error scaled to what the curve tells: every draw has forms of
its own, while the measured ones are few, and their sketches are used again.

What a sketch is and where it lies is in `lexigram.curves`.
"""

import math
from bisect import bisect_right
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

DEVIATIONS = (0.05, 0.05)
"""Of the logarithm of a unit's size, and of its rank share."""

RATE = 0.1
"""How far a step goes where the losses differ as usual, in ``sigma |z|``."""

BATCH = 4
"""Sequences that a pair of draws is tried out on."""

HELD_BACK = 4
"""One sequence in so many is held back, and tells whether the outcome is taken."""

_REACH = 8.0
"""The logarithm of the most that sizes are multiplied by to come to the budget."""

_HALVINGS = 40


class Offer(NamedTuple):
    """A form that a unit may take, and its cost.

    `measured` is the form whose sketch stands for it, each member's error times one of the `scales`; None for weights that
    are kept as they are.
    """

    unit: Unit
    cost: float
    measured: Unit | None = None
    scales: tuple[float, ...] = ()


def allocated(offers: Sequence[Sequence[Offer]], amount: int) -> Allocation:
    """Spend `amount` bytes where they lower the cost most.

    Args:
        offers: the forms of every unit.
        amount: bytes for all of them.

    Raises:
        LexigramError: where the smallest forms of all units need more than `amount`.
    """
    return Allocation(units=tuple(offer.unit for offer in chosen(offers, amount)))


def chosen(offers: Sequence[Sequence[Offer]], amount: int) -> list[Offer]:
    """The offers behind an allocation: see `allocated`."""
    curves = [[(offer.unit.spec.bytes, offer.cost) for offer in unit] for unit in offers]
    return [unit[pick] for unit, pick in zip(offers, choose(curves, amount).picks, strict=True)]


class Moves:
    """The allocations around a first one."""

    def __init__(self, offers: Sequence[Sequence[Offer]], first: Sequence[Offer], amount: int) -> None:
        self._amount = amount
        self._sizes = [offer.unit.spec.bytes for offer in first]
        beside = [[share for offer in unit if (share := _rank_share(offer))] for unit in offers]
        self._offered = [sum(shares) / len(shares) if shares else math.inf for shares in beside]
        # A unit's forms differ in their shares; where a unit stands is on one side or the other, and as far as all forms are.
        self._shares = [
            offered if _rank_share(offer) else 0.0 for offer, offered in zip(first, self._offered, strict=True)
        ]
        self._fronts = [{ranks: _front(unit, ranks) for ranks in (False, True)} for unit in offers]

    def __call__(self, moves: Tensor) -> list[Offer]:
        """The forms of all units, within the budget, by ``theta`` and ``phi`` of each, (2, units)."""
        sizes = [size * math.exp(by) for size, by in zip(self._sizes, moves[0].tolist(), strict=True)]
        shares = [share + by for share, by in zip(self._shares, moves[1].tolist(), strict=True)]
        fronts = [
            front[share > offered / 2]
            for front, share, offered in zip(self._fronts, shares, self._offered, strict=True)
        ]
        low, high = -_REACH, _REACH
        found = _largest(fronts, sizes, math.exp(low))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            tried = _largest(fronts, sizes, math.exp(middle))
            if sum(offer.unit.spec.bytes for offer in tried) <= self._amount:
                low, found = middle, tried
            else:
                high = middle
        return found


def _rank_share(offer: Offer) -> float:
    """Of a unit's bytes, those of low-rank parts beside entries."""
    ranks = sum(member.left.bytes for member in offer.unit.spec.members if isinstance(member, SumSpec))
    return ranks / offer.unit.spec.bytes


def _front(unit: Sequence[Offer], ranks: bool) -> list[Offer]:
    """The forms that no smaller one is as good as: with low-rank parts or without, and any that are smaller than the least."""
    own = [offer for offer in unit if bool(_rank_share(offer)) == ranks]
    least = min((offer.unit.spec.bytes for offer in own), default=math.inf)
    found: list[Offer] = []
    for offer in sorted(
        own + [offer for offer in unit if offer.unit.spec.bytes < least],
        key=lambda each: (each.unit.spec.bytes, each.cost),
    ):
        if offer.cost < math.inf and (not found or offer.cost < found[-1].cost):
            found.append(offer)
    return found


def _largest(fronts: Sequence[Sequence[Offer]], sizes: Sequence[float], factor: float) -> list[Offer]:
    """The form of each unit that its size, times a factor, has room for; where none has, the smallest."""
    at = (
        bisect_right(front, factor * size, key=lambda offer: offer.unit.spec.bytes)
        for front, size in zip(fronts, sizes, strict=True)
    )
    return [front[max(0, index - 1)] for front, index in zip(fronts, at, strict=True)]


def refine(
    plan: Plan,
    offers: Sequence[Sequence[Offer]],
    amount: int,
    weights: Callable[[Offer], dict[str, Tensor]],
    model: PreTrainedModel,
    ids: Tensor,
    progress: Stages,
) -> Allocation:
    """The knapsack's allocation, or where the losses have moved it, whichever loses less where nothing was moved by.

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
    # In units of the deviations.
    policy = GaussianPolicy(torch.zeros(2, len(offers), dtype=torch.float64), 1.0)
    scales = torch.tensor(DEVIATIONS, dtype=torch.float64)[:, None]
    first = chosen(offers, amount)
    moved = Moves(offers, first, amount)

    def loss_of(taken: Sequence[Offer], batch: Tensor) -> float:
        """Nats a token."""
        drawn = {name: tensor for offer in taken for name, tensor in weights(offer).items()}
        remedy = "lower the ratio, or leave --refine out"
        return loss_a_token(model, batch, plan.compute_dtype, drawn, what="a model with sketches", remedy=remedy)

    with progress.stage("refine the allocation", plan.recipe.refine) as step, torch.no_grad():
        batches = _batches(used, plan.recipe.refine, generator)
        for batch in batches:
            noise, up, down = policy.pair(generator)
            update_by_pair(
                policy, noise, loss_of(moved(scales * up), batch), loss_of(moved(scales * down), batch), rate=RATE
            )
            step()
        last = moved(scales * policy.mean)
        before, after = loss_of(first, held), loss_of(last, held)
    taken = after <= before
    said = f"{'the refined' if taken else 'the first'} allocation, of losses {after:.4f} and {before:.4f} a token"
    with progress.stage(said, 1) as step:
        step()
    return Allocation(units=tuple(offer.unit for offer in (last if taken else first)))


def _batches(ids: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """So many batches of sequences: all of these in random order, again and again."""
    size = min(BATCH, len(ids))
    orders = [torch.randperm(len(ids), generator=generator) for _ in range(-(-count * size // len(ids)))]
    return list(ids[torch.cat(orders)[: count * size]].split(size))
