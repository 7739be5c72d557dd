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
from lexigram.methods.cospadi import PRESETS, CospadiConfig
from lexigram.methods.quantize import QuantizeConfig
from lexigram.methods.svd import SvdConfig

AnyMethod = Annotated[CospadiConfig | QuantizeConfig | SvdConfig, Field(discriminator="name")]
METHODS: dict[str, type[MethodConfig]] = {"cospadi": CospadiConfig, "quantize": QuantizeConfig, "svd": SvdConfig}

__all__ = [
    "METHODS",
    "PRESETS",
    "AnyMethod",
    "Budget",
    "BudgetTooSmallError",
    "CospadiConfig",
    "FitReport",
    "Fitted",
    "Member",
    "MethodConfig",
    "QuantizeConfig",
    "SvdConfig",
    "fit",
    "fit_group",
    "layout",
    "layout_group",
]
