"""The algebra of stored matrices, as torch modules: leaves `Dense` and `Sparse`, nodes `Product` and `Sum`,
reference `Shared`.

Each stands for a matrix ``M (rows, cols)``: calling it on ``x (..., cols)`` gives ``x M^T (..., rows)`` in the dtype of
`x`, `to_dense` gives ``M``, and its parameters are exactly the integer tensors that its spec names. Nothing here fits.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lexigram.factors.codecs import Grid
from lexigram.factors.indices import in_blocks
from lexigram.factors.specs import DenseSpec, FactorSpec, Leaf, Node, ProductSpec, SharedSpec, SparseSpec, SumSpec


class Factor(nn.Module):
    """A stored matrix. `spec` describes it completely; `check` raises where stored tensors contradict it."""

    spec: Any

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, (rows, cols)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where its tensors are; of several parts, those of the first."""
        return next(self.parameters()).device

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
    def __init__(self, spec: Leaf, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """``x M^T``; the values are decoded for the length of the call only, and once more for the gradient in `x`."""
        if x.requires_grad and torch.is_grad_enabled():
            names, tensors = zip(*self._tensors().items(), strict=True)
            y: Tensor = _Applied.apply(x, partial(_like, self, names), *tensors)
            return y
        return nn.functional.linear(x, self.to_dense(x.dtype))

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The stored values, flat, in the order in which they are stored."""
        return self.spec.codec.decode(self._tensors(), self.spec.count, dtype)

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    def check(self) -> None:
        super().check()
        if not bool(torch.isfinite(self.decode(torch.float32)).all()):
            raise ValueError("a stored value is not finite")


class _Applied(torch.autograd.Function):
    """``x M^T`` of the leaf that `made` makes of stored tensors. These are kept for the gradient in `x`, and decoded anew.

    It is they and not the leaf, which may have none by then: an offloaded one has them for its call alone.
    """

    @staticmethod
    def forward(x: Tensor, made: Callable[..., Factor], *tensors: Tensor) -> Tensor:
        return nn.functional.linear(x, made(*tensors).to_dense(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.made, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        matrix = ctx.made(*ctx.saved_tensors).to_dense(gradients[0].dtype)
        return gradients[0] @ matrix, None, *(None for _ in ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return nn.functional.linear(tangents[0], ctx.made(*ctx.saved_tensors).to_dense(tangents[0].dtype))


def _like(leaf: _Leaf, names: Sequence[str], *tensors: Tensor) -> Factor:
    """A leaf of the same form, with these tensors."""
    return type(leaf)(leaf.spec, dict(zip(names, tensors, strict=True)))


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
    """The non-zeros, whole blocks of them, beside an index of where they stand."""

    @classmethod
    def encode(
        cls, matrix: Tensor, spec: SparseSpec, support: Tensor | None = None, grid: Grid | None = None
    ) -> "Sparse":
        """Round `matrix` (rows, cols) into the stored form.

        Args:
            matrix: any float dtype; entries outside the support are ignored.
            spec: tells how many entries are stored, and in what blocks.
            support: bool (rows, cols) with exactly ``spec.nonzeros`` True, in whole blocks; by default the blocks that hold
                the non-zeros of `matrix`, filled up with its first empty blocks where there are fewer.
            grid: of the stored values, any shape read in row-major order; by default chosen by the codec. The values are
                ``in_blocks(matrix, spec.block)``, indexed by the table of kept blocks; without blocks, ``matrix[support]``.

        Raises:
            ValueError: where `matrix` has more non-zeros than the spec has room for, the support cuts through a block, or the
                grid is not that of as many values.
        """
        places, wanted = spec.places, in_blocks(matrix != 0 if support is None else support, spec.block)
        kept = wanted.any(dim=(2, 3)).contiguous()
        height, width = spec.block
        if support is not None and not torch.equal(wanted, kept[:, :, None, None].expand_as(wanted)):
            raise ValueError(f"the support does not consist of whole blocks of {height} x {width}")
        missing = places.count - int(kept.sum())
        if missing < 0:
            raise ValueError(
                f"{(places.count - missing) * height * width} non-zeros do not fit into the spec's {spec.nonzeros}, counted "
                f"in whole blocks of {height} x {width}"
            )
        if missing:
            empty = (~kept.view(-1)).nonzero().squeeze(1)[:missing]
            kept.view(-1)[empty] = True
        return cls(spec, {**places.encode(kept), **spec.codec.encode(in_blocks(matrix, spec.block)[kept], grid)})

    def support(self) -> Tensor:
        """Where values are stored: bool (rows, cols)."""
        return self.placed(torch.ones(self.spec.count, dtype=torch.bool, device=self.device))

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Factor.to_dense`."""
        return self.placed(self.decode(dtype))

    def check(self) -> None:
        """See `Factor.check`; the index must tell a place for every block of values."""
        super().check()
        self.spec.places.check(self._tensors())

    def placed(self, values: Tensor) -> Tensor:
        """The matrix with `values` (count,), in stored order, in their places and zeros elsewhere."""
        matrix = values.new_zeros(self.spec.rows, self.spec.cols)
        places = self.spec.places
        blocks = in_blocks(matrix, places.block)
        places.place(self._tensors(), values.view(places.count, *places.block), blocks)
        return matrix


class _Node(Factor):
    """Two matrices in one expression."""

    def __init__(self, left: Factor, right: Factor, spec: Node) -> None:
        super().__init__()
        self.left = left
        self.right = right
        self.spec = spec

    @property
    def device(self) -> torch.device:
        """See `Factor.device`."""
        return self.left.device

    def check(self) -> None:
        """See `Factor.check`; both sides are checked, and the error tells which is wrong."""
        for side, part in (("left", self.left), ("right", self.right)):
            try:
                part.check()
            except ValueError as error:
                raise ValueError(f"{side}: {error}") from error


class Product(_Node):
    """`left` times `right`, applied one after the other: the product is never formed."""

    def __init__(self, left: Factor, right: Factor) -> None:
        super().__init__(left, right, ProductSpec(left=left.spec, right=right.spec))

    def forward(self, x: Tensor) -> Tensor:
        """``(x right^T) left^T``."""
        return self.left(self.right(x))

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Factor.to_dense`; multiplied in float32."""
        return (self.left.to_dense() @ self.right.to_dense()).to(dtype)


class Sum(_Node):
    """`left` plus `right`, both applied to the same inputs."""

    def __init__(self, left: Factor, right: Factor) -> None:
        super().__init__(left, right, SumSpec(left=left.spec, right=right.spec))

    def forward(self, x: Tensor) -> Tensor:
        """``x left^T + x right^T``."""
        y: Tensor = self.left(x) + self.right(x)
        return y

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Factor.to_dense`; added in float32."""
        return (self.left.to_dense() + self.right.to_dense()).to(dtype)


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

    @property
    def device(self) -> torch.device:
        """Where the matrix is held."""
        return self._owner[0].device

    def forward(self, x: Tensor) -> Tensor:
        """``x M^T``."""
        y: Tensor = self._owner[0](x)
        return y

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Factor.to_dense`."""
        return self._owner[0].to_dense(dtype)


def empty(spec: FactorSpec, shared: Mapping[str, Factor] = MappingProxyType({})) -> Factor:
    """Modules for `spec` with unset tensors on the default device (meta, while a loader builds its skeleton).

    Args:
        spec: the expression.
        shared: the matrices that it may refer to, by name.

    Raises:
        ValueError: where it refers to a matrix that `shared` does not have, or has in another shape.
    """
    if isinstance(spec, Node):
        return _NODES[type(spec)](empty(spec.left, shared), empty(spec.right, shared))
    if isinstance(spec, SharedSpec):
        return _reference(spec, shared)
    return _LEAVES[type(spec)](spec, _unset(spec))


def with_leaves(
    factor: Factor, change: Callable[[Factor], Factor], shared: Mapping[str, Factor] = MappingProxyType({})
) -> Factor:
    """The same expression with ``change(leaf)`` in the place of every leaf; nodes are made anew.

    Args:
        factor: the expression.
        change: gives a matrix of the same spec.
        shared: what its references are to refer to, by name.

    Raises:
        ValueError: where it refers to a matrix that `shared` does not have, or has in another shape.
    """
    if isinstance(factor, Product | Sum):
        return type(factor)(with_leaves(factor.left, change, shared), with_leaves(factor.right, change, shared))
    if isinstance(factor, Shared):
        return _reference(factor.spec, shared)
    return change(factor)


def encode(matrix: Tensor, spec: FactorSpec, grid: Grid | None = None) -> Factor:
    """Round `matrix` (rows, cols) into the leaf that `spec` describes, in the grid of its stored values if one is given.

    Raises:
        ValueError: where it does not fit, is not finite, or `spec` is no leaf.
    """
    if isinstance(spec, Node | SharedSpec):
        raise ValueError(f"a matrix is stored in a leaf, and {spec.form!r} is none; encode its parts by themselves")
    if tuple(matrix.shape) != (spec.rows, spec.cols):
        raise ValueError(f"a matrix {tuple(matrix.shape)} does not fit a spec of {spec.rows} x {spec.cols}")
    return _LEAVES[type(spec)].encode(matrix, spec, grid=grid)


_LEAVES: dict[type, Any] = {DenseSpec: Dense, SparseSpec: Sparse}
_NODES: dict[type, Any] = {ProductSpec: Product, SumSpec: Sum}


def _reference(spec: SharedSpec, shared: Mapping[str, Factor]) -> Shared:
    if spec.name not in shared:
        raise ValueError(f"the shared matrix {spec.name} is not described")
    return Shared(spec, shared[spec.name])


def _unset(leaf: Leaf) -> dict[str, Tensor]:
    return {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in leaf.stored().items()}
