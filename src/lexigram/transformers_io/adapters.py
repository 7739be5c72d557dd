"""Low-rank adapters that stand beside compressed layers (PEFT's LoRA), made a part of the layers' forms.

LoRA (Hu et al., arXiv 2106.09685) adds ``s B A`` to a weight, with ``B (out, r)`` and ``A (r, in)``. A compressed layer takes
it as one more term of a sum, exactly but for the rounding of ``s B`` and A to bfloat16: nothing is multiplied out.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexigram.errors import LexigramError
from lexigram.factors import DenseSpec, Factor, Product, Sum, encode
from lexigram.folders import first_line
from lexigram.transformers_io.linear import FactoredLinear
from lexigram.transformers_io.quantizer import describe
from lexigram.weights import check_finite


def merge_adapters(model: nn.Module) -> PreTrainedModel:
    """The compressed model inside of a `PeftModel`, its active adapters merged: no PEFT is left in it, and it can be saved.

    A compressed layer grows by ``2 r (in + out)`` bytes for adapters of rank r in all, which is told by its form. Adapters of
    ordinary layers, and modules that were trained as a whole, are merged by PEFT. The model is changed in place.

    Args:
        model: what `peft.get_peft_model` or `peft.PeftModel.from_pretrained` made of a compressed model.

    Raises:
        LexigramError: where it is none, a value is not finite, or an adapter cannot be merged: of a compressed layer anything
            but plain LoRA, of an ordinary one what PEFT refuses. Compressed layers and their adapters are then as they were.
    """
    configs = getattr(model, "peft_config", {})
    if not hasattr(model, "merge_and_unload"):
        reason = "has no adapters to merge"
        if configs:
            reason = (
                "has its adapters from `add_adapter` or `load_adapter`; save them, and open the compressed model anew"
            )
        raise LexigramError(
            f"{type(model).__name__} {reason}; name what PeftModel.from_pretrained or get_peft_model made"
        )
    if any(getattr(config, "layer_replication", None) for config in configs.values()):
        raise LexigramError("the adapter replicates layers of its model (layer_replication) and cannot be merged")
    check_finite(model, "the model with its adapters")
    adapted = {
        name: module for name, module in model.named_modules() if isinstance(_base_layer(module), FactoredLinear)
    }
    merged = {name: _merged(name, module) for name, module in adapted.items()}
    for name, layer in merged.items():
        model.set_submodule(name, layer)
    try:
        plain: PreTrainedModel = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except Exception as error:
        for name, module in adapted.items():
            model.set_submodule(name, module)
        raise LexigramError(
            f"PEFT does not merge an adapter of a layer that is not compressed: {first_line(error)}"
        ) from error
    describe(plain)
    return plain


def _base_layer(module: nn.Module) -> Any:
    """What an adapter stands beside, as PEFT calls it."""
    return module._modules.get("base_layer")


def _merged(name: str, adapted: Any) -> FactoredLinear:
    """The layer `name` with its active adapters in it; `adapted` is PEFT's layer around it."""
    layer: FactoredLinear = adapted.base_layer
    if not hasattr(adapted, "lora_A"):
        kind = type(adapted).__module__.split(".")[-2]  # peft.tuners.KIND.layer
        raise LexigramError(f"the adapter of {name} is {kind}, and LoRA alone can be merged into a compressed layer")
    active = [adapter for adapter in adapted.active_adapters if adapter in adapted.lora_A]
    for adapter in active:
        variant = adapted.lora_variant.get(adapter)
        if variant is not None:
            raise LexigramError(
                f"the adapter {adapter} of {name} is no plain LoRA ({type(variant).__name__}), and cannot be added to a "
                "weight; leave it beside the layer"
            )
    if not active:
        return layer
    with torch.no_grad():
        left = torch.cat([adapted.scaling[each] * adapted.lora_B[each].weight.float() for each in active], dim=1)
        right = torch.cat([adapted.lora_A[each].weight.float() for each in active])
        try:
            product = Product(_dense(left), _dense(right))
        except ValueError as error:
            raise LexigramError(f"the adapter of {name} cannot be stored: {error}") from error
        bias = layer.bias
        for each in active:
            own = adapted.lora_B[each].bias
            if own is not None:
                if bias is None:
                    raise LexigramError(f"the adapter {each} of {name} has a bias, and the layer has none to add it to")
                bias = nn.Parameter(bias + (adapted.scaling[each] * own).to(bias))
    merged = FactoredLinear(Sum(layer.factors, product), bias, transposed=layer.transposed)
    merged.train(layer.training)
    return merged


def _dense(matrix: Tensor) -> Factor:
    return encode(matrix, DenseSpec(rows=matrix.shape[0], cols=matrix.shape[1]))
