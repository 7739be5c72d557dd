"""The exchangeable parts of dictionary learning: sparse coders, dictionary updates and starts.

They hold their settings and nothing else; `lexigram.linalg.dictionary_learning` runs them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lexigram.linalg.dictionary_update import POWER_ITERATIONS, ksvd, mod
from lexigram.linalg.htp import CG_STEPS, ROUNDS, htp
from lexigram.linalg.omp import BATCH, omp
from lexigram.linalg.selection import largest_indicator
from lexigram.linalg.shared_metrics import SharedMetrics
from lexigram.linalg.shared_update import CG_STEPS as SHARED_CG_STEPS
from lexigram.linalg.shared_update import CG_TOLERANCE, shared_mod, shared_mod_exact
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


@runtime_checkable
class SharedUpdate(Protocol):
    """An update that several members with different metrics can share."""

    def shared(
        self, codes: Sequence[Tensor], dictionary: Tensor, residuals: Sequence[Tensor], metrics: SharedMetrics
    ) -> tuple[Tensor, float]:
        """The dictionary, in the coordinates of the metrics, and the ridge; must not raise the sum of the errors."""
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
class Threshold:
    """Hard thresholding of the plain coefficients ``Y D^T``: the one-shot coder of ROCKET (arXiv 2602.11008).

    Meant for one iteration from orthonormal atoms (``start="svd"``), whose least-squares codes these coefficients are. A
    row keeps its ``s`` largest by ``|c|^(1-l) (|c| ||L^-1 b||)^l``, with `balance` ``l`` between the size in the metric and
    the size in the space of the weights, where ``inverse`` ``L^-1 (in, d)`` takes an atom ``b``; without it both agree.
    """

    balance: float = 0.5
    inverse: Tensor | None = None

    def __call__(
        self, signals: Tensor, dictionary: Tensor, codes: Tensor, residual: Tensor, sparsity: int, step: float
    ) -> Tensor:
        """See `Coding`."""
        found = signals @ dictionary.T
        importance = found.abs()
        if self.inverse is not None:
            # In the inverse's own precision: it stretches the weakest directions most.
            sizes = (dictionary.to(self.inverse.dtype) @ self.inverse.T).norm(dim=1)
            importance *= (sizes / sizes.max()).pow(self.balance).to(importance.dtype)
        return found.mul_(largest_indicator(importance, sparsity))


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
    """All atoms by one least-squares solve.

    For several metrics by conjugate gradients, to `cg_tolerance` or in at most `cg_steps`, or for two metrics, where
    `exact`, by simultaneous diagonalisation.
    """

    cg_tolerance: float = CG_TOLERANCE
    cg_steps: int = SHARED_CG_STEPS
    exact: bool = False

    def __call__(self, codes: Tensor, dictionary: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, float]:
        """See `Update`."""
        return codes, *mod(codes, dictionary, residual)

    def shared(
        self, codes: Sequence[Tensor], dictionary: Tensor, residuals: Sequence[Tensor], metrics: SharedMetrics
    ) -> tuple[Tensor, float]:
        """See `SharedUpdate`."""
        if self.exact and len(metrics) == 2:
            return shared_mod_exact(codes, dictionary, residuals, metrics)
        found = shared_mod(codes, dictionary, residuals, metrics, tolerance=self.cg_tolerance, max_steps=self.cg_steps)
        return found, 0.0


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
