"""How much of every layer was kept, in which form: the redundancy that a method or an allocation found in a model.

A pure function of `run.json`: rank, density, atoms and bits are those of the forms written there, and no weight is read.
What is drawn of it is the business of `heat_maps`, the terminal that of `tables`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lexigram.factors import DenseSpec, FactorSpec, ProductSpec, SharedSpec, SparseSpec, SumSpec
from lexigram.records import LayerRecord, RunRecord

BITS = "stored bits a weight"
RANK = "rank"
RANK_SHARE = "rank / min(out, in)"
DENSITY = "density of the sparse part"
ATOMS = "atoms k"
NONZEROS = "non-zeros s a column"
ENTRY_BITS = "bits of an entry"
LOW_RANK_BITS = "bits of a low-rank factor"
COEFFICIENT_BITS = "bits of a coefficient"
ATOM_BITS = "bits of an atom"
ERROR = "relative error of the output"

_VALUE_BITS = (ENTRY_BITS, LOW_RANK_BITS, COEFFICIENT_BITS, ATOM_BITS)

QUANTITIES = (BITS, RANK, RANK_SHARE, DENSITY, ATOMS, NONZEROS, *_VALUE_BITS, ERROR)
"""What is told of a layer, in the order in which it is told."""


class LayerFigures(NamedTuple):
    """What one layer came to, by quantity.

    `kind` is its name inside of its decoder layer, as short as tells it from the others there; `layer` the decoder layer, None
    outside of them; `weights` how many it has.
    """

    kind: str
    layer: int | None
    weights: int
    figures: dict[str, float]


class KindFigures(NamedTuple):
    """What the layers of one kind came to on the mean, every layer by the number of its weights."""

    kind: str
    layers: int
    means: dict[str, float]


class HeatMap(NamedTuple):
    """A quantity over the decoder layers: `values` (kinds, layers), NaN where there is none. `layers` leaves no number out."""

    quantity: str
    kinds: list[str]
    layers: list[int]
    values: NDArray[np.float64]


def layer_figures(record: RunRecord) -> list[LayerFigures]:
    """The figures of every layer, in the model's order.

    A quantity that a form does not have is not there. Rank and density are those of low rank plus sparse, ``W = L + S``: a
    sparse matrix alone has rank 0, a low-rank product alone density 0, and a dense matrix, in which no entry is dropped, rank 0
    and density 1. Where no layer has a low-rank part there is no rank, where none drops an entry no density. Dictionary forms
    have k atoms and s non-zeros a column of coefficients, which is a row of the factor as stored.

    The bytes of what several layers share are split over them in proportion to their weights. Bits of values are those of the
    codec, scales and indices aside; an entry is one of a sparse or dense matrix that is no factor of a product.
    """
    weights = {layer.name: layer.shape[0] * layer.shape[1] for layer in record.layers}
    shared = {each.name: each.factors for each in record.shared}
    sharing = {each.name: sum(weights[member] for member in each.members) for each in record.shared}
    found = []
    for kind, layer in zip(names_within(record.layers), record.layers, strict=True):
        spec, own = layer.factors, weights[layer.name]
        borrowed = sum(shared[ref.name].bytes * own / sharing[ref.name] for ref in spec.references())
        figures = {
            BITS: 8 * (spec.bytes + borrowed) / own,
            **_structure(_resolved(spec, shared)),
            ERROR: layer.fit.relative_error,
        }
        if RANK in figures:
            figures[RANK_SHARE] = figures[RANK] / min(layer.shape)
        found.append(LayerFigures(kind, layer.layer, own, figures))
    absent = _absent(found)
    return [
        each._replace(figures={name: each.figures[name] for name in QUANTITIES if name in each.figures.keys() - absent})
        for each in found
    ]


def names_within(layers: Sequence[LayerRecord]) -> list[str]:
    """Each layer's kind; where one decoder layer has two of a kind (GPT-2's c_proj), the whole name inside it."""
    if len({(layer.layer, layer.kind) for layer in layers}) == len(layers):
        return [layer.kind for layer in layers]
    return [layer.name if layer.layer is None else layer.name.split(f".{layer.layer}.", 1)[-1] for layer in layers]


def by_kind(found: Sequence[LayerFigures]) -> list[KindFigures]:
    """The means of every kind, over those of its layers that have the quantity."""
    kinds: dict[str, list[LayerFigures]] = {}
    for each in found:
        kinds.setdefault(each.kind, []).append(each)
    return [
        KindFigures(kind, len(members), {name: _mean(name, members) for name in quantities(members)})
        for kind, members in kinds.items()
    ]


def quantities(found: Iterable[LayerFigures]) -> list[str]:
    """Those that any of the layers has."""
    there = {name for each in found for name in each.figures}
    return [name for name in QUANTITIES if name in there]


def heat_maps(found: Sequence[LayerFigures]) -> list[HeatMap]:
    """What is worth a picture of the decoder layers: bits, errors, and whatever `constants` does not tell in a word."""
    inside = {(each.kind, each.layer): each.figures for each in found if each.layer is not None}
    if not inside:
        return []
    kinds = list(dict.fromkeys(each.kind for each in found if each.layer is not None))
    numbers = [each.layer for each in found if each.layer is not None]
    layers = list(range(min(numbers), max(numbers) + 1))
    told = constants(found)
    return [
        HeatMap(
            name,
            kinds,
            layers,
            np.array([[inside.get((kind, layer), {}).get(name, np.nan) for layer in layers] for kind in kinds]),
        )
        for name in quantities(each for each in found if each.layer is not None)
        if name != RANK and name not in told
    ]


def constants(found: Iterable[LayerFigures]) -> dict[str, float]:
    """The quantities that are the same in all layers inside of the decoder layers, bits a weight and errors aside.

    Bits of values only have to be the same wherever there are such values: which layers have them is seen by other quantities.
    """
    inside = [each.figures for each in found if each.layer is not None]
    values = {name: {figures.get(name) for figures in inside} for name in QUANTITIES if name not in (BITS, RANK, ERROR)}
    alone = {name: same - {None} if name in _VALUE_BITS else same for name, same in values.items()}
    return {name: value for name, same in alone.items() if len(same) == 1 for value in same if value is not None}


def outside(found: Iterable[LayerFigures]) -> list[LayerFigures]:
    """Those outside of the decoder layers, such as ``lm_head``."""
    return [each for each in found if each.layer is None]


def _resolved(spec: FactorSpec, shared: Mapping[str, FactorSpec]) -> FactorSpec:
    """The form with every shared matrix in the place where it is referred to."""
    match spec:
        case SharedSpec():
            return shared[spec.name]
        case SumSpec() | ProductSpec():
            sides = {"left": _resolved(spec.left, shared), "right": _resolved(spec.right, shared)}
            return spec.model_copy(update=sides)
    return spec


def _structure(spec: FactorSpec) -> dict[str, float]:
    """Rank and density, atoms and non-zeros, and bits of their values: those that the form has; nothing for other products."""
    match spec:
        case SumSpec():
            left, right = _structure(spec.left), _structure(spec.right)
            both = {name: left[name] + right[name] for name in (RANK, DENSITY) if name in left and name in right}
            return {**left, **right, **both}
        case ProductSpec(left=DenseSpec() as left, right=DenseSpec()):
            return {RANK: left.cols, DENSITY: 0, LOW_RANK_BITS: left.codec.bits}
        case ProductSpec(left=SparseSpec() as left, right=DenseSpec() as right):
            return {
                ATOMS: left.cols,
                NONZEROS: left.nonzeros / left.rows,
                COEFFICIENT_BITS: left.codec.bits,
                ATOM_BITS: right.codec.bits,
            }
        case SparseSpec():
            return {RANK: 0, DENSITY: spec.nonzeros / (spec.rows * spec.cols), ENTRY_BITS: spec.codec.bits}
        case DenseSpec():
            return {RANK: 0, DENSITY: 1, ENTRY_BITS: spec.codec.bits}
    return {}


def _absent(found: Sequence[LayerFigures]) -> set[str]:
    """The parts of low rank plus sparse that no layer has."""
    low_rank = any(each.figures.get(RANK, 0) > 0 for each in found)
    sparse = any(0 < each.figures.get(DENSITY, 0) < 1 for each in found)
    return (set() if low_rank else {RANK, RANK_SHARE}) | (set() if sparse else {DENSITY})


def _mean(name: str, members: Sequence[LayerFigures]) -> float:
    having = [each for each in members if name in each.figures]
    return sum(each.figures[name] * each.weights for each in having) / sum(each.weights for each in having)
