"""The refinement of sizes and rank shares by losses: its gradient, its draws, and the runs that it changes.

The oracles: an integral over the Gaussian, losses known by construction, and the bytes of other runs.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import lexigram
from conftest import toy_folder
from lexigram import LexigramError, Recipe, curves, refinement
from lexigram.allocation.knapsack import choose
from lexigram.allocation.units import Unit
from lexigram.factors import GroupSpec, SumSpec
from lexigram.linalg.policy_gradient import GaussianPolicy, pair_gradient, update_by_pair
from lexigram.methods import LowRankSparseConfig
from lexigram.methods.sums import sum_spec
from lexigram.refinement import Moves, Offer, chosen, refine
from lexigram.running import Silent
from lexigram.tensorfiles import TensorFiles

Build = Callable[..., Recipe]
WEIGHTS, ALLOCATION = "lexigram.safetensors", "allocation.json"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("toy") / "llama", "llama")


@pytest.fixture(scope="module")
def recipe(toy: Path, words: Path) -> Build:
    def build(**changes: Any) -> Recipe:
        calibration = {"text": [str(words)], "sequences": 6, "length": 32, **changes.pop("calibration", {})}
        settings = {"model": str(toy), "ratio": 0.6, "device": "cpu", "compute_dtype": "float32", "measure": "relative"}
        method = {"name": "svd"}
        return Recipe.parse(
            {"method": method, "allocation": "knapsack", **settings, **changes, "calibration": calibration}
        )

    return build


def same_files(one: Path, other: Path) -> bool:
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in (WEIGHTS, ALLOCATION))


# --- the gradient ------------------------------------------------------------------------------------------------


def test_the_estimate_is_the_gradient_of_the_expected_loss() -> None:
    """One knapsack, two units: the dearer one gets the byte. The chance that it is the first is known."""
    curves = [(1.0, 0.0), (1.3, 0.0)]
    losses, mean, sigma = {0: 5.0, 1: 2.0}, torch.tensor([0.1, -0.2], dtype=torch.float64), 0.4

    def loss(costs: Tensor) -> float:
        """Whichever unit takes the larger form."""
        moved = [[(0, cost * math.exp(float(by))), (1, 0.0)] for (cost, _), by in zip(curves, costs, strict=True)]
        return losses[choose(moved, 1).picks.index(1)]

    policy = GaussianPolicy(mean, sigma)
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(4000):
        noise, up, down = policy.pair(generator)
        estimates.append(pair_gradient(noise, loss(up), loss(down), sigma))
    found = torch.stack(estimates)
    # First where theta_0 - theta_1 > log 1.3, a normal of deviation sigma sqrt(2); losses differ by 3.
    density = stats.norm.pdf(math.log(1.3), loc=0.3, scale=sigma * math.sqrt(2))
    exact = torch.tensor([3.0 * density, -3.0 * density], dtype=torch.float64)
    error = found.std(dim=0) / math.sqrt(len(found))
    assert ((found.mean(dim=0) - exact).abs() < 4 * error).all()
    assert (exact.abs() > 20 * error).all()


def test_a_step_follows_the_gradient_in_units_of_the_losses() -> None:
    noise = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    for scale in (1e-3, 1.0, 1e3):
        policy = GaussianPolicy(torch.zeros(1, 2, dtype=torch.float64), 0.5)
        update_by_pair(policy, noise, 3 * scale, 1 * scale, rate=0.1)
        assert torch.allclose(policy.mean, -0.1 * 0.5 * noise)
        update_by_pair(policy, noise, 1 * scale, 3 * scale, rate=0.1)
        assert policy.mean.abs().max() < 1e-12
    still = GaussianPolicy(torch.zeros(1, 2, dtype=torch.float64), 0.5)
    update_by_pair(still, noise, 2.0, 2.0, rate=0.1)
    assert not still.mean.any()


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_no_step(loss: float) -> None:
    policy = GaussianPolicy(torch.zeros(1, 2), 0.5)
    with pytest.raises(ValueError, match="not finite"):
        update_by_pair(policy, torch.ones(1, 2), loss, 1.0, rate=0.1)


# --- what the numbers change -------------------------------------------------------------------------------------


def offers_of(costs: list[list[tuple[int, int, float]]], shape: tuple[int, int] = (32, 32)) -> list[list[Offer]]:
    """Units with forms of (rank, entries, cost)."""
    found = []
    for index, forms in enumerate(costs):
        unit = []
        for rank, entries, cost in forms:
            spec = GroupSpec(members=(sum_spec(shape, rank, entries, 16, 128),))
            unit.append(Offer(Unit(members=(str(index),), method=LowRankSparseConfig(), spec=spec), cost))
        found.append(unit)
    return found


def moves_of(offers: list[list[Offer]], amount: int) -> Callable[..., list[int]]:
    """Which form each unit takes, by the sizes' logarithms and the rank shares' changes."""
    moved = Moves(offers, chosen(offers, amount), amount)

    def picks(sizes: list[float], shares: list[float] | None = None) -> list[int]:
        taken = moved(torch.tensor([sizes, shares or [0.0] * len(sizes)], dtype=torch.float64))
        assert sum(offer.unit.spec.bytes for offer in taken) <= amount
        return [unit.index(offer) for unit, offer in zip(offers, taken, strict=True)]

    return picks


def test_sizes_move_against_each_other_within_the_budget() -> None:
    offers = offers_of([curve(1.0)] * 3)
    amount = sum(unit[8].unit.spec.bytes for unit in offers)
    picks = moves_of(offers, amount)
    assert picks([0.0, 0.0, 0.0]) == [8, 8, 8]
    assert picks([0.7, 0.7, 0.7]) == [8, 8, 8]
    first, second, third = picks([0.5, 0.0, -0.5])
    assert first > second > third
    assert first + second + third > 3 * 8 - 3
    assert picks([9.0, 0.0, 0.0])[0] == len(offers[0]) - 1


def test_shares_move_units_to_forms_with_ranks_and_back() -> None:
    """The second unit is where the knapsack has put ranks; the third knows none."""
    both = [(0, entries, math.exp(-entries / 200)) for entries in range(50, 1000, 50)]
    dearer = [(3, entries, 0.9 * cost) for _, entries, cost in both]
    beside = [(3, entries, 0.1 * cost) for _, entries, cost in both]
    offers = offers_of([both + dearer, both + beside, both])
    amount = sum(unit[10].unit.spec.bytes for unit in offers)
    ranks = [
        unit[pick].unit.spec.members[0].form
        for unit, pick in zip(offers, moves_of(offers, amount)([0.0] * 3), strict=True)
    ]
    assert ranks == ["sparse", "sum", "sparse"]

    def forms(shares: list[float]) -> list[str]:
        taken = moves_of(offers, amount)([0.0] * 3, shares)
        return [unit[pick].unit.spec.members[0].form for unit, pick in zip(offers, taken, strict=True)]

    assert forms([0.5, 0.0, 0.5]) == ["sum", "sum", "sparse"]
    assert forms([0.0, -0.5, -0.5]) == ["sparse", "sparse", "sparse"]


def test_where_nothing_moves_the_allocation_is_the_knapsacks() -> None:
    """Also where the forms of one unit have low-rank parts of several shares."""
    wide = (576, 576)
    forms = [
        (rank, entries, math.exp(-entries / 1e5 - 0.2 * rank))
        for rank in (0, 4, 12)
        for entries in range(10**4, 3 * 10**5, 10**4)
    ]
    offers = offers_of([forms, [(rank, entries, 3 * cost) for rank, entries, cost in forms]], wide)
    for share in (0.1, 0.2, 0.4):
        amount = int(share * 2 * 2 * 576 * 576)
        first = chosen(offers, amount)
        assert any(isinstance(offer.unit.spec.members[0], SumSpec) for offer in first)
        found = Moves(offers, first, amount)(torch.zeros(2, 2, dtype=torch.float64))
        assert sum(offer.cost for offer in found) == pytest.approx(sum(offer.cost for offer in first))


def test_what_has_no_room_for_ranks_goes_without() -> None:
    offers = offers_of([[(0, 50, 3.0), (3, 300, 1.0)], [(0, 50, 3.0), (0, 200, 1.0)]])
    amount = offers[0][0].unit.spec.bytes + offers[1][1].unit.spec.bytes
    assert moves_of(offers, amount)([0.0, 0.0], [1.0, 0.0]) == [0, 1]


class Loss:
    """In the place of a model's: known from the entries that the allocation in trial has given each unit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, truth: list[float]) -> None:
        self.truth = truth
        self.tried: list[dict[str, Tensor]] = []
        monkeypatch.setattr("lexigram.calibration.loss.summed_loss", self)

    def __call__(self, _model: Any, tokens: Tensor, _dtype: Any, weights: Mapping[str, Tensor]) -> Tensor:
        self.tried.append(dict(weights))
        lost = sum(self.truth[int(name)] * float(error) for name, error in weights.items())
        return torch.tensor(tokens.shape[0] * (tokens.shape[1] - 1) * lost, dtype=torch.float64)


@pytest.fixture
def plan_of(recipe: Build) -> Callable[[int], Any]:
    return lambda steps: lexigram.plan(recipe(refine=steps, seed=1))


def curve(level: float) -> list[tuple[int, int, float]]:
    """Entries of a unit whose error falls with them."""
    return [(0, entries, level * math.exp(-entries / 200)) for entries in range(50, 1000, 50)]


def test_bytes_move_to_a_unit_whose_curve_lies(plan_of: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All units cost the same, and the loss feels one of them twenty times as much. Every draw is within the budget."""
    offers = offers_of([curve(1.0)] * 4)
    amount = sum(unit[5].unit.spec.bytes for unit in offers)
    loss = Loss(monkeypatch, [1.0, 1.0, 20.0, 1.0])
    sizes: list[int] = []

    class Spy(Moves):
        def __call__(self, moves: Tensor) -> list[Offer]:
            found = super().__call__(moves)
            sizes.append(sum(offer.unit.spec.bytes for offer in found))
            return found

    monkeypatch.setattr(refinement, "Moves", Spy)
    model, ids = torch.nn.Linear(1, 1), torch.zeros(8, 16, dtype=torch.long)

    def weights(offer: Offer) -> dict[str, Tensor]:
        return {offer.unit.members[0]: torch.tensor(offer.cost)}

    refined = refine(plan_of(60), offers, amount, weights, model, ids, Silent())
    first = refinement.allocated(offers, amount)
    own = [unit.spec.bytes for unit in refined.units]
    assert [unit.spec.bytes for unit in first.units] == [own_bytes(offers, 5)] * 4
    assert own[2] == max(own)
    assert own[2] > own_bytes(offers, 6)
    assert refined.bytes <= amount
    assert len(sizes) >= 2 * 60
    assert max(sizes) <= amount
    assert min(sizes) > amount - (own_bytes(offers, 6) - own_bytes(offers, 5))
    assert len(loss.tried) > 2 * 60


def own_bytes(offers: list[list[Offer]], at: int) -> int:
    return offers[0][at].unit.spec.bytes


@pytest.mark.parametrize("worse", [False, True])
def test_the_outcome_is_taken_only_if_what_was_held_back_loses_no_more(
    worse: bool, plan_of: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of ones are held back; on them the other unit matters, or the same."""
    offers = offers_of([curve(1.0)] * 2)
    amount = sum(unit[5].unit.spec.bytes for unit in offers)

    def loss(_model: Any, tokens: Tensor, _dtype: Any, weights: Mapping[str, Tensor]) -> Tensor:
        heavy = "1" if worse and bool(tokens.any()) else "0"
        lost = sum((30.0 if name == heavy else 1.0) * float(error) for name, error in weights.items())
        return torch.tensor(lost, dtype=torch.float64)

    monkeypatch.setattr("lexigram.calibration.loss.summed_loss", loss)
    ids = torch.zeros(8, 16, dtype=torch.long)
    ids[:: refinement.HELD_BACK] = 1
    told = Told()

    def weights(offer: Offer) -> dict[str, Tensor]:
        return {offer.unit.members[0]: torch.tensor(offer.cost)}

    found = refine(plan_of(30), offers, amount, weights, torch.nn.Linear(1, 1), ids, told)
    first = refinement.allocated(offers, amount)
    assert (found == first) == worse
    assert ("the first allocation" if worse else "the refined allocation") in told.stages[-1]


class Told(Silent):
    """Stages by name."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, name: str, total: int) -> Any:
        self.stages.append(name)
        return super().stage(name, total)


# --- whole runs --------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "svd": {},
    "quantize": {"method": {"name": "quantize"}, "include": ["*.1.*"]},
    "lowrank-sparse": {
        "method": {"name": "lowrank-sparse", "rounds": 2, "sweeps": 1},
        "include": ["*.1.*"],
        "ratio": 0.75,
    },
    "site": {"share": "site"},
    "matched": {"share": "matched", "measure": "absolute"},
    "sequential": {"sequential": True, "include": ["*.1.*"]},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "quantize" else pytest.mark.slow) for name in RUNS]
)
def test_a_refined_run_keeps_the_budget_repeats_and_replays(name: str, recipe: Build, tmp_path: Path) -> None:
    settings = recipe(refine=2, **RUNS[name])
    told = Told()
    record = lexigram.compress(settings, tmp_path / "one", progress=told)
    assert record.bytes_after <= int((1 - settings.ratio) * record.bytes_before)
    assert any("allocation, of losses" in stage for stage in told.stages)
    lexigram.compress(settings, tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")
    kept = {**RUNS[name], "share": "none", "allocation": str(tmp_path / "one" / ALLOCATION)}
    lexigram.compress(recipe(**kept), tmp_path / "again")
    assert same_files(tmp_path / "one", tmp_path / "again")
    assert {file.name for file in tmp_path.iterdir()} == {"one", "two", "again"}


def test_sketches_are_made_once_and_weigh_what_the_curve_says(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draw's error in the metric of the Gram is that of the curve at the size of its form."""
    made: list[str] = []
    put = TensorFiles.put

    def note(self: TensorFiles, name: str, *rest: Any) -> None:
        made.append(name)
        put(self, name, *rest)

    monkeypatch.setattr(TensorFiles, "put", note)
    tried: list[Offer] = []
    cache = tmp_path / "cache"
    settings = recipe(refine=2)
    original = curves._Sketches.weight

    def weigh(self: Any, offer: Offer) -> dict[str, Tensor]:
        found = original(self, offer)
        tried.append(offer)
        for name, weight in found.items():
            with self._store.using([self._targets[name].site]) as grams:
                whitening = grams[self._targets[name].site].whitening
                own = self._original(name).float()
                error = float((whitening.whiten(weight - own).norm() / whitening.whiten(own).norm()) ** 2)
            # With the measure `relative`, a unit of one matrix costs its squared error.
            assert error == pytest.approx(offer.cost, rel=0.02)
        return found

    monkeypatch.setattr(curves._Sketches, "weight", weigh)
    lexigram.compress(settings, tmp_path / "one", prepared=lexigram.plan(settings, cache=cache))
    assert tried
    sketches = [name for name in made if len(name) == 32]
    assert sketches
    assert len(sketches) == len(set(sketches))
    made.clear()
    lexigram.compress(settings, tmp_path / "two", prepared=lexigram.plan(settings, cache=cache))
    assert not made
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_without_steps_nothing_is_tried(recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes as those of the knapsack under its own costs."""
    lexigram.compress(recipe(refine=0), tmp_path / "plain")
    monkeypatch.setattr("lexigram.calibration.loss.summed_loss", lambda *_: torch.tensor(1.0))
    monkeypatch.setattr(refinement, "RATE", 0.0)
    lexigram.compress(recipe(refine=1), tmp_path / "unmoved")
    assert same_files(tmp_path / "plain", tmp_path / "unmoved")
    monkeypatch.setattr("lexigram.curves.refine", lambda *_: pytest.fail("refined"))
    lexigram.compress(recipe(), tmp_path / "off")
    assert same_files(tmp_path / "plain", tmp_path / "off")


def test_a_loss_that_is_not_finite_ends_in_a_sentence(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lexigram.calibration.loss.summed_loss", lambda *_: torch.tensor(math.nan))
    with pytest.raises(
        LexigramError,
        match="the loss of a model with sketches is nan; lower the ratio, or leave --refine",
    ):
        lexigram.compress(recipe(refine=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allocation": "uniform"}, "the allocation is uniform; leave refine out, or take the allocation knapsack"),
        ({"allocation": "mine.json"}, "the allocation is mine.json; leave refine out"),
        ({"allocation": "global", "method": {"name": "cap"}}, "the allocation is global; leave refine out$"),
        ({"allocation": "uniform", "method": {"name": "structured"}}, "the allocation is uniform; leave refine out$"),
        ({"calibration": {"sequences": 1}}, "holds a sequence back to judge by; calibrate on 2 sequences or more"),
        ({"refine": -1}, "refine is -1; it should be greater than or equal to 0"),
    ],
    ids=str,
)
def test_what_cannot_be_refined(changes: dict[str, Any], message: str, recipe: Build) -> None:
    with pytest.raises(LexigramError, match=message):
        recipe(**{"refine": 3, **changes})


def test_the_plan_reckons_with_sketches_and_drawn_weights(recipe: Build, tmp_path: Path) -> None:
    without, refined = lexigram.plan(recipe(ratio=0.5)), lexigram.plan(recipe(ratio=0.5, refine=4))
    weights = sum(target.weight_count for target in refined.targets)
    assert 2 * weights <= refined.disk_bytes - without.disk_bytes <= 40 * weights
    assert refined.memory.keys() - without.memory.keys() == {"try models out"}
    assert refined.memory_bytes >= refined.memory["try models out"] >= 4 * weights
    cached = [lexigram.plan(recipe(ratio=0.5, refine=steps), cache=tmp_path).disk_bytes for steps in (0, 4)]
    assert cached[0] == cached[1]
