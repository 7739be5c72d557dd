"""A model run one decoder layer at a time over all calibration sequences. Knows no Grams and no methods.

What each layer is called with (masks, rotary embeddings, positions) is never built by hand: one genuine forward pass, with
the layers stood in for, records the arguments; the layers are then replayed with them. Models whose layers differ (sliding
and full attention) work because every layer's arguments are its own.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import copy
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from lexigram.weights import Held, Readable, Weights


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
        weights: Weights | None = None,
        device: torch.device | None = None,
        keep: Callable[[Tensor], Readable] = Held,
    ) -> None:
        """Record the arguments of every layer, up to the first layer's input.

        Args:
            model: the whole model; its parameters may be on the meta device where `weights` has them.
            layers: its decoder layers, in order.
            ids: token ids (sequences, length).
            batch_tokens: about how many tokens are run at once.
            compute_dtype: what the model runs in. Its own weights stay as they are: one layer at a time is cast.
            weights: what is read in the place of parameters on the meta device, one layer's at a time.
            device: where it computes; by default where the model's tensors are.
            keep: where hidden states are between two layers: in memory, or in files.
        """
        self._model = model
        self._layers = list(layers)
        self._compute_dtype = compute_dtype
        self._weights = weights
        self._in_use: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._keep = keep
        self._device = device or _device_of(model)
        names = {id(module): name for name, module in model.named_modules()}
        self._names = [names[id(layer)] for layer in self._layers]
        self._batches = ids.split(max(1, batch_tokens // ids.shape[1]))
        self._wrap: Callable[[Tensor], Any] = self._learn_output(self._batches[0][:1])
        self._hidden: list[Readable] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        outside = self._before_layers()
        for batch in self._batches:
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            inputs: list[Tensor] = []

            def stand_in(hidden: Tensor, *args: Any, calls=calls, inputs=inputs, **kwargs: Any) -> Any:  # type: ignore[no-untyped-def]
                inputs.append(hidden)
                calls.append((args, kwargs))
                if len(calls) == len(self._layers):
                    raise _Recorded
                return self._wrap(hidden)

            with torch.no_grad(), self._standing_in([stand_in] * len(self._layers)):
                self._forward(batch, outside)
            self._hidden.append(keep(inputs[0]))
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

    def steps(self, index: int, *, advance: bool = True) -> Generator[None]:
        """`run`, batch by batch; without `advance` the layer is run but the hidden states stay before it."""
        parameters = self._of_layer(index)
        for batch in range(len(self._batches)):
            with torch.no_grad():
                output = self._layer(index, parameters, batch, self._hidden[batch].read())
            if advance:
                self._hidden[batch] = self._keep(output)
            yield

    def pull_back(self, index: int, gradients: Sequence[Tensor]) -> Iterator[Tensor]:
        """Of something with these `gradients` by the outputs of layer `index`, those by its inputs, batch by batch.

        The inputs are the hidden states of this stream, which stays where it is: before that layer.
        """
        parameters = {name: tensor.detach() for name, tensor in self._of_layer(index).items()}
        for batch, gradient in enumerate(gradients):
            hidden = self._hidden[batch].read().detach().requires_grad_()
            with torch.enable_grad():
                output = self._layer(index, parameters, batch, hidden)
                yield torch.autograd.grad(output, hidden, gradient)[0]

    def loss_gradients(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
        """Of the loss of logits (sequences, length, vocabulary) and ids, the gradients by the hidden states behind the last
        layer, batch by batch.
        """
        outside = {name: tensor.detach() for name, tensor in self._outside().items()}
        for batch, kept in zip(self._batches, self._hidden, strict=True):
            hidden = kept.read().detach().requires_grad_()
            with torch.enable_grad(), self._all_giving(hidden):
                logits = self._forward(batch, outside).logits
                yield torch.autograd.grad(loss(logits, batch.to(logits.device)), hidden)[0]

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(self._layers)

    def rest(self) -> Generator[None]:
        """Run what comes after the last layer (final norm, lm_head) on its hidden states, batch by batch."""
        outside = self._outside()
        for batch, kept in zip(self._batches, self._hidden, strict=True):
            with torch.no_grad(), self._all_giving(kept.read()):
                self._forward(batch, outside)
            yield

    def _layer(self, index: int, parameters: Mapping[str, Tensor], batch: int, hidden: Tensor) -> Tensor:
        args, kwargs = self._calls[batch][index]
        return _hidden_of(functional_call(self._layers[index], dict(parameters), (hidden, *args), kwargs))

    def _all_giving(self, hidden: Tensor) -> AbstractContextManager[None]:
        """Let every layer give `hidden`."""
        return self._standing_in([lambda *_args, **_kwargs: self._wrap(hidden)] * len(self._layers))

    def _learn_output(self, ids: Tensor) -> Callable[[Tensor], Any]:
        """How a layer wraps its hidden states: as a bare tensor or as the first of a tuple."""
        outputs: list[Any] = []

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs.append(output)
            raise _Recorded

        hook = self._layers[0].register_forward_hook(note)
        first = {f"{self._names[0]}.{name}": tensor for name, tensor in self._of_layer(0).items()}
        try:
            with torch.no_grad():
                self._forward(ids, {**self._before_layers(), **first})
        finally:
            hook.remove()
        if isinstance(outputs[0], tuple):
            rest = outputs[0][1:]
            return lambda hidden: (hidden, *rest)
        return lambda hidden: hidden

    def _forward(self, ids: Tensor, parameters: Mapping[str, Tensor]) -> Any:
        """What the model gives; None where a stand-in has ended its forward pass."""
        inputs = {"input_ids": ids.to(self._device), "use_cache": False}
        with suppress(_Recorded):
            return functional_call(self._model, dict(parameters), (), inputs)
        return None

    def _outside(self) -> dict[str, Tensor]:
        """The parameters outside of the layers, as they are computed with."""
        within = tuple(f"{name}." for name in self._names)
        outside = ((name, p) for name, p in self._model.named_parameters() if not name.startswith(within))
        return self._values(outside)

    def _before_layers(self) -> dict[str, Tensor]:
        """Those that are needed up to the last layer: an output embedding of its own may be the largest tensor."""
        head = self._model.get_output_embeddings()
        behind = {id(p) for p in head.parameters()} if head is not None else set()
        embedding = self._model.get_input_embeddings()
        behind -= {id(p) for p in embedding.parameters()} if embedding is not None else set()
        within = tuple(f"{name}." for name in self._names)
        named = self._model.named_parameters()
        return self._values((name, p) for name, p in named if not name.startswith(within) and id(p) not in behind)

    def _of_layer(self, index: int) -> dict[str, Tensor]:
        """Those of a layer, by their names in it."""
        prefix = f"{self._names[index]}."
        named = ((prefix + name, p) for name, p in self._layers[index].named_parameters())
        return {name.removeprefix(prefix): tensor for name, tensor in self._values(named).items()}

    def _values(self, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Of parameters by their names in the model, those that are not the model's own as it is: cast, or read."""
        found: dict[str, Tensor] = {}
        for name, parameter in parameters:
            value = self._read(name) if parameter.is_meta else self._cast(parameter)
            if value is not parameter:
                found[name] = value
        return found

    def _read(self, name: str) -> Tensor:
        """A parameter that the model has not; what another stream holds already is not read again."""
        value = self._in_use.get(name)
        if value is None:
            assert self._weights is not None
            value = self._cast(self._weights.read(name).to(self._device))
            self._in_use[name] = value
        return value

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self._compute_dtype) if value.is_floating_point() else value

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


def _device_of(model: nn.Module) -> torch.device:
    """Where it computes: of a model without weights that of its buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


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
