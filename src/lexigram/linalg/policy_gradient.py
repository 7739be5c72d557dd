"""Which candidates stay, by policy gradient: a Bernoulli probability for each, moved by the losses of sampled masks.

The second stage of CAP (arXiv 2505.03801), after the pruning by policy gradient of arXiv 2406.10576: no back-propagation,
only losses. With masks ``m ~ Bernoulli(s)``, ``grad log p(m) = (m - s) / (s (1 - s))``, and
``E[(loss(m) - delta) grad log p(m)]`` is the gradient of the expected loss whatever the baseline ``delta``, as long as
that does not depend on ``m`` (Williams 1992). What a loss is, and what masks mean, is the caller's.

Probabilities are float32, 4 bytes a candidate and 1 for a sampled mask, changed in place and in pieces. Half of that would
not do: float16 has some 4,700 values between .05 and .95, so that the ranking of 1e8 candidates would mostly be ties, and
a step of the learning rate .05 on a loss that differs by .01, which is 1e-3, is two units in its last place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lexigram.linalg.budget import pieces, project

Start = Literal["uniform", "random", "sigmoid", "largest"]

LEARNING_RATE = 0.05
MEMORY = 0.8
"""``beta`` of the moving average of the loss: CAP speaks of a window of 5."""

EPS = 1e-8
"""Added to ``s (1 - s)``. CAP does not give it; this one leaves all but the probabilities below 1e-7 alone."""

CLIP = (0.05, 0.95)


@dataclass
class BernoulliPolicy:
    """Probabilities of candidates, a tensor and a cost for each kind of them, the budget, and what the losses were like.

    `baseline` is the moving average of the loss; None until there was one.
    """

    probabilities: list[Tensor]
    costs: list[float]
    budget: float
    baseline: float | None = None


def sample(probabilities: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Boolean masks, True with the probability of each candidate.

    Drawn on the generator's own device: a seed gives the same masks on every device.
    """
    masks = [torch.empty_like(tensor, dtype=torch.bool) for tensor in probabilities]
    for tensor, mask in zip(probabilities, masks, strict=True):
        for piece, part in zip(pieces(tensor), pieces(mask), strict=True):
            draw = torch.rand(piece.shape, generator=generator, device=generator.device, dtype=piece.dtype)
            torch.lt(draw.to(piece.device), piece, out=part)
    return masks


def grad_log_probability(probabilities: Tensor, masks: Tensor, *, eps: float = EPS) -> Tensor:
    """``(m - s) / (s (1 - s) + eps)``, of one shape: 0 where a probability is 0 or 1 and the mask says so."""
    return (masks.to(probabilities.dtype) - probabilities) / (probabilities * (1 - probabilities) + eps)


def update(
    policy: BernoulliPolicy,
    masks: Sequence[Sequence[Tensor]],
    losses: Sequence[float],
    *,
    rate: float = LEARNING_RATE,
    memory: float = MEMORY,
    eps: float = EPS,
) -> None:
    """One step, in place, from one sample or several, each with its masks and its loss.

    ``delta <- beta delta + (1 - beta) loss``, ``s <- s - eta (loss - delta) grad log p``, and the projection on the budget;
    with several samples, their means. The average starts at the first loss that it sees, or at what the policy was made
    with; CAP does not say. From zero, the first step would move every probability by ``eta loss / s``, at random, and wipe
    out the start. A single sample is therefore no step the first time unless the policy has a baseline.

    Raises:
        ValueError: where samples and losses do not match, or a loss is not finite.
    """
    if not losses or len(losses) != len(masks):
        raise ValueError(f"{len(masks)} samples but {len(losses)} losses; pass at least one, and a loss for each")
    mean = sum(losses) / len(losses)
    if not abs(mean) < float("inf"):
        raise ValueError(f"the losses are not finite: {list(losses)}; a mask broke the model or its loss overflowed")
    policy.baseline = mean if policy.baseline is None else memory * policy.baseline + (1 - memory) * mean
    lengths = [rate * (loss - policy.baseline) / len(losses) for loss in losses]
    for number, tensor in enumerate(policy.probabilities):
        samples = [pieces(sampled[number]) for sampled in masks]
        for piece, *drawn in zip(pieces(tensor), *samples, strict=True):
            moved = sum(
                (
                    grad_log_probability(piece, mask, eps=eps).mul_(length)
                    for mask, length in zip(drawn, lengths, strict=True)
                ),
                start=torch.zeros_like(piece),
            )
            piece.sub_(moved)
    project(policy.probabilities, policy.costs, policy.budget)


def started(
    scores: Sequence[Tensor],
    start: Start,
    *,
    together: bool = False,
    value: float = 0.5,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Probabilities (float32) to begin with, of the shapes of the scores; CAP does not say which.

    ``uniform``: `value` for all; ``random``: uniform between 0 and 1; ``sigmoid``: of the scores' distance from their mean
    in standard deviations; ``largest``: the share of the largest score, clipped to `CLIP`. Mean, deviation and largest are
    those of each tensor, as singular values and entries have no unit in common, or of all tensors `together` for scores
    that do. Not projected on any budget.

    Raises:
        ValueError: for ``random`` without a generator, or ``largest`` with scores below zero.
    """
    if start == "uniform":
        return [torch.full_like(tensor, value, dtype=torch.float32) for tensor in scores]
    if start == "random":
        if generator is None:
            raise ValueError("this start draws random numbers; pass generator=torch.Generator().manual_seed(seed)")
        drawn = (torch.rand(each.shape, generator=generator, device=generator.device) for each in scores)
        return [numbers.to(each.device) for numbers, each in zip(drawn, scores, strict=True)]
    groups = [list(scores)] if together else [[tensor] for tensor in scores]
    levelled = _standardised if start == "sigmoid" else _share_of_largest
    return [tensor for group in groups for tensor in levelled(group)]


def _standardised(group: list[Tensor]) -> list[Tensor]:
    count = sum(tensor.numel() for tensor in group)
    mean = sum(float(tensor.sum(dtype=torch.float64)) for tensor in group) / max(count, 1)
    # Around the mean, and not mean of squares less square of the mean: scores may differ little.
    squares = sum(
        float((piece.double() - mean).square_().sum()) for tensor in group for piece in pieces(tensor.contiguous())
    )
    deviation = (squares / max(count, 1)) ** 0.5 or 1.0
    return [tensor.to(torch.float32, copy=True).sub_(mean).div_(deviation).sigmoid_() for tensor in group]


def _share_of_largest(group: list[Tensor]) -> list[Tensor]:
    filled = [tensor for tensor in group if tensor.numel()]
    if any(float(tensor.min()) < 0 for tensor in filled):
        raise ValueError("the share of the largest is for scores from 0 up; pass their absolute values")
    largest = max((float(tensor.max()) for tensor in filled), default=0.0) or 1.0
    return [tensor.to(torch.float32, copy=True).div_(largest).clamp_(*CLIP) for tensor in group]
