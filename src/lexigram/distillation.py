"""What a model is trained for: to predict as another one does or a text, to have its layers' outputs, or two of these.

Losses of token sequences and the memory that they take. Nothing here changes a model or knows an optimiser.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lexigram.losses import divergences, surprises
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

    `layer_weight` times ``layers`` is added to the others.

    `layers` names the list of decoder layers in both models, `dtype` is that of the forward pass (autocast), `at_once` how many
    tokens are run at a time.
    """

    name: ObjectiveName
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    layers: str
    dtype: torch.dtype
    at_once: int
    layer_weight: float = 0.0

    def parts(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Sequences (sequences, length) in parts that can be run at once."""
        return ids.split(max(1, self.at_once // ids.shape[1]))

    def losses(self, ids: Tensor, *, again: bool = False) -> Tensor:
        """Of each sequence, (sequences,), float32; differentiable in what the student trains.

        `again` tells that they come again: what the teacher makes of them is then kept, in `kept_bytes` of memory.
        """
        return self._of(self._run(self.student, ids, logits=self.name != "layers"), ids, again=again)

    def measured(self, ids: Tensor, step: Callable[[], None] = lambda: None, *, again: bool = False) -> Losses:
        """The means over sequences that nothing is trained on; `step` is called after each of them. `again`: see `losses`."""
        total, tokens = 0.0, 0.0
        with inference(self.student):
            for part in self.parts(ids):
                found = self._run(self.student, part, logits=True)
                total += float(self._of(found, part, again=again).double().sum())
                tokens += float(_token_losses(found, None, part.to(found.logits.device)).double().sum())
                for _ in part:
                    step()
        return Losses(total / len(ids), tokens / len(ids))

    def kept_bytes(self, ids: Tensor) -> int:
        """What is kept of sequences (sequences, length) that come again: hidden states, in the dtype of the forward pass."""
        if self.teacher is None:
            return 0
        width: int = self.teacher.config.get_text_config().hidden_size
        states = (self.name == "kl") + (len(_listed(self.teacher, self.layers)) if "layers" in self._terms else 0)
        return ids.numel() * width * states * self.dtype.itemsize

    @cached_property
    def _terms(self) -> dict[ObjectiveName, float]:
        """What is added up, by weight."""
        return {self.name: 1.0, **({"layers": self.layer_weight} if self.layer_weight else {})}

    @cached_property
    def _teacher(self) -> "_Teacher":
        assert self.teacher is not None
        predicts = self.name == "kl"
        return _Teacher(self.teacher, partial(self._run, self.teacher, logits=predicts), predicts=predicts)

    def _of(self, found: Outputs, ids: Tensor, *, again: bool) -> Tensor:
        wanted = None
        if self.teacher is not None:
            with inference(self.teacher):
                wanted = self._teacher.again(ids) if again else self._teacher.run(ids)
        ids = ids.to(found.logits.device)
        losses = [weight * _LOSSES[name](found, wanted, ids) for name, weight in self._terms.items()]
        return torch.stack(losses).sum(0)

    def _run(self, model: PreTrainedModel, ids: Tensor, *, logits: bool) -> Outputs:
        """Where no logits are wanted, models that can leave them out give those of the last position alone."""
        few = {} if logits or "logits_to_keep" not in signature(model.forward).parameters else {"logits_to_keep": 1}
        autocast = torch.autocast(model.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
        outputs: list[Tensor] = []
        noting = _noting(_listed(model, self.layers), outputs) if "layers" in self._terms else nullcontext()
        with autocast, noting:
            found = model(input_ids=ids.to(model.device), use_cache=False, **few).logits
        return Outputs(found, outputs)


class _Teacher:
    """What a model makes of sequences; of those that come again it is computed once.

    Kept are the outputs of its layers where `run` notes them and, where it `predicts`, what its base model gives to its head,
    which is applied anew: a vocabulary is far wider than hidden states. What is kept is made one sequence at a time, so that
    it does not depend on which of them come together. A model whose head does not make the same of it is run every time.
    """

    def __init__(self, model: PreTrainedModel, run: Callable[[Tensor], Outputs], *, predicts: bool) -> None:
        self.run = run
        self._predicts = predicts
        self._base: Any = model.base_model
        self._splits: bool | None = False if predicts and self._base is model else None
        self._kept: dict[bytes, list[Tensor]] = {}
        self._given: Callable[..., Any] | None = None

    def again(self, ids: Tensor) -> Outputs:
        """Of sequences (sequences, length) that come again."""
        kept = [self._of(row) for row in ids.split(1)]
        if not all(kept):
            return self.run(ids)
        states = [torch.cat(each) for each in zip(*kept, strict=True)]
        if not self._predicts:
            return Outputs(states[0].new_empty(0), states)
        return Outputs(self._headed(states[0], ids), states[1:])

    def _of(self, row: Tensor) -> list[Tensor]:
        key = row.cpu().numpy().tobytes()
        if key not in self._kept:
            self._kept[key] = self._made(row)
        return self._kept[key]

    def _made(self, row: Tensor) -> list[Tensor]:
        """Nothing where the base model and the head are not all that there is to the model."""
        if self._splits is False:
            return []
        given: list[Any] = []
        hook = self._base.register_forward_hook(lambda _module, _args, output: given.append(output))
        try:
            found = self.run(row)
        finally:
            hook.remove()
        if not self._predicts:
            return found.layers
        state = getattr(given[0], "last_hidden_state", None) if given else None
        if self._splits is None and state is not None:
            self._given = type(given[0])
            self._splits = torch.equal(self._headed(state, row), found.logits)
        return [state, *found.layers] if self._splits and state is not None else []

    def _headed(self, states: Tensor, ids: Tensor) -> Tensor:
        """What the head makes of hidden states (sequences, length, width)."""
        assert self._given is not None
        given = self._given(last_hidden_state=states)
        self._base.forward = lambda *_args, **_options: given
        try:
            return self.run(ids).logits
        finally:
            del self._base.forward


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
    """See `Objective`; (sequences,)."""
    assert wanted is not None
    return divergences(found.logits.flatten(0, 1), wanted.logits.flatten(0, 1)).view(ids.shape).mean(1)


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
    """See `Objective`; (sequences,). The last position predicts nothing, and what it is held against does not count."""
    return surprises(found.logits.flatten(0, 1), ids.roll(-1, 1).flatten()).view(ids.shape)[:, :-1].mean(1)


_LOSSES: dict[ObjectiveName, Callable[[Outputs, Outputs | None, Tensor], Tensor]] = {
    "kl": _divergences,
    "layers": _layer_errors,
    "tokens": _token_losses,
}
