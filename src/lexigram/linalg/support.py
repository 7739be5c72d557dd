"""Which entries of a matrix may be kept: patterns, and exactly as many entries as were asked for.

Here scores become masks. Where the scores come from, and what the kept entries are worth, is the business of `surgeon` and
`pruning`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lexigram.linalg.selection import keep_largest


@dataclass(frozen=True)
class Pattern:
    """Where entries may be kept: anywhere. The other patterns say what they restrict.

    Two rules hold for all: `width` consecutive columns, from a multiple of it on, belong together, and entries are
    kept `grain` at a time.
    """

    @property
    def width(self) -> int:
        """How many consecutive columns belong together."""
        return 1

    @property
    def fixed(self) -> bool:
        """Whether every group keeps the same number, so that it can be chosen by itself."""
        return False

    def grain(self, shape: tuple[int, int]) -> int:
        """The number of which every total of kept entries is a multiple."""
        return 1

    def total(self, shape: tuple[int, int], kept: int | None) -> int:
        """`kept`, or the only number that there is.

        Raises:
            ValueError: where a matrix of this shape cannot have so many entries, or the shape does not fit the pattern.
        """
        rows, cols = shape
        if cols % self.width:
            raise ValueError(f"{cols} columns are not whole groups of {self.width}; choose another pattern")
        if kept is None:
            raise ValueError("the pattern does not tell how many entries are kept; say how many")
        grain = self.grain(shape)
        if not 0 <= kept <= rows * cols or kept % grain:
            raise ValueError(
                f"cannot keep {kept} entries of {rows} x {cols}; choose a multiple of {grain} up to {rows * cols}"
            )
        return kept

    def choose(self, scores: Tensor, kept: int) -> Tensor:
        """Mask, bool (n, w), with exactly `kept` entries True where the `scores` (n, w) are largest.

        `scores` are finite and not negative; of groups they are added up. Equal ones are resolved for the first entry.
        """
        return keep_largest(scores.reshape(1, -1), kept).reshape(scores.shape)


@dataclass(frozen=True)
class Rows(Pattern):
    """Equally many in every row."""

    def grain(self, shape: tuple[int, int]) -> int:
        """See `Pattern.grain`."""
        return max(1, shape[0])

    def choose(self, scores: Tensor, kept: int) -> Tensor:
        """See `Pattern.choose`."""
        return keep_largest(scores, kept // max(1, len(scores)))


@dataclass(frozen=True)
class Consecutive(Pattern):
    """`keep` of every `of` consecutive columns of a row: 2 of 4 is what sparse tensor cores compute with."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= self.of or self.of < 1:
            raise ValueError(f"cannot keep {self.keep} of every {self.of} entries")

    @property
    def width(self) -> int:
        """See `Pattern.width`."""
        return self.of

    @property
    def fixed(self) -> bool:
        """See `Pattern.fixed`."""
        return True

    def total(self, shape: tuple[int, int], kept: int | None) -> int:
        """See `Pattern.total`."""
        only = shape[0] * shape[1] // self.of * self.keep
        found = super().total(shape, only if kept is None else kept)
        if found != only:
            raise ValueError(f"{self.keep} of every {self.of} entries are {only}, not {found}; leave the number out")
        return found

    def choose(self, scores: Tensor, kept: int) -> Tensor:
        """See `Pattern.choose`."""
        groups = scores.reshape(-1, self.of)
        # So short a group is ordered by comparing all pairs; the earlier of two equal ones comes first.
        first = torch.ones(self.of, self.of, dtype=torch.bool, device=scores.device).tril(-1)
        mine, other = groups[:, :, None], groups[:, None, :]
        before = (other > mine) | ((other == mine) & first)
        return (before.sum(2) < self.keep).reshape(scores.shape)


@dataclass(frozen=True)
class Tiles(Pattern):
    """Whole tiles of `rows` x `cols` entries, the tiles anywhere."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"a tile of {self.rows} x {self.cols} has no entries")

    @property
    def width(self) -> int:
        """See `Pattern.width`."""
        return self.cols

    def grain(self, shape: tuple[int, int]) -> int:
        """See `Pattern.grain`."""
        return self.rows * self.cols

    def total(self, shape: tuple[int, int], kept: int | None) -> int:
        """See `Pattern.total`."""
        if shape[0] % self.rows:
            raise ValueError(f"{shape[0]} rows are not whole tiles of {self.rows}; choose another pattern")
        return super().total(shape, kept)

    def choose(self, scores: Tensor, kept: int) -> Tensor:
        """See `Pattern.choose`."""
        down, across = scores.shape[0] // self.rows, scores.shape[1] // self.cols
        sums = scores.reshape(down, self.rows, across, self.cols).sum((1, 3))
        mask = keep_largest(sums.view(1, -1), kept // (self.rows * self.cols)).view(down, 1, across, 1)
        return mask.expand(down, self.rows, across, self.cols).reshape(scores.shape)


ANYWHERE = Pattern()
"""No restriction: so many entries of the whole matrix."""


def wanda(weight: Tensor, gram: Tensor, kept: int | None = None, pattern: Pattern | None = None) -> Tensor:
    """The support, bool (out, in), of the largest ``|W_ij| sqrt(G_jj)`` (Sun et al., arXiv 2306.11695).

    Published with equally many entries in every row, which is the default; `ANYWHERE` compares them over the whole matrix.

    Args:
        weight: (out, in), any float dtype.
        gram: (in, in); of its entries only the diagonal counts.
        kept: how many entries in all; the pattern may tell.
        pattern: by default `Rows`.

    Raises:
        ValueError: see `Pattern.total`.
    """
    pattern = Rows() if pattern is None else pattern
    kept = pattern.total((weight.shape[0], weight.shape[1]), kept)
    return pattern.choose(weight.float().square() * gram.diagonal().clamp_min(0).float(), kept)
