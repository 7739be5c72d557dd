"""Whitening and truncated SVD: exact factors of every Gram a calibration can produce."""

import pytest
import torch

from lexigram.linalg.svd import truncated_svd
from lexigram.linalg.whitening import whiten


def inputs(kind: str) -> torch.Tensor:
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x * torch.logspace(0, 2, 24, dtype=torch.float64)
    if kind == "few tokens":
        x = x[:7]
    elif kind == "one token":
        x = x[:1]
    elif kind == "dead channels":
        x[:, [0, 5, 23]] = 0
    elif kind == "constant channel":
        x[:, 3] = 4.0
    elif kind == "duplicate channels":
        x[:, 7] = x[:, 2]
        x[:, 8] = -x[:, 2]
    elif kind == "zero":
        x = x * 0
    elif kind == "outlier channel":
        x[:, 4] *= 3e3
    elif kind == "tiny":
        x = x * 1e-12
    return x


RANKS = {
    "full": 24,
    "few tokens": 7,
    "one token": 1,
    "dead channels": 21,
    "constant channel": 24,
    "duplicate channels": 22,
    "zero": 0,
    "outlier channel": 24,
    "tiny": 24,
}


@pytest.mark.parametrize("kind", RANKS)
def test_factor_and_inverse(kind: str) -> None:
    x = inputs(kind)
    gram = x.T @ x
    w = whiten(gram)
    target = gram + w.damping * torch.eye(24, dtype=torch.float64)
    assert w.rank == RANKS[kind]
    assert (w.damping == 0.0) == (w.rank == 24)
    torch.testing.assert_close(w.factor.T @ w.factor, target, rtol=0, atol=1e-12 * float(target.abs().max()))
    torch.testing.assert_close(w.factor @ w.inverse, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-8)
    rows = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    back = w.unwhiten(w.whiten(rows))
    assert back.dtype == rows.dtype
    torch.testing.assert_close(back, rows, rtol=0, atol=2e-2)  # float32 between the two, see DAMPING


@pytest.mark.parametrize("kind", RANKS)
def test_whitened_error_is_output_error(kind: str) -> None:
    x = inputs(kind)
    w = whiten(x.T @ x)
    change = torch.randn(6, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    direct = (x @ change.T).square().sum() + w.damping * change.square().sum()
    torch.testing.assert_close(w.whiten(change).square().sum(), direct, rtol=1e-9, atol=0)


def test_rounding_below_zero_is_no_failure() -> None:
    x = inputs("few tokens")
    gram = x.T @ x
    noise = torch.randn(24, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gram = gram + (noise + noise.T) * 1e-14 * gram.trace()
    assert torch.linalg.eigvalsh(gram).min() < 0
    assert whiten(gram).rank == 7


def test_nearly_singular_gram_is_not_passed_as_full_rank() -> None:
    q = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    gram = (q * torch.logspace(0, -13, 24, dtype=torch.float64)) @ q.T
    w = whiten((gram + gram.T) / 2)
    assert 0 < w.rank < 24
    assert w.damping > 0


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.ones(3, 4), "square"),
        (torch.zeros(0, 0), "square"),
        (torch.full((3, 3), float("nan")), "not finite"),
        (torch.diag(torch.tensor([1.0, float("inf")])), "not finite"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "not symmetric"),
        (torch.diag(torch.tensor([1.0, -1.0])), "negative diagonal"),
    ],
)
def test_refusals(gram: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whiten(gram)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (9, 9)])
@pytest.mark.parametrize("rank", [1, 5, 9])
def test_truncated_svd_is_the_best(shape: tuple[int, int], rank: int) -> None:
    y = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    left, right = truncated_svd(y, rank)
    best = torch.linalg.svdvals(y.double())[rank:].square().sum().sqrt()
    torch.testing.assert_close((y - left @ right).double().norm(), best, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(right @ right.T, torch.eye(rank), rtol=0, atol=1e-5)


def test_truncated_svd_of_low_rank_and_bad_rank() -> None:
    y = torch.ones(4, 20)
    left, right = truncated_svd(y, 3)
    torch.testing.assert_close(left @ right, y)
    torch.testing.assert_close(right @ right.T, torch.eye(3), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="between 1 and 4"):
        truncated_svd(y, 5)
