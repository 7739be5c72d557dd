"""What a factor expression is, as data: forms, shapes and codecs without a single value.

A spec fixes every stored tensor, and with it the exact size, before anything is fitted; it is what a plan adds up, what
a checkpoint writes beside each layer and what the loader builds empty modules from. The values live in `forms`.

Every expression stands for a matrix ``(rows, cols)`` in torch's ``(out, in)`` orientation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from lexigram.factors.codecs import Bfloat, Codec, StoredTensor
from lexigram.factors.indices import INDICES, Index, IndexName

LONGEST = 2**24
"""Rows or columns that a matrix may have."""

Dimension = Annotated[int, Field(ge=1, le=LONGEST)]
SharedName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def stored(self) -> dict[str, StoredTensor]:
        """Every stored tensor by its name inside the expression (``left.values``, ``right.mask``, ...)."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Stored bytes: values, indices, scales; file headers aside."""
        return sum(tensor.bytes for tensor in self.stored().values())

    def leaves(self) -> Iterator[tuple[str, Leaf]]:
        """(path, leaf) of every leaf, left to right; the path of a lone leaf is empty."""
        raise NotImplementedError

    def references(self) -> Iterator[SharedSpec]:
        """Every reference to a matrix that lies elsewhere."""
        return iter(())

    @property
    def parameters(self) -> int:
        """The papers' size: stored values, with indices and scales not counted."""
        return sum(leaf.count for _, leaf in self.leaves())


class DenseSpec(_Spec):
    """A matrix with every value stored."""

    form: Literal["dense"] = "dense"
    rows: Dimension
    cols: Dimension
    codec: Codec = Bfloat()

    @property
    def count(self) -> int:
        """How many values are stored."""
        return self.rows * self.cols

    def stored(self) -> dict[str, StoredTensor]:
        """See `_Spec.stored`."""
        return self.codec.stored(self.count)

    def leaves(self) -> Iterator[tuple[str, Leaf]]:
        """See `_Spec.leaves`."""
        yield "", self


class SparseSpec(_Spec):
    """A matrix with `nonzeros` stored values and an index that tells where they are.

    Whole blocks of `block` (rows x cols of a block) are stored or left out: (1, 1) are single entries, (1, cols) rows,
    (rows, 1) columns. Values follow each other block by block, block-rows from the top and each from the left, and row by row
    inside a block. The index is a `bitmask`, one bit a block, or a `list` of the stored blocks' block-columns beside a count
    for every block-row.
    """

    form: Literal["sparse"] = "sparse"
    rows: Dimension
    cols: Dimension
    nonzeros: Annotated[int, Field(ge=0)]
    codec: Codec = Bfloat()
    index: IndexName = "bitmask"
    block: tuple[Dimension, Dimension] = (1, 1)

    @model_validator(mode="after")
    def _fits(self) -> SparseSpec:
        if self.nonzeros > self.rows * self.cols:
            raise ValueError(f"{self.nonzeros} non-zeros do not fit into {self.rows} x {self.cols}")
        height, width = self.block
        if self.rows % height or self.cols % width:
            raise ValueError(f"blocks of {height} x {width} do not divide {self.rows} x {self.cols}")
        if self.nonzeros % (height * width):
            raise ValueError(f"{self.nonzeros} non-zeros are no whole number of blocks of {height} x {width}")
        return self

    @classmethod
    def lightest(cls, rows: int, cols: int, nonzeros: int, codec: Codec, block: tuple[int, int] = (1, 1)) -> SparseSpec:
        """The spec with the index that takes the fewest bytes, a bitmask where both take as many."""
        specs = [
            cls(rows=rows, cols=cols, nonzeros=nonzeros, codec=codec, index=index, block=block) for index in INDICES
        ]
        return min(specs, key=lambda spec: spec.bytes)

    @property
    def places(self) -> Index:
        """The index of the stored blocks."""
        height, width = self.block
        count = self.nonzeros // (height * width)
        return INDICES[self.index](self.rows // height, self.cols // width, self.block, count)

    @property
    def count(self) -> int:
        """How many values are stored."""
        return self.nonzeros

    def stored(self) -> dict[str, StoredTensor]:
        """See `_Spec.stored`."""
        return {**self.places.stored(), **self.codec.stored(self.count)}

    def leaves(self) -> Iterator[tuple[str, Leaf]]:
        """See `_Spec.leaves`."""
        yield "", self


class SharedSpec(_Spec):
    """A matrix that lies elsewhere, under `name`, for several expressions: it stores nothing here."""

    form: Literal["shared"] = "shared"
    name: SharedName
    rows: Dimension
    cols: Dimension

    def stored(self) -> dict[str, StoredTensor]:
        """Nothing: the matrix is counted where it lies."""
        return {}

    def leaves(self) -> Iterator[tuple[str, Leaf]]:
        """None of its own."""
        return iter(())

    def references(self) -> Iterator[SharedSpec]:
        """This one."""
        yield self


class _NodeSpec(_Spec):
    """Two expressions in one: what is stored, and where, is that of both sides."""

    form: str
    left: FactorSpec
    right: FactorSpec

    @property
    def rows(self) -> int:
        """Output dimension."""
        return self.left.rows

    @property
    def cols(self) -> int:
        """Input dimension."""
        return self.right.cols

    def stored(self) -> dict[str, StoredTensor]:
        """See `_Spec.stored`."""
        return {
            f"{side}.{name}": tensor
            for side, part in (("left", self.left), ("right", self.right))
            for name, tensor in part.stored().items()
        }

    def leaves(self) -> Iterator[tuple[str, Leaf]]:
        """See `_Spec.leaves`."""
        for side, part in (("left", self.left), ("right", self.right)):
            for path, leaf in part.leaves():
                yield f"{side}.{path}".rstrip("."), leaf

    def references(self) -> Iterator[SharedSpec]:
        """See `_Spec.references`."""
        yield from self.left.references()
        yield from self.right.references()

    def _of_both(self) -> str:
        return f"of {self.left.rows} x {self.left.cols} and {self.right.rows} x {self.right.cols} does not exist"


class ProductSpec(_NodeSpec):
    """`left` times `right`; the inner dimension is the rank or the number of atoms."""

    form: Literal["product"] = "product"

    @model_validator(mode="after")
    def _chains(self) -> ProductSpec:
        if self.left.cols != self.right.rows:
            raise ValueError(f"a product {self._of_both()}; the inner dimensions must agree")
        return self


class SumSpec(_NodeSpec):
    """`left` plus `right`, two matrices of one shape."""

    form: Literal["sum"] = "sum"

    @model_validator(mode="after")
    def _matches(self) -> SumSpec:
        if (self.left.rows, self.left.cols) != (self.right.rows, self.right.cols):
            raise ValueError(f"a sum {self._of_both()}; the shapes must agree")
        return self


Leaf = DenseSpec | SparseSpec
Node = ProductSpec | SumSpec
FactorSpec = Annotated[DenseSpec | SparseSpec | SharedSpec | ProductSpec | SumSpec, Field(discriminator="form")]
ProductSpec.model_rebuild()
SumSpec.model_rebuild()


class GroupSpec(BaseModel):
    """Several matrices that are fitted together, and the leaf that they share, where there is one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    members: tuple[FactorSpec, ...]
    shared: Annotated[DenseSpec | SparseSpec, Field(discriminator="form")] | None = None

    @model_validator(mode="after")
    def _refers(self) -> GroupSpec:
        wanted = {(ref.name, ref.rows, ref.cols) for member in self.members for ref in member.references()}
        sizes = [] if self.shared is None else [(self.shared.rows, self.shared.cols)]
        if [(rows, cols) for _, rows, cols in sorted(wanted)] != sizes:
            raise ValueError(
                f"the members refer to {sorted(wanted) or 'no shared matrix'}, and the group has {sizes or 'none'}; "
                "members share one matrix of one size, by one name"
            )
        return self

    @property
    def bytes(self) -> int:
        """Stored bytes of all members, a shared leaf counted once."""
        return sum(part.bytes for part in self._parts())

    @property
    def parameters(self) -> int:
        """The papers' size of the same."""
        return sum(part.parameters for part in self._parts())

    def _parts(self) -> list[_Spec]:
        return [*self.members, *([] if self.shared is None else [self.shared])]


factor_spec: TypeAdapter[FactorSpec] = TypeAdapter(FactorSpec)
"""Validates plain data (from a checkpoint's JSON) into a spec."""
