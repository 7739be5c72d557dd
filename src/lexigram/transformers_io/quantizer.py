"""What transformers needs to load and save our checkpoints: a quantisation config and a quantizer, registered on import.

The config holds every layer's form, so the modules are built before a single weight is read. Everything fails closed: our
weights do not lie under a name that transformers would load by itself, headers are compared with the forms and the model
before anything is allocated, and stored values with their indices afterwards.

A bit that flips inside of a value leaves another value, which no loader can tell from the right one: it is found by the hashes
in `run.json` (`lexigram.verification`). Loading computes none, to stay fast.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lexigram.errors import LexigramError
from lexigram.factors import Factor, Leaf, SharedName, empty
from lexigram.folders import printable
from lexigram.headers import Header, read_headers
from lexigram.targets import is_linear, weight_of
from lexigram.transformers_io.linear import (
    SHARED,
    FactoredLinear,
    LayerSpec,
    factored_layers,
    make_dense,
    share,
    shared_matrices,
)
from lexigram.transformers_io.saving import attach_methods, detach_methods

QUANT_METHOD = "lexigram"
FORMAT_VERSION = 1
WEIGHTS = "lexigram.safetensors"
_WEIGHTS_NAME = r"lexigram[\w.-]*\.safetensors(\.index\.json)?"  # in the folder itself, and no pickle

_ModuleName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
_layers: TypeAdapter[dict[str, LayerSpec]] = TypeAdapter(dict[_ModuleName, LayerSpec])
_shared: TypeAdapter[dict[str, Leaf]] = TypeAdapter(dict[SharedName, Annotated[Leaf, Field(discriminator="form")]])
_DTYPES = {torch.uint8: "U8", torch.int16: "I16"}
_BUFFERS = 2**28  # bytes that a model may compute for itself beside what its files hold: masks, rotary tables
_AGAIN = "fetch or write the model again"


@register_quantization_config(QUANT_METHOD)
class LexigramConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint: format version, weight file, every layer's form, and the
    matrices that layers share.

    Raises:
        LexigramError: for a format or a content that this version does not know.
    """

    def __init__(
        self,
        layers: dict[str, Any] | None = None,
        shared: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        weights: str = WEIGHTS,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method
        if format_version != FORMAT_VERSION:
            raise LexigramError(
                f"the checkpoint has lexigram format version {printable(repr(format_version))}, this lexigram reads "
                f"{FORMAT_VERSION}; install the version that wrote it"
            )
        if unknown:
            raise LexigramError(
                f"the checkpoint's quantization_config has unknown keys: {printable(', '.join(sorted(unknown)))}; "
                + _AGAIN
            )
        if not is_weights_name(weights):
            raise LexigramError(
                f"the checkpoint names {printable(repr(weights))} as its weights, expected a file name like {WEIGHTS}; {_AGAIN}"
            )
        try:
            self.layers = _layers.validate_python(layers or {})
            self.shared = _shared.validate_python(shared or {})
        except ValidationError as error:
            first = error.errors()[0]
            where, what = printable(".".join(map(str, first["loc"]))), printable(first["msg"])
            raise LexigramError(
                f"the checkpoint's quantization_config is malformed at {where}: {what}; {_AGAIN}"
            ) from None
        _check_references(self.layers, self.shared)
        self.format_version = format_version
        self.weights = weights

    def to_dict(self) -> dict[str, Any]:
        """Plain data that the constructor accepts."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "weights": self.weights,
            "layers": {name: layer.model_dump() for name, layer in self.layers.items()},
            "shared": {name: matrix.model_dump() for name, matrix in self.shared.items()},
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: nothing is left to defaults in a file."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """The config as JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __repr__(self) -> str:
        return f"LexigramConfig({len(self.layers)} layers, format {self.format_version}, {self.weights})"


@register_quantizer(QUANT_METHOD)
class LexigramQuantizer(HfQuantizer):
    """Builds the factored layers before loading, checks them afterwards, and teaches the model to save itself again."""

    requires_calibration = True
    quantization_config: LexigramConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Point transformers to our weight file; called before it looks for one."""
        config.transformers_weights = self.quantization_config.weights
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        check_headers(config, model, kwargs.get("checkpoint_files") or ())
        with torch.device("meta"):
            shared = {name: empty(spec) for name, spec in config.shared.items()}
        if shared:
            share(model, shared)
        for name, layer in config.layers.items():
            model.set_submodule(name, _empty_layer(model, name, layer, shared))
            _skip_initialisation(model.get_submodule(name.rpartition(".")[0]))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, factors in _matrices(model).items():
            if not _is_offloaded(factors):
                try:
                    factors.check()
                except ValueError as error:
                    raise LexigramError(f"the checkpoint is damaged at {name}: {error}; {_AGAIN}") from error
        attach_methods(model)
        return model

    def dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """Ordinary layers; by default in the dtype that the model has now, not the one that it was loaded with."""
        return super().dequantize(model, dtype=dtype or model.dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        for name, factors in _matrices(model).items():
            if _is_offloaded(factors):
                raise LexigramError(
                    f"{name} is offloaded and cannot be multiplied out; load the model without an offloading device_map first"
                )
        make_dense(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype)
        detach_methods(model)
        return model

    def is_serializable(self, **_kwargs: Any) -> bool:
        """Saving is supported."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters train beside the layers. The stored values themselves are integers, which `lexigram heal` trains."""
        return True


def describe(model: PreTrainedModel) -> None:
    """Have the config of a model whose layers were changed tell what they are now, so that it can be saved."""
    model.config.quantization_config = config = LexigramConfig(
        layers={name: layer.spec.model_dump() for name, layer in factored_layers(model)},
        shared={name: matrix.spec.model_dump() for name, matrix in shared_matrices(model).items()},
    )
    model.hf_quantizer = LexigramQuantizer(config, pre_quantized=True)
    attach_methods(model)


def is_weights_name(name: Any) -> bool:
    """Whether our weights, or their index, can lie in a file of this name."""
    return isinstance(name, str) and re.fullmatch(_WEIGHTS_NAME, name) is not None


def check_headers(config: LexigramConfig, model: PreTrainedModel, files: Sequence[str | Path]) -> None:
    """Compare the files' headers with the config's forms and the model's shapes, before anything is allocated.

    Raises:
        LexigramError: naming the first tensor that is missing, belongs to no form, or has another dtype or shape than its form
            or the model says; and for files that do not lie in one folder, or that the model would be larger than.
    """
    folders = {os.path.dirname(os.path.abspath(file)) for file in files}
    if len(folders) > 1:
        raise LexigramError(
            f"the checkpoint's index names files outside of its folder: {', '.join(sorted(folders))}; {_AGAIN}"
        )
    found = read_headers(files)
    promised = _promised(config)
    for key, expected in promised.items():
        there = (found[key].dtype, found[key].shape) if key in found else "missing"
        if there != expected:
            raise LexigramError(f"the checkpoint is damaged: {key} is {there}, its form says {expected}; {_AGAIN}")
    for key in found:
        # A layer that the config forgot would stay dense, with random weights and a mere warning.
        if (".factors." in key or key.startswith(f"{SHARED}.")) and key not in promised:
            raise LexigramError(
                f"the checkpoint is damaged: {key} is stored, but the config describes no such factor; {_AGAIN}"
            )
    replaced = {f"{name}.weight" for name in config.layers}
    own = {key: tensor for key, tensor in model.state_dict().items() if key not in replaced}
    _check_own(model, own, found)
    _check_size(model, own, {key: header for key, header in found.items() if key not in promised})


def _promised(config: LexigramConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every tensor that a form names."""
    matrices = {f"{name}.factors": layer.factors for name, layer in config.layers.items()}
    matrices |= {f"{SHARED}.{name}": matrix for name, matrix in config.shared.items()}
    return {
        f"{name}.{part}": (_DTYPES[stored.dtype], stored.shape)
        for name, matrix in matrices.items()
        for part, stored in matrix.stored().items()
    }


def _check_own(model: PreTrainedModel, own: Mapping[str, Tensor], found: Mapping[str, Header]) -> None:
    """Raise where what is not compressed is stored otherwise than the model has it."""
    for key, tensor in own.items():
        # transformers before 5.21 compares no shapes where there is a quantizer.
        if key in found and found[key].shape != tuple(tensor.shape):
            raise LexigramError(
                f"the checkpoint is damaged: {key} has the shape {found[key].shape} in the weights and {tuple(tensor.shape)} "
                f"by config.json; {_AGAIN}"
            )
        # transformers would take the integers for values.
        if key in found and tensor.is_floating_point() != found[key].dtype.startswith(("F", "BF")):
            raise LexigramError(
                f"the checkpoint is damaged: {key} is stored as {found[key].dtype}, and {type(model).__name__} has it as "
                f"{str(tensor.dtype).removeprefix('torch.')}; {_AGAIN}"
            )


def _check_size(model: PreTrainedModel, own: Mapping[str, Tensor], found: Mapping[str, Header]) -> None:
    """Raise where the model needs more values than the files hold: transformers would allocate and invent them.

    Some models (fused experts) have other tensors than their files, of as many values; so these are what is counted. Which
    names are missing is told by the loading itself.
    """
    tied = model.all_tied_weights_keys
    stands_for = {key: {tied.get(key, key), *(name for name, source in tied.items() if source == key)} for key in own}
    lacking = [key for key in own if key not in found and not stands_for[key] & found.keys()]
    spare = sum(math.prod(header.shape) for key, header in found.items() if key not in own)
    if sum(own[key].numel() for key in lacking) > spare:
        raise LexigramError(
            f"the checkpoint is not complete: {lacking[0]}{f' (and {len(lacking) - 1} more)' * (len(lacking) > 1)} is missing "
            f"in its weights; {_AGAIN}"
        )
    computed = sum(buffer.nbytes for key, buffer in model.named_buffers() if key not in own)
    if computed > _BUFFERS + sum(header.bytes for header in found.values()):
        raise LexigramError(
            f"{type(model).__name__} by config.json computes {computed:,} bytes of tables for itself, far more than its files "
            f"hold; {_AGAIN}"
        )


def _matrices(model: nn.Module) -> dict[str, Factor]:
    """The factors of every compressed layer, and what they share, by name."""
    return {name: module.factors for name, module in factored_layers(model)} | shared_matrices(model)


def _is_offloaded(factors: Factor) -> bool:
    return any(parameter.device.type == "meta" for parameter in factors.parameters())


def _skip_initialisation(parent: nn.Module) -> None:
    """Keep transformers from initialising `parent`, which some models (GPT-2) do through the dense weights of its layers.

    A parent with tensors of its own is left alone: those may need it.
    """
    own = [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]
    if not own:
        parent._is_hf_initialized = True  # type: ignore[assignment]


def _check_references(layers: dict[str, LayerSpec], shared: dict[str, Leaf]) -> None:
    """Raise where a layer refers to a shared matrix that is not described, or of another shape."""
    for name, layer in layers.items():
        for reference in layer.factors.references():
            found = shared.get(reference.name)
            if found is None or (found.rows, found.cols) != (reference.rows, reference.cols):
                described = "nothing" if found is None else f"{found.rows} x {found.cols}"
                raise LexigramError(
                    f"the checkpoint is damaged: {name} shares {reference.name} as {reference.rows} x {reference.cols}, which "
                    f"is described as {described}; {_AGAIN}"
                )


def _empty_layer(model: PreTrainedModel, name: str, layer: LayerSpec, shared: dict[str, Factor]) -> FactoredLinear:
    try:
        original = model.get_submodule(name)
    except AttributeError:
        original = None
    if original is None or not is_linear(original):
        raise LexigramError(
            f"the checkpoint describes {name}, but {type(model).__name__} has no such linear layer; {_AGAIN}"
        )
    out_features, in_features = weight_of(original).shape
    if (layer.factors.rows, layer.factors.cols) != (out_features, in_features):
        raise LexigramError(
            f"the checkpoint gives {name} as {layer.factors.rows} x {layer.factors.cols}, the model's config as "
            f"{out_features} x {in_features}; {_AGAIN}"
        )
    if isinstance(original, Conv1D) != layer.transposed:
        raise LexigramError(
            f"the checkpoint and the model's config disagree about whether {name} is stored transposed; {_AGAIN}"
        )
    bias = original.bias
    if (bias is not None) != layer.bias:
        raise LexigramError(f"the checkpoint and the model's config disagree about the bias of {name}; {_AGAIN}")
    with torch.device("meta"):
        return FactoredLinear(
            empty(layer.factors, shared), bias if isinstance(bias, nn.Parameter) else None, transposed=layer.transposed
        )
