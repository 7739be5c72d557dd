"""The dictionary of least error for fixed codes of several members, each with its own metric.

With ``B_l = C_l^T C_l``, Grams ``G_l`` and ``K = sum_l C_l^T R_l M_l``, the change ``E`` of the dictionary solves
``sum_l B_l E G_l = K`` in the coordinates of `SharedMetrics`, where the Grams sum to a multiple of the identity. Both
solvers work on the change and start it at zero, so neither ever raises the error in exact arithmetic.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lexigram.linalg.dictionary_update import factored, resolution
from lexigram.linalg.shared_metrics import SharedMetrics

CG_TOLERANCE = 1e-2
CG_STEPS = 5


def shared_mod_exact(
    codes: Sequence[Tensor], dictionary: Tensor, residuals: Sequence[Tensor], metrics: SharedMetrics
) -> tuple[Tensor, float]:
    """The dictionary ``(k, in)`` of least error for two members' codes ``(n_l, k)``, by simultaneous diagonalisation.

    The Grams are diagonal already and sum to 2, ``G = 1 + mu`` and ``1 - mu``. With ``T^T (B_1 + B_2) T = 1`` and
    ``T^T (B_1 - B_2) T = diag(delta)`` the change is ``T [(T^T K) / (1 + delta mu^T)]`` (GeoPair's formula, taken about
    the mean of both members: denominators lie between 0 and 2, near 0 only for codes of one member in directions that
    it hardly sees).
    The ridge, the second result, is as in `mod`: it holds back the change and not the dictionary.
    """
    if len(metrics) != 2:
        raise ValueError(f"two metrics can be diagonalised at once, not {len(metrics)}; use shared_mod")
    first, second = (each.T @ each for each in codes)
    right = _correlation(codes, residuals, metrics)
    limit = resolution(first)
    lower, scale, ridge = factored((first + second).to(torch.float64), limit)
    difference = (first - second).to(torch.float64) / scale[:, None] / scale
    half = torch.linalg.solve_triangular(lower, difference, upper=False)
    delta, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(lower, half.T, upper=False))
    transform = torch.linalg.solve_triangular(lower.T, vectors, upper=True) / scale[:, None]
    transform, delta = transform.to(right.dtype), delta.clamp(-1, 1).to(right.dtype)
    denominator = 1 + delta[:, None] * (metrics.grams[0] - 1)
    if denominator.min() <= limit:
        ridge = max(ridge, 10 * limit)
        denominator += ridge
    return dictionary + transform @ ((transform.T @ right) / denominator), ridge


def shared_mod(
    codes: Sequence[Tensor],
    dictionary: Tensor,
    residuals: Sequence[Tensor],
    metrics: SharedMetrics,
    *,
    tolerance: float = CG_TOLERANCE,
    max_steps: int = CG_STEPS,
) -> Tensor:
    """The dictionary ``(k, in)`` of least error for any number of members, by preconditioned conjugate gradients.

    The preconditioner is ``sum_l B_l`` beside the mean Gram, which is the identity here: it is the solution itself where
    the members agree in their Grams or in the products of their codes. Stops when the norm of the gradient, in the metric
    of the preconditioner, has fallen to ``tolerance`` of its start. A singular system needs no ridge: what the codes do
    not determine stays what it is.
    """
    products = [each.T @ each for each in codes]
    gradient = _correlation(codes, residuals, metrics)
    lower, scale, _ = factored(torch.stack(products).sum(0), resolution(products[0]))
    change = torch.zeros_like(gradient)
    direction = torch.zeros_like(gradient)
    power, enough = 0.0, 0.0
    for step in range(max_steps):
        descent = torch.cholesky_solve(gradient / scale[:, None], lower) / scale[:, None]
        before, power = power, _inner(gradient, descent)
        if step == 0:
            enough = tolerance * tolerance * power
        if power <= enough:
            break
        direction = descent if step == 0 else direction.mul_(power / before).add_(descent)
        image = torch.zeros_like(gradient)
        for member, product in enumerate(products):
            image.addmm_(product, metrics.weighted(member, direction))
        curvature = _inner(direction, image)
        if not curvature > 0:
            break
        change.add_(direction, alpha=power / curvature)
        gradient.sub_(image, alpha=power / curvature)
    return dictionary + change


def _correlation(codes: Sequence[Tensor], residuals: Sequence[Tensor], metrics: SharedMetrics) -> Tensor:
    """``sum_l C_l^T R_l M_l (k, in)``."""
    parts = [
        metrics.correlated(member, each.T @ residual)
        for member, (each, residual) in enumerate(zip(codes, residuals, strict=True))
    ]
    return torch.stack(parts).sum(0)


def _inner(left: Tensor, right: Tensor) -> float:
    return float(torch.linalg.vecdot(left, right).sum(dtype=torch.float64))
