"""Robust principal component analysis: a matrix as low rank plus sparse, by the method of multipliers.

``min ||L||_* + lambda ||S||_1 s.t. W = L + S`` (Candes, Li, Ma, Wright, arXiv 0912.3599), as the first stage of CAP (arXiv
2505.03801) asks for: on the plain weight, without activations, and without a wish for rank or size. What is to stay of ``L``
and ``S`` is not decided here. CAP leaves open what the penalty ``mu`` is, whether it grows, and when to stop. Its authors'
related code takes the ``mu`` of Candes et al. (section 5), ``m n / (4 ||W||_1)``, 200 iterations and a tolerance of 1e-6, which
weights of language models do not reach so: on a query projection (576, 576) of SmolLM2-135M it misses 1.5e-6 after them, on a
down projection (576, 1536) 8.5e-6. Here `penalty`, `GROWTH` and `RELAXATION` come to the same minimum, to 1e-5 of the objective
and to the rank, in 49 and 42 iterations.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TOLERANCE = 1e-6
"""Share of the norm of the matrix that ``L + S`` may miss; float32 resolves it, by a factor of about ten."""

ITERATIONS = 200

GROWTH = 1.02
RISE = 3.0
"""The penalty grows from `penalty` to so much of it, by this factor an iteration.

No fixed one does for all. Iterations to the tolerance at 1, .5 and .3 times that of Candes et al., and so: of a query
projection (64, 64) 71, 120, 200, and 62; of a gate (172, 64) 101, 47, 65, and 44; of a key projection (192, 576) 164, 86, 47,
and 43; of low rank plus sparse (80, 150) that was planted 94, 199, more than 200, and 107. One that grows for ever ends
elsewhere: from that of Candes et al., by 1.02 an iteration, with rank 126 instead of 114 on the key projection, and what half
of the parameters leave over is .379 of the weight instead of .362; by 1.1 it is .50.
"""

RELAXATION = 1.6
"""Over-relaxation, from 1 to below 2 (Eckstein and Bertsekas 1992, section 4): ``L`` goes into the other two steps as ``1.6 L -
.6 (W - S)``. A third to a half fewer iterations.
"""

_ROUNDING = 2e-4
"""Share of the square of the threshold up to which float32 may round the squares of singular values."""


@dataclass(frozen=True)
class RobustPCA:
    """``L = left diag(values) right`` with ``left (m, r)``, ``values (r,)`` falling and above zero, ``right (r, n)``, and
    ``sparse (m, n)``.

    `residual` is ``||W - L - S||_F / ||W||_F``; `stop` says whether it came down to the tolerance.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    sparse: Tensor
    iterations: int
    residual: float
    stop: Literal["tolerance", "iterations"]

    @property
    def low_rank(self) -> Tensor:
        """``L (m, n)``."""
        return (self.left * self.values) @ self.right


def robust_pca(
    matrix: Tensor,
    *,
    weight: float | None = None,
    mu: float | None = None,
    growth: float = GROWTH,
    rise: float = RISE,
    relaxation: float = RELAXATION,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
) -> RobustPCA:
    """Split a matrix ``(m, n)`` into low rank plus sparse; computed in float32, or in float64 if that is what it is.

    Args:
        matrix: finite; what comes of other entries is undefined.
        weight: ``lambda``, of the absolute sum of the sparse part; by default ``1 / sqrt(max(m, n))``.
        mu: the first penalty of the constraint; by default `penalty` of the matrix. It decides how soon the minimum is
            reached, not where it is.
        growth: what the penalty is multiplied by after an iteration, from 1.
        rise: where that ends, in units of the first penalty, from 1.
        relaxation: see `RELAXATION`; 1 is none.
        tolerance: of `RobustPCA.residual`.
        iterations: at most so many.

    Raises:
        ValueError: where an argument is out of its range.
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"robust PCA splits a matrix, got the shape {tuple(matrix.shape)}")
    weight = max(matrix.shape) ** -0.5 if weight is None else weight
    for name, value, allowed in (
        ("weight", weight, weight > 0),
        ("mu", mu, mu is None or mu > 0),
        ("growth", growth, growth >= 1),
        ("rise", rise, rise >= 1),
        ("relaxation", relaxation, 1 <= relaxation < 2),
        ("iterations", iterations, iterations >= 1),
    ):
        if not allowed:
            raise ValueError(
                f"{name} is out of range: {value}; pass weight and mu above 0, growth, rise and iterations from 1, relaxation "
                "from 1 to below 2"
            )
    work = matrix.detach().to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    # Lying down: the eigenproblem of `shrink_values` is then that of the rows.
    turned = work.shape[0] > work.shape[1]
    work = work.T.contiguous() if turned else work
    norm = float(work.norm())
    sparse, multiplier = torch.zeros_like(work), torch.zeros_like(work)
    left, values = work.new_zeros(work.shape[0], 0), work.new_zeros(0)
    right = work.new_zeros(0, work.shape[1])
    stop: Literal["tolerance", "iterations"] = "tolerance" if norm == 0 else "iterations"
    residual, iteration = 0.0, 0
    mu = mu or (penalty(work) if norm else 1.0)
    most = rise * mu
    while stop == "iterations" and iteration < iterations:
        iteration += 1
        scaled = multiplier / mu
        left, values, right = shrink_values(work - sparse + scaled, 1 / mu)
        rest = torch.addmm(work, left * values, right, alpha=-1.0)
        relaxed = torch.lerp(sparse, rest, relaxation)
        sparse = soft(relaxed + scaled, weight / mu)
        multiplier.add_(relaxed.sub_(sparse), alpha=mu)
        residual = float(rest.sub_(sparse).norm()) / norm
        mu = min(growth * mu, most)
        if residual <= tolerance:
            stop = "tolerance"
    if turned:
        left, right, sparse = right.T.contiguous(), left.T.contiguous(), sparse.T.contiguous()
    left, values, right, sparse = (part.to(matrix.dtype) for part in (left, values, right, sparse))
    return RobustPCA(left, values, right, sparse, iteration, residual, stop)


def penalty(matrix: Tensor) -> float:
    """``m n / (||W||_1 sqrt(max(m, n)))``, with the sum of the absolute values: at the default ``lambda`` the threshold of
    entries, ``lambda / mu``, is their mean. ``4 / sqrt(max(m, n))`` of what Candes et al. take.
    """
    return max(matrix.shape) ** -0.5 / float(matrix.abs().mean(dtype=torch.float64))


def candes_penalty(matrix: Tensor) -> float:
    """``m n / (4 ||W||_1)``, with the sum of the absolute values: what Candes et al. take (section 5), and keep."""
    return 0.25 / float(matrix.abs().mean(dtype=torch.float64))


def soft(values: Tensor, threshold: float) -> Tensor:
    """Every entry moved towards zero by `threshold`: what minimises ``threshold ||S||_1 + ||S - values||_F^2 / 2``."""
    return torch.nn.functional.softshrink(values, threshold)


def shrink_values(matrix: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets ``(m, r), (r,), (r, n)`` of what minimises ``threshold ||L||_* + ||L - matrix||_F^2 / 2``: those
    of the matrix, with the values lowered by `threshold`, where they are still above zero.

    From the eigenvectors of the smaller Gram. A singular value ``v`` comes out to about ``eps (v_max / v)^2`` of itself, and
    only vectors of those above `threshold` are divided by theirs. The Gram is float64 unless float32 leaves the values near the
    threshold their digits; then it takes half the time, for a weight (576, 1536) a third of that of an SVD in float32.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = shrink_values(matrix.T, threshold)
        return left.T, values, right.T
    gram = matrix @ matrix.T
    if float(gram.norm()) * torch.finfo(gram.dtype).eps > _ROUNDING * threshold**2:
        wide = matrix.to(torch.float64)
        gram = wide @ wide.T
    squares, vectors = torch.linalg.eigh(gram)
    lengths = squares.clamp_min(0.0).sqrt()
    above = int((lengths > threshold).sum())
    start = len(lengths) - above
    lengths, vectors = lengths[start:].flip(0), vectors[:, start:].flip(1).to(matrix.dtype)
    right = (vectors.T @ matrix) / lengths[:, None].to(matrix.dtype)
    return vectors, (lengths - threshold).to(matrix.dtype), right
