"""The choice among the parts of all decomposed weights: budgets, the ranking itself, the policy's steps, the loss that it sees.

The oracles: a ranking in numpy, robust PCA's own parts, the loss that transformers computes, and sizes of files.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lexigram
from conftest import TOYS, build_toy, toy_folder, words_tokenizer
from lexigram import LexigramError, Plan, Recipe, choice
from lexigram.allocation.units import Allocation
from lexigram.calibration.loss import summed_divergence, summed_loss
from lexigram.calibration.store import GramStore
from lexigram.choice import Chosen, choose_parts
from lexigram.factors import ProductSpec, SparseSpec, SumSpec
from lexigram.gram import Gram
from lexigram.linalg.policy_gradient import update
from lexigram.linalg.robust_pca import robust_pca
from lexigram.methods import CapConfig
from lexigram.methods.base import Candidates, assemble, decompose
from lexigram.methods.cap import DECOMPOSING
from lexigram.methods.sums import sizes
from lexigram.running import Silent
from lexigram.targets import find_targets, weight_of
from lexigram.tensorfiles import TensorFiles
from lexigram.workers import Workers

QUICK: dict[str, Any] = {"name": "cap", "iterations": 12, "passes": 0}
"""Enough rounds of robust PCA for low rank and sparse parts of all kinds."""

WEIGHTS = "lexigram.safetensors"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers with something of low rank in them, of which some outputs, and some inputs, are larger than others. 131 inputs
    of a down projection can be parted into groups of one only.
    """
    folder = tmp_path_factory.mktemp("toy") / "llama"
    config = TOYS["llama"]()
    config.intermediate_size = 131
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for target in find_targets(model):
                weight = model.get_submodule(target.name).weight
                left, right = torch.randn(weight.shape[0], 3), torch.randn(3, weight.shape[1])
                weight.add_(0.02 * left @ right).mul_(torch.linspace(0.5, 2, len(weight))[:, None])
                weight.mul_(2.0 ** (len(target.name) % 3))
    model.save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(toy: Path, words: Path) -> Callable[..., Recipe]:
    def build(**changes: Any) -> Recipe:
        method = changes.pop("method", {})
        method = method if "name" in method else {**QUICK, **method}
        calibration = {"text": [str(words)], "sequences": 6, "length": 24}
        settings = {"model": str(toy), "ratio": 0.5, "device": "cpu", "compute_dtype": "float32", "method": method}
        return Recipe.parse({**settings, **changes, "calibration": calibration})

    return build


class Case:
    """A plan with its model, its tokens and Grams of random inputs."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.plan: Plan = lexigram.plan(recipe)
        self.model: PreTrainedModel = self.plan.source.model(self.plan.device)
        self.grams = GramStore(folder / "grams", torch.device("cpu"))
        self.folder = folder
        for number, (site, width) in enumerate(sorted({(t.site, t.shape[1]) for t in self.plan.targets})):
            X = normal(200, width, seed=number) * torch.logspace(0, -1, width)
            self.grams.update({site: Gram((X.T @ X).double(), 200)})

    def weight(self, name: str) -> Tensor:
        return weight_of(self.model.get_submodule(name)).detach()

    def gram(self, site: str) -> Gram:
        with self.grams.using([site]) as grams:
            return grams[site]

    def chosen(self, name: str = "parts") -> Chosen:
        assert self.plan.tokens is not None
        ids = self.plan.tokens.ids
        shutil.rmtree(self.folder / name, ignore_errors=True)
        with Workers() as pool:
            return choose_parts(self.plan, self.weight, self.grams, self.folder / name, self.model, ids, pool, Silent())

    def parts(self, name: str) -> Any:
        """Robust PCA of a weight by itself."""
        config = self.plan.recipe.method
        assert isinstance(config, CapConfig)
        return robust_pca(self.weight(name), weight=config.sparse_weight, iterations=config.iterations)


@pytest.fixture
def case(recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Case]:
    return lambda **changes: Case(recipe(**changes), tmp_path)


def same(one: Chosen, other: Chosen) -> bool:
    return one.allocation == other.allocation and all(
        torch.equal(mine, its)
        for name in one.allocation.specs
        for mine, its in zip(one.of(name), other.of(name), strict=True)
    )


# --- budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize(
    ("method", "ratio"),
    [
        ({}, 0.5),
        ({"score": "energy"}, 0.3),
        ({"per_bit": False}, 0.5),
        ({"first": "uniform"}, 0.5),  # equal ones go by position: every singular value before any entry
        ({"value_bits": 12, "score": "magnitude"}, 0.6),
        ({"value_bits": 8}, 0.75),
        ({"value_bits": 8, "value_group": 48, "first": "uniform"}, 0.6),  # 64 inputs are in groups of 32
        ({"value_bits": 4, "per_bit": False, "together": True}, 0.85),
    ],
    ids=str,
)
def test_bytes_are_never_exceeded_and_nearly_spent(
    method: dict[str, Any], ratio: float, allocation: str, case: Callable[..., Case]
) -> None:
    made = case(method=method, ratio=ratio, allocation=allocation)
    found = made.chosen().allocation
    kept = [(found.specs[target.name].bytes, target.dense_bytes) for target in made.plan.targets]
    if allocation == "uniform":
        assert all(after <= int((1 - ratio) * before) for after, before in kept)
    allowed = int((1 - ratio) * made.plan.bytes_before)
    assert 0.97 * allowed < found.bytes <= allowed
    assert found.bytes <= made.plan.bytes_after


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("method", [{}, {"value_bits": 8}], ids=str)
def test_the_papers_parameters_are_spent_to_the_last(
    method: dict[str, Any], allocation: str, case: Callable[..., Case]
) -> None:
    """Indices and bits are not counted, so that any entry fits into what is left."""
    made = case(method=method, allocation=allocation, accounting="paper")
    found = made.chosen().allocation
    kept = {target: found.specs[target.name].parameters for target in made.plan.targets}
    if allocation == "uniform":
        assert all(count == int(0.5 * target.weight_count) for target, count in kept.items())
    else:
        assert sum(kept.values()) == int(0.5 * sum(target.weight_count for target in kept))
        assert len({round(count / target.weight_count, 2) for target, count in kept.items()}) > 2
    assert found.bytes <= made.plan.bytes_after
    for target in kept:
        rank, entries = sizes(found.specs[target.name])
        assert kept[target] == rank * sum(target.shape) + entries


@pytest.mark.parametrize("ratio", [0.93, 0.95, 0.98])
def test_a_budget_without_room_for_bitmasks_is_spent_on_listed_entries(case: Callable[..., Case], ratio: float) -> None:
    made = case(ratio=ratio)
    found = made.chosen().allocation
    assert 0.9 * made.plan.bytes_after <= found.bytes <= made.plan.bytes_after


def test_a_budget_without_room_for_any_index_is_refused(case: Callable[..., Case]) -> None:
    with pytest.raises(LexigramError, match=r"budget of \d+ bytes is too small for cap: .*index.*lower the ratio"):
        case(ratio=0.9999).chosen()


# --- the ranking -------------------------------------------------------------------------------------------------


def ranked(case: Case, config: CapConfig, room: float) -> dict[str, tuple[Any, Any]]:
    """What stays of every weight within so many bits of values, from first scores in numpy and one walk down their ranking:
    bool (r,) and (out, in).
    """
    tensors: list[tuple[str, int, Any, float]] = []
    for target in case.plan.targets:
        found = case.parts(target.name)
        strength = np.sqrt(case.gram(target.site).matrix.diagonal().numpy())
        values, right, entries = (part.double().numpy() for part in (found.values, found.right, found.sparse))
        if config.score != "wanda":
            strength = np.ones_like(strength)
        costs = 2.0 * 8 * sum(target.shape), 16.0
        energies = values**2 * (right**2 * strength**2).sum(1), (entries * strength)[entries != 0] ** 2
        if config.per_bit:
            whole = (found.low_rank + found.sparse).double().numpy() * strength
            energies = tuple(each / cost / (whole**2).mean() for each, cost in zip(energies, costs, strict=True))
        tensors += [
            (target.name, kind, energies[kind] ** (1 if config.score == "energy" else 0.5), costs[kind])
            for kind in (0, 1)
        ]
    if config.first == "sigmoid":
        pool = np.concatenate([scores for _, _, scores, _ in tensors])
        level = (lambda scores: pool) if config.together or config.per_bit else (lambda scores: scores)
        tensors = [(n, k, 1 / (1 + np.exp(-(s - level(s).mean()) / level(s).std())), c) for n, k, s, c in tensors]
    else:
        tensors = [(n, k, 0.05 + 0.9 * s / s.max(), c) for n, k, s, c in tensors]
    keys = np.concatenate([s for _, _, s, c in tensors])
    costs = np.concatenate([np.full(len(s), c) for _, _, s, c in tensors])
    kept = np.zeros(len(keys), bool)
    for index in np.argsort(-keys.astype(np.float32), kind="stable"):
        if costs[index] <= room:
            kept[index], room = True, room - costs[index]
    parts = np.split(kept, np.cumsum([len(s) for _, _, s, _ in tensors])[:-1])
    found_masks: dict[str, tuple[Any, Any]] = {}
    for target, values, chosen in zip(case.plan.targets, parts[::2], parts[1::2], strict=True):
        support = (case.parts(target.name).sparse != 0).numpy()
        support[support] = chosen
        found_masks[target.name] = values, support
    return found_masks


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"score": "magnitude"},
        {"score": "energy"},
        {"per_bit": False},
        {"per_bit": False, "score": "magnitude"},
        {"per_bit": False, "score": "energy", "first": "largest"},
        {"per_bit": False, "together": True},
    ],
    ids=str,
)
def test_without_passes_the_best_first_scores_stay(method: dict[str, Any], case: Callable[..., Case]) -> None:
    made = case(method=method)
    config = made.plan.recipe.method
    assert isinstance(config, CapConfig)
    chosen = made.chosen()
    # Of what a walk keeps, nothing else is kept where there is no more room than for that.
    wanted = ranked(made, config, 16.0 * sum(spec.parameters for spec in chosen.allocation.specs.values()))
    differing = total = 0
    for target in made.plan.targets:
        values, support = wanted[target.name]
        parts = chosen.of(target.name)
        left = made.parts(target.name).values.numpy()
        differing += int((np.isin(left, parts.values.numpy()) != values).sum())
        differing += int((parts.support.numpy() != support).sum())
        total += len(parts.values) + len(parts.entries)
    # A sigmoid in float32 may put neighbours in the other order: of hundreds those at the very end of the ranking.
    assert total > 500
    assert differing <= 4


def test_what_stays_is_what_robust_pca_found(case: Callable[..., Case]) -> None:
    """Chosen with the policy or without, stored it differs by the rounding to bfloat16 only."""
    made = case(method={"passes": 1, "batch": 2})
    chosen = made.chosen()
    for unit in chosen.allocation.units:
        (name,), (spec,) = unit.members, unit.spec.members
        whole, parts = made.parts(name), chosen.of(name)
        assert sizes(spec) == (len(parts.values), len(parts.entries))
        assert torch.equal(parts.entries, whole.sparse[parts.support])
        places = [int((whole.values == value).nonzero()[0]) for value in parts.values]
        assert len(set(places)) == len(places)
        low_rank = (whole.left[:, places] * whole.values[places]) @ whole.right[places]
        assert torch.allclose(parts.to_dense(), low_rank + whole.sparse * parts.support, atol=1e-6)
        target = next(target for target in made.plan.targets if target.name == name)
        factors, _ = assemble(unit.method, made.weight(name), made.gram(target.site), parts, spec)
        assert factors.spec == spec
        factors.check()
        error = (factors.to_dense() - parts.to_dense()).norm() / parts.to_dense().norm()
        assert error < 2**-8


def test_a_weight_may_be_left_with_one_kind_of_parts(case: Callable[..., Case]) -> None:
    """Where robust PCA finds nothing sparse, or nothing of low rank."""
    for weight, form in ((10.0, ProductSpec), (1e-5, SparseSpec)):
        made = case(method={"sparse_weight": weight, "iterations": 60}, include=["q_proj", "down_proj"])
        chosen = made.chosen()
        for unit in chosen.allocation.units:
            (name,), (spec,) = unit.members, unit.spec.members
            assert isinstance(spec, form)
            site = next(target.site for target in made.plan.targets if target.name == name)
            factors, report = assemble(unit.method, made.weight(name), made.gram(site), chosen.of(name), spec)
            dense = chosen.of(name).to_dense()
            assert (factors.to_dense() - dense).norm() < 2**-7 * dense.norm()
            assert 0 < report.relative_error < 1


# --- the policy --------------------------------------------------------------------------------------------------

MOVING = {"passes": 1, "batch": 2, "rate": 0.5}


def test_the_policy_moves_the_choice_and_a_seed_repeats_it(case: Callable[..., Case]) -> None:
    include = ["*.0.mlp.*", "q_proj"]
    still = case(include=include).chosen("still")
    made = case(method=MOVING, include=include)
    before = {name: parameter.clone() for name, parameter in made.model.named_parameters()}
    moved, again = made.chosen("moved"), made.chosen("again")
    assert same(moved, again)
    assert not same(moved, still)
    other = case(method=MOVING, include=include, seed=7).chosen("other")
    assert not same(moved, other)
    assert all(torch.equal(parameter, before[name]) for name, parameter in made.model.named_parameters())


@pytest.mark.parametrize(("objective", "real"), [("tokens", summed_loss), ("kl", summed_divergence)])
def test_every_pass_sees_every_sequence_with_weights_drawn_anew(
    objective: str, real: Callable[..., Tensor], case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = case(method={"passes": 2, "batch": 4, "objective": objective}, include=["q_proj"])
    seen: list[tuple[Tensor, dict[str, Tensor]]] = []

    def spy(model: Any, tokens: Tensor, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> Tensor:
        seen.append((tokens, dict(weights)))
        return real(model, tokens, dtype, weights)

    monkeypatch.setattr(f"lexigram.calibration.loss.{real.__name__}", spy)
    made.chosen()
    assert made.plan.tokens is not None
    ids = made.plan.tokens.ids
    # The draw that tells the first baseline, then the passes.
    assert torch.equal(torch.cat([tokens for tokens, _ in seen]), torch.cat([ids[:4], ids, ids]))
    names = {target.name for target in made.plan.targets}
    assert all(weights.keys() == names for _, weights in seen)
    first = [weights["model.layers.0.self_attn.q_proj"] for _, weights in seen]
    same_as_before = [torch.equal(mine, its) for mine, its in pairwise(first)]
    # Steps of four and of two sequences, twice: a draw for each.
    baseline = [True, True, True, False]
    assert same_as_before == [*baseline, True, True, True, False, True, False, True, True, True, False, True]


def test_a_step_is_taken_from_all_models_that_are_drawn_for_it(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = case(method={"passes": 1, "batch": 6, "samples": 3}, include=["q_proj"])
    drawn: list[tuple[list[Tensor], list[float]]] = []

    def spy(policy: Any, masks: Any, losses: Any, **settings: Any) -> None:
        drawn.append(([sample[0].clone() for sample in masks], list(losses)))
        assert policy.baseline not in losses  # of the models drawn before, their mean
        update(policy, masks, losses, **settings)

    monkeypatch.setattr(choice, "update", spy)
    made.chosen()
    ((masks, losses),) = drawn
    assert len(masks) == len(losses) == len(set(losses)) == 3
    assert not any(torch.equal(one, other) for one, other in pairwise(masks))


@pytest.mark.parametrize("passes", [1, 3])
def test_one_batch_is_a_step_each_pass(passes: int, case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(method={"passes": passes, "batch": 6}, include=["q_proj"])
    calls = count()
    steps: list[tuple[float | None, float]] = []

    def loss(model: Any, tokens: Tensor, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> Tensor:
        told = (3.0, 4.0, 2.5, 1.0)[next(calls) // 6]  # six sequences, one after another
        return torch.tensor((tokens.shape[1] - 1) * told)

    def spy(policy: Any, masks: Any, losses: Any, **options: Any) -> None:
        steps.append((policy.baseline, losses[0]))
        update(policy, masks, losses, **options)

    monkeypatch.setattr("lexigram.calibration.loss.summed_loss", loss)
    monkeypatch.setattr(choice, "update", spy)
    made.chosen()
    wanted = [(3.0, 4.0), (3.2, 2.5), (3.06, 1.0)]
    assert len(steps) == passes
    for found, expected in zip(steps, wanted[:passes], strict=True):
        assert found == pytest.approx(expected)


def test_the_policy_leaves_out_what_the_loss_is_better_without(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of entries alone, all as likely at first, those of two rows are made to do nothing but harm."""
    method = {"passes": 40, "batch": 1, "rate": 0.3, "first": "uniform", "sparse_weight": 1e-4, "eps": 1e-8}
    made = case(method=method, include=["*.0.*.down_proj"])
    (name,) = (target.name for target in made.plan.targets)
    support = made.parts(name).sparse != 0

    def loss(model: Any, tokens: Tensor, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> Tensor:
        return (tokens.shape[1] - 1) * (weights[name][:2] != 0).sum() / support[:2].sum()

    monkeypatch.setattr("lexigram.calibration.loss.summed_loss", loss)
    kept = made.chosen().of(name).support
    harmful, others = (float(kept[rows].sum() / support[rows].sum()) for rows in (slice(2), slice(2, None)))
    assert harmful < 0.8 * others


def test_a_loss_that_is_not_finite_ends_in_a_sentence(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lexigram.calibration.loss.summed_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(LexigramError, match=r"loss of a model with parts drawn at random is nan; .*--passes 0"):
        case(method={"passes": 1}, include=["q_proj"]).chosen()


# --- whole runs --------------------------------------------------------------------------------------------------


def test_a_refit_never_raises_an_error_and_leaves_the_forms(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    runs = {refit: lexigram.compress(recipe(method={"refit": refit}), tmp_path / str(refit)) for refit in (False, True)}
    for plain, moved in zip(runs[False].layers, runs[True].layers, strict=True):
        assert plain.factors == moved.factors
        assert moved.fit.relative_error < plain.fit.relative_error
    assert runs[True].mean_relative_error < 0.9 * runs[False].mean_relative_error


@pytest.mark.parametrize("passes", [0, 1])
def test_a_replayed_allocation_gives_the_same_forms(passes: int, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """What stays is then the best by first scores, as it is without passes: the same bytes."""
    wanted = recipe(method={"passes": passes, "batch": 2}, ratio=0.4)
    record = lexigram.compress(wanted, tmp_path / "first")
    file = tmp_path / "first" / "allocation.json"
    again = lexigram.compress(recipe(allocation=str(file), ratio=0.8), tmp_path / "again")
    assert [layer.factors for layer in again.layers] == [layer.factors for layer in record.layers]
    assert {SumSpec} == {type(spec) for spec in Allocation.read(file).specs.values()}
    assert (tmp_path / "again" / "allocation.json").read_bytes() == file.read_bytes()
    first, second = (load_file(tmp_path / part / WEIGHTS) for part in ("first", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first) == (passes == 0)


def test_a_form_with_more_parts_than_there_are_is_refused(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    lexigram.compress(recipe(include=["q_proj"]), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "allocation.json").read_text())
    content["units"][0]["spec"]["members"][0]["right"]["nonzeros"] = 64 * 64
    (tmp_path / "mine.json").write_text(json.dumps(content))
    replayed = recipe(include=["q_proj"], allocation=str(tmp_path / "mine.json"))
    with pytest.raises(
        LexigramError, match=r"q_proj cannot be compressed: the form has .* 4096 entries, and robust PCA"
    ):
        lexigram.compress(replayed, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_parts_are_beside_the_output_and_go_away(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    seen: list[Path] = []
    put = TensorFiles.put

    def note(self: TensorFiles, *args: Any, **options: Any) -> None:
        put(self, *args, **options)
        seen.append(self.folder)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TensorFiles, "put", note)
        lexigram.compress(recipe(include=["q_proj"]), tmp_path / "out")
    assert set(seen) == {tmp_path / "out.unfinished" / name for name in ("grams", "parts")}
    assert {file.name for file in tmp_path.iterdir()} == {"out"}


def test_cached_parts_serve_other_ratios_seeds_and_forms(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no run leaves them other than it found them: the results are those of runs without a cache."""
    made: list[tuple[int, ...]] = []

    def spy(config: CapConfig, weight: Tensor, gram: Gram) -> Candidates:
        made.append(tuple(weight.shape))
        return decompose(config, weight, gram)

    monkeypatch.setattr(choice, "decompose", spy)
    changes: list[dict[str, Any]] = [
        {"include": ["q_proj"]},
        {"include": ["q_proj"], "ratio": 0.7},
        {"include": ["q_proj"], "seed": 3, "method": {"value_bits": 8, "score": "energy", "passes": 1}},
        {"include": ["q_proj", "k_proj"]},  # two more
        {"include": ["q_proj"], "method": {"iterations": 13}},  # parts of its own
    ]
    for number, (each, new) in enumerate(zip(changes, (2, 0, 0, 2, 2), strict=True)):
        before = len(made)
        lexigram.compress(recipe(**each), tmp_path / f"cached-{number}", cache=tmp_path / "cache")
        assert len(made) - before == new
        lexigram.compress(recipe(**each), tmp_path / f"alone-{number}")
        one, other = (load_file(tmp_path / f"{kind}-{number}" / WEIGHTS) for kind in ("cached", "alone"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert len(list((tmp_path / "cache").glob("parts-*"))) == 2


@pytest.mark.slow
def test_workers_split_the_weights_and_change_no_byte(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(choice, "decompose", lambda *_: pytest.fail("split in this process"))
        lexigram.compress(recipe(), tmp_path / "two", workers=Workers(2))
    lexigram.compress(recipe(), tmp_path / "one", workers=Workers(1))
    assert (tmp_path / "two" / WEIGHTS).read_bytes() == (tmp_path / "one" / WEIGHTS).read_bytes()


def test_other_weights_have_other_parts(recipe: Callable[..., Recipe], toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy, tmp_path / "toy")
    file = tmp_path / "toy" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    for number, model in enumerate((toy, tmp_path / "toy")):
        changed = recipe(model=str(model), include=["q_proj"])
        lexigram.compress(changed, tmp_path / str(number), cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("parts-*"))) == 2


@pytest.mark.parametrize("damage", ["truncated", "of another weight", "not all of them"])
def test_damaged_parts_in_the_cache_are_not_used(damage: str, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    wanted = recipe(include=["q_proj", "down_proj"])
    lexigram.compress(wanted, tmp_path / "out", cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("parts-*")
    file, other = (next(folder.glob(f"*.0.*{name}.safetensors")) for name in ("q_proj", "down_proj"))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "of another weight":
        shutil.copy(other, file)
    else:
        tensors = load_file(file)
        save_file({**tensors, "entries": tensors["entries"][:-1]}, file)
    with pytest.raises(
        LexigramError, match=r"the decomposition .*q_proj\.safetensors cannot be read: .*; delete its folder"
    ):
        lexigram.compress(wanted, tmp_path / "again", cache=tmp_path / "cache")
    assert not (tmp_path / "again").exists()


def test_a_run_that_broke_off_leaves_whole_parts_only(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one makes the others."""
    wanted = recipe(include=["q_proj"])

    def broken(tensors: Any, file: Path, **_options: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(
            choice,
            "decompose",
            lambda *given: (patched.setattr("lexigram.tensorfiles.save_file", broken), decompose(*given))[1],
        )
        with pytest.raises(LexigramError, match="No space left"):
            lexigram.compress(wanted, tmp_path / "out", cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("parts-*")
    assert not list(folder.glob("*.safetensors"))
    again = lexigram.compress(wanted, tmp_path / "out", cache=tmp_path / "cache")
    alone = lexigram.compress(wanted, tmp_path / "alone")
    assert again.mean_relative_error == alone.mean_relative_error


def test_the_parts_are_decided_by_the_fields_that_name_them(case: Callable[..., Case]) -> None:
    """Each field of the config changed in turn: the parts change with those, and with no other."""
    weight, gram = normal(24, 32), Gram(torch.eye(32, dtype=torch.float64), 32)
    base = CapConfig(iterations=12)
    others: dict[str, Any] = {
        "value_bits": 8,
        "value_group": 32,
        "refit": True,
        "damping": 0.5,
        "sparse_weight": 0.5,
        "mu": "candes",
        "growth": 1.1,
        "rise": 1.1,
        "relaxation": 1.0,
        "iterations": 11,
        "tolerance": 0.5,
        "score": "energy",
        "first": "random",
        "together": True,
        "per_bit": False,
        "passes": 1,
        "objective": "kl",
        "batch": 3,
        "samples": 2,
        "rate": 0.1,
        "memory": 0.5,
        "eps": 0.1,
        "projection": "euclidean",
    }
    assert {"name", *others} == set(CapConfig.model_fields)
    for field, value in others.items():
        one, other = (decompose(config, weight, gram) for config in (base, base.model_copy(update={field: value})))
        same = all(mine.shape == its.shape and torch.equal(mine, its) for mine, its in zip(one, other, strict=True))
        assert same == (field not in DECOMPOSING)


def test_the_report_tells_how_robust_pca_ended(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    for iterations, converged in ((4, False), (400, True)):
        method = {"iterations": iterations, "tolerance": 1e-4}
        record = lexigram.compress(recipe(include=["q_proj"], method=method), tmp_path / str(iterations))
        for layer in record.layers:
            assert layer.fit.status == ("converged" if converged else "iterations")
            assert ("robust PCA stopped after 4 iterations and misses" in layer.fit.message) == (not converged)
            assert (layer.fit.details["robust_pca_residual"] <= 1e-4) == converged
            assert (layer.fit.details["robust_pca_iterations"] == 4) == (not converged)


def test_the_plan_reckons_with_the_parts_on_disk(case: Callable[..., Case], recipe: Callable[..., Recipe]) -> None:
    made = case()
    made.chosen()
    held = sum(
        part.nbytes for t in made.plan.targets for part in vars(made.parts(t.name)).values() if hasattr(part, "nbytes")
    )
    other = lexigram.plan(recipe(allocation="knapsack", method={"name": "svd"}))
    assert 0.5 * held < made.plan.disk_bytes - other.disk_bytes < 3 * held


# --- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_the_loss_is_that_of_transformers(name: str) -> None:
    model = build_toy(name)
    ids = torch.randint(3, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    weights = {target.name: weight_of(model.get_submodule(target.name)).detach() for target in find_targets(model)}
    with torch.no_grad():
        wanted = float(model(input_ids=ids, labels=ids).loss) * 3 * 19
        for given in ({}, weights):
            assert float(summed_loss(model, ids, torch.float32, given)) == pytest.approx(wanted, rel=1e-5)
        rounded = float(summed_loss(model, ids, torch.bfloat16, weights))
    assert rounded != wanted
    assert rounded == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_in_place_of_the_models_own_are_used_and_leave_no_trace(name: str) -> None:
    model, ids = build_toy(name), torch.arange(3, 43).view(2, 20)
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    for target in find_targets(model):
        weight = normal(*target.shape, seed=1)
        with torch.no_grad():
            found = float(summed_loss(model, ids, torch.float32, {target.name: weight}))
            assert all(torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())
            changed = build_toy(name)
            own = weight_of(changed.get_submodule(target.name))
            own.copy_(weight)
            wanted = float(changed(input_ids=ids, labels=ids).loss) * 2 * 19
            ours, theirs = (
                torch.distributions.Categorical(logits=each(ids).logits[:, :-1]) for each in (changed, model)
            )
            apart = float(torch.distributions.kl_divergence(theirs, ours).sum())
            divergence = float(summed_divergence(model, ids, torch.float32, {target.name: weight}))
        assert found == pytest.approx(wanted, rel=1e-5)
        assert divergence == pytest.approx(apart, rel=1e-4)


# --- tensors on disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> TensorFiles:
    return TensorFiles(tmp_path / "new" / "folder", torch.device("cpu"), "part")


def test_tensors_come_back_as_they_were(files: TensorFiles) -> None:
    tensors = {
        "a": normal(3, 4).T,  # not contiguous
        "b": torch.tensor([True, False]),
        "c": torch.zeros(3, 0, dtype=torch.float64),
        "d": torch.tensor(2, dtype=torch.bfloat16),
    }
    files.put("x.y", tensors, {"tokens": "3"})
    found, metadata = files.get("x.y")
    assert metadata == {"tokens": "3"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    files.put("x.y", {"a": torch.ones(1)})
    assert files.get("x.y")[0].keys() == {"a"}
    assert files.get("x.y")[1] == {}
    assert files.has("x.y")
    assert not files.has("x")
    assert [file.name for file in files.folder.iterdir()] == ["x.y.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "noise", "a folder"])
def test_a_damaged_or_missing_file_is_named(damage: str, files: TensorFiles) -> None:
    files.put("x.y", {"a": normal(20)})
    file = files.folder / "x.y.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes({"truncated": content[:-9], "empty": b"", "noise": b"\xff" * 99}[damage])
    with pytest.raises(LexigramError, match=r"the part .*x\.y\.safetensors cannot be read: .*; delete its folder"):
        files.get("x.y")


def test_an_entry_with_other_tensors_is_damaged(case: Callable[..., Case]) -> None:
    chosen = case(include=["q_proj"]).chosen()
    name = next(iter(chosen.allocation.specs))
    chosen.parts.put(name, {"left": torch.zeros(2, 2)})
    with pytest.raises(LexigramError, match=r"the decomposition .*q_proj\.safetensors cannot be read: .*missing"):
        chosen.of(name)


def test_a_folder_that_cannot_be_made_or_written_is_named(files: TensorFiles, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            LexigramError, match=r"file.* cannot be written: .*; free some space and go on with --resume"
        ):
            TensorFiles(folder, torch.device("cpu"), "part")
    files.folder.rmdir()
    with pytest.raises(LexigramError, match=r"new/folder cannot be written: .*; free some space"):
        files.put("x", {"a": normal(3)})


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_the_entry_before(
    error: Exception, files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.put("x", {"a": torch.ones(1)})

    def half(_tensors: Any, file: Path, **_options: Any) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr("lexigram.tensorfiles.save_file", half)
    with pytest.raises(LexigramError, match="cannot be written: No space left on device; free some space"):
        files.put("x", {"a": torch.zeros(1)})
    assert torch.equal(files.get("x")[0]["a"], torch.ones(1))


def test_the_toy_of_another_family_goes_the_same_way(words: Path, tmp_path: Path) -> None:
    """GPT-2 keeps its weights transposed, and q, k and v in one."""
    settings = {"model": str(toy_folder(tmp_path / "gpt2", "gpt2")), "ratio": 0.3, "method": {**QUICK, **MOVING}}
    calibration = {"text": [str(words)], "sequences": 6, "length": 24}
    record = lexigram.compress(Recipe.parse({**settings, "calibration": calibration}), tmp_path / "out")
    assert record.bytes_after <= int(0.7 * record.bytes_before)
    assert all(layer.fit.relative_error < 0.9 for layer in record.layers)
