"""A weight with few entries: least-squares values on a support that is given, and a search for both.

For a weight ``W (out, in)`` and the Gram ``G (in, in)`` of its inputs the error of values ``V`` is ``tr (W - V) G (W - V)^T``.
All of this works in coordinates that make the diagonal of ``G`` ones: columns of ``W`` times ``sqrt(G_jj)``. There an entry
counts as much as it is large, and conjugate gradients need a dozen steps, where on ``G`` itself a few strong inputs
would keep them busy.

`surgeon` prunes in one pass, ten times faster and not as well; values in few bits are the business of `integers`.
"""

import torch
from torch import Tensor

from lexigram.linalg.support import ANYWHERE, Pattern
from lexigram.linalg.surgeon import Pruned

STEPS = 16
"""Conjugate gradient steps of a refit; a Gram of real activations leaves some 1e-3 of the gain after them."""

ROUNDS = 40
"""Half as many lose some .3 % of the error, twice as many win .2 %."""
PENALTIES = 0.1, 1.0
"""The first and the last, as shares of the Gram's diagonal; those between grow geometrically."""


def refit(
    weight: Tensor,
    gram: Tensor,
    support: Tensor,
    start: Tensor | None = None,
    *,
    steps: int = STEPS,
    damping: float = 0.0,
) -> Tensor:
    """Values (out, in) on a support, nearest to the weight in the metric of the Gram; no row is worse than `start`.

    All rows take conjugate gradient steps together, each confined to its own support, however many entries it has.

    Args:
        weight: (out, in), any float dtype; computed with in float32, or in float64 if that is what it is.
        gram: (in, in), positive semi-definite, singular or not.
        support: bool (out, in).
        start: (out, in), of which what lies on the support is improved; by default the weight.
        steps: enough of them give the least-squares values up to rounding.
        damping: share of the mean diagonal of the Gram that is added to its diagonal.

    Raises:
        ValueError: where the shapes contradict each other, or the Gram is not finite.
    """
    for name, other in (("support", support), ("start", start)):
        if other is not None and other.shape != weight.shape:
            raise ValueError(f"a {name} {tuple(other.shape)} does not fit a weight {tuple(weight.shape)}")
    scaled, scale = _unit_diagonal(weight, gram, damping)
    values = (weight if start is None else start).to(scaled.dtype) * scale
    return _fitted(weight.to(scaled.dtype) * scale, scaled, support, values, steps).div_(scale).to(weight.dtype)


def prune(
    weight: Tensor,
    gram: Tensor,
    kept: int | None = None,
    *,
    pattern: Pattern = ANYWHERE,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    damping: float = 0.0,
) -> Pruned:
    """Keep exactly `kept` entries of a weight: supports and values together, from the whole Gram.

    Alternating directions (ADMM, as ALPS does, Meng et al., arXiv 2406.07831): values that fit the outputs and sparse values
    are pulled together by a penalty that grows from round to round; then the values are refitted. One eigendecomposition
    of the Gram serves all rounds, so a round is two products with a matrix (in, in).

    Args:
        weight: (out, in), any float dtype; computed with in float32, or in float64 if that is what it is.
        gram: (in, in), positive semi-definite, singular or not.
        kept: how many entries in all; `pattern` may tell.
        pattern: where they may be.
        rounds: of the penalty.
        steps: of the last refit.
        damping: share of the mean diagonal of the Gram that is added to its diagonal.

    Raises:
        ValueError: where the shapes contradict each other, so many entries cannot be kept, or the Gram is not finite.
    """
    kept = pattern.total((weight.shape[0], weight.shape[1]), kept)
    scaled, scale = _unit_diagonal(weight, gram, damping)
    wanted = weight.to(scaled.dtype) * scale
    roots, basis = torch.linalg.eigh(scaled.double())
    roots, basis = roots.clamp_min_(0.0).to(wanted), basis.to(wanted)
    spectral = (wanted @ basis).mul_(roots)
    support = pattern.choose(wanted.square(), kept)
    sparse, dual = wanted * support, torch.zeros_like(wanted)
    for penalty, shrink in _growing(*PENALTIES, rounds):
        # The dual variable is kept in units of the penalty.
        dual.mul_(shrink)
        fitted = torch.addmm(spectral, sparse.sub_(dual), basis, beta=1.0, alpha=penalty)
        fitted = fitted.div_(roots + penalty) @ basis.T
        dual.add_(fitted)
        support = pattern.choose(dual.square(), kept)
        sparse = dual * support
        dual.sub_(sparse)
    values = _fitted(wanted, scaled, support, sparse, steps).div_(scale).to(weight.dtype)
    return Pruned(values, support)


def _fitted(wanted: Tensor, gram: Tensor, support: Tensor, start: Tensor, steps: int) -> Tensor:
    """See `refit`; in coordinates in which the Gram has ones on its diagonal."""
    start = start.where(support, 0.0)
    lost = wanted - start
    gradient = lost @ gram
    before = torch.linalg.vecdot(lost, gradient)
    values = _conjugate(gradient, gram, support.to(start.dtype), start, steps)
    lost = wanted - values
    after = torch.linalg.vecdot(lost, lost @ gram)
    return values.where((after <= before)[:, None], start)


def _conjugate(gradient: Tensor, gram: Tensor, support: Tensor, start: Tensor, steps: int) -> Tensor:
    """Conjugate gradients from `start`, confined to a support of ones and zeros; rows stop where rounding is all there is.

    `htp.confine` takes the few first steps of this and need not ask where they end. A Gram that is singular on a row's
    support does end them: what is left of the gradient is rounding, and so is the curvature that it would be divided by.
    """
    null = len(gram) * torch.finfo(start.dtype).eps
    values, residual = start.clone(), gradient * support
    direction, image = residual.clone(), torch.empty_like(residual)
    power = torch.linalg.vecdot(residual, residual)
    alive = power > 0
    for _ in range(steps):
        torch.mm(direction, gram, out=image)
        curvature = torch.linalg.vecdot(direction, image)
        alive &= (curvature > null * torch.linalg.vecdot(direction, direction)) & (power > 0)
        length = torch.where(alive, power / curvature, 0.0)[:, None]
        values.addcmul_(direction, length)
        residual.addcmul_(image.mul_(support), length, value=-1.0)
        before, power = power, torch.linalg.vecdot(residual, residual)
        direction.mul_(torch.where(alive, power / before, 0.0)[:, None]).add_(residual)
    return values


def _unit_diagonal(weight: Tensor, gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped Gram with ones on its diagonal, and what columns of a weight are multiplied with for it to be theirs.

    An input that never occurs keeps its coordinate, in which nothing matters.
    """
    cols = weight.shape[1]
    if gram.shape != (cols, cols):
        raise ValueError(f"a Gram {tuple(gram.shape)} does not fit a weight {tuple(weight.shape)}")
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the Gram has entries that are not finite; the calibration activations overflowed")
    gram = gram.to(torch.float64).clone()
    gram.diagonal().add_(damping * gram.diagonal().mean())
    energy = gram.diagonal()
    scale = torch.where(energy > 0, energy, 1.0).sqrt()
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return (gram / scale / scale[:, None]).to(work), scale.to(work)


def _growing(first: float, last: float, rounds: int) -> list[tuple[float, float]]:
    """Every round's penalty, and the one before as a share of it."""
    growth = (last / first) ** (1 / max(1, rounds - 1))
    return [(first * growth**round_, 1 / growth if round_ else 1.0) for round_ in range(rounds)]
