"""The module that stands where a linear layer stood, and the swap between the two. Evaluates any factor expression."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lexigram.errors import LexigramError
from lexigram.factors import Factor, FactorSpec, with_leaves

SHARED = "lexigram_shared"
"""The model's submodule that holds what several layers share; its tensors are stored once, under this prefix."""


class LayerSpec(BaseModel):
    """One compressed layer as data: its factors, whether it has a bias, whether the original stored (in, out)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factors: FactorSpec
    bias: bool = False
    transposed: bool = False


class NoWeightError(LexigramError, AttributeError):
    """Values were asked of a matrix that is held as factors, or given to it."""


class CompressedWeight:
    """What a compressed layer has for a weight: its shape (out, in) and where it would be, and no values.

    Others may ask what they have to fit to, as PEFT does before it puts an adapter beside a layer. Whoever reads values or
    writes them, as merging an adapter would, is refused: a matrix that is multiplied out for the occasion would take the
    change and be thrown away with it.
    """

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        # The dtype of a layer is that of its inputs; what stands beside it is best kept exactly.
        vars(self).update(shape=torch.Size(shape), device=device, dtype=torch.float32)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refusal(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise self._refusal(name)

    def _refusal(self, name: str) -> NoWeightError:
        return NoWeightError(
            f"a compressed layer is held as factors and has no weight to read or change (`{name}` of {tuple(self.shape)}); "
            "LoRA that begins with zeros trains beside it, and `lexigram merge` merges it; for all else open the model with "
            "`lexigram.load(..., dense=True)`"
        )


class FactoredLinear(nn.Linear):
    """``y = x M^T + b`` with ``M (out, in)`` given by factors that are never multiplied out.

    A linear layer to those who go by the class, so that adapters (PEFT's LoRA) find it and train beside it; its weight is a
    `CompressedWeight`.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, factors: Factor, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features = factors.spec.cols, factors.spec.rows
        self.factors: Factor = factors
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
        self.transposed = transposed
        self._is_hf_initialized = True  # transformers would draw a weight

    @property
    def weight(self) -> CompressedWeight:  # type: ignore[override]
        """Where a weight would be, and how large."""
        return CompressedWeight((self.out_features, self.in_features), self.factors.device)

    @property
    def spec(self) -> LayerSpec:
        """This layer as data."""
        return LayerSpec(factors=self.factors.spec, bias=self.bias is not None, transposed=self.transposed)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., out) of inputs (..., in), in the dtype of the inputs (under autocast, of autocast)."""
        y: Tensor = self.factors(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """An ordinary layer with the same outputs: `nn.Linear`, or `Conv1D` where the original was one."""
        weight = self.factors.to_dense(dtype)
        with torch.device("meta"):
            if self.transposed:
                module: nn.Module = Conv1D(self.out_features, self.in_features)
                weight = weight.T.contiguous()
            else:
                module = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        module.weight = nn.Parameter(weight)
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.detach().to(dtype))
        elif self.transposed:  # Conv1D has no form without a bias
            module.bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=weight.device))
        return module


def factored_layers(model: nn.Module) -> Iterator[tuple[str, FactoredLinear]]:
    """(name, module) of every compressed layer, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            yield name, module


def make_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every compressed layer by an ordinary one, in place, one layer at a time."""
    for name, module in list(factored_layers(model)):
        model.set_submodule(name, module.dense(dtype))
    if hasattr(model, SHARED):
        delattr(model, SHARED)


def shared_matrices(model: nn.Module) -> dict[str, Factor]:
    """The matrices that several compressed layers share, by name."""
    held = getattr(model, SHARED, None)
    return {name: matrix for name, matrix in held.items() if isinstance(matrix, Factor)} if held is not None else {}


def share(model: nn.Module, matrices: Mapping[str, Factor]) -> None:
    """Let the model hold `matrices` for its layers, beside those that it holds already."""
    model.add_module(SHARED, nn.ModuleDict({**shared_matrices(model), **matrices}))


def replace_leaves(model: nn.Module, change: Callable[[Factor], Factor]) -> None:
    """Put ``change(leaf)`` in the place of every stored leaf, in place; what layers share is changed once, and stays shared."""
    shared = {name: with_leaves(matrix, change) for name, matrix in shared_matrices(model).items()}
    if shared:
        share(model, shared)
    for _, layer in factored_layers(model):
        layer.factors = with_leaves(layer.factors, change, shared)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the compressed layers and of what they share, by its name in a checkpoint."""
    matrices = {f"{name}.factors": layer.factors for name, layer in factored_layers(model)}
    matrices |= {f"{SHARED}.{name}": matrix for name, matrix in shared_matrices(model).items()}
    return {
        f"{name}.{part}": tensor for name, matrix in matrices.items() for part, tensor in matrix.state_dict().items()
    }
