"""Bit packing, codecs and the algebra of stored matrices, against oracles that know nothing of them.

The oracles: `numpy.packbits` and a stream of bits in pure Python for packing, torch's own bfloat16 for 16 bits, for fewer
bits the neighbours of a value in the complete, sorted list of what can be stored, and for integers all of that list; for the
places and the order of stored blocks, `scipy.sparse.bsr_array`.
"""

import copy
import io
import itertools
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lexigram.factors import (
    Bfloat,
    Codec,
    Dense,
    DenseSpec,
    Factor,
    Grid,
    GroupSpec,
    Integer,
    Product,
    ProductSpec,
    Shared,
    SharedSpec,
    Sparse,
    SparseSpec,
    Sum,
    SumSpec,
    empty,
    encode,
    factor_spec,
    group_size,
    in_blocks,
)
from lexigram.factors.bits import narrowest_width, pack_bits, packed_bytes, unpack_bits

WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]
CODEC_WIDTHS = [10, 12, 14, 16]

quick = settings(max_examples=60, deadline=None)


# --- packing -----------------------------------------------------------------------------------------------------


def bit_stream(values: list[int], bits: int) -> bytes:
    """The definition: one long number, the first value in its lowest bits, written little-endian."""
    number = sum(value << (index * bits) for index, value in enumerate(values))
    return number.to_bytes((len(values) * bits + 7) // 8, "little")


@st.composite
def integers_of_a_width(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.sampled_from(WIDTHS))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), bits


@quick
@given(integers_of_a_width())
def test_packing_is_the_bit_stream_and_comes_back(case: tuple[list[int], int]) -> None:
    values, bits = case
    packed = pack_bits(torch.tensor(values, dtype=torch.int32), bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(len(values), bits)
    assert bytes(packed.tolist()) == bit_stream(values, bits)
    assert unpack_bits(packed, len(values), bits).tolist() == values


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 4095, 4096, 4097])
def test_packing_of_every_width_and_awkward_counts(bits: int, count: int) -> None:
    values = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count))
    values[-1:] = 2**bits - 1  # the largest value in the last, padded byte
    packed = pack_bits(values, bits)
    assert bytes(packed.numpy()) == bit_stream(values.tolist(), bits)
    assert torch.equal(unpack_bits(packed, count, bits).to(torch.int64), values)


def test_one_bit_is_numpy_packbits() -> None:
    mask = torch.rand(13, 37, generator=torch.Generator().manual_seed(0)) < 0.4
    packed = pack_bits(mask, 1)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), bitorder="little"))
    back = unpack_bits(packed, mask.numel(), 1)
    assert back.dtype == torch.bool
    assert torch.equal(back.view(mask.shape), mask)


def test_packing_reads_a_transposed_matrix_row_by_row() -> None:
    matrix = torch.arange(35).view(5, 7).T
    assert unpack_bits(pack_bits(matrix, 6), 35, 6).tolist() == matrix.reshape(-1).tolist()


@pytest.mark.parametrize("bits", [0, 9, 11, 13, 15, 17, 18, 22, 26, 30, 32])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits"):
        pack_bits(torch.zeros(4, dtype=torch.int64), bits)


def test_the_narrowest_width_is_the_first_that_holds_the_largest() -> None:
    for largest in [*range(70), *(2**bits + step for bits in range(7, 28) for step in (-1, 0, 1)), 2**28 - 1]:
        assert narrowest_width(largest) == min(bits for bits in WIDTHS if largest in range(2**bits))
    with pytest.raises(ValueError, match="up to 268435456; the widest are of 28 bits"):
        narrowest_width(2**28)


# --- the codec ---------------------------------------------------------------------------------------------------


def representable(bits: int) -> np.ndarray:
    """Every finite non-negative value of `bits` bits, ascending, in float64."""
    patterns = (np.arange(2 ** (bits - 1), dtype=np.uint32) << np.uint32(32 - bits)).view(np.float32)
    return patterns[np.isfinite(patterns)].astype(np.float64)


def nearest(values: np.ndarray, bits: int) -> np.ndarray:
    """Round to nearest, ties to the even pattern, by comparing both neighbours in float64."""
    grid = representable(bits)
    size = np.abs(values.astype(np.float64))
    above = np.searchsorted(grid, size).clip(1, len(grid) - 1)
    down, up = size - grid[above - 1], grid[above] - size
    take_upper = (up < down) | ((up == down) & (above % 2 == 0))
    return np.copysign(np.where(take_upper, grid[above], grid[above - 1]), values)


def awkward_floats(bits: int) -> np.ndarray:
    """Ordinary values of all sizes, exact values, the middles between two (ties) and their float32 neighbours."""
    random = np.random.default_rng(bits)
    ordinary = (random.standard_normal(4000) * 2.0 ** random.integers(-120, 120, 4000)).astype(np.float32)
    grid = representable(bits)
    at = random.integers(0, len(grid) - 1, 2000)
    middles = ((grid[at] + grid[at + 1]) / 2).astype(np.float32)
    around = [np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(3e38))]
    tiny = np.array([0.0, 1e-45, 1e-40, 1.1754944e-38, 5e-39], dtype=np.float32)
    values = np.concatenate([ordinary, grid.astype(np.float32)[at], middles, *around, tiny])
    values = np.concatenate([values, -values])
    return values[np.abs(values) <= grid[-1]]


def stored_round_trip(values: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    codec = Bfloat(bits=bits)  # type: ignore[arg-type]
    tensors = codec.encode(values)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        name: tuple(s) for name, s in codec.stored(values.numel()).items()
    }
    return codec.decode(tensors, values.numel(), dtype)


def test_16_bits_are_torchs_bfloat16_bit_for_bit() -> None:
    values = torch.from_numpy(awkward_floats(16))
    stored = Bfloat().encode(values)["values"]
    assert torch.equal(stored, values.to(torch.bfloat16).view(torch.int16))


@pytest.mark.parametrize("bits", CODEC_WIDTHS)
def test_values_become_the_nearest_representable_ones(bits: int) -> None:
    values = awkward_floats(bits)
    found = stored_round_trip(torch.from_numpy(values), bits).numpy().astype(np.float64)
    assert np.array_equal(found, nearest(values, bits))
    assert np.array_equal(np.signbit(found), np.signbit(values)), "the sign of zero is kept"


@pytest.mark.parametrize("bits", CODEC_WIDTHS)
def test_the_relative_error_is_at_most_half_a_last_place(bits: int) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    error = (stored_round_trip(values, bits) - values).abs() / values.abs()
    half = 2.0 ** -(bits - 9 + 1)  # the mantissa has bits - 9 stored places behind the leading one
    worst = half / (1 + half)  # of the middle between 1 and the next value
    assert worst * 0.95 < float(error.max()) <= worst * (1 + 1e-6)


@pytest.mark.parametrize("bits", CODEC_WIDTHS)
def test_a_second_rounding_changes_nothing(bits: int) -> None:
    codec = Bfloat(bits=bits)  # type: ignore[arg-type]
    first = codec.encode(torch.from_numpy(awkward_floats(bits)))
    count = len(awkward_floats(bits))
    second = codec.encode(codec.decode(first, count, torch.float32))
    assert torch.equal(first["values"], second["values"])


@pytest.mark.parametrize("bits", CODEC_WIDTHS)
@pytest.mark.parametrize(
    "pattern",
    [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001],
    ids=["inf", "-inf", "nan", "-nan", "nan all ones", "-nan all ones", "signalling nan"],
)
def test_values_that_are_not_finite_are_refused(bits: int, pattern: int) -> None:
    bad = torch.from_numpy(np.array([0x3F800000, pattern], dtype=np.uint32).view(np.float32))
    with pytest.raises(ValueError, match="not finite"):
        Bfloat(bits=bits).encode(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", CODEC_WIDTHS)
def test_overflow_is_refused_exactly_from_where_it_rounds_to_infinity(bits: int) -> None:
    largest = representable(bits)[-1]
    last_place = largest - representable(bits)[-2]
    tie = np.float32(largest + last_place / 2)  # rounds to the even pattern, which is infinity
    assert float(stored_round_trip(torch.tensor([np.nextafter(tie, np.float32(0))]), bits)) == largest
    for value in (tie, -tie, np.float32(3.4028235e38)):
        with pytest.raises(ValueError, match="not finite"):
            Bfloat(bits=bits).encode(torch.tensor([value]))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_dtypes_are_encoded_and_decoded(dtype: torch.dtype) -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(dtype)
    found = stored_round_trip(values, 16, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, values)


def test_huge_float64_is_refused_and_not_wrapped() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Bfloat().encode(torch.tensor([1e300], dtype=torch.float64))


# --- integers ----------------------------------------------------------------------------------------------------

INTEGERS = {
    f"{bits} bits, groups of {group}{', symmetric' if symmetric else ''}": Integer(
        bits=bits, group=group, symmetric=symmetric
    )  # type: ignore[arg-type]
    for bits in (2, 3, 4, 6, 8)
    for group in (1, 7, 32)
    for symmetric in (False, True)
}

every_integer = pytest.mark.parametrize("codec", INTEGERS.values(), ids=INTEGERS)


def weights_like(*shape: int, seed: int = 0) -> Tensor:
    """Normal values with a few large ones."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values * torch.where(values.abs() > 2, 3.0, 1.0) + 0.2


def storable(codec: Integer, tensors: dict[str, Tensor], count: int) -> np.ndarray:
    """Every value that each of the stored ones could have been, (count, 2^bits), from the bytes of scales and zeros."""
    scales = tensors["scales"].view(torch.bfloat16).double().numpy()
    zeros = np.full(len(scales), 2 ** (codec.bits - 1))
    if not codec.symmetric:
        number = int.from_bytes(tensors["zeros"].numpy().tobytes(), "little")
        zeros = np.array([number >> (codec.bits * index) & (2**codec.bits - 1) for index in range(len(scales))])
    group = np.arange(count) // codec.group
    return scales[group, None] * (np.arange(2**codec.bits) - zeros[group, None])


def squared_error(found: Tensor, values: Tensor, importance: Tensor, group: int) -> Tensor:
    """Of every group."""
    errors = ((found - values).double().square() * importance).reshape(-1)
    return torch.stack([part.sum() for part in errors.split(group)])


@every_integer
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 32), (5, 13), (2, 3, 7)])
def test_integers_have_the_promised_tensors_and_are_the_nearest(codec: Integer, shape: tuple[int, ...]) -> None:
    values = weights_like(*shape)
    tensors = codec.encode(values)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        name: tuple(stored) for name, stored in codec.stored(values.numel()).items()
    }
    found = codec.decode(tensors, values.numel(), torch.float32)
    choices = storable(codec, tensors, values.numel())
    flat = values.reshape(-1).double().numpy()
    assert np.isin(found.double().numpy()[:, None] - choices, 0).any(axis=1).all()
    best = np.abs(choices - flat[:, None]).min(axis=1)
    assert np.abs(found.double().numpy() - flat) == pytest.approx(best, abs=1e-6)
    grid = codec.grid(values)
    assert torch.equal(codec.round(values, grid), found.view(shape))


@every_integer
def test_integers_in_the_same_grid_come_back(codec: Integer) -> None:
    values = weights_like(9, 11)
    grid = codec.grid(values)
    first = codec.encode(values, grid)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        decoded = codec.decode(first, values.numel(), dtype)
        assert decoded.dtype == dtype
        assert torch.equal(decoded, codec.decode(first, values.numel(), torch.float32).to(dtype))
        if dtype != torch.bfloat16 or codec.bits < 8:  # the 8 digits of bfloat16 do not tell all 8-bit integers apart
            second = codec.encode(decoded.view(9, 11), grid)
            assert all(torch.equal(first[name], second[name]) for name in first)
        if dtype != torch.bfloat16:
            assert torch.equal(codec.round(decoded.view(9, 11), grid), decoded.view(9, 11))


@every_integer
def test_without_clipping_no_error_is_more_than_half_a_step(codec: Integer) -> None:
    values = weights_like(40, 21)
    grid = codec.grid(values, clip=False)
    error = (codec.round(values, grid) - values).abs()
    # The last step of the span may fall short by what the scale lost when it was rounded, 2^-9 of 2^bits steps; where zero
    # is rounded to an integer, the span moves by up to half a step.
    worst = (0.5 if codec.symmetric else 1.0) + 2.0 ** (codec.bits - 9)
    assert bool((error <= worst * grid.scale.float().abs()).all())  # type: ignore[union-attr]


@every_integer
def test_clipping_lowers_the_weighted_error_of_every_group(codec: Integer) -> None:
    values = weights_like(40, 32)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(5)) ** 4
    plain, clipped, other = (
        squared_error(codec.round(values, grid), values, importance, codec.group)
        for grid in (codec.grid(values, clip=False), codec.grid(values, importance), codec.grid(values))
    )
    assert bool((clipped <= plain * (1 + 1e-5)).all())
    assert bool((clipped <= other * (1 + 1e-5)).all())
    if codec.bits <= 3 and codec.group == 32:
        assert clipped.sum() < 0.9 * plain.sum()
        assert clipped.sum() < 0.98 * other.sum()
    same = codec.grid(values, importance.expand(40, 32))
    assert all(torch.equal(a, b) for a, b in zip(same, codec.grid(values, importance), strict=True))  # type: ignore[arg-type]


def test_a_symmetric_grid_gives_the_farther_end_the_additional_step() -> None:
    codec = Integer(bits=2, group=4, symmetric=True)
    for sign in (1.0, -1.0):
        values = sign * torch.tensor([-2.0, -1.0, 0.0, 1.0])
        assert torch.equal(codec.decode(codec.encode(values), 4, torch.float32), values)


def test_the_grid_of_a_part_is_the_part_of_the_grid() -> None:
    values = weights_like(6, 8)
    for codec in (Integer(bits=3, group=4), Bfloat(bits=10)):
        grid = codec.grid(values)
        whole = codec.round(values, grid)
        for index in ((slice(None), 3), (slice(2, 4), 5), 1, values > 0):
            assert torch.equal(codec.round(values[index], grid.at(index)), whole[index])
    assert Bfloat().grid(values) == Grid()


@every_integer
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-20, -1e30, 1e-45])
def test_groups_of_one_value_repeated(codec: Integer, value: float) -> None:
    values = torch.full((5, 20), value)
    values[0] = 0.0
    found = codec.decode(codec.encode(values), 100, torch.float32).view(5, 20)
    assert bool((found[0, : 20 // codec.group * codec.group] == 0).all()), "all zeros stay zeros"
    assert torch.allclose(found, values, rtol=2.0**-8, atol=1e-40)


@every_integer
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_integers_of_values_that_are_not_finite_are_refused(codec: Integer, value: float) -> None:
    values = torch.ones(40, dtype=torch.float64)
    grid = codec.grid(values)
    values[33] = value
    for attempt in (lambda: codec.grid(values), lambda: codec.encode(values), lambda: codec.encode(values, grid)):
        with pytest.raises(ValueError, match="not finite"):
            attempt()


def test_the_largest_floats_are_stored_or_refused_but_never_infinite() -> None:
    largest = torch.finfo(torch.float32).max
    both_ends = torch.tensor([-largest / 2, largest / 2])
    for codec in INTEGERS.values():
        found = codec.decode(codec.encode(both_ends), 2, torch.float32)
        assert bool(torch.isfinite(found).all())
    with pytest.raises(ValueError, match="not finite"):
        Integer(bits=4).encode(torch.tensor([largest]))  # the scale rounds up


def test_a_grid_of_other_values_is_refused() -> None:
    codec, values = Integer(bits=4, group=8), weights_like(4, 8)
    with pytest.raises(ValueError, match="does not fit 24 values in groups of 8"):
        codec.encode(values[:3], codec.grid(values))
    with pytest.raises(ValueError, match="does not fit 32 values"):
        codec.encode(values, Grid(*(part.T for part in codec.grid(values))))  # type: ignore[union-attr]


@pytest.mark.parametrize("codec", [*INTEGERS.values(), Bfloat(), Bfloat(bits=12)], ids=repr)
def test_the_bits_a_value_are_those_of_many_values(codec: Integer | Bfloat) -> None:
    count = 7 * 32 * 1000
    stored = sum(tensor.bytes for tensor in codec.stored(count).values())
    assert 8 * stored / count == pytest.approx(codec.bits_per_value, rel=1e-4)


def test_names_for_tables() -> None:
    codecs = (Bfloat(), Bfloat(bits=12), Integer(bits=4), Integer(bits=3, group=64, symmetric=True))
    assert [codec.describe() for codec in codecs] == ["bf16", "12-bit", "int4", "int3"]


@pytest.mark.parametrize("bits", CODEC_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bfloat_rounds_as_it_encodes(bits: int, dtype: torch.dtype) -> None:
    codec = Bfloat(bits=bits)  # type: ignore[arg-type]
    values = torch.from_numpy(awkward_floats(bits)).to(dtype).view(2, -1).T
    values = values[torch.isfinite(values).all(dim=1)]
    stored = codec.decode(codec.encode(values), values.numel(), dtype).view(values.shape)
    assert torch.equal(codec.round(values, codec.grid(values)), stored)


@quick
@given(st.integers(1, 5000), st.integers(1, 300))
def test_the_group_size_is_the_largest_divisor(cols: int, wanted: int) -> None:
    assert group_size(cols, wanted) == max(size for size in range(1, wanted + 1) if cols % size == 0)


# --- the algebra -------------------------------------------------------------------------------------------------


def exact(rows: int, cols: int, bits: int = 10, seed: int = 0) -> Tensor:
    """Random values that `bits` bits hold without rounding, none of them zero."""
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) + 3
    return Bfloat(bits=bits).decode(Bfloat(bits=bits).encode(values), values.numel(), torch.float32).view(rows, cols)  # type: ignore[arg-type]


def sparse_matrix(rows: int, cols: int, nonzeros: int, seed: int = 0) -> Tensor:
    order = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(seed))[:nonzeros]
    keep = torch.zeros(rows * cols, dtype=torch.bool)
    keep[order] = True
    return exact(rows, cols, seed=seed) * keep.view(rows, cols)


def dense_leaf(rows: int = 5, cols: int = 7, bits: int = 16) -> tuple[Factor, Tensor]:
    matrix = exact(rows, cols, seed=rows)
    return encode(matrix, DenseSpec(rows=rows, cols=cols, codec=Bfloat(bits=bits))), matrix  # type: ignore[arg-type]


def sparse_leaf(rows: int = 5, cols: int = 7, nonzeros: int = 11, bits: int = 16) -> tuple[Factor, Tensor]:
    matrix = sparse_matrix(rows, cols, nonzeros)
    spec = SparseSpec(rows=rows, cols=cols, nonzeros=nonzeros, codec=Bfloat(bits=bits))  # type: ignore[arg-type]
    return encode(matrix, spec), matrix


def integer_leaf(codec: Integer, rows: int = 5, cols: int = 7, nonzeros: int | None = None) -> tuple[Factor, Tensor]:
    """Values that the codec holds without rounding, in the grid that was chosen for others."""
    values = weights_like(rows, cols, seed=rows)
    support = torch.ones(rows, cols, dtype=torch.bool) if nonzeros is None else sparse_matrix(rows, cols, nonzeros) != 0
    grid = codec.grid(values[support])
    matrix = torch.zeros(rows, cols).masked_scatter(support, codec.round(values[support], grid))
    if nonzeros is None:
        return encode(matrix, DenseSpec(rows=rows, cols=cols, codec=codec), grid), matrix
    return Sparse.encode(
        matrix, SparseSpec(rows=rows, cols=cols, nonzeros=nonzeros, codec=codec), support, grid
    ), matrix


def product(left: tuple[Factor, Tensor], right: tuple[Factor, Tensor]) -> tuple[Factor, Tensor]:
    return Product(left[0], right[0]), left[1] @ right[1]


def total(left: tuple[Factor, Tensor], right: tuple[Factor, Tensor]) -> tuple[Factor, Tensor]:
    return Sum(left[0], right[0]), left[1] + right[1]


def in_grid(codec: Codec, values: Tensor) -> tuple[Tensor, Grid]:
    """Values that the codec holds without rounding, and the grid that they are in."""
    grid = codec.grid(values)
    return codec.round(values, grid), grid


def block_leaf(
    table: Tensor, block: tuple[int, int], index: Any = "bitmask", codec: Codec | None = None, seed: int = 0
) -> tuple[Sparse, Tensor]:
    """Random values in the blocks that a bool table names; the matrix is put together block by block."""
    codec = codec or Bfloat()
    (rows, cols), (height, width) = table.shape, block
    values, grid = in_grid(codec, weights_like(int(table.sum()), height, width, seed=seed))
    matrix, support = torch.zeros(rows * height, cols * width), torch.zeros(rows * height, cols * width).bool()
    for values_of_one, (row, col) in zip(values, table.nonzero().tolist(), strict=True):
        where = slice(row * height, (row + 1) * height), slice(col * width, (col + 1) * width)
        matrix[where], support[where] = values_of_one, True
    spec = SparseSpec(
        rows=rows * height, cols=cols * width, nonzeros=values.numel(), codec=codec, index=index, block=block
    )
    return Sparse.encode(matrix, spec, support, grid), matrix


def some_of(rows: int, cols: int, kept: int, seed: int = 0) -> Tensor:
    """A bool table with so many entries set."""
    return sparse_matrix(rows, cols, kept, seed) != 0


CASES = {
    "dense": lambda: dense_leaf(),
    "dense 14 bits": lambda: dense_leaf(bits=14),
    "dense 10 bits": lambda: dense_leaf(3, 3, bits=10),
    "dense 1 x 1": lambda: dense_leaf(1, 1),
    "sparse": lambda: sparse_leaf(),
    "sparse 14 bits": lambda: sparse_leaf(bits=14),
    "sparse 12 bits": lambda: sparse_leaf(6, 9, 13, bits=12),
    "sparse, nothing": lambda: sparse_leaf(nonzeros=0),
    "sparse, nothing, packed": lambda: sparse_leaf(nonzeros=0, bits=14),
    "sparse, everything": lambda: sparse_leaf(nonzeros=35),
    "sparse, empty rows": lambda: sparse_leaf(rows=20, cols=3, nonzeros=4),
    "low rank": lambda: product(dense_leaf(9, 4), dense_leaf(4, 6)),
    "cospadi": lambda: product(sparse_leaf(9, 4, 18, bits=14), dense_leaf(4, 6)),
    "both sparse": lambda: product(sparse_leaf(9, 4, 18), sparse_leaf(4, 6, 5)),
    "dense int4": lambda: integer_leaf(Integer(bits=4, group=7)),
    "dense int3, groups over rows": lambda: integer_leaf(Integer(bits=3, group=4)),
    "dense int8 symmetric, one group": lambda: integer_leaf(Integer(bits=8, symmetric=True)),
    "sparse int2": lambda: integer_leaf(Integer(bits=2, group=3), nonzeros=11),
    "sparse int6, nothing": lambda: integer_leaf(Integer(bits=6), nonzeros=0),
    "cospadi int4": lambda: product(
        integer_leaf(Integer(bits=4, group=6), 9, 4, 18), integer_leaf(Integer(bits=4, group=3, symmetric=True), 4, 6)
    ),
    "list": lambda: block_leaf(some_of(5, 7, 11), (1, 1), "list"),
    "list, int4": lambda: block_leaf(some_of(5, 7, 11), (1, 1), "list", Integer(bits=4, group=5)),
    "list, nothing": lambda: block_leaf(some_of(5, 7, 0), (1, 1), "list", Bfloat(bits=12)),
    "list, everything": lambda: block_leaf(some_of(3, 8, 24), (1, 1), "list"),
    "list, 300 columns": lambda: block_leaf(some_of(4, 300, 37), (1, 1), "list", Bfloat(bits=14)),
    "blocks": lambda: block_leaf(some_of(4, 3, 5), (2, 3)),
    "blocks, list, int3": lambda: block_leaf(some_of(4, 3, 5), (2, 3), "list", Integer(bits=3, group=6)),
    "one block": lambda: block_leaf(some_of(1, 1, 1), (5, 4), "list"),
    "rows": lambda: block_leaf(some_of(6, 1, 2), (1, 7), codec=Integer(bits=6, group=7)),
    "columns, list": lambda: block_leaf(some_of(1, 7, 3), (6, 1), "list"),
    "cospadi, blocks": lambda: product(block_leaf(some_of(9, 2, 7), (1, 2), "list"), dense_leaf(4, 6)),
    "low rank and sparse": lambda: total(product(dense_leaf(9, 4), dense_leaf(4, 6)), sparse_leaf(9, 6, 11, bits=14)),
    "two sparse": lambda: total(sparse_leaf(), block_leaf(some_of(5, 7, 4), (1, 1), "list", Integer(bits=2))),
    "sums in sums": lambda: total(total(dense_leaf(), sparse_leaf()), sparse_leaf(nonzeros=2)),
    "a product of sums": lambda: product(
        total(dense_leaf(9, 4), sparse_leaf(9, 4, 5)), total(dense_leaf(4, 6, bits=12), sparse_leaf(4, 6, 3))
    ),
    "nested": lambda: product(sparse_leaf(9, 4, 18), product(dense_leaf(4, 3), sparse_leaf(3, 8, 7, bits=10))),
}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Factor, Tensor]:
    return CASES[request.param]()


def test_the_matrix_comes_back(case: tuple[Factor, Tensor]) -> None:
    factor, matrix = case
    assert torch.allclose(factor.to_dense(), matrix, rtol=1e-6, atol=1e-6)
    assert (factor.spec.rows, factor.spec.cols) == tuple(matrix.shape)
    factor.check()


def test_the_promised_bytes_are_the_bytes(case: tuple[Factor, Tensor], tmp_path: Any) -> None:
    factor, _ = case
    tensors = dict(factor.named_parameters())
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        name: tuple(stored) for name, stored in factor.spec.stored().items()
    }
    assert factor.spec.bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert not list(factor.buffers()), "everything stored is a parameter"
    save_file(tensors, tmp_path / "file.safetensors")
    header = int.from_bytes((tmp_path / "file.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "file.safetensors").stat().st_size - 8 - header == factor.spec.bytes


def test_the_papers_count_is_that_of_the_values(case: tuple[Factor, Tensor]) -> None:
    factor, _ = case
    leaves = [module for module in factor.modules() if isinstance(module, (Dense, Sparse))]
    assert factor.spec.parameters == sum(leaf.decode(torch.float32).numel() for leaf in leaves)
    assert [type(leaf.spec) for leaf in leaves] == [type(spec) for _, spec in factor.spec.leaves()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (0,), (2, 1, 5)])
def test_a_call_multiplies_by_the_transpose(
    case: tuple[Factor, Tensor], dtype: torch.dtype, tolerance: float, batch: tuple[int, ...]
) -> None:
    factor, matrix = case
    x = torch.randn(*batch, factor.spec.cols, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = factor(x)
    assert y.dtype == dtype
    assert y.shape == (*batch, factor.spec.rows)
    expected = x.double() @ matrix.double().T
    scale = float(matrix.abs().sum(dim=1).max()) + 1
    assert torch.allclose(y.double(), expected, rtol=0, atol=tolerance * scale)


def test_specs_survive_json(case: tuple[Factor, Tensor]) -> None:
    spec = case[0].spec
    assert factor_spec.validate_json(spec.model_dump_json()) == spec
    assert factor_spec.validate_python(spec.model_dump()) == spec


def test_empty_modules_take_the_stored_tensors(case: tuple[Factor, Tensor]) -> None:
    factor, _matrix = case
    with torch.device("meta"):
        blank = empty(factor.spec)
    assert all(parameter.is_meta for parameter in blank.parameters())
    blank.load_state_dict(factor.state_dict(), assign=True)
    blank.check()
    assert torch.equal(blank.to_dense(), factor.to_dense())


def test_casts_of_the_module_leave_the_stored_bytes(case: tuple[Factor, Tensor]) -> None:
    factor, _ = case
    module = nn.Sequential(factor, nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in factor.state_dict().items()}
    casts = (nn.Module.half, nn.Module.double, nn.Module.bfloat16, nn.Module.float, lambda m: m.to(torch.bfloat16))
    for cast in casts:
        cast(module)
        after = factor.state_dict()
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor)
    assert module[1].weight.dtype == torch.bfloat16, "the casts did reach the module"


def test_copies_and_files_hold_the_same(case: tuple[Factor, Tensor], tmp_path: Any) -> None:
    factor, _ = case
    save_file(factor.state_dict(), tmp_path / "f.safetensors")
    buffer = io.BytesIO()
    torch.save(factor.state_dict(), buffer)
    from_file, from_torch = empty(factor.spec), empty(factor.spec)
    from_file.load_state_dict(load_file(tmp_path / "f.safetensors"))
    from_torch.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    twin = copy.deepcopy(factor)
    for other in (from_file, from_torch, twin):
        assert torch.equal(other.to_dense(), factor.to_dense())
        other.check()
    next(twin.parameters()).data.fill_(1)
    assert torch.equal(from_file.to_dense(), factor.to_dense()), "a deep copy shares no memory"


@quick
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.sampled_from(CODEC_WIDTHS), st.integers(0, 99))
def test_any_sparse_matrix_comes_back(rows: int, cols: int, density: float, bits: int, seed: int) -> None:
    nonzeros = int(density * rows * cols)
    factor, matrix = sparse_leaf(rows, cols, nonzeros, bits)
    assert torch.equal(factor.to_dense(), matrix)
    factor.check()


def test_fewer_non_zeros_than_room_are_filled_up_with_stored_zeros() -> None:
    matrix = sparse_matrix(6, 5, 4)
    for wanted in (matrix, matrix.T):  # the transposed view is not laid out row by row
        factor = encode(wanted, SparseSpec(rows=wanted.shape[0], cols=wanted.shape[1], nonzeros=9))
        factor.check()
        assert torch.equal(factor.to_dense(), wanted)
        assert int(factor.support().sum()) == 9  # type: ignore[operator]


def test_a_given_support_decides_what_is_stored() -> None:
    matrix = exact(4, 6)
    support = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    kept = support.clone()
    factor = Sparse.encode(matrix, SparseSpec(rows=4, cols=6, nonzeros=int(support.sum())), support)
    assert torch.equal(factor.to_dense(), matrix * support)
    assert torch.equal(support, kept), "the caller's support is left alone"


def test_a_sparse_grid_must_be_that_of_the_stored_values() -> None:
    codec, matrix = Integer(bits=4, group=3), sparse_matrix(5, 7, 11)
    spec = SparseSpec(rows=5, cols=7, nonzeros=11, codec=codec)
    kept = matrix[matrix != 0]
    factor = Sparse.encode(matrix, spec, grid=codec.grid(kept, clip=False))
    assert torch.equal(factor.to_dense()[matrix != 0], codec.round(kept, codec.grid(kept, clip=False)))
    with pytest.raises(ValueError, match="does not fit 11 values"):
        Sparse.encode(matrix, spec, grid=codec.grid(matrix))


# --- indices and blocks -------------------------------------------------------------------------------------------

INDEX_NAMES = ["bitmask", "list"]
BLOCKS = [(1, 1), (1, 4), (3, 1), (2, 3), (4, 4)]
CODECS = [*(Bfloat(bits=bits) for bits in (10, 12, 14, 16)), Integer(bits=8), Integer(bits=4, group=8)]  # type: ignore[arg-type]
CODECS += [Integer(bits=3, group=5), Integer(bits=2, group=1, symmetric=True)]
every_index = pytest.mark.parametrize("index", INDEX_NAMES)


def narrowest(largest: int) -> int:
    return min(bits for bits in WIDTHS if largest < 2**bits)


def index_bytes(index: str, table: np.ndarray) -> dict[str, bytes]:
    """The definition: a bit a block; or what scipy's rows of a sparse matrix say, packed as one long number each."""
    if index == "bitmask":
        return {"mask": np.packbits(table, bitorder="little").tobytes()}
    rows = scipy.sparse.csr_array(table)
    rows.sort_indices()
    cols = table.shape[1]
    return {
        "columns": bit_stream(rows.indices.tolist(), narrowest(cols - 1)),
        "counts": bit_stream(np.diff(rows.indptr).tolist(), narrowest(cols)),
    }


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    """A bool table of kept blocks: random ones, also none, all, empty rows, and more columns than one byte numbers."""
    rows, cols = draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 255, 256, 257, 1025]))
    return some_of(rows, cols, draw(st.integers(0, rows * cols)), seed=draw(st.integers(0, 99)))


@quick
@given(tables(), st.sampled_from(BLOCKS), st.sampled_from(INDEX_NAMES))
def test_places_and_order_are_those_of_scipys_block_matrix(table: Tensor, block: tuple[int, int], index: str) -> None:
    factor, matrix = block_leaf(table, block, index)
    factor.check()
    assert torch.equal(factor.to_dense(), matrix)
    assert torch.equal(factor.support(), table.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1))
    oracle = scipy.sparse.bsr_array(matrix.numpy(), blocksize=block)
    oracle.sort_indices()
    if len(oracle.data) == int(table.sum()):  # scipy drops a block whose values all happen to be zero
        assert np.array_equal(factor.decode(torch.float32).numpy(), oracle.data.reshape(-1))
    stored = {name: tensor.numpy().tobytes() for name, tensor in factor.named_parameters() if name != "values"}
    assert stored == index_bytes(index, table.numpy())


@every_index
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_every_index_block_and_codec_comes_back_bit_for_bit(codec: Codec, block: tuple[int, int], index: str) -> None:
    for kept in (0, 1, 13, 30):
        factor, matrix = block_leaf(some_of(5, 6, kept), block, index, codec, seed=kept)
        factor.check()
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert torch.equal(factor.to_dense(dtype), matrix.to(dtype))
        assert factor.to_dense().is_contiguous()
        wanted = sum(map(len, index_bytes(index, some_of(5, 6, kept).numpy()).values()))
        assert factor.spec.bytes == wanted + sum(
            part.bytes for part in codec.stored(matrix.numel() * kept // 30).values()
        )
        with torch.device("meta"):
            blank = empty(factor.spec)
        blank.load_state_dict(factor.state_dict(), assign=True)
        assert torch.equal(blank.to_dense(), matrix)


@pytest.mark.parametrize("codec", [Bfloat(), Bfloat(bits=14), Integer(bits=4, group=3)], ids=repr)
def test_single_entries_are_stored_as_before_there_were_blocks(codec: Codec) -> None:
    matrix = sparse_matrix(6, 11, 23)
    kept = matrix[matrix != 0]
    old = {"form": "sparse", "rows": 6, "cols": 11, "nonzeros": 23, "codec": codec.model_dump()}
    spec = factor_spec.validate_python(old)
    assert spec == SparseSpec(rows=6, cols=11, nonzeros=23, codec=codec, index="bitmask", block=(1, 1))
    factor = empty(spec)
    mask = torch.from_numpy(np.packbits(matrix.numpy() != 0, bitorder="little"))
    factor.load_state_dict({"mask": mask, **codec.encode(kept)})
    factor.check()
    stored = codec.decode(codec.encode(kept), 23, torch.float32)
    assert torch.equal(factor.to_dense(), torch.zeros(6, 11).masked_scatter(matrix != 0, stored))
    again = encode(matrix, spec).state_dict()
    assert again.keys() == factor.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in factor.state_dict().items())


@every_index
def test_blocks_with_a_non_zero_are_kept_whole_and_filled_up_with_the_first_empty_ones(index: Any) -> None:
    matrix = torch.zeros(4, 6)
    matrix[0, 5], matrix[3, 2] = 2.0, -1.0  # in the last block of the first row, the second of the second
    tall = torch.zeros(4, 6, dtype=torch.bool)
    tall[0:2, 4:6] = tall[2:4, 2:4] = True
    spec = SparseSpec(rows=4, cols=6, nonzeros=8, index=index, block=(2, 2))
    for wanted, of_spec, places in (
        (matrix, spec, tall),
        (matrix.T.contiguous().T, spec, tall),  # not laid out row by row
        (matrix.T, spec.model_copy(update={"rows": 6, "cols": 4}), tall.T),
    ):
        factor = Sparse.encode(wanted, of_spec)
        assert torch.equal(factor.to_dense(), wanted)
        assert torch.equal(factor.support(), places)
    filled = Sparse.encode(matrix, spec.model_copy(update={"nonzeros": 12}))
    tall[0:2, 0:2] = True
    assert torch.equal(filled.support(), tall)
    assert torch.equal(filled.to_dense(), matrix)
    with pytest.raises(ValueError, match="8 non-zeros do not fit into the spec's 4, counted in whole blocks of 2 x 2"):
        Sparse.encode(matrix, spec.model_copy(update={"nonzeros": 4}))


@every_index
def test_a_support_that_cuts_through_a_block_is_refused(index: Any) -> None:
    matrix, support = exact(4, 6), torch.zeros(4, 6, dtype=torch.bool)
    support[2:4, 3:6] = True
    spec = SparseSpec(rows=4, cols=6, nonzeros=6, index=index, block=(2, 3))
    kept = support.clone()
    factor = Sparse.encode(matrix, spec, support)
    assert torch.equal(factor.to_dense(), matrix * support)
    assert torch.equal(support, kept), "the caller's support is left alone"
    for at, value in (((0, 0), True), ((3, 5), False)):
        cut = support.clone()
        cut[at] = value
        with pytest.raises(ValueError, match="whole blocks of 2 x 3"):
            Sparse.encode(matrix, spec, cut)


def test_the_view_in_blocks_reads_and_writes_the_matrix() -> None:
    matrix = torch.arange(24.0).view(4, 6)
    blocks = in_blocks(matrix, (2, 3))
    assert blocks.shape == (2, 2, 2, 3)
    for row, col in itertools.product(range(2), range(2)):
        assert torch.equal(blocks[row, col], matrix[2 * row : 2 * row + 2, 3 * col : 3 * col + 3])
    blocks[1, 0] = -1
    assert bool((matrix[2:, :3] == -1).all())
    assert bool((in_blocks(matrix.T, (3, 2))[0, 1] == -1).all()), "also of a transposed matrix"


@quick
@given(
    st.integers(1, 40),
    st.integers(1, 400),
    st.floats(0, 1),
    st.sampled_from(CODECS),
    st.sampled_from(BLOCKS),
)
def test_the_lightest_index_is_the_lightest(
    rows: int, cols: int, density: float, codec: Codec, block: tuple[int, int]
) -> None:
    table = some_of(rows, cols, int(density * rows * cols))
    nonzeros = int(table.sum()) * block[0] * block[1]
    spec = SparseSpec.lightest(rows * block[0], cols * block[1], nonzeros, codec, block)
    sizes = {name: sum(map(len, index_bytes(name, table.numpy()).values())) for name in INDEX_NAMES}
    assert spec.bytes - sum(part.bytes for part in codec.stored(nonzeros).values()) == min(sizes.values())
    assert spec.index == ("list" if sizes["list"] < sizes["bitmask"] else "bitmask")
    assert (spec.rows, spec.cols, spec.nonzeros) == (rows * block[0], cols * block[1], nonzeros)
    assert (spec.codec, spec.block) == (codec, block)


def test_the_lists_pay_where_little_is_kept() -> None:
    """12 bits for a column among 4096 against one bit an entry: below 1 in 12."""
    for share, index in ((16, "list"), (8, "bitmask")):
        assert SparseSpec.lightest(4096, 4096, 4096 * 4096 // share, Bfloat()).index == index


def test_a_layer_of_a_large_vocabulary_can_be_listed() -> None:
    """More columns than 16 bits number."""
    matrix = torch.zeros(2, 70_000)
    matrix[0, 69_999], matrix[1, 0], matrix[1, 65_536] = 1.0, 2.0, 3.0
    factor = Sparse.encode(matrix, SparseSpec.lightest(2, 70_000, 3, Bfloat()))
    assert factor.spec.index == "list"
    assert factor.spec.bytes == 3 * 2 + 8 + 5  # values; 3 columns and 2 counts of 20 bits
    factor.check()
    assert torch.equal(factor.to_dense(), matrix)


# --- sums ---------------------------------------------------------------------------------------------------------


def test_a_sum_is_added_in_float32() -> None:
    shapes = ((40, 3), (3, 50), (40, 50))
    first, second, right = (encode(weights_like(*shape), DenseSpec(rows=shape[0], cols=shape[1])) for shape in shapes)
    left = Product(first, second)
    expected = left.to_dense().numpy() + right.to_dense().numpy()
    found = Sum(left, right)
    assert np.array_equal(found.to_dense().numpy(), expected)
    assert torch.equal(found.to_dense(torch.bfloat16), torch.from_numpy(expected).bfloat16())
    rounded_twice = left.to_dense(torch.bfloat16) + right.to_dense(torch.bfloat16)
    assert not torch.equal(found.to_dense(torch.bfloat16), rounded_twice)


def test_a_sum_may_share_a_matrix_inside() -> None:
    owner, matrix = dense_leaf(4, 6)
    reference = SharedSpec(name="common", rows=4, cols=6)
    left, own = sparse_leaf(9, 4, 18)
    rest, sparse = sparse_leaf(9, 6, 7)
    factor = Sum(Product(left, Shared(reference, owner)), rest)
    assert torch.allclose(factor.to_dense(), own @ matrix + sparse, rtol=1e-6)
    assert list(factor.spec.references()) == [reference]
    assert factor.spec.bytes == left.spec.bytes + rest.spec.bytes, "what is shared is counted where it lies"
    assert [path for path, _ in factor.spec.leaves()] == ["left.left", "right"]
    assert GroupSpec(members=(factor.spec, factor.spec), shared=owner.spec).bytes == (
        2 * factor.spec.bytes + owner.spec.bytes
    )
    blank = empty(factor_spec.validate_json(factor.spec.model_dump_json()), {"common": owner})
    blank.load_state_dict(factor.state_dict())
    assert torch.equal(blank.to_dense(), factor.to_dense())
    with pytest.raises(ValueError, match="common is not described"):
        empty(factor.spec)
    with pytest.raises(ValidationError, match="the members refer to"):
        GroupSpec(members=(factor.spec,))


def test_sums_of_other_shapes_do_not_exist() -> None:
    with pytest.raises(ValidationError, match="a sum of 5 x 7 and 5 x 6 does not exist; the shapes must agree"):
        Sum(dense_leaf(5, 7)[0], dense_leaf(5, 6)[0])
    with pytest.raises(ValueError, match="'sum' is none; encode its parts"):
        encode(torch.zeros(3, 4), SumSpec(left=DenseSpec(rows=3, cols=4), right=DenseSpec(rows=3, cols=4)))


def test_too_many_non_zeros_are_refused() -> None:
    with pytest.raises(ValueError, match="12 non-zeros do not fit"):
        encode(sparse_matrix(5, 5, 12), SparseSpec(rows=5, cols=5, nonzeros=11))


def test_a_matrix_of_another_shape_or_a_product_is_refused() -> None:
    spec = DenseSpec(rows=3, cols=4)
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        encode(torch.zeros(4, 3), spec)
    with pytest.raises(ValueError, match="product"):
        encode(torch.zeros(3, 4), ProductSpec(left=DenseSpec(rows=3, cols=2), right=DenseSpec(rows=2, cols=4)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"form": "tucker", "rows": 2, "cols": 2}, "tucker"),
        ({"rows": 2, "cols": 2}, "form"),
        ({"form": "dense", "rows": 2, "cols": 2, "colour": 1}, "colour"),
        ({"form": "dense", "rows": -2, "cols": 2}, "rows"),
        ({"form": "dense", "rows": 0, "cols": 2}, "rows"),
        ({"form": "dense", "rows": 2**40, "cols": 2}, "rows"),
        ({"form": "dense", "rows": 2.5, "cols": 2}, "rows"),
        ({"form": "sparse", "rows": 2, "cols": 2, "nonzeros": -1}, "nonzeros"),
        ({"form": "sparse", "rows": 2, "cols": 2, "nonzeros": 5}, "do not fit"),
        ({"form": "sparse", "rows": 2, "cols": 2}, "nonzeros"),
        ({"form": "dense", "rows": 2, "cols": 2, "codec": {"name": "bfloat", "bits": 13}}, "bits"),
        ({"form": "dense", "rows": 2, "cols": 2, "codec": {"name": "bfloat", "spare": 1}}, "spare"),
        ({"form": "dense", "rows": 2, "cols": 2, "codec": {"name": "int3"}}, "name"),
        ({"form": "dense", "rows": 2, "cols": 2, "codec": {"name": "integer"}}, "bits"),
        ({"form": "dense", "rows": 2, "cols": 2, "codec": {"name": "integer", "bits": 5}}, "bits"),
        ({"form": "dense", "rows": 2, "cols": 2, "codec": {"name": "integer", "bits": 4, "group": 0}}, "group"),
        ({"form": "dense", "rows": 2, "cols": 2, "codec": {"name": "integer", "bits": 4, "zero": 1}}, "zero"),
        (
            {
                "form": "product",
                "left": {"form": "dense", "rows": 2, "cols": 3},
                "right": {"form": "dense", "rows": 4, "cols": 2},
            },
            "inner dimensions",
        ),
        ({"form": "product", "left": {"form": "dense", "rows": 2, "cols": 3}}, "right"),
        ({"form": "sum", "left": {"form": "dense", "rows": 2, "cols": 3}}, "right"),
        (
            {
                "form": "sum",
                "left": {"form": "dense", "rows": 2, "cols": 3},
                "right": {"form": "dense", "rows": 3, "cols": 2},
            },
            "a sum of 2 x 3 and 3 x 2 does not exist",
        ),
        ({"form": "sparse", "rows": 4, "cols": 6, "nonzeros": 4, "index": "tree"}, "index"),
        ({"form": "sparse", "rows": 4, "cols": 6, "nonzeros": 4, "block": [2]}, "block"),
        ({"form": "sparse", "rows": 4, "cols": 6, "nonzeros": 4, "block": [0, 2]}, "block"),
        ({"form": "sparse", "rows": 4, "cols": 6, "nonzeros": 12, "block": [3, 1]}, "3 x 1 do not divide 4 x 6"),
        ({"form": "sparse", "rows": 4, "cols": 6, "nonzeros": 16, "block": [1, 4]}, "1 x 4 do not divide 4 x 6"),
        ({"form": "sparse", "rows": 4, "cols": 6, "nonzeros": 9, "block": [2, 2]}, "9 non-zeros are no whole number"),
    ],
)
def test_malformed_specs_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        factor_spec.validate_python(data)


def replaced(factor: Factor, name: str, tensor: Tensor) -> Factor:
    """`factor` with one stored tensor swapped, as a damaged file would."""
    owner, _, leaf = name.rpartition(".")
    setattr(factor.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    return factor


@pytest.mark.parametrize("side", ["", "left."])
def test_check_finds_a_wrong_mask(side: str) -> None:
    factor = (product(sparse_leaf(9, 4, 18), dense_leaf(4, 6)) if side else sparse_leaf())[0]
    mask = factor.get_parameter(f"{side}mask").detach().clone()
    mask[1] ^= 4
    with pytest.raises(ValueError, match=r"^(left: )?the mask has (10|12|17|19) bits set for (11|18) stored values"):
        replaced(factor, f"{side}mask", mask).check()


def damaged_list(columns: list[int], counts: list[int]) -> Factor:
    """A table of 3 x 5 blocks with four of them stored, whose index says what it is told."""
    factor, _ = block_leaf(some_of(3, 5, 4), (2, 3), "list")
    replaced(factor, "columns", pack_bits(torch.tensor(columns), 3))
    return replaced(factor, "counts", pack_bits(torch.tensor(counts), 3))


@pytest.mark.parametrize(
    ("columns", "counts", "message"),
    [
        ([0, 4, 1, 2], [2, 0, 1], "the counts add up to 3 blocks for 24 stored values in blocks of 2 x 3"),
        ([0, 4, 1, 2], [2, 0, 7], "the counts add up to 9 blocks for 24 stored values"),
        ([0, 5, 1, 2], [2, 0, 2], "column number 5 is beyond the 5 block-columns"),
        ([0, 4, 1, 7], [2, 0, 2], "column number 7 is beyond"),
        ([0, 4, 2, 1], [2, 0, 2], "the column numbers of block-row 2 do not increase"),
        ([3, 3, 1, 2], [2, 0, 2], "the column numbers of block-row 0 do not increase"),
        ([0, 4, 1, 2], [1, 3, 0], "the column numbers of block-row 1 do not increase"),
    ],
)
def test_check_finds_a_wrong_list(columns: list[int], counts: list[int], message: str) -> None:
    damaged_list([0, 4, 1, 2], [2, 0, 2]).check()
    damaged = damaged_list(columns, counts)
    with pytest.raises(ValueError, match=f"^{message}"):
        damaged.check()
    low_rank = product(dense_leaf(6, 4), dense_leaf(4, 15))[0]
    with pytest.raises(ValueError, match=f"^right: {message}"):
        Sum(low_rank, damaged).check()
    with pytest.raises(ValueError, match=f"^left: left: {message}"):
        Sum(Product(damaged, dense_leaf(15, 3)[0]), dense_leaf(6, 3)[0]).check()


def test_check_counts_the_bits_of_whole_blocks() -> None:
    factor, _ = block_leaf(some_of(3, 5, 4), (2, 3))
    mask = factor.get_parameter("mask").detach().clone()
    mask[0] ^= 1
    with pytest.raises(ValueError, match=r"^the mask has [35] bits set for 24 stored values in blocks of 2 x 3"):
        replaced(factor, "mask", mask).check()


@pytest.mark.parametrize("side", ["", "right."])
def test_check_finds_wrong_dtype_shape_and_patterns(side: str) -> None:
    def fresh() -> tuple[Factor, Tensor]:
        factor = (product(sparse_leaf(9, 4, 18), dense_leaf(4, 6)) if side else dense_leaf())[0]
        return factor, factor.get_parameter(f"{side}values").detach().clone()

    prefix = f"^{side.rstrip('.') + ': ' if side else ''}"
    factor, values = fresh()
    with pytest.raises(ValueError, match=f"{prefix}values is torch.int32"):
        replaced(factor, f"{side}values", values.to(torch.int32)).check()
    factor, values = fresh()
    with pytest.raises(ValueError, match=f"{prefix}values is torch.int16 \\({values.numel() - 1},\\)"):
        replaced(factor, f"{side}values", values[:-1]).check()
    for pattern in (0x7FC0, 0x7F80, -1):  # NaN, infinity, a negative NaN of all ones
        factor, values = fresh()
        values[2] = pattern
        with pytest.raises(ValueError, match=f"{prefix}a stored value is not finite"):
            replaced(factor, f"{side}values", values).check()


def test_printing_tells_shape_and_size() -> None:
    factor, _ = sparse_leaf()
    assert f"5 x 7, {factor.spec.bytes} bytes" in repr(factor)
