"""What a run says of its result: the ledger that grows while factors are put in place, and `run.json` made of it.

The record's form is `records`'; here it is filled, and held against what the files really weigh.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lexigram.calibration.tokens import TokenSequences
from lexigram.factors import FactorSpec
from lexigram.folders import paths_in
from lexigram.headers import file_sha256, read_headers, tensor_sha256
from lexigram.memory import peak_memory_bytes
from lexigram.methods import Fitted
from lexigram.planning import Plan
from lexigram.records import (
    LayerRecord,
    RunRecord,
    SharedRecord,
    Stopwatch,
    UnitRecord,
    machine,
    versions,
)
from lexigram.staging import RUN_FILE
from lexigram.targets import Target
from lexigram.transformers_io import SHARED, LayerSpec

UNCOMPRESSED = "not compressed"


@dataclass(frozen=True)
class Ledger:
    """The factors of a result: layers by name, and what several of them share."""

    layers: dict[str, LayerRecord] = field(default_factory=dict)
    shared: list[SharedRecord] = field(default_factory=list)

    def enter(self, unit: UnitRecord) -> None:
        """The layers of one unit."""
        self.layers.update({layer.name: layer for layer in unit.layers})
        self.shared.extend(unit.shared)

    def specs(self, targets: Sequence[Target]) -> tuple[dict[str, LayerSpec], dict[str, FactorSpec]]:
        """Every layer as data, and the form of every shared matrix, by name."""
        layers = {
            target.name: LayerSpec(
                factors=self.layers[target.name].factors,
                bias=target.bias,
                transposed=target.transposed,
            )
            for target in targets
        }
        return layers, {shared.name: shared.factors for shared in self.shared}


def matrices(layers: Iterable[LayerRecord], shared: Iterable[SharedRecord]) -> dict[str, FactorSpec]:
    """Every expression's spec by the name that its tensors begin with."""
    own = {f"{layer.name}.factors": layer.factors for layer in layers}
    return own | {f"{SHARED}.{each.name}": each.factors for each in shared}


def unit_record(targets: Sequence[Target], fitted: Fitted) -> UnitRecord:
    """What is known of the members of a unit, in its order, once they are fitted."""
    layers = [
        LayerRecord(
            name=target.name,
            kind=target.kind,
            layer=target.layer,
            shape=target.shape,
            site=target.site,
            factors=factors.spec,
            bytes_before=target.dense_bytes,
            bytes_after=factors.spec.bytes,
            parameters_after=factors.spec.parameters,
            fit=report,
        )
        for target, (factors, report) in zip(targets, fitted.members, strict=True)
    ]
    if fitted.shared is None:
        return UnitRecord(layers=layers)
    name, spec = next(fitted.members[0][0].spec.references()).name, fitted.shared.spec
    members = [target.name for target in targets]
    return UnitRecord(layers=layers, shared=[SharedRecord(name=name, members=members, factors=spec, bytes=spec.bytes)])


def run_record(
    folder: Path,
    prepared: Plan,
    tokens: TokenSequences,
    weights_sha256: str,
    ledger: Ledger,
    watch: Stopwatch,
    workers_peak: int = 0,
) -> RunRecord:
    """The content of `run.json`, of a model that lies in `folder`; `workers_peak` in bytes.

    Raises:
        AssertionError: where the files there do not weigh what the ledger says.
    """
    recipe, device = prepared.recipe, prepared.device
    layers = [ledger.layers[target.name] for target in prepared.targets]
    weighed = content(folder, layers, ledger.shared)
    return RunRecord(
        lexigram=versions()["lexigram"],
        command=" ".join(sys.argv),
        versions=versions(),
        machine={**machine(device), "compute_dtype": str(prepared.compute_dtype).removeprefix("torch.")},
        recipe=recipe.model_dump(mode="json"),
        model=recipe.model,
        weights_sha256=weights_sha256,
        calibration_source=tokens.source,
        calibration_sha256=tokens.sha256,
        calibration_tokens=tokens.ids.numel(),
        requested_ratio=prepared.ratio,
        bytes_before=prepared.bytes_before,
        model_bytes_before=weighed["model_bytes_after"] - weighed["bytes_after"] + prepared.bytes_before,
        source_file_bytes=prepared.source.file_bytes(),
        mean_relative_error=sum(layer.fit.relative_error for layer in layers) / len(layers),
        seconds=watch.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        predicted_memory_bytes=prepared.memory_bytes,
        workers_peak_memory_bytes=workers_peak,
        device_peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        stages=watch.stages,
        layers=layers,
        shared=ledger.shared,
        **weighed,
    )


def content(folder: Path, layers: Sequence[LayerRecord], shared: Sequence[SharedRecord]) -> dict[str, Any]:
    """What a record says of the files in `folder`, which hold these layers and matrices: names, hashes, sizes, ratio.

    Raises:
        AssertionError: where they do not weigh what their forms say.
    """
    forms, weights = matrices(layers, shared), sum(math.prod(layer.shape) for layer in layers)
    after = sum(factors.bytes for factors in forms.values())
    sizes = stored_bytes(folder)
    by_kind = bytes_by_kind(sizes, forms)
    if sum(by_kind.values()) - by_kind.get(UNCOMPRESSED, 0) != after:
        raise AssertionError("the files do not weigh what their forms say; please report this")
    return {
        "ratio": 1 - after / sum(layer.bytes_before for layer in layers),
        "bits_per_weight": 8 * after / weights,
        "parameter_ratio": 1 - sum(factors.parameters for factors in forms.values()) / weights,
        "bytes_after": after,
        "model_bytes_after": sum(sizes.values()),
        "bytes_by_kind": by_kind,
        "files": sorted({RUN_FILE, *paths_in(folder)}),
        "tensors_sha256": tensor_hashes(folder),
        "files_sha256": file_hashes(folder),
    }


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Of every tensor in the weight files of `folder`, by name."""
    return {name: tensor_sha256(header) for name, header in read_headers(weight_files(folder)).items()}


def file_hashes(folder: Path) -> dict[str, str]:
    """Of the `other_files` in `folder`, by their paths there."""
    return {name: file_sha256(folder / name) for name in other_files(paths_in(folder))}


def folder_sha256(folder: Path) -> str:
    """One hash of all tensors in `folder` and their names."""
    return hashlib.sha256(json.dumps(tensor_hashes(folder), sort_keys=True).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files of `folder` that hold tensors, hidden ones aside."""
    return sorted(folder.glob("[!.]*.safetensors"))


def other_files(names: Iterable[str]) -> list[str]:
    """Those of a result's files that say what the tensors are, and of what: config, tokenizer, recipe; all but the record."""
    return [name for name in names if name != RUN_FILE and ("/" in name or not name.endswith(".safetensors"))]


def stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor in the weight files of `folder`, by name, as their headers tell."""
    return {name: header.bytes for name, header in read_headers(weight_files(folder)).items()}


def bytes_by_kind(sizes: Mapping[str, int], forms: Mapping[str, FactorSpec]) -> dict[str, int]:
    """Bytes by the kind of leaf and the part of it that a tensor is."""
    promised = {
        ".".join(filter(None, (name, path, part))): f"{leaf.form} {part}"
        for name, factors in forms.items()
        for path, leaf in factors.leaves()
        for part in leaf.stored()
    }
    by_kind: dict[str, int] = {}
    for name, size in sizes.items():
        kind = promised.get(name, UNCOMPRESSED)
        by_kind[kind] = by_kind.get(kind, 0) + size
    return by_kind
