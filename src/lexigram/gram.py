"""The Gram of a layer's inputs, ``G = sum_t x_t^T x_t`` over the calibration tokens: a sum, never a mean."""

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from lexigram.linalg.whitening import Whitening, whiten


@dataclass(frozen=True)
class Gram:
    """Uncentred second moments of an input site.

    `matrix` is (in, in) float64, the sum over `tokens` calibration tokens.
    """

    matrix: Tensor
    tokens: int

    @cached_property
    def whitening(self) -> Whitening:
        """The factor ``L`` with ``L^T L = G``, computed once for all the layers on this site."""
        found = whiten(self.matrix)
        # Rounding in the sums leaves small eigenvalues where there should be none; the tokens bound the true rank.
        return replace(found, rank=min(found.rank, self.tokens))
