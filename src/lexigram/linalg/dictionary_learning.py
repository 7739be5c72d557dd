"""Dictionary learning: sparse coding and dictionary update in turn, each part exchangeable.

The problem is ``min ||Y - C D||_F^2`` with at most ``s`` non-zeros in every row of ``C`` (CoSpaDi, arXiv 2509.22075,
with ``Y = W L^T``). `PUBLISHED` are the parts of the paper, `FAST` those chosen here by measurement.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lexigram.linalg.dictionary_update import POWER_ITERATIONS, ksvd, mod
from lexigram.linalg.htp import CG_STEPS, ROUNDS, pursue
from lexigram.linalg.omp import BATCH, omp
from lexigram.linalg.svd import truncated_svd

Start = Literal["columns", "svd"]


class Coding(Protocol):
    """A sparse coder: new codes for atoms of unit norm, given the present codes and their residual."""

    def __call__(self, signals: Tensor, dictionary: Tensor, codes: Tensor, residual: Tensor, sparsity: int) -> Tensor:
        """Codes ``(n, k)``; a row may come out worse than before, the caller then keeps the old one."""
        ...


class Update(Protocol):
    """A dictionary update for fixed supports; must not raise the norm of the residual."""

    def __call__(self, codes: Tensor, dictionary: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """New codes (same supports) and dictionary."""
        ...


@dataclass(frozen=True)
class OMP:
    """Orthogonal matching pursuit, from nothing every time."""

    batch: int = BATCH

    def __call__(self, signals: Tensor, dictionary: Tensor, codes: Tensor, residual: Tensor, sparsity: int) -> Tensor:
        """See `Coding`."""
        return omp(dictionary @ dictionary.T, signals @ dictionary.T, sparsity, batch=self.batch)


@dataclass(frozen=True)
class HTP:
    """Hard thresholding pursuit from the present codes."""

    rounds: int = ROUNDS
    cg_steps: int = CG_STEPS

    def __call__(self, signals: Tensor, dictionary: Tensor, codes: Tensor, residual: Tensor, sparsity: int) -> Tensor:
        """See `Coding`."""
        gram, gradient = dictionary @ dictionary.T, residual @ dictionary.T
        for _ in range(self.rounds):
            codes, gradient = pursue(gram, gradient, codes, sparsity, self.cg_steps)
        return codes


@dataclass(frozen=True)
class KSVD:
    """Atom after atom; ``power_iterations=None`` takes exact rank-1 fits."""

    power_iterations: int | None = POWER_ITERATIONS

    def __call__(self, codes: Tensor, dictionary: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `Update`."""
        codes, dictionary, _ = ksvd(codes, dictionary, residual, power_iterations=self.power_iterations)
        return codes, dictionary


@dataclass(frozen=True)
class MOD:
    """All atoms by one least-squares solve."""

    def __call__(self, codes: Tensor, dictionary: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `Update`."""
        return codes, mod(codes, dictionary, residual)[0]


@dataclass(frozen=True)
class LearnedDictionary:
    """What `learn_dictionary` found: ``signals ~ codes @ dictionary``.

    ``objective`` is the squared error after every outer iteration; ``stop`` says why there was no further one.
    """

    dictionary: Tensor
    codes: Tensor
    objective: tuple[float, ...]
    iterations: int
    replaced: int
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
    iterations: int = 10,
    tolerance: float = 0.0,
    generator: torch.Generator | None = None,
    callback: Callable[[int, float], None] | None = None,
) -> LearnedDictionary:
    """Dictionary ``(k, d)`` of unit atoms and codes ``(n, k)`` for signals ``(n, d)``, by alternating minimisation.

    An outer iteration codes the signals and then updates the dictionary. The objective never rises: where a coder does
    worse on a row than the codes at hand (orthogonal matching pursuit starts from nothing and can), that row keeps its
    old codes. Atoms without a code become the residuals of the worst represented signals and are counted. Stops after
    ``iterations``, or when the relative improvement of the squared error falls below ``tolerance``, or at an exact fit.
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
    replaced = 0
    stop: Literal["iterations", "tolerance", "exact"] = "iterations"
    for iteration in range(iterations):
        found = coding(work, dictionary, codes, residual, sparsity)
        codes, residual = _better_rows(work, dictionary, codes, residual, found)
        updated = _normalised(*update(codes, dictionary, residual))
        left = torch.addmm(work, *updated, alpha=-1.0)
        after = _squares(left)
        before = history[-1] if history else objective
        if after <= before or not history:
            (codes, dictionary), residual = updated, left
        else:  # rounding only: the updates never raise the error in exact arithmetic
            after = min(before, _squares(residual))
        history.append(after)
        if callback is not None:
            callback(iteration, after)
        if after <= exact:
            stop = "exact"
            break
        if before - after < tolerance * before:
            stop = "tolerance"
            break
        if iteration + 1 < iterations:
            replaced += _replace_unused(codes, dictionary, residual)
    return LearnedDictionary(
        dictionary=(dictionary if basis is None else dictionary @ basis.T).to(signals.dtype),
        codes=codes.to(signals.dtype),
        objective=tuple(history),
        iterations=len(history),
        replaced=replaced,
        stop=stop,
        seconds=time.perf_counter() - began,
    )


def start_columns(signals: Tensor, atoms: int, generator: torch.Generator | None) -> Tensor:
    """Random distinct signals as unit atoms, Gaussian ones where the non-zero signals do not suffice."""
    usable = signals[signals.norm(dim=1) > 0]
    order = _random(torch.randperm, usable.shape[0], generator, signals.device)[:atoms]
    return _filled(usable[order], atoms, generator)


def start_svd(signals: Tensor, atoms: int, generator: torch.Generator | None) -> Tensor:
    """Leading right singular vectors of the signals, random signals where their rank does not suffice."""
    leading = truncated_svd(signals, min(atoms, *signals.shape))[1]
    norms = leading.norm(dim=1)
    leading = leading[norms > 1e-6 * norms.max()]
    if leading.shape[0] == atoms:
        return leading / leading.norm(dim=1, keepdim=True)
    others = start_columns(signals, atoms - leading.shape[0], generator)
    return torch.cat([leading / leading.norm(dim=1, keepdim=True), others])


STARTS: dict[Start, Callable[[Tensor, int, torch.Generator | None], Tensor]] = {
    "columns": start_columns,
    "svd": start_svd,
}


def _random(
    draw: Callable[..., Tensor], size: int | tuple[int, int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """A draw on the generator's own device, then moved: the same seed gives the same start on every device."""
    if generator is None:
        raise ValueError("this start draws random numbers; pass generator=torch.Generator().manual_seed(seed)")
    return draw(size, generator=generator, device=generator.device).to(device)


def _filled(chosen: Tensor, atoms: int, generator: torch.Generator | None) -> Tensor:
    missing = atoms - chosen.shape[0]
    if missing > 0:
        chosen = torch.cat([chosen, _random(torch.randn, (missing, chosen.shape[1]), generator, chosen.device)])
    return chosen / chosen.norm(dim=1, keepdim=True)


def _better_rows(
    signals: Tensor, dictionary: Tensor, codes: Tensor, residual: Tensor, found: Tensor
) -> tuple[Tensor, Tensor]:
    """The found codes and their residual, with the old ones in the rows where these were better."""
    left = torch.addmm(signals, found, dictionary, alpha=-1.0)
    worse = (torch.linalg.vecdot(left, left) > torch.linalg.vecdot(residual, residual)).nonzero().squeeze(1)
    if worse.numel():
        found = found.index_copy(0, worse, codes[worse])
        left.index_copy_(0, worse, residual[worse])
    return found, left


def _normalised(codes: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
    norms = dictionary.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    return codes * norms, dictionary / norms[:, None]


def _replace_unused(codes: Tensor, dictionary: Tensor, residual: Tensor) -> int:
    """Turn atoms without a code into the directions of the largest residuals, in place; codes and error do not change."""
    unused = (codes.abs().amax(0) == 0).nonzero().squeeze(1)
    if unused.numel() == 0:
        return 0
    norms = residual.norm(dim=1)
    worst = norms.argsort(descending=True, stable=True)[: unused.numel()]
    worst = worst[norms[worst] > 0]
    unused = unused[: worst.numel()]
    dictionary[unused] = residual[worst] / norms[worst, None]
    return unused.numel()


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


