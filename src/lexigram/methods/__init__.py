"""The methods: `(config, weight, gram, spec, generator) -> (factors, report)`, one file each.

They read and write no files and know no models. `METHODS` is the one list of them.
"""

from typing import Annotated

from pydantic import Field

from lexigram.methods.base import Budget, BudgetTooSmallError, FitReport, MethodConfig, fit, layout
from lexigram.methods.cospadi import PRESETS, CospadiConfig
from lexigram.methods.svd import SvdConfig

AnyMethod = Annotated[CospadiConfig | SvdConfig, Field(discriminator="name")]
METHODS: dict[str, type[MethodConfig]] = {"cospadi": CospadiConfig, "svd": SvdConfig}

__all__ = [
    "METHODS",
    "PRESETS",
    "AnyMethod",
    "Budget",
    "BudgetTooSmallError",
    "CospadiConfig",
    "FitReport",
    "MethodConfig",
    "SvdConfig",
    "fit",
    "layout",
]
