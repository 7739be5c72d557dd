"""Dictionary updates and dictionary learning: numpy's least squares, monotone objectives, planted dictionaries."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor

from drawn import generator
from lexigram.linalg.dictionary_learning import (
    HTP,
    KSVD,
    MOD,
    OMP,
    Coding,
    Start,
    Threshold,
    Update,
    learn_dictionary,
)
from lexigram.linalg.dictionary_update import ksvd, mod
from lexigram.linalg.selection import keep_largest
from lexigram.linalg.whitening import whiten

CODINGS: list[Coding] = [OMP(), OMP(batch=5), HTP(), HTP(rounds=3, cg_steps=1)]
UPDATES: list[Update] = [MOD(), KSVD(), KSVD(power_iterations=1), KSVD(power_iterations=None)]
STARTS: list[Start] = ["columns", "svd"]


def planted(n: int, k: int, d: int, s: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    dictionary = torch.randn(k, d, generator=g)
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    codes = torch.randn(n, k, generator=g) * keep_largest(torch.rand(n, k, generator=g), s)
    return codes @ dictionary, dictionary


def coded(n: int = 50, k: int = 12, d: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    y, dictionary = planted(n, k, d, 4)
    y = y + 0.3 * torch.randn(n, d, generator=generator(9))
    codes = OMP()(y, dictionary, torch.zeros(n, k), y, 4, 1.0)
    return y, dictionary, codes


def squares(residual: Tensor) -> float:
    return float(residual.double().square().sum())


def test_mod_equals_numpy() -> None:
    y, dictionary, codes = coded()
    found, ridge = mod(codes, dictionary, y - codes @ dictionary)
    expected = np.linalg.lstsq(codes.double().numpy(), y.double().numpy(), rcond=None)[0]
    assert ridge == 0.0
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_mod_with_unused_and_dependent_atoms() -> None:
    y, dictionary, codes = coded()
    codes[:, 3] = 0
    found, ridge = mod(codes, dictionary, y - codes @ dictionary)
    assert ridge == 0.0
    assert torch.equal(found[3], dictionary[3])
    codes[:, 5] = 2 * codes[:, 6]
    before = squares(y - codes @ dictionary)
    found, ridge = mod(codes, dictionary, y - codes @ dictionary)
    assert 0 < ridge <= 1e-2
    best = np.linalg.lstsq(codes.double().numpy(), y.double().numpy(), rcond=None)[0]
    least = squares(y.double() - codes.double() @ torch.from_numpy(best))
    assert least * (1 - 1e-6) <= squares(y - codes @ found) <= least + 0.01 * (before - least)


@pytest.mark.parametrize("power_iterations", [1, 8, None])
def test_ksvd_never_raises_the_error_and_keeps_supports(power_iterations: int | None) -> None:
    y, dictionary, codes = coded()
    codes[:, 3] = 0
    before = squares(y - codes @ dictionary)
    for _ in range(4):
        new, atoms, residual = ksvd(codes, dictionary, y - codes @ dictionary, power_iterations=power_iterations)
        torch.testing.assert_close(residual, y - new @ atoms, rtol=1e-4, atol=1e-4)
        assert squares(residual) <= before * (1 + 1e-6)
        assert ((new != 0) <= (codes != 0)).all()
        assert torch.equal(atoms[3], dictionary[3])
        torch.testing.assert_close(atoms.norm(dim=1), torch.ones(12))
        codes, dictionary, before = new, atoms, squares(residual)


@pytest.mark.parametrize("users", [5, 30])
def test_exact_ksvd_of_one_atom_is_the_leading_singular_pair(users: int) -> None:
    y = torch.randn(30, 20, generator=generator(1))
    codes = torch.zeros(30, 1)
    codes[:users] = 1.0
    start = torch.nn.functional.normalize(torch.ones(1, 20))
    _, atoms, residual = ksvd(codes, start, y - codes @ start, power_iterations=None)
    values, right = torch.linalg.svd(y[:users])[1:]
    assert abs(float(atoms[0] @ right[0])) == pytest.approx(1.0, abs=1e-5)
    assert squares(residual) == pytest.approx(squares(y) - float(values[0]) ** 2, rel=1e-5)
    many = ksvd(codes, start, y - codes @ start, power_iterations=200)[2]
    assert squares(many) == pytest.approx(squares(residual), rel=1e-4)


@pytest.mark.parametrize(("coding", "update", "start"), product(CODINGS, UPDATES, STARTS))
@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("shape", [(60, 24, 30), (20, 12, 40), (10, 14, 8)])  # the last: more atoms than signals
def test_every_combination_descends(
    coding: Coding, update: Update, start: Start, accelerate: bool, shape: tuple[int, int, int]
) -> None:
    n, k, d = shape
    y = torch.randn(n, d, generator=generator(2)) * torch.logspace(0, -1, d)
    y[0] = 0
    seen: list[float] = []
    result = learn_dictionary(
        y,
        k,
        5,
        coding=coding,
        update=update,
        start=start,
        accelerate=accelerate,
        iterations=6,
        tolerance=0.0,
        generator=generator(3),
        callback=lambda _, objective: seen.append(objective),
    )
    history = result.objective
    assert list(history) == seen
    assert len(history) == result.iterations <= 6
    assert all(after <= before for before, after in pairwise(history))
    assert history[0] < squares(y)
    assert ((result.codes != 0).sum(1) <= 5).all()
    assert (result.codes[0] == 0).all()
    assert result.dictionary.shape == (k, d)
    torch.testing.assert_close(result.dictionary.norm(dim=1), torch.ones(k))
    assert squares(y - result.codes @ result.dictionary) == pytest.approx(history[-1], rel=1e-3, abs=1e-9 * squares(y))


@pytest.mark.parametrize(("coding", "update"), [(OMP(), KSVD()), (OMP(), MOD()), (HTP(rounds=4, cg_steps=3), MOD())])
def test_planted_dictionary_is_recovered(coding: Coding, update: Update) -> None:
    y, truth = planted(1500, 20, 20, 3)
    result = learn_dictionary(
        y, 20, 3, coding=coding, update=update, start="columns", iterations=60, tolerance=0.0, generator=generator(1)
    )
    likeness = (truth @ result.dictionary.T).abs().amax(1)
    assert (likeness > 0.95).sum() >= 17  # alternation may leave a few atoms merged


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(30, 12, 8), (6, 20, 5)])  # the second: fewer signals than inputs
def test_one_shot_equals_brute_force(balance: float, shape: tuple[int, int, int]) -> None:
    n, size, atoms = shape
    inputs = torch.randn(50, size, generator=generator(1), dtype=torch.float64) * torch.logspace(0, -2, size)
    metric = whiten(inputs.T @ inputs)
    y = metric.whiten(torch.randn(n, size, generator=generator(2)))
    result = learn_dictionary(y, atoms, 3, coding=Threshold(balance, metric.inverse), iterations=1)

    basis = torch.linalg.svd(y.double(), full_matrices=False)[2][:atoms]
    codes = y.double() @ basis.T
    for row in codes:
        size_of = [
            float(abs(c) ** (1 - balance) * (abs(c) * (metric.inverse @ b).norm()) ** balance)
            for c, b in zip(row, basis, strict=True)
        ]
        row[sorted(range(atoms), key=size_of.__getitem__)[:-3]] = 0
    expected = codes @ torch.from_numpy(np.linalg.lstsq(codes.numpy(), y.double().numpy(), rcond=None)[0])
    torch.testing.assert_close((result.codes @ result.dictionary).double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal((result.codes != 0).sum(0), (codes != 0).sum(0))
    assert result.objective[0] == pytest.approx(squares(y - expected), rel=1e-3)


def test_same_seed_same_bits() -> None:
    y = torch.randn(40, 16, generator=generator(5))
    for kwargs in ({"coding": OMP(), "update": KSVD(), "start": "columns"}, {"start": "columns", "accelerate": True}):
        first, second = (learn_dictionary(y, 10, 4, generator=generator(42), **kwargs) for _ in range(2))  # type: ignore[arg-type]
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(first.dictionary, second.dictionary)
        assert first.objective == second.objective
        other = learn_dictionary(y, 10, 4, generator=generator(43), **kwargs)  # type: ignore[arg-type]
        assert not torch.equal(first.dictionary, other.dictionary)


def test_unused_atoms_are_replaced_and_counted() -> None:
    y = torch.zeros(12, 6)
    y[:11, 0] = torch.arange(1, 12).float()
    y[11, 1:] = 1.0
    doubled = torch.cat([y[:11]] * 3 + [y[11:]])
    result = learn_dictionary(doubled, 3, 1, coding=OMP(), start="columns", iterations=5, generator=generator(0))
    assert result.replaced >= 1
    assert result.objective[-1] < 1e-6
    assert result.stop == "exact"


def test_sparsity_beyond_the_atoms_is_plain_low_rank() -> None:
    y = torch.randn(30, 12, generator=generator(6))
    result = learn_dictionary(y, 5, 9, iterations=3)
    best = torch.linalg.svdvals(y)[5:].square().sum()
    assert result.objective[-1] == pytest.approx(float(best), rel=1e-4)


def test_zero_signals_fit_exactly() -> None:
    for start in STARTS:
        result = learn_dictionary(torch.zeros(4, 9), 6, 2, start=start, generator=generator())
        assert result.objective == (0.0,)
        assert result.stop == "exact"
        assert (result.codes == 0).all()
        assert torch.isfinite(result.dictionary).all()


def test_tolerance_stops_and_dtype_is_kept() -> None:
    y = torch.randn(40, 16, generator=generator(5)).bfloat16()
    result = learn_dictionary(y, 10, 4, iterations=500, tolerance=0.01)
    assert result.stop == "tolerance"
    assert result.iterations < 100
    assert result.codes.dtype == result.dictionary.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("signals", "atoms", "sparsity", "message"),
    [
        (torch.full((4, 4), float("nan")), 2, 1, "not finite"),
        (torch.full((4, 4), float("inf")), 2, 1, "not finite"),
        (torch.ones(4), 2, 1, "matrix"),
        (torch.ones(0, 4), 2, 1, "matrix"),
        (torch.ones(4, 4), 2, 0, "sparsity must be at least 1"),
        (torch.ones(4, 4), 0, 1, "atoms must be at least 1"),
        (torch.ones(4, 4), 2, 1, "pass generator"),
    ],
)
def test_refusals(signals: Tensor, atoms: int, sparsity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learn_dictionary(signals, atoms, sparsity, start="columns")
