"""One ranking of singular values and entries: against explicit inverses, greedy choice by hand, and what fits come to.

Where the inputs are uncorrelated an entry's worth is its energy exactly, so that a form's error is known beforehand.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import lexigram
from conftest import toy_folder
from drawn import correlated, gram_of, normal
from lexigram import LexigramError, Recipe
from lexigram.factors import DenseSpec, SumSpec
from lexigram.linalg.ranking import Limit, input_prices, ranked
from lexigram.methods import LowRankSparseConfig, SvdConfig, fit
from lexigram.methods.base import Estimate, estimates, ranks
from lexigram.methods.sums import sizes

AMOUNTS = [int((1 - step / 20) * 2 * 64 * 32) for step in range(1, 20)]


def test_prices_lie_between_those_of_wanda_and_of_the_brain_surgeon() -> None:
    gram = gram_of(correlated()).matrix
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(32)
    found, alone, others = input_prices(gram), damped.diagonal(), 1 / torch.linalg.inv(damped).diagonal()
    assert torch.allclose(found, (alone * others).sqrt())
    assert bool((others <= found * (1 + 1e-9)).all())
    assert bool((found <= alone * (1 + 1e-9)).all())
    even = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    assert torch.allclose(input_prices(even, damping=0.0), even.diagonal())


@pytest.mark.parametrize("level", [1.0, 40.0, 1e4])
def test_the_ranking_takes_what_is_worth_most_for_its_cost(level: float) -> None:
    """One part after the other by hand, until the next would be too dear."""
    values, entries = normal(5, seed=1).square().sort(descending=True).values * level, normal(6, 7, seed=2).square()
    costs = (13.0, 1.0)
    parts = [(float(worth), costs[0], True) for worth in values]
    parts += [(float(worth), costs[1], False) for worth in entries.flatten()]
    parts.sort(key=lambda part: -part[0] / part[1])
    limits = [Limit(total, *costs) for total in (-1.0, 0.0, 1.0, 13.0, 20.0, 60.0, 1000.0)]
    for limit, kept in zip(limits, ranked(values, entries, limits), strict=True):
        spent, taken = 0.0, []
        for part in parts:
            if spent + part[1] > limit.total:
                break
            spent, taken = spent + part[1], [*taken, part]
        assert (kept.values, kept.entries) == (sum(part[2] for part in taken), sum(not part[2] for part in taken))
        assert kept.worth == pytest.approx(sum(part[0] for part in taken), rel=1e-5)
    assert (kept.values, kept.entries) == (5, 42)


def test_of_uncorrelated_inputs_what_entries_are_worth_is_exact() -> None:
    """But for the share that a search is taken to win, which it cannot here: no entry makes up for another."""
    weight = normal(64, 32, seed=3)
    gram = gram_of(torch.linalg.qr(normal(400, 32, seed=4)).Q)
    config = LowRankSparseConfig(value_bits=16, damping=0.0)
    found = estimates(config, weight, gram, AMOUNTS)
    assert len(found) > 10
    energies = weight.square().flatten().sort(descending=True).values
    for form in found:
        rank, entries = sizes(form.spec)
        dropped = float(energies[entries:].sum() / energies.sum())
        assert rank == 0
        assert form.error == pytest.approx(0.85 * dropped, rel=1e-4, abs=5e-6)  # bfloat16
        _, report = fit(config, weight, gram, form.spec, torch.Generator())
        assert report.relative_error**2 == pytest.approx(dropped, rel=0.01, abs=1e-5)


def told(config: LowRankSparseConfig) -> list[tuple[Estimate, float]]:
    """Every form with its error as it is told, and as it is of a fit."""
    weight = normal(64, 32, seed=3) + 3 * normal(64, 2, seed=5) @ normal(2, 32, seed=6)
    gram = gram_of(correlated(decades=1.0))
    forms = estimates(config, weight, gram, AMOUNTS[8:17:4])
    return [
        (form, fit(form.method, weight, gram, form.spec, torch.Generator())[1].relative_error ** 2) for form in forms
    ]


def test_what_is_told_is_what_fits_come_to() -> None:
    for form, real in told(LowRankSparseConfig()):
        assert 0.4 < real / form.error < 2.5, form
        assert isinstance(form.spec, DenseSpec) == (form.method.name == "quantize")


def test_ranks_are_kept_where_the_weight_has_them() -> None:
    """Two of them; in the forms that may have ranks."""
    found = [form.spec for form, _ in told(LowRankSparseConfig(value_bits=4, rank_share=0.3))]
    beside = [spec for spec in found if isinstance(spec, SumSpec)]
    assert beside
    assert all(sizes(spec)[0] >= 2 for spec in beside)


def test_smaller_forms_lose_more() -> None:
    forms = estimates(LowRankSparseConfig(value_bits=4, rank_share=0.0), normal(64, 32), gram_of(correlated()), AMOUNTS)
    sparse = [form for form in forms if form.method.name != "quantize"]
    errors = [form.error for form in sorted(sparse, key=lambda form: form.spec.bytes)]
    assert errors == sorted(errors, reverse=True)
    assert len({form.spec.bytes for form in sparse}) == len(sparse)
    for amount in (each for each in AMOUNTS if each < max(form.spec.bytes for form in sparse)):
        assert min(abs(form.spec.bytes - amount) for form in sparse) < 64, amount


def test_only_methods_of_single_parts_are_ranked() -> None:
    assert ranks(LowRankSparseConfig())
    assert not ranks(SvdConfig())
    with pytest.raises(NotImplementedError, match="SvdConfig does not rank"):
        estimates(SvdConfig(), normal(4, 4), gram_of(normal(8, 4)), [16])
    weight = normal(64, 32)
    weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="1 values that are not finite"):
        estimates(LowRankSparseConfig(), weight, gram_of(correlated()), AMOUNTS)


def test_widths_that_no_group_divides_are_ranked_without_whole_matrices() -> None:
    """Scales of single values cost more than bfloat16."""
    cols = 131
    forms = estimates(LowRankSparseConfig(), normal(12, cols), gram_of(correlated(width=cols)), [12 * cols, 6 * cols])
    assert forms
    assert not any(form.method.name == "quantize" and form.method.value_bits == 8 for form in forms)  # type: ignore[attr-defined]


# --- over a whole model -----------------------------------------------------------------------------------------


def recipe(toy: Path, words: Path, ratio: float, **more: Any) -> Recipe:
    method = {"name": "lowrank-sparse", "rounds": 5, "sweeps": 1}
    calibration = {"text": [str(words)], "sequences": 4, "length": 32}
    settings = {"model": str(toy), "ratio": ratio, "method": method, "allocation": "global", "include": "*.1.*"}
    return Recipe.parse({**settings, "calibration": calibration, **more})


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.9])
def test_one_ranking_spends_the_budget_of_a_whole_model(ratio: float, words: Path, tmp_path: Path) -> None:
    toy = toy_folder(tmp_path / "toy", "llama")
    record = lexigram.compress(recipe(toy, words, ratio), tmp_path / "out", cache=tmp_path / "cache")
    allowed = int((1 - ratio) * record.bytes_before)
    assert 0.98 * allowed < record.bytes_after <= allowed
    again = lexigram.compress(recipe(toy, words, ratio), tmp_path / "again", cache=tmp_path / "cache")
    assert again.tensors_sha256 == record.tensors_sha256
    replayed = recipe(toy, words, ratio, allocation=str(tmp_path / "out" / "allocation.json"))
    assert lexigram.compress(replayed, tmp_path / "replayed").tensors_sha256 == record.tensors_sha256


@pytest.mark.slow
def test_where_layers_differ_so_do_their_budgets(words: Path, tmp_path: Path) -> None:
    """The knapsack and the ranking agree on which of two layers needs more, by the loss and by bytes alike."""
    toy = toy_folder(tmp_path / "toy", "llama")
    shares = {}
    for allocation in ("knapsack", "global"):
        record = lexigram.compress(recipe(toy, words, 0.7, allocation=allocation), tmp_path / allocation)
        shares[allocation] = [
            layer.factors.bytes / (layer.factors.rows * layer.factors.cols) for layer in record.layers
        ]
    one, other = (torch.tensor(shares[each]) for each in ("knapsack", "global"))
    assert float(torch.corrcoef(torch.stack([one, other]))[0, 1]) > 0.7


def test_what_the_ranking_cannot_do_is_refused_before_any_work(words: Path, tmp_path: Path) -> None:
    toy = toy_folder(tmp_path / "toy", "llama")
    for more, message in (
        ({"accounting": "paper"}, "the allocation global counts stored bytes"),
        ({"refine": 3}, "the allocation is global; leave refine out, or take the allocation knapsack"),
        ({"method": {"name": "oats"}}, "the allocation global is not for oats"),
    ):
        with pytest.raises(LexigramError, match=message):
            recipe(toy, words, 0.5, **more)
    with pytest.raises(LexigramError, match="too small: the smallest forms among which the allocation chooses"):
        lexigram.plan(recipe(toy, words, 0.999))
