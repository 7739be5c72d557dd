"""The Gram of a layer's inputs, ``G = sum_t x_t^T x_t`` over the calibration tokens: a sum, never a mean."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lexigram.linalg.whitening import Whitening, whiten

AIM_DAMPING = 1e-4
"""What `aim` adds to the Gram's diagonal, as a share of it.

Sums of float32 products are off by about 1e-7 of it; divided by less than this, that would come up as weights in directions
that the inputs do not have.
"""


@dataclass(frozen=True)
class Gram:
    """Uncentred second moments of an input site.

    `matrix` is (in, in) float64, the sum over `tokens` calibration tokens. Where the inputs `X` are those that a compressed
    model gives, `cross` is ``X0^T X`` with the original model's inputs ``X0`` to the same tokens.
    """

    matrix: Tensor
    tokens: int
    cross: Tensor | None = None

    @cached_property
    def whitening(self) -> Whitening:
        """The factor ``L`` with ``L^T L = G``, computed once for all the layers on this site."""
        found = whiten(self.matrix)
        # Rounding in the sums leaves small eigenvalues where there should be none; the tokens bound the true rank.
        return replace(found, rank=min(found.rank, self.tokens))

    @property
    def token_unit(self) -> float:
        """The power of two nearest to the root of `tokens`.

        A direction of unit length in the metric, times this, answers an input of the text with 1 in the root mean square, and a
        coefficient of it, divided by this, is of the size of outputs. Left as they are the two drift apart with the tokens, and
        leave what float16 can hold; a power of two changes no digit of either.
        """
        return 2.0 ** round(math.log2(max(self.tokens, 1)) / 2)

    def aim(self, weight: Tensor, share: float = 1.0) -> Tensor:
        """The weight (out, in) whose outputs on ``X`` are nearest to those of `weight` on ``X0``, or so much of the way there:
        `weight` itself where these are the same inputs.

        ``W X0^T X G^-1 = W + W (X0 - X)^T X G^-1``, with `AIM_DAMPING` of its diagonal added to this last ``G``. The second
        form does not lose digits where the inputs differ little. The damping weighs the change of an input's weights by that
        input's energy: what ``X`` does not tell stays close to `weight`.
        """
        if self.cross is None:
            return weight
        return torch.add(weight.double(), weight.double() @ self._drift, alpha=share).to(weight.dtype)

    @cached_property
    def _drift(self) -> Tensor:
        """``(X0 - X)^T X G^-1``, (in, in), for all the layers on this site."""
        assert self.cross is not None
        energy = self.matrix.diagonal()
        damped = self.matrix.clone()
        damped.diagonal().add_(torch.where(energy > 0, AIM_DAMPING * energy, 1.0))
        # G is symmetric: D G^-1 is the transpose of G^-1 D^T.
        return torch.linalg.solve(damped, (self.cross - self.matrix).T).T
