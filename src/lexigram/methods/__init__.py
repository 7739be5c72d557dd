"""The methods: `(config, weight, gram, spec, generator) -> (factors, report)`, one file each.

They read and write no files and know no models. `METHODS` is the one list of them.
"""

from typing import Annotated

from pydantic import Field

from lexigram.methods.base import (
    Budget,
    BudgetTooSmallError,
    FitReport,
    Fitted,
    Member,
    MethodConfig,
    fit,
    fit_group,
    layout,
    layout_group,
)
from lexigram.methods.cap import CapConfig
from lexigram.methods.cospadi import PRESETS, CospadiConfig
from lexigram.methods.double_sparse import DoubleSparseConfig
from lexigram.methods.lowrank_sparse import LowRankSparseConfig
from lexigram.methods.oats import OatsConfig
from lexigram.methods.pruning import MagnitudeConfig, SparseGptConfig, WandaConfig
from lexigram.methods.quantize import QuantizeConfig
from lexigram.methods.structured import StructuredConfig
from lexigram.methods.svd import SvdConfig

AnyMethod = Annotated[
    CapConfig
    | CospadiConfig
    | DoubleSparseConfig
    | LowRankSparseConfig
    | MagnitudeConfig
    | OatsConfig
    | QuantizeConfig
    | SparseGptConfig
    | StructuredConfig
    | SvdConfig
    | WandaConfig,
    Field(discriminator="name"),
]
METHODS: dict[str, type[MethodConfig]] = {
    "cospadi": CospadiConfig,
    "svd": SvdConfig,
    "quantize": QuantizeConfig,
    "lowrank-sparse": LowRankSparseConfig,
    "double-sparse": DoubleSparseConfig,
    "cap": CapConfig,
    "oats": OatsConfig,
    "sparsegpt": SparseGptConfig,
    "wanda": WandaConfig,
    "magnitude": MagnitudeConfig,
    "structured": StructuredConfig,
}

__all__ = [
    "METHODS",
    "PRESETS",
    "AnyMethod",
    "Budget",
    "BudgetTooSmallError",
    "CapConfig",
    "CospadiConfig",
    "DoubleSparseConfig",
    "FitReport",
    "Fitted",
    "LowRankSparseConfig",
    "MagnitudeConfig",
    "Member",
    "MethodConfig",
    "OatsConfig",
    "QuantizeConfig",
    "SparseGptConfig",
    "StructuredConfig",
    "SvdConfig",
    "WandaConfig",
    "fit",
    "fit_group",
    "layout",
    "layout_group",
]
