"""What a run leaves behind besides the model: `run.json`, and the stopwatch that fills it. Decides nothing."""

import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lexigram.errors import LexigramError
from lexigram.factors import FactorSpec, SharedSpec
from lexigram.folders import check_plain, printable
from lexigram.jsonfiles import read_json
from lexigram.memory import peak_memory_bytes
from lexigram.methods import FitReport
from lexigram.staging import RUN_FILE

Bytes = Annotated[int, Field(ge=0, lt=2**63)]
SomeBytes = Annotated[int, Field(gt=0, lt=2**63)]
_PART = r"[^/\\\x00-\x1f]*[^/\\\x00-\x1f.][^/\\\x00-\x1f]*"
FilePath = Annotated[str, Field(pattern=rf"^({_PART}/)*{_PART}$")]
"""Of a file in the folder or in a folder inside, from there: `.` and `..` are no parts of it."""
Name = Annotated[str, Field(pattern=r"^[\w .-]+$")]
"""Of a layer, a kind or a site: what tables print, so neither markup nor control characters."""


class _Part(BaseModel):
    """What a record consists of: no number in it is NaN or infinite."""

    model_config = ConfigDict(allow_inf_nan=False)


class StageCost(_Part):
    """What a stage took. `peak_memory_bytes` is the process's high-water mark when the stage last ended."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0


class LayerRecord(_Part):
    """One compressed layer: its form, size and fit."""

    name: Name
    kind: Name
    layer: Annotated[int, Field(ge=0, lt=2**16)] | None
    shape: tuple[int, int]
    site: Name
    factors: FactorSpec
    bytes_before: Bytes
    bytes_after: Bytes
    parameters_after: Bytes
    fit: FitReport

    @model_validator(mode="after")
    def _is_a_form(self) -> "LayerRecord":
        if self.shape != (self.factors.rows, self.factors.cols):
            raise ValueError(
                f"its factors are {self.factors.rows} x {self.factors.cols}, the layer is {self.shape[0]} x {self.shape[1]}"
            )
        if not 0 <= self.fit.relative_error < math.inf:
            raise ValueError(f"its relative error is {self.fit.relative_error}")
        return self


class SharedRecord(_Part):
    """A matrix that several layers share: its form, and its bytes, which are in none of the layers'."""

    name: Name
    members: Annotated[list[str], Field(min_length=1)]
    factors: FactorSpec
    bytes: Bytes

    @model_validator(mode="after")
    def _is_a_form(self) -> "SharedRecord":
        if isinstance(self.factors, SharedSpec):
            raise ValueError("it is no matrix, but a reference to one")
        return self


class UnitRecord(_Part):
    """The layers that were fitted together, and what they share."""

    layers: list[LayerRecord]
    shared: list[SharedRecord] = []


class HeldOutLoss(_Part):
    """What a model in training lost on text that it was not trained on, after so many steps.

    `objective` is of what is trained (`lexigram.distillation.Objective`), `tokens` the next-token loss in nats a token.
    """

    step: int
    objective: float
    tokens: float


Stopped = Literal["steps", "minutes", "patience", "not finite"]
"""What ended a training; the last: a loss, after a state that was better than the first."""


class HealingRecord(_Part):
    """One training of stored values. The result is the state after `best_step`: the one with the least loss on held-out text.

    `original` is the model that was imitated, None where none was; `stopped` tells what ended the training, `remarks` what one
    should know of the result; `*_sha256` are
    hashes of the tokens (`lexigram.calibration.tokens.token_hash`), `tensors_sha256` that of the stored tensors before.
    """

    lexigram: str
    command: str
    versions: dict[str, str]
    machine: dict[str, str]
    original: str | None
    settings: dict[str, Any]
    steps: int
    best_step: int
    stopped: Stopped
    remarks: list[str] = []
    before: HeldOutLoss
    after: HeldOutLoss
    held_out: list[HeldOutLoss]
    text_source: str
    text_sha256: str
    text_tokens: int
    held_out_sha256: str
    held_out_tokens: int
    tensors_sha256: str
    seconds: float
    peak_memory_bytes: int


class MergeRecord(_Part):
    """One LoRA adapter that was made a part of the forms, which grew by so many `bytes`.

    `adapter_sha256` holds the hashes of its two files, by name, `tensors_sha256` that of the stored tensors before; `changed`
    are the tensors that belong to no form and are what the adapter made of them.
    """

    lexigram: str
    command: str
    versions: dict[str, str]
    adapter: str
    adapter_sha256: dict[str, str]
    bytes: Bytes
    changed: list[str]
    tensors_sha256: str
    seconds: float


class RunRecord(_Part):
    """The content of `run.json`.

    Sizes are stored bytes, file headers aside; `bytes_*` of the compressed layers (bfloat16 before), `model_bytes_*` of the
    whole model. `weights_sha256` is of the compressed layers' weights as they were loaded, in the model's order. `ratio` is
    the share of `bytes_before` that was removed, `requested_ratio` what was asked for, or what the bits or the size that were
    asked for come to, `bits_per_weight` the stored bits of the compressed layers over their weights. `peak_memory_bytes` is
    that of this process, `workers_peak_memory_bytes` of the largest of its workers, `predicted_memory_bytes` what the plan said
    of all of them. `files` lists the paths of what the run wrote, in its folder; nothing else there is ever removed. Results of
    earlier versions name a folder for the files in it.

    `tensors_sha256` holds the hash of every stored tensor (`lexigram.headers.tensor_sha256`), `files_sha256` that of every
    other file but this one. Results of earlier versions have neither.

    `healing` tells how stored values were trained afterwards, once for every time, and `merged` what adapters were made a part
    of the forms; the layers' `fit` is of before.
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
    bytes_before: SomeBytes
    bytes_after: Bytes
    model_bytes_before: SomeBytes
    model_bytes_after: SomeBytes
    source_file_bytes: Bytes | None
    bytes_by_kind: dict[Name, Bytes]
    mean_relative_error: float
    seconds: float
    peak_memory_bytes: int
    predicted_memory_bytes: int | None = None
    workers_peak_memory_bytes: int = 0
    device_peak_memory_bytes: int | None
    stages: dict[str, StageCost]
    files: list[FilePath]
    layers: list[LayerRecord]
    shared: list[SharedRecord] = []
    tensors_sha256: dict[str, str] = {}
    files_sha256: dict[str, str] = {}
    healing: list[HealingRecord] = []
    merged: list[MergeRecord] = []

    @property
    def done_since_fit(self) -> str:
        """What was done to the values after the fits that the layers' errors are of, in a few words; empty for nothing."""
        return " and ".join(word for word, done in (("healing", self.healing), ("merging", self.merged)) if done)

    @model_validator(mode="after")
    def _belongs_together(self) -> "RunRecord":
        names = [layer.name for layer in self.layers]
        if len(set(names)) < len(names):
            raise ValueError("a layer stands twice in it")
        shared = {each.name: each.factors for each in self.shared}
        if any(member not in names for each in self.shared for member in each.members):
            raise ValueError("a shared matrix belongs to a layer that is not in it")
        for layer in self.layers:
            for reference in layer.factors.references():
                found = shared.get(reference.name)
                if found is None or (found.rows, found.cols) != (reference.rows, reference.cols):
                    raise ValueError(f"{layer.name} shares {reference.name}, which is not in it as it should be")
        if not isinstance(self.recipe.get("method", {}), dict):
            raise ValueError("its recipe has no method")
        return self


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


def read_run(folder: Path) -> RunRecord:
    """What `compress` left in `folder` besides the model.

    Raises:
        LexigramError: where there is no such file, or another program or version wrote it.
    """
    check_plain(folder)
    file, remedy = folder / RUN_FILE, "name what `lexigram compress --out` wrote"
    if not file.exists():
        raise LexigramError(f"{folder} is no compressed model (it has no {RUN_FILE}); {remedy}")
    content = read_json(file, remedy=remedy)
    try:
        record = RunRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        what = "it is missing" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
        reason = printable(": ".join(filter(None, (".".join(map(str, first["loc"])), what))))
        raise LexigramError(
            f"{file} was not written by lexigram {versions()['lexigram']}: {reason}; compress the model again"
        ) from error
    if not record.layers:
        raise LexigramError(f"{file} tells of no layer; compress the model again")
    return record


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
