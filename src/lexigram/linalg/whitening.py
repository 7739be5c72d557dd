"""Whitening by the Gram of the inputs: the factor ``L`` with ``L^T L = G`` that turns output error into plain error.

For a torch weight ``W (out, in)`` and inputs ``X (tokens, in)`` with ``G = X^T X``, the output error of a replacement
``V`` is ``||X (W - V)^T||_F = ||(W - V) L^T||_F``; so the rows of ``W L^T`` are the signals of an ordinary dictionary
learning problem, and a dictionary found there goes back by ``D L^-T`` (CoSpaDi, arXiv 2509.22075, "Gram
orthonormalisation"; ``eps`` of its diagonal shift is open there and stated here).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-10
"""An eigenvalue counts towards the rank when it exceeds this share of the trace."""

DAMPING = 1e-9
"""Share of the trace added to the diagonal of a rank-deficient Gram.

The square root of it, about 3e-5, bounds how much smaller than the whole a whitened direction can be, which leaves
float32 (2^-24 = 6e-8) more than two decimal digits in the weakest direction on the way back through ``L^-1``.
"""

_ASYMMETRY = 1e-4


@dataclass(frozen=True)
class Whitening:
    """A factor of a Gram matrix, its inverse, and what had to be added to the Gram to have both.

    ``factor^T factor = gram + damping I``; ``rank`` is the numerical rank of the Gram as it was given.
    """

    factor: Tensor
    inverse: Tensor
    rank: int
    damping: float

    def whiten(self, rows: Tensor) -> Tensor:
        """Rows ``(n, d)`` as signals: ``rows L^T``, multiplied in float64, in the dtype of the rows."""
        return (rows.to(self.factor.dtype) @ self.factor.T).to(rows.dtype)

    def unwhiten(self, rows: Tensor) -> Tensor:
        """The inverse of `whiten`: ``rows L^-T``, multiplied in float64, in the dtype of the rows."""
        return (rows.to(self.inverse.dtype) @ self.inverse.T).to(rows.dtype)


def whiten(gram: Tensor) -> Whitening:
    """Factor a symmetric positive semi-definite Gram ``(d, d)``; works in float64 whatever comes in.

    A Gram of certified full rank gets its Cholesky factor and no damping. Any other (fewer tokens than inputs, dead,
    constant or duplicate channels, all zeros, tiny negative eigenvalues) gets ``DAMPING * trace`` added to its diagonal
    and a factor from its eigendecomposition; the all-zero Gram, which prefers no direction, counts as ``damping = 1``.
    """
    gram = _checked(gram)
    size = gram.shape[0]
    trace = gram.trace()
    if not trace > 0:
        identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
        return Whitening(identity, identity.clone(), rank=0, damping=1.0)
    return _of_full_rank(gram, trace) or _damped(gram, trace)


def _of_full_rank(gram: Tensor, trace: Tensor) -> Whitening | None:
    """By Cholesky's factor; None where that does not certify full rank."""
    lower, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return None
    inverse = torch.linalg.solve_triangular(
        lower, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), upper=False
    )
    # trace(G^-1) = ||L^-1||_F^2 >= 1 / lambda_min: a lower bound on the smallest eigenvalue, not an estimate.
    if not 1 / torch.linalg.vector_norm(inverse).square() > RANK_TOLERANCE * trace:
        return None
    return Whitening(lower.T.contiguous(), inverse.T.contiguous(), rank=len(gram), damping=0.0)


def _damped(gram: Tensor, trace: Tensor) -> Whitening:
    """By eigendecomposition."""
    values, vectors = torch.linalg.eigh(gram)
    rank = int((values > RANK_TOLERANCE * trace).sum())
    # Cholesky's certificate is a bound, so eigh may still find full rank; then nothing needs to be added.
    added = 0.0 if rank == len(gram) else float(DAMPING * trace)
    roots = (values.clamp_min(0.0) + added).sqrt()
    return Whitening(roots[:, None] * vectors.T, vectors / roots, rank=rank, damping=added)


def _checked(gram: Tensor) -> Tensor:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(
            f"a Gram is a square matrix, got the shape {tuple(gram.shape)}; pass X^T X of the layer's inputs"
        )
    gram = gram.detach().to(torch.float64)
    if not torch.isfinite(gram).all():
        bad = int((~torch.isfinite(gram)).sum())
        raise ValueError(
            f"the Gram has {bad} entries that are not finite; the calibration activations overflowed: "
            "run the model in bfloat16 or float32 and accumulate the Gram in float64"
        )
    asymmetry = float((gram - gram.T).abs().max())
    if asymmetry > _ASYMMETRY * float(gram.abs().max()):
        raise ValueError(f"the Gram is not symmetric (largest difference {asymmetry:.3g}); pass X^T X, not X^T Y")
    if float(gram.diagonal().min()) < -_ASYMMETRY * float(gram.abs().max()):
        raise ValueError("the Gram has a negative diagonal entry, so it is no X^T X; pass the sum of x x^T over tokens")
    return (gram + gram.T) / 2
