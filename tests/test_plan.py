"""`lexigram plan` and the estimate of time: what is said before any work, and that nothing is done."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Command, toy_folder
from lexigram import estimation
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
        (["-c", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_told(options: list[str], says: str, command: Command, toy: Path, words: Path) -> None:
    said = command("plan", toy, "--method", "svd", "-c", words, "--sequences", 8, "--length", 32, *options)
    assert said.code != 0
    assert re.search(says, said.error), said.error


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
