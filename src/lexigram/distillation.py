"""What a model is trained for: to predict as another one does, to have its layers' outputs, or to predict a text.

Losses of token sequences and the memory that they take. Nothing here changes a model or knows an optimiser.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lexigram.evaluation.perplexity import CHUNK_ELEMENTS
from lexigram.running import inference

ObjectiveName = Literal["kl", "layers", "tokens"]
NEEDS_TEACHER: tuple[ObjectiveName, ...] = ("kl", "layers")


class Outputs(NamedTuple):
    """What a model makes of sequences: logits (sequences, length, vocabulary) and, where asked for, every decoder layer's
    output (sequences, length, width).
    """

    logits: Tensor
    layers: list[Tensor]


class Losses(NamedTuple):
    """Means over sequences: what is trained, and the next-token loss in nats a token."""

    objective: float
    tokens: float


@dataclass(frozen=True)
class Objective:
    """A loss of `student`, beside `teacher` where it is one of distillation.

    `name` is one of

    - ``kl``: KL(teacher || student) of the predictions in nats, the mean over all positions (Hinton et al., arXiv 1503.02531,
      at temperature 1);
    - ``layers``: ``||H - H'||_F^2 / ||H||_F^2`` of every decoder layer's output, the mean over the layers;
    - ``tokens``: minus the log-likelihood of each token but the first, given those before it, the mean over them.

    `layers` names the list of decoder layers in both models, `dtype` is that of the forward pass (autocast), `at_once` how many
    tokens are run at a time.
    """

    name: ObjectiveName
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    layers: str
    dtype: torch.dtype
    at_once: int

    def parts(self, ids: Tensor) -> Iterator[Tensor]:
        """Sequences (sequences, length) in parts that can be run at once."""
        yield from ids.split(max(1, self.at_once // ids.shape[1]))

    def losses(self, ids: Tensor) -> Tensor:
        """Of each sequence, (sequences,), float32; differentiable in what the student trains."""
        return self._of(self._run(self.student, ids), ids)

    def measured(self, ids: Tensor, step: Callable[[], None] = lambda: None) -> Losses:
        """The means over sequences that nothing is trained on; `step` is called after each of them."""
        total, tokens = 0.0, 0.0
        with inference(self.student):
            for part in self.parts(ids):
                found = self._run(self.student, part)
                total += float(self._of(found, part).double().sum())
                tokens += float(_token_losses(found, None, part.to(found.logits.device)).double().sum())
                for _ in part:
                    step()
        return Losses(total / len(ids), tokens / len(ids))

    def _of(self, found: Outputs, ids: Tensor) -> Tensor:
        wanted = None
        if self.teacher is not None:
            with inference(self.teacher):
                wanted = self._run(self.teacher, ids)
        return _LOSSES[self.name](found, wanted, ids.to(found.logits.device))

    def _run(self, model: PreTrainedModel, ids: Tensor) -> Outputs:
        autocast = torch.autocast(model.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
        outputs: list[Tensor] = []
        with autocast, _noting(_listed(model, self.layers), outputs) if self.name == "layers" else nullcontext():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        return Outputs(logits, outputs)


@contextmanager
def recomputing(model: nn.Module, name: str) -> Iterator[None]:
    """Gradient checkpointing: of the layers in the list `name` only inputs are kept, and the backward pass runs them again.

    It is put around the layers here, since transformers does so only in training mode, which would turn on dropout.
    """
    layers = _listed(model, name)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _listed(model: nn.Module, name: str) -> list[nn.Module]:
    layers = model.get_submodule(name)
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


@contextmanager
def _noting(layers: list[nn.Module], outputs: list[Tensor]) -> Iterator[None]:
    """Append every layer's output to `outputs` as it is computed."""

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _divergences(found: Outputs, wanted: Outputs | None, ids: Tensor) -> Tensor:
    """See `Objective`; (sequences,). Some rows of logits are in float32 at a time, in the backward pass too."""
    assert wanted is not None
    rows = max(1, CHUNK_ELEMENTS // found.logits.shape[-1])
    pairs = zip(found.logits.flatten(0, 1).split(rows), wanted.logits.flatten(0, 1).split(rows), strict=True)
    parts = [checkpoint(_divergence, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    return torch.cat(parts).view(ids.shape).mean(1)


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || logits) of rows (rows, vocabulary), (rows,)."""
    theirs = wanted.to(logits.device).float().log_softmax(-1)
    return nn.functional.kl_div(logits.float().log_softmax(-1), theirs, reduction="none", log_target=True).sum(-1)


def _layer_errors(found: Outputs, wanted: Outputs | None, ids: Tensor) -> Tensor:
    """See `Objective`; (sequences,)."""
    assert wanted is not None
    errors = [
        (ours.float() - theirs.to(ours.device).float()).square().sum((1, 2))
        / theirs.to(ours.device).float().square().sum((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
        for ours, theirs in zip(found.layers, wanted.layers, strict=True)
    ]
    return torch.stack(errors).mean(0)


def _token_losses(found: Outputs, _wanted: Outputs | None, ids: Tensor) -> Tensor:
    """See `Objective`; (sequences,)."""
    logits, targets = found.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, targets, reduction="none").view(len(ids), -1).mean(1)


_LOSSES: dict[ObjectiveName, Callable[[Outputs, Outputs | None, Tensor], Tensor]] = {
    "kl": _divergences,
    "layers": _layer_errors,
    "tokens": _token_losses,
}
