"""`lexigram plan` and the estimate of time: what is said before any work, and that nothing is done."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Command, toy_folder
from lexigram import LexigramError, estimation
from lexigram.estimation import estimated_seconds
from lexigram.planning import plan
from lexigram.recipe import Recipe
from lexigram.source import Source


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("model") / "llama", "llama")


def recipe(toy: Path, words: Path, **changes: Any) -> Recipe:
    calibration = {"text": [str(words)], "sequences": 8, "length": 32, **changes.pop("calibration", {})}
    settings = {"model": str(toy), "method": {"name": "svd"}, "device": "cpu", "compute_dtype": "float32"}
    return Recipe.parse({**settings, **changes, "calibration": calibration})


def test_the_command_says_memory_disk_and_time_and_writes_nothing(
    command: Command, toy: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("plan", toy, "--method", "svd", "-c", words, "--sequences", 8, "--length", 32)
    assert said.code == 0
    for stage in ("read the weights", "calibrate", "fit", "save"):
        assert re.search(rf"│ {stage} +│ +[\d.]+ [MG]B │", said.out), stage
    for stage in ("calibrate", "fit", "all"):
        assert re.search(rf"│ {stage} +│ +[\d.]+ [MG]B │ about \d+ s │", said.out), stage
    assert re.search(r"about [\d.]+ [MG]B of memory, [\d.]+ [kMG]?B on disk; device ", said.out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-ram", "20MiB"], r"a memory limit of 20 MiB is too small: at least .* give --max-ram \d+MiB"),
        (["--max-ram", "plenty"], "'plenty' is no size of memory"),
        (["--ratio", "1.5"], "ratio"),
        (
            ["--size", "10kB"],
            r"a size of 10kB is too small: what is not compressed takes 0\.052 MB by itself; give",
        ),
        (
            ["--size", "1GB"],
            r"a size of 1GB is no less than the 0\.199 MB that the model takes uncompressed; give a",
        ),
        (
            ["--size", "52000"],
            r"size 52000 is a ratio of 0\.99\d+ here: .*q_proj .* at ratio .* too small: .*; lower the ratio",
        ),
        (
            ["--bits", "0.01"],
            r"0\.01 bits a weight is a ratio of 0\.999375 here: .*q_proj .* too small: .*; lower the ratio",
        ),
        (["-c", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_told(options: list[str], says: str, command: Command, toy: Path, words: Path) -> None:
    said = command("plan", toy, "--method", "svd", "-c", words, "--sequences", 8, "--length", 32, *options)
    assert said.code != 0
    assert re.search(says, said.error), said.error


FORMS: dict[str, dict[str, Any]] = {
    "svd": {},
    "svd, shared": {"share": "consecutive"},
    "cospadi": {"method": {"name": "cospadi"}},
    "cospadi, shared": {"method": {"name": "cospadi"}, "share": "site"},
    "wanda": {"method": {"name": "wanda"}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [2.5, 4.25, 4.1, 9.6])
def test_bits_are_a_ratio_of_sixteen(form: str, bits: float, toy: Path, words: Path) -> None:
    found = plan(recipe(toy, words, bits=bits, **FORMS[form]))
    assert found.ratio == 1 - bits / 16
    assert found.allocation == plan(recipe(toy, words, ratio=1 - bits / 16, **FORMS[form])).allocation
    assert 8 * found.bytes_after <= bits * sum(target.weight_count for target in found.targets)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_size_is_what_is_not_compressed_and_the_rest_of_it(
    name: str, dtype: str, words: Path, tmp_path: Path
) -> None:
    folder = toy_folder(tmp_path / "model", name)
    whole = plan(recipe(folder, words, dtype=dtype))
    for share in (0.2, 0.5, 0.9):
        left = round(share * whole.bytes_before)
        found = plan(recipe(folder, words, dtype=dtype, size=str(whole.uncompressed_bytes + left)))
        assert found.ratio == pytest.approx(1 - share, abs=1e-4)
        assert 0.93 * left < found.bytes_after <= left  # a rank more is 4 % of a matrix of 64 x 128 at .2
    for outside in (0, whole.bytes_before):
        with pytest.raises(LexigramError, match="; give a s"):
            plan(recipe(folder, words, dtype=dtype, size=str(whole.uncompressed_bytes + outside)))


def test_buffers_that_a_checkpoint_holds_are_not_compressed(
    toy: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = plan(recipe(toy, words)).uncompressed_bytes, Source.skeleton

    def with_buffers(source: Source) -> Any:
        skeleton = real(source)
        skeleton.register_buffer("scale", torch.ones(5))
        skeleton.register_buffer("places", torch.arange(3))
        skeleton.register_buffer("passing", torch.ones(99), persistent=False)
        return skeleton

    monkeypatch.setattr(Source, "skeleton", with_buffers)
    assert plan(recipe(toy, words)).uncompressed_bytes == before + 5 * 2 + 3 * 8


def test_a_replayed_allocation_keeps_to_the_bits_that_are_asked_for(toy: Path, words: Path, tmp_path: Path) -> None:
    made = plan(recipe(toy, words, bits=5)).allocation
    assert made is not None
    file = tmp_path / "allocation.json"
    file.write_text(made.model_dump_json())
    assert plan(recipe(toy, words, bits=5, allocation=str(file))).allocation == made
    with pytest.raises(
        LexigramError, match=r"allocation\.json takes \d+ bytes, and 4 bits a weight leaves \d+; name another"
    ):
        plan(recipe(toy, words, bits=4, allocation=str(file)))


def test_the_plan_says_what_was_asked_for_and_what_the_model_will_take(
    command: Command, toy: Path, words: Path
) -> None:
    options = "--method", "svd", "-c", words, "--sequences", 8, "--length", 32
    for given, said in ((("--bits", 8), "ratio 0.5 for 8 bits a weight"), (("--size", "120kB"), "for size 120kB")):
        shown = command("plan", toy, *options, *given)
        assert shown.code == 0
        assert said in " ".join(shown.out.split())
    found = re.search(r"│ +│ model +│ +│ +│ 199\.3 kB │ (1\d\d\.\d) kB │", shown.out)
    assert found
    assert 115 < float(found[1]) <= 120


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, ["calibrate", "fit"]),
        ({"sequential": True}, ["calibrate", "fit"]),
        ({"group": 2}, ["calibrate", "fit"]),
        ({"ratio": 0.4, "allocation": "knapsack"}, ["calibrate", "allocate", "fit"]),
        ({"ratio": 0.4, "method": {"name": "cap", "iterations": 5}}, ["calibrate", "allocate", "fit"]),
        ({"calibration": {"text": ["self"]}}, ["calibrate", "fit"]),
    ],
    ids=str,
)
def test_every_stage_that_takes_long_is_estimated(
    changes: dict[str, Any], stages: list[str], toy: Path, words: Path
) -> None:
    found = estimated_seconds(plan(recipe(toy, words, **changes)))
    assert sorted(found) == sorted(stages)
    assert all(0 <= seconds < 60 for seconds in found.values())
    assert found["calibrate"] > 0


@pytest.mark.parametrize("sequential", [False, True])
def test_an_estimate_is_what_is_measured_times_what_there_is(
    sequential: bool, toy: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is measured takes a second: all 8 sequences through a layer, and a fit of one of the smaller shapes."""
    monkeypatch.setattr(estimation, "_timed", lambda function: (1.0, function()))
    monkeypatch.setattr(estimation, "_SECONDS", 1.5)
    prepared = plan(recipe(toy, words, sequential=sequential), workers=1)
    found = estimated_seconds(prepared)
    assert found["calibrate"] == pytest.approx(2 * (1 + sequential))  # layers
    counts = sorted(Counter(target.shape for target in prepared.targets).items(), key=lambda item: math.prod(item[0]))
    measured, others = counts[:2], counts[2:]
    assert others
    last = math.prod(measured[-1][0])
    wanted = sum(count for _, count in measured) + sum(count * (math.prod(s) / last) ** 1.1 for s, count in others)
    assert found["fit"] == pytest.approx(wanted)


def test_shapes_that_are_measured_are_counted_with_their_own_time(
    toy: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimation, "_timed", lambda function: (1.0, function()))
    monkeypatch.setattr(estimation, "_SECONDS", 1e9)
    prepared = plan(recipe(toy, words), workers=1)
    assert estimated_seconds(prepared)["fit"] == len(prepared.targets)
