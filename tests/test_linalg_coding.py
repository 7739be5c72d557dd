"""Selection, orthogonal matching pursuit, hard thresholding pursuit: against sorting, scikit-learn, brute force."""

from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp_gram
from torch import Tensor

from drawn import generator
from lexigram.linalg.dictionary_learning import HTP, _better_rows
from lexigram.linalg.htp import htp
from lexigram.linalg.omp import omp
from lexigram.linalg.selection import keep_largest


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def problem(n: int = 40, k: int = 30, d: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = generator(7)
    return torch.randn(n, d, generator=g, dtype=dtype), unit(torch.randn(k, d, generator=g, dtype=dtype))


def errors(y: Tensor, d: Tensor, codes: Tensor) -> Tensor:
    return (y - codes @ d).double().square().sum(1)


VALUES = {
    "normal": torch.randn(300, 57, generator=generator()),
    "heavy tails": torch.randn(300, 57, generator=generator()) ** 5,
    "ties": torch.randint(0, 4, (300, 57), generator=generator()).float(),
    "constant": torch.ones(20, 57),
    "zeros": torch.zeros(20, 57),
    "one spike": torch.eye(57) * 1e30,
    "negative": -torch.rand(50, 57, generator=generator()) * 1e-20,
    "rounding apart": torch.nextafter(torch.ones(20, 57), torch.randn(20, 57, generator=generator()) * 9),
    "no rows": torch.zeros(0, 57),
}


def pursued(gram: torch.Tensor, correlation: torch.Tensor, sparsity: int, **options: int) -> torch.Tensor:
    """Hard thresholding pursuit from nothing."""
    return htp(gram, correlation, torch.zeros_like(correlation), sparsity, **options)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("count", [0, 1, 28, 56, 57])
def test_keep_largest_is_a_stable_sort(kind: str, count: int) -> None:
    values = VALUES[kind]
    order = values.argsort(dim=1, descending=True, stable=True)[:, :count]
    expected = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(keep_largest(values, count), expected)


def test_keep_largest_counts_beyond_what_float32_does() -> None:
    values = torch.rand(1, 2**24 + 5000, generator=torch.Generator().manual_seed(0))
    assert int(keep_largest(values, 2**24 + 3).count_nonzero()) == 2**24 + 3


def test_keep_largest_refuses_a_count_out_of_range() -> None:
    with pytest.raises(ValueError, match="between 0 and 57"):
        keep_largest(VALUES["normal"], 58)


@pytest.mark.parametrize("sparsity", [1, 4, 15, 30])
def test_omp_equals_scikit_learn(sparsity: int) -> None:
    y, d = problem(dtype=torch.float64)
    gram, correlation = d @ d.T, y @ d.T
    ours = omp(gram, correlation, sparsity)
    theirs = orthogonal_mp_gram(gram.numpy(), correlation.T.numpy(), n_nonzero_coefs=sparsity).T
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-9)
    assert ((ours != 0).sum(1) == sparsity).all()
    single = omp(gram.float(), correlation.float(), sparsity, batch=7)
    torch.testing.assert_close(errors(y, d, single.double()), errors(y, d, ours), rtol=1e-2, atol=1e-6)


def test_omp_does_not_mind_the_lengths_of_atoms() -> None:
    y, d = problem(dtype=torch.float64)
    lengths = torch.logspace(-3, 3, 30, dtype=torch.float64)[:, None]
    plain, scaled = omp(d @ d.T, y @ d.T, 5), omp((d * lengths) @ (d * lengths).T, y @ (d * lengths).T, 5)
    torch.testing.assert_close(scaled * lengths.T, plain)


def test_both_find_the_best_support_of_an_orthonormal_dictionary() -> None:
    d = torch.linalg.qr(torch.randn(6, 6, generator=generator(1)))[0]
    y = torch.randn(9, 6, generator=generator(2))
    gram, correlation = d @ d.T, y @ d.T
    best = torch.full((9,), float("inf"), dtype=torch.float64)
    for chosen in combinations(range(6), 3):
        part = d[list(chosen)]
        best = torch.minimum(best, errors(y, part, torch.linalg.lstsq(part.T, y.T).solution.T))
    thresholded = correlation * keep_largest(correlation.abs(), 3)
    for codes in (omp(gram, correlation, 3), pursued(gram, correlation, 3)):
        torch.testing.assert_close(errors(y, d, codes), best, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(codes, thresholded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coder", [omp, lambda g, c, s: pursued(g, c, s, rounds=30, cg_steps=8)])
def test_planted_codes_are_recovered(coder: object) -> None:
    g = generator(3)
    d = unit(torch.randn(40, 120, generator=g))
    support = keep_largest(torch.rand(25, 40, generator=g), 4)
    codes = (torch.randn(25, 40, generator=g).sign() * (1 + torch.rand(25, 40, generator=g))) * support
    found = coder(d @ d.T, codes @ d @ d.T, 4)  # type: ignore[operator]
    torch.testing.assert_close(found, codes, rtol=1e-3, atol=1e-3)


def test_degenerate_dictionaries_and_signals() -> None:
    y, d = problem()
    d = torch.cat([d, d[:5], d[:5], torch.zeros(3, 50)])
    y = torch.cat([y, torch.zeros(2, 50), d[:2] * 3])
    codes = omp(d @ d.T, y @ d.T, 45)
    assert torch.isfinite(codes).all()
    assert (codes[:, -3:] == 0).all()
    assert (codes[40:42] == 0).all()
    assert ((codes != 0).sum(1) <= 45).all()
    assert (errors(y, d, codes) <= y.double().square().sum(1) * (1 + 1e-6)).all()
    exact = omp(d @ d.T, y @ d.T, 1)
    assert errors(y, d, exact)[42:].max() < 1e-8


def test_htp_stays_finite_with_repeated_and_zero_atoms() -> None:
    y, d = problem()
    d = torch.cat([d, d[:5], d[:5], torch.zeros(3, 50)])
    y = torch.cat([y, torch.zeros(2, 50)])
    codes = pursued(d @ d.T, y @ d.T, 20, rounds=3)
    assert torch.isfinite(codes).all()
    assert (codes[40:] == 0).all()
    assert ((codes != 0).sum(1) <= 20).all()


@pytest.mark.parametrize(("rounds", "cg_steps"), [(1, 0), (1, 2), (3, 1), (5, 6)])
@pytest.mark.parametrize("step", [0.5, 1.0, 3.0])
def test_htp_in_learning_is_never_worse_than_its_warm_start(rounds: int, cg_steps: int, step: float) -> None:
    """On coherent atoms a round can fail; the learner then keeps the row as it was."""
    g = generator(4)
    y, d = torch.randn(60, 20, generator=g), unit(torch.randn(30, 20, generator=g) + 1.0)
    warm = omp(d @ d.T, y @ d.T, 8)
    warm = torch.where(torch.rand(60, 1, generator=g) < 0.5, warm, torch.zeros(()))
    residual = y - warm @ d
    found = HTP(rounds, cg_steps)(y, d, warm, residual, 8, step)
    codes, left, _ = _better_rows(y, d, warm, residual, found)
    assert ((codes != 0).sum(1) <= 8).all()
    assert (errors(y, d, codes) <= errors(y, d, warm) * (1 + 1e-5) + 1e-6).all()
    torch.testing.assert_close(left, y - codes @ d, rtol=1e-4, atol=1e-4)


def test_htp_is_least_squares_on_its_support_given_enough_steps() -> None:
    y, d = problem(dtype=torch.float64)
    codes = pursued(d @ d.T, y @ d.T, 7, rounds=1, cg_steps=20)
    for row, signal in zip(codes, y, strict=True):
        on = row.nonzero().squeeze(1)
        assert len(on) == 7
        torch.testing.assert_close(row[on], torch.linalg.lstsq(d[on].T, signal[:, None]).solution.squeeze(1))
