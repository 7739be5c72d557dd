"""Pruning and few-bit values: against explicit inverses, numpy's least squares row by row, and brute force."""

from collections.abc import Callable
from functools import partial
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import drawn
from drawn import SINGULAR, singular_gram
from lexigram.linalg.integers import Steps, refit_scales, sweep, to_steps
from lexigram.linalg.pruning import prune, refit
from lexigram.linalg.rounding import activation_order, round_carrying
from lexigram.linalg.support import ANYWHERE, Consecutive, Pattern, Rows, Tiles, wanda
from lexigram.linalg.surgeon import settling_order, surgeon

PATTERNS = {
    "anywhere": ANYWHERE,
    "rows": Rows(),
    "2:4": Consecutive(2, 4),
    "4:8": Consecutive(4, 8),
    "tiles": Tiles(2, 4),
}

normal = partial(drawn.normal, dtype=torch.float64)


def correlated_gram(width: int, seed: int = 0, decades: float = 1.0) -> Tensor:
    """Of inputs with strong and weak directions, in no direction of the coordinates, some channels much louder."""
    X = normal(3 * width, width, seed=seed) * torch.logspace(0, -decades, width, dtype=torch.float64)
    X = X @ torch.linalg.qr(normal(width, width, seed=seed + 1)).Q
    X[:, ::7] *= 10
    return X.T @ X


def errors(weight: Tensor, values: Tensor, gram: Tensor) -> Tensor:
    """Squared error of every row."""
    error = (weight - values).double()
    return ((error @ gram.double()) * error).sum(1)


def error(weight: Tensor, values: Tensor, gram: Tensor) -> float:
    return float(errors(weight, values, gram).sum())


def fits(support: Tensor, pattern: Pattern) -> bool:
    """Whether a support is of that pattern, told without it."""
    rows, cols = support.shape
    if isinstance(pattern, Rows):
        return len(set(support.sum(1).tolist())) == 1
    if isinstance(pattern, Consecutive):
        return bool((support.view(-1, pattern.of).sum(1) == pattern.keep).all())
    if isinstance(pattern, Tiles):
        counts = support.view(rows // pattern.rows, pattern.rows, cols // pattern.cols, pattern.cols).sum((1, 3))
        return set(counts.unique().tolist()) <= {0, pattern.rows * pattern.cols}
    return True


def best_rows(weight: Tensor, gram: Tensor, kept: int) -> Tensor:
    """The least squared error of every row with `kept` entries, by trying all supports."""
    best = torch.full((len(weight),), torch.inf, dtype=torch.float64)
    for columns in combinations(range(weight.shape[1]), kept):
        at = list(columns)
        values = torch.zeros_like(weight)
        values[:, at] = torch.linalg.solve(gram[at][:, at], (weight @ gram)[:, at].T).T
        best = torch.minimum(best, errors(weight, values, gram))
    return best


# --- which entries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 1000), levels=st.sampled_from([2, 5, 1000]))
def test_exactly_so_many_are_kept_where_scores_are_largest(name: str, share: float, seed: int, levels: int) -> None:
    pattern, shape = PATTERNS[name], (6, 16)
    scores = torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed)).double()
    grain = pattern.grain(shape)
    kept = None if isinstance(pattern, Consecutive) else int(share * 96 / grain) * grain
    kept = pattern.total(shape, kept)
    mask = pattern.choose(scores, kept)
    assert (mask.dtype, mask.shape, int(mask.sum())) == (torch.bool, shape, kept)
    assert fits(mask, pattern)
    # No group that may stand for another has a larger sum outside of the mask than inside.
    parts = {
        "anywhere": [scores.view(-1, 1)],
        "rows": [row[:, None] for row in scores],
        "tiles": [scores.view(3, 2, 4, 4).transpose(1, 2).reshape(12, 8)],
    }.get(name, [group[:, None] for group in scores.view(-1, getattr(pattern, "of", 1))])
    masks = {
        "anywhere": [mask.view(-1)],
        "rows": list(mask),
        "tiles": [mask.view(3, 2, 4, 4)[:, 0, :, 0].reshape(-1)],
    }.get(name, list(mask.view(-1, getattr(pattern, "of", 1))))
    for values, inside in zip(parts, masks, strict=True):
        sums = values.sum(1)
        if bool(inside.any()) and not bool(inside.all()):
            assert sums[inside].min() >= sums[~inside].max()


@pytest.mark.parametrize("pattern", [ANYWHERE, Rows(), Consecutive(2, 4)])
def test_of_equal_scores_the_first_are_kept(pattern: Pattern) -> None:
    kept = pattern.total((3, 8), None if isinstance(pattern, Consecutive) else 12)
    mask = pattern.choose(torch.ones(3, 8), kept)
    expected = {
        ANYWHERE: [[1] * 8, [1] * 4 + [0] * 4, [0] * 8],
        Rows(): [[1] * 4 + [0] * 4] * 3,
        Consecutive(2, 4): [[1, 1, 0, 0] * 2] * 3,
    }[pattern]
    assert mask.int().tolist() == expected


def test_wanda_is_its_formula() -> None:
    weight, gram = normal(5, 12), correlated_gram(12)
    mask = wanda(weight, gram, 20)
    for row, kept in zip(weight.numpy(), mask.numpy(), strict=True):
        best = np.argsort(-np.abs(row) * np.sqrt(np.diag(gram.numpy())))[:4]
        assert set(best) == set(np.flatnonzero(kept))
    everywhere = wanda(weight, gram, 21, ANYWHERE)
    scores = (weight.abs() * gram.diagonal().sqrt()).flatten()
    assert set(everywhere.flatten().nonzero()[:, 0].tolist()) == set(scores.topk(21).indices.tolist())


def test_impossible_totals_are_refused() -> None:
    for pattern, kept, message in (
        (ANYWHERE, None, "say how many"),
        (ANYWHERE, 97, "cannot keep 97"),
        (ANYWHERE, -1, "cannot keep -1"),
        (Rows(), 13, "multiple of 6"),
        (Tiles(2, 4), 12, "multiple of 8"),
        (Tiles(4, 4), 16, "6 rows are not whole tiles of 4"),
        (Tiles(2, 5), 10, "16 columns are not whole groups of 5"),
        (Consecutive(2, 5), None, "16 columns are not whole groups of 5"),
        (Consecutive(2, 4), 40, "leave the number out"),
    ):
        with pytest.raises(ValueError, match=message):
            pattern.total((6, 16), kept)
    for make in (lambda: Consecutive(5, 4), lambda: Tiles(0, 4)):
        with pytest.raises(ValueError, match=r"cannot keep 5 of every 4|has no entries"):
            make()


# --- one pass ----------------------------------------------------------------------------------------------------


def as_asked(targets: Tensor, column: int) -> Tensor:
    return targets


def to_steps_of_its_own(targets: Tensor, column: int) -> Tensor:
    """Coarse, other in every column, with 0 among the values."""
    step = 0.3 + 0.02 * column
    return (targets / step).round().clamp(-2, 1) * step


def brain_surgeon(
    weight: Tensor,
    gram: Tensor,
    kept: int,
    pattern: Pattern,
    order: Tensor,
    window: int,
    storable: Callable[[Tensor, int], Tensor] = as_asked,
) -> tuple[Tensor, Tensor]:
    """Column by column, with the inverse of the Gram of those that are left; the mask of a window as it is reached."""
    values, gram = weight[:, order].clone(), gram[order][:, order]
    rows, cols = weight.shape
    unit = pattern.grain((rows, cols))
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    for j in range(cols):
        if j % window == 0:
            end = min(cols, j + window)
            # The cost of dropping a column once those before it are settled: all but the later ones are gone from the Gram.
            prices = torch.stack([1 / torch.linalg.inv(gram[i:, i:])[0, 0] for i in range(j, end)])
            share = (kept // unit * end // cols - kept // unit * j // cols) * unit
            asked = values[:, j:end]
            stored = torch.stack([storable(values[:, i], int(order[i])) for i in range(j, end)], 1)
            mask[:, j:end] = pattern.choose(prices * (asked**2 - (asked - stored) ** 2).clamp(min=0), share)
        settled = storable(values[:, j], int(order[j])).where(mask[:, j], 0.0)
        inverse = torch.linalg.inv(gram[j:, j:])
        values[:, j:] -= ((values[:, j] - settled) / inverse[0, 0])[:, None] * inverse[0]
        values[:, j] = settled
    back = order.argsort()
    return values[:, back], mask[:, back]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("block", [8, 16, 128])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("storable", [as_asked, to_steps_of_its_own])
def test_it_is_the_brain_surgeon(
    name: str, block: int, ordered: bool, storable: Callable[[Tensor, int], Tensor]
) -> None:
    weight, gram, pattern = normal(6, 40), correlated_gram(40), PATTERNS[name]
    kept = pattern.total((6, 40), None if isinstance(pattern, Consecutive) else 96)
    order = settling_order(gram, pattern) if ordered else torch.arange(40)
    found = surgeon(
        weight,
        gram,
        kept,
        pattern=pattern,
        order=order if ordered else None,
        round_column=None if storable is as_asked else storable,
        block=block,
        damping=0.0,
    )
    window = pattern.of if isinstance(pattern, Consecutive) else block
    values, support = brain_surgeon(weight, gram, kept, pattern, order, window, storable)
    assert torch.equal(found.support, support)
    assert torch.allclose(found.values, values, atol=1e-8)
    assert int(found.support.sum()) == kept
    assert fits(found.support, pattern)


def test_keeping_everything_while_rounding_is_gptq() -> None:
    weight, gram = normal(6, 40), correlated_gram(40)
    order = activation_order(gram)
    found = surgeon(weight, gram, 240, order=order, round_column=to_steps_of_its_own, block=16)
    expected = round_carrying(weight, gram, to_steps_of_its_own, order=order)
    assert torch.allclose(found.values, expected, atol=1e-12)
    assert bool(found.support.all())


def test_damping_of_the_surgeon_is_a_share_of_the_mean_diagonal() -> None:
    weight, gram = normal(6, 40), correlated_gram(40)
    damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(40)
    found, expected = surgeon(weight, gram, 96, damping=0.1), surgeon(weight, damped, 96, damping=0.0)
    assert torch.allclose(found.values, expected.values)
    assert not torch.equal(found.values, surgeon(weight, gram, 96, damping=0.0).values)


@pytest.mark.parametrize("kept", [0, 1, 95, 97, 239, 240])
@pytest.mark.parametrize("block", [1, 7, 40])
def test_the_total_is_exact_however_it_falls_into_blocks(kept: int, block: int) -> None:
    found = surgeon(normal(6, 40), correlated_gram(40), kept, block=block)
    assert int(found.support.sum()) == kept
    assert bool((found.values[~found.support] == 0).all())


def test_what_belongs_together_is_not_parted() -> None:
    weight, gram = normal(6, 40), correlated_gram(40)
    order = settling_order(gram, Consecutive(2, 4))
    groups = order.view(-1, 4)
    assert bool((groups // 4 == groups[:, :1] // 4).all())
    sums = gram.diagonal().view(-1, 4).sum(1)[groups[:, 0] // 4]
    assert bool((sums[1:] <= sums[:-1]).all())
    assert bool((gram.diagonal()[groups].diff(dim=1) <= 0).all())
    assert torch.equal(settling_order(gram), activation_order(gram))
    with pytest.raises(ValueError, match="parts groups of 4"):
        surgeon(weight, gram, pattern=Consecutive(2, 4), order=activation_order(gram))


def test_the_surgeon_refuses_wrong_arguments() -> None:
    weight, gram = normal(4, 6), correlated_gram(6)
    for bad, order, message in (
        (gram[:, :5], None, "does not fit"),
        (gram, torch.tensor([0, 1, 2, 3, 4, 4]), "each of the 6 columns once"),
        (-gram, None, "not positive semi-definite"),
        (gram * torch.nan, None, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            surgeon(weight, bad, 12, order=order)


# --- values on a support -----------------------------------------------------------------------------------------


def random_support(rows: int, cols: int, share: float = 0.5, seed: int = 0) -> Tensor:
    """Another number of entries in every row, none at all in the first."""
    drawn = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed))
    return drawn < share * torch.linspace(0, 2, rows)[:, None]


def least_squares(weight: Tensor, X: Tensor, support: Tensor) -> Tensor:
    """Row by row, with numpy, on the inputs themselves; the shortest of all that are best."""
    values = np.zeros(tuple(weight.shape))
    for row, (wanted, kept) in enumerate(zip((weight @ X.T).numpy(), support.numpy(), strict=True)):
        values[row, kept] = np.linalg.lstsq(X.numpy()[:, kept], wanted, rcond=None)[0]
    return torch.from_numpy(values)


def test_a_refit_is_least_squares() -> None:
    weight, X, support = normal(9, 24), normal(80, 24, seed=3) @ normal(24, 24, seed=4), random_support(9, 24)
    expected = least_squares(weight, X, support)
    found = refit(weight, X.T @ X, support, steps=400)
    assert torch.allclose(found, expected, atol=1e-7)
    assert torch.allclose(refit(weight, X.T @ X, support, normal(9, 24, seed=5), steps=400), expected, atol=1e-7)
    # In float32 as near as its digits allow.
    single = refit(weight.float(), X.T @ X, support, steps=100)
    assert single.dtype == torch.float32
    assert error(weight, single, X.T @ X) < error(weight, expected, X.T @ X) * (1 + 1e-5)


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_refit_with_a_singular_gram(kind: str, damping: float) -> None:
    weight, gram, support = normal(9, 24), singular_gram(kind), random_support(9, 24)
    found = refit(weight, gram, support, steps=200, damping=damping)
    assert bool(torch.isfinite(found).all())
    gram = gram + damping * gram.diagonal().mean() * torch.eye(24)
    root = torch.linalg.eigh(gram)
    X = root.eigenvectors.T * root.eigenvalues.clamp_min(0).sqrt()[:, None]
    best = error(weight, least_squares(weight, X, support), gram)
    assert error(weight, found, gram) <= best + 1e-6 * (1 + error(weight, 0 * weight, gram))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 60), st.floats(0, 3), st.sampled_from([torch.float32, torch.float64]))
def test_a_refit_never_raises_the_error_of_a_row(seed: int, steps: int, decades: float, dtype: torch.dtype) -> None:
    weight, gram = normal(12, 20, seed=seed).to(dtype), correlated_gram(20, seed=seed, decades=decades)
    support, start = random_support(12, 20, seed=seed), normal(12, 20, seed=seed + 1).to(dtype)
    for begun in (start, refit(weight, gram, support, steps=100)):
        before = errors(weight, begun * support, gram)
        after = errors(weight, refit(weight, gram, support, begun, steps=steps), gram)
        assert bool((after <= before * (1 + 1e-4) + 1e-12).all())


def test_a_refit_forgets_what_is_not_on_the_support() -> None:
    weight, gram, support = normal(12, 20), correlated_gram(20), random_support(12, 20)
    found = refit(weight, gram, support, normal(12, 20, seed=1))
    assert bool((found[~support] == 0).all())
    assert torch.equal(refit(weight, gram, torch.zeros_like(support)), torch.zeros_like(weight))
    assert torch.allclose(refit(weight, gram, torch.ones_like(support)), weight)


@pytest.mark.parametrize("function", [refit, prune])
def test_shapes_and_grams_that_do_not_fit_are_refused(function: Callable[..., object]) -> None:
    weight, gram = normal(4, 6), correlated_gram(6)
    rest = torch.ones(4, 6, dtype=torch.bool) if function is refit else 12
    for bad, message in ((gram[:, :5], "does not fit"), (gram * torch.inf, "not finite")):
        with pytest.raises(ValueError, match=message):
            function(weight, bad, rest)
    with pytest.raises(ValueError, match="support"):
        refit(weight, gram, torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="start"):
        refit(weight, gram, torch.ones(4, 6, dtype=torch.bool), weight[:3])


# --- support and values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
def test_the_search_beats_the_pass_and_wanda(name: str) -> None:
    pattern = PATTERNS[name]
    weight, gram = normal(64, 96), correlated_gram(96)
    kept = pattern.total((64, 96), None if isinstance(pattern, Consecutive) else 64 * 48)
    found = prune(weight, gram, kept, pattern=pattern)
    assert int(found.support.sum()) == kept
    assert fits(found.support, pattern)
    assert bool((found.values[~found.support] == 0).all())
    passed = surgeon(weight, gram, kept, pattern=pattern)
    assert error(weight, found.values, gram) < 0.95 * error(weight, refit(weight, gram, passed.support), gram)
    simple = refit(weight, gram, wanda(weight, gram, kept, pattern))
    assert error(weight, found.values, gram) < (0.97 if name == "tiles" else 0.9) * error(weight, simple, gram)


def test_the_search_comes_close_to_all_supports_tried() -> None:
    weight, gram = normal(30, 10), correlated_gram(10)
    found = prune(weight, gram, 30 * 5, pattern=Rows(), steps=100)
    best = float(best_rows(weight, gram, 5).sum())
    assert best <= error(weight, found.values, gram) < 1.25 * best


@pytest.mark.parametrize("kind", SINGULAR)
def test_the_search_with_a_singular_gram(kind: str) -> None:
    weight, gram = normal(9, 24), singular_gram(kind)
    found = prune(weight, gram, 100)
    assert int(found.support.sum()) == 100
    assert bool(torch.isfinite(found.values).all())
    assert error(weight, found.values, gram) <= error(weight, weight * wanda(weight, gram, 100, ANYWHERE), gram) + 1e-9


def test_an_orthogonal_gram_leaves_the_largest() -> None:
    weight = normal(9, 24)
    gram = torch.diag(torch.linspace(0.1, 9, 24, dtype=torch.float64))
    for found in (prune(weight, gram, 100), surgeon(weight, gram, 100, block=24, damping=0.0)):
        assert torch.equal(found.support, wanda(weight, gram, 100, ANYWHERE))
        assert torch.allclose(found.values, weight * found.support)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (5, 4)])
def test_dtypes_and_small_shapes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, gram = normal(*shape).to(dtype), correlated_gram(shape[1])
    kept = shape[0] * shape[1] // 2
    for found in (prune(weight, gram, kept), surgeon(weight, gram, kept)):
        assert (found.values.shape, found.values.dtype, int(found.support.sum())) == (shape, dtype, kept)


# --- values in few bits ------------------------------------------------------------------------------------------


def grids(support: Tensor, values: Tensor, group: int, bits: int) -> Steps:
    """From the least to the greatest value of each group, group after group."""
    levels, kept = 2**bits - 1, values[support]
    low = torch.stack([part.min().clamp_max(0) for part in kept.split(group)])
    high = torch.stack([part.max().clamp_min(0) for part in kept.split(group)])
    scale = ((high - low) / levels).bfloat16().double()
    return Steps(scale, (-low / scale).round().clamp(0, levels), levels, group)


def of_groups(numbers: Tensor, support: Tensor, group: int) -> Tensor:
    """Each kept entry's number of its group, entry after entry."""
    found = torch.zeros(support.shape, dtype=numbers.dtype)
    for index, (row, column) in enumerate(support.nonzero().tolist()):
        found[row, column] = numbers[index // group]
    return found


def eighths(targets: Tensor, _column: int) -> Tensor:
    return (targets * 8).round().clamp(-8, 7) / 8


@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_sweep_takes_the_best_of_every_value_in_turn(block: int, ordered: bool) -> None:
    weight, gram = normal(4, 14, seed=8), correlated_gram(14)
    order = activation_order(gram) if ordered else torch.arange(14)
    start = eighths(weight, 0)
    found = sweep(weight, gram, start, eighths, order=order if ordered else None, block=block)
    expected, storable = start.clone(), torch.arange(-8, 8, dtype=torch.float64) / 8
    for column in order.tolist():
        tried = expected.expand(16, -1, -1).clone()
        tried[:, :, column] = storable[:, None]
        best = torch.stack([errors(weight, each, gram) for each in tried]).argmin(0)
        expected[:, column] = storable[best]
    assert torch.equal(found, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 3), st.sampled_from([torch.float32, torch.float64]))
def test_a_sweep_never_raises_the_error_of_a_row(seed: int, decades: float, dtype: torch.dtype) -> None:
    weight, gram = normal(12, 20, seed=seed).to(dtype), correlated_gram(20, seed=seed, decades=decades)
    values = eighths(weight, 0)
    for _ in range(4):
        before, values = errors(weight, values, gram), sweep(weight, gram, values, eighths, block=8)
        assert bool((errors(weight, values, gram) <= before * (1 + 1e-4) + 1e-12).all())


@pytest.mark.parametrize("group", [1, 7, 64, 1000])
def test_scales_are_least_squares(group: int) -> None:
    weight, X, support = normal(9, 24), normal(80, 24, seed=3), random_support(9, 24)
    integers = (normal(9, 24, seed=5) * 3).round() * support
    start = torch.ones(-(-int(support.sum()) // group), dtype=torch.float64)
    found = refit_scales(weight, X.T @ X, integers, support, start, group, steps=300)
    columns = []
    for index in range(len(start)):
        one = torch.zeros_like(start).index_fill_(0, torch.tensor(index), 1.0)
        columns.append((integers * of_groups(one, support, group) @ X.T).flatten().numpy())
    design = np.stack(columns, axis=1)
    # A group of zeros has any scale: it keeps the one that it had.
    empty = np.abs(design).sum(0) == 0
    expected = np.where(empty, 1.0, np.linalg.lstsq(design, (weight @ X.T).flatten().numpy(), rcond=None)[0])
    assert np.allclose(found.numpy(), expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(0, 12))
def test_scales_never_raise_the_error(seed: int, group: int, steps: int) -> None:
    weight, gram, support = normal(9, 24, seed=seed), correlated_gram(24, seed=seed), random_support(9, 24, seed=seed)
    integers = (normal(9, 24, seed=seed + 1) * 3).round() * support
    start = normal(-(-int(support.sum()) // group), seed=seed + 2)
    found = refit_scales(weight, gram, integers, support, start, group, steps=steps)
    before, after = (error(weight, integers * of_groups(scale, support, group), gram) for scale in (start, found))
    assert after <= before * (1 + 1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [5, 32, 2000])
def test_what_is_stepped_can_be_stored_and_beats_the_pass(bits: int, group: int) -> None:
    weight, gram = normal(24, 40), correlated_gram(40)
    start, support = prune(weight, gram, 24 * 24)
    steps = grids(support, start, group, bits)
    scale = of_groups(steps.scale, support, group)
    zero = of_groups(steps.zero, support, group)

    def in_grid(targets: Tensor, column: int) -> Tensor:
        size, low = scale[:, column], -zero[:, column]
        integers = torch.where(size > 0, targets / size, 0.0).round()
        return torch.minimum(torch.maximum(integers, low), low + steps.levels) * size

    passed = round_carrying(start, gram, in_grid, order=activation_order(gram))
    alone = to_steps(weight, gram, support, start, steps, rounds=0)
    assert torch.allclose(alone.values, passed)
    assert torch.equal(alone.scale, steps.scale)
    found = to_steps(weight, gram, support, start, steps)
    assert bool((found.values[~support] == 0).all())
    assert torch.equal(found.scale, found.scale.bfloat16().double())
    size = of_groups(found.scale, support, group)
    integers = torch.where(size != 0, found.values / size, 0.0)
    assert torch.allclose(integers, integers.round(), atol=1e-9)
    assert bool(((integers >= -zero) & (integers <= steps.levels - zero)).all())
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)
    assert error(weight, found.values, damped) < 0.9 * error(weight, passed, damped)
    more = to_steps(weight, gram, support, start, steps, rounds=20)
    assert error(weight, more.values, damped) <= error(weight, found.values, damped) * (1 + 1e-9)


def test_what_is_stepped_comes_close_to_all_integers_tried() -> None:
    weight, gram = normal(20, 6), correlated_gram(6)
    support = torch.ones(20, 6, dtype=torch.bool)
    steps = Steps(torch.full((20,), 0.75), torch.full((20,), 2), 3, 6)
    found = to_steps(weight, gram, support, weight, steps, stored=lambda _scale: steps.scale, damping=0.0)
    tried = 0.75 * torch.tensor(list(product(range(-2, 2), repeat=6)), dtype=torch.float64)
    lost = weight[:, None] - tried
    best = float(((lost @ gram) * lost).sum(2).min(1).values.sum())
    assert best * (1 - 1e-9) <= error(weight, found.values, gram) < 1.15 * best


@pytest.mark.parametrize("kind", SINGULAR)
def test_steps_with_a_singular_gram(kind: str) -> None:
    weight, gram, support = normal(9, 24), singular_gram(kind), random_support(9, 24)
    steps = grids(support, weight, 16, 3)
    passed = to_steps(weight, gram, support, weight, steps, rounds=0)
    found = to_steps(weight, gram, support, weight, steps)
    assert bool(torch.isfinite(found.values).all())
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(24)
    assert error(weight, found.values, damped) <= error(weight, passed.values, damped) * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (5, 4)])
def test_steps_of_small_shapes(shape: tuple[int, int]) -> None:
    weight = normal(*shape).float()
    for support in (torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)):
        groups = -(-int(support.sum()) // 3)
        steps = Steps(torch.full((groups,), 0.5), torch.full((groups,), 4), 7, 3)
        found = to_steps(weight, correlated_gram(shape[1]), support, weight, steps)
        assert (found.values.shape, found.values.dtype, len(found.scale)) == (shape, torch.float32, groups)


def test_steps_refuse_what_does_not_fit() -> None:
    weight, gram, support = normal(4, 6), correlated_gram(6), torch.ones(4, 6, dtype=torch.bool)
    steps = Steps(torch.ones(3), torch.zeros(3), 7, 8)
    with pytest.raises(ValueError, match="do not fit"):
        to_steps(weight, gram, support[:3], weight, steps)
    with pytest.raises(ValueError, match="3 scales do not fit 24 values in groups of 5"):
        to_steps(weight, gram, support, weight, steps._replace(group=5))
