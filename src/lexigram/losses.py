"""Losses of single predictions, from their logits: what the next token costs, and how far another model's prediction is.

A vocabulary is wide, and float32 takes room: some rows are taken at a time.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

LossName = Literal["tokens", "kl"]
"""Of the next token, or against the predictions of another model."""

CHUNK_ELEMENTS = 2**23
"""Logits held in float32 at a time: 32 MiB a copy."""


def surprises(logits: Tensor, targets: Tensor) -> Tensor:
    """Minus the log-likelihood in nats of `targets` (rows,) by logits (rows, vocabulary): (rows,), float32; differentiable."""
    rows: Tensor = _ByRows.apply(logits, targets, _surprise)
    return rows


def divergences(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(logits)) in nats of rows (rows, vocabulary): (rows,), float32; differentiable in `logits`.

    Hinton et al., arXiv 1503.02531, at temperature 1.
    """
    rows: Tensor = _ByRows.apply(logits, wanted, _divergence)
    return rows


class _ByRows(torch.autograd.Function):
    """Losses (rows,) of logits (rows, vocabulary) against `wanted` (rows, ...).

    The gradient is found along with them, in the dtype of the logits, and is all that is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, loss: "_Loss") -> Tensor:
        at_once = max(1, CHUNK_ELEMENTS // logits.shape[-1])
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = []
        for begin in range(0, len(logits), at_once):
            rows = slice(begin, begin + at_once)
            losses.append(loss(logits[rows], wanted[rows], None if gradient is None else gradient[rows]))
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None].to(gradient.dtype), None, None


_Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of rows of logits and what is wanted of them, (rows,); the gradient of each row's goes into the third argument."""


def _divergence(logits: Tensor, wanted: Tensor, gradient: Tensor | None) -> Tensor:
    """Its gradient is the difference of the softmaxes."""
    ours, theirs = logits.float().log_softmax(-1), wanted.to(logits.device).float().log_softmax(-1)
    shares = theirs.exp()
    losses = (theirs - ours).mul_(shares).sum(-1)
    if gradient is not None:
        gradient.copy_(ours.exp_().sub_(shares))
    return losses


def _surprise(logits: Tensor, targets: Tensor, gradient: Tensor | None) -> Tensor:
    ours, places = logits.float().log_softmax(-1), targets[:, None]
    losses = -ours.gather(1, places).squeeze(1)
    if gradient is not None:
        gradient.copy_(ours.exp_().scatter_add_(1, places, torch.full_like(places, -1, dtype=ours.dtype)))
    return losses
