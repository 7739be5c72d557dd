"""Stored leaves as they train: the stored values are float parameters, the places of a sparse matrix stay as they are.

A leaf computes with its values as they would be stored, so that what is trained is what is packed in the end, to the bit.
Gradients pass the rounding straight through (Bengio et al., arXiv 1308.3432). Integers train as multiples of their group's
scale, so that a scale that moves takes the group along. Nothing here knows an objective.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lexigram.factors.codecs import Codec, Grid
from lexigram.factors.forms import Dense, Factor, Sparse

RUN = 64
"""Stored floats that follow each other and have one unit."""

LEAST_STEPS = 8.0
"""Steps of the grid that a unit of integers has at least: the root mean square of 2 or 3 bits is a step or two.

KL divergence on held-out text of a model of 260 thousand weights, before and after so many steps at a rate of 2e-3: of integers
that are floats over a scale, with the units of floats, and all in the middle of their cells; then of multiples of a scale,
spread over their cells but for `MARGIN`, with units of 4 and 8 steps at least.

| form | steps | before | over a scale | 4 | 8 |
|---|---|---|---|---|---|
| int2 | 40 | 2.20 | 2.15 | | 1.28 |
| int3 | 40 | .469 | .485 | .328 | .310 |
| int4 | 40 | .0819 | .0928 | .0640 | .0641 |
| low rank + sparse, int3 | 40 | 2.18 | 2.08 | 1.58 | 1.40 |
| double sparse, int4 | 40 | 1.61 | 1.54 | | 1.02 |
| dictionary x sparse, int6 and int8 | 40 | .0227 | .0191 | | .0167 |
| int3 | 200 | .469 | .414 | | .169 |
| int4 | 200 | .0819 | .0694 | | .0393 |
| low rank + sparse, int3 | 200 | 2.18 | 1.46 | | .62 |
| double sparse, int4 | 200 | 1.61 | .84 | | .50 |

Beginning in the middle, with units of 20 steps, int3 comes to .40 before any integer changes, and to .67 when many do.
"""

MARGIN = 0.01
"""Units that an integer's float begins away from the ends of its cell, so that some steps one way come before a change.

Without it, in as many bits as hold weights well, gradients that are mere noise change more than is won: of the dictionaries
above, 40 steps of 4 sequences make .0251 of .0227 without it, and .0191 with it. Twice as much leaves few bits too little to
change: with units of 4 steps, int3 comes to .373 instead of .328.
"""

_WIDTHS = 0.2, 0.98
"""Least and most of a cell that its floats begin in; from the whole of it some would round to the next."""

_GOLDEN = (5**0.5 - 1) / 2  # the fractions of its multiples lie evenly in any run of them
_TIE = 1e-3  # of a step: a value in the middle between two is no farther than half a step, up to rounding


class TrainableLeaf(Factor):
    """A `Dense` or `Sparse` leaf with float32 parameters in the place of its stored values; `packed` stores them.

    `values` (count,) are in units, one for each run of `RUN` of them: the power of two at or below the run's root mean square.
    So one step of an optimiser is as large, as a share, for all of them: rows of one factor may differ by orders of magnitude,
    and often do. Where integers are stored, these are ``values`` times units, rounded: a unit is one of a whole group, in steps
    of the grid, `LEAST_STEPS` at least. They are multiplied by `scales` (groups,), in units of those that were stored.

    An integer changes when its float leaves the cell around it. Floats begin spread over their cells (`MARGIN`): if all began
    in the middle, nothing would come of many steps, and then more of a single one than the model bears.

    A leaf of zeros does not train, nor does a group whose scale is 0. A call builds the matrix, (rows, cols) in float32, unless
    it is there already (`built_once`); a sparse leaf takes 8 bytes a value for its places, too.
    """

    values: nn.Parameter
    scales: nn.Parameter | None
    _units: Tensor
    _scale: Tensor | None
    _zero: Tensor | None
    _ends: Tensor | None
    _places: Tensor | None

    def __init__(self, leaf: Factor) -> None:
        super().__init__()
        if not isinstance(leaf, Dense | Sparse):
            raise ValueError(f"only a stored matrix trains, and {type(leaf).__name__} is none")
        self.spec = leaf.spec
        tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in leaf.named_parameters()}
        values = leaf.decode(torch.float32)
        trains, grid = bool(values.any()), self._codec.stored_grid(tensors)
        self.scales, ends = None, None
        if grid.scale is None:
            self._width = RUN
            units = _units(_rows(values, RUN), len(values))
        else:
            self._width = self._group(len(grid.scale))
            steps = _ratio(_rows(values, self._width), grid.scale.float()[:, None])
            units = _units(steps, len(values)).clamp_min(LEAST_STEPS)
            values = (steps + _offsets(steps, units)).reshape(-1)[: len(values)]
            ends = self._ends_of(grid)
            self.scales = nn.Parameter(torch.ones_like(grid.scale, dtype=torch.float32), requires_grad=trains)
        own = _rows(values, self._width) / units[:, None]
        self.values = nn.Parameter(own.reshape(-1)[: len(values)].clone(), requires_grad=trains)
        self.register_buffer("_units", units, persistent=False)
        self.register_buffer("_scale", grid.scale, persistent=False)
        self.register_buffer("_zero", grid.zero, persistent=False)
        self.register_buffer("_ends", ends, persistent=False)
        self._kind = type(leaf)
        self._index = {name: tensors[name] for name in tensors if name not in self._codec.stored(self.spec.count)}
        self.register_buffer("_places", _places(leaf) if isinstance(leaf, Sparse) else None, persistent=False)
        self._built: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x M^T``."""
        return nn.functional.linear(x, self.to_dense(x.dtype))

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Factor.to_dense`; differentiable."""
        return (self.build() if self._built is None else self._built).to(dtype)

    def build(self) -> Tensor:
        """The matrix from the parameters, (rows, cols) in float32; differentiable."""
        values = self._rounded().reshape(-1)[: self.spec.count]
        if self._places is not None:
            empty = values.new_zeros(self.spec.rows * self.spec.cols)
            values = empty.scatter(0, self._places, values)
        return values.view(self.spec.rows, self.spec.cols)

    def packed(self) -> Dense | Sparse:
        """The leaf as it is stored: the same spec and, of a sparse one, the same index.

        Raises:
            ValueError: where a value is not finite in the codec.
        """
        with torch.no_grad():
            grid, scale = Grid(), self._scales()
            if scale is not None:
                grid = self._codec.spread(Grid(scale.bfloat16(), self._zero), self.spec.count)
            values = self._codec.encode(self._rounded().reshape(-1)[: self.spec.count], grid)
        return self._kind(self.spec, {**self._index, **values})

    @property
    def _codec(self) -> Codec:
        codec: Codec = self.spec.codec
        return codec

    def _group(self, groups: int) -> int:
        """How many values the first group has."""
        numbers = torch.arange(groups)
        spread = self._codec.spread(Grid(numbers, numbers), self.spec.count).scale
        assert spread is not None
        return max(1, int((spread == 0).sum()))

    def _ends_of(self, grid: Grid) -> Tensor:
        """The first and the last integer of every group, counted from its zero, (2, groups, 1)."""
        assert grid.scale is not None
        assert grid.zero is not None
        beyond = torch.full((len(grid.scale), 1), float("inf"), device=grid.scale.device)
        ones = Grid(torch.ones_like(beyond), grid.zero[:, None])
        return torch.stack([self._codec.round(-beyond, ones), self._codec.round(beyond, ones)])

    def _scales(self) -> Tensor | None:
        """The scales as they are now, in float32."""
        return None if self.scales is None or self._scale is None else self.scales * self._scale.float()

    def _rounded(self) -> Tensor:
        """The values as they would be stored, in rows of one unit each; the last row is filled up."""
        values, scale = _rows(self.values, self._width), self._scales()
        if scale is None:
            floats: Tensor = _Floats.apply(values, self._units[:, None], self._codec)
            return floats
        integers: Tensor = _Integers.apply(values, self._units[:, None], scale[:, None], self._ends)
        return integers


@contextmanager
def built_once(model: nn.Module) -> Iterator[None]:
    """Within, every trainable leaf of `model` computes with one matrix, which is built here, however often it is asked for it.

    Gradients of the matrices add up, and are passed on to the parameters at the end. It takes the memory of all matrices, and
    of their gradients, in float32.
    """
    leaves = [leaf for leaf in model.modules() if isinstance(leaf, TrainableLeaf)]
    built = [leaf.build() for leaf in leaves]
    try:
        held = [matrix.detach().requires_grad_(matrix.requires_grad) for matrix in built]
        for leaf, matrix in zip(leaves, held, strict=True):
            leaf._built = matrix
        yield
        used = [(matrix, own.grad) for matrix, own in zip(built, held, strict=True) if own.grad is not None]
        torch.autograd.backward([matrix for matrix, _ in used], [gradient for _, gradient in used])
    finally:
        for leaf in leaves:
            leaf._built = None


class _Floats(torch.autograd.Function):
    """``values * units``, (runs, width) and (runs, 1), rounded to what `codec` stores."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, units: Tensor, codec: Codec) -> Tensor:
        ctx.save_for_backward(units)
        return codec.round(values * units, Grid())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (units,) = ctx.saved_tensors
        return gradients[0] * units, None, None


class _Integers(torch.autograd.Function):
    """``s q`` with ``q`` the integer at ``values * units`` (groups, width), and ``s`` the scale (groups, 1), as bfloat16.

    The gradient is ``q`` in ``s``, and ``s`` in the value before it is rounded, where the grid reaches it. Beyond the end of
    the grid only what leads back passes: LSQ (Esser et al., arXiv 1902.08153, eq. 3) has 0 there, and what the momentum of an
    optimiser has carried past the end would stay there for ever. That is no sum over the parts of a batch: see `built_once`.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, units: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
        stored = scale.bfloat16().float()
        exact = values * units
        integers = exact.round().clamp_(*ends)
        ctx.save_for_backward(exact, integers, stored, units)
        return integers * stored

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        exact, integers, stored, units = ctx.saved_tensors
        beyond = exact - integers
        passed = gradients[0] * (stored * units)
        stays = (beyond.abs() > 0.5 + _TIE) & (beyond * passed <= 0)
        return passed.masked_fill_(stays, 0), None, torch.linalg.vecdot(gradients[0], integers)[:, None], None


def _rows(values: Tensor, width: int) -> Tensor:
    """Values (count,) in rows of `width`, the last one filled up with zeros."""
    lacking = -len(values) % width
    return (nn.functional.pad(values, (0, lacking)) if lacking else values).view(-1, width)


def _ratio(values: Tensor, scale: Tensor) -> Tensor:
    """``values / scale``, and 0 where the scale is."""
    return torch.where(scale != 0, values / scale, 0.0)


def _offsets(rows: Tensor, units: Tensor) -> Tensor:
    """Where in its cell every integer begins, in (-1/2, 1/2), evenly spread over any run of them and the same every time.

    `rows` (groups, width), `units` (groups,).
    """
    numbers = torch.arange(1, rows.numel() + 1, dtype=torch.float64)
    evenly = ((numbers * _GOLDEN) % 1 - 0.5).float().view(rows.shape).to(rows.device)
    return evenly * (1 - 2 * MARGIN * units).clamp(*_WIDTHS)[:, None]


def _places(leaf: Sparse) -> Tensor:
    """Where each stored value stands, row by row: int64 (count,), in the order of the values."""
    numbers = torch.arange(1, leaf.spec.count + 1, device=next(leaf.parameters()).device)
    placed = leaf.placed(numbers).view(-1)
    found = placed.nonzero().squeeze(1)
    places = torch.empty_like(numbers)
    places[placed[found] - 1] = found
    return places


def _units(rows: Tensor, count: int) -> Tensor:
    """Of every row of values, of which there are `count`, float32 (rows,); see `TrainableLeaf`.

    A row of zeros has that of all values, these have 1. Products with powers of two are exact.
    """
    squares = rows.double().square().sum(1)
    counts = torch.full_like(squares, rows.shape[1])
    counts[-1:] -= rows.numel() - count
    means = torch.where(squares > 0, squares / counts, float(squares.sum()) / max(1, count) or 1.0)
    return (means.log2() / 2).floor().exp2().float()
