"""The exchangeable parts of dictionary learning: sparse coders, dictionary updates and starts.

They hold their settings and nothing else; `lexigram.linalg.dictionary_learning` runs them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lexigram.linalg.dictionary_update import POWER_ITERATIONS, ksvd, mod
from lexigram.linalg.htp import CG_STEPS, ROUNDS, htp
from lexigram.linalg.omp import BATCH, omp
from lexigram.linalg.svd import truncated_svd

Start = Literal["columns", "svd"]


class Coding(Protocol):
    """A sparse coder: new codes for atoms of unit norm, given the present codes and their residual."""

    def __call__(
        self, signals: Tensor, dictionary: Tensor, codes: Tensor, residual: Tensor, sparsity: int, step: float
    ) -> Tensor:
        """Codes ``(n, k)``; a row may come out worse than before, the caller then keeps the old one.

        ``step`` says how boldly to exchange supports, for coders that start from the present one.
        """
        ...


class Update(Protocol):
    """A dictionary update for fixed supports; must not raise the norm of the residual."""

    def __call__(self, codes: Tensor, dictionary: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, float]:
        """New codes (same supports), dictionary, and the ridge that a singular problem needed (0.0 where none)."""
        ...


@dataclass(frozen=True)
class OMP:
    """Orthogonal matching pursuit, from nothing every time."""

    batch: int = BATCH

    def __call__(
        self, signals: Tensor, dictionary: Tensor, codes: Tensor, residual: Tensor, sparsity: int, step: float
    ) -> Tensor:
        """See `Coding`."""
        return omp(dictionary @ dictionary.T, signals @ dictionary.T, sparsity, batch=self.batch)


@dataclass(frozen=True)
class HTP:
    """Hard thresholding pursuit from the present codes."""

    rounds: int = ROUNDS
    cg_steps: int = CG_STEPS

    def __call__(
        self, signals: Tensor, dictionary: Tensor, codes: Tensor, residual: Tensor, sparsity: int, step: float
    ) -> Tensor:
        """See `Coding`."""
        gram, gradient = dictionary @ dictionary.T, residual @ dictionary.T
        return htp(gram, gradient, codes, sparsity, rounds=self.rounds, cg_steps=self.cg_steps, step=step)


@dataclass(frozen=True)
class KSVD:
    """Atom after atom; ``power_iterations=None`` takes exact rank-1 fits."""

    power_iterations: int | None = POWER_ITERATIONS

    def __call__(self, codes: Tensor, dictionary: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, float]:
        """See `Update`."""
        codes, dictionary, _ = ksvd(codes, dictionary, residual, power_iterations=self.power_iterations)
        return codes, dictionary, 0.0


@dataclass(frozen=True)
class MOD:
    """All atoms by one least-squares solve."""

    def __call__(self, codes: Tensor, dictionary: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, float]:
        """See `Update`."""
        return codes, *mod(codes, dictionary, residual)


def start_columns(signals: Tensor, atoms: int, generator: torch.Generator | None) -> Tensor:
    """Random distinct signals as unit atoms, Gaussian ones where the non-zero signals do not suffice."""
    usable = signals[signals.norm(dim=1) > 0]
    order = _random(torch.randperm, usable.shape[0], generator, signals.device)[:atoms]
    return _filled(usable[order], atoms, generator)


def start_svd(signals: Tensor, atoms: int, generator: torch.Generator | None) -> Tensor:
    """Leading right singular vectors of the signals, random signals where their rank does not suffice."""
    left, leading = truncated_svd(signals, min(atoms, *signals.shape))
    energy = left.norm(dim=0)
    leading = leading[energy > 1e-6 * energy.max()]
    if leading.shape[0] == atoms:
        return leading
    return torch.cat([leading, start_columns(signals, atoms - leading.shape[0], generator)])


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
