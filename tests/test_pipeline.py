"""Whole runs on stories260K, a real model: what is written, what it weighs, what it costs, and that it can be repeated."""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lexigram
from conftest import toy_folder
from lexigram import CospadiConfig, LexigramError, Plan, Recipe, RunRecord, SvdConfig, compress, plan
from lexigram.allocation.units import Allocation
from lexigram.methods import METHODS
from lexigram.methods.base import variants
from lexigram.recipe import Calibration

WEIGHTS = "lexigram.safetensors"
QUICK: dict[str, dict[str, Any]] = {
    "cospadi": {"name": "cospadi", "iterations": 2},
    "lowrank-sparse": {"name": "lowrank-sparse", "rounds": 5, "sweeps": 1},
    "cap": {"name": "cap", "iterations": 60, "batch": 4},
    "oats": {"name": "oats", "rounds": 20},
    "double-sparse": {"name": "double-sparse", "iterations": 2, "tightening": 2},
}
"""Settings that only save time; a method that is not here runs with its defaults."""

PAPER: dict[str, Any] = {"rho": 2.0, "value_bits": 12, "dictionary_bits": 16}
INT8: dict[str, Any] = {"rho": 2.0, "value_bits": 8, "dictionary_bits": 8}
"""Forms of `cospadi` whose sizes are known here, whatever the defaults are."""

PROMISED = {
    "ratio",
    "bits_per_weight",
    "bytes_before",
    "bytes_after",
    "model_bytes_before",
    "model_bytes_after",
    "seconds",
    "peak_memory_bytes",
}


@pytest.fixture(scope="session")
def text(data: Path) -> str:
    return (data / "tinystories" / "tinystories.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def calibration_file(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first half of the text; the second half evaluates."""
    file = tmp_path_factory.mktemp("text") / "first-half.txt"
    file.write_text(text[: len(text) // 2], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def recipe(stories: Path, calibration_file: Path) -> Callable[..., Recipe]:
    """A quick recipe with some settings changed."""

    def build(method: str = "svd", **changes: Any) -> Recipe:
        calibration = {"text": [str(calibration_file)], "sequences": 12, "length": 96, **changes.pop("calibration", {})}
        settings = {
            "model": str(stories),
            "ratio": 0.3,
            "device": "cpu",
            "compute_dtype": "float32",
            "method": {**QUICK.get(method, {"name": method}), **changes.pop("options", {})},
        }
        return Recipe.parse({**settings, **changes, "calibration": calibration})

    return build


Run = tuple[Path, RunRecord]


@pytest.fixture(scope="session")
def run(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A finished run, computed once for all tests that ask for the same settings."""
    done: dict[str, Run] = {}

    def get(method: str = "svd", **changes: Any) -> Run:
        wanted = recipe(method, **changes)
        if (key := wanted.to_yaml()) not in done:
            out = tmp_path_factory.mktemp("runs") / "out"
            done[key] = out, lexigram.compress(wanted, out)
        return done[key]

    return get


def settled(method: str) -> bool:
    """Whether the forms of a method follow from the recipe alone, unless another allocation is asked for."""
    return METHODS[method].allocation == "uniform"


def units(method: str, record: RunRecord) -> list[tuple[str, ...]]:
    """The names that are fitted together: one by one, or a whole attention and a whole MLP."""
    names = [layer.name for layer in record.layers]
    if method != "structured":
        return [(name,) for name in names]
    return [tuple(members) for _, members in itertools.groupby(names, key=lambda name: name.rpartition(".")[0])]


def file_tensors(file: Path) -> dict[str, bytes]:
    """Raw bytes of every tensor, read from the file by the format's own description, not by the library."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    assert sum(end - begin for begin, end in (entry["data_offsets"] for entry in header.values())) == len(data)
    return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}


LONG = {"lowrank-sparse": pytest.mark.slow}
"""It measures every layer in a dozen forms."""


def perplexity(model: Path | Any, text: str, **options: Any) -> float:
    """On the last part of the text, which no calibration here has seen."""
    if isinstance(model, Path):
        opened, tokenizer = lexigram.load(model), AutoTokenizer.from_pretrained(model)
    else:
        opened, tokenizer = model
    result = lexigram.evaluate(opened, tokenizer, text[-20_000:], context=256, windows=10, **options)
    return result.token_perplexity


@pytest.mark.parametrize("method", [pytest.param(name, marks=LONG.get(name, ())) for name in METHODS])
class TestEveryMethod:
    def test_the_folder_is_complete_and_its_record_is_what_was_returned(
        self, method: str, run: Callable[..., Run]
    ) -> None:
        out, record = run(method)
        content = json.loads((out / "run.json").read_text())
        assert content.keys() >= PROMISED
        assert content == json.loads(record.model_dump_json())
        assert content["recipe"]["method"]["name"] == method
        assert content["versions"]["torch"] == torch.__version__
        assert content["machine"]["compute_dtype"] == "float32"
        assert {"allocation.json", "config.json", "recipe.yaml", "run.json", "tokenizer.json", WEIGHTS} <= {
            file.name for file in out.iterdir()
        }
        assert set(record.files) == {file.name for file in out.iterdir()}
        used = Allocation.read(out / "allocation.json")
        assert used.bytes == record.bytes_after
        assert used.specs == {layer.name: layer.factors for layer in record.layers}
        names = {method} if settled(method) else {variant.name for variant in variants(METHODS[method](name=method))}
        assert method in names
        assert {unit.method.name for unit in used.units} <= names
        assert [unit.members for unit in used.units] == units(method, record)
        assert not list(out.parent.glob(".*"))  # no staging folder is left beside it

    def test_the_ledger_is_what_the_files_hold(self, method: str, run: Callable[..., Run], stories: Path) -> None:
        out, record = run(method)
        held = {name: len(data) for name, data in file_tensors(out / WEIGHTS).items()}
        of_layers = {
            layer.name: sum(held[n] for n in held if n.startswith(f"{layer.name}.")) for layer in record.layers
        }
        assert of_layers == {layer.name: layer.bytes_after for layer in record.layers}
        assert record.bytes_after == sum(of_layers.values())
        assert record.model_bytes_after == sum(held.values())
        assert sum(record.bytes_by_kind.values()) == record.model_bytes_after
        assert record.bytes_by_kind["not compressed"] == record.model_bytes_after - record.bytes_after
        # The source is float32 and stores the tied embedding once; bfloat16 halves it.
        source = file_tensors(stories / "model.safetensors")
        assert "lm_head.weight" not in source
        assert record.model_bytes_before == sum(map(len, source.values())) // 2
        assert record.bytes_before == sum(len(source[f"{layer.name}.weight"]) for layer in record.layers) // 2

    def test_the_figures_of_the_layers_are_sane_and_add_up(self, method: str, run: Callable[..., Run]) -> None:
        _, record = run(method)
        errors = [layer.fit.relative_error for layer in record.layers]
        assert len(errors) == 35
        assert all(0 < error <= 1 for error in errors)
        # Of what reads channels: those that are dropped are missed by it alone, and count in full where they came from.
        read = {names[-1] for names in units(method, record)}
        assert all(layer.fit.relative_error < 0.7 for layer in record.layers if layer.name in read)
        assert record.mean_relative_error == pytest.approx(sum(errors) / 35)
        assert record.ratio == pytest.approx(1 - record.bytes_after / record.bytes_before)
        assert record.ratio >= record.requested_ratio == 0.3
        weights = sum(layer.shape[0] * layer.shape[1] for layer in record.layers)
        assert record.bits_per_weight == pytest.approx(8 * record.bytes_after / weights)
        assert record.bits_per_weight <= 0.7 * 16
        assert record.shared == []
        assert 0 < sum(stage.seconds for stage in record.stages.values()) <= record.seconds
        deciding = set() if settled(method) else {"allocate"}
        assert set(record.stages) == {"plan", "load", "calibrate", "fit", "save"} | deciding
        assert 10**8 < record.peak_memory_bytes < 10**11

    def test_what_it_was_made_from_is_hashed(
        self, method: str, run: Callable[..., Run], recipe: Callable[..., Recipe], stories: Path
    ) -> None:
        _, record = run(method)
        source = file_tensors(stories / "model.safetensors")
        digest = hashlib.sha256(b"".join(source[f"{layer.name}.weight"] for layer in record.layers))
        assert record.weights_sha256 == digest.hexdigest()
        tokens = lexigram.plan(recipe(method)).tokens
        assert tokens is not None
        assert (record.calibration_sha256, record.calibration_tokens) == (tokens.sha256, 12 * 96)

    def test_the_recipe_beside_it_makes_the_same_bytes_again(
        self, method: str, run: Callable[..., Run], tmp_path: Path
    ) -> None:
        out, _ = run(method)
        again = Recipe.parse(Recipe.read(out / "recipe.yaml"))
        with torch.random.fork_rng():
            torch.manual_seed(12345)  # the global random state must not matter
            lexigram.compress(again, tmp_path / "again")
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
        assert (tmp_path / "again" / "config.json").read_bytes() == (out / "config.json").read_bytes()

    def test_plan_needs_no_weights_and_knows_the_sizes(
        self, method: str, run: Callable[..., Run], recipe: Callable[..., Recipe], stories: Path, tmp_path: Path
    ) -> None:
        _, record = run(method)
        for content in (None, b"not a safetensors file"):
            folder = tmp_path / f"weights-{content is not None}"
            shutil.copytree(stories, folder, ignore=shutil.ignore_patterns("*.safetensors"))
            if content is not None:
                (folder / "model.safetensors").write_bytes(content)
            prepared = lexigram.plan(recipe(method, model=str(folder)))
            assert prepared.bytes_before == record.bytes_before
            assert prepared.uncompressed_bytes == record.model_bytes_after - record.bytes_after
            assert [target.name for target in prepared.targets] == [layer.name for layer in record.layers]
            assert prepared.disk_bytes > record.model_bytes_after
            assert prepared.groups == units(method, record)
            assert prepared.cache is None
            if not settled(method):
                # The forms are not known before the weights are; what they may take at most is.
                assert prepared.allocation is None
                assert prepared.specs == {}
                assert 0.98 * prepared.bytes_after < record.bytes_after <= prepared.bytes_after
                continue
            assert prepared.bytes_after == record.bytes_after
            assert prepared.specs == {layer.name: layer.factors for layer in record.layers}
            assert prepared.allocation is not None
            assert prepared.allocation.bytes == prepared.bytes_after


@pytest.mark.parametrize(
    ("method", "options"),
    [("svd", {}), ("svd", {"value_bits": 8}), ("cospadi", PAPER), ("cospadi", INT8), ("cospadi", {})],
)
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.77])
def test_the_ratio_is_kept_and_nearly_used_up(
    method: str, options: dict[str, Any], ratio: float, recipe: Callable[..., Recipe]
) -> None:
    prepared = lexigram.plan(recipe(method, ratio=ratio, options=options))
    for target in prepared.targets:
        spec: Any = prepared.specs[target.name]
        before = 2 * target.shape[0] * target.shape[1]
        removed = 1 - spec.bytes / before
        assert ratio <= removed
        # Of integers, all of a weight may be less than the budget: every rank, and every coefficient.
        rank, coefficients = min(target.shape), spec.left.count
        whole = spec.right.codec.bits <= 8 and spec.left.cols == rank and coefficients == rank * target.shape[0]
        # A rank costs 2 (in + out) bytes, and less in integers; CoSpaDi's steps are finer.
        assert removed < ratio + 2 * sum(target.shape) / before or whole
    assert ratio <= 1 - prepared.bytes_after / prepared.bytes_before


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.77, 0.85])
def test_quantize_keeps_the_ratio_in_steps(ratio: float, recipe: Callable[..., Recipe]) -> None:
    """Never over the budget, and the next wider integers would be."""
    prepared = lexigram.plan(recipe("quantize", ratio=ratio))
    widths = (2, 3, 4, 6, 8)
    for target in prepared.targets:
        spec: Any = prepared.specs[target.name]
        count, cols = target.shape[0] * target.shape[1], target.shape[1]
        groups = count // max(size for size in range(1, 129) if cols % size == 0)
        sizes = {bits: -(-count * bits // 8) + 2 * groups + -(-groups * bits // 8) for bits in widths}
        fitting = [bits for bits in widths if sizes[bits] <= (1 - ratio) * 2 * count]
        assert spec.codec.bits == max(fitting)
        assert spec.bytes == sizes[spec.codec.bits]
    assert ratio <= 1 - prepared.bytes_after / prepared.bytes_before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options", "ratios"),
    [
        ("svd", {}, (0.1, 0.5)),
        ("svd", {"value_bits": 8}, (0.5, 0.75)),
        ("cospadi", PAPER, (0.1, 0.5)),
        ("cospadi", INT8, (0.5, 0.75)),
        ("cospadi", {}, (0.5, 0.75)),
        ("quantize", {}, (0.5, 0.85)),
    ],
)
def test_the_result_speaks_almost_as_well(
    method: str,
    options: dict[str, Any],
    ratios: tuple[float, float],
    run: Callable[..., Run],
    text: str,
    stories: Path,
) -> None:
    dense = perplexity(_dense(stories), text)
    gentle, harsh = (perplexity(run(method, ratio=ratio, options=options)[0], text) for ratio in ratios)
    assert 6 < dense < 9
    assert dense < gentle < 5 * dense
    assert 2 * gentle < harsh < 512  # 512 is what chance gives


def _dense(stories: Path) -> tuple[Any, Any]:
    source = lexigram.Source.resolve(str(stories))
    return source.model(), source.tokenizer()


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "forms", "ratio"), [(16, [PAPER], 0.3), (8, [INT8, {}], 0.6)])
def test_calibrated_low_rank_beats_plain_and_dictionaries_beat_both(
    bits: int, forms: list[dict[str, Any]], ratio: float, run: Callable[..., Run], text: str
) -> None:
    plain = perplexity(run("svd", options={"value_bits": bits, "plain": True}, ratio=ratio)[0], text)
    whitened = perplexity(run("svd", options={"value_bits": bits}, ratio=ratio)[0], text)
    for form in forms:
        dictionaries = perplexity(run("cospadi", options=form, ratio=ratio)[0], text)
        assert dictionaries < whitened < 0.95 * plain


def test_with_plain_the_calibration_changes_the_report_but_not_the_weights(run: Callable[..., Run]) -> None:
    (one, first), (other, second) = (
        run("cospadi", options={"plain": True}, calibration={"seed": seed}) for seed in (0, 1)
    )
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    assert first.calibration_sha256 != second.calibration_sha256
    assert first.mean_relative_error != second.mean_relative_error


@pytest.mark.parametrize(("form", "tensors"), [(PAPER, 3), (INT8, 7)])
def test_the_seed_decides_and_a_layer_does_not_depend_on_which_others_are_fitted(
    form: dict[str, Any], tensors: int, run: Callable[..., Run]
) -> None:
    """Of each layer a mask and the values of both sides, in integers with scales and zeros of both."""
    columns = {"start": "columns", **form}
    whole = file_tensors(run("cospadi", options=columns)[0] / WEIGHTS)
    queries = file_tensors(run("cospadi", options=columns, include=["q_proj"])[0] / WEIGHTS)
    other = file_tensors(run("cospadi", options=columns, include=["q_proj"], seed=7)[0] / WEIGHTS)
    names = [name for name in queries if ".q_proj.factors." in name]
    assert len(names) == 5 * tensors
    assert all(whole[name] == queries[name] for name in names)
    assert all(other[name] != queries[name] for name in names)


def test_calibrating_on_the_models_own_words_needs_no_text(run: Callable[..., Run], text: str) -> None:
    own = {"text": ["self"], "sequences": 12}
    out, record = run("svd", calibration=own)
    assert record.calibration_source.startswith("self: 12 sequences of 96 tokens")
    assert record.calibration_tokens == 12 * 96
    assert "sample" in record.stages
    assert record.calibration_sha256 != run("svd", calibration={**own, "seed": 1})[1].calibration_sha256
    # The model's own stories are as good a text as any: better than none.
    assert perplexity(out, text) < perplexity(run("svd", options={"plain": True})[0], text)


def test_a_sampled_run_repeats_too(run: Callable[..., Run], tmp_path: Path) -> None:
    out, record = run("svd", calibration={"text": ["self"], "sequences": 12})
    again = lexigram.compress(Recipe.parse(Recipe.read(out / "recipe.yaml")), tmp_path / "again")
    assert again.calibration_sha256 == record.calibration_sha256
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()


def test_patterns_choose_the_layers_and_the_rest_keeps_its_weights(run: Callable[..., Run], stories: Path) -> None:
    out, record = run("svd", include=["*.mlp.*", "q_proj"], exclude=["up_proj", "model.layers.2.*"])
    assert {layer.kind for layer in record.layers} == {"q_proj", "gate_proj", "down_proj"}
    assert {layer.layer for layer in record.layers} == {0, 1, 3, 4}
    assert len(record.layers) == 12
    kept, source = file_tensors(out / WEIGHTS), file_tensors(stories / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.gate_proj.weight", "model.norm.weight"):
        original = torch.frombuffer(bytearray(source[name]), dtype=torch.float32)
        assert torch.equal(torch.frombuffer(bytearray(kept[name]), dtype=torch.bfloat16), original.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_not_compressed_is_stored_in_the_dtype_asked_for(
    dtype: str, run: Callable[..., Run], stories: Path
) -> None:
    out, record = run("svd", dtype=dtype)
    source = file_tensors(stories / "model.safetensors")
    compressed = {f"{layer.name}.weight" for layer in record.layers}
    values = sum(len(data) // 4 for name, data in source.items() if name not in compressed)
    assert record.bytes_by_kind["not compressed"] == values * getattr(torch, dtype).itemsize
    assert record.bytes_after == run("svd")[1].bytes_after
    assert lexigram.load(out).dtype == getattr(torch, dtype)


def test_the_accounting_of_the_paper(recipe: Callable[..., Recipe]) -> None:
    for ratio, rho in ((0.2, 2.0), (0.4, 1.5)):
        prepared = lexigram.plan(recipe("cospadi", ratio=ratio, accounting="paper", options={"rho": rho}))
        for target in prepared.targets:
            (out, inner), spec = target.shape, prepared.specs[target.name]
            k = math.floor(math.floor((1 - ratio) * inner * out) / (inner + out / rho))
            assert (spec.left.rows, spec.left.cols, spec.right.cols) == (out, k, inner)
            assert spec.left.nonzeros == math.floor(k / rho) * out
            assert (spec.left.codec.bits, spec.right.codec.bits) == (14, 16)
    for target in (low := lexigram.plan(recipe("svd", ratio=0.2, accounting="paper"))).targets:
        out, inner = target.shape
        assert low.specs[target.name].left.cols == math.floor(math.floor(0.8 * inner * out) / (inner + out))


def test_the_papers_accounting_end_to_end(run: Callable[..., Run], text: str) -> None:
    out, record = run("cospadi", accounting="paper", ratio=0.2, options={"rho": 2.0})
    assert record.parameter_ratio >= 0.2
    assert record.model_bytes_after == sum(map(len, file_tensors(out / WEIGHTS).values()))
    assert perplexity(out, text) < 20


def test_fourteen_bits_weigh_less_a_value(run: Callable[..., Run]) -> None:
    for stored, slack in ((14, 0.05), (16, 0)):  # 14-bit values fill up their last byte
        _, record = run("cospadi", options={**PAPER, "value_bits": stored})
        values = sum(layer.factors.left.nonzeros for layer in record.layers)
        assert stored <= 8 * record.bytes_by_kind["sparse values"] / values <= stored + slack
        assert record.ratio >= 0.3


@pytest.mark.parametrize(("bits", "slack"), [(8, 0), (6, 0.05), (4, 0.05)])
def test_integers_weigh_what_they_say_and_each_group_a_scale_and_a_zero(
    bits: int, slack: float, run: Callable[..., Run]
) -> None:
    _, record = run("cospadi", options={**INT8, "value_bits": bits}, ratio=0.5)
    counts = [layer.factors.left.nonzeros for layer in record.layers]
    values, groups = sum(counts), sum(-(-count // 128) for count in counts)
    kinds = record.bytes_by_kind
    assert bits <= 8 * kinds["sparse values"] / values <= bits + slack
    assert kinds["sparse scales"] == 2 * groups
    assert bits * groups <= 8 * kinds["sparse zeros"] < bits * groups + 8 * len(counts)
    entries = [layer.factors.right.rows * layer.factors.right.cols for layer in record.layers]
    assert kinds["dense values"] == sum(entries)
    assert kinds["dense scales"] == 2 * kinds["dense zeros"]
    assert set(kinds) == {
        f"{form} {part}" for form in ("sparse", "dense") for part in ("values", "scales", "zeros")
    } | {
        "sparse mask",
        "not compressed",
    }
    assert record.ratio >= 0.5


def test_load_and_from_pretrained_agree_and_evaluate_compares_with_the_original(
    run: Callable[..., Run], text: str, stories: Path
) -> None:
    out, _ = run("cospadi")
    tokenizer, plain = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer(text[-2000:], return_tensors="pt")["input_ids"][:, :100]
    with torch.no_grad():
        assert torch.equal(lexigram.load(out)(ids).logits, plain(ids).logits)
    near, far = (
        lexigram.evaluate(
            lexigram.load(run("cospadi", ratio=ratio)[0], dtype=torch.float32),
            tokenizer,
            text[-20_000:],
            context=256,
            windows=4,
            reference=_dense(stories)[0],
        )
        for ratio in (0.1, 0.5)
    )
    assert near.tokens == far.tokens == 4 * 255
    assert 0 < near.kl < far.kl
    assert 1 > near.top1_agreement > far.top1_agreement > 0


@pytest.fixture(scope="session")
def toy_recipe(
    recipe: Callable[..., Recipe], words: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Recipe]:
    """A recipe for one of the toys, by its name."""
    folder = tmp_path_factory.mktemp("toys")

    def build(name: str, method: str, **changes: Any) -> Recipe:
        if not (folder / name).exists():
            toy_folder(folder / name, name)
        calibration = {"text": [str(words)], "sequences": 8, "length": 32}
        return recipe(method, model=str(folder / name), calibration=calibration, **changes)

    return build


TOYS_SMALLER = pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("svd", {}),
        ("cospadi", {"share": "site", "options": INT8}),
        pytest.param("wanda", {}, marks=pytest.mark.slow),
        pytest.param("svd", {"allocation": "knapsack"}, marks=pytest.mark.slow),
        ("cap", {}),
    ],
    ids=["low rank", "shared dictionaries", "pruned", "knapsack", "chosen"],
)
"""Forms that the recipe decides, with and without shared parts, and forms that the Grams decide."""


@TOYS_SMALLER
def test_bits_and_a_size_come_to_the_bytes_of_the_ratio_that_they_are(
    method: str, changes: dict[str, Any], toy_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    record = compress(toy_recipe("llama", method, ratio=1 - 6.25 / 16, **changes), tmp_path / "ratio")
    wanted = (tmp_path / "ratio" / WEIGHTS).read_bytes()
    uncompressed = record.model_bytes_after - record.bytes_after
    for key, value in {"bits": 6.25, "size": str(uncompressed + record.bytes_before * 25 // 64)}.items():
        found = compress(toy_recipe("llama", method, ratio=None, **{key: value}, **changes), tmp_path / key)
        assert (tmp_path / key / WEIGHTS).read_bytes() == wanted
        assert found.requested_ratio == pytest.approx(record.requested_ratio, abs=1e-5)
        assert (found.recipe["ratio"], found.recipe[key]) == (None, value)
    again = Recipe.parse(Recipe.read(tmp_path / "size" / "recipe.yaml"))
    compress(again, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == wanted


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@TOYS_SMALLER
def test_a_size_is_never_exceeded_and_nearly_used(
    name: str, method: str, changes: dict[str, Any], toy_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    wanted = toy_recipe(name, method, ratio=None, size="100kB", **changes)
    record = compress(wanted, tmp_path / "out")
    tensors = file_tensors(tmp_path / "out" / WEIGHTS)
    assert 95_000 < record.model_bytes_after == sum(map(len, tensors.values())) <= 100_000
    dense = sum(2 * values.numel() for values in load_file(Path(wanted.model) / "model.safetensors").values())
    assert record.model_bytes_before == dense
    assert record.requested_ratio == pytest.approx((dense - 100_000) / record.bytes_before)


class Recorder:
    """Counts steps by stage, and which stages are open at once."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.steps: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        self.stages.append((name, total))
        self.steps[name] = 0

        def step() -> None:
            self.steps[name] += 1

        yield step


def test_progress_is_told_every_step(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    seen = Recorder()
    wanted = recipe("svd", include=["q_proj", "o_proj"], calibration={"text": ["self"], "sequences": 9, "length": 16})
    lexigram.compress(wanted, tmp_path / "out", progress=seen)
    assert [name for name, _ in seen.stages] == ["read the weights", "sample calibration text", "compress", "save"]
    assert dict(seen.stages) == seen.steps
    assert seen.steps["compress"] == 10
    assert seen.steps["sample calibration text"] == 9


def test_a_prepared_plan_gives_what_the_recipe_gives(
    recipe: Callable[..., Recipe], run: Callable[..., Run], tmp_path: Path
) -> None:
    wanted = recipe("svd")
    prepared = lexigram.plan(wanted)
    assert isinstance(prepared, Plan)
    assert prepared.seconds > 0
    slow = dataclasses.replace(prepared, seconds=100.0)  # planning counts, whoever called it
    record = lexigram.compress(wanted, tmp_path / "out", prepared=slow)
    assert 100 < record.stages["plan"].seconds < record.seconds < 200
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (run("svd")[0] / WEIGHTS).read_bytes()


def test_the_config_classes_are_the_recipes_methods(run: Callable[..., Run], stories: Path, tmp_path: Path) -> None:
    record = run("svd")[1]
    calibration = Calibration.model_validate(record.recipe["calibration"])
    direct = Recipe(
        model=str(stories),
        method=SvdConfig(),
        ratio=0.3,
        calibration=calibration,
        compute_dtype="float32",
        device="cpu",
    )
    assert direct.model_dump(mode="json") == record.recipe
    assert Recipe(model="m").method == CospadiConfig()


def test_a_context_shorter_than_the_default_decides_the_length(recipe: Callable[..., Recipe]) -> None:
    assert lexigram.plan(recipe("svd", calibration={"length": None})).length == 512


def test_files_are_as_readable_as_files_that_anyone_writes(run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    out, _ = run("svd")
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in out.iterdir()} == {(tmp_path / "plain" / "file").stat().st_mode}


def test_an_interruption_at_any_stage_keeps_what_is_finished(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    class Stop(Recorder):
        def __init__(self, at: str) -> None:
            super().__init__()
            self.at = at

        @contextmanager
        def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
            with super().stage(name, total) as step:
                if name == self.at:
                    raise KeyboardInterrupt
                yield step

    wanted = recipe("svd", include=["q_proj"])
    for stage in ("read the weights", "compress", "save"):
        with pytest.raises(KeyboardInterrupt):
            lexigram.compress(wanted, tmp_path / "out", progress=Stop(stage))
        assert [path.name for path in tmp_path.iterdir()] == (["out.unfinished"] if stage == "save" else [])
    lexigram.compress(wanted, tmp_path / "out", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    lexigram.compress(wanted, tmp_path / "at once")
    weights = "lexigram.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "at once" / weights).read_bytes()


def test_a_model_quantised_by_other_software_is_refused(stories: Path, tmp_path: Path) -> None:
    """Its tensors are codes; taken for weights they would give a model of noise."""
    shutil.copytree(stories, tmp_path / "fp8", copy_function=shutil.copyfile)
    (tmp_path / "fp8").chmod(0o755)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    with pytest.raises(LexigramError, match=r"fp8 is quantised already \(fp8\); name the model that it was made from"):
        plan(Recipe(model=str(tmp_path / "fp8")))


def test_a_plan_belongs_to_its_recipe(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(LexigramError, match="the plan was made from another recipe"):
        compress(recipe(ratio=0.4), tmp_path / "out", prepared=plan(recipe(ratio=0.3)))
    assert list(tmp_path.iterdir()) == []


def test_what_overflows_in_the_stored_dtype_is_refused_before_the_work(
    stories: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    shutil.copytree(stories, tmp_path / "huge", copy_function=shutil.copyfile)
    (tmp_path / "huge").chmod(0o755)
    tensors = load_file(tmp_path / "huge" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e6
    save_file(tensors, tmp_path / "huge" / "model.safetensors", metadata={"format": "pt"})
    changed = recipe().model_copy(update={"model": str(tmp_path / "huge"), "dtype": "float16"})
    with pytest.raises(LexigramError, match=r"model\.norm\.weight has values beyond 65504.*another --dtype"):
        compress(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
