"""Whole columns of a weight dropped, in blocks of equal width: which of them, and least-squares values for the others.

For a weight ``W (out, in)`` and the Gram ``G (in, in)`` of its inputs the error of values ``V`` is ``tr (W - V) G (W - V)^T``.
Without columns ``D`` it is ``tr W_D G_DD W_D^T`` as they stand (`AsTheyStand`). Where the others are refitted it is
``tr W_D ((G^-1)_DD)^-1 W_D^T`` (`Refitted`): optimal brain surgeon for blocks, as ZipLM prunes with it (arXiv 2302.04089).

Blocks go one at a time, each where the error grows least given those that went before. Scores taken once would take
two columns that can stand for each other for superfluous both.
"""

from typing import Protocol

import torch
from torch import Tensor

from lexigram.linalg.rounding import FLOOR


class Losses(Protocol):
    """By how much the error grows with every block, while blocks are dropped one by one."""

    def scores(self) -> Tensor:
        """For every block (blocks,), by how much the error grows if it is the next; of a dropped one, anything."""
        ...

    def drop(self, block: int) -> None:
        """The next block that goes."""
        ...


class AsTheyStand:
    """Losses where the other columns stay as they are.

    The error of the dropped set is a sum of ``(W^T W)_ij G_ij`` over its pairs, so that a block is one number a pair.

    Args:
        weight: (out, in), any float dtype; computed with in float64.
        gram: (in, in), positive semi-definite.
        width: columns a block.
    """

    def __init__(self, weight: Tensor, gram: Tensor, width: int) -> None:
        weight = _checked(weight, gram, width)
        blocks = weight.shape[1] // width
        pairs = (weight.T @ weight).mul_(gram.to(weight))
        self._pairs = pairs.view(blocks, width, blocks, width).sum((1, 3))
        self._among_dropped = self._pairs.new_zeros(blocks)

    def scores(self) -> Tensor:
        """See `Losses.scores`; it can be negative, where a block cancels some of what went before."""
        return self._pairs.diagonal() + 2 * self._among_dropped

    def drop(self, block: int) -> None:
        """See `Losses.drop`."""
        self._among_dropped += self._pairs[block]


class Refitted:
    """Losses where the other columns move to their least-squares values.

    With ``H`` the inverse Gram and ``M = W^T W``, both as they are once the blocks before are gone, block ``B`` costs
    ``tr (H_BB)^-1 M_BB`` and takes ``W_B (H_BB)^-1 H_B`` off the weight. Of ``H`` and ``M`` only the blocks on the diagonal are
    kept up to date; a block's columns are worked out when it goes, from what those before took. So the k-th block takes
    time proportional to ``k in width^2``, and no weight is moved before all is decided.

    Args:
        weight: (out, in), any float dtype; computed with in float64.
        gram: (in, in), positive definite: see `damped`.
        width: columns a block.

    Raises:
        ValueError: where the Gram is not positive definite.
    """

    def __init__(self, weight: Tensor, gram: Tensor, width: int) -> None:
        weight = _checked(weight, gram, width)
        self._width = width
        lower, failed = torch.linalg.cholesky_ex(gram.to(weight))
        if failed:
            raise ValueError("the Gram is not positive definite; damp it")
        self._inverse = torch.cholesky_inverse(lower)
        self._products = weight.T @ weight
        self._inverse_blocks = _diagonal_blocks(self._inverse, width)
        self._product_blocks = _diagonal_blocks(self._products, width)
        # With the first rows of each, as many as columns went: H - taken^T columns is the inverse now, and
        # M - taken^T halves - halves^T taken the products. Only what is written takes memory of the CPU.
        self._taken, self._columns, self._halves = weight.new_empty(3, *gram.shape)
        self._gone = 0

    def scores(self) -> Tensor:
        """See `Losses.scores`."""
        solved = torch.linalg.solve(self._inverse_blocks, self._product_blocks)
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def drop(self, block: int) -> None:
        """See `Losses.drop`."""
        at = slice(block * self._width, (block + 1) * self._width)
        gone = slice(self._gone)
        before = self._taken[gone], self._columns[gone], self._halves[gone]
        columns = self._inverse[:, at] - before[0].T @ before[1][:, at]
        products = self._products[:, at] - before[0].T @ before[2][:, at] - before[2].T @ before[0][:, at]
        taken = torch.linalg.solve(columns[at], columns.T).T
        halves = products - taken @ products[at] / 2
        by_block = [part.reshape(-1, self._width, self._width) for part in (taken, columns, halves)]
        self._inverse_blocks -= by_block[0] @ by_block[1].mT
        cross = by_block[2] @ by_block[0].mT
        self._product_blocks -= cross + cross.mT
        self._inverse_blocks[block] = torch.eye(self._width).to(columns)  # only rounding is left there
        here = slice(self._gone, self._gone + self._width)
        self._taken[here], self._columns[here], self._halves[here] = taken.T, columns.T, halves.T
        self._gone += self._width


def choose_blocks(losses: Losses, kept: int, *, together: int = 1, groups: int | None = None) -> Tensor:
    """The blocks that stay, bool (blocks,), exactly `kept` of them, dropped one at a time from all.

    Args:
        losses: none dropped yet.
        kept: how many stay.
        together: so many consecutive blocks are a group, as query heads with one key/value head are.
        groups: the most groups that the kept ones may lie in; by default as many as there are.

    Raises:
        ValueError: where so many cannot be kept in so many groups.
    """
    alive = torch.ones_like(losses.scores(), dtype=torch.bool)
    blocks = len(alive)
    groups = blocks // together if groups is None else groups
    if blocks % together or not 0 <= kept <= groups * together <= blocks:
        raise ValueError(f"cannot keep {kept} of {blocks} blocks in {groups} groups of {together}")
    for _ in range(blocks - kept):
        allowed = alive & _droppable(alive.view(-1, together).sum(1), kept, groups).repeat_interleave(together)
        block = int(losses.scores().where(allowed, torch.inf).argmin())
        losses.drop(block)
        alive[block] = False
    return alive


def refit_columns(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """Values (out, in) on whole columns, nearest to the weight in the metric of the Gram: ``W G_:K (G_KK)^-1``, zero elsewhere.

    All rows have one support, so that one factorisation serves them.

    Args:
        weight: (out, in), any float dtype; computed with in float64.
        gram: (in, in), positive definite: see `damped`. What is added to it cannot make the error in the metric of the
            Gram without it larger than that of the kept columns as they stand.
        kept: bool (in,).
    """
    wide, gram = weight.double(), gram.double()
    moved = wide[:, ~kept] @ gram[~kept][:, kept]
    lower = torch.linalg.cholesky(gram[kept][:, kept])
    values = torch.zeros_like(wide)
    values[:, kept] = wide[:, kept] + torch.cholesky_solve(moved.T, lower).T
    return values.to(weight.dtype)


def damped(gram: Tensor, damping: float) -> Tensor:
    """The Gram (in, in), float64, with a share of its mean diagonal added to its diagonal, made positive definite.

    `rounding.FLOOR` of the trace is added where `damping` is too little.

    Raises:
        ValueError: where the Gram is not finite, or not positive semi-definite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the Gram has entries that are not finite; the calibration activations overflowed")
    trace = gram.trace().double()
    for added in (damping * trace / len(gram), FLOOR * trace):
        found = gram.double().clone()
        found.diagonal().add_(added)
        if not torch.linalg.cholesky_ex(found).info:
            return found
    raise ValueError("the Gram is not positive semi-definite; pass X^T X of the inputs, summed in float64")


def _droppable(sizes: Tensor, kept: int, groups: int) -> Tensor:
    """From which groups, bool (groups,), one block may go so that in the end `kept` blocks lie in at most `groups` groups.

    Groups have to be emptied as long as there are too many; the smallest take the fewest drops. Where these take all the drops
    that there are, the next one is due in one of them.
    """
    standing = sizes[sizes > 0].sort().values
    due = standing[: max(0, len(standing) - groups)]
    if int(standing.sum() - due.sum()) > kept:
        return sizes > 0
    return (sizes > 0) & (sizes <= due[-1])


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """The blocks (n, width, width) on the diagonal of a matrix."""
    blocks = len(matrix) // width
    return matrix.view(blocks, width, blocks, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _checked(weight: Tensor, gram: Tensor, width: int) -> Tensor:
    """The weight in float64."""
    cols = weight.shape[1]
    if gram.shape != (cols, cols):
        raise ValueError(f"a Gram {tuple(gram.shape)} does not fit a weight {tuple(weight.shape)}")
    if width < 1 or cols % width:
        raise ValueError(f"{cols} columns are not whole blocks of {width}")
    return weight.double()
