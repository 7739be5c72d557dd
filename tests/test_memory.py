"""Memory: what is predicted, what a limit leads to, and that no more than one layer is ever there."""

import hashlib
import json
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import lexigram
from conftest import Command, toy_folder, words_tokenizer
from lexigram import LexigramError, Recipe, planning
from lexigram.memory import (
    Needs,
    Way,
    available_bytes,
    chosen_way,
    left_by_cgroup,
    left_by_machine,
    memory_cgroups,
    parsed,
)
from lexigram.planning import plan
from lexigram.source import Source
from lexigram.weights import Weights
from limits import compress_within

GIB = 2**30
Build = Callable[..., Recipe]

NEEDS = Needs(
    tokens=2**16,
    length=2**10,
    layers=30,
    largest=10**8,
    outside=10**7,
    layer=10**8,
    hidden=4096,
    activations=400_000,
    logits=200_000,
    width=2048,
    weights=10**7,
    group=1,
    grams=10**8,
)


@pytest.fixture
def recipe(words: Path, tmp_path: Path) -> Build:
    def build(name: str = "llama", **changes: Any) -> Recipe:
        folder = tmp_path / name
        calibration = {"text": [str(words)], "sequences": 8, "length": 32}
        settings = {"model": str(folder), "method": {"name": "svd"}, "device": "cpu", "compute_dtype": "float32"}
        if not folder.exists():
            toy_folder(folder, name)
        return Recipe.parse({**settings, **changes, "calibration": calibration})

    return build


@pytest.mark.parametrize(
    ("written", "size"),
    [("4GiB", 4 * GIB), ("1.5 gib", 3 * GIB // 2), ("800MB", 800_000_000), ("2e9", 2 * 10**9), ("64MiB", 2**26)],
)
def test_sizes(written: str, size: int) -> None:
    assert parsed(written) == size


@pytest.mark.parametrize("written", ["", "4 apples", "GiB", "-1GiB", "1.2.3GB", "4GiB!", "1e999GB"])
def test_what_is_no_size(written: str) -> None:
    with pytest.raises(LexigramError, match=r"is no size of memory; write something like 4GiB"):
        parsed(written)


def test_a_limit_is_kept_by_the_fastest_way_that_can() -> None:
    """Ever smaller limits: first workers share the memory, then hidden states go to disk, then there are fewer workers."""
    resident = 400_000_000
    free, stages = chosen_way(NEEDS, resident, 4, None)
    assert free == Way(4)

    def safe(stages: dict[str, int]) -> int:
        return max(stages.values()) + (max(stages.values()) - resident) // 5

    seen, limit = [free], safe(stages)
    while True:
        try:
            way, stages = chosen_way(NEEDS, resident, 4, limit - 1)
        except LexigramError as error:
            named = re.search(r"give --max-ram (\d+)MiB", str(error))
            assert named is not None
            assert chosen_way(NEEDS, resident, 4, int(named[1]) * 2**20)[0] == seen[-1], "what it names will do"
            assert chosen_way(NEEDS, resident, 4, limit)[0] == seen[-1], "and little less"
            break
        assert max(stages.values()) <= limit - 1
        seen, limit = [*seen, way], safe(stages)
    assert seen == [Way(4), Way(4, spills=True), Way(2, spills=True), Way(1, spills=True)]


def test_without_a_limit_there_are_as_many_workers_as_the_machine_has_room_for() -> None:
    """As under a limit, whatever the process had at its peak before; with no room for any, the smallest is tried."""
    resident, limits = 400_000_000, range(0, 5 * GIB, GIB // 8)
    for size in limits:
        by_room, stages = chosen_way(NEEDS, resident, 4, None, 9 * GIB, room=size)
        try:
            by_limit = chosen_way(NEEDS, resident, 4, size)[0]
        except LexigramError:
            by_limit = Way(1, spills=True)
        assert by_room == by_limit
        assert stages["plan"] == 9 * GIB
    assert chosen_way(NEEDS, resident, 4, None)[0] == Way(4)
    assert chosen_way(NEEDS, resident, 4, 64 * GIB, room=0)[0] == Way(4), "a limit that is told is the limit"


def test_what_no_way_makes_smaller_costs_no_worker() -> None:
    assert chosen_way(replace(NEEDS, whole=64 * GIB), 0, 4, None, room=GIB)[0] == Way(4)


@pytest.mark.parametrize(
    ("meminfo", "left"),
    [
        ("MemTotal:       24684096 kB\nMemFree:  1 kB\nMemAvailable:   24093812 kB\n", 24093812 * 1024),
        ("MemTotal:       24684096 kB\n", None),  # Linux before 3.14
        ("", None),
    ],
)
def test_what_the_machine_has_left(meminfo: str, left: int | None) -> None:
    assert left_by_machine(meminfo) == left


@pytest.mark.parametrize(
    ("limit", "usage", "stat", "left"),
    [
        ("1000\n", "700\n", "", 300),
        ("1000\n", "700\n", "anon 500\ninactive_file 150\nactive_file 50\nfile 250\n", 500),
        ("1000\n", "700\n", "inactive_file 1\ntotal_inactive_file 90\ntotal_active_file 10\n", 400),
        ("1000\n", "1200\n", "", 0),
        ("1000\n", "10\n", "inactive_file 400\n", 1000),
        ("max\n", "700\n", "", None),
        ("1000\n", "", "", None),
        ("", "", "", None),
    ],
)
def test_what_a_cgroup_leaves(limit: str, usage: str, stat: str, left: int | None) -> None:
    assert left_by_cgroup(limit, usage, stat) == left


def test_the_cgroups_of_a_process() -> None:
    """All that stand above it, too: of the one hierarchy (v2), or of that of memory among several (v1)."""
    second = ("memory.max", "memory.current", "memory.stat")
    assert memory_cgroups("0::/user.slice/run\n") == [
        (Path("/sys/fs/cgroup"), second),
        (Path("/sys/fs/cgroup/user.slice"), second),
        (Path("/sys/fs/cgroup/user.slice/run"), second),
    ]
    assert memory_cgroups("0::/\n") == [(Path("/sys/fs/cgroup"), second)]
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    assert memory_cgroups("9:name=systemd:/\n4:hugetlb,memory:/job:1\n3:cpuset:/\n") == [
        (Path("/sys/fs/cgroup/memory"), first),
        (Path("/sys/fs/cgroup/memory/job:1"), first),
    ]
    assert memory_cgroups("") == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_is_available_here() -> None:
    found = available_bytes()
    assert found is not None
    assert 0 <= found <= psutil.virtual_memory().total


def test_what_is_available_bounds_the_workers_that_nobody_asked_for(
    recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_WORTH_WORKERS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(planning, "available_bytes", lambda: None)
    free = plan(recipe())
    assert (free.way, free.room, free.beyond_room) == (Way(8), None, False)
    added = free.memory["fit"] - free.memory["save"]
    monkeypatch.setattr(planning, "available_bytes", lambda: added // 2)
    bounded = plan(recipe())
    assert 1 <= bounded.way.workers < 8
    assert not bounded.beyond_room
    asked = plan(recipe(), workers=8)
    assert asked.way == Way(8)
    assert asked.beyond_room
    assert plan(recipe(), max_ram=64 * GIB).way == Way(8)


def test_memory_that_may_not_suffice_is_told_and_not_refused(
    command: Command, recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe()
    args = [wanted.model, "-c", wanted.calibration.text[0], "--sequences", 8, "--length", 32, "--method", "svd"]
    monkeypatch.setattr(planning, "available_bytes", lambda: None)
    assert "the system may end the run" not in command("plan", *args).out
    monkeypatch.setattr(planning, "available_bytes", lambda: 1000)
    said = command("plan", *args)
    assert re.search(r"no more than [\d.]+ MB of memory are there for it: the system may end the run", said.out)
    assert "1 worker, hidden states in files" in said.out
    assert "take fewer workers than 2, or take a larger" in command("plan", *args, "--workers", 2).out
    done = command("compress", *args, "--out", tmp_path / "out")
    assert done.code == 0
    assert "the system may end the run" in done.out


def test_every_size_counts() -> None:
    before = max(NEEDS.stages(Way(), 0).values())
    for name in ("tokens", "largest", "outside", "hidden", "activations", "width", "weights", "group", "grams", "held"):
        grown = replace(NEEDS, **{name: 500 * getattr(NEEDS, name) + 10**9 * (name == "held")})
        assert max(grown.stages(Way(), 0).values()) > before, name


def test_a_limit_that_is_too_small_is_refused_before_any_work(command: Command, recipe: Build, tmp_path: Path) -> None:
    wanted = recipe()
    args = ["compress", wanted.model, "--out", tmp_path / "out", "-c", wanted.calibration.text[0], "--sequences", 8]
    args += ["--length", 32, "--method", "svd"]
    ended = command(*args, "--max-ram", "10MiB")
    assert ended.code == 1
    found = re.search(r"a memory limit of 10 MiB is too small: at least .* give --max-ram (\d+)MiB", ended.error)
    assert found is not None
    assert not (tmp_path / "out").exists()
    # This process has other tests' memory, and may take a little more the next time.
    done = command(*args, "--max-ram", f"{int(found[1]) + 100}MiB")
    assert done.code == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["predicted_memory_bytes"] > 0


def digest(out: Path) -> str:
    return hashlib.sha256((out / "lexigram.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "name", ["llama-tied", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3", "phi"))]
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"sequential": True}, {"allocation": "knapsack", "ratio": 0.4}],
    ids=["plain", "sequential", "knapsack"],
)
def test_hidden_states_in_files_change_no_byte(
    name: str, changes: dict[str, Any], recipe: Build, tmp_path: Path
) -> None:
    wanted = recipe(name, **changes)
    lexigram.compress(wanted, tmp_path / "held")
    prepared = plan(wanted)
    lexigram.compress(wanted, tmp_path / "spilled", prepared=replace(prepared, way=Way(spills=True)))
    assert digest(tmp_path / "held") == digest(tmp_path / "spilled")
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"sequential": True}, {"allocation": "knapsack", "ratio": 0.4}],
    ids=["plain", "sequential", "knapsack"],
)
def test_one_layer_and_what_is_outside_of_all_is_the_most_that_is_read(
    name: str, changes: dict[str, Any], recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving included: every tensor that comes from a file is counted as long as it lives."""
    wanted, live, most = recipe(name, **changes), [0], [0]
    frame, weights = Source.resolve(wanted.model).opened()
    sizes = {key: entry.read().numel() * entry.dtype.itemsize for key, entry in weights.entries.items()}
    layers = [sum(size for key, size in sizes.items() if f".{number}." in key) for number in range(2)]
    read = Weights.read

    def counted(self: Weights, key: str) -> Tensor:
        tensor = read(self, key)
        size = tensor.numel() * tensor.element_size()
        live[0] += size
        most[0] = max(most[0], live[0])
        weakref.finalize(tensor, lambda: live.__setitem__(0, live[0] - size))
        return tensor

    monkeypatch.setattr(Weights, "read", counted)
    lexigram.compress(wanted, tmp_path / "out")
    assert most[0] > 0
    assert most[0] <= max(layers) + sum(sizes.values()) - sum(layers)
    assert most[0] < 0.8 * sum(sizes.values())
    del frame


def random_model(folder: Path, **sizes: int) -> Path:
    """A Llama of random float32 weights, written layer by layer through its own `save_pretrained`."""
    config = LlamaConfig(
        vocab_size=200, max_position_embeddings=256, num_key_value_heads=sizes["num_attention_heads"], **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


def settings(model: Path, words: Path, **changes: Any) -> dict[str, Any]:
    calibration = {"text": [str(words)], "sequences": 4, "length": 64}
    return {
        "model": str(model),
        "method": {"name": "magnitude"},
        "device": "cpu",
        "calibration": calibration,
        **changes,
    }


@pytest.mark.slow
def test_a_model_three_times_as_large_as_the_limit(words: Path, tmp_path: Path) -> None:
    """The system kills the process, or refuses it memory, beyond the limit; the result loads.

    What a process takes before it begins is some 400 MiB, and differs between machines; the limit leaves a fifth of it.
    """
    limit = 780 * 2**20
    model = random_model(
        tmp_path / "model", hidden_size=1024, intermediate_size=10240, num_hidden_layers=18, num_attention_heads=8
    )
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert size >= 3 * limit
    wanted = settings(model, words, include=["q_proj", "k_proj", "v_proj", "o_proj"])
    ended = compress_within(wanted, tmp_path / "out", limit, max_ram=limit)
    assert ended.code == 0, ended.err[-2000:]
    figures = json.loads(ended.out)
    assert figures["peak"] <= limit
    assert len(lexigram.load(tmp_path / "out").state_dict()) > 0
    assert ended.by in ("a cgroup", "ulimit -d")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories", "wide", "deep"])
def test_the_peak_is_predicted_to_15_percent(name: str, words: Path, data: Path, tmp_path: Path) -> None:
    if name == "stories":
        wanted = settings(data / "stories260K", data / "tinystories" / "tinystories.txt")
    else:
        sizes = {"wide": (1024, 4096, 2), "deep": (512, 1024, 12)}[name]
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers")
        model = random_model(tmp_path / "model", num_attention_heads=8, **dict(zip(keys, sizes, strict=True)))
        wanted = settings(model, words, method={"name": "svd"})
    ended = compress_within(wanted, tmp_path / "out", None)
    assert ended.code == 0, ended.err[-2000:]
    figures = json.loads(ended.out)
    assert abs(figures["predicted"] / figures["peak"] - 1) <= 0.15, figures
