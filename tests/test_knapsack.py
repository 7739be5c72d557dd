"""The knapsack against brute force and a solver of integer programmes; interpolated curves by their properties."""

import itertools
import math
import random
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from lexigram.allocation import knapsack
from lexigram.allocation.knapsack import Choice, choose, interpolated
from lexigram.errors import LexigramError

Curves = list[list[tuple[int, float]]]

# Few different numbers, so that ties, equal bytes, dominated and forbidden options are common.
_CURVES = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 12) | st.integers(0, 10**9),
            st.integers(-3, 8).map(float) | st.floats(0, 1) | st.just(math.inf),
        ),
        min_size=1,
        max_size=6,
    ).filter(lambda options: any(math.isfinite(cost) for _, cost in options)),
    max_size=5,
)


def _smallest(curves: Curves) -> int:
    return sum(min(size for size, cost in options if math.isfinite(cost)) for options in curves)


def _largest(curves: Curves) -> int:
    return sum(max(size for size, _ in options) for options in curves)


def _brute_force(curves: Curves, budget: int) -> float:
    totals = (
        (sum(size for size, _ in chosen), math.fsum(cost for _, cost in chosen))
        for chosen in itertools.product(*curves)
    )
    return min((cost for size, cost in totals if size <= budget), default=math.inf)


def _programme(curves: Curves, budget: int) -> float:
    sizes, costs = (np.array([option[which] for options in curves for option in options]) for which in (0, 1))
    owner = np.repeat(np.arange(len(curves)), [len(options) for options in curves])
    one_each = (owner == np.arange(len(curves))[:, None]).astype(float)
    found = milp(
        costs,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None], -np.inf, budget)],
        options={"mip_rel_gap": 0, "time_limit": 20},
    )
    return float(found.fun)


def _check(curves: Curves, budget: int, choice: Choice) -> None:
    """That a choice is what it says."""
    chosen = [options[pick] for options, pick in zip(curves, choice.picks, strict=True)]
    assert choice.bytes == sum(size for size, _ in chosen) <= budget
    assert choice.cost == math.fsum(cost for _, cost in chosen)
    assert choice.bound <= choice.cost


def _measured_like(rng: random.Random, units: int, options: int) -> Curves:
    """Errors that fall with size, not quite smoothly, for matrices of different shapes."""
    curves = []
    for _ in range(units):
        dense, scale, rate = rng.choice([2 << 20, 8 << 20, 32 << 20]), rng.lognormvariate(0, 1), rng.uniform(2, 8)
        shares = [rng.uniform(0.3, 1) for _ in range(options)]
        curves.append([(int(dense * x), scale * math.exp(-rate * x) * rng.gauss(1, 0.02)) for x in shares])
    return curves


def _unrelated(rng: random.Random, units: int, options: int) -> Curves:
    return [[(rng.randrange(10**6), rng.random()) for _ in range(options)] for _ in range(units)]


def _hard(rng: random.Random, units: int, options: int) -> Curves:
    """Every byte saves as much as any other: all that counts is how full the budget gets."""
    return [[(size, -float(size)) for size in rng.sample(range(10**9), options)] for _ in range(units)]


def _alike(rng: random.Random, units: int, options: int) -> Curves:
    return [[(1000 * step, math.exp(-step / 10)) for step in range(1, options + 1)]] * units


Family = Callable[[random.Random, int, int], Curves]

_FAMILIES = pytest.mark.parametrize("family", [_measured_like, _unrelated, _hard, _alike], ids=lambda f: f.__name__[1:])


@given(_CURVES, st.integers(0, 60) | st.integers(0, 10**9), st.booleans())
@settings(max_examples=600, deadline=None)
def test_small_choices_are_optimal_and_say_so(curves: Curves, budget: int, relative: bool) -> None:
    if relative:
        budget += _smallest(curves)
    assume(budget >= _smallest(curves))
    choice = choose(curves, budget)
    _check(curves, budget, choice)
    assert choice.bound == choice.cost == pytest.approx(_brute_force(curves, budget), rel=1e-9, abs=1e-12)


@given(_CURVES.filter(bool))
@settings(max_examples=100, deadline=None)
def test_too_small_a_budget_is_refused_with_the_bytes_it_takes(curves: Curves) -> None:
    needed = _smallest(curves)
    choose(curves, needed)
    with pytest.raises(LexigramError, match=f"need {needed}"):
        choose(curves, needed - 1)


@given(_CURVES, st.integers(0, 10**30))
@settings(max_examples=100, deadline=None)
def test_a_large_budget_takes_the_cheapest_everywhere(curves: Curves, more: int) -> None:
    choice = choose(curves, _largest(curves) + more)
    for options, pick in zip(curves, choice.picks, strict=True):
        cost = min(cost for _, cost in options)
        size = min(size for size, other in options if other == cost)
        assert pick == options.index((size, cost))
    assert choice.bound == choice.cost


@given(_CURVES, st.lists(st.integers(0, 100) | st.integers(0, 10**9), min_size=2, max_size=8))
@settings(max_examples=100, deadline=None)
def test_more_bytes_never_cost_more(curves: Curves, steps: list[int]) -> None:
    costs = [choose(curves, _smallest(curves) + step).cost for step in sorted(steps)]
    # Costs of tied choices are sums of different numbers.
    assert all(later <= earlier + 1e-9 * abs(earlier) for earlier, later in itertools.pairwise(costs))


# Not the hard ones: the solver's tolerance is above what they are about.
@pytest.mark.parametrize("family", [_measured_like, _unrelated, _alike], ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("share", [0.15, 0.5])
def test_medium_choices_agree_with_an_integer_programme(family: Family, share: float) -> None:
    curves = family(random.Random(5), 40, 12)
    budget = int(_smallest(curves) + share * (_largest(curves) - _smallest(curves)))
    choice = choose(curves, budget)
    _check(curves, budget, choice)
    best = _programme(curves, budget)
    assert choice.bound - 1e-9 * abs(best) <= best
    assert choice.cost - best <= choice.cost - choice.bound + 1e-9 * abs(best)


@_FAMILIES
def test_a_whole_model_takes_seconds_and_leaves_next_to_nothing(family: Family) -> None:
    curves = family(random.Random(1), 300, 60)
    budget = int(_smallest(curves) + 0.4 * (_largest(curves) - _smallest(curves)))
    began = time.process_time()
    choice = choose(curves, budget)
    assert time.process_time() - began < 15  # 0.1 s, or 2 s for the hard ones, where nothing else runs
    _check(curves, budget, choice)
    assert choice.cost - choice.bound <= 1e-7 * abs(choice.cost)
    if family is not _hard:
        assert choice.bound == choice.cost
    assert choose(curves, budget) == choice


@given(_CURVES, st.integers(0, 60) | st.integers(0, 10**9))
@settings(max_examples=300, deadline=None)
def test_a_search_cut_short_still_knows_a_bound(curves: Curves, more: int) -> None:
    budget = _smallest(curves) + more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_WIDTHS", (1, 2))
        choice = choose(curves, budget)
    _check(curves, budget, choice)
    best = _brute_force(curves, budget)
    assert choice.bound <= best + 1e-9 * (1 + abs(best))
    assert best <= choice.cost + 1e-9 * (1 + abs(best))


def test_large_costs_of_options_out_of_the_question_do_not_blur_the_others() -> None:
    rng = random.Random(2)
    curves = [[(0, 1e12), *((rng.randrange(1, 1000), rng.random()) for _ in range(5))] for _ in range(6)]
    budget = 2000
    assert choose(curves, budget).cost == pytest.approx(_brute_force(curves, budget), rel=1e-9)


@pytest.mark.parametrize("curve", [[], [(1, math.inf)], [(1, math.nan), (2, 0.0)], [(1, -math.inf)]])
def test_a_unit_without_a_usable_option_is_named(curve: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match="unit 1 "):
        choose([[(1, 0.0)], curve], 100)


def test_no_units_cost_nothing() -> None:
    assert choose([], 0) == Choice((), 0, 0.0, 0.0)


# ---- interpolated

_POINTS = st.lists(
    st.tuples(st.integers(0, 20) | st.integers(0, 10**10), st.just(0.0) | st.floats(1e-12, 2)), min_size=1, max_size=8
)
_AT = st.lists(st.integers(0, 25) | st.integers(0, 10**10), min_size=1, max_size=8)


@given(_POINTS, _AT)
@settings(max_examples=400, deadline=None)
def test_curves_go_through_the_measured_errors_and_never_rise(points: list[tuple[int, float]], at: list[int]) -> None:
    sizes, errors = [size for size, _ in points], [error for _, error in points]
    for size, value in zip(sizes, interpolated(sizes, errors, sizes), strict=True):
        assert value == min(error for other, error in points if other <= size)
    every = sorted([*at, *sizes])
    values = interpolated(sizes, errors, every)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    for size, value in zip(every, values, strict=True):
        assert (value == math.inf) == (size < min(sizes))
        assert size < max(sizes) or value == min(errors)


def test_the_logarithm_is_linear_in_between() -> None:
    assert interpolated([100, 300], [1e-1, 1e-3], [150, 200]) == pytest.approx([10**-1.5, 1e-2])


def test_towards_an_error_of_zero_the_error_itself_is_linear() -> None:
    assert interpolated([0, 100, 200], [0.4, 0.0, 0.0], [25, 50, 100, 150]) == pytest.approx([0.3, 0.2, 0.0, 0.0])


@pytest.mark.parametrize(
    ("sizes", "errors"), [([], []), ([1, 2], [0.1]), ([1], [-0.1]), ([1], [math.nan]), ([1], [math.inf])]
)
def test_what_is_no_curve_is_refused(sizes: list[int], errors: list[float]) -> None:
    with pytest.raises(ValueError, match="errors"):
        interpolated(sizes, errors, [1])
