"""How long a run will take, from a short measurement: one batch through one decoder layer, and fits of some of its matrices.

Rough by nature: how long a fit takes depends on more than the number of weights, and other programs share the machine.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from lexigram.allocation.offers import form_at
from lexigram.allocation.units import Unit
from lexigram.calibration.gram import collecting
from lexigram.calibration.layerwise import LayerRunner
from lexigram.choice import SplitTask, split
from lexigram.curves import measure_task, measured_unit
from lexigram.fitting import LESS_MEMORY, FitTask, fitted
from lexigram.gram import Gram
from lexigram.memory import BATCH_TOKENS, memory_told
from lexigram.methods.base import chooses, trials
from lexigram.planning import SENSITIVITY_SEQUENCES, Plan
from lexigram.targets import Target, decoder_layers
from lexigram.weights import Weights
from lexigram.workers import Workers

_GROWTH = 1.1
"""Seconds of a fit grow with the number of its weights to this power, a little more than in proportion. Of shapes that are
measured this is not needed: a query projection (576, 576) takes cospadi three times as long a weight as a key projection (192,
576), and twice as long as a down projection (576, 1536).
"""

_SECONDS = 3.0
"""How long fits are measured, from the smallest shape to the largest; where the time is up, the last tells of the others."""

T = TypeVar("T")


@memory_told(LESS_MEMORY)
def estimated_seconds(prepared: Plan) -> dict[str, float]:
    """Of every stage that takes long; none where nothing inside of the decoder layers is compressed.

    Raises:
        LexigramError: for weights that cannot be read, memory that does not suffice, and matrices that cannot be fitted.
    """
    frame, weights = prepared.source.opened(prepared.device)
    alike = _alike(prepared)
    if not alike or not _inside(alike[0][0]):
        return {}
    layers = list(decoder_layers(frame))
    ids = _some_tokens(prepared, frame.config.get_text_config().vocab_size)
    runner = LayerRunner(
        frame,
        layers,
        ids,
        compute_dtype=prepared.compute_dtype,
        weights=weights,
        device=prepared.device,
    )
    grams: dict[str, Gram] = {}
    a_layer = 0.0
    for index in range(1 + int(max(_last_layer(first) for first, *_ in alike if _inside(first)))):
        sites = dict.fromkeys(target.site for target in prepared.targets if target.layer == index)
        with collecting({site: frame.get_submodule(site) for site in sites}) as sums:
            a_layer, _ = _timed(lambda index=index: runner.run(index))  # type: ignore[misc]
        grams |= {site: total.result(site) for site, total in sums.items()}
    sequences = prepared.recipe.calibration.sequences
    forward = a_layer * len(layers) / len(ids)  # a sequence
    found = {"calibrate": forward * sequences}
    sequential = prepared.recipe.sequential
    found["calibrate"] *= 2 if sequential else 1
    fit, allocate = _all_fits(prepared, alike, weights, grams)
    if prepared.recipe.by_curves:
        found["allocate"] = allocate / prepared.way.workers + 3 * forward * min(SENSITIVITY_SEQUENCES, sequences)
    elif chooses(prepared.recipe.method):
        runs = trials(prepared.recipe.method).runs
        found["allocate"] = allocate / prepared.way.workers + forward * sequences * runs
    found["fit"] = fit / prepared.way.workers
    return found


def _all_fits(
    prepared: Plan, alike: Sequence[Sequence[list[Target]]], weights: Weights, grams: Mapping[str, Gram]
) -> tuple[float, float]:
    """Seconds of all fits one after the other, and of what is measured before an allocation is decided."""
    fit = allocate = spent = 0.0
    a_fit = an_offer = size = 0.0
    for members, *others in alike:
        count, own = 1 + len(others), sum(target.weight_count for target in members)
        if spent < _SECONDS and _inside(members):
            sites = [grams[target.site] for target in members]
            if not spent:  # whatever is done for the first time only, in this process
                _fits(prepared, members, weights, sites)
            a_fit, an_offer = _fits(prepared, members, weights, sites)
            spent, size = spent + a_fit + an_offer, own
        growth = (own / size) ** _GROWTH
        fit += count * growth * a_fit
        allocate += count * growth * an_offer
    return fit, allocate


def _fits(prepared: Plan, members: list[Target], weights: Weights, grams: list[Gram]) -> tuple[float, float]:
    """Seconds of one fit, and of what is measured of the same matrices before an allocation is decided."""
    recipe = prepared.recipe
    own = [weights.weight(target).detach().to(prepared.device) for target in members]
    with Workers() as here:
        if chooses(recipe.method):
            weight = SplitTask(members[0].name, recipe.method, own[0], grams[0])
            return 0.0, _timed(lambda: list(here.run(split, [weight])))[0]
        spec = form_at(recipe.method, members, prepared.ratio)
        a_fit = 0.0
        if spec is not None:
            unit = Unit(members=tuple(target.name for target in members), method=recipe.method, spec=spec)
            task = FitTask(unit, own, grams, recipe.correction, recipe.seed)
            a_fit, _ = _timed(lambda: list(here.run(fitted, [task])))
        if not recipe.by_curves:
            return a_fit, 0.0
        measured = measure_task(prepared, members, own, grams)
        return a_fit, _timed(lambda: list(here.run(measured_unit, [measured])))[0]


def _alike(prepared: Plan) -> list[list[list[Target]]]:
    """The groups of matrices that are fitted together, those of the same shapes together and the lowest of them first.

    The smallest shapes come first, and last those that are only outside of the decoder layers, where nothing is measured.
    """
    targets = {target.name: target for target in prepared.targets}
    names: Sequence[tuple[str, ...]] = prepared.groups or [(name,) for name in targets]
    found: dict[tuple[tuple[int, int], ...], list[list[Target]]] = {}
    for group in sorted(([targets[name] for name in group] for group in names), key=_last_layer):
        found.setdefault(tuple(target.shape for target in group), []).append(group)
    return sorted(
        found.values(),
        key=lambda groups: (not _inside(groups[0]), sum(target.weight_count for target in groups[0])),
    )


def _inside(group: Sequence[Target]) -> bool:
    """Whether all of a group lies in decoder layers."""
    return all(target.layer is not None for target in group)


def _last_layer(group: Sequence[Target]) -> float:
    return max(math.inf if target.layer is None else target.layer for target in group)


def _some_tokens(prepared: Plan, vocabulary: int) -> torch.Tensor:
    """One batch of the calibration, or of any tokens where it is yet to be sampled."""
    count = max(1, BATCH_TOKENS // prepared.length)
    if prepared.tokens is not None:
        return prepared.tokens.ids[:count]
    return torch.randint(0, vocabulary, (count, prepared.length), generator=torch.Generator().manual_seed(0))


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result
