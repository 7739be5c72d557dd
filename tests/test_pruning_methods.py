"""Pruning as methods: budgets kept, supports against plain numpy, patterns that hold, refits that never hurt."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from drawn import correlated, gram_of, normal
from lexigram.factors import Sparse, SparseSpec
from lexigram.methods import (
    METHODS,
    Budget,
    BudgetTooSmallError,
    FitReport,
    MagnitudeConfig,
    SparseGptConfig,
    WandaConfig,
    fit,
    layout,
)
from lexigram.methods.pruning import PruningConfig
from oracles import output_error

PRUNING = ["magnitude", "sparsegpt", "wanda"]
every_method = pytest.mark.parametrize("name", PRUNING)


def config_of(name: str, **options: Any) -> PruningConfig:
    config = METHODS[name].model_validate({"name": name, **options})
    assert isinstance(config, PruningConfig)
    return config


def run(config: PruningConfig, weight: Tensor, X: Tensor, ratio: float = 0.4) -> tuple[Sparse, FitReport]:
    shape = (weight.shape[0], weight.shape[1])
    spec = layout(config, shape, Budget(int((1 - ratio) * 2 * weight.numel())))
    factors, report = fit(config, weight, gram_of(X), spec, torch.Generator().manual_seed(0))
    assert isinstance(factors, Sparse)
    assert factors.spec == spec
    factors.check()
    return factors, report


@given(
    st.sampled_from(PRUNING),
    st.sampled_from(["any", "rows", "2:4", "1:4", "4x2", "1x8", "8x1"]),
    st.sampled_from([16, 8, 4]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0.02, 0.98),
)
@settings(max_examples=300, deadline=None)
def test_as_many_entries_as_a_budget_has_room_for(
    name: str, pattern: str, bits: int, rows: int, cols: int, ratio: float
) -> None:
    shape, config = (8 * rows, 8 * cols), config_of(name, pattern=pattern, value_bits=bits)
    budget = Budget(int((1 - ratio) * 2 * shape[0] * shape[1]))
    try:
        spec = layout(config, shape, budget)
    except BudgetTooSmallError as error:
        needed = int(str(error).split("need ")[1].split(";")[0])
    else:
        needed = 0
    assert needed == 0 or needed > budget.amount
    assume(not needed)
    assert isinstance(spec, SparseSpec)
    assert spec.bytes <= budget.amount
    if ":" in pattern:
        assert spec.nonzeros == shape[0] * shape[1] * int(pattern[0]) // 4
        return
    grain = {"any": 1, "rows": shape[0]}.get(pattern, 8)
    assert spec.nonzeros % grain == 0
    if spec.nonzeros < shape[0] * shape[1]:
        more = SparseSpec.lightest(*shape, spec.nonzeros + grain, spec.codec, spec.block)
        assert more.bytes > budget.amount


@every_method
def test_the_error_reported_is_that_of_the_outputs(name: str) -> None:
    weight, X = normal(24, 32, seed=3), correlated()
    for options in ({}, {"refit": True}, {"value_bits": 4}, {"pattern": "2:4"}):
        factors, report = run(config_of(name, **options), weight, X, 0.4)
        assert report.relative_error == pytest.approx(output_error(weight, factors, X), rel=1e-3)


def test_magnitude_keeps_the_largest() -> None:
    weight = normal(24, 32, seed=3)
    factors, _ = run(MagnitudeConfig(), weight, correlated())
    kept, flat = factors.support().numpy().ravel(), weight.abs().numpy().ravel()
    assert set(np.argsort(-flat)[: kept.sum()]) == set(kept.nonzero()[0])
    assert torch.equal(factors.to_dense()[factors.support()], weight[factors.support()].bfloat16().float())


def test_wanda_weighs_by_the_inputs_and_compares_within_an_output() -> None:
    weight, X = normal(24, 32, seed=3), correlated()
    factors, _ = run(WandaConfig(), weight, X)
    kept = factors.support().numpy()
    score = weight.abs().double().numpy() * np.sqrt((X.double().numpy() ** 2).sum(0))
    per_row = factors.spec.nonzeros // 24
    for row in range(24):
        assert set(np.argsort(-score[row])[:per_row]) == set(kept[row].nonzero()[0])


@every_method
@pytest.mark.parametrize("pattern", ["rows", "2:4", "1:2", "4x2", "1x32", "24x1"])
def test_patterns_hold(name: str, pattern: str) -> None:
    weight = normal(24, 32, seed=3)
    factors, _ = run(config_of(name, pattern=pattern), weight, correlated(), 0.4375)
    kept = factors.support()
    if pattern == "rows":
        assert set(kept.sum(1).tolist()) == {factors.spec.nonzeros // 24}
    elif ":" in pattern:
        keep, of = map(int, pattern.split(":"))
        assert set(kept.view(24, -1, of).sum(2).view(-1).tolist()) == {keep}
    else:
        down, across = map(int, pattern.split("x"))
        blocks = kept.view(24 // down, down, 32 // across, across).sum((1, 3))
        assert set(blocks.view(-1).tolist()) <= {0, down * across}
        assert factors.spec.block == (down, across)


@every_method
@pytest.mark.parametrize("pattern", ["any", "2:4", "4x2"])
def test_a_refit_never_hurts_and_mostly_helps(name: str, pattern: str) -> None:
    weight, X = normal(24, 32, seed=3), correlated()
    as_they_are, plain = run(config_of(name, pattern=pattern), weight, X)
    moved, refitted = run(config_of(name, pattern=pattern, refit=True), weight, X)
    assert torch.equal(as_they_are.support(), moved.support())
    assert refitted.relative_error < 0.98 * plain.relative_error


@every_method
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_a_refit_never_hurts_in_few_bits(name: str, bits: int) -> None:
    """Inputs over two decades: values that make up for others in weak ones would be large, and stretch the steps of all."""
    X = normal(512, 64, seed=1) * torch.logspace(0, -2, 64)
    for seed in range(4):
        weight = normal(32, 64, seed=seed)
        plain, refitted = (
            run(config_of(name, pattern="2:4", value_bits=bits, refit=refit), weight, X)[1].relative_error
            for refit in (False, True)
        )
        assert refitted <= 1.02 * plain


def test_surgery_beats_scores_alone_on_correlated_inputs() -> None:
    weight, X = normal(24, 32, seed=3), correlated()
    errors = [run(config_of(name), weight, X, 0.5)[1].relative_error for name in ("sparsegpt", "wanda", "magnitude")]
    assert errors == sorted(errors)


def test_more_bytes_hurt_less() -> None:
    weight, X = normal(24, 32, seed=3), correlated()
    for name in PRUNING:
        errors = [run(config_of(name), weight, X, ratio)[1].relative_error for ratio in (0.1, 0.3, 0.5, 0.7)]
        assert errors == sorted(errors)


@pytest.mark.parametrize("pattern", ["all", "2:0", "0:4", "4:2", "0x3", "x", "2:4:8", ""])
def test_unknown_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match=r"write any, rows, N:M such as 2:4, or RxC"):
        WandaConfig(pattern=pattern)


@pytest.mark.parametrize("pattern", ["2:5", "5x1", "1x5"])
def test_a_pattern_that_does_not_fit_the_shape_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="choose another pattern"):
        layout(SparseGptConfig(pattern=pattern), (24, 32), Budget(1500))


@every_method
def test_silent_inputs_and_zero_weights(name: str) -> None:
    weight, X = normal(24, 32, seed=3), correlated()
    X[:, 5:9] = 0
    for options in ({}, {"refit": True}):
        factors, report = run(config_of(name, **options), weight, X)
        assert bool(factors.to_dense().isfinite().all())
        assert 0 < report.relative_error < 1
        factors, report = run(config_of(name, **options), torch.zeros(24, 32), X)
        assert report.relative_error == 0
        assert not factors.to_dense().any()
