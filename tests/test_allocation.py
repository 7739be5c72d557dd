"""How the budget is spent over the layers: replayed files, the knapsack over a whole model, kept Grams, the loss's sensitivity.

The oracles: the bytes of another run, curves and costs worked out again from the files of a run, and torch.autograd.
"""

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import lexigram
from conftest import TOYS, build_toy, toy_folder, words_tokenizer
from lexigram import LexigramError, Recipe, RunRecord, curves, jsonfiles, staging
from lexigram.allocation.units import Allocation
from lexigram.calibration import sensitivity
from lexigram.calibration.sensitivity import output_sensitivity
from lexigram.calibration.store import GramStore
from lexigram.gram import Gram
from lexigram.planning import Plan, plan
from lexigram.targets import find_targets

WEIGHTS, ALLOCATION = "lexigram.safetensors", "allocation.json"
QUICK = {"name": "cospadi", "iterations": 1}
Build = Callable[..., Recipe]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of very different weight: what the first does matters more than what the last does."""
    folder = tmp_path_factory.mktemp("toy") / "llama"
    config = TOYS["llama"]()
    config.num_hidden_layers, config.initializer_range = 3, 0.15
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for index, layer in enumerate(model.model.layers):
                layer.mlp.down_proj.weight.mul_(0.3**index)
                layer.self_attn.q_proj.weight[:, 8:] *= 0.01  # nearly of low rank
    model.save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(toy: Path, words: Path) -> Build:
    def build(**changes: Any) -> Recipe:
        calibration = {"text": [str(words)], "sequences": 4, "length": 64, **changes.pop("calibration", {})}
        settings = {"model": str(toy), "ratio": 0.4, "device": "cpu", "compute_dtype": "float32", "method": QUICK}
        return Recipe.parse({**settings, **changes, "calibration": calibration})

    return build


def compressed(recipe: Recipe, out: Path, cache: Path | None = None) -> RunRecord:
    torch.set_num_threads(1)
    if cache is None:
        return lexigram.compress(recipe, out)
    return lexigram.compress(recipe, out, prepared=lexigram.plan(recipe, cache=cache))


def same_files(one: Path, other: Path) -> bool:
    return all(
        (one / file).read_bytes() == (other / file).read_bytes() for file in (WEIGHTS, "config.json", ALLOCATION)
    )


# --- replay ------------------------------------------------------------------------------------------------------

REPLAYED: dict[str, dict[str, Any]] = {
    "uniform": {},
    "knapsack": {"allocation": "knapsack", "measure": "relative", "include": ["*.1.*", "down_proj"]},
    "quantize knapsack": {
        "allocation": "knapsack",
        "measure": "absolute",
        "include": ["*.1.*"],
        "method": {"name": "quantize"},
    },
    "consecutive": {"share": "consecutive"},
    "matched knapsack": {
        "share": "matched",
        "allocation": "knapsack",
        "measure": "absolute",
        "method": {"name": "svd"},
    },
    "site sequential": {"share": "site", "sequential": True, "method": {"name": "svd"}},
}


@pytest.mark.parametrize("name", REPLAYED)
def test_an_allocation_replays_to_the_same_bytes(name: str, recipe: Build, tmp_path: Path) -> None:
    first = recipe(**REPLAYED[name])
    record = compressed(first, tmp_path / "first")
    allocation = Allocation.read(tmp_path / "first" / ALLOCATION)
    assert allocation.bytes == record.bytes_after
    assert sorted(allocation.specs) == sorted(layer.name for layer in record.layers)
    for layer in record.layers:
        assert allocation.specs[layer.name] == layer.factors
    # The ratio and the method that the recipe names do not matter any more.
    kept = {"sequential": first.sequential, "include": first.include}
    again = recipe(allocation=str(tmp_path / "first" / ALLOCATION), ratio=0.2, method={"name": "svd"}, **kept)
    replayed = compressed(again, tmp_path / "again")
    assert same_files(tmp_path / "first", tmp_path / "again")
    assert replayed.bytes_after == record.bytes_after
    assert lexigram.plan(again).bytes_after == record.bytes_after


BROKEN: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, r"mine\.json cannot be read: No such file.*name uniform, knapsack, or"),
    "not JSON": (b"units: [1]", r"mine\.json is no allocation \(.*JSON"),
    "not text": (b"\xff\xfe\x00", r"mine\.json is no allocation"),
    "empty": (b"", r"mine\.json is no allocation"),
    "another object": (b'{"curves": []}', r"mine\.json is no allocation \(units: Field required"),
    "a list": (b"[]", r"mine\.json is no allocation"),
    "no units": (b'{"units": []}', "made for other layers"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_are_no_allocation(kind: str, recipe: Build, tmp_path: Path) -> None:
    content, message = BROKEN[kind]
    if content is not None:
        (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(LexigramError, match=message):
        lexigram.plan(recipe(allocation=str(tmp_path / "mine.json")))


def test_a_folder_is_no_allocation(recipe: Build, tmp_path: Path) -> None:
    with pytest.raises(LexigramError, match="cannot be read: Is a directory"):
        lexigram.plan(recipe(allocation=str(tmp_path)))


@pytest.fixture(scope="module")
def grouped(recipe: Build, tmp_path_factory: pytest.TempPathFactory) -> Allocation:
    out = tmp_path_factory.mktemp("grouped") / "out"
    compressed(recipe(share="consecutive", method={"name": "svd"}), out)
    return Allocation.read(out / ALLOCATION)


def test_allocations_of_other_layers(grouped: Allocation, words: Path, recipe: Build, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(grouped.model_dump_json())
    lexigram.plan(recipe(allocation=str(file)))
    other = toy_folder(tmp_path / "other", "llama")  # of two layers instead of three
    with pytest.raises(LexigramError, match=r"made for other layers \(model\.layers\.2\..*make it again"):
        lexigram.plan(recipe(model=str(other), allocation=str(file)))
    with pytest.raises(LexigramError, match=r"made for other layers \(model\.layers\.0\.mlp\.down_proj\)"):
        lexigram.plan(recipe(exclude=["down_proj"], allocation=str(file)))


def unit_with(content: dict[str, Any], count: int) -> dict[str, Any]:
    found: dict[str, Any] = next(unit for unit in content["units"] if len(unit["members"]) == count)
    return found


def swap(content: dict[str, Any]) -> None:
    """The two names of a pair, and of a key and a gate projection: the latter have other shapes."""
    for unit in content["units"]:
        unit["members"] = [
            {
                "k_proj": name.replace("self_attn.k_proj", "mlp.up_proj"),
                "up_proj": name.replace("mlp.up_proj", "self_attn.k_proj"),
            }.get(name.rsplit(".", 1)[-1], name)
            for name in unit["members"]
        ]


EDITED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a unit too few": (lambda c: c["units"].pop(), "made for other layers"),
    "a unit twice": (lambda c: c["units"].append(c["units"][-1]), "one stands twice"),
    "names of other shapes": (swap, r"made for other layers \(model\.layers\.\d\.\w+\.\w+"),
    "a name too many": (
        lambda c: unit_with(c, 2)["members"].append("x"),
        r"is no allocation \(units\.\d+: .*3 names stand for 2 forms",
    ),
    "a name too few": (lambda c: unit_with(c, 2)["members"].pop(), r"is no allocation \(.*1 names stand for 2 forms"),
    "no shared leaf": (
        lambda c: unit_with(c, 2)["spec"].update(shared=None),
        r"is no allocation \(.*and the group has none; members share",
    ),
    "another leaf": (
        lambda c: unit_with(c, 2)["spec"]["shared"].update(rows=3),
        r"is no allocation \(.*the group has \[\(3, \d+\)\]",
    ),
    "two names for one leaf": (
        lambda c: unit_with(c, 2)["spec"]["members"][1]["right"].update(name="other"),
        r"is no allocation \(.*by one name",
    ),
    "one name for two leaves": (
        lambda c: [
            right.update(name="common")
            for unit in c["units"]
            if len(unit["members"]) == 2
            for right in (member["right"] for member in unit["spec"]["members"])
        ],
        r"several shared matrices of the name common",
    ),
    "an unknown method": (lambda c: unit_with(c, 1)["method"].update(name="magic"), "is no allocation"),
    "an unknown key": (lambda c: unit_with(c, 1).update(weight=3), "is no allocation"),
    "a form without its parts": (lambda c: unit_with(c, 1)["spec"]["members"][0].pop("left"), "is no allocation"),
}


@pytest.mark.parametrize("kind", EDITED)
def test_edited_allocations_are_refused_before_the_work(
    kind: str, grouped: Allocation, recipe: Build, tmp_path: Path
) -> None:
    content = json.loads(grouped.model_dump_json())
    change, message = EDITED[kind]
    change(content)
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(LexigramError, match=message):
        lexigram.plan(recipe(allocation=str(tmp_path / "mine.json")))


def test_a_replayed_group_over_several_layers_cannot_be_calibrated_sequentially(
    grouped: Allocation, recipe: Build, tmp_path: Path
) -> None:
    """As little as a recipe that asks for such groups."""
    (tmp_path / "mine.json").write_text(grouped.model_dump_json())
    with pytest.raises(LexigramError, match="sequential calibration needs"):
        lexigram.plan(recipe(allocation=str(tmp_path / "mine.json"), sequential=True))


# --- the knapsack ------------------------------------------------------------------------------------------------


def curve_file(cache: Path) -> dict[str, Any]:
    """The one curves file below a cache."""
    [file] = cache.glob("*/curves-*.json")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def cost_of(allocation: Allocation, curves: dict[str, Any], measure: str) -> float:
    """What an allocation should cost by the measured curves, worked out anew."""
    total = 0.0
    for unit in allocation.units:
        if unit.method.name == "quantize" and unit.method.value_bits == 16:
            continue
        price = {
            name: {"relative": 1.0, "absolute": curves["outputs"][name]}.get(
                measure, 0.5 * curves["outputs"][name] * curves["sensitivity"].get(name, math.nan)
            )
            for name in unit.members
        }
        [points] = [
            curve["points"]
            for curve in curves["curves"]
            if tuple(curve["members"]) == unit.members and curve["method"] == json.loads(unit.method.model_dump_json())
        ]
        measured = sorted(
            (p["bytes"], sum(price[n] * e for n, e in zip(unit.members, p["errors"], strict=True))) for p in points
        )
        sizes, costs = zip(*measured, strict=True)
        falling = np.minimum.accumulate(costs)
        assert sizes[0] <= unit.spec.bytes
        total += math.exp(np.interp(unit.spec.bytes, sizes, np.log(falling)))
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("share", "ratio"), [("none", 0.3), ("none", 0.6), ("site", 0.6)])
@pytest.mark.parametrize("measure", ["relative", "absolute", "loss"])
def test_the_knapsack_spends_the_budget_better_than_uniform(
    measure: str, ratio: float, share: str, recipe: Build, caches: Path, tmp_path: Path
) -> None:
    settings = {"measure": measure, "ratio": ratio, "share": share, "method": {"name": "svd"}}
    cache = caches / share
    record = compressed(recipe(**settings, allocation="knapsack"), tmp_path / "out", cache)
    allowed = int((1 - ratio) * record.bytes_before)
    assert 0.985 * allowed < record.bytes_after <= allowed
    assert record.ratio >= ratio
    allocation = Allocation.read(tmp_path / "out" / ALLOCATION)
    uniform = lexigram.plan(recipe(**settings)).allocation
    assert uniform is not None
    curves = curve_file(cache)
    mine, theirs = (cost_of(each, curves, measure) for each in (allocation, uniform))
    assert 0 < mine < theirs
    kept = [sum(s.bytes for s in u.spec.members) / u.spec.bytes for u in allocation.units]
    assert all(0 < share <= 1 for share in kept)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


def test_layers_that_are_nearly_of_low_rank_get_fewer_bytes(recipe: Build, tmp_path: Path) -> None:
    settings = {"allocation": "knapsack", "measure": "relative", "method": {"name": "svd"}, "ratio": 0.5}
    record = compressed(recipe(**settings), tmp_path / "out")
    shares: dict[str, list[float]] = {}
    for layer in record.layers:
        shares.setdefault(layer.kind, []).append(layer.bytes_after / layer.bytes_before)
    # An eighth of its outputs matters: what is left of the spectrum is worth little.
    assert sum(shares["q_proj"]) < 0.75 * sum(shares["gate_proj"])


def test_the_measure_decides(recipe: Build, caches: Path, tmp_path: Path) -> None:
    """Small outputs cost little in absolute terms."""
    shares = {}
    for measure in ("relative", "absolute"):
        settings = {"allocation": "knapsack", "measure": measure, "method": {"name": "svd"}, "ratio": 0.6}
        record = compressed(recipe(**settings), tmp_path / measure, caches / "none")
        layer = next(layer for layer in record.layers if layer.name == "model.layers.2.mlp.down_proj")
        shares[measure] = layer.bytes_after / layer.bytes_before
    assert shares["absolute"] < shares["relative"]


def test_the_predicted_errors_are_about_those_that_come_out(recipe: Build, caches: Path, tmp_path: Path) -> None:
    """The sketch of svd is svd itself."""
    settings = {"allocation": "knapsack", "measure": "relative", "method": {"name": "svd"}, "ratio": 0.6}
    record = compressed(recipe(**settings), tmp_path / "out", caches / "none")
    allocation = Allocation.read(tmp_path / "out" / ALLOCATION)
    predicted = cost_of(allocation, curve_file(caches / "none"), "relative")
    assert sum(layer.fit.relative_error**2 for layer in record.layers) == pytest.approx(predicted, rel=0.5)


def test_quantisation_mixes_bits(recipe: Build, tmp_path: Path) -> None:
    settings = {"allocation": "knapsack", "measure": "absolute", "method": {"name": "quantize"}, "ratio": 0.7}
    record = compressed(recipe(**settings), tmp_path / "out", tmp_path / "cache")
    allowed = int(0.3 * record.bytes_before)
    assert 0.95 * allowed < record.bytes_after <= allowed
    bits = {layer.name: layer.factors.codec.bits for layer in record.layers}
    assert len(set(bits.values())) > 1
    units = Allocation.read(tmp_path / "out" / ALLOCATION).units
    assert {unit.members[0]: unit.method.value_bits for unit in units} == bits
    # Four bits everywhere would fit as well; the mixture must not cost more.
    curves = curve_file(tmp_path / "cache")
    fours = [curve for curve in curves["curves"] if curve["method"]["value_bits"] == 4]
    assert sum(c["points"][0]["bytes"] for c in fours) <= allowed
    uniform = sum(c["points"][0]["errors"][0] * curves["outputs"][c["members"][0]] for c in fours)
    mine = sum(layer.fit.relative_error**2 * curves["outputs"][layer.name] for layer in record.layers)
    assert mine < uniform


def test_a_budget_that_nothing_fits_into(recipe: Build, tmp_path: Path) -> None:
    with pytest.raises(LexigramError, match=r"budget of \d+ bytes is too small.*lower the ratio"):
        compressed(recipe(allocation="knapsack", method={"name": "svd"}, ratio=0.995), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_knapsacks_reach_is_known_before_any_work(recipe: Build) -> None:
    settings = {"allocation": "knapsack", "method": {"name": "quantize"}}
    with pytest.raises(LexigramError, match=r"a ratio of 0\.\d{3}; lower the ratio") as error:
        plan(recipe(**settings, ratio=0.95))
    reach = float(re.search(r"a ratio of (0\.\d{3})", str(error.value))[1])  # type: ignore[index]
    plan(recipe(**settings, ratio=reach - 0.001))
    with pytest.raises(LexigramError, match="too small: the smallest forms"):
        plan(recipe(**settings, ratio=reach + 0.001))


# --- kept Grams --------------------------------------------------------------------------------------------------

CACHED = {"allocation": "knapsack", "measure": "loss", "method": {"name": "svd"}, "ratio": 0.5}


class Calibrated(Exception):  # noqa: N818 - a sign, not a failure
    """A calibration pass was started."""


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise Calibrated

    for name in ("plain_grams", "sequential_grams"):
        monkeypatch.setattr(f"lexigram.pipeline.{name}", fail)


@pytest.fixture
def cache(caches: Path, recipe: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the Grams and curves of `CACHED`; one's own copy."""
    kept = caches / "kept"
    if not kept.exists():
        compressed(recipe(**CACHED), caches / "kept-run", kept)
    return Path(shutil.copytree(kept, tmp_path_factory.mktemp("cache") / "kept"))


def test_the_second_run_makes_no_grams(
    cache: Path, caches: Path, recipe: Build, no_calibration: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()}
    monkeypatch.setattr("lexigram.curves.output_sensitivity", lambda *_: pytest.fail("measured again"))
    compressed(recipe(**CACHED), tmp_path / "out", cache)
    assert same_files(tmp_path / "out", caches / "kept-run")
    assert {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()} == before


def test_the_same_run_without_a_cache_gives_the_same_bytes(
    caches: Path, cache: Path, recipe: Build, tmp_path: Path
) -> None:
    compressed(recipe(**CACHED), tmp_path / "out")
    assert same_files(tmp_path / "out", caches / "kept-run")


@pytest.mark.parametrize(
    "changes",
    [
        {"ratio": 0.3},
        {"measure": "relative"},
        {"share": "site"},
        {"allocation": "uniform"},
        {"method": {"name": "svd", "value_bits": 8}},
        {"seed": 3},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_what_does_not_decide_the_grams_uses_them(
    changes: dict[str, Any], cache: Path, recipe: Build, no_calibration: None, tmp_path: Path
) -> None:
    before = {file.name: file.read_bytes() for file in grams_of(cache)}
    record = compressed(recipe(**{**CACHED, **changes}), tmp_path / "out", cache)
    assert {file.name: file.read_bytes() for file in grams_of(cache)} == before
    assert "calibrate" not in record.stages


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": {"seed": 5}},
        {"calibration": {"sequences": 5}},
        {"calibration": {"length": 32}},
        {"compute_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_other_tokens_or_another_precision_have_their_own(
    changes: dict[str, Any], cache: Path, recipe: Build, no_calibration: None, tmp_path: Path
) -> None:
    with pytest.raises(Calibrated):
        compressed(recipe(**CACHED, **changes), tmp_path / "out", cache)


@pytest.mark.parametrize(
    "changed",
    ["model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"],
)
def test_other_weights_have_their_own(
    changed: str, cache: Path, toy: Path, recipe: Build, no_calibration: None, tmp_path: Path
) -> None:
    """Also those that are not compressed: all of them stand before some input."""
    shutil.copytree(toy, tmp_path / "toy")
    tensors = load_file(tmp_path / "toy" / "model.safetensors")
    tensors[changed] = 1.5 * tensors[changed]
    save_file(tensors, tmp_path / "toy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Calibrated):
        compressed(recipe(**CACHED, model=str(tmp_path / "toy")), tmp_path / "out", cache)


def test_another_config_with_the_same_weights_has_its_own(
    cache: Path, toy: Path, recipe: Build, no_calibration: None, tmp_path: Path
) -> None:
    shutil.copytree(toy, tmp_path / "toy")
    config = json.loads((tmp_path / "toy" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0}
    (tmp_path / "toy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Calibrated):
        compressed(recipe(**CACHED, model=str(tmp_path / "toy")), tmp_path / "out", cache)


def test_the_same_model_elsewhere_uses_them(
    cache: Path, toy: Path, recipe: Build, no_calibration: None, tmp_path: Path
) -> None:
    shutil.copytree(toy, tmp_path / "toy")
    record = compressed(recipe(**CACHED, model=str(tmp_path / "toy")), tmp_path / "out", cache)
    assert "calibrate" not in record.stages


def test_an_unfinished_calibration_is_not_taken_for_a_finished_one(
    cache: Path, recipe: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    [seal] = cache.glob("*/complete.json")
    seal.unlink()
    count = len(grams_of(cache))
    grams_of(cache)[-1].unlink()
    with monkeypatch.context() as patched:
        patched.setattr("lexigram.pipeline.plain_grams", lambda *_, **__: (_ for _ in ()).throw(Calibrated))
        with pytest.raises(Calibrated):
            compressed(recipe(**CACHED), tmp_path / "out", cache)
    compressed(recipe(**CACHED), tmp_path / "out", cache)
    assert seal.is_file()
    assert len(grams_of(cache)) == count


@pytest.mark.parametrize("one_disk", [True, False])
def test_the_disk_is_asked_for_the_grams_that_the_cache_has_not(
    one_disk: bool, cache: Path, recipe: Build, no_calibration: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With all but two there, so much more than the output takes is needed, or on the disk of the cache alone."""
    prepared = lexigram.plan(recipe(**CACHED), cache=cache)
    gone = grams_of(cache)[:2]
    grams = sum(prepared.gram_bytes[file.stem] for file in gone)
    for file in gone:
        file.unlink()
    free = {False: prepared.disk_bytes + grams * one_disk, True: grams}
    monkeypatch.setattr(staging, "_disk", lambda place: not one_disk and cache in place.parents)
    monkeypatch.setattr(
        staging.shutil, "disk_usage", lambda place: SimpleNamespace(free=free[not one_disk and place == cache])
    )
    with pytest.raises(Calibrated):
        compressed(recipe(**CACHED), tmp_path / "out", cache)
    free[not one_disk] -= 10_000  # more than the run has written of itself by then, which is not asked for again
    said = r"out\.unfinished and .*grams-\w+ need about" if one_disk else r"kept/grams-\w+ needs about"
    with pytest.raises(LexigramError, match=rf"{said} \d+ MB and .* MB free; free some space"):
        compressed(recipe(**CACHED), tmp_path / "out", cache)
    assert not list(tmp_path.glob("out*"))


def grams_of(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "other tensors", "no tokens", "tokens no number"])
def test_a_damaged_gram_is_named(damage: str, cache: Path, recipe: Build, tmp_path: Path) -> None:
    file = grams_of(cache)[3]
    matrix = load_file(file)["matrix"]
    if damage in ("truncated", "empty"):
        file.write_bytes(file.read_bytes()[: -9 if damage == "truncated" else 0])
    elif damage == "other tensors":
        save_file({"other": matrix}, file, metadata={"tokens": "256"})
    else:
        save_file({"matrix": matrix}, file, metadata=None if damage == "no tokens" else {"tokens": "many"})
    with pytest.raises(LexigramError, match=rf"the Gram .*{file.name} cannot be read.*delete its folder"):
        compressed(recipe(**CACHED), tmp_path / "out", cache)
    assert not (tmp_path / "out").exists()


def test_a_missing_gram_is_made_again(cache: Path, caches: Path, recipe: Build, tmp_path: Path) -> None:
    grams_of(cache)[3].unlink()
    compressed(recipe(**CACHED), tmp_path / "out", cache)
    assert same_files(tmp_path / "out", caches / "kept-run")
    assert len(grams_of(cache)) == 3 * 4


@pytest.mark.parametrize("content", [b"{", b"", b'{"curves": 3}', b"\xff"])
def test_damaged_curves_are_named(content: bytes, cache: Path, recipe: Build, tmp_path: Path) -> None:
    [file] = cache.glob("*/curves-*.json")
    file.write_bytes(content)
    with pytest.raises(
        LexigramError, match=rf"{file.name} (is not JSON|are not those).*; delete the file and run again"
    ):
        compressed(recipe(**CACHED), tmp_path / "out", cache)


def test_another_digit_in_the_curves_is_noticed(cache: Path, recipe: Build, tmp_path: Path) -> None:
    [file] = cache.glob("*/curves-*.json")
    changed = re.sub(
        r"(\"bytes\": \d*?)(\d)(,)", lambda found: f"{found[1]}{9 - int(found[2])}{found[3]}", file.read_text(), count=1
    )
    assert changed != file.read_text()
    file.write_text(changed)
    with pytest.raises(
        LexigramError, match=rf"the curves .*{file.name} are not those that were written; delete the file"
    ):
        compressed(recipe(**CACHED), tmp_path / "out", cache)


def test_a_store_gives_back_what_it_was_given(tmp_path: Path) -> None:
    store = GramStore(tmp_path / "store", torch.device("cpu"))
    matrix = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert not store.holds(["a.b"])
    store.update({"a.b": Gram(matrix @ matrix.T, 17)})
    assert not store.holds(["a.b"]), "not before it is sealed"
    store.seal(["a.b"])
    assert store.holds(["a.b"])
    assert not store.holds(["a.b", "c"])
    with store.using(["a.b", "a.b"]) as grams:
        assert torch.equal(grams["a.b"].matrix, matrix @ matrix.T)
        assert grams["a.b"].tokens == 17
    with pytest.raises(LexigramError, match=r"c\.safetensors cannot be read"), store.using(["c"]):
        pass
    assert {file.name for file in (tmp_path / "store").iterdir()} == {"a.b.safetensors", "complete.json"}


@pytest.mark.parametrize("nested", [False, True])
def test_the_temporary_grams_are_beside_the_output_and_go_away(
    nested: bool, recipe: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In success, and where nothing was finished; `out` may lie in a folder that does not exist yet."""
    folder = tmp_path / "new" / "folder" if nested else tmp_path
    seen: list[Path] = []
    update = GramStore.update

    def note(self: GramStore, grams: Any) -> None:
        update(self, grams)
        assert list(self.folder.glob("*.safetensors"))
        seen.append(self.folder)

    monkeypatch.setattr(GramStore, "update", note)
    compressed(recipe(**CACHED), folder / "out")
    assert set(seen) == {folder / "out.unfinished" / "grams"}
    assert {file.name for file in folder.iterdir()} == {"out"}
    assert {file.name for file in tmp_path.iterdir()} == {"new" if nested else "out"}
    shutil.rmtree(tmp_path / ("new" if nested else "out"))

    with monkeypatch.context() as patched:
        patched.setattr("lexigram.pipeline.plain_grams", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compressed(recipe(**CACHED), folder / "out")
    assert list(tmp_path.iterdir()) == []


def run_beside(recipe: Recipe, out: Path, cache: Path) -> None:
    """A whole run in a process of its own."""
    process = get_context("fork").Process(target=compressed, args=(recipe, out, cache))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("while_it", ["writes", "reads"])
def test_two_runs_share_a_cache(
    while_it: str, cache: Path, caches: Path, recipe: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One of another ratio begins and ends while the other writes what it knows of its fourth matrix, or reads it again."""
    [whole] = cache.glob("*/curves-*.json")
    before = whole.read_bytes()
    whole.unlink()
    replacing, read, seen = jsonfiles.replacing, curves.read_json, list[Path]()

    def other(file: Path) -> None:
        seen.append(file)
        if len(seen) == 4:
            run_beside(recipe(**{**CACHED, "ratio": 0.3}), tmp_path / "other", cache)

    @contextmanager
    def written(file: Path) -> Iterator[Path]:
        with replacing(file) as partial:
            yield partial
            other(file)

    def read_again(file: Path, **options: Any) -> dict[str, Any]:
        other(file)
        return read(file, **options)

    if while_it == "reads":
        with monkeypatch.context() as patched:
            patched.setattr(
                "lexigram.curves.output_sensitivity", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                compressed(recipe(**CACHED), tmp_path / "ended", cache)
        monkeypatch.setattr(curves, "read_json", read_again)
    else:
        monkeypatch.setattr(jsonfiles, "replacing", written)
    compressed(recipe(**CACHED), tmp_path / "out", cache)
    assert len(seen) > 4
    assert same_files(tmp_path / "out", caches / "kept-run")
    assert list(cache.glob("*/curves-*")) == [whole]
    assert whole.read_bytes() == before


def test_curves_with_the_loss_outlive_those_of_a_run_that_needs_none_of_it(
    cache: Path, recipe: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run of another measure began before there were any, and ends after them."""
    [whole] = cache.glob("*/curves-*.json")
    before, measured = whole.read_bytes(), curves._measured
    whole.unlink()

    def meanwhile(*args: Any) -> Any:
        found = measured(*args)
        whole.write_bytes(before)
        return found

    monkeypatch.setattr(curves, "_measured", meanwhile)
    compressed(recipe(**{**CACHED, "measure": "relative"}), tmp_path / "out", cache)
    assert whole.read_bytes() == before


@pytest.mark.parametrize("place", ["fitting.fit_group", "curves.fit_group", "curves.output_sensitivity"])
def test_a_run_goes_on_from_its_grams(
    place: str, recipe: Build, caches: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where it ended early, whatever was asked for then; and ends in the same bytes."""
    with monkeypatch.context() as patched:
        patched.setattr(f"lexigram.{place}", lambda *_args, **_kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lexigram.compress(recipe(**CACHED), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    with monkeypatch.context() as patched:
        patched.setattr("lexigram.pipeline.plain_grams", lambda *_, **__: pytest.fail("calibrated again"))
        lexigram.compress(recipe(**CACHED), tmp_path / "out", resume=True)
    assert same_files(tmp_path / "out", caches / "kept-run")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- the loss's sensitivity --------------------------------------------------------------------------------------


def direct_sensitivity(model: PreTrainedModel, modules: dict[str, nn.Module], ids: Tensor) -> dict[str, float]:
    """By torch.autograd.grad, with respect to the outputs themselves."""
    sums, counts = dict.fromkeys(modules, 0.0), dict.fromkeys(modules, 0)
    for sequence in ids:
        outputs: dict[str, Tensor] = {}

        def note(_module: nn.Module, _inputs: Any, output: Tensor, *, name: str, outputs=outputs) -> None:  # type: ignore[no-untyped-def]
            outputs[name] = output

        hooks = [module.register_forward_hook(partial(note, name=name)) for name, module in modules.items()]
        logits = model(input_ids=sequence[None]).logits[0]
        for hook in hooks:
            hook.remove()
        loss = -logits.log_softmax(-1)[:-1].gather(1, sequence[1:, None]).sum()
        gradients = torch.autograd.grad(loss, [outputs[name] for name in modules])
        for name, gradient in zip(modules, gradients, strict=True):
            sums[name] += float(gradient.double().square().sum())
            counts[name] += gradient.numel()
    return {name: sums[name] / counts[name] for name in modules}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "phi", "gemma3"])
def test_sensitivity_is_what_autograd_says(name: str) -> None:
    model = build_toy(name)
    modules = {target.name: model.get_submodule(target.name) for target in find_targets(model)}
    ids = torch.randint(3, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    told: list[tuple[int, int]] = []
    found = output_sensitivity(model, modules, ids, torch.float32, lambda done, total: told.append((done, total)))
    assert found == pytest.approx(direct_sensitivity(model, modules, ids), rel=1e-4)
    assert all(value > 0 for value in found.values())
    assert told == [(1, 3), (2, 3), (3, 3)]
    rounded = output_sensitivity(model, modules, ids, torch.bfloat16)
    assert rounded == pytest.approx(found, rel=0.2)


def test_sensitivity_predicts_what_noise_costs() -> None:
    """Noise on an output raises the loss by half its energy times the sensitivity: the expected loss of a softmax."""
    model = build_toy("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    module = model.model.layers[1].mlp.down_proj
    # Tokens that the model itself thinks likely: the empirical Fisher matrix is then about the true one.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 200, (24, 1), generator=generator)
    with torch.no_grad():
        for _ in range(31):
            chances = model(input_ids=rows).logits[:, -1].softmax(-1)
            rows = torch.cat([rows, torch.multinomial(chances, 1, generator=generator)], 1)
    sensitive = output_sensitivity(model, {"x": module}, rows, torch.float32)["x"]

    def loss() -> float:
        with torch.no_grad():
            logits = model(input_ids=rows).logits
        return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))

    before, energies, after = loss(), [], []
    scale = 0.3 * float(module.weight.detach().square().mean().sqrt())

    def disturb(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        noise = scale * torch.randn(output.shape, generator=generator)
        energies.append(float(noise.square().sum()))
        return output + noise

    hook = module.register_forward_hook(disturb)
    try:
        after = [loss() for _ in range(60)]
    finally:
        hook.remove()
    rise = sum(after) / len(after) - before
    assert rise == pytest.approx(0.5 * sensitive * sum(energies) / len(energies), rel=0.5)


def test_sensitivity_is_measured_all_over_the_text(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first sequence and its last are there: sequences stand in the order of texts that may be of different kinds."""
    seen = []

    def measured(model: PreTrainedModel, modules: Mapping[str, nn.Module], ids: Tensor, *_: Any, **__: Any) -> Any:
        seen.append(ids)
        return dict.fromkeys(modules, 1.0)

    monkeypatch.setattr("lexigram.curves.output_sensitivity", measured)
    prepared = plan(recipe(**CACHED, calibration={"sequences": 20}))
    lexigram.compress(prepared.recipe, tmp_path / "out", prepared=prepared)
    assert prepared.tokens is not None
    (ids,), every = seen, prepared.tokens.ids
    places = [next(i for i, row in enumerate(every) if torch.equal(row, other)) for other in ids]
    assert (len(places), places[0], places[-1]) == (8, 0, 19)
    assert max(after - before for before, after in itertools.pairwise(places)) <= 3


def test_sensitivity_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_toy("llama")
    frozen = [p for i, p in enumerate(model.parameters()) if i % 3 == 0]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    mine = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    before = [parameter.requires_grad for parameter in model.parameters()]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    modules = {"q": model.model.layers[0].self_attn.q_proj, "head": model.lm_head}

    def check() -> None:
        assert [parameter.requires_grad for parameter in model.parameters()] == before
        assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
        assert [name for name, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]
        assert bool((model.lm_head.weight.grad == 1).all())
        hooked = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
        assert hooked == [model.model.layers[0].mlp]
        assert not any(module._backward_hooks for module in model.modules())
        assert not model.training

    output_sensitivity(model, modules, torch.arange(3, 23).view(1, 20), torch.float32)
    check()
    monkeypatch.setattr(sensitivity, "next_token_loss", lambda *_: (_ for _ in ()).throw(Calibrated))
    with pytest.raises(Calibrated):
        output_sensitivity(model, modules, torch.arange(3, 23).view(1, 20), torch.float32)
    check()
    mine.remove()


def test_a_plan_without_its_allocation_promises_no_more_than_the_budget(recipe: Build) -> None:
    prepared = lexigram.plan(recipe(**CACHED))
    assert isinstance(prepared, Plan)
    assert prepared.allocation is None
    assert prepared.bytes_after == int(0.5 * prepared.bytes_before)
    assert prepared.specs == {}
