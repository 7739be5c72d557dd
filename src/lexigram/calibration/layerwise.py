"""A model run one decoder layer at a time over all calibration sequences. Knows no Grams and no methods.

What each layer is called with (masks, rotary embeddings, positions) is never built by hand: one genuine forward pass, with
the layers stood in for, records the arguments; the layers are then replayed with them. Models whose layers differ (sliding
and full attention) work because every layer's arguments are its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel


class _Recorded(Exception):  # noqa: N818 - no error: it ends a forward pass that has given what it was made for
    """Everything is known: the rest of the forward pass, lm_head and its logits, would be thrown away."""


class LayerRunner:
    """The hidden states of the calibration sequences, on their way through the decoder layers."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        ids: Tensor,
        *,
        batch_tokens: int = 2048,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Record the arguments of every layer, up to the first layer's input.

        Args:
            model: the whole model.
            layers: its decoder layers, in order.
            ids: token ids (sequences, length).
            batch_tokens: about how many tokens are run at once.
            compute_dtype: what the model runs in. Its own weights stay as they are: one layer at a time is cast.
        """
        self._model = model
        self._layers = list(layers)
        self._compute_dtype = compute_dtype
        inside = {id(parameter) for layer in self._layers for parameter in layer.parameters()}
        self._outside = self._cast(
            (name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in inside
        )
        self._batches = ids.split(max(1, batch_tokens // ids.shape[1]))
        self._wrap: Callable[[Tensor], Any] = self._learn_output(self._batches[0][:1])
        self._hidden: list[Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        for batch in self._batches:
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            inputs: list[Tensor] = []

            def stand_in(hidden: Tensor, *args: Any, calls=calls, inputs=inputs, **kwargs: Any) -> Any:  # type: ignore[no-untyped-def]
                inputs.append(hidden)
                calls.append((args, kwargs))
                if len(calls) == len(self._layers):
                    raise _Recorded
                return self._wrap(hidden)

            with self._standing_in([stand_in] * len(self._layers)):
                self._forward(batch)
            self._hidden.append(inputs[0])
            self._calls.append(_shared(calls, self._calls[-1]) if self._calls else calls)

    def fork(self) -> "LayerRunner":
        """Another stream of hidden states through the same model, from where this one is."""
        other = copy(self)
        other._hidden = list(self._hidden)
        return other

    def run(self, index: int) -> None:
        """Carry all hidden states through layer `index`; call with 0, 1, 2, ... in order."""
        for _ in self.steps(index):
            pass

    def steps(self, index: int, *, advance: bool = True) -> Iterator[None]:
        """`run`, batch by batch; without `advance` the layer is run but the hidden states stay before it."""
        layer = self._layers[index]
        parameters = self._cast(layer.named_parameters())
        for batch, calls in enumerate(self._calls):
            args, kwargs = calls[index]
            with torch.no_grad():
                output = functional_call(layer, parameters, (self._hidden[batch], *args), kwargs)
            if advance:
                self._hidden[batch] = _hidden_of(output)
            yield

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(self._layers)

    def rest(self) -> Iterator[None]:
        """Run what comes after the last layer (final norm, lm_head) on its hidden states, batch by batch."""
        for batch, hidden in zip(self._batches, self._hidden, strict=True):
            with self._standing_in([lambda *_args, hidden=hidden, **_kwargs: self._wrap(hidden)] * len(self._layers)):
                self._forward(batch)
            yield

    def _learn_output(self, ids: Tensor) -> Callable[[Tensor], Any]:
        """How a layer wraps its hidden states: as a bare tensor or as the first of a tuple."""
        outputs: list[Any] = []

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs.append(output)
            raise _Recorded

        hook = self._layers[0].register_forward_hook(note)
        try:
            self._forward(ids, self._cast(self._named_in_model(self._layers[0])))
        finally:
            hook.remove()
        if isinstance(outputs[0], tuple):
            rest = outputs[0][1:]
            return lambda hidden: (hidden, *rest)
        return lambda hidden: hidden

    def _forward(self, ids: Tensor, more: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        inputs = {"input_ids": ids.to(self._model.device), "use_cache": False}
        with torch.no_grad(), suppress(_Recorded):
            functional_call(self._model, {**self._outside, **more}, (), inputs)

    def _cast(self, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Those float parameters that have another dtype than the computation, in that dtype."""
        dtype = self._compute_dtype
        return {name: p.to(dtype) for name, p in parameters if p.is_floating_point() and p.dtype != dtype}

    def _named_in_model(self, layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
        wanted = {id(parameter) for parameter in layer.parameters()}
        return ((name, p) for name, p in self._model.named_parameters() if id(p) in wanted)

    @contextmanager
    def _standing_in(self, forwards: Sequence[Callable[..., Any] | None]) -> Iterator[None]:
        """Replace the forward of every layer that has a stand-in, on the instance, for the length of the context."""
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for layer, forward in zip(self._layers, forwards, strict=True):
                if forward is not None:
                    # An instance may have a forward of its own already: accelerate's hooks are put in that way.
                    replaced.append((layer, layer.__dict__.get("forward")))
                    layer.__dict__["forward"] = _positional(forward)
            yield
        finally:
            for layer, own in replaced:
                if own is None:
                    del layer.__dict__["forward"]
                else:
                    layer.__dict__["forward"] = own


def _positional(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Accept the hidden states by keyword too, as some models pass them."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        return forward(*args, **kwargs)

    return call


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _shared(new: Any, old: Any) -> Any:
    """`new` with the tensors of `old` wherever they are equal: a mask is kept once, not once a batch."""
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
        return old if same else new
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _shared(value, old.get(key)) for key, value in new.items()}
    if type(new) in (list, tuple) and type(old) is type(new) and len(new) == len(old):
        return type(new)(_shared(a, b) for a, b in zip(new, old, strict=True))
    return new
