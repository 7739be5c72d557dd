"""Dictionary learning: sparse coding and dictionary update in turn, each part exchangeable.

The problem is ``min ||Y - C D||_F^2`` with at most ``s`` non-zeros in every row of ``C`` (CoSpaDi, arXiv 2509.22075,
with ``Y = W L^T``). The paper's parts are ``OMP()``, ``KSVD()`` and ``start="columns"``; ``HTP()``, ``MOD()``,
``start="svd"`` and ``accelerate=True`` are those chosen here by measurement.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lexigram.linalg.parts import HTP, KSVD, MOD, OMP, STARTS, Coding, Start, Update

__all__ = ["HTP", "KSVD", "MOD", "OMP", "Coding", "LearnedDictionary", "Start", "Update", "learn_dictionary"]

ITERATIONS = 10
TOLERANCE = 1e-2

# Measured on the layers of a small language model. Hard thresholding gains by gradient steps beyond 1 until too many rows
# fail, so the step follows the share of failures; the extrapolation likewise follows its own success.
_FIRST_STEP = 1.2
_FIRST_STRETCH = 0.5
# An extrapolation may give back this share of the iteration's gain: the next coding returns more than that.
_PATIENCE = 0.9


@dataclass(frozen=True)
class LearnedDictionary:
    """What `learn_dictionary` found: ``signals ~ codes @ dictionary``.

    ``objective`` is the squared error after every outer iteration; ``stop`` says why there was no further one. ``ridge`` is
    the largest that a dictionary update needed, as a share of the diagonal.
    """

    dictionary: Tensor
    codes: Tensor
    objective: tuple[float, ...]
    iterations: int
    replaced: int
    ridge: float
    stop: Literal["iterations", "tolerance", "exact"]
    seconds: float


def learn_dictionary(
    signals: Tensor,
    atoms: int,
    sparsity: int,
    *,
    coding: Coding | None = None,
    update: Update | None = None,
    start: Start = "svd",
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    accelerate: bool = False,
    generator: torch.Generator | None = None,
    callback: Callable[[int, float], None] | None = None,
) -> LearnedDictionary:
    """Dictionary ``(k, d)`` of unit atoms and codes ``(n, k)`` for signals ``(n, d)``, by alternating minimisation.

    An outer iteration codes the signals and then updates the dictionary. The objective never rises: where a coder does
    worse on a row than the codes at hand (orthogonal matching pursuit starts from nothing and can), that row keeps its
    old codes. Atoms without a code become the residuals of the worst represented signals and are counted. Stops after
    ``iterations``, or when the relative improvement of the squared error falls below ``tolerance``, or at an exact fit.
    ``accelerate`` moves both factors on along their last change after every iteration but the last, as long as a tenth
    of the iteration's gain remains (the paper has nothing of the kind; it halves the time to a given error and more).
    Random numbers come from ``generator`` only, which may be left out when the start needs none.
    """
    began = time.perf_counter()
    _check(signals, atoms, sparsity, iterations)
    coding, update = coding or HTP(), update or MOD()
    sparsity = min(sparsity, atoms)
    work = signals.detach().to(torch.float32)
    basis = None
    if work.shape[1] > work.shape[0]:
        # Optimal atoms lie in the span of the signals: an isometry to n coordinates, exact and cheaper everywhere.
        basis, triangle = torch.linalg.qr(work.T)
        work = triangle.T.contiguous()

    dictionary = STARTS[start](work, atoms, generator)
    codes = work.new_zeros(work.shape[0], atoms)
    residual = work.clone()
    objective = _squares(residual)
    exact = objective * 1e-12
    history: list[float] = []
    replaced, ridge, step, stretch = 0, 0.0, _FIRST_STEP, _FIRST_STRETCH
    plain: tuple[Tensor, Tensor] | None = None
    stop: Literal["iterations", "tolerance", "exact"] = "iterations"
    for iteration in range(iterations):
        before = objective
        found = coding(work, dictionary, codes, residual, sparsity, step)
        codes, residual, worse = _better_rows(work, dictionary, codes, residual, found)
        # As bold as leaves most rows improved: the codes of a row that did not are lost work.
        step = min(2.0, step * (0.6 if worse > 0.5 else 0.9 if worse > 0.1 else 1.1))
        objective = min(before, _squares(residual))
        *updated_parts, damped = update(codes, dictionary, residual)
        ridge = max(ridge, damped)
        updated = _normalised(*updated_parts)
        left, after = _left(work, *updated)
        if after <= objective:  # else rounding: no update raises the error in exact arithmetic
            (codes, dictionary), residual, objective = updated, left, after
        if objective <= exact:
            stop = "exact"
        elif before - objective < tolerance * before:
            stop = "tolerance"
        ending = stop != "iterations" or iteration + 1 == iterations
        if accelerate and not ending:
            bound = objective + _PATIENCE * (before - objective)
            here = codes, dictionary
            if plain is not None:
                beyond = _extrapolated(*here, *plain, stretch)
                left, after = _left(work, *beyond)
                accepted = after < bound
                stretch *= 1.2 if accepted else 0.6
                if accepted:
                    (codes, dictionary), residual, objective = beyond, left, after
            plain = here
        history.append(objective)
        if callback is not None:
            callback(iteration, objective)
        if ending:
            break
        dictionary, new = _unused_replaced(codes, dictionary, residual)
        replaced += new
    return LearnedDictionary(
        dictionary=(dictionary if basis is None else dictionary @ basis.T).to(signals.dtype),
        codes=codes.to(signals.dtype),
        objective=tuple(history),
        iterations=len(history),
        replaced=replaced,
        ridge=ridge,
        stop=stop,
        seconds=time.perf_counter() - began,
    )


def _better_rows(
    signals: Tensor, dictionary: Tensor, codes: Tensor, residual: Tensor, found: Tensor
) -> tuple[Tensor, Tensor, float]:
    """The better of found and old codes, row by row, their residual, and the share of rows that keep the old ones."""
    left = torch.addmm(signals, found, dictionary, alpha=-1.0)
    worse = (torch.linalg.vecdot(left, left) > torch.linalg.vecdot(residual, residual)).nonzero().squeeze(1)
    if worse.numel():
        found = found.index_copy(0, worse, codes[worse])
        left.index_copy_(0, worse, residual[worse])
    return found, left, worse.numel() / len(signals)


def _normalised(codes: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
    norms = dictionary.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    return codes * norms, dictionary / norms[:, None]


def _extrapolated(
    codes: Tensor, dictionary: Tensor, old_codes: Tensor, old_dictionary: Tensor, stretch: float
) -> tuple[Tensor, Tensor]:
    """A step further along the last change of both factors, on the present supports.

    With supports at rest the iteration is alternating least squares, slow along the valley that both factors share.
    """
    support = codes != 0
    return _normalised(
        torch.lerp(codes, old_codes, -stretch).mul_(support), torch.lerp(dictionary, old_dictionary, -stretch)
    )


def _unused_replaced(codes: Tensor, dictionary: Tensor, residual: Tensor) -> tuple[Tensor, int]:
    """Atoms without a code become the directions of the largest residuals; neither codes nor error change."""
    unused = (codes.abs().amax(0) == 0).nonzero().squeeze(1)
    if unused.numel() == 0:
        return dictionary, 0
    norms = residual.norm(dim=1)
    worst = norms.argsort(descending=True, stable=True)[: unused.numel()]
    worst = worst[norms[worst] > 0]
    unused = unused[: worst.numel()]
    return dictionary.index_copy(0, unused, residual[worst] / norms[worst, None]), unused.numel()


def _left(signals: Tensor, codes: Tensor, dictionary: Tensor) -> tuple[Tensor, float]:
    residual = torch.addmm(signals, codes, dictionary, alpha=-1.0)
    return residual, _squares(residual)


def _squares(residual: Tensor) -> float:
    # Rows in float32, their sum in float64: as exact as the residual and without a float64 copy of it.
    return float(torch.linalg.vecdot(residual, residual).sum(dtype=torch.float64))


def _check(signals: Tensor, atoms: int, sparsity: int, iterations: int) -> None:
    if signals.ndim != 2 or 0 in signals.shape:
        raise ValueError(f"signals are a matrix with one signal a row, got the shape {tuple(signals.shape)}")
    if not torch.isfinite(signals).all():
        raise ValueError("the signals have entries that are not finite; check the weight and the Gram they come from")
    for name, value in (("atoms", atoms), ("sparsity", sparsity), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; raise the budget that it was computed from")
