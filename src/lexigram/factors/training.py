"""Stored leaves as they train: the stored values are float parameters, the places of a sparse matrix stay as they are.

A leaf computes with its values as they would be stored, so that what is trained is what is packed in the end, to the bit.
Gradients pass the rounding straight through (Bengio et al., arXiv 1308.3432); those of group scales are the ones of LSQ (Esser
et al., arXiv 1902.08153, eq. 3), zeros stay. Nothing here knows an objective.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lexigram.factors.codecs import Codec, Grid
from lexigram.factors.forms import Dense, Factor, Sparse

RUN = 64
"""Stored values that follow each other and have one unit."""

_TIE = 1e-3  # of a step: a value in the middle between two is no farther than half a step, up to rounding


class TrainableLeaf(Factor):
    """A `Dense` or `Sparse` leaf with float32 parameters in the place of its stored values; `packed` stores them.

    `values` (count,) are in units, one for each run of `RUN` of them: the power of two at or below the run's root mean square.
    `scales` (groups,) are in units of those that were stored. So one step of an optimiser is as large, as a share, for all of
    them: rows of one factor may differ by orders of magnitude, and often do. A leaf of zeros does not train, nor does a group
    whose scale is 0.

    A call builds the matrix, (rows, cols) in float32; beside that a sparse leaf takes 8 bytes a value for its places.
    """

    values: nn.Parameter
    scales: nn.Parameter | None
    _units: Tensor
    _scale: Tensor | None
    _zero: Tensor | None
    _places: Tensor | None

    def __init__(self, leaf: Factor) -> None:
        super().__init__()
        if not isinstance(leaf, Dense | Sparse):
            raise ValueError(f"only a stored matrix trains, and {type(leaf).__name__} is none")
        self.spec = leaf.spec
        tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in leaf.named_parameters()}
        values = leaf.decode(torch.float32)
        self.register_buffer("_units", _units(values), persistent=False)
        trains = bool(values.any())
        self.values = nn.Parameter(values / self._spread_units(), requires_grad=trains)
        grid, self.scales = self._codec.stored_grid(tensors), None
        if grid.scale is not None:
            self.scales = nn.Parameter(torch.ones_like(grid.scale, dtype=torch.float32), requires_grad=trains)
        self.register_buffer("_scale", grid.scale, persistent=False)
        self.register_buffer("_zero", grid.zero, persistent=False)
        self._kind = type(leaf)
        self._index = {name: tensors[name] for name in tensors if name not in self._codec.stored(self.spec.count)}
        self.register_buffer("_places", _places(leaf) if isinstance(leaf, Sparse) else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x M^T``."""
        return nn.functional.linear(x, self.to_dense(x.dtype))

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Factor.to_dense`; differentiable."""
        grid = self._codec.spread(self._grid(), self.spec.count)
        values: Tensor = _Rounding.apply(self.values * self._spread_units(), grid.scale, grid.zero, self._codec)
        if self._places is not None:
            empty = values.new_zeros(self.spec.rows * self.spec.cols)
            values = empty.scatter(0, self._places, values)
        return values.view(self.spec.rows, self.spec.cols).to(dtype)

    def packed(self) -> Dense | Sparse:
        """The leaf as it is stored: the same spec and, of a sparse one, the same index.

        Raises:
            ValueError: where a value is not finite in the codec.
        """
        with torch.no_grad():
            grid = self._grid()
            if grid.scale is not None:
                grid = self._codec.spread(Grid(grid.scale.bfloat16(), grid.zero), self.spec.count)
            values = self._codec.encode(self.values * self._spread_units(), grid)
        return self._kind(self.spec, {**self._index, **values})

    @property
    def _codec(self) -> Codec:
        codec: Codec = self.spec.codec
        return codec

    def _spread_units(self) -> Tensor:
        """One unit a value, (count,)."""
        return self._units[:, None].expand(-1, RUN).reshape(-1)[: self.spec.count]

    def _grid(self) -> Grid:
        """The scales as they are now, in float32, and the zeros; (groups,) each."""
        if self.scales is None or self._scale is None:
            return Grid()
        return Grid(self.scales * self._scale.float(), self._zero)


class _Rounding(torch.autograd.Function):
    """Values (count,) rounded to what `codec` stores, on a grid with one entry a value, whose scales round to bfloat16.

    With ``q`` the integer of a value ``v`` counted from zero, the gradient of ``s q`` is 1 in ``v`` and ``q - v / s`` in ``s``
    where the grid reaches ``v``; beyond its end it is 0 in ``v`` and ``q`` in ``s``.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor | None, zero: Tensor | None, codec: Codec) -> Tensor:
        stored = None if scale is None else scale.bfloat16()
        rounded = codec.round(values, Grid(stored, zero))
        ctx.save_for_backward(*(() if stored is None else (values, stored, rounded)))
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if not ctx.saved_tensors:
            return gradient, None, None, None
        values, scale, rounded = ctx.saved_tensors
        step = scale.float()
        reached = (rounded - values).abs() <= (0.5 + _TIE) * step.abs()
        moved = torch.where(step != 0, (rounded - values * reached) / step, 0.0)
        return gradient * reached, gradient * moved, None, None


def _places(leaf: Sparse) -> Tensor:
    """Where each stored value stands, row by row: int64 (count,), in the order of the values."""
    numbers = torch.arange(1, leaf.spec.count + 1, device=next(leaf.parameters()).device)
    placed = leaf.placed(numbers).view(-1)
    found = placed.nonzero().squeeze(1)
    places = torch.empty_like(numbers)
    places[placed[found] - 1] = found
    return places


def _units(values: Tensor) -> Tensor:
    """Of every run of values (count,), float32; see `TrainableLeaf`. A run of zeros has that of all values, these have 1.

    Products with powers of two are exact.
    """
    squares = nn.functional.pad(values.double().square(), (0, -values.numel() % RUN)).view(-1, RUN).sum(1)
    counts = torch.full_like(squares, RUN)
    counts[-1:] -= -values.numel() % RUN
    means = torch.where(squares > 0, squares / counts, float(squares.sum()) / max(1, values.numel()) or 1.0)
    return (means.log2() / 2).floor().exp2().float()
