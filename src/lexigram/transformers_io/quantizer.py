"""What transformers needs to load and save our checkpoints: a quantisation config and a quantizer, registered on import.

The config holds every layer's form, so the modules are built before a single weight is read. Everything fails closed: our
weights do not lie under a name that transformers would load by itself, headers are compared with the forms before loading
and stored values with their masks afterwards.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lexigram.errors import LexigramError
from lexigram.factors import empty
from lexigram.targets import is_linear, weight_of
from lexigram.transformers_io.linear import FactoredLinear, LayerSpec, factored_layers, make_dense
from lexigram.transformers_io.saving import attach_methods, detach_methods

QUANT_METHOD = "lexigram"
FORMAT_VERSION = 1
WEIGHTS = "lexigram.safetensors"
_WEIGHTS_NAME = r"lexigram[\w.-]*\.safetensors(\.index\.json)?"  # in the folder itself, and no pickle

_layers: TypeAdapter[dict[str, LayerSpec]] = TypeAdapter(dict[str, LayerSpec])
_DTYPES = {torch.uint8: "U8", torch.int16: "I16"}


@register_quantization_config(QUANT_METHOD)
class LexigramConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint: format version, weight file and every layer's form.

    Raises:
        LexigramError: for a format or a content that this version does not know.
    """

    def __init__(
        self,
        layers: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        weights: str = WEIGHTS,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method
        if format_version != FORMAT_VERSION:
            raise LexigramError(
                f"the checkpoint has lexigram format version {format_version!r}, this lexigram reads {FORMAT_VERSION}; "
                "install the version that wrote it"
            )
        if unknown:
            raise LexigramError(f"the checkpoint's quantization_config has unknown keys: {', '.join(sorted(unknown))}")
        if not isinstance(weights, str) or not re.fullmatch(_WEIGHTS_NAME, weights):
            raise LexigramError(f"the checkpoint names {weights!r} as its weights; expected a file name like {WEIGHTS}")
        try:
            self.layers = _layers.validate_python(layers or {})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise LexigramError(
                f"the checkpoint's quantization_config is malformed at {where}: {first['msg']}"
            ) from None
        self.format_version = format_version
        self.weights = weights

    def to_dict(self) -> dict[str, Any]:
        """Plain data that the constructor accepts."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "weights": self.weights,
            "layers": {name: layer.model_dump() for name, layer in self.layers.items()},
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
        check_headers(self.quantization_config.layers, kwargs.get("checkpoint_files") or ())
        for name, layer in self.quantization_config.layers.items():
            model.set_submodule(name, _empty_layer(model, name, layer))
            _skip_initialisation(model.get_submodule(name.rpartition(".")[0]))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in factored_layers(model):
            if all(parameter.device.type != "meta" for parameter in module.parameters()):
                try:
                    module.factors.check()
                except ValueError as error:
                    raise LexigramError(f"the checkpoint is damaged at {name}: {error}") from error
        attach_methods(model)
        return model

    def dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """Ordinary layers; by default in the dtype that the model has now, not the one that it was loaded with."""
        return super().dequantize(model, dtype=dtype or model.dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        make_dense(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype)
        detach_methods(model)
        return model

    def is_serializable(self, **_kwargs: Any) -> bool:
        """Saving is supported."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Stored values are integers; they do not train."""
        return False


def attach_config(model: PreTrainedModel) -> None:
    """Make a model whose layers were just replaced saveable: describe its factored layers in its config."""
    config = LexigramConfig(layers={name: module.spec.model_dump() for name, module in factored_layers(model)})
    model.config.quantization_config = config
    model.hf_quantizer = LexigramQuantizer(config, pre_quantized=True)
    attach_methods(model)


def check_headers(layers: dict[str, LayerSpec], files: Sequence[str | Path]) -> None:
    """Compare the files' headers with the layers' forms, before anything is allocated.

    Raises:
        LexigramError: naming the first tensor that is missing, belongs to no form, or has another dtype or shape than its
            form says; and for files that do not lie in one folder.
    """
    folders = {os.path.dirname(os.path.abspath(file)) for file in files}
    if len(folders) > 1:
        raise LexigramError(f"the checkpoint's index names files outside of its folder: {', '.join(sorted(folders))}")
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    part = opened.get_slice(key)
                    found[key] = (part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise LexigramError(f"the weight file {file} cannot be read: {error}") from error
    promised = {
        f"{name}.factors.{part_name}": (_DTYPES[stored.dtype], stored.shape)
        for name, layer in layers.items()
        for part_name, stored in layer.factors.stored().items()
    }
    for key, expected in promised.items():
        if found.get(key) != expected:
            raise LexigramError(
                f"the checkpoint is damaged: {key} is {found.get(key, 'missing')}, its form says {expected}"
            )
    for key in found:
        # A layer that the config forgot would stay dense, with random weights and a mere warning.
        if ".factors." in key and key not in promised:
            raise LexigramError(f"the checkpoint is damaged: {key} is stored, but the config describes no such factor")


def _skip_initialisation(parent: nn.Module) -> None:
    """Keep transformers from initialising `parent`, which some models (GPT-2) do through the dense weights of its layers.

    A parent with tensors of its own is left alone: those may need it.
    """
    own = [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]
    if not own:
        parent._is_hf_initialized = True  # type: ignore[assignment]


def _empty_layer(model: PreTrainedModel, name: str, layer: LayerSpec) -> FactoredLinear:
    try:
        original = model.get_submodule(name)
    except AttributeError:
        original = None
    if original is None or not is_linear(original):
        raise LexigramError(f"the checkpoint describes {name}, but {type(model).__name__} has no such linear layer")
    out_features, in_features = weight_of(original).shape
    if (layer.factors.rows, layer.factors.cols) != (out_features, in_features):
        raise LexigramError(
            f"the checkpoint gives {name} as {layer.factors.rows} x {layer.factors.cols}, the model's config as "
            f"{out_features} x {in_features}"
        )
    if isinstance(original, Conv1D) != layer.transposed:
        raise LexigramError(f"the checkpoint and the model's config disagree about whether {name} is stored transposed")
    bias = original.bias
    if (bias is not None) != layer.bias:
        raise LexigramError(f"the checkpoint and the model's config disagree about the bias of {name}")
    with torch.device("meta"):
        return FactoredLinear(
            empty(layer.factors), bias if isinstance(bias, nn.Parameter) else None, transposed=layer.transposed
        )
