"""Low rank plus sparse as methods: budgets to the byte, the bits against the formula, few bits against rounding to nearest.

The oracles: sizes by hand, scipy's normal distribution, the inputs themselves, and what a run wrote.
"""

import json
import math
from bisect import bisect_right
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import integrate, stats
from torch import Tensor

import lexigram
from conftest import toy_folder
from drawn import correlated, gram_of, normal
from lexigram import Recipe
from lexigram.allocation.offers import measured_forms
from lexigram.factors import Factor, Integer, Product, Sparse, SparseSpec, Sum, SumSpec, factor_spec
from lexigram.linalg.integers import Stepped, to_steps
from lexigram.linalg.pruning import prune
from lexigram.linalg.surgeon import Pruned, settling_order, surgeon
from lexigram.methods import (
    Budget,
    BudgetTooSmallError,
    CapConfig,
    FitReport,
    LowRankSparseConfig,
    MethodConfig,
    OatsConfig,
    SvdConfig,
    fit,
    layout,
    storing,
)
from lexigram.methods.base import sketch, variants
from lexigram.methods.storing import store_pruned
from lexigram.methods.sums import sizes, sum_spec
from lexigram.targets import Target
from oracles import whole_groups

BITS: list[Any] = [2, 3, 4, 6, 8, 10, 12, 14, 16]


def run(config: MethodConfig, weight: Tensor, X: Tensor, ratio: float) -> tuple[Factor, FitReport]:
    spec = layout(config, (weight.shape[0], weight.shape[1]), Budget(int((1 - ratio) * 2 * weight.numel())))
    factors, report = fit(config, weight, gram_of(X), spec, torch.Generator().manual_seed(0))
    assert factors.spec == spec
    factors.check()
    return factors, report


# --- budgets -----------------------------------------------------------------------------------------------------


def bytes_of(count: int, bits: int, group: int) -> int:
    """Of so many stored values, with the scales and zeros of their groups."""
    groups = -(-count // group)
    return -(-count * bits // 8) + (2 * groups + -(-groups * bits // 8) if bits <= 8 else 0)


def parts_of(spec: Any) -> tuple[Any, Any]:
    """The low-rank and the sparse leaf."""
    if spec.form == "sum":
        return spec.left, spec.right
    return (spec, None) if spec.form == "product" else (None, spec)


CONFIGS = st.one_of(
    st.builds(
        OatsConfig,
        rank_share=st.floats(0, 1),
        value_bits=st.sampled_from(BITS),
        value_group=st.sampled_from([1, 16, 128]),
    ),
    st.builds(
        LowRankSparseConfig,
        rank_share=st.floats(0, 1) | st.just(0.0),
        value_bits=st.none() | st.sampled_from(BITS),
        value_group=st.sampled_from([1, 16, 128]),
    ),
)


@settings(max_examples=300, deadline=None)
@given(
    CONFIGS, st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 0.99), st.sampled_from(["bytes", "parameters"])
)
def test_a_budget_is_never_exceeded_and_has_no_room_for_more(
    config: Any, rows: int, cols: int, ratio: float, unit: Any
) -> None:
    budget = Budget(int((1 - ratio) * rows * cols * (2 if unit == "bytes" else 1)), unit)
    try:
        spec = layout(config, (rows, cols), budget)
    except BudgetTooSmallError as error:
        needed = error.needed
    else:
        needed = 0
    assert needed == 0 or needed > budget.amount
    assume(not needed)
    assert (spec.rows, spec.cols) == (rows, cols)
    assert factor_spec.validate_json(spec.model_dump_json()) == spec
    low, kept = parts_of(spec)
    grain = rows if isinstance(config, OatsConfig) else 1
    bits = kept.codec.bits if kept else config.value_bits or 16
    # Low-rank factors of lowrank-sparse have 8 bits or more, also beside fewer.
    fine = max(bits, 8) if isinstance(config, LowRankSparseConfig) else bits
    if config.value_bits is None and low and not kept:
        fine = low.left.codec.bits
        assert fine >= 8
    group = config.value_group

    def low_rank(rank: int) -> int:
        if unit == "parameters":
            return rank * (rows + cols)
        return bytes_of(rows * rank, fine, group) + bytes_of(rank * cols, fine, whole_groups(cols, group))

    def sparse(count: int) -> int:
        if unit == "parameters":
            return count
        codec = SparseSpec(rows=rows, cols=cols, nonzeros=count, codec=storing.codec(bits, group))
        index = SparseSpec.lightest(rows, cols, count, codec.codec).bytes - bytes_of(count, bits, group)
        assert index <= -(-rows * cols // 8)
        return index + bytes_of(count, bits, group)

    rank, count = sizes(spec)
    used = (low_rank(rank) if low else 0) + (sparse(count) if kept else 0)
    assert used == (spec.bytes if unit == "bytes" else spec.parameters) <= budget.amount
    if config.value_bits is not None:
        assert bits == config.value_bits
    if low:
        assert {low.left.codec.bits, low.right.codec.bits} == {fine}
        assert low_rank(rank) <= config.rank_share * budget.amount
    if kept or config.value_bits is not None:
        assert rank == min(rows, cols) or low_rank(rank + 1) > int(config.rank_share * budget.amount)
        assert count % grain == 0
        more = count + grain
        assert more > rows * cols or (low_rank(rank) if low else 0) + sparse(more) > budget.amount


def lost(bits: int, kept: float) -> float:
    """The documented formula: .4 of the energy of the smallest values that there is no room for, and 3 / 4^b of rounding."""
    edge = stats.norm.ppf((2 - kept) / 2)
    energy = integrate.quad(lambda x: x * x * stats.norm.pdf(x), -edge, edge)[0] if kept > 0 else 1.0
    return 0.4 * energy + 3 / 4**bits


@pytest.mark.parametrize("group", [16, 128])
@pytest.mark.parametrize("percent", [1, 2, 3, 4, 6, 8, 12, 16, 20, 26, 33, 40, 50, 60, 75, 90])
def test_the_bits_are_those_that_lose_least(percent: int, group: int) -> None:
    """With as many entries as fit, whichever index is lighter."""
    shape = (256, 512)
    budget = Budget(2 * shape[0] * shape[1] * percent // 100)
    spec = layout(LowRankSparseConfig(value_group=group), shape, budget)
    assert isinstance(spec, SparseSpec)
    each = {}

    def weighs(bits: int, nonzeros: int) -> int:
        return SparseSpec.lightest(*shape, nonzeros, storing.codec(bits, group)).bytes

    counts = range(0, 256 * 512 + 1, 64)
    for bits in (2, 3, 4, 6, 8, 16):
        fitting = bisect_right(counts, budget.amount, key=partial(weighs, bits))
        each[bits] = lost(bits, counts[fitting - 1] / (256 * 512)) if fitting else math.inf
    assert each[spec.codec.bits] == pytest.approx(min(each.values()), rel=2e-3)


def test_the_harsher_the_ratio_the_fewer_the_bits() -> None:
    bits = [
        parts_of(layout(LowRankSparseConfig(), (256, 512), Budget(2 * 256 * 512 * percent // 100)))[1].codec.bits
        for percent in (90, 60, 40, 25, 15)
    ]
    assert bits == sorted(bits, reverse=True)
    assert len(set(bits)) >= 3


def test_of_parameters_a_few_bits_cost_as_much_as_many() -> None:
    spec = layout(LowRankSparseConfig(), (64, 64), Budget(1000, "parameters"))
    assert (spec.parameters, parts_of(spec)[1].codec.bits) == (1000, 16)


# --- the fit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 16, 4])
def test_a_share_for_ranks_gives_a_sum(bits: Any) -> None:
    """And of a weight that is low rank plus sparse, both parts together are better than entries alone."""
    X, weight = correlated(width=48), 3 * normal(64, 2, seed=3) @ normal(2, 48, seed=4)
    weight[normal(64, 48, seed=5).abs() > 1.8] += 6.0
    ratio = 0.8 if bits == 4 else 0.7
    both, with_ranks = run(LowRankSparseConfig(rank_share=0.4, value_bits=bits), weight, X, ratio)
    alone, without = run(LowRankSparseConfig(value_bits=bits), weight, X, ratio)
    assert isinstance(both, Sum)
    assert isinstance(both.left, Product)
    assert isinstance(both.right, Sparse)
    assert isinstance(alone, Sparse)
    assert with_ranks.relative_error < 0.7 * without.relative_error


@pytest.mark.parametrize("config", [OatsConfig(rank_share=1.0), LowRankSparseConfig(rank_share=1.0, value_bits=16)])
def test_a_share_of_all_leaves_entries_the_rest_of_a_rank(config: Any) -> None:
    X, weight = correlated(), normal(64, 32, seed=3)
    exact = Budget(2 * 7 * (64 + 32))
    assert layout(config, (64, 32), exact).form == "product"
    factors, report = fit(config, weight, gram_of(X), layout(config, (64, 32), exact), torch.Generator())
    assert isinstance(factors, Product)
    assert 0 < report.relative_error < 1


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_oats_with_a_refit_is_never_worse(share: float) -> None:
    X, weight = correlated(), normal(24, 32, seed=3)
    _, plain = run(OatsConfig(rank_share=share), weight, X, 0.4)
    _, moved = run(OatsConfig(rank_share=share, refit=True), weight, X, 0.4)
    assert moved.relative_error < 0.9 * plain.relative_error


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("config", [OatsConfig(), CapConfig(), CapConfig(refit=True), SvdConfig()], ids=repr)
def test_few_bits_are_rounded_in_the_metric_of_the_gram(config: Any, bits: Any) -> None:
    """Against the same parts, each value rounded to nearest."""
    X, weight = correlated(), 3 * normal(64, 4, seed=3) @ normal(4, 32, seed=4) + 0.2 * normal(64, 32, seed=5)
    entries = 0 if isinstance(config, SvdConfig) else 640
    fine, coarse = (sum_spec((64, 32), 4, entries, width, 32) for width in (16, bits))
    (exact, _), (found, _) = (fit(config, weight, gram_of(X), spec, torch.Generator()) for spec in (fine, coarse))

    def nearest(part: Any, spec: Any) -> Tensor:
        return (type(part).encode(part.to_dense(torch.float32), spec)).to_dense()

    low, low_spec = (exact.left, coarse.left) if isinstance(exact, Sum) else (exact, coarse)  # type: ignore[union-attr]
    plain = nearest(low.left, low_spec.left) @ nearest(low.right, low_spec.right)  # type: ignore[union-attr]
    if isinstance(exact, Sum):
        plain = plain + nearest(exact.right, coarse.right)  # type: ignore[union-attr]
    before, after = (float(((weight - dense) @ X.T).norm()) for dense in (plain, found.to_dense()))
    assert after < 0.9 * before


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["oats", "oats refit", "cap refit", "lowrank-sparse"])
def test_entries_make_up_for_the_rounding_of_ranks(name: str, bits: Any) -> None:
    """On their support, beside the low-rank part as it is stored. Against the same parts with entries for the exact ranks."""
    X, weight = correlated(), 3 * normal(64, 4, seed=3) @ normal(4, 32, seed=4) + 0.2 * normal(64, 32, seed=5)
    gram, shape = gram_of(X), (64, 32)
    exact = sum_spec(shape, 4, 1024, 16, 16)
    coarse = SumSpec(left=sum_spec(shape, 4, 0, bits, 16), right=sum_spec(shape, 0, 1024, 16, 16))
    config: MethodConfig = {
        "oats": OatsConfig(),
        "oats refit": OatsConfig(refit=True),
        "cap refit": CapConfig(refit=True),
        "lowrank-sparse": LowRankSparseConfig(value_bits=16),
    }[name]
    (whole, _), (found, report) = (fit(config, weight, gram, spec, torch.Generator()) for spec in (exact, coarse))
    assert isinstance(whole, Sum)
    assert isinstance(found, Sum)
    ignorant = found.left.to_dense() + whole.right.to_dense()
    before, after = (float(((weight - dense) @ X.T).norm()) for dense in (ignorant, found.to_dense()))
    assert after < 0.97 * before
    assert report.relative_error == pytest.approx(after / float((weight @ X.T).norm()), rel=1e-3)


def test_entries_of_cap_stay_as_they_are_without_a_refit() -> None:
    weight, gram = normal(64, 32, seed=3), gram_of(correlated())
    specs = [
        sum_spec((64, 32), 4, 700, 16, 16),
        SumSpec(left=sum_spec((64, 32), 4, 0, 4, 16), right=sum_spec((64, 32), 0, 700, 16, 16)),
    ]
    one, other = (fit(CapConfig(), weight, gram, spec, torch.Generator())[0] for spec in specs)
    assert isinstance(one, Sum)
    assert isinstance(other, Sum)
    assert torch.equal(one.right.to_dense(), other.right.to_dense())
    assert not torch.equal(one.left.to_dense(), other.left.to_dense())


def test_the_search_beats_its_sketch() -> None:
    X, weight = correlated(), normal(64, 32, seed=3)
    ranks = {"value_bits": 4, "rank_share": 0.2}, {"value_bits": 3, "rank_share": 0.1}
    for options in ({"value_bits": 16}, {"value_bits": 4}, {"value_bits": 3}, *ranks):
        config = LowRankSparseConfig(**options)
        ratio = 1 - 0.5 * config.value_bits / 16 - 0.07
        assert sketch(config).value_bits == config.value_bits
        full, quick = (run(each, weight, X, ratio)[1].relative_error for each in (config, sketch(config)))
        assert full < quick < 1


# --- values of few bits ------------------------------------------------------------------------------------------


def output_error(weight: Tensor, dense: Tensor, gram: Tensor) -> float:
    lost = (weight - dense).double()
    return math.sqrt(float(torch.linalg.vecdot(lost, lost @ gram).sum()))


def pruned_and_spec(bits: Any, group: int, seed: int) -> tuple[Tensor, Tensor, Pruned, SparseSpec]:
    weight = normal(20, 32, seed=seed)
    gram = gram_of(correlated()).matrix
    kept = 301
    codec = Integer(bits=bits, group=group)
    return weight, gram, prune(weight, gram, kept), SparseSpec(rows=20, cols=32, nonzeros=kept, codec=codec)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("group", [7, 32, 128, 5000])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_values_of_few_bits_are_better_than_nearest_ones(bits: Any, group: int, seed: int) -> None:
    """On the same family of grids, whose scales the codec chooses for rounding to nearest."""
    weight, gram, pruned, spec = pruned_and_spec(bits, group, seed)
    nearest = output_error(weight, Sparse.encode(pruned.values, spec, pruned.support).to_dense(), gram)
    carried, swept = (
        output_error(weight, store_pruned(weight, pruned, spec, gram, sweeps=sweeps).to_dense(), gram)
        for sweeps in (0, 4)
    )
    assert swept <= min(nearest, carried)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("group", [1, 7, 128, 5000])
def test_what_is_stored_is_what_was_found(bits: Any, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: the integers and the scales go into the file as they are."""
    weight, gram, pruned, spec = pruned_and_spec(bits, group, 3)
    found: list[Stepped] = []

    def spy(*args: Any, **options: Any) -> Stepped:
        found.append(to_steps(*args, **options))
        return found[-1]

    monkeypatch.setattr(storing, "to_steps", spy)
    factors = store_pruned(weight, pruned, spec, gram)
    factors.check()
    assert factors.spec == spec
    assert torch.equal(factors.to_dense(), found[0].values)
    assert torch.equal(factors.support(), pruned.support)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_nothing_kept_is_nothing_stored(bits: Any) -> None:
    weight, gram = normal(6, 8), torch.eye(8, dtype=torch.float64)
    spec = SparseSpec.lightest(6, 8, 0, storing.codec(bits, 128))
    nothing = Pruned(torch.zeros(6, 8), torch.zeros(6, 8, dtype=torch.bool))
    factors = store_pruned(weight, nothing, spec, gram)
    factors.check()
    assert not factors.to_dense().any()


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_every_way_to_a_support_stores_the_form_that_was_asked_for(bits: Any, share: float) -> None:
    """And one pass, which knows what values can be, is better than rounding afterwards as long as nothing is swept."""
    X, weight = correlated(), normal(64, 32, seed=3)
    errors = {}
    for support in ("search", "surgeon", "one-pass"):
        config = LowRankSparseConfig(value_bits=bits, rank_share=share, support=support, sweeps=0)
        factors, report = run(config, weight, X, 1 - 0.4 * bits / 16 - 0.07)
        kept = factors.right if isinstance(factors, Sum) else factors
        assert isinstance(kept, Sparse)
        assert int(kept.support().sum()) == kept.spec.nonzeros
        errors[support] = report.relative_error
    assert errors["search"] < min(errors["surgeon"], errors["one-pass"])
    assert errors["one-pass"] < 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_pass_knows_what_values_of_few_bits_can_be(seed: int) -> None:
    """Its values lose less than those that are rounded once the same pass without rounding has settled them."""
    weight, gram = normal(48, 128, seed=seed), gram_of(correlated(512, 128)).matrix
    spec = SparseSpec(rows=48, cols=128, nonzeros=4000, codec=Integer(bits=3, group=128))
    passed = storing.prune_rounding(weight, spec, gram)
    assert int(passed.support.sum()) == spec.nonzeros
    assert max(len(row[kept].unique()) for row, kept in zip(passed.values, passed.support, strict=True)) <= 8
    settled = surgeon(weight, gram, spec.nonzeros, order=settling_order(gram))
    nearest = Sparse.encode(settled.values, spec, settled.support).to_dense()
    assert output_error(weight, passed.values, gram) < 0.95 * output_error(weight, nearest, gram)


def test_one_pass_over_fine_values_is_the_surgeons() -> None:
    weight, gram, _, _ = pruned_and_spec(3, 128, 3)
    spec = SparseSpec(rows=20, cols=32, nonzeros=301, codec=Integer(bits=8, group=128))
    settled = surgeon(weight, gram, 301, order=settling_order(gram))
    passed = storing.prune_rounding(weight, spec, gram)
    assert torch.equal(passed.values, settled.values)
    assert torch.equal(passed.support, settled.support)


# --- what an allocation may choose -------------------------------------------------------------------------------


def test_the_forms_offered() -> None:
    def told(config: LowRankSparseConfig) -> set[tuple[str, float, Any]]:
        return {(each.name, getattr(each, "rank_share", 0.0), each.value_bits) for each in variants(config)}  # type: ignore[attr-defined]

    whole = {("quantize", 0.0, bits) for bits in (8, 6, 4)}
    alone = {("lowrank-sparse", 0.0, bits) for bits in (8, 6, 4, 3)}
    beside = {("lowrank-sparse", 0.2, 4), ("lowrank-sparse", 0.1, 3)}
    assert told(LowRankSparseConfig()) == alone | beside | whole
    assert told(LowRankSparseConfig(rank_share=0.0)) == alone | whole
    beside = {("lowrank-sparse", 0.1, bits) for bits in (8, 6, 4, 3)}
    assert told(LowRankSparseConfig(rank_share=0.1)) == alone | beside | whole
    one, both = {("lowrank-sparse", 0.0, 4), ("quantize", 0.0, 4)}, {("lowrank-sparse", 0.2, 4)}
    assert told(LowRankSparseConfig(value_bits=4, rank_share=0.0)) == one
    both |= one
    assert told(LowRankSparseConfig(value_bits=4)) == both
    assert told(LowRankSparseConfig(value_bits=8)) == {("lowrank-sparse", 0.0, 8), ("quantize", 0.0, 8)}
    for bits in (12, 16):
        assert told(LowRankSparseConfig(value_bits=bits)) == {("lowrank-sparse", 0.0, bits)}
    assert told(LowRankSparseConfig(value_bits=4, rank_share=0.2)) == both
    assert all(each.rounds == 3 for each in variants(LowRankSparseConfig(rounds=3)) if hasattr(each, "rounds"))


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.6, 0.8])
def test_the_knapsack_mixes_forms_within_the_budget(ratio: float, words: Path, tmp_path: Path) -> None:
    """Of a weight with few large entries the small ones are dropped, of one with values alike none."""
    toy = toy_folder(tmp_path / "toy", "llama")
    tensors = load_file(toy / "model.safetensors")
    for name, tensor in tensors.items():
        if "down_proj" in name or "q_proj" in name:
            tensors[name] = tensor.pow(5) * 1e5
    save_file(tensors, toy / "model.safetensors", metadata={"format": "pt"})
    calibration = {"text": [str(words)], "sequences": 4, "length": 32}
    method = {"name": "lowrank-sparse", "rounds": 5, "sweeps": 1}
    settings = {"model": str(toy), "ratio": ratio, "measure": "relative", "method": method, "include": "*.0.*"}
    record = lexigram.compress(Recipe.parse({**settings, "calibration": calibration}), tmp_path / "out")
    allowed = int((1 - ratio) * record.bytes_before)
    assert 0.985 * allowed < record.bytes_after <= allowed
    content = json.loads((tmp_path / "out" / "allocation.json").read_text())
    methods = {unit["members"][0]: unit["method"] for unit in content["units"]}
    assert len({(method["name"], method["value_bits"]) for method in methods.values()}) > 1
    sparse = [name for name, method in methods.items() if method["name"] == "lowrank-sparse"]
    assert {name for name in methods if "down_proj" in name or "q_proj" in name} <= set(sparse)


def test_ranks_are_chosen_for_the_weight_that_has_them(words: Path, tmp_path: Path) -> None:
    """Strong in few directions, with values alike in all others: few bits are not fine enough for what is strong."""
    toy = toy_folder(tmp_path / "toy", "llama")
    tensors = load_file(toy / "model.safetensors")
    (planted,) = [name for name in tensors if "layers.0.mlp.down_proj" in name]
    rows, cols = tensors[planted].shape
    tensors[planted] = normal(rows, 1, seed=3) @ normal(1, cols, seed=4) + 0.1 * normal(rows, cols, seed=5)
    save_file(tensors, toy / "model.safetensors", metadata={"format": "pt"})
    calibration = {"text": [str(words)], "sequences": 4, "length": 32}
    method = {"name": "lowrank-sparse", "rounds": 3, "sweeps": 1}
    settings = {"model": str(toy), "ratio": 0.7, "measure": "relative", "include": "*.0.mlp.*"}
    for share in (None, 0.0):
        recipe = Recipe.parse({**settings, "method": {**method, "rank_share": share}, "calibration": calibration})
        record = lexigram.compress(recipe, tmp_path / f"out-{share}")
        forms = {layer.name: layer.factors.form for layer in record.layers}
        assert forms[planted.removesuffix(".weight")] == "sum" or share == 0.0
        assert share is None or "sum" not in forms.values()


def test_low_rank_parts_that_nobody_asked_for_are_measured_between_two_ratios_alone() -> None:
    target = Target("layer.q_proj", (256, 192), 0, "layer.q_proj", transposed=False, bias=False)

    def ratios(config: LowRankSparseConfig) -> dict[tuple[int | None, float], list[float]]:
        return {
            (each.value_bits, each.rank_share or 0.0): [
                1 - form.bytes / target.dense_bytes for form in measured_forms(each, [target])
            ]
            for each in variants(config)
            if isinstance(each, LowRankSparseConfig)
        }

    chosen, fixed = ratios(LowRankSparseConfig()), ratios(LowRankSparseConfig(rank_share=0.3))
    for (_, share), found in chosen.items():
        assert found == sorted(found)
        assert len(found) == 2 if share else len(found) > 2
        assert found[0] > 0.58 or not share  # more where all entries fit with ranks to spare
        assert found[-1] == pytest.approx(0.8 if share else 0.92, abs=0.02)
    assert all(max(found) == pytest.approx(0.92, abs=0.02) for found in fixed.values())
