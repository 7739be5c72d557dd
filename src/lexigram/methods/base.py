"""What every method is: a config type with two functions, `layout` (budget to form) and `fit` (form to values).

Both are chosen by the type of the config. They are pure: no files, no globals, randomness from the generator given. A new
method is one file with a config class and these two functions registered for it, and one entry in `lexigram.methods`. It may
add `layout_shared` and `fit_shared`, for matrices that share a leaf, or `layout_coupled` and `fit_coupled`, for matrices that
lose the same channels, and `variants`, `sketch`, `useful` and `estimates`, for an allocation to choose.
"""

from collections.abc import Sequence
from functools import singledispatch
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lexigram.factors import DenseSpec, Factor, FactorSpec, GroupSpec, ProductSpec, SharedSpec, SparseSpec
from lexigram.gram import Gram
from lexigram.linalg.whitening import Whitening
from lexigram.shown import BUDGET, Shown

Leaf = TypeVar("Leaf", DenseSpec, SparseSpec)
Side = TypeVar("Side", DenseSpec, SharedSpec, SparseSpec)

Plain = Annotated[bool, Shown(BUDGET), Field(description="Fit the weights themselves, not their outputs on the text.")]
"""A field of every method that can do without the Gram."""


class Budget(NamedTuple):
    """How much one layer may keep: stored bytes, or parameters as the papers count them (masks and scales are free)."""

    amount: int
    unit: Literal["bytes", "parameters"] = "bytes"


class MethodConfig(BaseModel):
    """Base of the methods' configs. Frozen; an unknown key is an error.

    Every other field has a description: it becomes an option of the command line, one with that of the other methods that
    have a field of this name (`lexigram.cli.options`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    allocation: ClassVar[str] = "uniform"
    """How the bytes are spent over the layers unless the recipe says it."""

    name: str


class FitReport(BaseModel):
    """What happened to one layer.

    Errors are relative to the layer's output on the calibration text: ``||X (W - W^)^T|| / ||X W^T||`` (Frobenius norms), with
    the weight ``W`` that was to be fitted: under sequential calibration the one that makes up for the layers before
    (`Gram.aim`). `relative_error` is measured on the values as stored, rounding included; `objective` holds the squares of the
    relative error after every outer iteration, before rounding.
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


class Member(NamedTuple):
    """One of the matrices that are fitted together: its weight (out, in), any float dtype, and its inputs' Gram."""

    weight: Tensor
    gram: Gram


class Fitted(NamedTuple):
    """Factors and report of every member, in order, and the leaf that the members refer to, where they share one."""

    members: list[tuple[Factor, FitReport]]
    shared: Factor | None = None


def layout_group(
    config: MethodConfig, shapes: Sequence[tuple[int, int]], budget: Budget, name: str, head_dim: int = 1
) -> GroupSpec:
    """The form that `config` gives to matrices of `shapes` (out, in) that stand together within `budget`.

    One matrix gets its own form. Several lose the same channels, `head_dim` of them at a time, where the method couples
    matrices; by any other they share a leaf called `name`.

    Raises:
        BudgetTooSmallError: where not even the smallest such form fits.
        ValueError: where the shapes do not couple, the method shares nothing, or the input widths differ.
    """
    if len(shapes) == 1:
        return GroupSpec(members=(layout(config, shapes[0], budget),))
    if couples(config):
        return layout_coupled(config, shapes, budget, head_dim)
    if len({cols for _, cols in shapes}) > 1:
        raise ValueError(f"matrices of different input widths {[cols for _, cols in shapes]} cannot share a dictionary")
    return layout_shared(config, shapes, budget, name)


def fit_group(config: MethodConfig, members: Sequence[Member], spec: GroupSpec, generator: torch.Generator) -> Fitted:
    """Values for `spec`, made by `layout_group`, for all members at once.

    Raises:
        ValueError: for a weight that is not finite.
    """
    if spec.shared is None:
        return fit_coupled(config, members, spec, generator)
    return fit_shared(config, members, spec, generator)


@singledispatch
def layout_shared(config: MethodConfig, shapes: Sequence[tuple[int, int]], budget: Budget, name: str) -> GroupSpec:
    """`layout` for several matrices that share a leaf called `name`, counted once."""
    raise ValueError(f"the method {config.name} shares nothing between matrices; leave --group and --share out")


@singledispatch
def fit_shared(config: MethodConfig, members: Sequence[Member], spec: GroupSpec, generator: torch.Generator) -> Fitted:
    """`fit` for several matrices that share a leaf."""
    raise NotImplementedError(f"no shared fit is registered for {type(config).__name__}")


def shares(config: MethodConfig) -> bool:
    """Whether several matrices can share a leaf."""
    return layout_shared.dispatch(type(config)) is not layout_shared.dispatch(MethodConfig)


@singledispatch
def layout_coupled(config: MethodConfig, shapes: Sequence[tuple[int, int]], budget: Budget, head_dim: int) -> GroupSpec:
    """`layout` for matrices on both sides of the same channels: the last takes as inputs what those before it make.

    Args:
        config: its type chooses the function.
        shapes: (out, in) of every matrix.
        budget: of all of them.
        head_dim: so many consecutive channels stay or go together: those of an attention head, 1 where there are no heads.
    """
    raise NotImplementedError(f"{type(config).__name__} couples no matrices")


@singledispatch
def fit_coupled(config: MethodConfig, members: Sequence[Member], spec: GroupSpec, generator: torch.Generator) -> Fitted:
    """`fit` for several matrices that share no leaf: by default each by itself, whatever else is in the group."""
    return Fitted([fit(config, *member, own, generator) for member, own in zip(members, spec.members, strict=True)])


def couples(config: MethodConfig) -> bool:
    """Whether matrices on both sides of the same channels are fitted together."""
    return layout_coupled.dispatch(type(config)) is not layout_coupled.dispatch(MethodConfig)


@singledispatch
def sketch(config: MethodConfig) -> MethodConfig:
    """A cheap stand-in for `config` whose error at one size against another is that of `config`: by default itself."""
    return config


@singledispatch
def useful(config: MethodConfig) -> tuple[float, float]:
    """The least and the greatest ratio at which an allocation may want this form of `variants`: by default any.

    It is measured between them alone: offered below at the error that it has at the least, and not at all beyond the greatest.
    """
    return 0.0, 1.0


@singledispatch
def variants(config: MethodConfig) -> list[MethodConfig]:
    """The forms among which an allocation may choose for each unit: by default `config` alone."""
    return [config]


class Estimate(NamedTuple):
    """A form that a weight may take, how it is fitted, and what it would lose: the share of the outputs' squared norm."""

    method: MethodConfig
    spec: FactorSpec
    error: float


@singledispatch
def estimates(config: MethodConfig, weight: Tensor, gram: Gram, amounts: Sequence[int]) -> list[Estimate]:
    """Forms of a weight by all `variants` with what they would lose, told from what their single parts are worth; no fits.

    Args:
        config: its type chooses the function.
        weight: (out, in).
        gram: of the inputs, (in, in).
        amounts: bytes that the forms are to have, about.

    Raises:
        ValueError: for a weight that is not finite.
    """
    raise NotImplementedError(f"{type(config).__name__} does not rank single parts")


def ranks(config: MethodConfig) -> bool:
    """Whether the method can tell what forms lose by ranking their parts."""
    return estimates.dispatch(type(config)) is not estimates.dispatch(MethodConfig)


class Candidates(NamedTuple):
    """What a weight ``(out, in)`` is split into, for a choice over the whole model: ``left diag(values) right + S``.

    `left` is (out, r), `values` (r,), `right` (r, in); `entries` are those of S in row-major order, where `support`, bool
    (out, in), is True. Numbers about the split, tensors of no dimension: `iterations` that it took, `residual`, the share of
    the weight's norm that all parts together miss, and `converged`, whether that is as little as was asked for.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    entries: Tensor
    support: Tensor
    iterations: Tensor
    residual: Tensor
    converged: Tensor

    def only(self, values: Tensor, entries: Tensor) -> "Candidates":
        """The candidates under two masks, bool (r,) and (number of entries,)."""
        support = self.support.clone()
        support[self.support] = entries
        return self._replace(
            left=self.left[:, values],
            values=self.values[values],
            right=self.right[values],
            entries=self.entries[entries],
            support=support,
        )

    def to_dense(self) -> Tensor:
        """All of them together, (out, in)."""
        dense = (self.left * self.values) @ self.right
        dense[self.support] += self.entries
        return dense


@singledispatch
def decompose(config: MethodConfig, weight: Tensor, gram: Gram) -> Candidates:
    """The candidates of a weight (out, in), for a method that chooses among those of all weights at once.

    Raises:
        ValueError: for a weight that is not finite.
    """
    raise NotImplementedError(f"{type(config).__name__} does not choose after decomposing")


@singledispatch
def scores(config: MethodConfig, candidates: Candidates, gram: Gram) -> tuple[Tensor, Tensor]:
    """What each singular value and each entry is worth before anything was tried out: (r,) and (number of entries,)."""
    raise NotImplementedError(f"{type(config).__name__} does not choose after decomposing")


@singledispatch
def assemble(
    config: MethodConfig, weight: Tensor, gram: Gram, candidates: Candidates, spec: FactorSpec
) -> tuple[Factor, FitReport]:
    """The chosen candidates of a weight as stored factors of the form `spec`, which has room for all of them."""
    raise NotImplementedError(f"{type(config).__name__} does not choose after decomposing")


def chooses(config: MethodConfig) -> bool:
    """Whether the method decomposes all weights first and then chooses among the parts."""
    return decompose.dispatch(type(config)) is not decompose.dispatch(MethodConfig)


@singledispatch
def decomposition_key(config: MethodConfig) -> str:
    """What decides the parts of a weight besides the weight, in one line."""
    raise NotImplementedError(f"{type(config).__name__} does not choose after decomposing")


class Trials(NamedTuple):
    """What trying models out takes: runs of a model for every sequence, and how many drawn models a step holds the masks of."""

    runs: int
    at_once: int


@singledispatch
def trials(config: MethodConfig) -> Trials:
    """What a choice by the loss of models costs; none where a method does not try any."""
    return Trials(0, 0)


class BudgetTooSmallError(ValueError):
    """The smallest factors of this form need more than the budget."""

    def __init__(self, needed: int, budget: Budget) -> None:
        self.needed = needed
        super().__init__(
            f"a budget of {budget.amount} {budget.unit} is too small: the smallest factors of this form need {needed}; "
            "lower the ratio"
        )


def factored(spec: FactorSpec, left: type[Leaf], right: type[Side]) -> tuple[Leaf, Side]:
    """The two sides of a product of these forms.

    Raises:
        ValueError: for any other form; an allocation file can ask for it.
    """
    if isinstance(spec, ProductSpec) and isinstance(spec.left, left) and isinstance(spec.right, right):
        return spec.left, spec.right
    raise wrong_form(spec)


def wrong_form(spec: FactorSpec) -> ValueError:
    """What to raise for a form that a method does not make; an allocation file can ask for it."""
    return ValueError(f"the method does not make the form {spec.form!r} that is asked for; make the allocation again")


def size(spec: FactorSpec | GroupSpec, unit: Literal["bytes", "parameters"]) -> int:
    """The size of `spec` in the unit of a budget."""
    return spec.bytes if unit == "bytes" else spec.parameters


def plain_whitening(weight: Tensor) -> Whitening:
    """The identity: errors are those of the weights, as if all inputs were equally strong and uncorrelated."""
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    return Whitening(identity, identity, rank=weight.shape[1], damping=0.0)


def pooled(grams: Sequence[Gram]) -> Gram:
    """The Gram of all inputs together; one and the same Gram several times is that Gram."""
    if all(gram is grams[0] for gram in grams):
        return grams[0]
    return Gram(torch.stack([gram.matrix for gram in grams]).sum(0), sum(gram.tokens for gram in grams))


def metric(gram: Gram) -> Tensor:
    """What errors are weighed with, (in, in): the Gram, or the identity where all inputs were zero and none is preferred."""
    matrix = gram.matrix
    return matrix if bool(matrix.any()) else torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def relative_error(signals: Tensor, factor: Factor, whitening: Whitening) -> float:
    """``||W L^T - W^ L^T|| / ||W L^T||`` of the stored values, given `signals` ``= W L^T``; 0 where these are all zero."""
    scale = signals.norm()
    error = (signals - whitening.whiten(factor.to_dense())).norm()
    return float(error / scale) if scale > 0 else 0.0


def direct_report(
    message: str, weight: Tensor, factor: Factor, gram: Gram, seconds: float, details: dict[str, float] | None = None
) -> FitReport:
    """The report of a method that knows no error before that of the stored values.

    Args:
        message: what was done.
        weight: (out, in), what the factor stands for.
        factor: as stored.
        gram: of the inputs.
        seconds: that the fit took.
        details: numbers of the method's own.
    """
    error = relative_error(gram.whitening.whiten(weight), factor, gram.whitening)
    return FitReport(
        status="converged",
        message=message,
        relative_error=error,
        objective=[error**2],
        iterations=1,
        seconds=seconds,
        gram_rank=gram.whitening.rank,
        gram_damping=gram.whitening.damping,
        details=details or {},
    )


def checked_weight(weight: Tensor) -> Tensor:
    """The weight in float32.

    Raises:
        ValueError: where it is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"the weight has {count} values that are not finite (NaN or infinity); mend the checkpoint")
    return weight.detach().float()
