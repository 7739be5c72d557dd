"""Which targets stand together: those that share a dictionary, being of one input, of neighbouring layers or alike, and those
on both sides of the same channels.

Every rule gives groups of target names in the model's order, with every target in exactly one of them; a group of one is a
target that shares with none. Nothing is fitted here.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import networkx as nx
import torch
from torch import Tensor

from lexigram.errors import LexigramError
from lexigram.targets import Target

_STEPS_PER_WINDOW = 8


def same_site(targets: Sequence[Target]) -> list[tuple[str, ...]]:
    """Targets with the same input: q, k and v of a layer, gate and up.

    They have one Gram, so that sharing loses nothing of the metric.
    """
    sites: dict[str, list[str]] = {}
    for target in targets:
        sites.setdefault(target.site, []).append(target.name)
    return [tuple(names) for names in sites.values()]


def consecutive(targets: Sequence[Target], size: int, sharing: Collection[str] | None = None) -> list[tuple[str, ...]]:
    """Targets of one kind and one shape in `size` consecutive decoder layers, from the first layer on.

    A run of layers that `size` does not divide ends in a smaller group. A run also ends where a layer has no such target or
    one of another shape.

    Args:
        targets: in the model's order.
        size: layers a group.
        sharing: names of the targets that share; the others stay alone. By default the `siblings` among the targets.

    Raises:
        LexigramError: for a size below 1.
    """
    if size < 1:
        raise LexigramError(f"a group of {size} layers is none; share over 2 layers or more, or over 1 for no sharing")
    shared = siblings(targets) if sharing is None else sharing
    groups: list[list[Target]] = []
    open_groups: dict[str, list[Target]] = {}
    for target in targets:
        place = _place(target)
        group = open_groups.get(place, []) if target.name in shared else []
        if 0 < len(group) < size and _follows(group[-1], target):
            group.append(target)
            continue
        groups.append([target])
        if target.name in shared:
            open_groups[place] = groups[-1]
    return [tuple(target.name for target in group) for group in groups]


def siblings(targets: Sequence[Target]) -> set[str]:
    """The targets that see the same input as another one.

    In the published experiments (Basis Sharing, CoSpaDi) q, k, v, gate and up share over layers and o and down do not, which
    is this rule. It finds none where these are fused into one matrix, as in GPT-2 or Phi-3.
    """
    return {name for names in same_site(targets) if len(names) > 1 for name in names}


def coupled(targets: Sequence[Target]) -> list[tuple[str, ...]]:
    """Of every module the targets on one input and, last, the one whose inputs they make.

    Such are gate, up and down, which have the same channels, and q, k, v and o, whose channels are those of heads. Some of them
    will do, such as q and o, if the last is there and one before it. Outputs may be fewer where several heads share them.

    Raises:
        LexigramError: for a target that stands with no others in this way: because they are not among the targets, are fused
            into one matrix, or the model cannot be traced, which leaves every target its own input.
    """
    modules: dict[str, list[Target]] = {}
    for target in targets:
        modules.setdefault(target.module, []).append(target)
    found = {name: _both_sides(members) for name, members in modules.items()}
    wrong = [name for name, group in found.items() if not group]
    if wrong:
        members = ", ".join(f"{target.kind} {target.shape}" for target in modules[wrong[0]])
        more = f" (and {len(wrong) - 1} more modules)" if wrong[1:] else ""
        raise LexigramError(
            f"{members} in {wrong[0]}{more} cannot lose channels together, which takes matrices with one input and the one "
            "whose inputs they make: not all of these are to be compressed, or they are fused into one; leave the rest of such "
            "a module out too, with --exclude, or take another method"
        )
    return [tuple(target.name for target in group) for group in found.values()]


def _both_sides(members: Sequence[Target]) -> list[Target]:
    """The members of a module with the one last whose inputs the others make; none where it is not so.

    Of two members the later one takes in what the earlier makes: shapes tell no direction, up and down fit both ways round.
    """
    sites: dict[str, list[Target]] = {}
    for member in members:
        sites.setdefault(member.site, []).append(member)
    if len(sites) != 2:
        return []
    producers, consumers = sorted(sites.values(), key=len, reverse=True)
    return [*producers, *consumers] if len(consumers) == 1 and _make(producers, consumers[0]) else []


def _make(producers: Sequence[Target], consumer: Target) -> bool:
    """Whether the outputs of all `producers` can be the channels, or heads, that `consumer` takes in."""
    inputs, width = consumer.shape[1], consumer.head_dim
    outputs = [producer.shape[0] for producer in producers]
    if width == 1:  # an attention that does not tell its heads is not taken for an MLP, which has a gate at the most
        return len(producers) <= 2 and all(rows == inputs for rows in outputs)
    return all(number % width == 0 for number in (inputs, *outputs)) and all(inputs % rows == 0 for rows in outputs)


def pairs(names: Sequence[str], distances: Mapping[tuple[str, str], float]) -> list[tuple[str, ...]]:
    """As many pairs as can be made, of all such pairings the one with the least total distance (GeoPair).

    Takes time cubic in the number of names: four seconds for 192.

    Args:
        names: in the model's order.
        distances: by two names in either order. Two names without one, or with an infinite one, are not paired.

    Raises:
        ValueError: for a distance between names that are not given, given twice, or NaN.
    """
    graph = nx.Graph()
    graph.add_nodes_from(range(len(names)))  # numbers, since the order of strings in a set changes from run to run
    position = {name: index for index, name in enumerate(names)}
    for (first, second), distance in distances.items():
        ends = position.get(first), position.get(second)
        if None in ends or first == second or graph.has_edge(*ends) or math.isnan(distance):
            raise ValueError(
                f"the distance {distance} of {first} and {second} is of no use; give one number for two of the names"
            )
        if math.isfinite(distance):
            graph.add_edge(*ends, weight=distance)
    matched = [sorted(pair) for pair in nx.min_weight_matching(graph)]
    alone = set(range(len(names))).difference(*matched)
    return [tuple(names[index] for index in group) for group in sorted([*matched, *([index] for index in alone)])]


def pair_distance(first: Tensor, second: Tensor, stride: int | None = None) -> float:
    """How far two weights are from each other: GeoPair's distance of their signals ``S = W L^T``, symmetric.

    With the one that has fewer outputs as ``S_i``, ``min ||S_j[window] - S_i|| / ||S_i||`` over windows of as many
    consecutive rows of ``S_j``. The source does not say which of two weights with equally many outputs is ``i``, and the
    pairs have no direction; there it is the mean of both ways. Nor does it say how the windows move: by `stride` rows, and
    one more window ends at the last row.

    The cross terms of all windows come from one product of blocks of rows, and only the best window is subtracted.

    Args:
        first: signals (out, in), float32 or float64.
        second: signals (out, in), of equally many inputs and on the same device.
        stride: rows from one window to the next; an eighth of the window by default.

    Returns:
        The distance; infinite where it would be relative to zero.

    Raises:
        ValueError: for signals of different input widths, or a stride below 1.
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"signals of {first.shape[1]} and {second.shape[1]} inputs cannot share a dictionary; compare equal widths"
        )
    small, large = (first, second) if first.shape[0] <= second.shape[0] else (second, first)
    rows = small.shape[0]
    stride = max(1, rows // _STEPS_PER_WINDOW) if stride is None else stride
    if stride < 1:
        raise ValueError(f"windows cannot move by {stride} rows; choose a stride of 1 or more")
    start = _best_window(small.contiguous(), large.contiguous(), stride)
    window = large[start : start + rows]
    apart = float((window - small).norm())
    scales = [small.norm(), window.norm()] if large.shape[0] == rows else [small.norm()]
    return sum(_relative(apart, float(scale)) for scale in scales) / len(scales)


def _best_window(small: Tensor, large: Tensor, stride: int) -> int:
    """The row of `large` where the window closest to `small` starts."""
    rows, width = small.shape
    last = large.shape[0] - rows
    energy = torch.linalg.vector_norm(large, dim=1).double().square().cumsum(0)
    energy = torch.cat([energy.new_zeros(1), energy])
    # Windows start and end at multiples of a block of rows, and a block, laid out as one vector, is a view.
    block = math.gcd(stride, rows)
    blocks, total = rows // block, large.shape[0] // block
    products = large[: total * block].view(total, block * width) @ small.view(blocks, block * width).T
    starts = torch.arange(0, last + 1, stride, device=large.device)
    # The window from block a on has the cross terms products[a + b, b], summed over the blocks b of the smaller one.
    cross = products.as_strided((len(starts), blocks), (stride // block * blocks, blocks + 1)).double().sum(1)
    if last % stride:
        starts = torch.cat([starts, starts.new_tensor([last])])
        cross = torch.cat([cross, torch.dot(large[last:].flatten(), small.flatten()).double()[None]])
    return int(starts[(energy[starts + rows] - energy[starts] - 2 * cross).argmin()])


def _relative(apart: float, scale: float) -> float:
    if scale > 0:
        return apart / scale
    return math.inf if apart > 0 else 0.0


def _place(target: Target) -> str:
    """The name with the decoder layer left out: equal for targets at the same place of different layers."""
    return target.name.replace(f".{target.layer}.", ".*.", 1)


def _follows(earlier: Target, later: Target) -> bool:
    if earlier.layer is None or later.layer is None:
        return False
    return later.layer == earlier.layer + 1 and later.shape == earlier.shape
