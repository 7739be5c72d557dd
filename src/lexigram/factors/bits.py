"""Packing of fixed-width unsigned integers into bytes, least significant bit first. Knows no matrices.

Integers are handled in the smallest group that fills whole bytes (14-bit values: 4 in 7 bytes), each as one int64:
two shifts a value instead of one a bit. Widths that divide a byte stay in bytes throughout: a mask or the integers of a
weight are as many as the weight's entries, and int64 copies of them would be many times its size.
"""

import math

import torch
from torch import Tensor

_BYTE = 8
# A group must fit into an int64, and a value into the int32 that it is unpacked to.
_WIDTHS = tuple(b for b in range(1, 32) if b // math.gcd(b, _BYTE) < _BYTE)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` integers of `bits` bits take when packed without gaps (the last byte is padded)."""
    return (count * bits + _BYTE - 1) // _BYTE


def narrowest_width(largest: int) -> int:
    """The fewest bits in which integers from 0 to `largest` can be packed.

    Raises:
        ValueError: where that is more than can be packed.
    """
    for bits in _WIDTHS:
        if largest < 1 << bits:
            return bits
    raise ValueError(f"cannot pack values up to {largest}; the widest are of {_WIDTHS[-1]} bits")


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack unsigned integers below ``2**bits``.

    Args:
        values: integers or bool, any shape, read in row-major order.
        bits: width of a value: 1 to 8, 10, 12, 14, 16, 20, 24 or 28.

    Returns:
        uint8 of shape (packed_bytes(values.numel(), bits),).

    Raises:
        ValueError: for another width.
    """
    group, group_bytes = _group(bits)
    if group_bytes == 1:
        parts = torch.nn.functional.pad(values.reshape(-1).to(torch.uint8), (0, -values.numel() % group))
        weights = (1 << _places(group, bits, values.device)).to(torch.uint8)
        return (parts.view(-1, group) * weights).sum(dim=1, dtype=torch.uint8)
    flat = values.reshape(-1).to(torch.int64)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % group))
    words = (flat.view(-1, group) << _places(group, bits, flat.device)).sum(dim=1)
    stream = (words.unsqueeze(1) >> _places(group_bytes, _BYTE, flat.device)) & 0xFF
    return stream.to(torch.uint8).reshape(-1)[: packed_bytes(values.numel(), bits)].clone()


def unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """Undo `pack_bits`.

    Args:
        packed: uint8 of shape (packed_bytes(count, bits),).
        count: how many integers to read.
        bits: as in `pack_bits`.

    Returns:
        (count,): bool at 1 bit, uint8 up to 8 bits, else int32.
    """
    group, group_bytes = _group(bits)
    if group_bytes == 1:
        places = _places(group, bits, packed.device).to(torch.uint8)
        parts = ((packed.unsqueeze(1) >> places) & ((1 << bits) - 1)).reshape(-1)[:count]
        return parts.view(torch.bool) if bits == 1 else parts
    stream = torch.nn.functional.pad(packed, (0, -packed.numel() % group_bytes)).view(-1, group_bytes)
    words = torch.zeros(stream.shape[0], dtype=torch.int64, device=packed.device)
    for byte in range(group_bytes):
        words |= stream[:, byte].to(torch.int64) << (byte * _BYTE)
    values = (words.unsqueeze(1) >> _places(group, bits, packed.device)) & ((1 << bits) - 1)
    return values.to(torch.uint8 if bits <= _BYTE else torch.int32).reshape(-1)[:count]


def _group(bits: int) -> tuple[int, int]:
    """How many values of `bits` bits fill how many whole bytes."""
    if bits not in _WIDTHS:
        raise ValueError(f"cannot pack values of {bits} bits; the widths are {', '.join(map(str, _WIDTHS))}")
    common = math.gcd(bits, _BYTE)
    return _BYTE // common, bits // common


def _places(count: int, bits: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device, dtype=torch.int64) * bits
