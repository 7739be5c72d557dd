"""The weights of a model, read when they are asked for; their hashes, and checks that they can be worked on and stored at all.

Where they lie in safetensors files under the names that the model has for them, one tensor is in memory at a time; weights that
transformers has to convert when it loads them are held.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lexigram.errors import LexigramError
from lexigram.shards import raw
from lexigram.targets import Target


class Readable(Protocol):
    """A tensor that is known before it is read."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    def read(self) -> Tensor:
        """Its values."""
        ...


@dataclass(frozen=True)
class Held:
    """A tensor that is in memory."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensor.shape)

    def read(self) -> Tensor:
        """Its values."""
        return self.tensor


@dataclass(frozen=True)
class Weights:
    """Parameters and persistent buffers by their names in the model, in its order; of tied ones the first."""

    entries: Mapping[str, Readable]

    def hold(self) -> "Weights":
        """The same, all in memory: faster where they are read many times."""
        return Weights({name: Held(entry.read()) for name, entry in self.entries.items()})

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self.entries[name].read()

    def weight(self, target: Target) -> Tensor:
        """The weight of a linear layer as (out, in)."""
        stored = self.read(f"{target.name}.weight")
        return stored.T if target.transposed else stored


class Digests(NamedTuple):
    """SHA-256 of the weights to compress, in the model's order, and of all weights."""

    targets: str
    all: str


def checked(
    weights: Weights, targets: Iterable[Target], name: str, dtype: str, step: Callable[[], None] = lambda: None
) -> Digests:
    """Read every tensor once: hash it, and refuse what would break the result.

    Args:
        weights: of the model.
        targets: what will be compressed.
        name: the model's, for messages.
        dtype: what everything else is stored in.
        step: is called after every tensor.

    Raises:
        LexigramError: that names a tensor with NaN or infinity, compressed or not: the result would be broken without a sign;
            or one that is not compressed and overflows in `dtype`.
    """
    own = {f"{target.name}.weight": target for target in targets}
    most = torch.finfo(getattr(torch, dtype)).max
    of_targets, of_all = hashlib.sha256(), hashlib.sha256()
    for key, entry in weights.entries.items():
        values = entry.read().detach()
        if values.is_floating_point():
            largest = _largest(values)
            _check_finite(largest, key, name)
            if key not in own and largest > most:
                raise LexigramError(
                    f"{key} has values beyond {most:g}, the largest {dtype}; store it in another --dtype"
                )
        content = raw(values.cpu().contiguous())
        of_all.update(f"{key} {values.dtype} {tuple(values.shape)}".encode())
        of_all.update(content)
        if key in own:
            of_targets.update(raw(values.T.cpu().contiguous()) if own[key].transposed else content)
        step()
    return Digests(of_targets.hexdigest(), of_all.hexdigest())


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse a parameter of a loaded model that is NaN or infinite.

    Raises:
        LexigramError: that names the parameter, and the model by `name`.
    """
    for key, values in model.named_parameters():
        if values.is_floating_point() and not values.is_meta:
            _check_finite(_largest(values.detach()), key, name)


def _largest(values: Tensor) -> float:
    """The largest magnitude, without another tensor of this size; NaN where there is one."""
    return max(abs(float(bound)) for bound in values.aminmax()) if values.numel() else 0.0


def _check_finite(largest: float, key: str, name: str) -> None:
    if not math.isfinite(largest):
        raise LexigramError(f"{name} has values in {key} that are not finite (NaN or infinity); mend the checkpoint")


def weights_sha256(weights: Weights, targets: Iterable[Target]) -> str:
    """The first of the `Digests`, by itself."""
    digest = hashlib.sha256()
    for target in targets:
        digest.update(raw(weights.weight(target).detach().cpu().contiguous()))
    return digest.hexdigest()


def model_sha256(digests: Digests, config: Any) -> str:
    """Of all weights and the config, wherever it lies: whatever is before a layer decides its inputs."""
    content = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    return hashlib.sha256(f"{digests.all}{json.dumps(content, sort_keys=True, default=str)}".encode()).hexdigest()
