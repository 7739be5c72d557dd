"""Dictionaries shared by members with their own metrics: dense Kronecker solves, the mean Gram, planted dictionaries."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drawn import generator
from lexigram.linalg.dictionary_learning import (
    HTP,
    KSVD,
    MOD,
    OMP,
    Coding,
    SharedMetrics,
    Start,
    Threshold,
    Update,
    learn_dictionary,
    learn_shared_dictionary,
    refit_shared_dictionary,
    shared_metrics,
)
from lexigram.linalg.selection import keep_largest
from lexigram.linalg.shared_update import shared_mod, shared_mod_exact
from lexigram.linalg.whitening import Whitening, whiten


def whitenings(size: int, members: int, decay: float = 3.0, seed: int = 0) -> list[Whitening]:
    """Metrics with the same spectrum along different directions."""
    spectrum = torch.logspace(0, -decay, size, dtype=torch.float64)
    rotations = [
        torch.linalg.qr(torch.randn(size, size, generator=generator(100 + 10 * seed + member), dtype=torch.float64))[0]
        for member in range(members)
    ]
    return [whiten((each * spectrum) @ each.T) for each in rotations]


def weights(rows: int, size: int, members: int, seed: int = 0) -> list[Tensor]:
    mixing = torch.randn(size, size, generator=generator(seed)) * torch.logspace(0, -1, size)
    return [torch.randn(rows, size, generator=generator(seed + 1 + member)) @ mixing for member in range(members)]


def sparse(rows: int, atoms: int, nonzeros: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = generator(seed)
    values = torch.randn(rows, atoms, generator=g, dtype=dtype)
    return values * keep_largest(torch.rand(rows, atoms, generator=g), nonzeros)


def total(rows: list[Tensor], metrics: list[Whitening], dictionary: Tensor, codes: tuple[Tensor, ...]) -> float:
    """The error of a group in the members' own metrics, in float64, from the weights."""
    return sum(
        float(((each.double() - code.double() @ dictionary.double()) @ metric.factor.T).square().sum())
        for each, metric, code in zip(rows, metrics, codes, strict=True)
    )


def update_problem(
    members: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], Tensor, SharedMetrics]:
    """Codes, residuals, dictionary and metrics in common coordinates."""
    metrics = shared_metrics([each.factor for each in whitenings(7, members, seed=seed)])
    codes = [sparse(15 + member, 5, 3, seed + member) for member in range(members)]
    residuals = [torch.randn(len(each), 7, generator=generator(seed + 50), dtype=torch.float64) for each in codes]
    dictionary = torch.randn(5, 7, generator=generator(seed + 60), dtype=torch.float64)
    return [c.to(dtype) for c in codes], [r.to(dtype) for r in residuals], dictionary.to(dtype), metrics.to(dtype)


def dense_solution(codes: list[Tensor], residuals: list[Tensor], dictionary: Tensor, metrics: SharedMetrics) -> Tensor:
    """The same least squares as one matrix for the change of all entries of the dictionary."""
    size = dictionary.shape[1]
    maps = metrics.seen(torch.eye(size, dtype=dictionary.dtype))
    system = torch.cat([torch.kron(code, each.T.contiguous()) for code, each in zip(codes, maps, strict=True)])
    right = torch.cat([each.flatten() for each in residuals])
    change = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution
    return dictionary + change.reshape(dictionary.shape)


def error(codes: list[Tensor], residuals: list[Tensor], change: Tensor, metrics: SharedMetrics) -> float:
    parts = zip(residuals, codes, metrics.seen(change), strict=True)
    return sum(float((residual - code @ atoms).double().square().sum()) for residual, code, atoms in parts)


@pytest.mark.parametrize("members", [1, 2, 3, 4])
@pytest.mark.parametrize("decay", [1.0, 9.0])
def test_common_coordinates_keep_every_error(members: int, decay: float) -> None:
    metrics = whitenings(12, members, decay)
    common = shared_metrics([each.factor for each in metrics])
    dictionary = torch.randn(5, 12, generator=generator(1), dtype=torch.float64)
    entered = common.enter(dictionary)
    torch.testing.assert_close(common.leave(entered), dictionary, rtol=1e-6, atol=1e-6)
    seen = common.seen(entered)
    for member, (metric, frame) in enumerate(zip(metrics, common.frames, strict=True)):
        identity = torch.eye(12, dtype=torch.float64)
        torch.testing.assert_close(frame.T @ frame, identity)
        torch.testing.assert_close(seen[member] @ frame.T, dictionary @ metric.factor.T)
        torch.testing.assert_close(common.weighted(member, entered), common.correlated(member, seen[member]))
        back = common.brought_back(member, seen[member])
        torch.testing.assert_close(common.seen(back)[member], seen[member], rtol=1e-3, atol=1e-3)
    mean = sum(common.weighted(member, entered) for member in range(members)) / members
    torch.testing.assert_close(mean, entered)
    square = sum(each.square().sum(1) for each in seen) / members
    torch.testing.assert_close(square, entered.square().sum(1))


@pytest.mark.parametrize("decay", [1.0, 4.0])
def test_exact_pair_update_is_the_dense_solution(decay: float) -> None:
    codes, residuals, dictionary, _ = update_problem(2)
    metrics = shared_metrics([each.factor for each in whitenings(7, 2, decay)])
    found, ridge = shared_mod_exact(codes, dictionary, residuals, metrics)
    assert ridge == 0.0
    torch.testing.assert_close(found, dense_solution(codes, residuals, dictionary, metrics), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_conjugate_gradients_reach_the_dense_solution(members: int) -> None:
    codes, residuals, dictionary, metrics = update_problem(members)
    expected = dense_solution(codes, residuals, dictionary, metrics)
    found = shared_mod(codes, dictionary, residuals, metrics, tolerance=1e-12, max_steps=200)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    least = error(codes, residuals, expected - dictionary, metrics)
    few = shared_mod(codes, dictionary, residuals, metrics, tolerance=0.1, max_steps=50)
    gained, best = (
        error(codes, residuals, torch.zeros_like(dictionary), metrics) - each
        for each in (error(codes, residuals, few - dictionary, metrics), least)
    )
    assert gained > 0.95 * best


def test_preconditioner_is_the_solution_where_all_grams_agree() -> None:
    codes, residuals, dictionary, _ = update_problem(3)
    metrics = shared_metrics([whitenings(7, 1)[0].factor] * 3)
    found = shared_mod(codes, dictionary, residuals, metrics, max_steps=1)
    torch.testing.assert_close(found, dense_solution(codes, residuals, dictionary, metrics))


@settings(max_examples=60, deadline=None)
@given(
    members=st.integers(2, 4),
    seed=st.integers(0, 1000),
    unused=st.sets(st.integers(0, 4), max_size=4),
    alone=st.sets(st.integers(0, 4), max_size=4),
    copied=st.booleans(),
    decay=st.floats(0, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    steps=st.integers(1, 8),
)
def test_updates_never_raise_the_error(
    members: int,
    seed: int,
    unused: set[int],
    alone: set[int],
    copied: bool,
    decay: float,
    dtype: torch.dtype,
    steps: int,
) -> None:
    codes, residuals, dictionary, _ = update_problem(members, dtype, seed)
    metrics = shared_metrics([each.factor for each in whitenings(7, members, decay, seed)]).to(dtype)
    for each in codes:
        if copied:
            each[:, 4] = 2 * each[:, 0]
        each[:, list(unused)] = 0
    codes[0][:, list(alone)] = 0
    before = error(codes, residuals, torch.zeros_like(dictionary), metrics)
    updates = [shared_mod(codes, dictionary, residuals, metrics, max_steps=steps)]
    if members == 2:
        updates.append(shared_mod_exact(codes, dictionary, residuals, metrics)[0])
    for found in updates:
        assert error(codes, residuals, found - dictionary, metrics) <= before * (1 + 1e-5)
        torch.testing.assert_close(found[list(unused)], dictionary[list(unused)])


def test_exact_pair_update_reports_its_ridge_and_loses_little_by_it() -> None:
    codes, residuals, dictionary, metrics = update_problem(2, torch.float32)
    for each in codes:
        each[:, 4] = 2 * each[:, 0]
    found, ridge = shared_mod_exact(codes, dictionary, residuals, metrics)
    assert 0 < ridge <= 1e-2
    before, least, after = (
        error(codes, residuals, each - dictionary, metrics)
        for each in (dictionary, dense_solution(codes, residuals, dictionary, metrics), found)
    )
    assert after <= least + 0.01 * (before - least)


@pytest.mark.parametrize("members", [1, 2, 3])
def test_refit_is_the_least_squares_of_the_original_problem(members: int) -> None:
    metrics, rows = whitenings(7, members), weights(15, 7, members)
    codes = [sparse(15, 5, 3, seed, torch.float32) for seed in range(members)]
    signals = [metric.whiten(each) for metric, each in zip(metrics, rows, strict=True)]
    start = torch.randn(5, 7, generator=generator(4))
    common = shared_metrics([each.factor for each in metrics])
    found, ridge = refit_shared_dictionary(signals, codes, start, common)
    system = torch.cat([torch.kron(code.double(), each.factor) for code, each in zip(codes, metrics, strict=True)])
    right = torch.cat([each.double().flatten() for each in signals])
    best = torch.linalg.lstsq(system, right[:, None]).solution.reshape(5, 7)
    assert ridge == 0.0
    least = total(rows, metrics, best, tuple(codes))
    assert total(rows, metrics, found, tuple(codes)) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("members", [2, 3])
def test_equal_metrics_are_the_single_problem_of_all_rows(members: int) -> None:
    metric = whitenings(24, 1)[0]
    signals = [metric.whiten(each) for each in weights(40, 24, members)]
    single = learn_dictionary(torch.cat(signals), 18, 5, iterations=30, coding=OMP(), tolerance=0.0)
    shared = learn_shared_dictionary(
        signals, shared_metrics([metric.factor] * members), 18, 5, iterations=30, coding=OMP(), tolerance=0.0
    )
    assert shared.objective[0] == pytest.approx(single.objective[0], rel=1e-2)
    assert shared.objective[-1] == pytest.approx(single.objective[-1], rel=5e-2)


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_own_metrics_beat_the_mean_gram(members: int, seed: int) -> None:
    metrics, rows = whitenings(32, members, seed=seed), weights(48, 32, members, seed)
    mean = whiten(torch.stack([each.factor.T @ each.factor for each in metrics]).mean(0))
    pooled = learn_dictionary(mean.whiten(torch.cat(rows)), 24, 8, accelerate=True, tolerance=0.0)
    shared = learn_shared_dictionary(
        [metric.whiten(each) for metric, each in zip(metrics, rows, strict=True)],
        shared_metrics([each.factor for each in metrics]),
        24,
        8,
        accelerate=True,
        tolerance=0.0,
    )
    by_mean = total(rows, metrics, mean.unwhiten(pooled.dictionary), pooled.codes.split(48))
    assert total(rows, metrics, shared.dictionary, shared.codes) < by_mean


UPDATES: list[Update] = [MOD(), MOD(exact=True), MOD(cg_steps=1)]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("coding", [HTP(), HTP(2, 4), OMP()])
@pytest.mark.parametrize("start", ["columns", "svd"])
@pytest.mark.parametrize("shape", [(2, 30, 20, 12), (3, 30, 20, 12), (2, 8, 24, 10), (2, 9, 6, 14)])
def test_every_combination_descends_and_reports_the_true_error(
    update: Update, coding: Coding, start: Start, shape: tuple[int, int, int, int]
) -> None:
    members, n, size, atoms = shape
    metrics, rows = whitenings(size, members), weights(n, size, members)
    signals = [metric.whiten(each) for metric, each in zip(metrics, rows, strict=True)]
    result = learn_shared_dictionary(
        signals,
        shared_metrics([each.factor for each in metrics]),
        atoms,
        4,
        coding=coding,
        update=update,
        start=start,
        accelerate=True,
        iterations=6,
        tolerance=0.0,
        generator=generator(3),
    )
    assert all(after <= before for before, after in pairwise(result.objective))
    assert result.objective[-1] < 0.5 * sum(float(each.square().sum()) for each in signals)
    assert all(((each != 0).sum(1) <= 4).all() and each.shape == (n, atoms) for each in result.codes)
    assert total(rows, metrics, result.dictionary, result.codes) == pytest.approx(result.objective[-1], rel=1e-3)
    norms = torch.stack([(result.dictionary.double() @ each.factor.T).square().sum(1) for each in metrics]).mean(0)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-4, atol=1e-4)


def test_planted_dictionary_is_recovered() -> None:
    truth = torch.randn(16, 16, generator=generator(1), dtype=torch.float64)
    metrics = whitenings(16, 2, decay=0.7)
    rows = [sparse(800, 16, 3, seed) @ truth for seed in range(2)]
    result = learn_shared_dictionary(
        [metric.whiten(each).float() for metric, each in zip(metrics, rows, strict=True)],
        shared_metrics([each.factor for each in metrics]),
        16,
        3,
        coding=OMP(),
        start="columns",
        iterations=60,
        tolerance=0.0,
        generator=generator(2),
    )
    unit = torch.nn.functional.normalize
    likeness = (unit(truth) @ unit(result.dictionary.double()).T).abs().amax(1)
    assert (likeness > 0.95).sum() >= 13  # alternation may leave a few atoms merged


def test_same_seed_same_bits_and_dtype_is_kept() -> None:
    metrics, rows = whitenings(16, 2), weights(30, 16, 2)
    signals = [metric.whiten(each).bfloat16() for metric, each in zip(metrics, rows, strict=True)]
    common = shared_metrics([each.factor for each in metrics])
    first, second, other = (
        learn_shared_dictionary(signals, common, 10, 4, start="columns", accelerate=True, generator=generator(seed))
        for seed in (42, 42, 43)
    )
    assert all(map(torch.equal, first.codes, second.codes))
    assert torch.equal(first.dictionary, second.dictionary)
    assert first.objective == second.objective
    assert not torch.equal(first.dictionary, other.dictionary)
    assert first.dictionary.dtype == first.codes[0].dtype == torch.bfloat16


def test_atoms_that_no_member_uses_become_the_worst_rows() -> None:
    metrics = whitenings(6, 2)
    rows = [torch.zeros(33, 6), torch.zeros(5, 6)]
    rows[0][:, 0] = torch.arange(1, 12).repeat(3)
    rows[1][:, 1:] = 1.0
    signals = [metric.whiten(each) for metric, each in zip(metrics, rows, strict=True)]
    result = learn_shared_dictionary(
        signals,
        shared_metrics([each.factor for each in metrics]),
        2,
        1,
        coding=OMP(),
        start="columns",
        iterations=8,
        generator=generator(0),
    )
    assert result.replaced >= 1
    assert result.objective[-1] < 1e-5 * sum(float(each.square().sum()) for each in signals)


def test_zero_members_fit_exactly() -> None:
    common = shared_metrics([each.factor for each in whitenings(9, 2)])
    result = learn_shared_dictionary([torch.zeros(4, 9)] * 2, common, 6, 2, generator=generator())
    assert result.stop == "exact"
    assert all((each == 0).all() for each in result.codes)
    assert torch.isfinite(result.dictionary).all()


def test_refusals() -> None:
    factors = [each.factor for each in whitenings(9, 2)]
    common, signals = shared_metrics(factors), [torch.ones(4, 9)] * 2
    with pytest.raises(ValueError, match="KSVD is defined for one metric and this group has 2"):
        learn_shared_dictionary(signals, common, 4, 2, update=KSVD())
    with pytest.raises(ValueError, match="Threshold is defined for one metric"):
        learn_shared_dictionary(signals, common, 4, 2, coding=Threshold())
    with pytest.raises(ValueError, match="1 members but 2 metrics"):
        learn_shared_dictionary(signals[:1], common, 4, 2)
    with pytest.raises(ValueError, match="one member shares nothing"):
        learn_shared_dictionary(signals[:1], shared_metrics(factors[:1]), 4, 2)
    with pytest.raises(ValueError, match="signals of width 8 in metrics of width 9"):
        learn_shared_dictionary([torch.ones(4, 8)] * 2, common, 4, 2)
    with pytest.raises(ValueError, match="not finite"):
        learn_shared_dictionary([torch.full((4, 9), float("nan"))] * 2, common, 4, 2)
    with pytest.raises(ValueError, match="two metrics"):
        shared_mod_exact(*(update_problem(3)[index] for index in (0, 2, 1, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one member"):
        shared_metrics([])
    with pytest.raises(ValueError, match="one size"):
        shared_metrics([factors[0], factors[1][:8, :8]])
    with pytest.raises(ValueError, match="without weight"):
        shared_metrics([torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 1.0, 0.0]))])
    with pytest.raises(ValueError, match="not finite"):
        shared_metrics([torch.full((3, 3), float("inf"))])
