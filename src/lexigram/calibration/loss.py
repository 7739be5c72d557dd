"""What a model loses on calibration sequences, with weights in place of its own where they are given."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lexigram.errors import LexigramError
from lexigram.losses import LossName, divergences, surprises


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
    return next_token_loss(_logits(model, tokens, dtype, weights), tokens.to(model.device))


def summed_divergence(
    model: PreTrainedModel, tokens: Tensor, dtype: torch.dtype, weights: Mapping[str, Tensor]
) -> Tensor:
    """KL(original || model) of the same predictions as in `summed_loss`, in nats; the original has all of its own weights."""
    ours, theirs = (_logits(model, tokens, dtype, each)[:, :-1].flatten(0, 1) for each in (weights, {}))
    return divergences(ours, theirs).sum()


def _logits(model: PreTrainedModel, tokens: Tensor, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> Tensor:
    """(sequences, length, vocabulary)."""
    parameters = {
        f"{name}.weight": weight.T if isinstance(model.get_submodule(name), Conv1D) else weight
        for name, weight in weights.items()
    }
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        given = {"input_ids": tokens.to(model.device), "use_cache": False}
        logits: Tensor = functional_call(model, parameters, (), given).logits
    return logits


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of logits (sequences, length, vocabulary) and ids (sequences, length): see `summed_loss`."""
    return surprises(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).sum()


def loss_a_token(
    model: PreTrainedModel,
    tokens: Tensor,
    dtype: torch.dtype,
    weights: Mapping[str, Tensor],
    *,
    objective: LossName = "tokens",
    what: str,
    remedy: str,
) -> float:
    """The loss of a model that is tried out with other weights, in nats a token; one sequence is run at a time.

    Arguments as in `summed_loss`. `objective` is the next token's loss, or the divergence from the original's predictions
    (``kl``, two runs of the model); of a loss that is not finite, `what` it is of and the `remedy`.

    Raises:
        LexigramError: where it is not.
    """
    summed = summed_loss if objective == "tokens" else summed_divergence
    total = sum(float(summed(model, sequence, dtype, weights)) for sequence in tokens.split(1))
    loss = total / (tokens.shape[0] * (tokens.shape[1] - 1))
    if not math.isfinite(loss):
        raise LexigramError(f"the loss of {what} is {loss}; {remedy}")
    return loss
