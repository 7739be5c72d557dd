"""The training of parameters by an objective: settings, AdamW, looks at held-out text, and a state that outlives its process.

What the parameters are, and what becomes of them, is the business of those who make the model (`lexigram.healing`).
"""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from lexigram.distillation import NEEDS_TEACHER, Objective, ObjectiveName
from lexigram.errors import LexigramError
from lexigram.factors.training import built_once
from lexigram.headers import read_metadata
from lexigram.interruption import deferred
from lexigram.recipe import BOS, Names, explain
from lexigram.records import HeldOutLoss, Stopped
from lexigram.runfolder import writing
from lexigram.running import Stages, counted
from lexigram.shards import Entry, file_tensors, raw, write_tensors
from lexigram.shown import MACHINE, Shown
from lexigram.staging import replacing

STEPS = 200
"""Where neither steps nor minutes are told."""

LENGTH = 256
"""Tokens a sequence where nothing is told."""

STATE = "state.safetensors"
"""The file with the state."""

STATE_BYTES = 32
"""On disk for each stored value and scale while a state is written: itself, its best and two moments, in float32, twice, as the
earlier state goes only then. Where the best values are those of now or of the beginning they are left out.
"""

KEPT_BYTES = 2**30
"""Of the teacher's outputs that are kept in memory."""

RATE = 2e-3
"""Where nothing is told. KL divergence on held-out text of a model of 260 thousand weights after 40 steps of 4 sequences:

| form | before | 1e-3 | 2e-3 | 5e-3 | 1e-2 |
|---|---|---|---|---|---|
| dictionary x sparse, int6 and int8, ratio .4 | .0227 | .0177 | .0191 | .0426 | .0917 |
| int3 | .469 | .397 | .333 | .413 | .680 |
| sparse, bfloat16, ratio .5 | 2.20 | 1.76 | 1.55 | 1.22 | 1.01 |
| low rank, bfloat16, ratio .5 | 3.47 | 2.66 | 2.45 | 2.13 | 1.89 |

Where much was lost a greater rate gets further in as many steps; where little was, it loses more than there is to win. Of few
bits it is too much in either case: SmolLM2-135M at ratio .9 comes from 4.03 to 2.16 with `lowrank-sparse` and from 4.46 to 2.23
with `double-sparse`, at 1e-2 to 3.04 and nowhere.
"""

BACK_OFF = 4.0
"""So a rate that is too high costs steps and not the result: SmolLM2-135M in `cospadi` at ratio .4 has a divergence of .0287;
at 2e-3 it is never less within 40 steps that do not go back, .0265 with those that do (.0234 at 5e-4 from the first).
"""

_FUSED = ("cpu", "cuda", "mps", "xpu")  # devices that torch has the whole step of AdamW for in one kernel
_TEXT, _TRAINING = "Text", "Training"


class HealingSettings(BaseModel):
    """How stored values are trained, and on which text; most of it decides the bytes of the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: Annotated[Names, Shown(name="text", short="-t", metavar="TEXT")] = Field(
        min_length=1, description="To train on: .txt or .jsonl files (or .gz), `demo`, or `hub:NAME`."
    )
    sequences: Annotated[int, Shown(_TEXT)] = Field(default=256, ge=1, description="How many sequences to train on.")
    length: Annotated[int | None, Shown(_TEXT, none=f"{LENGTH}, or the model's context")] = Field(
        default=None, ge=2, description="Tokens a sequence."
    )
    held_out: Annotated[int, Shown(_TEXT)] = Field(
        default=16, ge=1, description="How many others to judge by; they lie spread among the ones to train on."
    )
    bos: Annotated[bool, Shown(_TEXT)] = Field(default=False, description=BOS)
    objective: Annotated[ObjectiveName, Shown(_TRAINING)] = Field(
        default="kl",
        description="Predict as the original (`kl`), have its decoder layers' outputs (`layers`), or predict the text "
        "(`tokens`).",
    )
    layer_weight: Annotated[float, Shown(_TRAINING)] = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="How much the errors of the decoder layers' outputs (`layers`, a mean) add to `kl` or `tokens`.",
    )
    steps: Annotated[int | None, Shown(_TRAINING, none=f"{STEPS}, or what the minutes allow")] = Field(
        default=None, ge=1, description="Steps of the optimiser (AdamW) at most."
    )
    minutes: Annotated[float | None, Shown(_TRAINING, none="no limit")] = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Stop after so long; bytes then depend on the machine's speed.",
    )
    batch: Annotated[int, Shown(_TRAINING)] = Field(default=8, ge=1, description="Sequences a step.")
    rate: Annotated[float, Shown(_TRAINING)] = Field(
        default=RATE,
        gt=0,
        le=1,
        description="How far a step moves a value, as a share of what values near it are; where much was lost and values have "
        "many bits, take more.",
    )
    schedule: Annotated[Literal["cosine", "constant"], Shown(_TRAINING)] = Field(
        default="cosine", description="How the rate goes on after the warm-up."
    )
    warmup: Annotated[int, Shown(_TRAINING)] = Field(default=10, ge=0, description="Steps until the rate is reached.")
    decay: Annotated[float, Shown(_TRAINING)] = Field(
        default=0.0, ge=0, lt=1, description="Weight decay, as AdamW has it: by this share of the rate a step."
    )
    clip: Annotated[float, Shown(_TRAINING)] = Field(
        default=1.0, gt=0, description="The largest norm of the gradient of all values; longer ones are cut to it."
    )
    measure_every: Annotated[int, Shown(_TRAINING)] = Field(
        default=10, ge=1, description="Steps between two looks at the held-out text."
    )
    back_off: Annotated[float, Shown(_TRAINING)] = Field(
        default=BACK_OFF,
        ge=1,
        allow_inf_nan=False,
        description="Where a look finds no smaller loss, go on from the best state, with the rate divided by this; 1 goes on "
        "as it is.",
    )
    patience: Annotated[int, Shown(_TRAINING)] = Field(
        default=5, ge=1, description="Stop after so many looks without a smaller loss; the best state is the result."
    )
    checkpointing: Annotated[bool, Shown(MACHINE)] = Field(
        default=False, description="Run every decoder layer again in the backward pass: slower, in less memory."
    )
    save_every: Annotated[int, Shown(MACHINE)] = Field(
        default=20, ge=1, description="Steps between two saves of the state for --resume."
    )
    seed: Annotated[int, Shown(_TEXT)] = Field(
        default=0, ge=0, description="Decides which sequences are drawn, and their order."
    )
    compute_dtype: Annotated[Literal["auto", "float32", "bfloat16"], Shown(MACHINE)] = Field(
        default="auto", description="Of the forward pass; `auto` takes bfloat16 where the device has it."
    )

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> "HealingSettings":
        """Validate plain data.

        Raises:
            LexigramError: naming the key and its value.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise LexigramError(f"the settings: {explain(error)}") from None

    @model_validator(mode="after")
    def _adds(self) -> "HealingSettings":
        if self.layer_weight and self.objective == "layers":
            raise ValueError(
                f"layer_weight {self.layer_weight:g} adds the layers' errors to another objective, and `layers` is these "
                "alone; leave it out, or take --objective kl or tokens"
            )
        return self

    @property
    def imitates(self) -> bool:
        """Whether there is an original to train against."""
        return self.objective in NEEDS_TEACHER or self.layer_weight > 0

    @property
    def most_steps(self) -> int | None:
        """None where only the clock ends the training."""
        return STEPS if self.steps is None and self.minutes is None else self.steps

    def rate_at(self, step: int, seconds: float) -> float:
        """Of the step after `step` others, `seconds` after the beginning: linear warm-up, then constant or half a cosine."""
        parts = [0.0]
        if self.most_steps is not None:
            parts.append(step / self.most_steps)
        if self.minutes is not None:
            parts.append(min(1.0, seconds / (60 * self.minutes)))
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = (1 + math.cos(math.pi * max(parts))) / 2 if self.schedule == "cosine" else 1.0
        return self.rate * warm * falling


class State(BaseModel):
    """How far a training is. `seconds` are those that it took so far, over all runs; `stopped` tells that it has ended.

    `gone_back` counts how often it went on from the best state, at a lower rate.
    """

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    seconds: float = 0.0
    held_out: list[HeldOutLoss] = []
    gone_back: int = 0
    stopped: Stopped | None = None
    remark: str | None = None

    @property
    def best(self) -> HeldOutLoss:
        """The first with the least loss."""
        return min(self.held_out, key=lambda loss: loss.objective)

    @property
    def waited(self) -> int:
        """Looks at the held-out text since the best one."""
        return len(self.held_out) - 1 - self.held_out.index(self.best)


class _NotFiniteError(Exception):
    """A number that nothing can be trained by."""


class Training:
    """AdamW on the stored values of the objective's student; its state in `folder`, from where it is taken if it is there.

    The parameters with the least loss so far are kept beside those that train.
    """

    def __init__(
        self, settings: HealingSettings, objective: Objective, ids: Tensor, held: Tensor, folder: Path
    ) -> None:
        self.settings, self.objective, self.ids, self.held, self.folder = settings, objective, ids, held, folder
        self.parameters = {name: each for name, each in objective.student.named_parameters() if each.requires_grad}
        if not self.parameters:
            raise LexigramError("all stored values are zero, and nothing can be trained; compress the model again")
        own = list(self.parameters.values())
        fused = all(each.device.type in _FUSED for each in own)
        self.optimiser = torch.optim.AdamW(
            own, lr=settings.rate, betas=(0.9, 0.95), weight_decay=settings.decay, fused=fused
        )
        self.best = {name: each.detach().clone() for name, each in self.parameters.items()}
        self.again = _again(settings, objective, ids, held)
        self.state = State()
        if (folder / STATE).exists():
            self._restore()

    def run(self, progress: Stages) -> None:
        """Train until the budget is spent, the held-out loss falls no more, or a loss is not finite; `state` tells which.

        Raises:
            LexigramError: where a loss is not finite before anything was better than at the beginning.
            KeyboardInterrupt: after Ctrl-C, with the state saved, whatever step it came in.
        """
        if self.state.stopped is not None:
            return
        with deferred() as interrupted:
            try:
                self._train(progress, interrupted)
            except _NotFiniteError as error:
                self._end_not_finite(str(error))
            self._save()
            if interrupted():
                raise KeyboardInterrupt

    def take_best(self) -> None:
        """Give the student the parameters with the least loss."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])

    def _train(self, progress: Stages, interrupted: Callable[[], bool]) -> None:
        """Until the training has ended, or is interrupted."""
        began = time.perf_counter() - self.state.seconds
        if not self.state.held_out:
            self._measure(progress)
        batches = itertools.islice(_batches(len(self.ids), self.settings), self.state.step, None)
        total = self.settings.most_steps or math.ceil(60 * (self.settings.minutes or 0))
        with progress.stage("heal", total) as told:
            tell = counted(told)
            while True:
                done = self.state.step if self.settings.most_steps else min(int(self.state.seconds), total)
                tell(done, total)
                stopped = self._ended()
                if stopped is not None:
                    break
                if interrupted():
                    return
                self._step(self.ids[next(batches)])
                self.state.seconds = time.perf_counter() - began
                if self.state.step % self.settings.measure_every == 0:
                    self._measure(progress)
                    self._go_back()
                    self.state.seconds = time.perf_counter() - began
                if self.state.step % self.settings.save_every == 0:
                    self._save()
        if self.state.held_out[-1].step < self.state.step:
            self._measure(progress)
        self.state.seconds = time.perf_counter() - began
        self.state.stopped = stopped

    def _go_back(self) -> None:
        """To the best state, where the last look found no better one: the steps were too long for what there is to win."""
        if self.settings.back_off == 1 or not self.state.waited:
            return
        self.take_best()
        for kept in self.optimiser.state.values():
            kept["exp_avg"].zero_()  # where to, and not how far
        self.state.gone_back += 1

    @property
    def least_rate(self) -> float:
        """What the rate has come down to, whatever its schedule makes of it."""
        return self.settings.rate * self._share

    @property
    def _share(self) -> float:
        """Of the rate that is left; a power above 1 could overflow, this one comes to 0."""
        share: float = self.settings.back_off**-self.state.gone_back
        return share

    def _ended(self) -> Stopped | None:
        if self.state.waited >= self.settings.patience:
            return "patience"
        if self.state.step == self.settings.most_steps:
            return "steps"
        if self.settings.minutes is not None and self.state.seconds >= 60 * self.settings.minutes:
            return "minutes"
        return None

    def _end_not_finite(self, what: str) -> None:
        """The result is what was better than the beginning. Otherwise there is none, and the state helps no other settings."""
        remedy = f"lower --rate ({self.settings.rate:g} now), or take --compute-dtype float32"
        if not self.state.held_out or not self.state.best.step:
            (self.folder / STATE).unlink(missing_ok=True)
            raise LexigramError(f"{what}; {remedy}")
        self.state.stopped = "not finite"
        self.state.remark = f"{what}; these are the values after {self.state.best.step}; to get further {remedy}"

    def _step(self, batch: Tensor) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.rate_at(self.state.step, self.state.seconds) * self._share
        self.optimiser.zero_grad(set_to_none=True)
        parts = self.objective.parts(batch)
        with built_once(self.objective.student) if len(parts) > 1 else nullcontext():
            for part in parts:
                loss = self.objective.losses(part, again=self.again.training).sum() / len(batch)
                self._check_finite("the loss", float(loss.detach()))
                loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        self._check_finite("the gradient's norm", float(norm))
        self.optimiser.step()
        self.state.step += 1

    def _measure(self, progress: Stages) -> None:
        """Look at the held-out text; keep the parameters if they are the best so far."""
        building = built_once(self.objective.student) if len(self.objective.parts(self.held)) > 1 else nullcontext()
        looking = progress.stage(f"held-out text after {self.state.step} steps", len(self.held))
        with looking as step, torch.no_grad(), building:
            found = self.objective.measured(self.held, step, again=self.again.held)
        self._check_finite("the loss on held-out text", found.objective)
        self.state.held_out.append(HeldOutLoss(step=self.state.step, **found._asdict()))
        if self.state.best is self.state.held_out[-1]:
            for name, parameter in self.parameters.items():
                self.best[name].copy_(parameter.detach())

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise _NotFiniteError(f"{what} is {value} after {self.state.step} steps")

    def _save(self) -> None:
        """In the place of an earlier state, as a whole."""
        tensors = self._tensors()
        metadata = {"state": self.state.model_dump_json(), "sha256": _sha256(tensors)}
        with writing(self.folder), replacing(self.folder / STATE, lasting=True) as file:
            write_tensors(file, {name: _entry(tensor) for name, tensor in tensors.items()}, metadata)

    def _tensors(self) -> dict[str, Tensor]:
        """The state as tensors by name: the parameters and what the optimiser keeps of each, where the training goes on; and
        the best parameters, where they are neither those of the beginning nor of now.
        """
        found: dict[str, Tensor] = {}
        best = self.state.best.step
        if self.state.stopped is None:
            found |= {f"now.{name}": each.detach() for name, each in self.parameters.items()}
            for name, each in self.parameters.items():
                found |= {f"{key}.{name}": tensor for key, tensor in self.optimiser.state.get(each, {}).items()}
        if best and (self.state.stopped is not None or best != self.state.step):
            found |= {f"best.{name}": each for name, each in self.best.items()}
        return found

    def _restore(self) -> None:
        """Into the parameters, which are those of the beginning."""
        file = self.folder / STATE
        try:
            tensors = {name: tensor.read() for name, tensor in file_tensors(file).items()}
            metadata = read_metadata(file)
            if metadata.get("sha256") != _sha256(tensors):
                raise ValueError("its content is not what was written")
            self.state = State.model_validate_json(metadata.get("state", ""))
        except (LexigramError, ValueError) as error:
            reason = "it tells of no state" if isinstance(error, ValidationError) else error
            raise LexigramError(f"{file} is damaged ({reason}); delete {self.folder} and run again") from error
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if f"now.{name}" in tensors:
                    parameter.copy_(tensors[f"now.{name}"])
                if self.state.best.step:
                    self.best[name].copy_(tensors.get(f"best.{name}", parameter))
                kept = {
                    key: tensors[f"{key}.{name}"]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in tensors
                }
                if kept:
                    self.optimiser.state[parameter] = {key: self._placed(key, kept[key], parameter) for key in kept}

    def _placed(self, key: str, tensor: Tensor, parameter: Tensor) -> Tensor:
        """Where the optimiser keeps it: its count of steps on the CPU, unless it is fused."""
        return tensor if key == "step" and not self.optimiser.defaults["fused"] else tensor.to(parameter.device)


class _Again(NamedTuple):
    """Of which sequences the teacher's outputs are kept, since they come again."""

    training: bool
    held: bool


def _again(settings: HealingSettings, objective: Objective, ids: Tensor, held: Tensor) -> _Again:
    """As far as `KEPT_BYTES` go: the held-out ones first, and the others where there are steps enough to see some again."""
    steps = settings.most_steps
    repeated = steps is None or steps * settings.batch > len(ids)
    both = objective.kept_bytes(held) + objective.kept_bytes(ids)
    return _Again(repeated and both <= KEPT_BYTES, objective.kept_bytes(held) <= KEPT_BYTES)


def _batches(count: int, settings: HealingSettings) -> Iterator[Tensor]:
    """Numbers of sequences (batch,), without end: all in random order, again and again, across the ends of batches."""
    generator = torch.Generator().manual_seed(settings.seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < settings.batch:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[: settings.batch]
        left = left[settings.batch :]


def _entry(tensor: Tensor) -> Entry:
    return Entry(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of all tensors, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}:".encode())
        digest.update(raw(tensors[name].cpu().contiguous()))
    return digest.hexdigest()
