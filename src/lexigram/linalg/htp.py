"""Hard thresholding pursuit: all supports of a batch at once, by matrix products (Foucart 2011).

One round takes a gradient step, keeps the ``s`` largest codes of every row, and refits them by a few conjugate gradient
steps confined to that support (Blanchard, Tanner, Wei 2015). Orthogonal matching pursuit needs ``s`` sequential steps
where this needs a handful, and it can start from the codes that fitted the previous dictionary.
"""

import torch
from torch import Tensor

from lexigram.linalg.selection import largest_indicator

ROUNDS = 1
CG_STEPS = 2


def htp(
    gram: Tensor,
    gradient: Tensor,
    codes: Tensor,
    sparsity: int,
    *,
    rounds: int = ROUNDS,
    cg_steps: int = CG_STEPS,
    step: float = 1.0,
) -> Tensor:
    """Codes ``(n, k)`` with `sparsity` non-zeros a row for unit atoms, from ``D D^T (k, k)`` and a warm start.

    ``gradient`` is ``(Y - C D) D^T`` at the warm start ``codes``; for a start at zero it is ``Y D^T``. A row may come out
    worse than its warm start: whoever has the residual at hand keeps the better one.
    """
    for _ in range(rounds):
        codes, gradient = pursue(gram, gradient, codes, sparsity, cg_steps, step)
    return codes


def pursue(
    gram: Tensor, gradient: Tensor, codes: Tensor, sparsity: int, cg_steps: int, step: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One round of hard thresholding pursuit for unit atoms: the new codes and their gradient ``(Y - C D) D^T``.

    ``gradient`` is that of ``codes``. Working on the gradient instead of on ``Y D^T`` keeps float32 accurate when the
    error is a small part of the signal. ``step`` is the length of the gradient step: 1 is right for
    orthonormal atoms; among coherent ones a new atom helps more, and an old one is missed less, than their codes say,
    so more can be better.
    """
    stepped = torch.add(codes, gradient, alpha=step)
    support = largest_indicator(stepped.abs(), sparsity)
    codes_new = stepped.mul_(support)
    gradient = torch.addmm(gradient, codes_new - codes, gram, alpha=-1.0)
    confine(gram, gradient, codes_new, support, cg_steps)
    return codes_new, gradient


def confine(gram: Tensor, gradient: Tensor, codes: Tensor, support: Tensor, steps: int) -> None:
    """Refit ``codes`` on their ``support`` (0.0 or 1.0) by conjugate gradients, in place, with the gradient."""
    tiny = torch.finfo(codes.dtype).tiny
    descent = gradient * support
    power = torch.linalg.vecdot(descent, descent)
    direction = descent.clone()
    image = torch.empty_like(codes)
    for step in range(steps):
        torch.mm(direction, gram, out=image)
        length = (power / torch.linalg.vecdot(direction, image).clamp_min(tiny))[:, None]
        length.masked_fill_(power[:, None] <= tiny, 0.0)
        codes.addcmul_(direction, length)
        gradient.addcmul_(image, length, value=-1.0)
        if step + 1 < steps:
            torch.mul(gradient, support, out=descent)
            before, power = power, torch.linalg.vecdot(descent, descent)
            direction.mul_((power / before.clamp_min(tiny))[:, None]).add_(descent)
