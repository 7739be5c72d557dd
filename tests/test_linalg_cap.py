"""CAP's mathematics: robust PCA, the budget, the policy gradient, against numpy, scipy and enumeration."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lexigram.linalg import budget as budgets
from lexigram.linalg.budget import keep_best, project, spent
from lexigram.linalg.policy_gradient import (
    BernoulliPolicy,
    grad_log_probability,
    sample,
    started,
    update,
)
from lexigram.linalg.robust_pca import candes_penalty, penalty, robust_pca, shrink_values, soft


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(m: int, n: int, rank: int, share: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = generator(3)
    low = torch.randn(m, rank, generator=g, dtype=dtype) @ torch.randn(rank, n, generator=g, dtype=dtype)
    spots = torch.rand(m, n, generator=g) < share
    return low, torch.where(spots, 10 * torch.randn(m, n, generator=g, dtype=dtype), 0.0)


# Robust PCA


@pytest.mark.parametrize(("shape", "dtype"), [((120, 120), torch.float64), ((80, 150), torch.float32)])
@pytest.mark.parametrize("turned", [False, True])
def test_recovers_what_was_planted(shape: tuple[int, int], dtype: torch.dtype, turned: bool) -> None:
    low, sparse = planted(*shape, rank=4, share=0.05, dtype=dtype)
    low, sparse = (low.T, sparse.T) if turned else (low, sparse)
    found = robust_pca(low + sparse)
    assert found.stop == "tolerance"
    assert found.residual <= 1e-6
    assert len(found.values) == 4
    assert found.left.shape == (low.shape[0], 4)
    assert found.right.shape == (4, low.shape[1])
    assert found.sparse.dtype == dtype
    assert (found.low_rank - low).norm() < 1e-4 * low.norm()
    assert (found.sparse - sparse).norm() < 1e-4 * sparse.norm()
    assert torch.equal(found.sparse != 0, sparse != 0)
    miss = (low + sparse - found.low_rank - found.sparse).norm() / (low + sparse).norm()
    assert miss < 2e-6


def objective(matrix: Tensor, low_rank: Tensor, weight: float) -> float:
    return float(torch.linalg.svdvals(low_rank).sum() + weight * (matrix - low_rank).abs().sum())


def test_no_feasible_neighbour_is_better() -> None:
    g = generator(1)
    matrix = torch.randn(30, 45, generator=g, dtype=torch.float64)  # neither low rank nor sparse
    found = robust_pca(matrix, iterations=3000, tolerance=1e-10)
    assert found.stop == "tolerance"
    weight = 45**-0.5
    here = objective(matrix, found.low_rank, weight)
    for step in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            change = torch.randn(30, 1, generator=g, dtype=torch.float64) @ torch.randn(
                1, 45, generator=g, dtype=torch.float64
            )
            assert objective(matrix, found.low_rank + step * change, weight) >= here - 1e-7
        assert objective(matrix, found.low_rank * (1 + step), weight) >= here - 1e-7
        assert objective(matrix, found.low_rank + step * found.sparse, weight) >= here - 1e-7
    assert here <= objective(matrix, matrix, weight)
    assert here <= objective(matrix, matrix * 0, weight)


def test_float32_and_other_penalties_end_near_the_minimum() -> None:
    matrix = torch.randn(40, 60, generator=generator(2), dtype=torch.float64)
    best = objective(matrix, robust_pca(matrix, iterations=3000, tolerance=1e-10).low_rank, 60**-0.5)
    single = robust_pca(matrix.float())
    assert objective(matrix, single.low_rank.double(), 60**-0.5) <= best * (1 + 1e-3)
    for factor in (0.1, 10.0):
        other = robust_pca(matrix, mu=factor * penalty(matrix), iterations=1000)
        assert objective(matrix, other.low_rank, 60**-0.5) <= best * (1 + 1e-3)
        assert other.stop == "tolerance"
        assert other.iterations > single.iterations


def test_the_published_way_ends_at_the_same_minimum() -> None:
    """A penalty that stays, that of Candes et al., without relaxation."""
    matrix = torch.randn(40, 60, generator=generator(2), dtype=torch.float64)
    own = robust_pca(matrix, iterations=3000, tolerance=1e-10)
    published = robust_pca(matrix, mu=candes_penalty(matrix), growth=1, relaxation=1, iterations=3000, tolerance=1e-10)
    assert published.stop == "tolerance"
    assert (published.low_rank - own.low_rank).norm() <= 1e-5 * matrix.norm()


def test_large_values_beside_those_near_the_threshold_cost_no_digits() -> None:
    """Squares of float32 would have none left for values of a ten-thousandth of the largest."""
    values = torch.tensor([1e4, 3.0, 2.0, 1.5, 1.2, 0.8], dtype=torch.float64)
    left, right = (
        torch.linalg.qr(torch.randn(side, 6, generator=generator(11), dtype=torch.float64)).Q for side in (30, 50)
    )
    matrix = ((left * values) @ right.T).float()
    _, s, _ = shrink_values(matrix, 1.0)
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(s.numpy(), exact[exact > 1.0] - 1.0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (15, 15)])
@pytest.mark.parametrize("share", [0.0001, 0.3, 2.0])
def test_shrunk_singular_values(shape: tuple[int, int], share: float) -> None:
    matrix = torch.randn(shape, generator=generator(4))
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    threshold = share * float(values[0])
    expected = (left * np.maximum(values - threshold, 0)) @ right
    u, s, vt = shrink_values(matrix, threshold)
    np.testing.assert_allclose(((u * s) @ vt).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(s.numpy(), values[values > threshold] - threshold, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(u.T @ u, torch.eye(len(s)), rtol=0, atol=1e-4)
    torch.testing.assert_close(vt @ vt.T, torch.eye(len(s)), rtol=0, atol=1e-4)


def test_soft_threshold_is_the_minimum() -> None:
    values = torch.linspace(-3, 3, 61, dtype=torch.float64)
    grid = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    cost = 0.7 * grid.abs() + (grid - values[:, None]) ** 2 / 2
    torch.testing.assert_close(soft(values, 0.7), grid[cost.argmin(1)], rtol=0, atol=1e-4)


def test_zero_and_what_does_not_converge() -> None:
    found = robust_pca(torch.zeros(6, 4))
    assert (found.stop, found.residual, found.iterations) == ("tolerance", 0.0, 0)
    assert (found.left.shape, found.values.shape, found.right.shape) == ((6, 0), (0,), (0, 4))
    assert not found.sparse.any()
    assert not found.low_rank.any()
    cut = robust_pca(torch.randn(20, 30, generator=generator()), iterations=3)
    assert (cut.stop, cut.iterations) == ("iterations", 3)
    assert cut.residual > 1e-6


def test_penalty_is_of_the_absolute_sum() -> None:
    matrix = torch.randn(7, 9, generator=generator())
    assert candes_penalty(matrix) == pytest.approx(7 * 9 / (4 * float(matrix.abs().double().sum())))
    assert penalty(matrix) == pytest.approx(7 * 9 / (3 * float(matrix.abs().double().sum())))


@pytest.mark.parametrize(
    "wrong",
    [{"weight": 0.0}, {"mu": -1.0}, {"growth": 0.9}, {"rise": 0.5}, {"relaxation": 2.0}, {"iterations": 0}],
)
def test_robust_pca_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        robust_pca(torch.ones(3, 4), **wrong)
    with pytest.raises(ValueError, match="matrix"):
        robust_pca(torch.ones(3))


# Projection on the budget


def by_quadratic_programme(
    values: np.ndarray, costs: np.ndarray, budget: float, equal: bool, weights: np.ndarray
) -> np.ndarray:
    """Every choice of what is 0, what is 1 and what is free, solved for the free ones; the nearest that is allowed."""
    clipped = np.clip(values, 0, 1)
    if not equal and costs @ clipped <= budget:
        return clipped
    best, least = None, np.inf
    for states in product((0.0, 1.0, np.nan), repeat=len(values)):
        found = np.array(states)
        free = np.isnan(found)
        rest = budget - costs[~free] @ found[~free]
        if free.any():
            # The nearest point of a plane: along its normal, in coordinates in which the distance is Euclidean.
            along = costs[free] / weights[free]
            found[free] = values[free] + along * (rest - costs[free] @ values[free]) / (costs[free] @ along)
        elif abs(rest) > 1e-9:
            continue
        distance = (weights * (found - values) ** 2).sum()
        if distance < least and found.min() >= -1e-12 and found.max() <= 1 + 1e-12:
            best, least = found, distance
    assert best is not None
    return best


@settings(deadline=None, max_examples=80)
@given(
    values=st.lists(st.floats(-1, 2), min_size=1, max_size=6),
    data=st.data(),
    share=st.floats(0.02, 0.98),
    equal=st.booleans(),
    metric=st.sampled_from(["euclidean", "weighted"]),
)
def test_projection_is_the_quadratic_programme(
    values: list[float], data: st.DataObject, share: float, equal: bool, metric: Any
) -> None:
    costs = [data.draw(st.sampled_from([1.0, 2.0, 3.5, 9.0])) for _ in values]
    budget = share * sum(costs)
    weights = np.array(costs) if metric == "weighted" else np.ones(len(costs))
    expected = by_quadratic_programme(np.array(values), np.array(costs), budget, equal, weights)
    moved = [torch.tensor([value], dtype=torch.float64) for value in values]
    project(moved, costs, budget, metric=metric, spend_all=equal)
    np.testing.assert_allclose(torch.cat(moved).numpy(), expected, atol=2e-5)
    assert spent(moved, costs) <= budget
    if equal:
        assert spent(moved, costs) >= budget * (1 - 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("piece", [7, 2**18])
@pytest.mark.parametrize("metric", ["euclidean", "weighted"])
def test_large_projections(
    dtype: torch.dtype, share: float, piece: int, metric: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "PIECE", piece)
    g = generator(5)
    before = [(1.4 * torch.rand(shape, generator=g) - 0.2).to(dtype) for shape in ((70, 30), (300,), (0,), (5,))]
    costs = [1.0, 100.0, 4.0, 37.0]
    budget = share * sum(c * b.numel() for c, b in zip(costs, before, strict=True))
    after = [tensor.clone() for tensor in before]
    value = project(after, costs, budget, metric=metric)
    assert value >= 0
    assert spent(after, costs) <= budget
    for new, old, cost in zip(after, before, costs, strict=True):
        assert torch.equal(new, (old - value * (cost if metric == "euclidean" else 1.0)).clamp(0, 1))
    if value > 0 and dtype == torch.float32:
        assert spent(after, costs) >= budget * (1 - 1e-3)  # 2,405 candidates: one ulp of the dear ones is that much


def test_a_euclidean_projection_takes_all_that_is_dear_first() -> None:
    """Of a matrix (400, 600), 300 likely singular values beside 1e5 entries; weighted, the ranking stays."""
    before = [torch.linspace(0.7, 0.99, 300), torch.linspace(0.01, 0.6, 100_000)]
    costs, entries = [1000.0, 1.0], float(before[1].sum())
    for budget in (0.9 * spent(before, costs), 0.99 * entries):
        plain, weighted = ([tensor.clone() for tensor in before] for _ in range(2))
        project(plain, costs, budget)
        assert (before[1] - plain[1]).max() < 0.01
        assert bool(plain[0].any()) == (budget > entries)
        project(weighted, costs, budget, metric="weighted")
        assert bool((torch.cat(weighted)[torch.cat(before).argsort()].diff() >= 0).all())
        assert weighted[0].any()


def test_within_the_budget_nothing_but_the_bounds_changes() -> None:
    inside = [torch.tensor([-0.5, 0.2, 1.5])]
    assert project(inside, [2.0], 2.4 + 1e-6) == 0.0
    torch.testing.assert_close(inside[0], torch.tensor([0.0, 0.2, 1.0]))
    assert project([torch.ones(4) * 0.2], [1.0], 3.0, spend_all=True) < 0


def test_projection_refuses() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        project([torch.ones(2)], [1.0], -1.0)
    with pytest.raises(ValueError, match="cannot be spent"):
        project([torch.ones(2)], [1.0], 3.0, spend_all=True)
    with pytest.raises(ValueError, match="2 costs"):
        project([torch.ones(2)], [1.0, 1.0], 1.0)
    with pytest.raises(ValueError, match="above 0"):
        project([torch.ones(2)], [0.0], 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        project([torch.ones(4, 2).T], [1.0], 1.0)
    with pytest.raises(ValueError, match="real numbers"):
        project([torch.ones(2, dtype=torch.int64)], [1.0], 1.0)
    with pytest.raises(ValueError, match="one dtype"):
        keep_best([torch.ones(2), torch.ones(2).double()], [1.0, 1.0], 1.0)


# The best within the budget


def by_walking(scores: list[Tensor], costs: list[float], budget: float, fill: bool) -> list[list[bool]]:
    keys = [tensor.flatten().tolist() for tensor in scores]
    ranking = sorted(((-key, i, j) for i, row in enumerate(keys) for j, key in enumerate(row)))
    kept = [[False] * len(row) for row in keys]
    for _, i, j in ranking:
        if costs[i] <= budget:
            kept[i][j] = True
            budget -= costs[i]
        elif not fill:
            break
    return kept


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    levels=st.sampled_from([1, 2, 5, 1000]),
    lowest=st.sampled_from([0.0, -1.0]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    budget=st.integers(0, 120),
    fill=st.booleans(),
    piece=st.sampled_from([3, 2**18]),
    data=st.data(),
)
def test_best_within_the_budget_by_walking_down_the_ranking(
    sizes: list[int],
    levels: int,
    lowest: float,
    dtype: torch.dtype,
    budget: int,
    fill: bool,
    piece: int,
    data: st.DataObject,
) -> None:
    scores = [
        torch.tensor([lowest + data.draw(st.integers(0, levels)) / levels for _ in range(size)], dtype=dtype)
        for size in sizes
    ]
    costs = [float(data.draw(st.sampled_from([1, 2, 3, 7, 20]))) for _ in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgets, "PIECE", piece)
        kept = keep_best(scores, costs, budget, fill=fill)
    assert [mask.tolist() for mask in kept] == by_walking(scores, costs, budget, fill)
    paid = sum(cost * int(mask.sum()) for cost, mask in zip(costs, kept, strict=True))
    assert paid <= budget
    if fill:
        assert all(bool(mask.all()) or cost > budget - paid for cost, mask in zip(costs, kept, strict=True))


def test_best_of_many_with_shapes_and_infinities() -> None:
    g = generator(6)
    scores = [
        torch.randn(40, 50, generator=g),
        torch.randn(30, generator=g),
        torch.tensor([-torch.inf, torch.inf, 0.0, -0.0]),
    ]
    costs = [1.0, 90.0, 5.0]
    for budget in (0, 1, 994, 2000, 4718, 4719, 4720, 10**6):
        kept = keep_best(scores, costs, budget)
        assert [mask.shape for mask in kept] == [tensor.shape for tensor in scores]
        assert [mask.flatten().tolist() for mask in kept] == by_walking(scores, costs, budget, True)


# The policy gradient


def every_mask(count: int) -> Tensor:
    return torch.tensor(list(product([0, 1], repeat=count)), dtype=torch.bool)


def likelihood(probabilities: Tensor, masks: Tensor) -> Tensor:
    return torch.where(masks, probabilities, 1 - probabilities).prod(1)


@pytest.mark.parametrize("baseline", [0.0, 2.0, -7.5])
def test_estimator_is_the_gradient_of_the_expected_loss(baseline: float) -> None:
    g = generator(7)
    masks = every_mask(8)
    losses = torch.randn(len(masks), generator=g, dtype=torch.float64)  # any function of the mask
    probabilities = (0.1 + 0.8 * torch.rand(8, generator=g, dtype=torch.float64)).requires_grad_()
    (likelihood(probabilities, masks) @ losses).backward()
    assert probabilities.grad is not None
    fixed = probabilities.detach()
    grads = torch.stack([grad_log_probability(fixed, mask, eps=0.0) for mask in masks])
    found = (likelihood(fixed, masks) * (losses - baseline)) @ grads
    torch.testing.assert_close(found, probabilities.grad, rtol=1e-10, atol=1e-12)


def test_certain_candidates_have_no_gradient() -> None:
    certain = torch.tensor([0.0, 1.0])
    assert not grad_log_probability(certain, certain.bool()).any()


def test_update_is_the_formula() -> None:
    g = generator(8)
    start = [torch.rand(5, 3, generator=g) * 0.6 + 0.2, torch.rand(4, generator=g) * 0.6 + 0.2]
    policy = BernoulliPolicy([tensor.clone() for tensor in start], [1.0, 10.0], budget=1e9, baseline=3.0)
    masks = [sample(start, g) for _ in range(2)]
    update(policy, masks, [2.0, 3.5], rate=0.05, memory=0.8, eps=1e-8)
    delta = 0.8 * 3.0 + 0.2 * 2.75
    assert policy.baseline == pytest.approx(delta)
    for number, tensor in enumerate(start):
        s = tensor.double()
        steps = [
            (loss - delta) * (each[number].double() - s) / (s * (1 - s) + 1e-8)
            for each, loss in zip(masks, (2.0, 3.5), strict=True)
        ]
        expected = (s - 0.05 * (steps[0] + steps[1]) / 2).clamp(0, 1)
        torch.testing.assert_close(policy.probabilities[number].double(), expected, rtol=0, atol=1e-6)


def test_first_loss_is_the_first_baseline_and_the_budget_is_kept() -> None:
    policy = BernoulliPolicy([torch.full((6,), 0.5), torch.full((2,), 0.5)], [1.0, 4.0], budget=5.0)
    masks = sample(policy.probabilities, generator())
    update(policy, [masks], [2.5])
    assert policy.baseline == 2.5
    assert 5.0 * (1 - 1e-6) <= spent(policy.probabilities, policy.costs) <= 5.0
    with pytest.raises(ValueError, match="0 losses"):
        update(policy, [masks], [])
    with pytest.raises(ValueError, match="not finite"):
        update(policy, [masks], [float("nan")])


def test_finds_the_candidates_that_matter() -> None:
    """Against exhaustive choice, for an additive loss."""
    worth = [torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.05]), torch.tensor([1.5, 0.3])]
    costs = [1.0, 2.0]
    policy = BernoulliPolicy(started(worth, "uniform", value=0.5), costs, budget=5.0)
    g = generator(9)
    for _ in range(600):
        masks = [sample(policy.probabilities, g) for _ in range(2)]
        losses = [-sum(float((w * m).sum()) for w, m in zip(worth, each, strict=True)) for each in masks]
        update(policy, masks, losses, rate=0.02)
    kept = keep_best(policy.probabilities, costs, 5.0)
    assert [mask.tolist() for mask in kept] == [[True, False, True, False, True, False], [True, False]]


def test_samples_follow_the_probabilities_and_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "PIECE", 1000)
    probabilities = [torch.linspace(0, 1, 5).repeat_interleave(4000).view(5, 4000).contiguous()]
    (mask,) = sample(probabilities, generator(1))
    assert mask.dtype == torch.bool
    torch.testing.assert_close(mask.float().mean(1), torch.linspace(0, 1, 5), rtol=0, atol=0.03)
    assert not mask[0].any()
    assert mask[4].all()
    assert torch.equal(mask, sample(probabilities, generator(1))[0])
    assert not torch.equal(mask, sample(probabilities, generator(2))[0])


def test_starts() -> None:
    g = generator(10)
    scores = [
        torch.rand(30, 40, generator=g) * 1e-3 + 5.0,
        torch.rand(20, generator=g, dtype=torch.float64) * 9,
        torch.zeros(3),
    ]
    assert all(bool((each == 0.25).all()) for each in started(scores, "uniform", value=0.25))
    drawn = started(scores, "random", generator=generator(1))
    assert all(bool(((each >= 0) & (each < 1)).all()) for each in drawn)
    for each, score in zip(started(scores, "sigmoid"), scores, strict=True):
        values = score.double().numpy()
        standard = (values - values.mean()) / (values.std() or 1.0)
        np.testing.assert_allclose(each.numpy(), 1 / (1 + np.exp(-standard)), atol=1e-4)
    for each, score in zip(started(scores, "largest"), scores, strict=True):
        values = score.double().numpy()
        np.testing.assert_allclose(each.numpy(), 0.05 + 0.9 * values / (values.max() or 1.0), rtol=1e-6)
    largest = max(float(score.max()) for score in scores)
    for each, score in zip(started(scores, "largest", together=True), scores, strict=True):
        torch.testing.assert_close(each, 0.05 + 0.9 * score.float() / largest)
    joined = started([scores[0], scores[1].float()], "sigmoid", together=True)
    alone = started([torch.cat([scores[0].flatten(), scores[1].float()])], "sigmoid")
    torch.testing.assert_close(torch.cat([each.flatten() for each in joined]), alone[0])
    assert all(
        each.dtype == torch.float32 and each.shape == score.shape for each, score in zip(drawn, scores, strict=True)
    )
    with pytest.raises(ValueError, match="generator"):
        started(scores, "random")
    with pytest.raises(ValueError, match="absolute"):
        started([torch.tensor([-1.0])], "largest")
