"""Where the stored blocks of a sparse matrix stand, packed: one bit a block, or the block-columns as a list.

A matrix is cut into blocks of one shape; whole blocks are stored or left out, block-rows from the top and each from the left.
Blocks of 1 x 1 are single entries. Nothing here knows a codec: an index names its tensors, packs a table of what is kept,
and puts decoded blocks into their places. A new one is a class here and an entry in `INDICES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lexigram.factors.bits import narrowest_width, pack_bits, packed_bytes, unpack_bits
from lexigram.factors.codecs import StoredTensor


def in_blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """A view of `matrix` (rows, cols) as (block-rows, block-columns, block's rows, block's columns).

    Indexed by a table of kept blocks, it gives their values in the order in which they are stored.
    """
    return matrix.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).transpose(1, 2)


@dataclass(frozen=True)
class Index(ABC):
    """The places of `count` blocks of shape `block` in a table of `rows` x `cols` blocks."""

    rows: int
    cols: int
    block: tuple[int, int]
    count: int

    @abstractmethod
    def stored(self) -> dict[str, StoredTensor]:
        """The tensors that hold it."""

    @abstractmethod
    def encode(self, kept: Tensor) -> dict[str, Tensor]:
        """Pack a bool table (rows, cols) of which `count` blocks are stored."""

    @abstractmethod
    def place(self, tensors: Mapping[str, Tensor], values: Tensor, blocks: Tensor) -> None:
        """Write `values` (count, *block), as stored, to their places in `blocks` (rows, cols, *block), a view of the matrix."""

    @abstractmethod
    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError where tensors of the right sizes do not tell `count` places."""

    @property
    def _wanted(self) -> str:
        height, width = self.block
        return f"for {self.count * height * width} stored values in blocks of {height} x {width}"


class Bitmask(Index):
    """One bit for every block of the table."""

    def stored(self) -> dict[str, StoredTensor]:
        """See `Index.stored`."""
        return {"mask": StoredTensor(torch.uint8, (packed_bytes(self.rows * self.cols, 1),))}

    def encode(self, kept: Tensor) -> dict[str, Tensor]:
        """See `Index.encode`."""
        return {"mask": pack_bits(kept, 1)}

    def place(self, tensors: Mapping[str, Tensor], values: Tensor, blocks: Tensor) -> None:
        """See `Index.place`."""
        kept = self._kept(tensors)
        if self.block == (1, 1):  # the positions of single entries would weigh several times the matrix
            blocks.masked_scatter_(kept[:, :, None, None], values)
        else:  # whole blocks are copied at once
            blocks[kept] = values

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Index.check`."""
        found = int(self._kept(tensors).sum())
        if found != self.count:
            raise ValueError(f"the mask has {found} bits set {self._wanted}")

    def _kept(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return unpack_bits(tensors["mask"], self.rows * self.cols, 1).view(self.rows, self.cols)


class ColumnList(Index):
    """The block-column of every stored block, and how many there are in each block-row; lighter than bits where few are."""

    def stored(self) -> dict[str, StoredTensor]:
        """See `Index.stored`."""
        return {
            "columns": StoredTensor(torch.uint8, (packed_bytes(self.count, self._column_bits),)),
            "counts": StoredTensor(torch.uint8, (packed_bytes(self.rows, self._count_bits),)),
        }

    def encode(self, kept: Tensor) -> dict[str, Tensor]:
        """See `Index.encode`."""
        return {
            "columns": pack_bits(kept.nonzero()[:, 1], self._column_bits),
            "counts": pack_bits(kept.sum(dim=1), self._count_bits),
        }

    def place(self, tensors: Mapping[str, Tensor], values: Tensor, blocks: Tensor) -> None:
        """See `Index.place`."""
        columns, counts = self._unpacked(tensors)
        blocks[self._rows_of(counts), columns] = values

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Index.check`; block-columns must increase along a block-row, so that no block stands twice."""
        columns, counts = self._unpacked(tensors)
        if int(counts.sum()) != self.count:
            raise ValueError(f"the counts add up to {int(counts.sum())} blocks {self._wanted}")
        if bool((columns >= self.cols).any()):
            raise ValueError(f"column number {int(columns.max())} is beyond the {self.cols} block-columns")
        rows = self._rows_of(counts)
        falls = ((rows * self.cols + columns).diff() <= 0).nonzero()
        if len(falls):
            raise ValueError(f"the column numbers of block-row {int(rows[falls[0]])} do not increase")

    @property
    def _column_bits(self) -> int:
        return narrowest_width(self.cols - 1)

    @property
    def _count_bits(self) -> int:
        return narrowest_width(self.cols)

    def _unpacked(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The block-columns (count,) and their number in every block-row (rows,), int64: narrower ones would index as masks."""
        columns = unpack_bits(tensors["columns"], self.count, self._column_bits)
        return columns.long(), unpack_bits(tensors["counts"], self.rows, self._count_bits).long()

    def _rows_of(self, counts: Tensor) -> Tensor:
        """The block-row of every stored block, (count,); the length is told so that a device need not be waited for."""
        return torch.arange(self.rows, device=counts.device).repeat_interleave(counts, output_size=self.count)


IndexName = Literal["bitmask", "list"]
INDICES: dict[IndexName, type[Index]] = {"bitmask": Bitmask, "list": ColumnList}


def index_prices(name: IndexName, rows: int, cols: int) -> tuple[int, float]:
    """What an index of single entries takes whatever it holds, in bytes, and what each entry adds, in bits on average."""
    none, every = (
        sum(tensor.bytes for tensor in INDICES[name](rows, cols, (1, 1), count).stored().values())
        for count in (0, rows * cols)
    )
    return none, 8 * (every - none) / (rows * cols)
