"""The algebra of factors that replace a weight: what they are (`specs`), their values (`forms`), how values are stored
(`codecs`). One `bytes`, one `to_dense`, one forward for every method.
"""

from lexigram.factors.codecs import Bfloat, Codec, StoredTensor
from lexigram.factors.forms import Dense, Factor, Product, Sparse, empty, encode
from lexigram.factors.specs import DenseSpec, FactorSpec, ProductSpec, SparseSpec, factor_spec

__all__ = [
    "Bfloat",
    "Codec",
    "Dense",
    "DenseSpec",
    "Factor",
    "FactorSpec",
    "Product",
    "ProductSpec",
    "Sparse",
    "SparseSpec",
    "StoredTensor",
    "empty",
    "encode",
    "factor_spec",
]
