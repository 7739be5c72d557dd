"""How values are stored: a codec turns floats into integer tensors and back. Knows no masks and no matrices.

Everything stored is an integer tensor, bf16 included (as its bit pattern), so that no cast of the surrounding model
(``model.float()``, ``model.half()``, ``from_pretrained(dtype=...)``) can touch stored values: a model that was moved
between dtypes saves the same bytes that were loaded.

A codec is a frozen pydantic model and so is its own description in a checkpoint. A new one is one class here and one
entry in `Codec`; its tensors may have any size as long as `stored` tells it.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from lexigram.factors.bits import pack_bits, packed_bytes, unpack_bits


class StoredTensor(NamedTuple):
    """The dtype and shape of one tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it weighs in a file, header aside."""
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


class Bfloat(BaseModel):
    """bfloat16, or its `bits` highest bits (sign, 8 exponent bits, mantissa).

    At 14 bits this is the coefficient quantisation of CoSpaDi, whose two dropped mantissa bits pay for the bitmask when
    k/s = 2. The paper truncates; we round to nearest, ties to even, which halves the largest error at the same size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["bfloat"] = "bfloat"
    bits: Literal[10, 12, 14, 16] = 16

    def stored(self, count: int) -> dict[str, StoredTensor]:
        """The tensors that hold `count` values: int16 at 16 bits, else packed bytes."""
        if self.bits == 16:
            return {"values": StoredTensor(torch.int16, (count,))}
        return {"values": StoredTensor(torch.uint8, (packed_bytes(count, self.bits),))}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """Round a float tensor of any shape, read in row-major order, to the tensors named by `stored`.

        Raises:
            ValueError: where a value is not finite or rounds to infinity.
        """
        drop = 32 - self.bits
        flat = values.reshape(-1).to(torch.float32).contiguous()
        pattern = flat.view(torch.int32)
        odd = (pattern >> drop) & 1
        rounded = (pattern + ((1 << (drop - 1)) - 1) + odd) >> drop
        exponent = (rounded >> (self.bits - 9)) & 0xFF
        # Rounding can carry a finite value to infinity, and a NaN of all ones past it to zero: both ends are looked at.
        if bool((exponent == 0xFF).any()) or not bool(torch.isfinite(flat).all()):
            raise ValueError("a value to be stored is not finite in bfloat16; look for NaN or huge weights")
        if self.bits == 16:
            return {"values": rounded.to(torch.int16)}
        return {"values": pack_bits(rounded & ((1 << self.bits) - 1), self.bits)}

    def decode(self, tensors: dict[str, Tensor], count: int, dtype: torch.dtype) -> Tensor:
        """The `count` stored values as a flat tensor of `dtype`."""
        stored = tensors["values"]
        if self.bits < 16:
            stored = (unpack_bits(stored, count, self.bits) << (16 - self.bits)).to(torch.int16)
        return stored.view(torch.bfloat16).to(dtype)


Codec = Bfloat
