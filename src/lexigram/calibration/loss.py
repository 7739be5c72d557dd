"""The next-token loss of a model on calibration sequences, with weights in place of its own where they are given."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lexigram.errors import LexigramError


def summed_loss(
    model: PreTrainedModel,
    tokens: Tensor,
    dtype: torch.dtype,
    weights: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """Minus the log-likelihood, in nats, of every token but the first of each sequence, given those before it.

    Args:
        model: in evaluation mode.
        tokens: ids (sequences, length), on any device; all are run at once.
        dtype: what the model is run in (autocast).
        weights: (out, in) of linear layers by name, used in place of the model's own, which stay as they are.
    """
    tokens = tokens.to(model.device)
    parameters = {
        f"{name}.weight": weight.T if isinstance(model.get_submodule(name), Conv1D) else weight
        for name, weight in weights.items()
    }
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = functional_call(model, parameters, (), {"input_ids": tokens, "use_cache": False}).logits
    return next_token_loss(logits, tokens)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of logits (sequences, length, vocabulary) and ids (sequences, length): see `summed_loss`."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum"
    )


def loss_a_token(
    model: PreTrainedModel,
    tokens: Tensor,
    dtype: torch.dtype,
    weights: Mapping[str, Tensor],
    *,
    what: str,
    remedy: str,
) -> float:
    """The loss of a model that is tried out with other weights, in nats a token; one sequence is run at a time.

    Arguments as in `summed_loss`; of a loss that is not finite, `what` it is of and the `remedy`.

    Raises:
        LexigramError: where it is not.
    """
    total = sum(float(summed_loss(model, sequence, dtype, weights)) for sequence in tokens.split(1))
    loss = total / (tokens.shape[0] * (tokens.shape[1] - 1))
    if not math.isfinite(loss):
        raise LexigramError(f"the loss of {what} is {loss}; {remedy}")
    return loss
