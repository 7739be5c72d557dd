"""A unit that cannot be fitted, measured or decomposed: the error names it, and costs nothing but that unit."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lexigram
from conftest import Command, toy_folder
from lexigram import LexigramError, Recipe
from lexigram.estimation import estimated_seconds
from lexigram.fitting import fitted, naming
from lexigram.methods import Fitted, fit_group
from lexigram.methods.base import decompose
from lexigram.workers import Workers

LAYER = r"model\.layers\.\d\.\S+"
Build = Callable[..., Recipe]


def unsolvable() -> None:
    torch.linalg.solve(torch.zeros(2, 2), torch.ones(2))


def diverging() -> None:
    torch.linalg.eigh(torch.full((3, 3), torch.nan))


def of_python() -> None:
    bytearray(2**62)


def of_torch() -> None:
    torch.empty(10**15)


def of_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has none.")


def of_its_libraries() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


FAILURES: dict[str, tuple[Callable[[], None], str]] = {
    "a singular system": (
        unsolvable,
        "solver failed because the input matrix is singular; take more calibration tokens",
    ),
    "no convergence": (diverging, "eigh: The algorithm failed to converge .*; take more calibration tokens"),
    "Python's memory": (of_python, r"memory did not suffice \(MemoryError\); free some, or take fewer --workers"),
    "torch's memory": (of_torch, r"memory did not suffice \(.*can't allocate memory.*--max-ram"),
    "a GPU's memory": (of_a_gpu, r"memory did not suffice \(CUDA out of memory.* GPU 0 has none.*--device cpu"),
    "its libraries' memory": (of_its_libraries, r"memory did not suffice \(CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def recipe(toy: Path, words: Path) -> Build:
    def build(**changes: Any) -> Recipe:
        calibration = {"text": [str(words)], "sequences": 4, "length": 32}
        settings = {"model": str(toy), "method": {"name": "svd"}, "device": "cpu", "compute_dtype": "float32"}
        return Recipe.parse({**settings, "calibration": calibration, **changes})

    return build


@pytest.fixture
def options(toy: Path, words: Path) -> tuple[object, ...]:
    of_text = ("--calibration", words, "--sequences", 4, "--length", 32)
    return (toy, "--method", "svd", *of_text, "--device", "cpu", "--compute-dtype", "float32")


@pytest.fixture(scope="module")
def wanted(recipe: Build, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("whole") / "out"
    lexigram.compress(recipe(), out)
    return digest(out)


def digest(out: Path) -> str:
    return hashlib.sha256((out / "lexigram.safetensors").read_bytes()).hexdigest()


class Calls:
    """Instead of a function: does something else the `at`-th time."""

    def __init__(self, real: Callable[..., Any], act: Callable[[], object], at: int = 1) -> None:
        self.real, self.act, self.at, self.count = real, act, at, 0

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        if self.count == self.at:
            self.act()
        return self.real(*args)


@pytest.mark.parametrize("kind", FAILURES)
def test_a_fit_that_fails_names_its_layer_and_costs_no_other(
    kind: str,
    options: tuple[object, ...],
    wanted: str,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    act, says = FAILURES[kind]
    with monkeypatch.context() as patched:
        patched.setattr("lexigram.fitting.fit_group", Calls(fit_group, act, at=5))
        ended = command("compress", *options, "--out", tmp_path / "out", "--workers", 1)
    assert ended.code == 1
    assert_says(ended.error, f"^{LAYER} cannot be compressed: .*{says}")
    rest = Calls(fit_group, lambda: None)
    monkeypatch.setattr("lexigram.fitting.fit_group", rest)
    assert command("compress", *options, "--out", tmp_path / "out", "--workers", 1, "--resume").code == 0
    assert rest.count == 14 - 4
    assert digest(tmp_path / "out") == wanted


def assert_says(text: str, pattern: str) -> None:
    with pytest.raises(LexigramError, match=pattern):
        raise LexigramError(text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"relative_error": float("nan")}, f"the relative error of {LAYER} is nan; take"),
        ({"relative_error": float("inf")}, f"the relative error of {LAYER} is inf; take"),
        ({"objective": [1.0, float("nan")]}, f"the objective of {LAYER} is nan; take"),
        ({"details": {"ridge": float("inf")}}, f"the ridge of {LAYER} is inf; take"),
    ],
)
def test_a_report_that_is_not_finite_names_its_layer(
    change: dict[str, Any], says: str, recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON has no such numbers: `run.json` could not be read again."""

    def lost(*args: Any) -> Fitted:
        found = fit_group(*args)
        return found._replace(members=[(factor, report.model_copy(update=change)) for factor, report in found.members])

    monkeypatch.setattr("lexigram.fitting.fit_group", lost)
    with pytest.raises(LexigramError, match=f"^{LAYER} cannot be compressed: {says}"):
        lexigram.compress(recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FAILURES)
def test_what_fails_before_the_fits_names_its_layer_too(
    kind: str, recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, says = FAILURES[kind]
    monkeypatch.setattr("lexigram.curves.fit_group", Calls(fit_group, act, at=5))
    with pytest.raises(LexigramError, match=f"^{LAYER} cannot be measured: .*{says}"):
        lexigram.compress(recipe(allocation="knapsack", ratio=0.4), tmp_path / "curves")
    monkeypatch.setattr("lexigram.choice.decompose", Calls(decompose, act, at=5))
    with pytest.raises(LexigramError, match=f"^{LAYER} cannot be decomposed: .*{says}"):
        lexigram.compress(recipe(method={"name": "cap", "iterations": 5}, ratio=0.4), tmp_path / "parts")


def test_a_measured_error_that_is_not_finite_names_its_layer(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*args: Any) -> Fitted:
        found = fit_group(*args)
        nan = {"relative_error": float("nan")}
        return found._replace(members=[(factor, report.model_copy(update=nan)) for factor, report in found.members])

    monkeypatch.setattr("lexigram.curves.fit_group", lost)
    with pytest.raises(LexigramError, match=f"^{LAYER} cannot be measured: not all of its errors are finite; take"):
        lexigram.compress(recipe(allocation="knapsack", ratio=0.4), tmp_path / "out")


def test_an_estimate_of_time_names_what_it_cannot_fit(recipe: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lexigram.fitting.fit_group", Calls(fit_group, diverging))
    with pytest.raises(LexigramError, match=f"^{LAYER} cannot be compressed: .*failed to converge"):
        estimated_seconds(lexigram.plan(recipe()))


@pytest.mark.parametrize("kind", [kind for kind in FAILURES if "memory" in kind])
def test_memory_that_does_not_suffice_outside_of_the_fits_is_an_error_too(
    kind: str, recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, says = FAILURES[kind]
    monkeypatch.setattr("lexigram.pipeline.plain_grams", lambda *_args, **_options: act())
    with pytest.raises(LexigramError, match=f"^{says}"):
        lexigram.compress(recipe(), tmp_path / "out")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), TypeError("a mistake"), KeyboardInterrupt()])
def test_what_nobody_can_mend_stays_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as found, naming(["one"], "compressed"):
        raise error
    assert found.value is error


@dataclass
class Failing:
    """A task that fails in whatever process it runs."""

    kind: str
    member: str

    @property
    def unit(self) -> SimpleNamespace:
        return SimpleNamespace(members=(self.member,))

    def fitted(self) -> Tensor:
        FAILURES[self.kind][0]()
        raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no convergence", "a GPU's memory"])
def test_errors_of_workers_name_the_layer(kind: str) -> None:
    with Workers(2) as pool, pytest.raises(LexigramError, match=f"^m cannot be compressed: .*{FAILURES[kind][1]}"):
        list(pool.run(fitted, [Failing(kind, "m")] * 2))  # type: ignore[list-item]
