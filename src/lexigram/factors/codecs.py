"""How values are stored: a codec turns floats into integer tensors and back. Knows no masks and no matrices.

Everything stored is an integer tensor, bf16 included (as its bit pattern), so that no cast of the surrounding model
(``model.float()``, ``model.half()``, ``from_pretrained(dtype=...)``) can touch stored values: a model that was moved
between dtypes saves the same bytes that were loaded.

A codec is a frozen pydantic model and so is its own description in a checkpoint. A new one is one class here and one
entry in `Codec`; its tensors may have any size as long as `stored` tells it: a code of variable length, whose size is known
only after fitting, carries its byte count as a field, so that `stored` tells it like any other.

All codecs share one interface: `stored`, `grid` (choose the storable values), `round` (to the nearest of them), `encode`,
`decode`, `bits_per_value` and `describe`. A method that rounds value after value asks for the grid once, rounds in it as
it likes and encodes in the same grid, which then changes nothing. `stored_grid` gives the grid of what is stored, once a
group, and `spread` one entry a value of it: training moves both.
"""

from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lexigram.factors.bits import pack_bits, packed_bytes, unpack_bits

_SHRINKS = [1 - 0.04 * step for step in range(1, 16)]  # 0.96 to 0.4: 2 bits want to clip most, at half of the range
_NOT_FINITE = "a value to be stored is not finite in bfloat16; look for NaN or huge weights"
_CHUNK = 2**18  # values searched at a time: a search goes over them many times, so they should stay in the cache


class StoredTensor(NamedTuple):
    """The dtype and shape of one tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it weighs in a file, header aside."""
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


class Grid(NamedTuple):
    """What each of a tensor of values can be rounded to: ``scale * (q - zero)`` for the integers ``q`` of the codec.

    Both have the shape of the values, though a whole group of these shares one pair. `scale` is bfloat16, as stored, `zero`
    uint8. Neither is there for a codec whose storable values are always the same.
    """

    scale: Tensor | None = None
    zero: Tensor | None = None

    def at(self, index: Any) -> "Grid":
        """The grid of ``values[index]``."""
        return Grid(*(None if tensor is None else tensor[index] for tensor in self))


class Bfloat(BaseModel):
    """bfloat16, or its `bits` highest bits (sign, 8 exponent bits, mantissa).

    At 14 bits this is the coefficient quantisation of CoSpaDi, whose two dropped mantissa bits pay for the bitmask when
    k/s = 2. The paper truncates; we round to nearest, ties to even, which halves the largest error at the same size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["bfloat"] = "bfloat"
    bits: Literal[10, 12, 14, 16] = 16

    @property
    def bits_per_value(self) -> float:
        """Stored bits of a value among many."""
        return float(self.bits)

    def describe(self) -> str:
        """Its name in a table."""
        return "bf16" if self.bits == 16 else f"{self.bits}-bit"

    def stored(self, count: int) -> dict[str, StoredTensor]:
        """The tensors that hold `count` values: int16 at 16 bits, else packed bytes."""
        if self.bits == 16:
            return {"values": StoredTensor(torch.int16, (count,))}
        return {"values": StoredTensor(torch.uint8, (packed_bytes(count, self.bits),))}

    def grid(self, values: Tensor, importance: Tensor | None = None, *, clip: bool = True) -> Grid:
        """Nothing: the storable values are the same everywhere."""
        return Grid()

    def round(self, values: Tensor, grid: Grid) -> Tensor:
        """The nearest storable values, in the shape and dtype of `values`."""
        return (self._rounded(values) << (32 - self.bits)).view(torch.float32).to(values.dtype)

    def encode(self, values: Tensor, grid: Grid | None = None) -> dict[str, Tensor]:
        """Round a float tensor of any shape, read in row-major order, to the tensors named by `stored`.

        Raises:
            ValueError: where a value is not finite or rounds to infinity.
        """
        flat = values.reshape(-1).to(torch.float32)
        rounded = self._rounded(flat)
        exponent = (rounded >> (self.bits - 9)) & 0xFF
        # Rounding can carry a finite value to infinity, and a NaN of all ones past it to zero: both ends are looked at.
        if bool((exponent == 0xFF).any()) or not bool(torch.isfinite(flat).all()):
            raise ValueError(_NOT_FINITE)
        if self.bits == 16:
            return {"values": rounded.to(torch.int16)}
        return {"values": pack_bits(rounded & ((1 << self.bits) - 1), self.bits)}

    def decode(self, tensors: dict[str, Tensor], count: int, dtype: torch.dtype) -> Tensor:
        """The `count` stored values as a flat tensor of `dtype`."""
        stored = tensors["values"]
        if self.bits < 16:
            stored = (unpack_bits(stored, count, self.bits) << (16 - self.bits)).to(torch.int16)
        return stored.view(torch.bfloat16).to(dtype)

    def stored_grid(self, tensors: dict[str, Tensor]) -> Grid:
        """Nothing, as `grid`."""
        return Grid()

    def spread(self, grid: Grid, count: int) -> Grid:
        """Nothing, as `grid`."""
        return grid

    def _rounded(self, values: Tensor) -> Tensor:
        """The bit patterns of the nearest storable values in the lowest bits of int32, the sign repeated above them."""
        drop = 32 - self.bits
        pattern = values.to(torch.float32).contiguous().view(torch.int32)
        odd = (pattern >> drop) & 1
        return (pattern + ((1 << (drop - 1)) - 1) + odd) >> drop


class Integer(BaseModel):
    """Integers ``q`` of `bits` bits that stand for ``scale * (q - zero)``, one pair of scale and zero a group.

    A group is a run of `group` stored values in row-major order; the last may be shorter. Scales are bfloat16, zeros integers
    of `bits` bits, so that the value 0 can always be stored exactly. A `symmetric` grid has the middle integer as its zero
    and stores none. It has one step more below zero than above; a negative scale turns it round.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["integer"] = "integer"
    bits: Literal[2, 3, 4, 6, 8]
    group: Annotated[int, Field(ge=1, le=2**24)] = 128
    symmetric: bool = False

    @property
    def bits_per_value(self) -> float:
        """Stored bits of a value among many, its share of scale and zero included."""
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / self.group

    def describe(self) -> str:
        """Its name in a table."""
        return f"int{self.bits}"

    def stored(self, count: int) -> dict[str, StoredTensor]:
        """The tensors that hold `count` values: packed integers, scales as bfloat16 patterns, packed zeros if any."""
        groups = -(-count // self.group)
        tensors = {
            "values": StoredTensor(torch.uint8, (packed_bytes(count, self.bits),)),
            "scales": StoredTensor(torch.int16, (groups,)),
        }
        if not self.symmetric:
            tensors["zeros"] = StoredTensor(torch.uint8, (packed_bytes(groups, self.bits),))
        return tensors

    def grid(self, values: Tensor, importance: Tensor | None = None, *, clip: bool = True) -> Grid:
        """Choose the scales and zeros for a float tensor of any shape, read in row-major order.

        The grid of a group spans its values, or a share of that span: with `clip` the share, out of 16, with the least
        squared rounding error.

        Args:
            values: any shape and float dtype.
            importance: non-negative weights of the squared errors, broadcastable to `values`; by default all equal.
            clip: False for the whole span (min-max, or the largest absolute value).

        Raises:
            ValueError: where a value is not finite, or so large that it would round to infinity.
        """
        flat = _finite(values)
        width = self._width(flat.numel())
        blocks = _grouped(flat, width)
        if importance is None:
            weights = torch.ones((), device=flat.device).expand(blocks.shape)
        else:
            weights = _grouped(importance.to(flat).expand(values.shape).reshape(-1), width)
        rows = max(1, _CHUNK // width)
        pairs = [
            self._chosen(block, weight, clip)
            for block, weight in zip(blocks.split(rows), weights.split(rows), strict=True)
        ]
        scale, zero = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        reach = torch.maximum(zero, self._steps - zero) * scale.float()
        if not bool(torch.isfinite(reach).all()):
            raise ValueError(_NOT_FINITE)
        return Grid(*(_spread(part, width, flat.numel()).view(values.shape) for part in (scale, zero)))

    def round(self, values: Tensor, grid: Grid) -> Tensor:
        """The nearest values in `grid`, which has the shape of `values`, in their shape and dtype."""
        work = values if values.dtype == torch.float64 else values.float()
        return self._rounded(work, *_scale_and_zero(grid)).to(values.dtype)

    def encode(self, values: Tensor, grid: Grid | None = None) -> dict[str, Tensor]:
        """Round a float tensor of any shape, read in row-major order, to the tensors named by `stored`.

        Args:
            values: any shape and float dtype.
            grid: of as many values in the same order; by default that of `grid`.

        Raises:
            ValueError: where a value is not finite, or the grid is that of other values.
        """
        flat = _finite(values)
        scale, zero = (part.reshape(-1) for part in _scale_and_zero(grid or self.grid(values)))
        firsts = scale[:: self.group].clone(), zero[:: self.group].clone()
        for given, first in zip((scale, zero), firsts, strict=True):
            if not torch.equal(given, _spread(first, self._width(flat.numel()), flat.numel())):
                raise ValueError(
                    f"the grid does not fit {flat.numel()} values in groups of {self.group}; take it from the same values, "
                    "in the order in which they are stored"
                )
        integers = self._steps_from_zero(flat, scale, zero).add_(zero)
        tensors = {"values": pack_bits(integers, self.bits), "scales": firsts[0].view(torch.int16)}
        if not self.symmetric:
            tensors["zeros"] = pack_bits(firsts[1], self.bits)
        return tensors

    def decode(self, tensors: dict[str, Tensor], count: int, dtype: torch.dtype) -> Tensor:
        """The `count` stored values as a flat tensor of `dtype`."""
        # Differences of 8-bit integers are exact in bfloat16, so its product is rounded once, as that of float32 would be.
        work = dtype if dtype == torch.bfloat16 else torch.float32
        scale = tensors["scales"].view(torch.bfloat16).to(work)
        integers = unpack_bits(tensors["values"], count, self.bits).to(work)
        blocks = _grouped(integers, self._width(count))
        if self.symmetric:
            blocks = blocks - self._middle
        else:
            blocks = blocks - unpack_bits(tensors["zeros"], len(scale), self.bits).to(work)[:, None]
        return blocks.mul_(scale[:, None]).reshape(-1)[:count].to(dtype)

    def stored_grid(self, tensors: dict[str, Tensor]) -> Grid:
        """The scales (bfloat16) and zeros (uint8) of stored values, (groups,) each."""
        scale = tensors["scales"].view(torch.bfloat16)
        if self.symmetric:
            return Grid(scale, torch.full_like(scale, self._middle, dtype=torch.uint8))
        return Grid(scale, unpack_bits(tensors["zeros"], len(scale), self.bits))

    def spread(self, grid: Grid, count: int) -> Grid:
        """Scales and zeros of groups, in any dtype, as those of each of `count` values; differentiable in the scales."""
        scale, zero = _scale_and_zero(grid)
        return Grid(*(_spread(part, self._width(count), count) for part in (scale, zero)))

    @property
    def _steps(self) -> int:
        return 2**self.bits - 1

    @property
    def _middle(self) -> int:
        return 2 ** (self.bits - 1)

    def _width(self, count: int) -> int:
        """The size of a group without what it has over the values."""
        return max(1, min(self.group, count))

    def _chosen(self, blocks: Tensor, weights: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero (groups,) of blocks (groups, width), padded with zeros: all grids contain 0."""
        low, high = blocks.amin(1).clamp_max(0), blocks.amax(1).clamp_min(0)
        scale, zero = self._spanning(low, high)
        if not clip:
            return scale, zero
        least = self._error(blocks, weights, scale, zero)
        for shrink in _SHRINKS:
            narrow_scale, narrow_zero = self._spanning(low * shrink, high * shrink)
            error = self._error(blocks, weights, narrow_scale, narrow_zero)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, narrow_scale, scale), torch.where(better, narrow_zero, zero)
        return scale, zero

    def _spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The grids from ``low <= 0`` to ``high >= 0``, their scales rounded as they are stored.

        In a symmetric grid the end that is farther from 0 gets the additional step, and the other end may lie half a step
        beyond its last value.
        """
        if self.symmetric:
            far, near = torch.maximum(-low, high), torch.minimum(-low, high)
            scale = torch.maximum(far / self._middle, near / (self._middle - 0.5))
            scale = torch.where(-low >= high, scale, -scale).bfloat16()
            return scale, torch.full_like(scale, self._middle, dtype=torch.uint8)
        scale = (high / self._steps - low / self._steps).bfloat16()
        return scale, _ratio(-low, scale).round_().clamp_(0, self._steps).to(torch.uint8)

    def _error(self, blocks: Tensor, weights: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The weighted squared rounding error of every group, (groups,)."""
        error = self._rounded(blocks, scale[:, None], zero[:, None]).sub_(blocks)
        return torch.linalg.vecdot(error.square_(), weights)

    def _rounded(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return self._steps_from_zero(values, scale, zero).mul_(scale)

    def _steps_from_zero(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The integers ``q - zero`` of the nearest storable values, in the dtype of `values`."""
        below = -zero.to(values.dtype)
        return _ratio(values, scale).round_().clamp_(below, below + self._steps)


Codec = Annotated[Bfloat | Integer, Field(discriminator="name")]


def group_size(cols: int, wanted: int) -> int:
    """The largest group of at most `wanted` values that divides a row of `cols`, so that none reaches into the next row."""
    return next(size for size in range(min(cols, wanted), 0, -1) if cols % size == 0)


def _finite(values: Tensor) -> Tensor:
    """The values flat in float32; see `Integer.encode` for what is raised."""
    flat = values.reshape(-1).to(torch.float32)
    if not bool(torch.isfinite(flat).all()):
        raise ValueError(_NOT_FINITE)
    return flat


def _scale_and_zero(grid: Grid) -> tuple[Tensor, Tensor]:
    assert grid.scale is not None
    assert grid.zero is not None
    return grid.scale, grid.zero


def _ratio(values: Tensor, scale: Tensor) -> Tensor:
    """``values / scale``, and 0 where the scale is: of a group of zeros, or of values too small for any scale."""
    return torch.where(scale != 0, values / scale, 0.0)


def _grouped(flat: Tensor, width: int) -> Tensor:
    """Rows of `width` values, the last one filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % width)).view(-1, width)


def _spread(of_groups: Tensor, width: int, count: int) -> Tensor:
    """One entry a group as one entry a value, (count,)."""
    return of_groups[:, None].expand(-1, width).reshape(-1)[:count]
