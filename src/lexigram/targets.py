"""Which linear layers are compressed, and which of them see the same input. Reads structure and shapes, never weights.

Everything is found from the model itself, without knowing its architecture: a decoder layer is an element of the module
list that holds most linear weights; an input site is a set of linear layers that are called with one and the same tensor
in a forward pass on the meta device (q, k and v; gate and up; in Phi also fc1).
"""

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lexigram.errors import LexigramError


@dataclass(frozen=True)
class Target:
    """A linear layer to compress.

    `shape` is (out, in) whatever the module stores; `transposed` says that it stores (in, out), as GPT-2's Conv1D does.
    `layer` is the decoder layer's index, None outside of them. `site` names the input: the first target that sees it.
    `head_dim` is the width of a head where the module around it is an attention, and 1 elsewhere.
    """

    name: str
    shape: tuple[int, int]
    layer: int | None
    site: str
    transposed: bool
    bias: bool
    head_dim: int = 1

    @property
    def module(self) -> str:
        """The name of the module around it."""
        return self.name.rpartition(".")[0]

    @property
    def kind(self) -> str:
        """The projection's name within its layer, such as ``q_proj``."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def weight_count(self) -> int:
        """How many weights it has."""
        return self.shape[0] * self.shape[1]

    @property
    def dense_bytes(self) -> int:
        """What the weight takes uncompressed, in bfloat16."""
        return 2 * self.weight_count


def find_targets(skeleton: PreTrainedModel, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Target]:
    """The layers to compress, in the model's order.

    Args:
        skeleton: the model on the meta device.
        include: glob patterns over full module names; by default every linear layer inside the decoder layers. A pattern may
            reach outside of them (``lm_head``).
        exclude: glob patterns taken away from these.

    Raises:
        LexigramError: for a pattern that matches nothing, a layer tied to an embedding, or an empty result.
    """
    container = decoder_layers_name(skeleton)
    linears = {name: module for name, module in skeleton.named_modules() if is_linear(module)}
    inside = [name for name in linears if name.startswith(f"{container}.")]
    chosen = _matching(include, list(linears)) if include else set(inside)
    chosen -= _matching(exclude, list(linears))
    tied = _tied_to_embedding(skeleton)
    for name in chosen & tied:
        raise LexigramError(f"{name} shares its weight with the input embedding and cannot be compressed; exclude it")
    if not chosen:
        raise LexigramError("no linear layer is left to compress; loosen --include and --exclude")
    sites = _input_sites(skeleton, [name for name in linears if name in chosen])
    return [_target(skeleton, name, container, sites[name]) for name in linears if name in chosen]


def check_separate(skeleton: PreTrainedModel, targets: Sequence[Target]) -> None:
    """Raise LexigramError where outputs of a target cannot go without changing the others.

    A sign of that is another parameter of its module that runs over all of its outputs, but for a single head: a norm over
    all heads, as OLMo 2 has one.
    """
    for target in targets:
        module = skeleton.get_submodule(target.module)
        for name, parameter in module.named_parameters():
            owner = module.get_submodule(name.rpartition(".")[0])
            if parameter.shape == (target.shape[0],) and target.shape[0] != target.head_dim and not is_linear(owner):
                raise LexigramError(
                    f"{target.module}.{name} runs over all outputs of {target.name}, so that none can go without changing the "
                    "others; leave this module out with --exclude, or take another method"
                )


def decoder_layers_name(model: nn.Module) -> str:
    """The name of the module list whose elements are the decoder layers.

    Raises:
        LexigramError: where no module list holds linear layers.
    """
    weight = {
        name: sum(sum(p.numel() for p in m.parameters()) for m in module.modules() if is_linear(m))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    best = max(weight, key=lambda name: (weight[name], -name.count(".")), default="")
    if not weight.get(best):
        raise LexigramError(f"{type(model).__name__} has no list of decoder layers with linear layers in it")
    return best


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers themselves, in order."""
    layers = model.get_submodule(decoder_layers_name(model))
    assert isinstance(layers, nn.ModuleList)
    return layers


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as (out, in), whatever the module stores."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer that can be replaced."""
    return isinstance(module, (nn.Linear, Conv1D)) and isinstance(module.weight, torch.Tensor)


def _target(skeleton: PreTrainedModel, name: str, container: str, site: str) -> Target:
    module = skeleton.get_submodule(name)
    head_dim = getattr(skeleton.get_submodule(name.rpartition(".")[0]), "head_dim", None)
    out_features, in_features = weight_of(module).shape
    inside = name.startswith(f"{container}.")
    return Target(
        name=name,
        shape=(out_features, in_features),
        layer=int(name[len(container) + 1 :].split(".", 1)[0]) if inside else None,
        site=site,
        transposed=isinstance(module, Conv1D),
        bias=module.bias is not None,
        head_dim=head_dim if isinstance(head_dim, int) else 1,
    )


def _matching(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatch.fnmatchcase(name, pattern) or name.endswith(f".{pattern}")}
        if not hits:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
            near = difflib.get_close_matches(pattern, [*kinds, *names], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the kinds are {', '.join(kinds)}"
            raise LexigramError(f"no linear layer matches {pattern!r}; {hint}")
        matched |= hits
    return matched


def _tied_to_embedding(model: PreTrainedModel) -> set[str]:
    """Names of linear layers whose weight is the embedding's (tied by the config; the skeleton may not have tied yet)."""
    head = model.get_output_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return set()
    return {name for name, module in model.named_modules() if module is head}


def _input_sites(skeleton: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """For every name the first name that is called with the same input tensor.

    A model that cannot run on the meta device (data-dependent routing), for whatever reason, gets one site a layer: dearer,
    never wrong.
    """
    inputs: dict[str, torch.Tensor] = {}  # holds the tensors: an id may be given out again once its tensor is gone

    def note(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], dict[str, torch.Tensor]], None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            inputs.setdefault(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    hooks = [skeleton.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in names]
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            skeleton(input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=tokens, use_cache=False)
    except Exception:  # whatever the model's own code raises where there are no values
        return {name: name for name in names}
    finally:
        for hook in hooks:
            hook.remove()
    first: dict[int, str] = {}
    return {name: first.setdefault(id(inputs[name]), name) if name in inputs else name for name in names}
