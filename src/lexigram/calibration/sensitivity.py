"""How much the language-model loss feels an error in a layer's output, to first order. Needs the whole model at once."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexigram.calibration.loss import summed_loss
from lexigram.running import Progress


def output_sensitivity(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    ids: Tensor,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The mean squared gradient of the next-token loss, summed over a sequence, by an entry of each module's output.

    This is the trace of the empirical Fisher matrix at the output over its size. An independent error of energy ``||E||^2``
    over all tokens raises the summed loss by about half the product of both.

    Args:
        model: in evaluation mode; it is left as it was.
        modules: modules of `model` by name, each with one tensor as output.
        ids: token ids (sequences, length); one sequence is run at a time.
        dtype: what the model is run in (autocast); gradients are added up in float64.
        progress: is told after every sequence.
    """
    sums = dict.fromkeys(modules, 0.0)
    counts = dict.fromkeys(modules, 0)

    def hook_for(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def on_gradient(gradient: Tensor) -> None:
            sums[name] += float(gradient.float().square().sum(dtype=torch.float64))
            counts[name] += gradient.numel()

        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            output.register_hook(on_gradient)

        return hook

    embedded = model.get_input_embeddings().register_forward_hook(
        # The one leaf that asks for gradients: the weights' own are never made.
        lambda _module, _inputs, output: output.detach().requires_grad_()
    )
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks = [embedded, *(module.register_forward_hook(hook_for(name)) for name, module in modules.items())]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        for done, sequence in enumerate(ids.split(1), start=1):
            summed_loss(model, sequence, dtype).backward()
            if progress is not None:
                progress(done, len(ids))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in wanted:
            parameter.requires_grad_(before)
    return {name: sums[name] / max(counts[name], 1) for name in modules}
