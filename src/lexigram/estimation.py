"""How long a run will take, from a short measurement: one batch through one decoder layer, and a fit of its smallest matrices.

Rough by nature: how long a fit takes depends on more than the number of weights, and other programs share the machine.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lexigram.allocation.offers import form_at
from lexigram.allocation.units import Unit
from lexigram.calibration.gram import collecting
from lexigram.calibration.layerwise import LayerRunner
from lexigram.curves import measure_task, measured_unit
from lexigram.fitting import FitTask, fitted
from lexigram.gram import Gram
from lexigram.memory import BATCH_TOKENS
from lexigram.methods.base import chooses, decompose, trials
from lexigram.planning import SENSITIVITY_SEQUENCES, Plan
from lexigram.recipe import KNAPSACK
from lexigram.targets import Target, decoder_layers
from lexigram.weights import Weights
from lexigram.workers import Workers

_GROWTH = 1.1
"""Seconds of a fit grow with the number of its weights to this power, a little more than in proportion."""

T = TypeVar("T")


def estimated_seconds(prepared: Plan) -> dict[str, float]:
    """Of every stage that takes long; none where nothing inside of the decoder layers is compressed.

    Raises:
        LexigramError: for weights that cannot be read.
    """
    frame, weights = prepared.source.opened(prepared.device)
    members = _smallest(prepared)
    if not members:
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
    for index in range(max(target.layer or 0 for target in members) + 1):
        sites = dict.fromkeys(target.site for target in prepared.targets if target.layer == index)
        with collecting({site: frame.get_submodule(site) for site in sites}) as sums:
            a_layer, _ = _timed(lambda index=index: runner.run(index))  # type: ignore[misc]
        grams |= {site: total.result(site) for site, total in sums.items()}
    sequences = prepared.recipe.calibration.sequences
    forward = a_layer * len(layers) / len(ids)  # a sequence
    found = {"calibrate": forward * sequences}
    sequential = prepared.recipe.sequential
    found["calibrate"] *= 2 if sequential else 1
    share = sum(target.weight_count for target in members)
    scale = sum(target.weight_count for target in prepared.targets) / share / prepared.way.workers
    scale *= (max(target.weight_count for target in prepared.targets) / max(t.weight_count for t in members)) ** (
        _GROWTH - 1
    )
    a_fit, allocate = _fits(prepared, members, weights, [grams[target.site] for target in members])
    if prepared.recipe.allocation == KNAPSACK:
        found["allocate"] = allocate * scale + 3 * forward * min(SENSITIVITY_SEQUENCES, sequences)
    elif chooses(prepared.recipe.method):
        found["allocate"] = allocate * scale * prepared.way.workers
        found["allocate"] += forward * sequences * trials(prepared.recipe.method).models
    found["fit"] = a_fit * scale
    return found


def _fits(prepared: Plan, members: list[Target], weights: Weights, grams: list[Gram]) -> tuple[float, float]:
    """Seconds of one fit, and of what is measured of the same matrices before an allocation is decided."""
    recipe = prepared.recipe
    own = [weights.weight(target).detach().to(prepared.device) for target in members]
    with Workers() as here:
        if chooses(recipe.method):
            split = [lambda: decompose(recipe.method, own[0], grams[0])]
            return 0.0, _timed(lambda: list(here.run(_call, split)))[0]
        spec = form_at(recipe.method, members, recipe.ratio)
        a_fit = 0.0
        if spec is not None:
            unit = Unit(members=tuple(target.name for target in members), method=recipe.method, spec=spec)
            task = FitTask(unit, own, grams, recipe.correction, recipe.seed)
            a_fit, _ = _timed(lambda: list(here.run(fitted, [task])))
        if recipe.allocation != KNAPSACK:
            return a_fit, 0.0
        measured = measure_task(prepared, members, own, grams)
        return a_fit, _timed(lambda: list(here.run(measured_unit, [measured])))[0]


def _smallest(prepared: Plan) -> list[Target]:
    """The group with the fewest weights inside of the decoder layers, the first of several."""
    targets = {target.name: target for target in prepared.targets}
    names: Sequence[tuple[str, ...]] = prepared.groups or [(name,) for name in targets]
    inside = [[targets[name] for name in group] for group in names]
    inside = [group for group in inside if all(target.layer is not None for target in group)]
    return min(inside, key=lambda group: sum(target.weight_count for target in group), default=[])


def _some_tokens(prepared: Plan, vocabulary: int) -> torch.Tensor:
    """One batch of the calibration, or of any tokens where it is yet to be sampled."""
    count = max(1, BATCH_TOKENS // prepared.length)
    if prepared.tokens is not None:
        return prepared.tokens.ids[:count]
    return torch.randint(0, vocabulary, (count, prepared.length), generator=torch.Generator().manual_seed(0))


def _call(function: Callable[[], T]) -> T:
    return function()


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result
