"""The algebra of factors that replace a weight: what they are (`specs`), their values (`forms`), how values are stored
(`codecs`). One `bytes`, one `to_dense`, one forward for every method.
"""

from lexigram.factors.codecs import Bfloat, Codec, Grid, Integer, StoredTensor, group_size
from lexigram.factors.forms import Dense, Factor, Product, Shared, Sparse, empty, encode
from lexigram.factors.specs import (
    DenseSpec,
    FactorSpec,
    GroupSpec,
    Leaf,
    ProductSpec,
    SharedSpec,
    SparseSpec,
    factor_spec,
)

__all__ = [
    "Bfloat",
    "Codec",
    "Dense",
    "DenseSpec",
    "Factor",
    "FactorSpec",
    "Grid",
    "GroupSpec",
    "Integer",
    "Leaf",
    "Product",
    "ProductSpec",
    "Shared",
    "SharedSpec",
    "Sparse",
    "SparseSpec",
    "StoredTensor",
    "empty",
    "encode",
    "factor_spec",
    "group_size",
]
