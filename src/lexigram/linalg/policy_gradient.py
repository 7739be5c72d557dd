"""Which candidates stay, by policy gradient: a Bernoulli probability for each, moved by the losses of sampled masks.

The second stage of CAP (arXiv 2505.03801), after the pruning by policy gradient of arXiv 2406.10576: no back-propagation,
only losses. With masks ``m ~ Bernoulli(s)``, ``grad log p(m) = (m - s) / (s (1 - s))``, and
``E[(loss(m) - delta) grad log p(m)]`` is the gradient of the expected loss whatever the baseline ``delta``, as long as
that does not depend on ``m`` (Williams 1992). What a loss is, and what masks mean, is the caller's.

Of numbers instead of masks the policy is Gaussian, ``x ~ N(mean, sigma^2)``, and draws come in pairs ``mean +- sigma z`` whose
losses are taken on the same batch: what the batch itself loses cancels, and so does any baseline.

Probabilities are float32, 4 bytes a candidate and 1 for a sampled mask, changed in place and in pieces. Half of that would
not do: float16 has some 4,700 values between .05 and .95, so that the ranking of 1e8 candidates would mostly be ties, and
a step of the learning rate .05 on a loss that differs by .01, which is 1e-3, is two units in its last place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lexigram.linalg.budget import Projection, pieces, project

Start = Literal["uniform", "random", "sigmoid", "largest"]

LEARNING_RATE = 0.05
MEMORY = 0.8
"""``beta`` of the moving average of the loss: CAP speaks of a window of 5."""

EPS = 1.0
"""Added to ``s (1 - s)``. CAP does not give it. Next to nothing leaves the gradient of the expected loss as it is, whose
estimate has a deviation of ``1 / sqrt(s (1 - s))`` for each candidate: those close to 0 or 1 are thrown about by single losses.
With 1 a step is all but ``rate (loss - delta) (m - s)``, that of the natural gradient, and bounded for all alike.
"""

CLIP = (0.05, 0.95)


@dataclass
class BernoulliPolicy:
    """Probabilities of candidates, a tensor and a cost for each kind of them, the budget, and what the losses were like.

    `baseline` is the moving average of the loss; None until there was one. `projection` is what the distance to the budget is
    measured in.
    """

    probabilities: list[Tensor]
    costs: list[float]
    budget: float
    baseline: float | None = None
    projection: Projection = "weighted"


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
    project(policy.probabilities, policy.costs, policy.budget, metric=policy.projection)


@dataclass
class GaussianPolicy:
    """The mean of numbers that are drawn with one deviation, and how far the losses of a pair were apart.

    `spread` is the moving average of the squared difference of the losses; None until there was a pair.
    """

    mean: Tensor
    deviation: float
    spread: float | None = None

    def pair(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noise of the mean's shape, standard normal, and the two draws that it makes: ``mean +- sigma noise``."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return noise, self.mean + self.deviation * noise, self.mean - self.deviation * noise


def pair_gradient(noise: Tensor, up: float, down: float, deviation: float) -> Tensor:
    """``(loss(mean + sigma z) - loss(mean - sigma z)) z / (2 sigma)``, of the noise's shape.

    An estimate without bias of the gradient of the expected loss by the mean: REINFORCE, averaged over both draws.
    """
    return (up - down) / (2 * deviation) * noise


def update_by_pair(
    policy: GaussianPolicy, noise: Tensor, up: float, down: float, *, rate: float, memory: float = MEMORY
) -> None:
    """One step from a pair of losses: ``mean <- mean - rate sigma^2 gradient / spread^(1/2)``, twice as long.

    That is the natural gradient, in units of what losses differ by, so that a rate has the same meaning for every model: a pair
    that differs as usual moves the mean by ``rate sigma |z|``.

    Raises:
        ValueError: where a loss is not finite.
    """
    if not (math.isfinite(up) and math.isfinite(down)):
        raise ValueError(f"the losses are not finite: {[up, down]}; a draw broke the model or its loss overflowed")
    square = (up - down) ** 2
    policy.spread = square if policy.spread is None else memory * policy.spread + (1 - memory) * square
    if policy.spread:
        gradient = pair_gradient(noise, up, down, policy.deviation)
        policy.mean = policy.mean - 2 * rate * policy.deviation**2 / math.sqrt(policy.spread) * gradient


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
    in standard deviations; ``largest``: the share of the largest score, from one end of `CLIP` to the other. Mean, deviation
    and largest are those of each tensor, as singular values and entries have no unit in common, or of all tensors `together`
    for scores that do. Not projected on any budget.

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
    least, most = CLIP
    # Not clipped: most scores are far below the largest, and would all be equal.
    return [
        tensor.to(torch.float32, copy=True).mul_((most - least) / largest).add_(least).clamp_(max=most)
        for tensor in group
    ]
