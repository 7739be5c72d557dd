"""The algebra of stored matrices, as torch modules: leaves `Dense` and `Sparse`, node `Product`, reference `Shared`.

Each stands for a matrix ``M (rows, cols)``: calling it on ``x (..., cols)`` gives ``x M^T (..., rows)`` in the dtype of
`x`, `to_dense` gives ``M``, and its parameters are exactly the integer tensors that its spec names. Nothing here fits.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lexigram.factors.bits import pack_bits, unpack_bits
from lexigram.factors.codecs import Grid
from lexigram.factors.specs import DenseSpec, ProductSpec, SharedSpec, SparseSpec


class Factor(nn.Module):
    """A stored matrix. `spec` describes it completely; `check` raises where stored tensors contradict it."""

    spec: Any

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, (rows, cols)."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ValueError where the stored tensors are not what the spec promises."""
        for name, expected in self.spec.stored().items():
            found = self.get_parameter(name)
            if found.dtype != expected.dtype or tuple(found.shape) != expected.shape:
                raise ValueError(
                    f"{name} is {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {expected.shape}"
                )

    def extra_repr(self) -> str:
        """Shape and size, for print(model)."""
        return f"{self.spec.rows} x {self.spec.cols}, {self.spec.bytes} bytes"


class _Leaf(Factor):
    def __init__(self, spec: DenseSpec | SparseSpec, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """``x M^T``; the values are decoded for the length of the call only."""
        return nn.functional.linear(x, self.to_dense(x.dtype))

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The stored values, flat, in row-major order."""
        return self.spec.codec.decode(dict(self.named_parameters()), self.spec.count, dtype)

    def check(self) -> None:
        super().check()
        if not bool(torch.isfinite(self.decode(torch.float32)).all()):
            raise ValueError("a stored value is not finite")


class Dense(_Leaf):
    """Every value stored."""

    @classmethod
    def encode(cls, matrix: Tensor, spec: DenseSpec, grid: Grid | None = None) -> "Dense":
        """Round `matrix` (rows, cols) into the stored form; `grid`, of that shape, is by default chosen by the codec."""
        return cls(spec, spec.codec.encode(matrix, grid))

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Factor.to_dense`."""
        return self.decode(dtype).view(self.spec.rows, self.spec.cols)


class Sparse(_Leaf):
    """The non-zeros in row-major order, beside a bitmask."""

    @classmethod
    def encode(
        cls, matrix: Tensor, spec: SparseSpec, support: Tensor | None = None, grid: Grid | None = None
    ) -> "Sparse":
        """Round `matrix` (rows, cols) into the stored form.

        Args:
            matrix: any float dtype; entries outside the support are ignored.
            spec: tells how many entries are stored.
            support: bool (rows, cols) with exactly ``spec.nonzeros`` True; by default the non-zeros of `matrix`, filled up
                with its first zeros where there are fewer.
            grid: of the stored values ``matrix[support]``, any shape read in row-major order; by default chosen by the codec.

        Raises:
            ValueError: where `matrix` has more non-zeros than the spec has room for, or the grid is not that of as many
                values.
        """
        matrix = matrix.contiguous()
        support = (matrix != 0) if support is None else support.clone(memory_format=torch.contiguous_format)
        missing = spec.nonzeros - int(support.sum())
        if missing < 0:
            raise ValueError(f"{spec.nonzeros - missing} non-zeros do not fit into the spec's {spec.nonzeros}")
        if missing:
            empty = (~support.view(-1)).nonzero().squeeze(1)[:missing]
            support.view(-1)[empty] = True
        return cls(spec, {"mask": pack_bits(support, 1), **spec.codec.encode(matrix[support], grid)})

    def support(self) -> Tensor:
        """Where values are stored: bool (rows, cols)."""
        count = self.spec.rows * self.spec.cols
        return unpack_bits(self.get_parameter("mask"), count, 1).view(self.spec.rows, self.spec.cols)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Factor.to_dense`."""
        support = self.support()
        return torch.zeros(support.shape, dtype=dtype, device=support.device).masked_scatter_(
            support, self.decode(dtype)
        )

    def check(self) -> None:
        """See `Factor.check`; the mask must have as many bits as there are values."""
        super().check()
        found = int(self.support().sum())
        if found != self.spec.nonzeros:
            raise ValueError(f"the mask has {found} bits set for {self.spec.nonzeros} stored values")


class Product(Factor):
    """`left` times `right`, applied one after the other: the product is never formed."""

    def __init__(self, left: Factor, right: Factor) -> None:
        super().__init__()
        self.left = left
        self.right = right
        self.spec = ProductSpec(left=left.spec, right=right.spec)

    def forward(self, x: Tensor) -> Tensor:
        """``(x right^T) left^T``."""
        return self.left(self.right(x))

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Factor.to_dense`; multiplied in float32."""
        return (self.left.to_dense() @ self.right.to_dense()).to(dtype)

    def check(self) -> None:
        """See `Factor.check`."""
        for side, part in (("left", self.left), ("right", self.right)):
            try:
                part.check()
            except ValueError as error:
                raise ValueError(f"{side}: {error}") from error


class Shared(Factor):
    """A matrix that another module holds, for several expressions at once.

    The reference is no submodule: the matrix is stored, moved and counted once, by whoever owns it. It is always *called*,
    because its values may be on a disk until a call brings them in.
    """

    def __init__(self, spec: SharedSpec, owner: Factor) -> None:
        super().__init__()
        if (owner.spec.rows, owner.spec.cols) != (spec.rows, spec.cols):
            raise ValueError(
                f"{spec.name} is shared as {spec.rows} x {spec.cols}, but it is {owner.spec.rows} x {owner.spec.cols}"
            )
        self.spec = spec
        self._owner = (owner,)  # a tuple is not registered as a submodule, and deepcopy still follows it

    def forward(self, x: Tensor) -> Tensor:
        """``x M^T``."""
        y: Tensor = self._owner[0](x)
        return y

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Factor.to_dense`."""
        return self._owner[0].to_dense(dtype)


def empty(
    spec: DenseSpec | SparseSpec | SharedSpec | ProductSpec, shared: Mapping[str, Factor] = MappingProxyType({})
) -> Factor:
    """Modules for `spec` with unset tensors on the default device (meta, while a loader builds its skeleton).

    Args:
        spec: the expression.
        shared: the matrices that it may refer to, by name.

    Raises:
        ValueError: where it refers to a matrix that `shared` does not have, or has in another shape.
    """
    if isinstance(spec, ProductSpec):
        return Product(empty(spec.left, shared), empty(spec.right, shared))
    if isinstance(spec, SharedSpec):
        if spec.name not in shared:
            raise ValueError(f"the shared matrix {spec.name} is not described")
        return Shared(spec, shared[spec.name])
    return _LEAVES[type(spec)](spec, _unset(spec))


def encode(matrix: Tensor, spec: DenseSpec | SparseSpec | SharedSpec | ProductSpec, grid: Grid | None = None) -> Factor:
    """Round `matrix` (rows, cols) into the leaf that `spec` describes, in the grid of its stored values if one is given.

    Raises:
        ValueError: where it does not fit, is not finite, or `spec` is no leaf.
    """
    if isinstance(spec, ProductSpec | SharedSpec):
        raise ValueError(f"a matrix is stored in a leaf, and {spec.form!r} is none; encode its parts by themselves")
    if tuple(matrix.shape) != (spec.rows, spec.cols):
        raise ValueError(f"a matrix {tuple(matrix.shape)} does not fit a spec of {spec.rows} x {spec.cols}")
    return _LEAVES[type(spec)].encode(matrix, spec, grid=grid)


_LEAVES: dict[type, Any] = {DenseSpec: Dense, SparseSpec: Sparse}


def _unset(leaf: DenseSpec | SparseSpec) -> dict[str, Tensor]:
    return {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in leaf.stored().items()}
