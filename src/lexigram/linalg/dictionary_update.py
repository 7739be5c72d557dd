"""Dictionary updates for fixed supports: least squares for all atoms at once (MOD), or atom after atom (K-SVD).

Both work on the residual ``Y - C D`` and neither ever raises its norm.
"""

import torch
from torch import Tensor

POWER_ITERATIONS = 8


def mod(codes: Tensor, dictionary: Tensor, residual: Tensor) -> tuple[Tensor, float]:
    """Method of optimal directions (Engan, Aase, Husoy 1999): the dictionary ``(k, d)`` of least error for these codes.

    Solves ``C^T C E = C^T R`` for the change ``E`` by Cholesky, every atom scaled by the energy of its codes. Where the
    columns of ``C`` are dependent to working precision a ridge is added, the second result, as a share of the scaled
    diagonal, 0.0 if none was needed. It holds the change back and not the dictionary, so the error never rises. Atoms
    without a code stay what they are.
    """
    normal = codes.T @ codes
    lower, scale, ridge = factored(normal, resolution(normal))
    right = (codes.T @ residual) / scale[:, None]
    return dictionary + torch.cholesky_solve(right, lower) / scale[:, None], ridge


def factored(normal: Tensor, limit: float) -> tuple[Tensor, Tensor, float]:
    """Lower Cholesky factor of ``normal (k, k)`` scaled to a diagonal of ones, the scale ``(k,)``, and the ridge.

    The ridge, a share of the scaled diagonal, is the least of a few that keeps every pivot above ``limit``. An atom whose
    row and column are zero is given the scale 1 and a diagonal of its own.
    """
    scale = normal.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    normal = normal / scale[:, None] / scale
    for ridge in (0.0, 10 * limit, 1e-2, 1.0):
        normal.diagonal().fill_(1.0 + ridge)
        lower, failed = torch.linalg.cholesky_ex(normal)
        if not failed and lower.diagonal().square().min() > limit:
            break
    return lower, scale, ridge


def resolution(normal: Tensor) -> float:
    """A pivot below this, in a matrix with a diagonal of ones, is rounding even where Cholesky finds it positive."""
    return normal.shape[0] * torch.finfo(normal.dtype).eps


def ksvd(
    codes: Tensor, dictionary: Tensor, residual: Tensor, *, power_iterations: int | None = POWER_ITERATIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """K-SVD (Aharon, Elad, Bruckstein 2006): every atom and its codes by the best rank-1 fit of what the others leave.

    Atoms are taken one after another, each from the residual that the ones before it left, restricted to the signals
    that use it; an unused atom is skipped. ``power_iterations`` alternating steps from the present atom approximate
    the leading singular pair (8 in the CoSpaDi paper), ``None`` takes it from an eigendecomposition. Returns the new
    codes, dictionary (unit atoms where used) and residual; the arguments are left alone.
    """
    by_atom = codes.T.contiguous()
    dictionary, residual = dictionary.clone(), residual.clone()
    for weights, atom in zip(by_atom, dictionary, strict=True):
        users = weights.nonzero().squeeze(1)
        if users.numel() == 0:
            continue
        part = residual[users].addr_(weights[users], atom)
        direction = _leading(part) if power_iterations is None else _power(part, atom, power_iterations)
        if direction is None:
            continue
        atom.copy_(direction)
        fitted = part @ direction
        weights[users] = fitted
        residual[users] = part.addr_(fitted, direction, alpha=-1.0)
    return by_atom.T.contiguous(), dictionary, residual


def _power(part: Tensor, atom: Tensor, iterations: int) -> Tensor | None:
    """Unit direction after so many steps of ``v <- A^T A v`` from the present atom; None where ``A v`` vanishes."""
    direction = atom
    for _ in range(iterations):
        step = part.T @ (part @ direction)
        norm = step.norm()
        if not norm > torch.finfo(part.dtype).tiny:
            return None
        direction = step / norm
    return direction


def _leading(part: Tensor) -> Tensor | None:
    """Leading right singular vector through the smaller Gram; None where the part is zero."""
    if part.shape[0] >= part.shape[1]:
        direction = torch.linalg.eigh(part.T @ part).eigenvectors[:, -1]
    else:
        direction = part.T @ torch.linalg.eigh(part @ part.T).eigenvectors[:, -1]
    norm = direction.norm()
    return direction / norm if norm > torch.finfo(part.dtype).tiny else None
