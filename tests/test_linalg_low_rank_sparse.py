"""Low rank plus sparse: against numpy's SVD and least squares, a plain OATS, and brute force."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lexigram.linalg import low_rank_sparse as module
from lexigram.linalg.low_rank_sparse import LowRankSparse, low_rank_sparse, oats

F64 = torch.float64


def problem(out: int = 24, inner: int = 36, tokens: int = 200, dead: bool = False) -> tuple[Tensor, Tensor]:
    """A weight and the Gram of correlated inputs of unequal energy."""
    g = torch.Generator().manual_seed(11)
    x = torch.randn(tokens, inner, generator=g, dtype=F64) @ torch.randn(inner, inner, generator=g, dtype=F64)
    x = x * torch.logspace(0, 1.5, inner, dtype=F64) + 2.0
    if dead:
        x[:, [0, 5]] = 0.0
    return torch.randn(out, inner, generator=g, dtype=F64), x.T @ x


def error(weight: Tensor, gram: Tensor, found: LowRankSparse) -> float:
    left = (weight - found.left @ found.right - found.sparse).double()
    return float(((left @ gram) * left).sum())


def best_low_rank(weight: Tensor, gram: Tensor, rank: int) -> float:
    values, vectors = np.linalg.eigh(gram.numpy())
    root = vectors * np.sqrt(np.maximum(values, 0))
    return float((np.linalg.svd(weight.numpy() @ root, compute_uv=False)[rank:] ** 2).sum())


def falls(history: tuple[float, ...], start: float) -> bool:
    return all(after <= before + 1e-11 * start for before, after in pairwise(history))


GRAMS = {"full": {}, "few tokens": {"tokens": 20}, "dead inputs": {"dead": True}}


@pytest.mark.parametrize("kind", GRAMS)
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize(("rank", "entries"), [(3, 240), (0, 240), (5, 24), (24, 24), (1, 24 * 36)])
def test_error_never_rises_and_is_what_the_history_says(kind: str, by_row: bool, rank: int, entries: int) -> None:
    weight, gram = problem(**GRAMS[kind])
    found = low_rank_sparse(weight, gram, rank, entries, by_row=by_row)
    start = float(((weight @ gram) * weight).sum())
    assert found.start == pytest.approx(start, rel=1e-9)
    assert falls(found.history, start)
    assert error(weight, gram, found) == pytest.approx(found.history[-1], rel=1e-6, abs=1e-10 * start)
    _has_its_sizes(found, rank, entries, by_row)
    energies = gram.diagonal()
    plain = oats(weight, energies, rank, entries, by_row=by_row)
    assert falls(plain.history, plain.start)
    assert error(weight, energies.diag(), plain) == pytest.approx(plain.history[-1], rel=1e-6, abs=1e-10 * start)
    _has_its_sizes(plain, rank, entries, by_row)
    assert error(weight, gram, found) <= error(weight, gram, plain) + 1e-9 * start


def _has_its_sizes(found: LowRankSparse, rank: int, entries: int, by_row: bool) -> None:
    assert found.left.shape == (24, rank)
    assert found.right.shape == (rank, 36)
    assert int(found.support.sum()) == entries
    if by_row:
        assert bool((found.support.sum(1) == entries // 24).all())
    assert not found.sparse[~found.support].any()


@pytest.mark.parametrize("shape", [(24, 36), (36, 24)])
@pytest.mark.parametrize("rank", [1, 7, 24])
@pytest.mark.parametrize("kind", GRAMS)
def test_without_entries_it_is_the_truncated_svd_in_the_metric(shape: tuple[int, int], rank: int, kind: str) -> None:
    weight, gram = problem(*shape, **GRAMS[kind])
    found = low_rank_sparse(weight, gram, rank, 0)
    assert not found.sparse.any()
    assert error(weight, gram, found) == pytest.approx(
        best_low_rank(weight, gram, rank), rel=1e-6, abs=1e-9 * found.start
    )
    energies = gram.diagonal()
    plain = oats(weight, energies, rank, 0)
    assert error(weight, energies.diag(), plain) == pytest.approx(
        best_low_rank(weight, energies.diag(), rank), rel=1e-6, abs=1e-9 * found.start
    )


def test_without_rank_oats_is_wanda() -> None:
    weight, gram = problem()
    found = oats(weight, gram.diagonal(), 0, 24 * 9)
    scores = weight.abs() * gram.diagonal().sqrt()
    border = scores.sort(dim=1, descending=True).values[:, 8:9]
    assert torch.equal(found.support, scores >= border)
    torch.testing.assert_close(found.sparse, weight * found.support)


def test_without_rank_it_is_regression_on_the_support() -> None:
    weight, gram = problem()
    found = low_rank_sparse(weight, gram, 0, 24 * 9, refits=10)
    lower = np.linalg.cholesky(gram.numpy())
    best = 0.0
    for row, support in zip(weight.numpy(), found.support.numpy(), strict=True):
        columns = lower.T[:, support]
        fitted = columns @ np.linalg.lstsq(columns, lower.T @ row, rcond=None)[0]
        best += float(((lower.T @ row - fitted) ** 2).sum())
    assert found.history[-1] == pytest.approx(best, rel=1e-6)


def test_sparse_regression_comes_near_the_best_support() -> None:
    weight, gram = problem(out=30, inner=9)
    found = low_rank_sparse(weight, gram, 0, 30 * 4)
    lower = np.linalg.cholesky(gram.numpy())
    best = 0.0
    for row in weight.numpy():
        target = lower.T @ row
        best += min(
            float(((target - lower.T[:, c] @ np.linalg.lstsq(lower.T[:, c], target, rcond=None)[0]) ** 2).sum())
            for c in combinations(range(9), 4)
        )
    assert best <= found.history[-1] * (1 + 1e-9)
    assert found.history[-1] <= 1.3 * best


@pytest.mark.parametrize("by_row", [True, False])
def test_finds_what_was_planted(by_row: bool) -> None:
    g = torch.Generator().manual_seed(12)
    _, gram = problem(60, 60, tokens=400)
    gram = gram / gram.diagonal().sqrt() / gram.diagonal().sqrt()[:, None] + 3 * torch.eye(60, dtype=F64)
    low = torch.randn(60, 3, generator=g, dtype=F64) @ torch.randn(3, 60, generator=g, dtype=F64)
    spots = torch.rand(60, 60, generator=g).argsort(dim=1) < 4
    weight = low + 5 * torch.randn(60, 60, generator=g, dtype=F64) * spots
    found = low_rank_sparse(weight, gram, 3, 240, by_row=by_row)
    assert error(weight, gram, found) < 1e-3 * found.start


def test_oats_is_as_good_as_exact_svds() -> None:
    weight, gram = problem(40, 60)
    scale = gram.diagonal().sqrt()
    target = (weight * scale).numpy()
    sparse = np.zeros_like(target)
    for _ in range(80):
        left, values, right = np.linalg.svd(target - sparse, full_matrices=False)
        rest = target - (left[:, :5] * values[:5]) @ right[:5]
        keep = np.argsort(-np.abs(rest), axis=1)[:, :15]
        sparse = np.zeros_like(target)
        np.put_along_axis(sparse, keep, np.take_along_axis(rest, keep, 1), 1)
    exact = float(((rest - sparse) ** 2).sum())
    found = oats(weight, gram.diagonal(), 5, 40 * 15)
    assert len(found.history) == 80
    assert found.history[-1] == pytest.approx(exact, rel=0.02)


def test_a_start_that_diverges_is_done_again_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem()
    monkeypatch.setattr(module, "STRETCH", 0.0)
    plain = low_rank_sparse(weight, gram, 3, 240)
    monkeypatch.setattr(module, "STRETCH", 3.0)
    assert low_rank_sparse(weight, gram, 3, 240).history == plain.history


def test_sparse_and_low_rank_together_beat_either_alone() -> None:
    g = torch.Generator().manual_seed(13)
    _, gram = problem(40, 40)
    weight = torch.randn(40, 40, generator=g, dtype=F64) ** 3
    weight += 3 * torch.randn(40, 2, generator=g, dtype=F64) @ torch.randn(2, 40, generator=g, dtype=F64)
    parameters = 800
    both = low_rank_sparse(weight, gram, 2, parameters - 160)
    assert both.history[-1] < low_rank_sparse(weight, gram, 0, parameters).history[-1]
    assert both.history[-1] < low_rank_sparse(weight, gram, 10, 0).history[-1]


def test_dead_inputs_get_nothing_and_nothing_is_nothing() -> None:
    weight, gram = problem(dead=True)
    for found in (low_rank_sparse(weight, gram, 2, 240), oats(weight, gram.diagonal(), 2, 240)):
        assert not found.right[:, [0, 5]].any()
        assert not found.sparse[:, [0, 5]].any()
    nothing = low_rank_sparse(weight, gram, 0, 0)
    assert nothing.history == (nothing.start,)
    zero = low_rank_sparse(weight * 0, gram, 2, 240)
    assert zero.history[-1] == 0.0
    assert not zero.sparse.any()
    still = low_rank_sparse(weight, gram * 0, 2, 240)
    assert not still.sparse.any()
    assert not (still.left @ still.right).any()


def test_float32_is_nearly_as_good() -> None:
    weight, gram = problem()
    double = low_rank_sparse(weight, gram, 3, 240)
    single = low_rank_sparse(weight.float(), gram, 3, 240)
    assert single.sparse.dtype == single.left.dtype == torch.float32
    assert error(weight, gram, single) == pytest.approx(error(weight, gram, double), rel=0.1)
    assert error(weight, gram, single) == pytest.approx(single.history[-1], rel=1e-3)


def test_arguments_are_left_alone() -> None:
    weight, gram = problem()
    copies = weight.clone(), gram.clone()
    low_rank_sparse(weight, gram, 3, 240)
    oats(weight, gram.diagonal(), 3, 240)
    assert torch.equal(weight, copies[0])
    assert torch.equal(gram, copies[1])


@pytest.mark.parametrize(
    ("rank", "entries", "by_row", "message"),
    [
        (25, 24, True, "rank must be between 0 and 24"),
        (-1, 24, True, "rank must be"),
        (1, -24, True, "entries must be"),
        (1, 1000, False, "entries must be between 0 and 864"),
        (1, 25, True, "pass 24"),
    ],
)
def test_refusals(rank: int, entries: int, by_row: bool, message: str) -> None:
    weight, gram = problem()
    with pytest.raises(ValueError, match=message):
        low_rank_sparse(weight, gram, rank, entries, by_row=by_row)
    with pytest.raises(ValueError, match="does not fit"):
        low_rank_sparse(weight, gram[:5, :5], 1, 24)
    with pytest.raises(ValueError, match="do not fit"):
        oats(weight, gram.diagonal()[:5], 1, 24)
