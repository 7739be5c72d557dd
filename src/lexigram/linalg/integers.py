"""Integers times scales, in the metric of a Gram: values of few bits that are good together, and scales that suit them.

Rounding that carries its errors (`rounding`) goes over the values once and trusts that later ones make up for earlier ones.
Here what it gave is improved: a sweep takes value after value to the best that can be stored given all others
(coordinate descent, as QuantEase does, Behdin et al., arXiv 2309.01885); then the scales get their least-squares values for
the integers as they are. Neither raises the error, and they help each other: one sweep between two refits of the scales is
worth more than six sweeps in a row.

How values lie in a file is not known here; groups are runs of kept values in row-major order.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lexigram.linalg.rounding import DAMPING, activation_order, round_carrying

ROUNDS = 4
"""Of a sweep and a refit of the scales each; twice as many win another half a per cent at 3 bits, less at 4."""
SCALE_STEPS = 4
"""Conjugate gradient steps for the scales, whose groups hardly touch each other."""


class Steps(NamedTuple):
    """What a group can store: ``scale * q`` for the integers ``-zero <= q <= levels - zero``.

    `scale` and `zero` are (groups,), of any float or integer dtype; group i holds the kept values ``i * group`` to ``(i + 1) *
    group - 1`` in row-major order.
    """

    scale: Tensor
    zero: Tensor
    levels: int
    group: int


class Stepped(NamedTuple):
    """Values (out, in), zero outside of the support, and the scales (groups,) that they are integers times of."""

    values: Tensor
    scale: Tensor


def to_steps(
    weight: Tensor,
    gram: Tensor,
    support: Tensor,
    start: Tensor,
    steps: Steps,
    *,
    rounds: int = ROUNDS,
    stored: Callable[[Tensor], Tensor] = lambda scale: scale.bfloat16(),
    damping: float = DAMPING,
) -> Stepped:
    """Storable values on a support, near to the weight in the metric of the Gram.

    One pass of `round_carrying` in activation order, as if what is not on the support could make up for errors too; it
    cannot, but the sweeps mend that, and Grams for each row's own support would cost a hundred times as much.

    Args:
        weight: (out, in), any float dtype; computed with in float32, or in float64 if that is what it is.
        gram: (in, in), positive semi-definite.
        support: bool (out, in).
        start: (out, in), good values on the support before rounding, as from `pruning.refit`.
        steps: the grids, their scales as `stored` gives them.
        rounds: of a sweep and a refit of the scales each; 0 for the pass alone. A last sweep follows.
        stored: the nearest scales that can be stored, (groups,) to (groups,).
        damping: share of the mean diagonal of the Gram that is added to its diagonal.

    Raises:
        ValueError: where the shapes contradict each other, or the Gram is not positive semi-definite.
    """
    if weight.shape != start.shape or weight.shape != support.shape:
        raise ValueError(
            f"a weight {tuple(weight.shape)}, a start {tuple(start.shape)} and a support {tuple(support.shape)} do not fit"
        )
    count = int(support.sum())
    if len(steps.scale) != -(-count // steps.group) or len(steps.zero) != len(steps.scale):
        raise ValueError(f"{len(steps.scale)} scales do not fit {count} values in groups of {steps.group}")
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    weight, scale = weight.to(work), steps.scale.to(work)
    gram = gram.to(torch.float64).clone()
    order = activation_order(gram)
    values = round_carrying(
        start.to(work).where(support, 0.0), gram, _rounding(support, steps, scale), order=order, damping=damping
    )
    gram.diagonal().add_(damping * gram.diagonal().mean())
    for _ in range(rounds):
        values = sweep(weight, gram, values, _rounding(support, steps, scale), order=order)
        spread = _spread(scale, support, steps.group)
        integers = torch.where(spread != 0, values / spread, 0.0).round_()
        refitted = stored(refit_scales(weight, gram, integers, support, scale, steps.group)).to(work)
        candidate = integers * _spread(refitted, support, steps.group)
        # Rounded to what can be stored, scales may be worse than those before, which were chosen together with the integers.
        if _error(weight - candidate, gram) < _error(weight - values, gram):
            values, scale = candidate, refitted
    if rounds:
        values = sweep(weight, gram, values, _rounding(support, steps, scale), order=order)
    return Stepped(values, scale)


def sweep(
    weight: Tensor,
    gram: Tensor,
    values: Tensor,
    round_column: Callable[[Tensor, int], Tensor],
    *,
    order: Tensor | None = None,
    block: int = 128,
) -> Tensor:
    """Every value in its turn to the best that can be stored given all others; no row's error rises.

    Args:
        weight: (out, in), float32 or float64.
        gram: (in, in), positive semi-definite.
        values: (out, in), storable ones.
        round_column: ``(targets (out,), column) -> (out,)``: the nearest storable values of that column; 0 outside of a
            support.
        order: the columns (in,) in the order in which they come; by default from left to right.
        block: columns between two updates of the gradient of all.

    Returns:
        (out, in) in the dtype of the weight.
    """
    cols = weight.shape[1]
    order = torch.arange(cols, device=weight.device) if order is None else order.to(weight.device)
    metric = gram[order][:, order].to(weight.dtype)
    # The gradient is a small difference: float64 for it, once, and float32 for how it moves.
    gradient = ((weight - values).double() @ gram.double()).T[order].to(weight.dtype)
    values = values.T[order].to(weight.dtype)
    energies, columns = metric.diagonal().tolist(), order.tolist()
    for low in range(0, cols, block):
        high = min(cols, low + block)
        moved = torch.zeros_like(values[low:high])
        for row in range(low, high):
            if energies[row] <= 0:
                continue
            inside = row - low
            slope = gradient[row] - metric[row, low:row] @ moved[:inside]
            target = values[row] + slope / energies[row]
            found = round_column(target, columns[row])
            found = torch.where((found - target).abs() < (values[row] - target).abs(), found, values[row])
            moved[inside] = found - values[row]
            values[row] = found
        gradient.addmm_(metric[:, low:high], moved, alpha=-1.0)
    return values[order.argsort()].T.contiguous()


def refit_scales(
    weight: Tensor,
    gram: Tensor,
    integers: Tensor,
    support: Tensor,
    scale: Tensor,
    group: int,
    *,
    steps: int = SCALE_STEPS,
) -> Tensor:
    """Scales (groups,) nearer to the least squares of ``tr (W - s Q) G (W - s Q)^T``, for integers ``Q`` as they are.

    Conjugate gradients, each group's share of the curvature as preconditioner; a group may run on into the next row, and so
    no row is solved by itself.

    Args:
        weight: (out, in), float32 or float64.
        gram: (in, in), positive semi-definite.
        integers: (out, in), zero outside of the support.
        support: bool (out, in).
        scale: (groups,) to begin with.
        group: kept values of one scale, in row-major order.
        steps: enough of them give the least-squares scales up to rounding.
    """
    metric = gram.to(weight.dtype)
    null = len(scale) * torch.finfo(weight.dtype).eps
    lost = weight - integers * _spread(scale, support, group)
    residual = _summed((lost.double() @ gram.double()).to(weight.dtype) * integers, support, group)
    diagonal = _summed(integers.square() * metric.diagonal(), support, group)
    # A group of zeros has no curvature; its scale stays.
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    found, descent = scale.clone(), residual * inverse
    direction, power = descent.clone(), residual @ descent
    for _ in range(steps):
        image = _summed((integers * _spread(direction, support, group)) @ metric * integers, support, group)
        curvature = direction @ image
        going = curvature > null * (direction.square() @ diagonal)
        length = torch.where(going, power / curvature, 0.0)
        found.add_(direction * length)
        residual.sub_(image * length)
        descent = residual * inverse
        before, power = power, residual @ descent
        direction = torch.where(going, descent + power / before * direction, 0.0)
    return found


def _rounding(support: Tensor, steps: Steps, scale: Tensor) -> Callable[[Tensor, int], Tensor]:
    """The nearest values in the grids with these scales."""
    # Columns as rows, in one stretch of memory each.
    spread = _spread(scale, support, steps.group).T.contiguous()
    lowest = -_spread(steps.zero.to(scale.dtype), support, steps.group).T.contiguous()

    def round_column(targets: Tensor, column: int) -> Tensor:
        size, low = spread[column].to(targets.dtype), lowest[column].to(targets.dtype)
        integers = torch.where(size != 0, targets / size, 0.0).round_()
        return torch.minimum(torch.maximum(integers, low), low + steps.levels) * size

    return round_column


def _spread(of_groups: Tensor, support: Tensor, group: int) -> Tensor:
    """One number a group as one an entry (out, in), 0 outside of the support."""
    of_values = of_groups[:, None].expand(-1, group).reshape(-1)
    return torch.zeros(support.shape, dtype=of_groups.dtype, device=support.device).masked_scatter_(support, of_values)


def _summed(entries: Tensor, support: Tensor, group: int) -> Tensor:
    """The sums (groups,) of the entries on the support, the last group filled up with zeros."""
    kept = entries[support]
    return torch.nn.functional.pad(kept, (0, -len(kept) % group)).view(-1, group).sum(1)


def _error(lost: Tensor, gram: Tensor) -> Tensor:
    lost = lost.double()
    return torch.linalg.vecdot(lost, lost @ gram).sum()
