"""The algebra of factors that replace a weight: what they are (`specs`), their values (`forms`), how values are stored
(`codecs`), where those of a sparse matrix stand (`indices`), and how values train (`training`). One `bytes`, one `to_dense`,
one forward for every method.
"""

from lexigram.factors.codecs import Bfloat, Codec, Grid, Integer, StoredTensor, group_size
from lexigram.factors.forms import Dense, Factor, Product, Shared, Sparse, Sum, empty, encode, with_leaves
from lexigram.factors.indices import IndexName, in_blocks
from lexigram.factors.specs import (
    LONGEST,
    DenseSpec,
    FactorSpec,
    GroupSpec,
    Leaf,
    ProductSpec,
    SharedName,
    SharedSpec,
    SparseSpec,
    SumSpec,
    factor_spec,
)
from lexigram.factors.training import TrainableLeaf

__all__ = [
    "LONGEST",
    "Bfloat",
    "Codec",
    "Dense",
    "DenseSpec",
    "Factor",
    "FactorSpec",
    "Grid",
    "GroupSpec",
    "IndexName",
    "Integer",
    "Leaf",
    "Product",
    "ProductSpec",
    "Shared",
    "SharedName",
    "SharedSpec",
    "Sparse",
    "SparseSpec",
    "StoredTensor",
    "Sum",
    "SumSpec",
    "TrainableLeaf",
    "empty",
    "encode",
    "factor_spec",
    "group_size",
    "in_blocks",
    "with_leaves",
]
