"""Both factors sparse: proximal maps, a monotone objective, planted products, budgets to the byte, and what is stored.

The oracles: scipy's scalar minimisation and all supports of small vectors, numpy's least squares, the inputs themselves.
"""

import itertools
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import optimize
from torch import Tensor

from drawn import SINGULAR, correlated, generator, gram_of, normal, singular_gram
from lexigram.factors import Bfloat, Factor, Product, ProductSpec, Sparse, SparseSpec, empty, factor_spec
from lexigram.gram import Gram
from lexigram.linalg import palm as palm_module
from lexigram.linalg.palm import (
    L0,
    L1,
    Fitting,
    Largest,
    Penalty,
    SparsePair,
    Within,
    balanced,
    most_important,
    palm,
    refit,
    sparse_product,
)
from lexigram.linalg.svd import truncated_svd
from lexigram.linalg.whitening import Whitening, whiten
from lexigram.methods import Budget, BudgetTooSmallError, CospadiConfig, FitReport, SvdConfig, fit, layout
from lexigram.methods.base import sketch, variants
from lexigram.methods.double_sparse import DoubleSparseConfig
from oracles import output_error

BITS: list[Any] = [2, 3, 4, 6, 8, 10, 12, 14, 16]


def run(
    config: Any, weight: Tensor, gram: Gram, ratio: float, *, capped: bool = False
) -> tuple[Factor, FitReport, ProductSpec]:
    budget = Budget(int((1 - ratio) * 2 * weight.numel()))
    spec: Any = layout(config, (weight.shape[0], weight.shape[1]), budget)
    factors, report = fit(config, weight, gram, spec, torch.Generator().manual_seed(0))
    factors.check()
    assert factors.spec.bytes <= budget.amount
    assert capped or factors.spec == spec
    return factors, report, spec


def planted(
    rows: int, cols: int, atoms: int, a_code: int, an_atom: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A product of codes with `a_code` entries a row and a dictionary with `an_atom`, in float64, and both."""
    codes, dictionary = (
        normal(*shape, seed=seed + at, dtype=torch.float64) for at, shape in enumerate([(rows, atoms), (atoms, cols)])
    )
    for matrix, kept, at in ((codes, a_code, 2), (dictionary, an_atom, 3)):
        order = torch.rand(matrix.shape, generator=generator(seed + at)).argsort(dim=1)
        matrix.sign_().mul_(1 + torch.rand(matrix.shape, generator=generator(seed + at + 2), dtype=torch.float64))
        matrix.scatter_(1, order[:, kept:], 0.0)
    return codes @ dictionary, codes, dictionary


def metric_of(width: int, seed: int = 1) -> Whitening:
    X = correlated(10 * width, width, seed=seed, decades=1.0).double()
    return whiten(X.T @ X / len(X))


# --- proximal maps -----------------------------------------------------------------------------------------------


def moreau(penalty: Penalty, u: Tensor, x: Tensor, h: Tensor) -> float:
    """What a proximal map minimises."""
    return penalty.value(u) + 0.5 * float((h * (u - x).square()).sum())


@given(st.floats(-3, 3), st.floats(0.1, 9), st.floats(0.01, 3), st.sampled_from([L0, L1]))
@settings(max_examples=60, deadline=None)
def test_thresholds_are_the_minimum_of_a_scalar(x: float, h: float, weight: float, kind: Any) -> None:
    """Of scipy's bounded search on either side of zero, and of zero itself."""
    penalty = kind(weight)
    point, metric = (torch.tensor([value], dtype=torch.float64) for value in (x, h))

    def cost(u: float) -> float:
        return (weight * abs(u) if kind is L1 else weight * (u != 0)) + 0.5 * h * (u - x) ** 2

    found = cost(float(penalty.prox(point, metric)))
    sides = [optimize.minimize_scalar(cost, bounds=side, method="bounded").fun for side in ((-4, 0), (0, 4))]
    assert found <= min(*sides, cost(0.0)) + 1e-9
    assert penalty.value(point) == pytest.approx(weight * (abs(x) if kind is L1 else x != 0))


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_the_largest_are_the_best_of_all_supports(seed: int, size: int, count: int) -> None:
    x, h = normal(size, seed=seed).double(), torch.rand(size, generator=generator(seed)).double() + 0.01
    found = Largest(count).prox(x, h)
    assert int(found.count_nonzero()) == min(count, size)
    supports = (list(kept) for kept in itertools.combinations(range(size), min(count, size)))
    best = min(float((h * x.square()).sum() - (h * x.square())[kept].sum()) / 2 for kept in supports)
    assert moreau(Largest(count), found, x, h) == pytest.approx(best, abs=1e-12)
    assert Largest(count).value(found) == 0
    assert Largest(0).value(x) == math.inf


def test_a_support_is_a_projection() -> None:
    x, support = normal(5, 6), normal(5, 6, seed=1) > 0
    assert torch.equal(Within(support).prox(x, torch.ones(5, 6)), x * support)
    assert (Within(support).value(x), Within(support).value(x * support)) == (math.inf, 0)


@pytest.mark.parametrize("penalty", [L1(0.1), L0(0.1), Largest(3), Within(torch.ones(2, 3, dtype=torch.bool))])
def test_what_has_no_curvature_is_left_out(penalty: Penalty) -> None:
    h = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    found = penalty.prox(5 + torch.arange(6.0).view(2, 3), h)
    assert torch.equal(found != 0, h > 0)


@given(st.integers(0, 999), st.integers(1, 40), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_exactly_so_many_places_are_chosen(seed: int, size: int, count: int) -> None:
    values = torch.randint(0, 4, (size,), generator=generator(seed)).float()
    mask = most_important(values, count)
    assert int(mask.sum()) == min(size, count)
    assert not mask.any() or mask.all() or values[mask].min() >= values[~mask].max()


# --- the minimisation --------------------------------------------------------------------------------------------


def objective(
    signals: Tensor, factor: Tensor, codes: Tensor, dictionary: Tensor, penalties: tuple[Penalty, Penalty]
) -> float:
    lost = signals - codes @ dictionary @ factor.T
    return float(lost.square().sum()) + penalties[0].value(codes) + penalties[1].value(dictionary)


PENALTIES: dict[str, tuple[Penalty, Penalty]] = {
    "l0": (L0(0.05), L0(0.02)),
    "l1": (L1(0.3), L1(0.1)),
    "l1 and l0": (L1(0.3), L0(0.02)),
    "sizes": (Largest(150), Largest(70)),
    "nothing": (L0(0.0), L0(0.0)),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("inertia", [True, False])
@pytest.mark.parametrize("cg_steps", [0, 2])
@pytest.mark.parametrize("start", ["drawn", "svd"])
def test_the_objective_never_rises(name: str, inertia: bool, cg_steps: int, start: str) -> None:
    """Recomputed from the definition after so many iterations; the start of `sizes` is not allowed, whence infinite."""
    penalties, metric = PENALTIES[name], metric_of(16)
    weight = normal(24, 16, seed=3).double()
    signals = metric.whiten(weight)
    pair = SparsePair(normal(24, 10, seed=4).double(), normal(10, 16, seed=5).double())
    if start == "svd":
        left, values, right = torch.linalg.svd(signals, full_matrices=False)
        pair = SparsePair(left[:, :10] * values[:10], metric.unwhiten(right[:10]))
    course = [objective(signals, metric.factor, pair.codes, pair.dictionary, penalties)]
    for iterations in (1, 2, 5, 30):
        found = palm(
            signals,
            metric.factor,
            pair,
            *penalties,
            iterations=iterations,
            inertia=inertia,
            cg_steps=cg_steps,
            tolerance=0.0,
        )
        course.append(objective(signals, metric.factor, found.codes, found.dictionary, penalties))
        assert found.history[-1] == pytest.approx(course[-1], rel=1e-9)
        assert all(after <= before for before, after in pairwise(found.history))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(course))
    assert course[-1] < 0.9 * course[1] or (name, start) == ("nothing", "svd"), "the SVD is the optimum of nothing"


def test_opposite_atoms_do_not_stall_it() -> None:
    """Their Gram has its largest eigenvalue along (1, -1), to which a vector of ones is orthogonal."""
    atoms = torch.tensor([[1.0, 0.0, 0.2], [-0.9, 0.4, 0.0]], dtype=torch.float64)
    codes = normal(40, 2, seed=1).double()
    start = SparsePair(torch.zeros_like(codes), atoms)
    found = palm(
        codes @ atoms, torch.eye(3, dtype=torch.float64), start, L1(1e-3), L1(1e-3), iterations=200, tolerance=1e-9
    )
    assert found.history[-1] < 0.01 * float((codes @ atoms).square().sum())


def test_inertia_is_sooner_where_nothing_is_refitted() -> None:
    metric = metric_of(16)
    signals = metric.whiten(normal(24, 16, seed=3).double())
    pair = SparsePair(normal(24, 10, seed=4).double(), normal(10, 16, seed=5).double())
    plain, beyond = (
        palm(signals, metric.factor, pair, *PENALTIES["l1"], iterations=40, inertia=inertia, tolerance=0.0)
        for inertia in (False, True)
    )
    assert beyond.history[-1] < plain.history[-1]


def test_a_stationary_point_of_l1_is_one() -> None:
    """The subgradient contains zero: half of the gradient is half of the weight where an entry is, and no more elsewhere."""
    metric = metric_of(8)
    signals = metric.whiten(normal(12, 8, seed=3).double())
    pair = SparsePair(normal(12, 4, seed=4).double(), normal(4, 8, seed=5).double())
    found = palm(signals, metric.factor, pair, L1(0.4), L1(0.2), iterations=20_000, tolerance=1e-13)
    lost = signals - found.codes @ found.dictionary @ metric.factor.T
    slopes = {
        0.4: (2 * lost @ (found.dictionary @ metric.factor.T).T, found.codes),
        0.2: (2 * found.codes.T @ lost @ metric.factor, found.dictionary),
    }
    for weight, (slope, values) in slopes.items():
        assert bool((slope.abs() <= weight * 1.02).all())
        assert torch.allclose(slope[values != 0], weight * values[values != 0].sign(), atol=0.02 * weight)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_product_is_recovered(seed: int) -> None:
    """Supports and values, up to order, sign and scale of the atoms: near to the truth, where it can be told from others."""
    rows, cols, atoms = 300, 24, 10
    weight, codes, dictionary = planted(rows, cols, atoms, 3, 5, seed=10 * seed)
    metric = metric_of(cols)
    noise = 0.1 * normal(atoms, cols, seed=7).double()
    start = SparsePair(codes + 0.1 * normal(rows, atoms, seed=6).double(), dictionary + noise)
    found = palm(
        metric.whiten(weight),
        metric.factor,
        start,
        Largest(3 * rows),
        Largest(5 * atoms),
        iterations=300,
        tolerance=0.0,
    )
    assert torch.equal(found.codes != 0, codes != 0)
    assert torch.equal(found.dictionary != 0, dictionary != 0)
    assert torch.allclose(found.codes @ found.dictionary, weight, atol=1e-5)


def test_planted_products_are_found_from_nothing() -> None:
    """Without a hint where the atoms are, a form of just that size leaves less than as many ranks of its bytes, and of three
    products one is found to the last digits. The problem is not convex: not all of them are.
    """
    left = []
    for seed in (0, 10, 20):
        weight, codes, dictionary = planted(400, 32, 12, 2, 4, seed=seed)
        metric = metric_of(32)
        signals = metric.whiten(weight)
        counts = int(codes.count_nonzero()), int(dictionary.count_nonzero())
        found = sparse_product(signals, metric, 12, *counts, tolerance=0.0)
        lost = float((signals - found.codes @ found.dictionary @ metric.factor.T).norm() / signals.norm())
        values = np.linalg.svd(signals.numpy(), compute_uv=False)
        rank = sum(counts) // (400 + 32) + 1
        assert lost < 0.75 * math.sqrt((values[rank:] ** 2).sum() / (values**2).sum())
        left.append(lost)
    assert min(left) < 1e-6


def test_it_stops_by_relative_change() -> None:
    """At the first iteration that lowers the objective by no more than the tolerance."""
    weight, codes, dictionary = planted(60, 16, 8, 3, 4, seed=2)
    metric, counts = metric_of(16), (int(codes.count_nonzero()), int(dictionary.count_nonzero()))
    signals = metric.whiten(weight + 0.05 * normal(60, 16, seed=3).double())
    whole = sparse_product(signals, metric, 8, *counts, iterations=40, refits=1, tolerance=0.0)
    early = sparse_product(signals, metric, 8, *counts, iterations=40, refits=1, tolerance=1e-2)
    assert (whole.stop, early.stop) == ("iterations", "tolerance")
    steps = len(early.history) - 1  # one of the refit
    assert 1 < steps < 40
    assert early.history[:steps] == whole.history[:steps]
    changes = [1 - after / before for before, after in pairwise(early.history[:steps])]
    assert changes[-1] <= 1e-2 < min(changes[:-1])


@pytest.mark.parametrize("penalised", [True, False])
def test_what_thresholds_leave_is_refitted(penalised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to be won in either factor on its support, as there is without the refit."""
    metric = metric_of(16)
    signals = metric.whiten(normal(40, 16, seed=3).double())
    prices = (L1(0.5), L1(0.5)) if penalised else None

    def slope() -> float:
        found = sparse_product(
            signals, metric, 8, 200, 80, penalties=prices, tightening=2, iterations=2, refits=60, tolerance=0.0
        )
        seen = found.dictionary @ metric.factor.T
        lost = signals - found.codes @ seen
        slopes = (lost @ seen.T * found.code_support, found.codes.T @ lost @ metric.factor * found.dictionary_support)
        return max(float(each.abs().max()) for each in slopes)

    assert slope() < 0.005
    monkeypatch.setattr(palm_module, "refit", lambda _signals, _factor, pair, *_supports, **_options: pair)
    assert slope() > 0.08


@pytest.mark.parametrize("seed", range(4))
def test_a_refit_never_raises_the_error(seed: int) -> None:
    metric, signals = metric_of(16), normal(24, 16, seed=seed).double()
    pair = SparsePair(normal(24, 10, seed=seed + 4).double(), normal(10, 16, seed=seed + 5).double())
    supports = normal(24, 10, seed=seed + 6) > 0.5, normal(10, 16, seed=seed + 7) > 0.5
    inside = pair.codes * supports[0], pair.dictionary * supports[1]
    before = float((signals - inside[0] @ inside[1] @ metric.factor.T).square().sum())
    for rounds in (1, 2, 50):
        found = refit(signals, metric.factor, pair, *supports, rounds=rounds)
        after = float((signals - found.codes @ found.dictionary @ metric.factor.T).square().sum())
        assert after <= before
        before = after
        assert not found.codes[~supports[0]].any()
        assert not found.dictionary[~supports[1]].any()


def test_a_refit_of_codes_is_numpys_least_squares() -> None:
    metric, signals = metric_of(12), normal(20, 12, seed=2).double()
    atoms, support = normal(5, 12, seed=3).double(), normal(20, 5, seed=4) > 0
    pair = SparsePair(normal(20, 5, seed=5).double(), atoms)
    found = refit(signals, metric.factor, pair, support, torch.ones(5, 12, dtype=torch.bool), rounds=1)
    assert found.history[-1] <= sum(
        np.linalg.lstsq((atoms @ metric.factor.T)[kept].T.numpy(), row.numpy(), rcond=None)[1].sum()
        if kept.any()
        else float(row.square().sum())
        for kept, row in zip(support, signals, strict=True)
    ) * (1 + 1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_balancing_leaves_the_product(share: float) -> None:
    codes, dictionary, metric = normal(9, 5).double(), normal(5, 7, seed=1).double(), metric_of(7)
    codes[:, 2] = 0
    dictionary[3] = 0
    gram = metric.factor.T @ metric.factor
    ours, theirs = balanced(codes, dictionary, gram, share)
    assert torch.allclose(ours @ theirs, codes @ dictionary)
    weight = codes.norm(dim=0) * (dictionary @ metric.factor.T).norm(dim=1)
    alive = [0, 1, 4]
    assert torch.allclose(ours.norm(dim=0)[alive], weight[alive] ** share)
    assert torch.allclose((theirs @ metric.factor.T).norm(dim=1)[alive], weight[alive] ** (1 - share))


@pytest.mark.parametrize("kind", [L0, L1])
def test_a_weight_is_found_at_which_entries_fit(kind: Any) -> None:
    metric, signals = metric_of(16), normal(20, 16).double() @ metric_of(16).factor.T
    limit = 200
    fitting = Fitting(kind, lambda codes, entries: (codes + 2 * entries) / limit)
    found = sparse_product(signals, metric, 10, 1, 1, penalties=fitting, tolerance=0.0)
    assert found.weight is not None
    left, right = truncated_svd(signals, 10)
    start = SparsePair(left, metric.unwhiten(right))
    for weight, fits in ((found.weight, True), (0.8 * found.weight, False)):
        pair = palm(signals, metric.factor, start, kind(weight), kind(weight), tolerance=0.0)
        needed = int(pair.codes.count_nonzero()) + 2 * int(pair.dictionary.count_nonzero())
        assert (needed <= limit) == fits
        if fits:
            assert needed > 0.9 * limit
            assert found.penalised == pytest.approx(pair.history)
            assert int(found.code_support.sum()) + 2 * int(found.dictionary_support.sum()) == needed


def test_what_does_not_fit_is_refused() -> None:
    metric = metric_of(6)
    signals = normal(8, 6).double()
    with pytest.raises(ValueError, match=r"do not fit signals \(8, 6\)"):
        palm(signals, metric.factor, SparsePair(normal(8, 3), normal(3, 5)), L0(1), L0(1))
    with pytest.raises(ValueError, match="cannot keep 25 of the 24 entries of the codes"):
        sparse_product(signals, metric, 3, 25, 4)
    with pytest.raises(ValueError, match="cannot keep 0 of the 18 entries of the dictionary"):
        sparse_product(signals, metric, 3, 24, 0)


# --- budgets -----------------------------------------------------------------------------------------------------


CONFIGS = st.builds(
    DoubleSparseConfig,
    density=st.floats(0.02, 1),
    value_bits=st.none() | st.sampled_from(BITS),
    dictionary_bits=st.none() | st.sampled_from(BITS),
    value_group=st.sampled_from([1, 16, 128]),
)
SIZES = st.one_of(st.integers(1, 40), st.integers(40, 3000))


@settings(max_examples=400, deadline=None)
@given(CONFIGS, SIZES, SIZES, st.floats(0.01, 0.995), st.sampled_from(["bytes", "parameters"]))
def test_a_budget_is_never_exceeded_and_has_no_room_for_more(
    config: DoubleSparseConfig, rows: int, cols: int, ratio: float, unit: Any
) -> None:
    budget = Budget(int((1 - ratio) * rows * cols * (2 if unit == "bytes" else 1)), unit)
    try:
        spec: Any = layout(config, (rows, cols), budget)
    except BudgetTooSmallError as error:
        needed = error.needed
    else:
        needed = 0
    assert needed == 0 or needed > budget.amount
    assume(not needed)
    assert (spec.rows, spec.cols) == (rows, cols)
    assert factor_spec.validate_json(spec.model_dump_json()) == spec
    used = spec.bytes if unit == "bytes" else spec.parameters
    assert used <= budget.amount
    atoms, entries = spec.left.cols, spec.left.nonzeros + spec.right.nonzeros
    assert 1 <= atoms <= min(rows, cols)
    assert min(spec.left.nonzeros, spec.right.nonzeros) >= 1
    for leaf in (spec.left, spec.right):
        assert leaf == SparseSpec.lightest(leaf.rows, leaf.cols, leaf.nonzeros, leaf.codec), "the lighter index"
    # One entry more takes its value, a scale, a zero and a byte of each on one side, and its place in a list.
    step = 1 if unit == "parameters" else 2 * 2 + 2 + 2 + 2 + 3
    assert budget.amount - used < step or entries == atoms * (rows + cols)
    if 1 < atoms < min(rows, cols):
        assert entries + 1 >= math.floor(config.density * atoms * (rows + cols))


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("shape", [(576, 576), (1536, 576), (576, 1536), (192, 576)])
def test_nearly_all_of_a_budget_is_used(shape: tuple[int, int], ratio: float) -> None:
    budget = Budget(int((1 - ratio) * 2 * shape[0] * shape[1]))
    assert budget.amount - layout(DoubleSparseConfig(), shape, budget).bytes < 10


def test_the_fewer_bytes_the_fewer_bits() -> None:
    bits = []
    for ratio in (0.1, 0.5, 0.65, 0.75, 0.95):
        spec: Any = layout(DoubleSparseConfig(), (256, 256), Budget(int((1 - ratio) * 2 * 256**2)))
        bits.append((spec.left.codec.bits, spec.right.codec.bits))
    assert bits == sorted(bits, reverse=True)
    assert (bits[0], bits[-1]) == ((16, 16), (4, 3))


def test_indices_are_lists_where_few_entries_are_kept() -> None:
    sparse: Any = layout(DoubleSparseConfig(density=0.03), (512, 512), Budget(8000))
    dense: Any = layout(DoubleSparseConfig(density=0.3), (512, 512), Budget(8000))
    assert {sparse.left.index, sparse.right.index} == {"list"}
    assert {dense.left.index, dense.right.index} == {"bitmask"}


# --- the method --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.9, 0.95])
def test_it_beats_low_rank_and_dense_dictionaries_where_both_sides_are_sparse(ratio: float) -> None:
    weight, X = planted(256, 128, 40, 12, 24)[0].float(), correlated(600, 128, decades=1.0)
    gram = gram_of(X)
    errors = {}
    for config in (DoubleSparseConfig(), SvdConfig(value_bits=8), CospadiConfig()):
        budget = Budget(int((1 - ratio) * 2 * weight.numel()))
        factors, _ = fit(config, weight, gram, layout(config, (256, 128), budget), torch.Generator())
        errors[config.name] = output_error(weight, factors, X)
    assert errors["double-sparse"] < 0.95 * min(errors["svd"], errors["cospadi"])


@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (4, 3), (2, 2)])
def test_what_is_stored_comes_back(bits: Any, tmp_path: Path) -> None:
    """Through a file: the same spec, tensors, matrix and outputs, from an index of either kind."""
    X = correlated(300, 96)
    for density in (0.02, 0.5):
        config = DoubleSparseConfig(value_bits=bits[0], dictionary_bits=bits[1], density=density)
        factors, report, spec = run(config, normal(80, 96), gram_of(X), 0.93)
        assert isinstance(factors, Product)
        assert isinstance(factors.left, Sparse)
        assert isinstance(factors.right, Sparse)
        assert report.relative_error == pytest.approx(output_error(normal(80, 96), factors, X), rel=1e-3)
        file = tmp_path / f"{density}.safetensors"
        save_file({name: tensor.data for name, tensor in factors.named_parameters()}, file)
        loaded = empty(factor_spec.validate_json(spec.model_dump_json()))
        loaded.load_state_dict(load_file(file))
        loaded.check()
        assert torch.equal(loaded.to_dense(), factors.to_dense())
        assert torch.allclose(loaded(X), X @ factors.to_dense().T, atol=1e-4)
        assert sum(tensor.numel() * tensor.element_size() for tensor in load_file(file).values()) == spec.bytes


def test_rounding_is_made_up_for() -> None:
    """Coefficients are refitted to the dictionary as it is stored: less is lost than by rounding both to nearest."""
    weight, X = normal(96, 64), correlated(600, 64)
    gram, budget = gram_of(X), Budget(2 * 96 * 64 // 6)
    spec: Any = layout(DoubleSparseConfig(value_bits=4, dictionary_bits=3), (96, 64), budget)
    fine = ProductSpec(
        left=spec.left.model_copy(update={"codec": Bfloat()}), right=spec.right.model_copy(update={"codec": Bfloat()})
    )
    exact, _ = fit(DoubleSparseConfig(), weight, gram, fine, torch.Generator())
    found, _ = fit(DoubleSparseConfig(), weight, gram, spec, torch.Generator())
    assert isinstance(exact, Product)
    nearest = Product(
        Sparse.encode(exact.left.to_dense(), spec.left), Sparse.encode(exact.right.to_dense(), spec.right)
    )
    assert output_error(weight, found, X) < 0.9 * output_error(weight, nearest, X)


@pytest.mark.parametrize("kind", ["l0", "l1"])
def test_prices_decide_and_the_budget_caps(kind: Any) -> None:
    """From cheap to dear the bytes fall and the error rises; what is cheap fills the budget."""
    weight, gram = normal(64, 48), gram_of(correlated(500, 48))
    prices = (1e-5, 0.1, 1.0) if kind == "l0" else (1e-5, 0.5, 1.5)
    sizes, errors = [], []
    for price in prices:
        config = DoubleSparseConfig(
            penalty=kind, code_penalty=price, dictionary_penalty=price, value_bits=8, iterations=30
        )
        factors, report, spec = run(config, weight, gram, 0.6, capped=True)
        sizes.append(factors.spec.bytes)
        errors.append(report.relative_error)
        assert report.details["code_entries"] <= spec.left.nonzeros  # type: ignore[union-attr]
        assert all(after <= before for before, after in pairwise(report.objective))
        if price == prices[0]:
            assert factors.spec == spec
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.8 * sizes[0]
    assert errors == sorted(errors)


def test_the_price_of_sizes_is_found_where_none_is_told() -> None:
    """By soft thresholding, so other places stay than by hard; within the budget, which is nearly used."""
    weight, X = normal(64, 48), correlated(500, 48)
    gram = gram_of(X)
    for ratio in (0.5, 0.8):
        soft, report, spec = run(DoubleSparseConfig(penalty="l1", value_bits=8), weight, gram, ratio, capped=True)
        hard, _, _ = run(DoubleSparseConfig(value_bits=8), weight, gram, ratio)
        assert 0.95 * spec.bytes < soft.spec.bytes <= spec.bytes
        assert not torch.equal(soft.left.to_dense() != 0, hard.left.to_dense() != 0)
        assert output_error(weight, soft, X) < 1.5 * output_error(weight, hard, X)
        assert report.details["price"] > 0
        assert report.details["penalised_iterations"] >= 1


def test_a_price_of_sizes_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="give both penalties or none"):
        DoubleSparseConfig(penalty="l1", code_penalty=0.1)
    assert DoubleSparseConfig(penalty="l0", code_penalty=0.1).dictionary_penalty == 0


@pytest.mark.parametrize("kind", SINGULAR)
def test_grams_without_full_rank(kind: str) -> None:
    gram = Gram(singular_gram(kind), 100)
    factors, report, _ = run(
        DoubleSparseConfig(value_bits=16, dictionary_bits=16, density=0.7), normal(40, 24), gram, 0.3
    )
    assert bool(torch.isfinite(factors.to_dense()).all())
    assert report.relative_error < 0.5
    assert report.gram_damping > 0


def test_a_gram_that_is_not_finite_is_refused() -> None:
    matrix = torch.eye(24, dtype=torch.float64)
    matrix[3, 3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        run(DoubleSparseConfig(), normal(40, 24), Gram(matrix, 100), 0.5)
    weight = normal(40, 24)
    weight[2, 2] = math.inf
    with pytest.raises(ValueError, match="weight has 1 values that are not finite"):
        run(DoubleSparseConfig(), weight, Gram(torch.eye(24, dtype=torch.float64), 100), 0.5)


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (2, 200), (200, 2), (1, 1)])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_thin_matrices(shape: tuple[int, int], ratio: float) -> None:
    weight, X = normal(*shape), normal(300, shape[1], seed=2)
    try:
        factors, report, _ = run(DoubleSparseConfig(value_bits=16, dictionary_bits=16), weight, gram_of(X), ratio)
    except BudgetTooSmallError:
        assert shape == (1, 1)
        return
    assert report.relative_error == pytest.approx(output_error(weight, factors, X), rel=1e-3, abs=1e-5)
    assert report.relative_error < 0.95


def test_hardly_anything_is_left() -> None:
    """At .99 of a matrix of some size, and at its own smallest form."""
    weight, X = normal(128, 96), correlated(500, 96)
    _, report, spec = run(DoubleSparseConfig(), weight, gram_of(X), 0.99)
    assert spec.left.nonzeros > 20  # type: ignore[union-attr]
    assert report.relative_error < 1
    with pytest.raises(BudgetTooSmallError) as error:
        layout(DoubleSparseConfig(), (128, 96), Budget(1))
    smallest: Any = layout(DoubleSparseConfig(), (128, 96), Budget(error.value.needed))
    assert (smallest.left.nonzeros, smallest.right.nonzeros) == (1, 1)
    assert fit(DoubleSparseConfig(), weight, gram_of(X), smallest, torch.Generator())[1].relative_error < 1


def test_a_zero_weight_is_stored_exactly() -> None:
    factors, report, _ = run(DoubleSparseConfig(), torch.zeros(40, 24), gram_of(correlated(100, 24)), 0.8)
    assert not factors.to_dense().any()
    assert report.relative_error == 0


def test_more_effort_is_not_worse_and_a_sketch_is_close() -> None:
    weight, gram = normal(96, 64), gram_of(correlated(500, 64))
    config = DoubleSparseConfig(value_bits=16, dictionary_bits=16)
    errors = [
        run(each, weight, gram, 0.6)[1].relative_error
        for each in (config.model_copy(update={"iterations": 60, "tolerance": 0.0}), config, sketch(config))
    ]
    assert errors[0] <= errors[1] <= errors[2] * 1.001
    assert errors[2] < 1.5 * errors[1]


def test_the_forms_offered() -> None:
    def told(config: DoubleSparseConfig) -> list[Any]:
        return [(each.value_bits, each.dictionary_bits) for each in variants(config)]  # type: ignore[attr-defined]

    assert told(DoubleSparseConfig()) == [(4, 3), (6, 4), (8, 6)]
    assert told(DoubleSparseConfig(value_bits=4)) == [(4, None)]
    assert all(each.density == 0.3 for each in variants(DoubleSparseConfig(density=0.3)))  # type: ignore[attr-defined]


def test_another_form_is_refused() -> None:
    spec = layout(SvdConfig(), (24, 24), Budget(600))
    with pytest.raises(ValueError, match="does not make the form 'product'"):
        fit(DoubleSparseConfig(), normal(24, 24), gram_of(normal(50, 24)), spec, torch.Generator())
