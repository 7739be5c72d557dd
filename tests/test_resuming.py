"""Runs that end early: killed, interrupted, out of disk, and gone on with. The oracle is an uninterrupted run's bytes."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lexigram
from conftest import toy_folder
from endings import Stop, StopAt
from lexigram import LexigramError, Recipe, fitting, staging
from lexigram.allocation.units import Unit
from lexigram.methods import Fitted, fit_group
from lexigram.runfolder import MANIFEST, held_bytes, opened, run_folder
from lexigram.source import Source
from lexigram.staging import REPLACED
from lexigram.transformers_io.writing import write_model
from lexigram.weights import Held

WEIGHTS = "lexigram.safetensors"
Build = Callable[..., Recipe]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def recipe(toy: Path, words: Path) -> Build:
    """A run of 14 units that takes a moment."""

    def build(**changes: Any) -> Recipe:
        calibration = {"text": [str(words)], "sequences": 4, "length": 32, **changes.pop("calibration", {})}
        settings = {"model": str(toy), "method": {"name": "svd"}, "device": "cpu", "compute_dtype": "float32"}
        return Recipe.parse({**settings, **changes, "calibration": calibration})

    return build


def digest(out: Path) -> str:
    return hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def wanted(recipe: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What uninterrupted runs come to, by the name of their settings."""
    found = {}
    for name, settings in WAYS.items():
        out = tmp_path_factory.mktemp("whole") / "out"
        lexigram.compress(recipe(**settings), out)
        found[name] = digest(out)
    return found


WAYS: dict[str, dict[str, Any]] = {
    "streamed": {},
    "knapsack": {"allocation": "knapsack", "ratio": 0.4},
    "sequential": {"sequential": True},
    "groups": {"method": {"name": "cospadi", "iterations": 2}, "group": 2},
    "cap": {"method": {"name": "cap", "iterations": 20, "batch": 2, "passes": 1}, "ratio": 0.4},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_ended_anywhere_ends_in_the_same_bytes(
    way: str, recipe: Build, wanted: dict[str, str], tmp_path: Path
) -> None:
    """It is ended again and again, at random steps; reading the weights takes the first 21."""
    out, draw, ends = tmp_path / "out", random.Random(way), 0
    while True:
        at = draw.randint(22, 36) if ends < 4 else draw.randint(1, 90)
        try:
            lexigram.compress(recipe(**WAYS[way]), out, resume=True, progress=StopAt(at))
            break
        except Stop:
            ends += 1
            assert not out.exists()
            assert ends < 40
    assert ends >= 4
    assert digest(out) == wanted[way]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sharded_weights_are_read_shard_by_shard(
    recipe: Build, toy: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    AutoTokenizer.from_pretrained(toy).save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 3
    _, weights = Source.resolve(str(tmp_path / "model")).opened()
    assert not any(isinstance(entry, Held) for entry in weights.entries.values())
    lexigram.compress(recipe(model=str(tmp_path / "model")), tmp_path / "out")
    assert digest(tmp_path / "out") == wanted["streamed"]


def test_a_result_in_several_files_is_the_same_model(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small files stand for those of a model beyond the 5 GB that one file holds; `verify` reads them, too."""
    wanted = recipe(method={"name": "cospadi", "iterations": 2}, group=2)
    lexigram.compress(wanted, tmp_path / "one")
    with monkeypatch.context() as patched:
        patched.setattr("lexigram.pipeline.write_model", partial(write_model, shard_bytes=40_000))
        lexigram.compress(wanted, tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 60_000 for file in files)
    one, many = (lexigram.load(tmp_path / name).state_dict() for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(one[key], ordinary[key]) for key in one)
    assert lexigram.verify(tmp_path / "many").passed
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    assert not lexigram.verify(tmp_path / "many").passed


def test_a_kill_after_the_last_rename(
    recipe: Build, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is in its place, and the run's folder was not removed yet."""
    with monkeypatch.context() as patched:
        patched.setattr("lexigram.runfolder._remove", lambda *_: None)
        record = lexigram.compress(recipe(), tmp_path / "out")
    assert (tmp_path / "out.unfinished" / MANIFEST).is_file()
    with pytest.raises(LexigramError, match="out exists and is not empty"):
        lexigram.compress(recipe(), tmp_path / "out")
    again = lexigram.compress(recipe(), tmp_path / "out", resume=True)
    assert again.tensors_sha256 == record.tensors_sha256
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert digest(tmp_path / "out") == wanted["streamed"]


def killed_between_renames(recipe: Build, out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Leave a result aside that was to be replaced; its digest."""
    lexigram.compress(recipe(ratio=0.5), out)
    before = digest(out)
    with monkeypatch.context() as patched:
        patched.setattr("lexigram.staging.os.replace", partial(replaced_but_by, out))
        with pytest.raises(Stop):
            lexigram.compress(recipe(), out, overwrite=True)
    assert not out.exists()
    return before


def replaced_but_by(out: Path, source: Any, target: Any, *, replace: Callable[..., None] = os.replace) -> None:
    """`os.replace` that ends the run where the new result is to become `out`."""
    if Path(target) == out and ".partial-" in str(source):
        raise Stop
    replace(source, target)


@pytest.mark.parametrize("state", ["whole", "damaged manifest", "empty folder in its place"])
def test_an_earlier_result_is_back_before_one_is_told_to_delete_the_run(
    state: str, recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "out", "holds an unfinished run of 14 fitted .*, or delete it"
    before = killed_between_renames(recipe, out, monkeypatch)
    if state == "damaged manifest":
        (tmp_path / "out.unfinished" / MANIFEST).write_bytes(b"{")
        said = r"cannot be read; delete .*out\.unfinished and run again"
    elif state == "empty folder in its place":
        out.mkdir()
    with pytest.raises(LexigramError, match=said):
        lexigram.compress(recipe(), out, overwrite=True)
    assert digest(out) == before
    assert list((tmp_path / "out.unfinished").rglob(WEIGHTS)) == []
    with pytest.raises(LexigramError, match="out exists and is not empty"):
        lexigram.compress(recipe(), out)


def test_a_kill_between_two_renames_loses_no_earlier_result(
    recipe: Build, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --overwrite: the old result is aside, the new one not in its place; going on puts it back first."""
    before = killed_between_renames(recipe, tmp_path / "out", monkeypatch)
    with pytest.raises(Stop):
        lexigram.compress(recipe(), tmp_path / "out", overwrite=True, resume=True, progress=StopAt(36))
    assert digest(tmp_path / "out") == before
    lexigram.compress(recipe(), tmp_path / "out", overwrite=True, resume=True)
    assert digest(tmp_path / "out") == wanted["streamed"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_flipped_bit_in_a_gram_is_named(recipe: Build, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        lexigram.compress(recipe(**WAYS["knapsack"]), tmp_path / "out", progress=StopAt(30))
    file = sorted((tmp_path / "out.unfinished" / "grams").glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(LexigramError, match=rf"the Gram .*{file.name} cannot be read: its values are not those"):
        lexigram.compress(recipe(**WAYS["knapsack"]), tmp_path / "out", resume=True)


def test_no_unit_is_fitted_twice(recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[tuple[str, ...]] = []

    def note(task: fitting.Task) -> tuple[Unit, Fitted]:
        fitted.append(task.unit.members)
        return fitting.fitted(task)

    monkeypatch.setattr("lexigram.pipeline.fitted", note)
    for at in (27, 33, 1000):  # 21 tensors are read first
        try:
            lexigram.compress(recipe(), tmp_path / "out", resume=True, progress=StopAt(at))
        except Stop:
            assert not (tmp_path / "out").exists()
    assert (tmp_path / "out").is_dir()
    assert len(fitted) == len(set(fitted)) == 14


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ratio": 0.5}, r"was begun with ratio 0\.2, and this run has 0\.5"),
        ({"seed": 3}, "was begun with seed 42, and this run has 3"),
        ({"dtype": "float32"}, "was begun with dtype bfloat16, and this run has float32"),
        ({"method": {"name": "wanda"}}, "was begun with the method's name svd, and this run has wanda"),
        ({"method": {"name": "svd", "value_bits": 8}}, "was begun with the method's value_bits"),
        ({"calibration": {"seed": 1}}, "was begun with the calibration [0-9a-f]{64}, and this run has [0-9a-f]{64}"),
        ({"compute_dtype": "bfloat16"}, "was begun with a forward pass in float32, and this run has bfloat16"),
        ({"exclude": ["down_proj"]}, "was begun with exclude"),
    ],
    ids=str,
)
def test_a_run_of_something_else_is_refused_with_the_difference(
    changes: dict[str, Any], says: str, recipe: Build, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        lexigram.compress(recipe(), tmp_path / "out", progress=StopAt(27))
    before = (tmp_path / "out.unfinished" / MANIFEST).read_bytes()
    with pytest.raises(LexigramError, match=f"out.unfinished {says}"):
        lexigram.compress(recipe(**changes), tmp_path / "out", resume=True)
    assert (tmp_path / "out.unfinished" / MANIFEST).read_bytes() == before, "and nothing is lost"


def test_other_weights_and_other_versions_are_refused(
    recipe: Build, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(toy, tmp_path / "model")
    with pytest.raises(Stop):
        lexigram.compress(recipe(model=str(other)), tmp_path / "out", progress=StopAt(27))
    lexigram.compress(recipe(model=str(toy)), tmp_path / "out", resume=True)  # the same model elsewhere
    with pytest.raises(Stop):
        lexigram.compress(recipe(model=str(other)), tmp_path / "next", progress=StopAt(27))
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(LexigramError, match=r"was begun with the model [0-9a-f]{64}, and this run has"):
        lexigram.compress(recipe(model=str(other)), tmp_path / "next", resume=True)
    found = lexigram.pipeline.versions()
    monkeypatch.setattr("lexigram.pipeline.versions", lambda: {**found, "torch": "0.1"})
    with pytest.raises(LexigramError, match=r"was begun with the version of torch .*, and this run has 0\.1"):
        lexigram.compress(recipe(model=str(toy)), tmp_path / "next", resume=True)


def test_without_resume_an_unfinished_run_is_left_alone(recipe: Build, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        lexigram.compress(recipe(), tmp_path / "out", progress=StopAt(27))
    with pytest.raises(
        LexigramError, match=r"holds an unfinished run of \d+ fitted .*; go on with --resume, or delete"
    ):
        lexigram.compress(recipe(), tmp_path / "out")


def test_resume_without_anything_to_go_on_with_is_a_run(recipe: Build, wanted: dict[str, str], tmp_path: Path) -> None:
    lexigram.compress(recipe(), tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == wanted["streamed"]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "empty"])
def test_a_damaged_unit_is_fitted_again(damage: str, recipe: Build, wanted: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        lexigram.compress(recipe(), tmp_path / "out", progress=StopAt(30))
    file = sorted((tmp_path / "out.unfinished" / "objects").iterdir())[0]
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "flipped":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: -5 if damage == "truncated" else 0])
    lexigram.compress(recipe(), tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == wanted["streamed"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"identity": 3}', b"[]"])
def test_a_damaged_manifest_is_named(content: bytes, recipe: Build, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        lexigram.compress(recipe(), tmp_path / "out", progress=StopAt(27))
    (tmp_path / "out.unfinished" / MANIFEST).write_bytes(content)
    with pytest.raises(LexigramError, match=r"manifest\.json cannot be read; delete .*out\.unfinished and run again"):
        lexigram.compress(recipe(), tmp_path / "out", resume=True)


def test_two_runs_on_one_folder(recipe: Build, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        lexigram.compress(recipe(), tmp_path / "out", progress=StopAt(27))
    manifest = json.loads((tmp_path / "out.unfinished" / MANIFEST).read_text())
    with (
        opened(tmp_path / "out", manifest["identity"], resume=True),
        pytest.raises(LexigramError, match=r"another run works on .*out\.unfinished; wait for it"),
    ):
        lexigram.compress(recipe(), tmp_path / "out", resume=True, progress=StopAt(1))


def test_ctrl_c_finishes_the_matrix(
    recipe: Build, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the middle of the fifth fit; five units are on disk then, and a second one does not wait."""
    calls: list[int] = []

    def interrupted(*args: Any) -> Fitted:
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return fit_group(*args)

    monkeypatch.setattr(signal, "default_int_handler", signal.default_int_handler)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background
    try:
        with monkeypatch.context() as patched:
            patched.setattr("lexigram.fitting.fit_group", interrupted)
            with pytest.raises(KeyboardInterrupt):
                lexigram.compress(recipe(), tmp_path / "out")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        manifest = json.loads((tmp_path / "out.unfinished" / MANIFEST).read_text())
        assert len(manifest["units"]) == len(calls) == 5

        def twice(*_args: Any) -> Fitted:
            for _ in range(2):  # another thread may take a signal: the handler is called a little later then
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
            pytest.fail("it went on")

        with monkeypatch.context() as patched:
            patched.setattr("lexigram.fitting.fit_group", twice)
            with pytest.raises(KeyboardInterrupt):
                lexigram.compress(recipe(), tmp_path / "out", resume=True)
    finally:
        signal.signal(signal.SIGINT, before)
    lexigram.compress(recipe(), tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == wanted["streamed"]


@pytest.mark.slow
def test_workers_change_no_byte(recipe: Build, wanted: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        lexigram.compress(recipe(), tmp_path / "out", progress=StopAt(25), workers=lexigram.Workers(2))
    lexigram.compress(recipe(), tmp_path / "out", resume=True, workers=lexigram.Workers(2))
    assert digest(tmp_path / "out") == wanted["streamed"]


# ------------------------------------------------------------------------------------------------------------ real ends


def slowly(wanted: Recipe, out: Path, **options: Any) -> None:
    """A run in a process of its own, whose fits take a while."""
    torch.set_num_threads(1)

    def slow(*args: Any) -> Fitted:
        time.sleep(0.05)
        return fit_group(*args)

    fitting.fit_group = slow  # type: ignore[attr-defined]
    lexigram.compress(wanted, out, resume=True, **options)


def killed(recipe: Recipe, out: Path, kills: int, draw: random.Random, **options: Any) -> int:
    """Kill a run so often, at random moments, and start it again; how many kills met a process at work."""
    met = 0
    context = get_context("fork")
    for _ in range(kills):
        process = context.Process(target=slowly, args=(recipe, out), kwargs=options)
        process.start()
        count = _units(out)
        until = time.monotonic() + (draw.uniform(0, 0.5) if draw.random() < 0.5 else 60)
        while time.monotonic() < until and process.is_alive() and _units(out) <= count:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))
        met += process.is_alive()
        process.kill()
        process.join()
    return met


def _units(out: Path) -> int:
    try:
        return len(json.loads((run_folder(out) / MANIFEST).read_text())["units"])
    except OSError:
        return 0


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_moments(kills: int, recipe: Build, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The manifest is whole whenever it is read; in the end the bytes are those of a run that nobody killed."""
    torch.set_num_threads(1)  # as in `slowly`: a run goes on with as many as it was begun with
    way: dict[str, Any] = {}
    if kills > 10:  # 35 units
        data = request.getfixturevalue("data")
        way = {
            "model": str(data / "stories260K"),
            "calibration": {"text": [str(data / "tinystories" / "tinystories.txt")]},
        }
    met = killed(recipe(**way), tmp_path / "out", kills, random.Random(kills))
    assert met >= 0.8 * kills
    if not (tmp_path / "out").exists() or run_folder(tmp_path / "out").exists():
        lexigram.compress(recipe(**way), tmp_path / "out", resume=True)
    lexigram.compress(recipe(**way), tmp_path / "whole")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, "cached", "sampled from the model", "two workers"])
def test_kills_of_every_kind_of_run(way: str, recipe: Build, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    wanted = recipe(**WAYS.get(way, {}), **({"calibration": {"text": ["self"]}} if way.startswith("sampled") else {}))
    options = {"cached": {"cache": tmp_path / "cache"}, "two workers": {"workers": lexigram.Workers(2)}}.get(way, {})
    met = killed(wanted, tmp_path / "out", 8, random.Random(way), **options)
    assert met >= 4
    if not (tmp_path / "out").exists() or run_folder(tmp_path / "out").exists():
        lexigram.compress(wanted, tmp_path / "out", resume=True, **options)
    lexigram.compress(wanted, tmp_path / "whole")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"} | ({"cache"} if way == "cached" else set())


def test_what_is_on_disk_already_is_not_asked_for_again(
    recipe: Build, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte less than what is missing is refused; half-written files of a kill count, as they are removed first."""
    out, settings = tmp_path / "out", recipe(**WAYS["knapsack"])
    with pytest.raises(Stop):
        lexigram.compress(settings, out, progress=StopAt(8, of="compress"))
    hidden = run_folder(out) / ".streamed" / "Gram"
    hidden.parent.mkdir()
    hidden.write_bytes(bytes(1000))
    there = sum(path.stat().st_size for path in run_folder(out).rglob("*") if path.is_file())
    assert there > 100_000
    missing = lexigram.plan(settings).disk_bytes - there
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _path: SimpleNamespace(free=missing - 1))
    with pytest.raises(LexigramError, match="free some space"):
        lexigram.compress(settings, out, resume=True)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _path: SimpleNamespace(free=missing))
    lexigram.compress(settings, out, resume=True)
    assert digest(out) == wanted["knapsack"]


def test_an_earlier_result_that_goes_back_makes_no_room(tmp_path: Path) -> None:
    kept, replaced = run_folder(tmp_path / "out") / "kept", run_folder(tmp_path / "out") / f".out{REPLACED}x" / "out"
    replaced.mkdir(parents=True)
    assert held_bytes(run_folder(tmp_path / "out")) == 0
    for file in (kept, replaced / "weights"):
        file.write_bytes(bytes(10))
    assert held_bytes(run_folder(tmp_path / "out")) == 10
    assert held_bytes(run_folder(tmp_path / "other")) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB of its own, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if sys.platform != "linux" or made.returncode:
        pytest.skip("no file system can be mounted here: that takes Linux and root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("way", ["streamed", "knapsack", "groups"])
def test_a_full_disk_at_random_points(
    way: str, recipe: Build, wanted: dict[str, str], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fills up while the run goes on, again and again; what is finished is kept, and the run is gone on with."""
    out, ballast, draw = small_disk / "out", small_disk / "ballast", random.Random(way)
    monkeypatch.setattr("lexigram.planning._DESCRIPTIONS", 0)  # so that 4 MB are enough by the plan

    def full() -> None:
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass

    ends: list[str] = []
    while not out.exists() and len(ends) < 12:
        at = draw.randint(18, 33) if not ends else draw.randint(18, 60)
        try:
            lexigram.compress(recipe(**WAYS[way]), out, resume=True, progress=StopAt(at, full))
        except LexigramError as error:
            ends.append(str(error))
        finally:
            ballast.unlink(missing_ok=True)
    assert ends
    for said in ends:
        assert re.search("No space left|os error 28", said), said
        assert "free some space" in said
    if not out.exists():
        lexigram.compress(recipe(**WAYS[way]), out, resume=True)
    assert digest(out) == wanted[way]
    assert [path.name for path in small_disk.iterdir()] == ["out"]
