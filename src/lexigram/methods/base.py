"""What every method is: a config type with two functions, `layout` (budget to form) and `fit` (form to values).

Both are chosen by the type of the config. They are pure: no files, no globals, randomness from the generator given. A new
method is one file with a config class and these two functions registered for it, and one entry in `lexigram.methods`.
"""

from functools import singledispatch
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from lexigram.factors import Factor, FactorSpec
from lexigram.gram import Gram
from lexigram.linalg.whitening import Whitening


class Budget(NamedTuple):
    """How much one layer may keep: stored bytes, or parameters as the papers count them (masks and scales are free)."""

    amount: int
    unit: Literal["bytes", "parameters"] = "bytes"


class MethodConfig(BaseModel):
    """Base of the methods' configs. Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FitReport(BaseModel):
    """What happened to one layer.

    Errors are relative to the layer's output on the calibration text: ``||X (W - W^)^T|| / ||X W^T||`` (Frobenius norms).
    `relative_error` is measured on the values as stored, rounding included; `objective` holds the squares of the relative
    error after every outer iteration, before rounding.
    """

    model_config = ConfigDict(frozen=True)

    status: Literal["converged", "iterations"]
    message: str
    relative_error: float
    objective: list[float]
    iterations: int
    seconds: float
    gram_rank: int
    gram_damping: float
    details: dict[str, float] = {}


@singledispatch
def layout(config: MethodConfig, shape: tuple[int, int], budget: Budget) -> FactorSpec:
    """The form that `config` gives a weight of `shape` (out, in) within `budget`: as close as the form allows, never over.

    Raises:
        BudgetTooSmallError: where not even the smallest such form fits.
    """
    raise NotImplementedError(f"no method is registered for {type(config).__name__}")


@singledispatch
def fit(
    config: MethodConfig, weight: Tensor, gram: Gram, spec: FactorSpec, generator: torch.Generator
) -> tuple[Factor, FitReport]:
    """Values for `spec`, made by `layout`, so that the layer's outputs on the calibration text stay close.

    Args:
        config: its type chooses the function.
        weight: (out, in), any float dtype and device.
        gram: of the layer's inputs, (in, in).
        spec: what `layout` gave for this weight.
        generator: all randomness comes from here.

    Raises:
        ValueError: for a weight that is not finite.
    """
    raise NotImplementedError(f"no method is registered for {type(config).__name__}")


class BudgetTooSmallError(ValueError):
    """The smallest factors of this form need more than the budget."""

    def __init__(self, needed: int, budget: Budget) -> None:
        super().__init__(
            f"a budget of {budget.amount} {budget.unit} is too small: the smallest factors of this form need {needed}; "
            "lower the ratio"
        )


def size(spec: FactorSpec, unit: Literal["bytes", "parameters"]) -> int:
    """The size of `spec` in the unit of a budget."""
    return spec.bytes if unit == "bytes" else spec.parameters


def plain_whitening(weight: Tensor) -> Whitening:
    """The identity: errors are those of the weights, as if all inputs were equally strong and uncorrelated."""
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    return Whitening(identity, identity, rank=weight.shape[1], damping=0.0)


def relative_error(signals: Tensor, factor: Factor, whitening: Whitening) -> float:
    """``||W L^T - W^ L^T|| / ||W L^T||`` of the stored values, given `signals` ``= W L^T``; 0 where these are all zero."""
    scale = signals.norm()
    error = (signals - whitening.whiten(factor.to_dense())).norm()
    return float(error / scale) if scale > 0 else 0.0


def checked_weight(weight: Tensor) -> Tensor:
    """The weight in float32.

    Raises:
        ValueError: where it is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"the weight has {count} values that are not finite (NaN or infinity); mend the checkpoint")
    return weight.detach().float()
