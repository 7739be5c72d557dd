"""What a run leaves behind besides the model: `run.json`, and the stopwatch that fills it. Decides nothing."""

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from lexigram.errors import LexigramError
from lexigram.jsonfiles import read_json
from lexigram.methods import FitReport
from lexigram.recipe import explain
from lexigram.staging import RUN_FILE


class StageCost(BaseModel):
    """What a stage took. `peak_memory_bytes` is the process's high-water mark when the stage last ended."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0


class LayerRecord(BaseModel):
    """One compressed layer: its form, size and fit."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    site: str
    factors: dict[str, Any]
    bytes_before: int
    bytes_after: int
    parameters_after: int
    fit: FitReport


class SharedRecord(BaseModel):
    """A matrix that several layers share: its form, and its bytes, which are in none of the layers'."""

    name: str
    members: list[str]
    factors: dict[str, Any]
    bytes: int


class RunRecord(BaseModel):
    """The content of `run.json`.

    Sizes are stored bytes, file headers aside; `bytes_*` of the compressed layers (bfloat16 before), `model_bytes_*` of the
    whole model. `weights_sha256` is of the compressed layers' weights as they were loaded, in the model's order. `ratio` is
    the share of `bytes_before` that was removed, `requested_ratio` what was asked for, `bits_per_weight` the stored bits of
    the compressed layers over their weights. `files` lists what the run wrote; nothing else in the folder is ever removed.
    """

    lexigram: str
    command: str
    versions: dict[str, str]
    machine: dict[str, str]
    recipe: dict[str, Any]
    model: str
    weights_sha256: str
    calibration_source: str
    calibration_sha256: str
    calibration_tokens: int
    requested_ratio: float
    ratio: float
    bits_per_weight: float
    parameter_ratio: float
    bytes_before: int
    bytes_after: int
    model_bytes_before: int
    model_bytes_after: int
    source_file_bytes: int | None
    bytes_by_kind: dict[str, int]
    mean_relative_error: float
    seconds: float
    peak_memory_bytes: int
    device_peak_memory_bytes: int | None
    stages: dict[str, StageCost]
    files: list[str]
    layers: list[LayerRecord]
    shared: list[SharedRecord] = []


class Stopwatch:
    """Seconds and peak memory by stage; a stage may be entered many times."""

    def __init__(self) -> None:
        self.stages: dict[str, StageCost] = {}
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time until the context ends towards `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            cost = self.stages.setdefault(name, StageCost())
            cost.seconds += time.perf_counter() - start
            cost.peak_memory_bytes = peak_memory_bytes()

    def credit(self, name: str, seconds: float) -> None:
        """Count time that `name` took before the stopwatch was made."""
        self._start -= seconds
        self.stages.setdefault(name, StageCost()).seconds += seconds

    @property
    def seconds(self) -> float:
        """Since the stopwatch was made."""
        return time.perf_counter() - self._start


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_run(folder: Path) -> RunRecord:
    """What `compress` left in `folder` besides the model.

    Raises:
        LexigramError: where there is no such file, or another program or version wrote it.
    """
    file = folder / RUN_FILE
    try:
        return RunRecord.model_validate(read_json(file))
    except ValidationError as error:
        raise LexigramError(f"{file} was not written by lexigram {versions()['lexigram']}: {explain(error)}") from error


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide the numbers."""
    packages = ("lexigram", "transformers", "safetensors", "numpy")
    # torch's own version names its build (CPU or CUDA), that of its package does not always.
    own = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {**own, **{name: version(name) for name in packages}}


def machine(device: torch.device) -> dict[str, str]:
    """What the run was computed on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "threads": str(torch.get_num_threads()), "system": platform.system()}
