"""Compressed models in transformers: the module (`linear`), registration (`quantizer`), saving and loading.

Importing this package registers our format, so that plain ``from_pretrained`` opens it.
"""

from lexigram.transformers_io.adapters import merge_adapters
from lexigram.transformers_io.linear import (
    SHARED,
    FactoredLinear,
    LayerSpec,
    factored_layers,
    make_dense,
    replace_leaves,
    share,
    shared_matrices,
    stored_tensors,
)
from lexigram.transformers_io.loading import export_dense, is_compressed, load, open_model
from lexigram.transformers_io.quantizer import LexigramConfig, LexigramQuantizer, describe

__all__ = [
    "SHARED",
    "FactoredLinear",
    "LayerSpec",
    "LexigramConfig",
    "LexigramQuantizer",
    "describe",
    "export_dense",
    "factored_layers",
    "is_compressed",
    "load",
    "make_dense",
    "merge_adapters",
    "open_model",
    "replace_leaves",
    "share",
    "shared_matrices",
    "stored_tensors",
]
