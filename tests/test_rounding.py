"""Rounding that carries its error: against GPTQ as published, the exact least-squares step, and each row by itself."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import drawn
from drawn import SINGULAR, singular_gram
from lexigram.linalg.rounding import activation_order, round_carrying, round_carrying_on_support

STEP = 0.25

normal = partial(drawn.normal, dtype=torch.float64)


def correlated_gram(width: int, seed: int = 0, decades: float = 2.0) -> Tensor:
    """Of inputs with strong and weak directions, in no direction of the coordinates."""
    X = normal(3 * width, width, seed=seed) * torch.logspace(0, -decades, width, dtype=torch.float64)
    X = X @ torch.linalg.qr(normal(width, width, seed=seed + 1)).Q
    return X.T @ X


def to_step(values: Tensor, _index: object = None) -> Tensor:
    """Multiples of `STEP` up to eight times of it."""
    return (values / STEP).round().clamp(-8, 8) * STEP


def uneven(values: Tensor, column: int) -> Tensor:
    """Every column has its own step."""
    step = 0.1 + 0.05 * (column % 5)
    return (values / step).round().clamp(-8, 8) * step


def squared_error(values: Tensor, rounded: Tensor, gram: Tensor) -> float:
    error = (values - rounded).double()
    return float(((error @ gram.double()) * error).sum())


def gptq(values: Tensor, gram: Tensor, round_column: Callable[[Tensor, int], Tensor], order: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 without blocks: the upper Cholesky factor of the inverse tells the corrections."""
    values, gram = values[:, order].clone(), gram[order][:, order]
    factor = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    rounded = torch.zeros_like(values)
    for j, column in enumerate(order.tolist()):
        rounded[:, j] = round_column(values[:, j], column)
        error = (values[:, j] - rounded[:, j]) / factor[j, j]
        values[:, j:] -= error[:, None] * factor[j, j:]
    return rounded[:, order.argsort()]


ORDERS = {
    "natural": lambda gram: None,
    "activation": activation_order,
    "random": lambda gram: torch.randperm(len(gram), generator=torch.Generator().manual_seed(3)),
}


# --- all columns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", [1, 3, 16, 40, 128])
def test_it_is_gptq(order: str, block: int) -> None:
    values, gram = normal(9, 40), correlated_gram(40)
    columns = ORDERS[order](gram)
    found = round_carrying(values, gram, uneven, order=columns, block=block, damping=0.0)
    expected = gptq(values, gram, uneven, torch.arange(40) if columns is None else columns)
    assert torch.allclose(found, expected, atol=1e-9)


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    values, gram = normal(9, 40), correlated_gram(40)
    damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(40)
    found = round_carrying(values, gram, uneven, damping=0.1)
    assert torch.allclose(found, gptq(values, damped, uneven, torch.arange(40)), atol=1e-9)
    assert not torch.equal(found, round_carrying(values, gram, uneven, damping=0.0))


@pytest.mark.parametrize("first", [0, 4, 11])
def test_a_step_is_the_optimal_brain_surgeons(first: int) -> None:
    """With one column rounded, what the others are asked for is the least-squares optimum given that column."""
    values, X = normal(6, 12), normal(80, 12, seed=2) @ normal(12, 12, seed=3)
    order = torch.tensor([first, *(column for column in range(12) if column != first)])
    asked = torch.zeros_like(values)

    def first_to_step(targets: Tensor, column: int) -> Tensor:
        asked[:, column] = targets
        return to_step(targets) if column == first else targets

    found = round_carrying(values, X.T @ X, first_to_step, order=order, damping=0.0)
    others = [column for column in range(12) if column != first]
    assert torch.equal(found[:, first], to_step(values[:, first]))
    wanted = values @ X.T - found[:, [first]] @ X[:, [first]].T
    optimum = torch.linalg.lstsq(X[:, others], wanted.T).solution.T
    assert torch.allclose(asked[:, others], optimum, atol=1e-8)
    assert torch.allclose(found[:, others], optimum, atol=1e-8)


@pytest.mark.parametrize("block", [4, 128])
def test_an_order_is_a_permutation_of_the_problem(block: int) -> None:
    values, gram = normal(7, 30), correlated_gram(30)
    order = ORDERS["random"](gram)
    found = round_carrying(values, gram, uneven, order=order, block=block)
    permuted = round_carrying(
        values[:, order], gram[order][:, order], lambda targets, j: uneven(targets, int(order[j])), block=block
    )
    assert torch.allclose(found[:, order], permuted, atol=1e-12)


def test_activation_order_goes_by_the_diagonal() -> None:
    gram = torch.diag(torch.tensor([2.0, 5.0, 2.0, 0.0, 9.0]))
    assert activation_order(gram).tolist() == [4, 1, 0, 2, 3]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 48), st.sampled_from(sorted(ORDERS)), st.floats(0.5, 3.0))
def test_the_error_is_lower_than_that_of_the_nearest(seed: int, width: int, order: str, decades: float) -> None:
    values, gram = normal(24, width, seed=seed), correlated_gram(width, seed=seed + 1, decades=decades)
    # Without bounds, for which no rounding can make up.
    to_multiple = lambda targets, _column: (targets / STEP).round() * STEP  # noqa: E731
    found = round_carrying(values, gram, to_multiple, order=ORDERS[order](gram), damping=1e-4)
    assert torch.allclose(found / STEP, (found / STEP).round())
    # A single row can be unlucky; two dozen together are not.
    assert squared_error(values, found, gram) < 1.05 * squared_error(values, to_multiple(values, 0), gram)
    if width >= 16 and decades >= 1:
        assert squared_error(values, found, gram) < 0.8 * squared_error(values, to_multiple(values, 0), gram)


@pytest.mark.parametrize("gram", [torch.eye(20), torch.zeros(20, 20), torch.diag(torch.arange(20.0))], ids=str)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_uncorrelated_inputs_carry_nothing(gram: Tensor, damping: float) -> None:
    values = normal(5, 20)
    assert torch.equal(round_carrying(values, gram, to_step, damping=damping), to_step(values))


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_singular_grams(kind: str, damping: float) -> None:
    values, gram = normal(9, 24), singular_gram(kind)
    found = round_carrying(values, gram, to_step, damping=damping)
    assert torch.equal(found, to_step(found))
    if damping:
        assert squared_error(values, found, gram) <= squared_error(values, to_step(values), gram)
    if kind == "dead channels":
        assert torch.equal(found[:, 3:7], to_step(values[:, 3:7]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_in_and_out(dtype: torch.dtype) -> None:
    values, gram = normal(9, 40).to(dtype), correlated_gram(40)
    kept = values.clone()
    found = round_carrying(values, gram, to_step, block=16)
    assert found.dtype == dtype
    assert torch.equal(values, kept)
    exact = round_carrying(values.double(), gram, to_step, block=16)
    assert float((found.double() != exact).double().mean()) < 0.02, "but for ties decided by rounding"


@pytest.mark.parametrize("shape", [(0, 6), (1, 1), (3, 1), (1, 6)])
def test_small_shapes(shape: tuple[int, int]) -> None:
    values, gram = normal(*shape), correlated_gram(shape[1])
    assert round_carrying(values, gram, to_step).shape == shape


def test_wrong_arguments_are_refused() -> None:
    values, gram = normal(4, 6), correlated_gram(6)
    for bad, order, message in (
        (gram[:, :5], None, "square"),
        (correlated_gram(5), None, r"5 columns does not fit values \(4, 6\)"),
        (gram, torch.tensor([0, 1, 2, 3, 4, 4]), "each of the 6 columns once"),
        (gram, torch.arange(5), "each of the 6 columns once"),
        (-gram, None, "not positive semi-definite"),
        (gram * torch.nan, None, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            round_carrying(values, bad, to_step, order=order)
    with pytest.raises(ValueError, match="shape"):
        round_carrying_on_support(values, torch.zeros(4, 5, dtype=torch.int64), gram, to_step)


# --- on supports -------------------------------------------------------------------------------------------------


def random_positions(rows: int, entries: int, columns: int, seed: int = 0) -> Tensor:
    drawn = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return drawn.argsort(dim=1)[:, :entries]


def uneven_by_row(targets: Tensor, at: tuple[slice, int]) -> Tensor:
    """Every entry has its own step."""
    rows, entry = at
    step = 0.1 + 0.05 * ((torch.arange(1000)[rows] + 3 * entry) % 5).to(targets)
    return (targets / step).round() * step


@pytest.mark.parametrize("batch", [None, 1, 4, 100])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_every_row_is_rounded_with_its_own_gram(batch: int | None, damping: float) -> None:
    values, positions, gram = normal(11, 9), random_positions(11, 9, 30), correlated_gram(30)
    found = round_carrying_on_support(values, positions, gram, uneven_by_row, batch=batch, damping=damping)
    damped = gram + damping * gram.diagonal().mean() * torch.eye(30)
    for row in range(11):
        own = damped[positions[row]][:, positions[row]]
        at = slice(row, row + 1)
        expected = round_carrying(
            values[at], own, lambda targets, j, at=at: uneven_by_row(targets, (at, j)), damping=0.0
        )
        assert torch.allclose(found[at], expected, atol=1e-9)


def test_with_every_column_kept_it_is_the_dense_rounding() -> None:
    values, gram = normal(11, 16), correlated_gram(16)
    order = activation_order(gram)
    found = round_carrying_on_support(values[:, order], order.expand(11, 16), gram, to_step)
    assert torch.allclose(found[:, order.argsort()], round_carrying(values, gram, to_step, order=order), atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(6, 24))
def test_on_supports_the_error_is_lower_too(seed: int, entries: int) -> None:
    gram = correlated_gram(32, seed=seed)
    values, positions = normal(24, entries, seed=seed + 1), random_positions(24, entries, 32, seed)
    full = lambda kept: torch.zeros(24, 32, dtype=torch.float64).scatter_(1, positions, kept)  # noqa: E731
    to_multiple = lambda targets, _at: (targets / STEP).round() * STEP  # noqa: E731
    found = round_carrying_on_support(values, positions, gram, to_multiple, damping=1e-4)
    nearest = to_multiple(values, 0)
    assert squared_error(full(values), full(found), gram) < squared_error(full(values), full(nearest), gram)


@pytest.mark.parametrize("kind", SINGULAR)
def test_singular_grams_on_supports_are_floored_row_by_row(kind: str) -> None:
    values, positions, gram = normal(11, 9), random_positions(11, 9, 24), singular_gram(kind)
    together = round_carrying_on_support(values, positions, gram, to_step, damping=0.0)
    alone = round_carrying_on_support(values, positions, gram, to_step, damping=0.0, batch=1)
    assert torch.allclose(together, alone, atol=1e-12)
    assert torch.equal(together, to_step(together))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 1), (5, 4)])
def test_dtypes_and_small_shapes_on_supports(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    values = normal(*shape).to(dtype)
    found = round_carrying_on_support(values, random_positions(*shape, 6), correlated_gram(6), to_step)
    assert (found.shape, found.dtype) == (shape, dtype)
    assert torch.equal(found, to_step(found))
