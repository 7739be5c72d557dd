"""How much the language-model loss feels an error in a layer's output, to first order; one layer is in memory at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexigram.calibration.layerwise import LayerRunner
from lexigram.calibration.loss import next_token_loss
from lexigram.running import Progress
from lexigram.targets import decoder_layers


def output_sensitivity(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    ids: Tensor,
    dtype: torch.dtype,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, float]:
    """The mean squared gradient of the next-token loss, summed over a sequence, by an entry of each module's output.

    This is the trace of the empirical Fisher matrix at the output over its size. An independent error of energy ``||E||^2``
    over all tokens raises the summed loss by about half the product of both.

    The hidden states before every layer are kept; then gradients are pulled back through one layer after the other, which is
    run once more for that.

    Args:
        model: in evaluation mode; it is left as it was.
        modules: modules of `model` by name, each with one tensor as output.
        ids: token ids (sequences, length); one sequence is run at a time.
        dtype: what the model is run in; gradients are added up in float64.
        progress: is told after every layer on the way back, and what lies behind the last one.
        options: those of `LayerRunner` about where weights and hidden states are.
    """
    sums = dict.fromkeys(modules, 0.0)
    counts = dict.fromkeys(modules, 0)

    def hook_for(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def on_gradient(gradient: Tensor) -> None:
            sums[name] += float(gradient.float().square().sum(dtype=torch.float64))
            counts[name] += gradient.numel()

        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(on_gradient)

        return hook

    runner = LayerRunner(
        model, list(decoder_layers(model)), ids, batch_tokens=ids.shape[1], compute_dtype=dtype, **options
    )
    before: list[LayerRunner] = []
    for index in range(runner.layers):
        before.append(runner.fork())
        runner.run(index)
    hooks = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        gradients = list(runner.loss_gradients(next_token_loss))
        if progress is not None:
            progress(1, runner.layers + 1)
        for done, index in enumerate(reversed(range(runner.layers)), start=2):
            gradients = list(before.pop().pull_back(index, gradients))
            if progress is not None:
                progress(done, runner.layers + 1)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sums[name] / max(counts[name], 1) for name in modules}
