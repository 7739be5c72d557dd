"""Quantisation alone: its size to the byte, its error against the inputs themselves, and what it refuses."""

from functools import partial
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

import drawn
from drawn import gram_of, normal
from lexigram.factors import Dense, DenseSpec, Factor, Integer, factor_spec
from lexigram.methods import AnyMethod, Budget, BudgetTooSmallError, FitReport, QuantizeConfig, fit, layout
from oracles import output_error

CONFIGS: dict[str, QuantizeConfig] = {
    "gptq": QuantizeConfig(value_bits=4),
    "gptq natural order": QuantizeConfig(value_bits=4, order="natural"),
    "gptq symmetric": QuantizeConfig(value_bits=4, symmetric=True),
    "gptq min-max": QuantizeConfig(value_bits=4, clip=False),
    "gptq 2 bits": QuantizeConfig(value_bits=2, value_group=32),
    "gptq 3 bits": QuantizeConfig(value_bits=3, value_group=16),
    "gptq 6 bits": QuantizeConfig(value_bits=6),
    "gptq 8 bits": QuantizeConfig(value_bits=8),
    "gptq no damping": QuantizeConfig(value_bits=4, damping=0.0),
    "gptq and sweeps": QuantizeConfig(value_bits=4, sweeps=2),
    "gptq symmetric and sweeps": QuantizeConfig(value_bits=3, symmetric=True, sweeps=2),
    "nearest": QuantizeConfig(value_bits=4, rounding="nearest"),
    "nearest min-max": QuantizeConfig(value_bits=4, rounding="nearest", clip=False),
}

every_config = pytest.mark.parametrize("name", CONFIGS)
correlated = partial(drawn.correlated, width=64)


def run(config: QuantizeConfig, weight: Tensor, X: Tensor) -> tuple[Factor, FitReport]:
    spec = layout(config, (weight.shape[0], weight.shape[1]), Budget(10**9))
    factors, report = fit(config, weight, gram_of(X), spec, torch.Generator())
    assert factors.spec == spec, "what was planned is what was made"
    factors.check()
    return factors, report


# --- budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "config", "group", "expected"),
    [
        ((10, 256), QuantizeConfig(value_bits=4), 128, 10 * 256 // 2 + 2 * 20 + 10),
        ((10, 256), QuantizeConfig(value_bits=4, symmetric=True), 128, 10 * 256 // 2 + 2 * 20),
        ((9, 576), QuantizeConfig(value_bits=3), 96, 9 * 576 * 3 // 8 + 2 * 54 + 21),  # 54 zeros of 3 bits
        ((5, 7), QuantizeConfig(value_bits=2), 7, 9 + 2 * 5 + 2),  # 35 values and 5 zeros of 2 bits
        ((3, 50), QuantizeConfig(value_bits=8, value_group=16), 10, 150 + 2 * 15 + 15),
        ((3, 50), QuantizeConfig(value_bits=6, value_group=1, symmetric=True), 1, 113 + 2 * 150),
    ],
)
@pytest.mark.parametrize("unit", ["bytes", "parameters"])
def test_one_size_whatever_the_budget(
    shape: tuple[int, int], config: QuantizeConfig, group: int, expected: int, unit: Any
) -> None:
    needed = expected if unit == "bytes" else shape[0] * shape[1]
    for amount in (needed, needed + 1, 100 * needed):
        spec: Any = layout(config, shape, Budget(amount, unit))
        assert spec.bytes == expected
        assert spec.codec == Integer(bits=config.value_bits, group=group, symmetric=config.symmetric)
        assert factor_spec.validate_json(spec.model_dump_json()) == spec
    with pytest.raises(BudgetTooSmallError, match=f"of {needed - 1} {unit} is too small.*need {needed};"):
        layout(config, shape, Budget(needed - 1, unit))


@pytest.mark.parametrize("symmetric", [False, True])
def test_without_bits_it_is_the_most_within_the_budget(symmetric: bool) -> None:
    """To the byte: of every budget the widest integers that are not larger, 16 bits being plain bfloat16."""
    shape, groups = (12, 256), 24
    config = QuantizeConfig(symmetric=symmetric)
    sizes = {16: 2 * 12 * 256}
    for bits in (8, 6, 4, 3, 2):
        sizes[bits] = 12 * 256 * bits // 8 + 2 * groups + (0 if symmetric else groups * bits // 8)
    for bits, needed in sizes.items():
        same = layout(config.model_copy(update={"value_bits": bits}), shape, Budget(needed))
        for amount in (needed, needed + 1):
            spec: Any = layout(config, shape, Budget(amount))
            assert spec == same
            assert (spec.bytes, spec.codec.bits) == (needed, bits)
        smaller = [size for size in sizes.values() if size < needed]
        if smaller:
            assert layout(config, shape, Budget(needed - 1)).bytes == max(smaller)
    with pytest.raises(BudgetTooSmallError, match=f"too small.*need {sizes[2]};"):
        layout(config, shape, Budget(sizes[2] - 1))


def test_of_a_few_values_scales_are_dearer_than_16_bits() -> None:
    """A value of 2 bits with its scale and zero takes 4 bytes, in bfloat16 it takes 2: that is the smallest form."""
    assert layout(QuantizeConfig(), (1, 1), Budget(2)) == DenseSpec(rows=1, cols=1)
    with pytest.raises(BudgetTooSmallError, match="need 2;"):
        layout(QuantizeConfig(), (1, 1), Budget(1))


# --- the fit -----------------------------------------------------------------------------------------------------


@every_config
def test_the_reported_error_is_that_of_the_outputs(name: str) -> None:
    weight, X = normal(48, 64), correlated()
    factors, report = run(CONFIGS[name], weight, X)
    assert isinstance(factors, Dense)
    assert report.relative_error == pytest.approx(output_error(weight, factors, X), rel=1e-3)
    assert report.objective == [report.relative_error**2]
    assert (report.iterations, report.status, report.gram_rank) == (1, "converged", 64)
    assert report.message.startswith(f"{CONFIGS[name].value_bits} bits, ")


@pytest.mark.parametrize(("bits", "ratio"), [(8, 0.3), (4, 0.7), (2, 0.8)])
def test_without_bits_the_values_are_those_of_the_bits_that_fit(bits: Any, ratio: float) -> None:
    weight, X = normal(48, 64), correlated()
    budget = Budget(int((1 - ratio) * 2 * 48 * 64))
    stored = []
    for config in (QuantizeConfig(), QuantizeConfig(value_bits=bits)):
        factors, report = fit(config, weight, gram_of(X), layout(config, (48, 64), budget), torch.Generator())
        assert report.message.startswith(f"{bits} bits, ")
        assert report.relative_error == pytest.approx(output_error(weight, factors, X), rel=1e-3)
        stored.append(factors.state_dict())
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])


def test_16_bits_are_the_nearest_bfloat16() -> None:
    weight, X = normal(48, 64), correlated()
    factors, report = run(QuantizeConfig(value_bits=16), weight, X)
    assert torch.equal(factors.to_dense(), weight.bfloat16().float())
    assert report.message == "16 bits, rounded to nearest"
    assert report.relative_error == pytest.approx(output_error(weight, factors, X), rel=1e-3)
    same, _ = run(QuantizeConfig(), weight, X)  # no budget to speak of
    assert torch.equal(factors.to_dense(), same.to_dense())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_beats_the_nearest_values(bits: Any, symmetric: bool) -> None:
    weight, X = normal(48, 64), correlated()
    errors = {
        rounding: run(QuantizeConfig(value_bits=bits, symmetric=symmetric, rounding=rounding), weight, X)[
            1
        ].relative_error
        for rounding in ("gptq", "nearest")
    }
    assert errors["gptq"] < 0.75 * errors["nearest"]


def test_gptq_is_that_of_the_grid_chosen_from_the_weight() -> None:
    """Grids are static: whatever is rounded first, the scales and zeros are the same."""
    weight, X = normal(48, 64), correlated()
    stored = [run(CONFIGS[name], weight, X)[0].state_dict() for name in ("gptq", "gptq natural order", "nearest")]
    for other in stored[1:]:
        assert torch.equal(stored[0]["scales"], other["scales"])
        assert torch.equal(stored[0]["zeros"], other["zeros"])
        assert not torch.equal(stored[0]["values"], other["values"])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sweeps_improve_on_gptq(bits: Any, symmetric: bool) -> None:
    weight, X = normal(48, 64, seed=5), correlated()
    once, swept = (
        run(QuantizeConfig(value_bits=bits, symmetric=symmetric, sweeps=sweeps), weight, X)[1].relative_error
        for sweeps in (0, 4)
    )
    assert swept < 0.97 * once


def test_activation_order_helps_where_channels_differ() -> None:
    weight, X = normal(96, 64), correlated() * torch.logspace(0, 1.5, 64)
    ordered, natural = (run(CONFIGS[name], weight, X)[1].relative_error for name in ("gptq", "gptq natural order"))
    assert ordered < 0.9 * natural


def test_clipping_helps_at_few_bits() -> None:
    weight, X = normal(48, 64), correlated()
    clipped, spanning = (
        run(QuantizeConfig(value_bits=2, clip=clip, rounding="nearest"), weight, X)[1].relative_error
        for clip in (True, False)
    )
    assert clipped < 0.9 * spanning


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_8_bits_lose_next_to_nothing(rounding: Any) -> None:
    weight, X = normal(48, 64), correlated()
    factors, report = run(QuantizeConfig(value_bits=8, rounding=rounding), weight, X)
    assert report.relative_error < 0.01
    assert torch.allclose(factors.to_dense(), weight, atol=0.1)


@every_config
def test_the_same_inputs_give_the_same_bytes(name: str) -> None:
    weight, X = normal(48, 64), correlated()
    first, second = (run(CONFIGS[name], weight, X)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_dtype(name: str, dtype: torch.dtype) -> None:
    weight, X = normal(24, 64).to(dtype), correlated()
    kept = weight.clone()
    factors, _ = run(CONFIGS[name], weight, X)
    same, _ = run(CONFIGS[name], weight.float().T.contiguous().T, X)  # laid out as GPT-2 stores it
    assert torch.equal(factors.to_dense(), same.to_dense())
    assert torch.equal(weight, kept), "the weight is left alone"


@every_config
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_counted(name: str, value: float) -> None:
    weight = normal(24, 64)
    weight[3, :2] = value
    weight[5, 0] = value
    with pytest.raises(ValueError, match="weight has 3 values that are not finite"):
        run(CONFIGS[name], weight, correlated())


@every_config
def test_a_zero_weight_is_represented_exactly(name: str) -> None:
    factors, report = run(CONFIGS[name], torch.zeros(24, 64), correlated())
    assert torch.equal(factors.to_dense(), torch.zeros(24, 64))
    assert report.relative_error == 0


@every_config
@pytest.mark.parametrize("kind", ["dead channels", "few tokens", "duplicate channels", "all zero"])
def test_inputs_of_deficient_rank(name: str, kind: str) -> None:
    X, weight = correlated(), normal(48, 64)
    if kind == "dead channels":
        X[:, 5:9] = 0
    elif kind == "few tokens":
        X = X[:10]
    elif kind == "duplicate channels":
        X[:, 5:9] = X[:, :1]
    else:
        X[:] = 0
    factors, report = run(CONFIGS[name], weight, X)
    assert bool(torch.isfinite(factors.to_dense()).all())
    assert report.gram_rank < 64
    config = CONFIGS[name]
    if kind == "all zero":  # no direction is preferred: every value is rounded by itself
        nearest, _ = run(config.model_copy(update={"rounding": "nearest"}), weight, X)
        if config.sweeps:  # and scales are those of the least squares
            lost, by_itself = ((each.to_dense() - weight).norm() for each in (factors, nearest))
            assert lost <= by_itself
        else:
            assert torch.equal(factors.to_dense(), nearest.to_dense())
    else:
        assert output_error(weight, factors, X) < (0.5 if config.value_bits == 2 else 0.25)
    if kind == "dead channels" and config.value_bits >= 4:
        # Other text may bring them to life.
        assert float((factors.to_dense() - weight)[:, 5:9].abs().mean()) < 0.2


@every_config
@pytest.mark.parametrize("shape", [(1, 16), (64, 1), (2, 2), (3, 37)])
def test_extreme_shapes(name: str, shape: tuple[int, int]) -> None:
    weight, X = normal(*shape), normal(100, shape[1], seed=2)
    factors, report = run(CONFIGS[name], weight, X)
    assert report.relative_error == pytest.approx(output_error(weight, factors, X), rel=1e-2, abs=1e-3)


# --- configs -----------------------------------------------------------------------------------------------------


def test_unknown_keys_and_values_are_refused() -> None:
    any_method: TypeAdapter[Any] = TypeAdapter(AnyMethod)
    assert any_method.validate_python({"name": "quantize", "value_bits": 3}) == QuantizeConfig(value_bits=3)
    for data, message in (
        ({"value_bits": 5}, "value_bits"),
        ({"value_group": 0}, "value_group"),
        ({"bits": 4}, "bits"),
        ({"group": 128}, "group"),
        ({"rounding": "stochastic"}, "rounding"),
        ({"order": "random"}, "order"),
        ({"damping": -0.1}, "damping"),
        ({"scale": 2}, "scale"),
    ):
        with pytest.raises(ValidationError, match=message):
            any_method.validate_python({"name": "quantize", **data})
