"""Grams of all input sites of a model, decoder layer by decoder layer; at any time only one layer's are made here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexigram.calibration.gram import CrossAccumulator, GramAccumulator, collecting, watching
from lexigram.calibration.layerwise import LayerRunner
from lexigram.gram import Gram

Sites = Mapping[int | None, Sequence[str]]
"""Names of the input sites by decoder layer; None for what lies behind the last one."""


def plain_grams(
    model: PreTrainedModel, layers: Sequence[nn.Module], sites: Sites, ids: Tensor, dtype: torch.dtype, **options: Any
) -> Iterator[dict[str, Gram]]:
    """The Grams of the original model's inputs, one layer's sites at a time; `options` are those of `LayerRunner`.

    A layer may be replaced as soon as its Grams were given: later ones do not depend on it. Layers behind the last with sites
    are not run.
    """
    runner = LayerRunner(model, layers, ids, compute_dtype=dtype, **options)
    for index, steps in _in_order(runner, sites):
        names = sites.get(index, ())
        with collecting({name: model.get_submodule(name) for name in names}) as accumulators:
            for _ in steps():
                pass
        # Taken out, so that they are not here while the layer is fitted.
        yield {name: accumulators.pop(name).result(name) for name in list(accumulators)}


def sequential_grams(
    model: PreTrainedModel, layers: Sequence[nn.Module], sites: Sites, ids: Tensor, dtype: torch.dtype, **options: Any
) -> Iterator[dict[str, Gram]]:
    """The Grams of inputs that come from the already compressed layers, each with its cross term to the original inputs.

    Whoever takes them replaces the layer before asking for the next: it is then run compressed, for the layers after it.
    Inside of a layer the inputs are those of its original weights.
    """
    original = LayerRunner(model, layers, ids, compute_dtype=dtype, **options)
    prefix = original.fork()
    for index, steps in _in_order(original, sites):
        modules = {name: model.get_submodule(name) for name in sites.get(index, ())}
        grams = {name: GramAccumulator() for name in modules}
        crosses = {name: CrossAccumulator() for name in modules}
        ahead = prefix.rest() if index is None else prefix.steps(index, advance=False)
        with watching(modules) as seen:
            for _ in steps():
                before = dict(seen)
                next(ahead)
                for name in modules:
                    grams[name].add(seen[name])
                    crosses[name].add(before[name], seen[name])
        ahead.close()  # with the layer's parameters, which nobody is to hold while it is fitted
        yield {name: replace(grams.pop(name).result(name), cross=crosses.pop(name).total) for name in list(grams)}
        if index is not None:
            prefix.run(index)


def _in_order(runner: LayerRunner, sites: Sites) -> Iterator[tuple[int | None, Callable[[], Iterator[None]]]]:
    """(layer, how to run it batch by batch) of every layer up to the last with sites, and of what lies behind all of them where
    that has some.
    """
    last = runner.layers - 1 if None in sites else max((index for index in sites if index is not None), default=-1)
    for index in range(last + 1):
        yield index, lambda index=index: runner.steps(index)  # type: ignore[misc]
    if None in sites:
        yield None, runner.rest
