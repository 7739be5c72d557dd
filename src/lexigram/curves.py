"""What every unit loses at every size, and the allocation that follows. Fits sketches through the methods, writes no model.

A few sketches of each unit are measured and sizes in between are interpolated, or, for the allocation `global`, many sizes are
told from what the single parts of a weight are worth. A knapsack spends one budget over the whole model. The curves are
plain data and can be kept for another ratio.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from lexigram.allocation.knapsack import interpolated
from lexigram.allocation.matching import pair_distance, pairs
from lexigram.allocation.offers import GRID, MEASURED, RANKED, form_at, measured_forms
from lexigram.allocation.uniform import budget, uniform
from lexigram.allocation.units import Allocation, Unit
from lexigram.calibration.sensitivity import output_sensitivity
from lexigram.calibration.store import GramStore
from lexigram.errors import LexigramError
from lexigram.factors import DenseSpec, GroupSpec
from lexigram.fitting import OTHERWISE, naming
from lexigram.gram import Gram
from lexigram.jsonfiles import read_json, write_json
from lexigram.methods import (
    AnyMethod,
    Fitted,
    Member,
    MethodConfig,
    QuantizeConfig,
    fit_group,
)
from lexigram.methods.base import estimates, sketch, variants
from lexigram.planning import SENSITIVITY_SEQUENCES, Plan
from lexigram.recipe import GLOBAL, UNIFORM
from lexigram.refinement import Offer, allocated, refine
from lexigram.running import Stages
from lexigram.targets import Target, decoder_layers
from lexigram.tensorfiles import TensorFiles
from lexigram.workers import Workers

_VERSION = 6
"""Of what a sketch is: curves that were kept with another one are measured again."""


class Point(BaseModel):
    """One size of one unit: each member's squared output error, as a share of its squared output.

    `spec` is there where the size stands for one form alone, and nothing is told about those in between.
    """

    model_config = ConfigDict(frozen=True)

    bytes: int
    errors: tuple[float, ...]
    spec: GroupSpec | None = None


class Curve(BaseModel):
    """The points of one method, a sketch, on one unit: measured, or told from its parts."""

    model_config = ConfigDict(frozen=True)

    members: tuple[str, ...]
    method: AnyMethod
    points: tuple[Point, ...]


class Curves(BaseModel):
    """All that is measured before one budget can be spent; `outputs` are squared norms, `sensitivity` see the function."""

    model_config = ConfigDict(frozen=True)

    curves: tuple[Curve, ...]
    outputs: dict[str, float]
    sensitivity: dict[str, float] = {}


def decide(
    plan: Plan,
    weight: Callable[[str], Tensor],
    store: GramStore,
    model: PreTrainedModel,
    ids: Tensor,
    pool: Workers,
    progress: Stages,
    streaming: Mapping[str, Any],
) -> Allocation:
    """The allocation of a plan that left it to the weights and Grams.

    Args:
        plan: its recipe says what shares and how the budget is spent.
        weight: a target's weight (out, in) by name.
        store: the Grams of all sites.
        model: the original model; it may be without its weights, which are then in `streaming`.
        ids: the calibration tokens (sequences, length).
        pool: where units are measured.
        progress: is told about the stages.
        streaming: options of `LayerRunner` about where weights and hidden states are.

    Raises:
        LexigramError: where the budget is too small for every choice.
    """
    targets = {target.name: target for target in plan.targets}
    groups = plan.groups
    if groups is None:
        groups = matched_pairs(plan.targets, weight, store, progress)
    recipe = plan.recipe
    if recipe.allocation == UNIFORM:
        return uniform(groups, targets, recipe.method, plan.ratio, recipe.accounting)
    file = _file(plan, groups, store)
    # Beside it and not in a folder, which one run could remove while another with the same cache writes there.
    units = {tuple(names): file.with_name(f"{file.stem}-{_sha256(names)[:16]}.json") for names in groups}
    curves = _read(file) or _measured(plan, units, weight, store, pool, progress)
    if recipe.measure == "loss" and not curves.sensitivity:
        curves = curves.model_copy(update={"sensitivity": _sensitivity(plan, model, ids, progress, streaming)})
    _keep_all(file, curves, units.values())
    amount = budget(plan.targets, plan.ratio, "bytes").amount
    offered = offers(curves, recipe.method, groups, targets, recipe.measure)
    if recipe.refine:
        sketches = _Sketches(plan, weight, store, file.with_name(f"{file.stem}-sketches"))
        whole = plan.source.model(plan.device)
        return refine(plan, offered, amount, sketches.weight, whole, ids, progress)
    return allocated(offered, amount)


class _Sketches:
    """Models' weights as sketches of forms, for the refinement: the errors lie on disk, made when they are first asked for."""

    def __init__(self, plan: Plan, weight: Callable[[str], Tensor], store: GramStore, folder: Path) -> None:
        self._targets = {target.name: target for target in plan.targets}
        self._seed, self._original, self._store = plan.recipe.seed, weight, store
        self._files = TensorFiles(folder, plan.device, "sketch")

    def weight(self, offer: Offer) -> dict[str, Tensor]:
        """What the weights of a unit become, (out, in) by name; none where it is kept as it is."""
        if offer.measured is None:
            return {}
        errors = self._errors(offer.measured)
        pairs = zip(offer.measured.members, offer.scales, strict=True)
        return {name: self._original(name).float() + scale * errors[name].float() for name, scale in pairs}

    def _errors(self, unit: Unit) -> dict[str, Tensor]:
        """bfloat16 (out, in) by name: the sketch less the weight."""
        name = hashlib.sha256(unit.model_dump_json().encode()).hexdigest()[:32]
        if not self._files.has(name):
            targets = [self._targets[member] for member in unit.members]
            with self._store.using(target.site for target in targets) as grams, naming(unit.members, "sketched"):
                members = [Member(self._original(target.name), grams[target.site]) for target in targets]
                fitted = _sketched(self._seed, unit.method, members, unit.spec)
            lost = {
                target.name: (factor.to_dense() - member.weight.float()).bfloat16()
                for target, member, (factor, _) in zip(targets, members, fitted.members, strict=True)
            }
            self._files.put(name, lost)
        return self._files.get(name)[0]


def matched_pairs(
    targets: Sequence[Target], weight: Callable[[str], Tensor], store: GramStore, progress: Stages
) -> list[tuple[str, ...]]:
    """Pairs of targets of equal input width, of any kind, that look most alike in their own metrics (GeoPair)."""
    widths: dict[int, list[Target]] = {}
    for target in targets:
        widths.setdefault(target.shape[1], []).append(target)
    found: list[tuple[str, ...]] = []
    with progress.stage("match layers", len(targets)) as step:
        for members in widths.values():
            signals: dict[str, Tensor] = {}
            distances: dict[tuple[str, str], float] = {}
            for target in members:
                with store.using([target.site]) as grams, naming([target.name], "matched"):
                    own = grams[target.site].whitening.whiten(weight(target.name).float())
                distances |= {(name, target.name): pair_distance(other, own) for name, other in signals.items()}
                signals[target.name] = own
                step()
            found += pairs([member.name for member in members], distances)
    order = {target.name: index for index, target in enumerate(targets)}
    return sorted(found, key=lambda names: order[names[0]])


@dataclass(frozen=True)
class MeasureTask:
    """The weights (out, in) of a unit's members with the Grams of their inputs, to be sketched in every form of the method.

    With `ranks` their single parts are ranked instead.
    """

    method: MethodConfig
    ranks: bool
    seed: int
    targets: list[Target]
    weights: list[Tensor]
    grams: list[Gram]


def measure_task(plan: Plan, targets: list[Target], weights: list[Tensor], grams: list[Gram]) -> MeasureTask:
    """What is to be measured of the matrices of one unit."""
    return MeasureTask(plan.recipe.method, plan.recipe.allocation == GLOBAL, plan.recipe.seed, targets, weights, grams)


def measured_unit(task: MeasureTask) -> Curves:
    """The curves of one unit, by every variant of the method.

    Raises:
        LexigramError: as `naming` does, and where an error is no finite number.
    """
    members = [Member(weight, gram) for weight, gram in zip(task.weights, task.grams, strict=True)]
    with naming((target.name for target in task.targets), "ranked" if task.ranks else "measured"):
        outputs = {
            target.name: float(member.gram.whitening.whiten(member.weight.float()).square().sum())
            for target, member in zip(task.targets, members, strict=True)
        }
        if task.ranks:
            found = _ranked(task.method, task.targets, members)
        else:
            found = [_curve(task.seed, sketch(method), task.targets, members) for method in variants(task.method)]
        errors = [error for curve in found for point in curve.points for error in point.errors]
        if not all(map(math.isfinite, [*outputs.values(), *errors])):
            raise ValueError(f"not all of its errors are finite; {OTHERWISE}")
        return Curves(curves=tuple(curve for curve in found if curve.points), outputs=outputs)


def _measured(
    plan: Plan,
    files: Mapping[tuple[str, ...], Path],
    weight: Callable[[str], Tensor],
    store: GramStore,
    pool: Workers,
    progress: Stages,
) -> Curves:
    """The curves of all units, which are told by their members' names; each is kept in its file as soon as it is measured."""
    targets = {target.name: target for target in plan.targets}
    found = {names: curves for names, file in files.items() if (curves := _read(file)) is not None}

    def task(names: tuple[str, ...]) -> MeasureTask:
        members = [targets[name] for name in names]
        with store.using(target.site for target in members) as grams:
            return measure_task(plan, members, [weight(name) for name in names], [grams[t.site] for t in members])

    stage = "rank the layers' parts" if plan.recipe.allocation == GLOBAL else "measure the layers' curves"
    with progress.stage(stage, len(files)) as step:
        for _ in found:
            step()
        for curves in pool.run(measured_unit, map(task, [names for names in files if names not in found])):
            names = tuple(curves.outputs)
            _keep(files[names], curves)
            found[names] = curves
            step()
    ordered = [found[names] for names in files]
    outputs = {name: output for curves in ordered for name, output in curves.outputs.items()}
    return Curves(curves=tuple(curve for curves in ordered for curve in curves.curves), outputs=outputs)


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _curve(seed: int, method: MethodConfig, targets: Sequence[Target], members: Sequence[Member]) -> Curve:
    points: dict[int, Point] = {}
    for spec in measured_forms(method, targets):
        fitted = _sketched(seed, method, members, spec)
        errors = tuple(report.relative_error**2 for _, report in fitted.members)
        points[spec.bytes] = Point(bytes=spec.bytes, errors=errors)
    return Curve(members=tuple(t.name for t in targets), method=cast(AnyMethod, method), points=tuple(points.values()))


def _ranked(method: MethodConfig, targets: Sequence[Target], members: Sequence[Member]) -> list[Curve]:
    """Of a unit of one matrix."""
    (target,), (member,) = targets, members
    amounts = [int((1 - ratio) * target.dense_bytes) for ratio in RANKED]
    points: dict[MethodConfig, list[Point]] = {}
    for form in estimates(method, *member, amounts):
        spec = GroupSpec(members=(form.spec,))
        points.setdefault(sketch(form.method), []).append(Point(bytes=spec.bytes, errors=(form.error,), spec=spec))
    return [
        Curve(members=(target.name,), method=cast(AnyMethod, quick), points=tuple(each))
        for quick, each in points.items()
    ]


def _sketched(seed: int, method: MethodConfig, members: Sequence[Member], spec: GroupSpec) -> Fitted:
    return fit_group(method, members, spec, torch.Generator().manual_seed(seed))


def _sensitivity(
    plan: Plan, model: PreTrainedModel, ids: Tensor, progress: Stages, streaming: Mapping[str, Any]
) -> dict[str, float]:
    modules = {target.name: model.get_submodule(target.name) for target in plan.targets}
    # From all over the text: sequences stand in its order, and a text of several kinds has them one after the other.
    some = ids[torch.linspace(0, len(ids) - 1, min(SENSITIVITY_SEQUENCES, len(ids))).round().long()]
    with progress.stage("measure the loss's sensitivity", len(decoder_layers(model)) + 1) as step:
        return output_sensitivity(model, modules, some, plan.compute_dtype, lambda _done, _total: step(), **streaming)


def _file(plan: Plan, groups: Sequence[Sequence[str]], store: GramStore) -> Path:
    """Where the curves of these groups and sketches lie, beside the Grams that decide about them."""
    ratios = RANKED if plan.recipe.allocation == GLOBAL else MEASURED
    sketches = [sketch(variant).model_dump() for variant in variants(plan.recipe.method)]
    content = [_VERSION, sketches, plan.recipe.seed, [list(names) for names in groups], ratios]
    return store.folder / f"curves-{_sha256(content)[:16]}.json"


def _read(file: Path) -> Curves | None:
    """What `_keep` wrote there; None where there is nothing, or no more once it is read."""
    if not file.is_file():
        return None
    remedy = "delete the file and run again"
    try:
        content = read_json(file, remedy=remedy)
    except LexigramError:
        if file.exists():
            raise
        return None  # another run with the same cache has just put it into the curves of all units
    if content.pop("sha256", None) != _sha256(content):
        raise LexigramError(f"the curves {file} are not those that were written; {remedy}")
    try:
        return Curves.model_validate(content)
    except ValidationError as error:
        raise LexigramError(f"the curves {file} cannot be read: {error.errors()[0]['msg']}; {remedy}") from error


def _keep(file: Path, curves: Curves) -> None:
    """With a hash of the content, which is what a later run trusts."""
    content = curves.model_dump(mode="json")
    write_json(file, {**content, "sha256": _sha256(content)})


def _keep_all(file: Path, curves: Curves, units: Iterable[Path]) -> None:
    """Keep the curves of all units, and only then remove those of single ones; other runs may do the same meanwhile."""
    there = _read(file)
    if there is None or not there.sensitivity:  # what another run has told of the loss costs a backward pass
        _keep(file, curves)
    for unit in units:
        with suppress(OSError):
            unit.unlink()


def offers(
    curves: Curves,
    method: MethodConfig,
    groups: Sequence[Sequence[str]],
    targets: dict[str, Target],
    measure: str,
) -> list[list[Offer]]:
    """Every form that every unit may take by the variants of a method, with its cost.

    The cost of an error is by `measure`: its share of the output's energy (`relative`), its energy (`absolute`), or its energy
    times the sensitivity of the loss there (`loss`).
    """
    price = {
        name: {
            "relative": 1.0,
            "absolute": curves.outputs[name],
            "loss": 0.5 * curves.outputs[name] * curves.sensitivity.get(name, 0.0),
        }[measure]
        for name in targets
    }
    fitted_by = {sketch(variant): cast(AnyMethod, variant) for variant in variants(method)}
    return [_offers(curves, fitted_by, tuple(names), targets, price) for names in groups]


def _offers(
    curves: Curves,
    fitted_by: Mapping[MethodConfig, AnyMethod],
    names: tuple[str, ...],
    targets: dict[str, Target],
    price: dict[str, float],
) -> list[Offer]:
    members = [targets[name] for name in names]
    keep = GroupSpec(members=tuple(DenseSpec(rows=m.shape[0], cols=m.shape[1]) for m in members))
    # What rounding to bfloat16 does is in every form, and in the reference too.
    found = [Offer(Unit(members=names, method=QuantizeConfig(value_bits=16), spec=keep), 0.0)]
    for curve in curves.curves:
        if curve.members == names:
            costs = [
                sum(price[name] * error for name, error in zip(names, point.errors, strict=True))
                for point in curve.points
            ]
            offered = _as_told if curve.points[0].spec else _in_between
            found += offered(curve, fitted_by[curve.method], members, costs)
    return found


def _as_told(curve: Curve, method: AnyMethod, members: Sequence[Target], costs: Sequence[float]) -> list[Offer]:
    """The forms that the points of a curve stand for."""
    return [
        Offer(Unit(members=curve.members, method=method, spec=point.spec), cost)
        for point, cost in zip(curve.points, costs, strict=True)
        if point.spec is not None
    ]


def _in_between(curve: Curve, method: AnyMethod, members: Sequence[Target], costs: Sequence[float]) -> list[Offer]:
    """Forms of many sizes, by the measured ones around each."""
    sizes = [point.bytes for point in curve.points]
    wanted = [form_at(curve.method, members, ratio) for ratio in (GRID if len(sizes) > 1 else (0.0,))]
    specs = [spec for spec in wanted if spec is not None]
    measured = {form.bytes: form for form in measured_forms(curve.method, members)}
    found = []
    for spec, cost in zip(specs, interpolated(sizes, costs, [spec.bytes for spec in specs]), strict=True):
        point = min(curve.points, key=lambda each: abs(each.bytes - spec.bytes))
        sketched = Unit(members=curve.members, method=curve.method, spec=measured[point.bytes])
        unit = Unit(members=curve.members, method=method, spec=spec)
        found.append(Offer(unit, cost, sketched, _scales(curve, point, spec.bytes)))
    return found


def _scales(curve: Curve, point: Point, size: int) -> tuple[float, ...]:
    """What each member's error at a measured point is multiplied by to be as large as the curve says for `size` bytes."""
    sizes = [each.bytes for each in curve.points]
    scales = []
    for index, error in enumerate(point.errors):
        (here,) = interpolated(sizes, [each.errors[index] for each in curve.points], [max(size, min(sizes))])
        scales.append(math.sqrt(here / error) if error else 0.0)
    return tuple(scales)
