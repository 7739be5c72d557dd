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
from lexigram.transformers_io.linear import FactoredLinear
from lexigram.transformers_io.quantizer import describe


def merge_adapters(model: nn.Module) -> PreTrainedModel:
    """The compressed model inside of a `PeftModel`, its active adapters merged: no PEFT is left in it, and it can be saved.

    A compressed layer grows by ``2 r (in + out)`` bytes for adapters of rank r in all, which is told by its form. Adapters of
    ordinary layers, and modules that were trained as a whole, are merged by PEFT. The model is changed in place.

    Args:
        model: what `peft.get_peft_model` or `peft.PeftModel.from_pretrained` made of a compressed model.

    Raises:
        LexigramError: where it is none, or an adapter of a compressed layer is no plain LoRA, or not finite; the model is then
            as it was.
    """
    if not hasattr(model, "merge_and_unload"):
        raise LexigramError(
            f"{type(model).__name__} has no adapters to merge; name what peft.get_peft_model or PeftModel.from_pretrained made"
        )
    adapted = {
        name: module for name, module in model.named_modules() if isinstance(_base_layer(module), FactoredLinear)
    }
    merged = {name: _merged(name, module) for name, module in adapted.items()}
    for name, layer in merged.items():
        model.set_submodule(name, layer)
    plain: PreTrainedModel = model.merge_and_unload()  # type: ignore[operator]
    describe(plain)
    return plain


def _base_layer(module: nn.Module) -> Any:
    """What an adapter stands beside, as PEFT calls it."""
    return module._modules.get("base_layer")


def _merged(name: str, adapted: Any) -> FactoredLinear:
    """The layer `name` with its active adapters in it; `adapted` is PEFT's layer around it."""
    layer: FactoredLinear = adapted.base_layer
    kind = type(adapted).__name__
    if not hasattr(adapted, "lora_A"):
        raise LexigramError(f"the adapter of {name} is a {kind}, and LoRA alone can be merged into a compressed layer")
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
    return FactoredLinear(Sum(layer.factors, product), bias, transposed=layer.transposed)


def _dense(matrix: Tensor) -> Factor:
    return encode(matrix, DenseSpec(rows=matrix.shape[0], cols=matrix.shape[1]))
