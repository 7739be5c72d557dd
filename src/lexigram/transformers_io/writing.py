"""A compressed model written tensor by tensor, from weights and factors that lie in files: it is never in memory as a whole."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lexigram.factors import FactorSpec
from lexigram.jsonfiles import write_json
from lexigram.shards import Entry, FileTensor, split, write_tensors
from lexigram.transformers_io.linear import LayerSpec
from lexigram.transformers_io.quantizer import LexigramConfig
from lexigram.weights import Readable, Weights

SHARD_BYTES = 5_000_000_000
"""The most that a file holds; more files, and an index, where the model is larger."""


def write_model(
    folder: Path,
    frame: PreTrainedModel,
    weights: Weights,
    layers: Mapping[str, LayerSpec],
    shared: Mapping[str, FactorSpec],
    factors: Mapping[str, FileTensor],
    dtype: torch.dtype,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write what `from_pretrained` opens, the tokenizer aside.

    Args:
        folder: exists; files of these names in it are replaced.
        frame: the original model; its config and what it says of a generation are written.
        weights: the original ones.
        layers: the compressed layers by name.
        shared: what several of them share, by name.
        factors: the tensors of both, by their names in the result.
        dtype: what everything else is stored in.
        shard_bytes: the most that a weight file holds.
    """
    entries = _entries(weights, layers, factors, dtype)
    parts = split({name: entry.bytes for name, entry in entries.items()}, shard_bytes)
    files = [_shard_name(number, len(parts)) for number in range(1, len(parts) + 1)]
    for file, names in zip(files, parts, strict=True):
        write_tensors(folder / file, {name: entries[name] for name in names})
    first = files[0]
    if len(parts) > 1:
        first = "lexigram.safetensors.index.json"
        places = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        total = sum(entry.bytes for entry in entries.values())
        write_json(folder / first, {"metadata": {"total_size": total}, "weight_map": places})
    config = frame.config
    config.quantization_config = LexigramConfig(
        layers={name: layer.model_dump() for name, layer in layers.items()},
        shared={name: spec.model_dump() for name, spec in shared.items()},
        weights=first,
    )
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(frame).__name__]
    config.save_pretrained(folder)
    if frame.can_generate():
        frame.generation_config.save_pretrained(folder)


def _entries(
    weights: Weights, layers: Mapping[str, LayerSpec], factors: Mapping[str, FileTensor], dtype: torch.dtype
) -> dict[str, Entry]:
    """All tensors of the result by name: the original ones, but factors in the place of the weights that they stand for."""
    replaced = {f"{name}.weight" for name in layers}
    found = {
        name: Entry(entry.dtype, entry.shape, entry.read) if not entry.dtype.is_floating_point else _cast(entry, dtype)
        for name, entry in weights.entries.items()
        if name not in replaced
    }
    return found | {name: Entry(tensor.dtype, tensor.shape, tensor.read) for name, tensor in factors.items()}


def _cast(entry: Readable, dtype: torch.dtype) -> Entry:
    return Entry(dtype, entry.shape, partial(_read_as, entry, dtype))


def _read_as(entry: Readable, dtype: torch.dtype) -> Tensor:
    return entry.read().to(dtype)


def _shard_name(number: int, count: int) -> str:
    return "lexigram.safetensors" if count == 1 else f"lexigram-{number:05d}-of-{count:05d}.safetensors"
