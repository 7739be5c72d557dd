"""Batched orthogonal matching pursuit on Gram matrices: the sparse coder of the CoSpaDi paper (arXiv 2509.22075).

Every signal grows its support by the atom that correlates best with its residual and refits all its codes after every
atom (Pati, Rezaiifar, Krishnaprasad 1993). The refit is incremental: with ``G_SS`` the Gram of the chosen atoms, a
triangular ``F`` with ``F^T F = G_SS^-1`` gets one row per chosen atom, and that row times one number is the change of
the codes (inverse Cholesky, after Rubinstein, Zibulevsky, Elad 2008, who keep the Cholesky factor itself).
"""

import torch
from torch import Tensor

BATCH = 8192
_DEPENDENT = 1e-6
# Bytes for the factors of one batch: what stays in a CPU's cache (four times faster than what does not), and what a GPU
# can be expected to have free.
_CPU_BYTES, _GPU_BYTES = 8 * 2**20, 4 * 2**30


def omp(gram: Tensor, correlation: Tensor, sparsity: int, *, batch: int = BATCH) -> Tensor:
    """Codes ``(n, k)`` with exactly ``sparsity`` non-zeros a row, from ``D D^T (k, k)`` and ``Y D^T (n, k)``.

    A row has fewer non-zeros only where its residual is numerically orthogonal to every atom that is left, so that
    another atom could not lower its error. Atoms need not have unit norm; a zero atom and a second copy of a chosen one
    are never chosen. ``batch`` bounds the signals coded at a time and is lowered where their factors, two times
    ``sparsity^2`` numbers a signal, would not fit; that changes the time and not the codes.
    """
    k = gram.shape[0]
    sparsity = min(sparsity, k)
    room = _CPU_BYTES if gram.device.type == "cpu" else _GPU_BYTES
    batch = max(1, min(batch, room // (2 * sparsity * sparsity * gram.element_size())))
    scale = gram.diagonal().clamp_min(0).sqrt()
    alive = scale > 0
    scale = torch.where(alive, scale, 1.0)
    unit = gram / (scale[:, None] * scale)
    parts = [_omp_unit(unit, part / scale * alive, sparsity) for part in correlation.split(batch)]
    return torch.cat(parts) / scale if parts else torch.zeros_like(correlation)


def _omp_unit(gram: Tensor, correlation: Tensor, sparsity: int) -> Tensor:
    """`omp` for atoms of unit norm and one batch."""
    n = correlation.shape[0]
    rows = torch.arange(n, device=gram.device)
    codes = torch.zeros_like(correlation)
    residual = correlation.clone()
    free = torch.ones_like(correlation)
    chosen = torch.zeros(n, sparsity, dtype=torch.long, device=gram.device)
    # Both orientations of F: a row vector times a row-major block is several times faster than any other product here.
    factor = correlation.new_zeros(n, sparsity, sparsity)
    transposed = torch.zeros_like(factor)
    norms = correlation.norm(dim=1)
    magnitude = torch.empty_like(residual)
    for step in range(sparsity):
        torch.mul(residual, free, out=magnitude)
        largest, atom = magnitude.abs_().max(dim=1)
        if step:
            inner = gram[chosen[:, :step], atom[:, None]].unsqueeze(1)
            projected = torch.bmm(inner, transposed[:, :step, :step])
            row = torch.bmm(projected, factor[:, :step, :step]).squeeze(1)
            remaining = 1.0 - projected.square().sum(dim=(1, 2))
        else:
            row = correlation.new_zeros(n, 0)
            remaining = torch.ones_like(largest)
        # A dependent atom can only come first when nothing correlates any more: the row is finished, its step is void.
        useful = (remaining > _DEPENDENT) & (largest > 1e-6 * norms)
        length = remaining.clamp_min(_DEPENDENT).sqrt()
        gain = residual[rows, atom] / length * useful
        inverse = (useful / length)[:, None]
        row = torch.cat([row.mul_(-inverse), inverse], dim=1)
        factor[:, step, : step + 1] = row
        transposed[:, : step + 1, step] = row
        chosen[:, step] = atom
        free[rows, atom] = 0.0
        codes.scatter_add_(1, chosen[:, : step + 1], row * gain[:, None])
        torch.addmm(correlation, codes, gram, alpha=-1.0, out=residual)
    return codes
