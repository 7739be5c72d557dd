"""What the parts of a weight are worth for its outputs, told without a fit, and one ranking of them by what they cost.

Parts are the singular values of a low-rank part and the entries of what it leaves. To drop an entry ``w`` of input j costs
``w^2 G_jj`` where no other entry makes up for it (Wanda, arXiv 2306.11695), and ``w^2 / (G^-1)_jj`` where all others do (the
optimal brain surgeon). Where many are dropped some are left to make up for them, and the geometric mean of the two prices
tells what SparseGPT loses: with 80 to 25 % of the entries kept its squared error was .89 to 1.18 times the sum over those
dropped for 33 of 36 matrices and shares of a real model, .75 to .82 for one with few strong inputs (`results/entry-prices-*`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lexigram.linalg.rounding import DAMPING
from lexigram.linalg.surgeon import lower


class Kept(NamedTuple):
    """So many of the largest singular values and of the best entries, and what they are worth together."""

    values: int
    entries: int
    worth: float


def input_prices(gram: Tensor, *, damping: float = DAMPING) -> Tensor:
    """What it costs to drop an entry of 1 at each input, (in,) float64: ``sqrt(G_jj / (G^-1)_jj)`` of the damped Gram.

    Args:
        gram: (in, in), positive semi-definite.
        damping: share of the mean diagonal of the Gram that is added to its diagonal.

    Raises:
        ValueError: where the Gram is not finite or not positive semi-definite.
    """
    factor = lower(gram.to(torch.float64), damping)
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return (factor.square().sum(0) / inverse.square().sum(1)).sqrt()


def ranked(values: Tensor, entries: Tensor, costs: tuple[float, float], allowed: Sequence[float]) -> list[Kept]:
    """The parts that one ranking by worth per cost keeps within each budget.

    Args:
        values: what each singular value is worth, (r,), descending.
        entries: what each entry is worth, any shape, from 0 up.
        costs: of a singular value and of an entry, in any unit.
        allowed: the budgets, in this unit.
    """
    worth = torch.cat([values.to(entries), entries.reshape(-1)])
    cost = torch.cat([worth.new_full((len(values),), costs[0]), worth.new_full((entries.numel(),), costs[1])])
    order = (worth / cost).argsort(descending=True, stable=True)
    spent, gained = (each[order].cumsum(0, dtype=torch.float64) for each in (cost, worth))
    ranks = (order < len(values)).cumsum(0)
    counts = torch.searchsorted(spent, spent.new_tensor(allowed), right=True).tolist()
    return [
        Kept(int(ranks[count - 1]), count - int(ranks[count - 1]), float(gained[count - 1]))
        if count
        else Kept(0, 0, 0.0)
        for count in counts
    ]
