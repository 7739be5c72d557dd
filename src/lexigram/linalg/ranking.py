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


class Limit(NamedTuple):
    """What all parts may cost that are kept, and what a singular value and an entry cost, in any unit."""

    total: float
    value: float
    entry: float


def ranked(values: Tensor, entries: Tensor, limits: Sequence[Limit]) -> list[Kept]:
    """The parts that one ranking by worth per cost keeps within each limit, up to the first that would be too dear.

    Args:
        values: what each singular value is worth, (r,), descending.
        entries: what each entry is worth, any shape, from 0 up.
        limits: as many as are asked for; the entries are sorted once.
    """
    falling = entries.reshape(-1).neg().sort().values
    of_values, of_entries = (
        torch.nn.functional.pad(each.double().cumsum(0), (1, 0)) for each in (values, falling.neg())
    )
    found = []
    for limit in limits:
        # The number of entries that come before each singular value, and what all up to it cost.
        before = torch.searchsorted(falling, values.to(falling).neg() * (limit.entry / limit.value)).double()
        spent = before * limit.entry + torch.arange(1, len(values) + 1, device=before.device) * limit.value
        taken = int((spent <= limit.total).count_nonzero())
        most = int(before[taken]) if taken < len(values) else len(falling)
        count = min(most, max(0, int((limit.total - taken * limit.value) // limit.entry)))
        found.append(Kept(taken, count, float(of_values[taken] + of_entries[count])))
    return found
