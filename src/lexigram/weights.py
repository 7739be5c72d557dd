"""The weights of a model as they were loaded: their hashes, and checks that they can be worked on and stored at all."""

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexigram.errors import LexigramError
from lexigram.targets import Target, weight_of


def weights_sha256(model: nn.Module, targets: Sequence[Target]) -> str:
    """Of the weights to compress, in the model's order."""
    return _sha256(weight_of(model.get_submodule(target.name)) for target in targets)


def model_sha256(model: PreTrainedModel) -> str:
    """Of all weights and the config, wherever it lies: whatever is before a layer decides its inputs."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    content = _sha256(model.parameters()) + json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _sha256(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse a weight that is NaN or infinite, compressed or not: the result would be broken without a sign.

    Raises:
        LexigramError: that names the weight, and the model by `name`.
    """
    for parameter, values in model.named_parameters():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise LexigramError(
                f"{name} has values in {parameter} that are not finite (NaN or infinity); mend the checkpoint"
            )


def check_storable(model: nn.Module, targets: set[str], dtype: str) -> None:
    """Refuse, before any work, what is not compressed and would overflow in the dtype that it is stored in.

    Raises:
        LexigramError: that names the weight and the dtype.
    """
    most = torch.finfo(getattr(torch, dtype)).max
    for parameter, values in model.named_parameters():
        if parameter.removesuffix(".weight") not in targets and float(values.detach().abs().max()) > most:
            raise LexigramError(
                f"{parameter} has values beyond {most:g}, the largest {dtype}; store it in another --dtype"
            )
