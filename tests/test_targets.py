"""Which layers are found in which architecture, and which of them share an input.

The oracle for sites is a real forward pass in the test: layers share a site exactly if they are given equal inputs.
"""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.pytorch_utils import Conv1D

from conftest import TOYS, build_toy
from lexigram.errors import LexigramError
from lexigram.targets import (
    Target,
    decoder_layers,
    decoder_layers_name,
    find_targets,
    is_linear,
    weight_of,
)

LLAMA_SITES = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
SITES = dict.fromkeys(("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma3"), LLAMA_SITES) | {
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "phi": [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],
}
"""Of one decoder layer: the layers on each site, in the model's order, by the end of their names."""

LLAMA_SHAPES = {
    "q_proj": (64, 64),
    "k_proj": (32, 64),
    "v_proj": (32, 64),
    "o_proj": (64, 64),
    "gate_proj": (128, 64),
    "up_proj": (128, 64),
    "down_proj": (64, 128),
}
SHAPES = dict.fromkeys(("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma3"), LLAMA_SHAPES) | {
    "gpt2": {"attn.c_attn": (192, 64), "attn.c_proj": (64, 64), "mlp.c_fc": (256, 64), "mlp.c_proj": (64, 256)},
    "phi": {
        **{kind: LLAMA_SHAPES[kind] for kind in ("q_proj", "k_proj", "v_proj")},
        "dense": (64, 64),
        "fc1": (128, 64),
        "fc2": (64, 128),
    },
}
BIAS = {"gpt2": set(SHAPES["gpt2"]), "phi": set(SHAPES["phi"]), "qwen2": {"q_proj", "k_proj", "v_proj"}}


def skeleton(config: PreTrainedConfig | str) -> PreTrainedModel:
    config = TOYS[config]() if isinstance(config, str) else config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def ending(target: Target, endings: Any) -> str:
    [found] = [end for end in endings if target.name.endswith(f".{end}")]
    return found


def test_the_table_has_every_toy() -> None:
    assert SITES.keys() == SHAPES.keys() == TOYS.keys()


@pytest.mark.parametrize("name", sorted(TOYS))
def test_targets_of_every_architecture(name: str) -> None:
    model = skeleton(name)
    targets = find_targets(model)
    kinds = SHAPES[name]
    assert [target.layer for target in targets] == [0] * len(kinds) + [1] * len(kinds)
    assert {ending(target, kinds) for target in targets} == set(kinds)
    for target in targets:
        end = ending(target, kinds)
        module = model.get_submodule(target.name)
        assert target.shape == kinds[end]
        assert target.weight_count == kinds[end][0] * kinds[end][1]
        assert target.transposed == isinstance(module, Conv1D) == (name == "gpt2")
        assert target.bias == (end in BIAS.get(name, ()))
        assert target.kind == end.rsplit(".", 1)[-1]
        assert weight_of(module).shape == target.shape


@pytest.mark.parametrize("name", sorted(TOYS))
def test_layers_on_one_site_see_one_input(name: str) -> None:
    targets = find_targets(skeleton(name))
    for layer in (0, 1):
        sites: dict[str, list[str]] = {}
        for target in (target for target in targets if target.layer == layer):
            sites.setdefault(target.site, []).append(ending(target, SHAPES[name]))
        assert sorted(sorted(members) for members in sites.values()) == sorted(sorted(site) for site in SITES[name])
    by_name = {target.name: target for target in targets}
    order = list(by_name)
    for target in targets:
        assert by_name[target.site].site == target.site, "a site is named by a target on it"
        assert order.index(target.site) <= order.index(target.name), "by the first one"


@pytest.mark.parametrize("name", sorted(TOYS))
def test_sites_agree_with_a_real_forward_pass(name: str) -> None:
    model = build_toy(name)
    targets = find_targets(skeleton(name))
    seen: dict[str, torch.Tensor] = {}
    for target in targets:
        model.get_submodule(target.name).register_forward_pre_hook(
            lambda _module, args, key=target.name: seen.__setitem__(key, args[0].clone())
        )
    with torch.no_grad():
        model(input_ids=torch.arange(3, 13)[None])
    for a in targets:
        for b in targets:
            same = seen[a.name].shape == seen[b.name].shape and torch.equal(seen[a.name], seen[b.name])
            assert same == (a.site == b.site), (a.name, b.name)


@pytest.mark.parametrize(("name", "container"), [("llama", "model.layers"), ("gpt2", "transformer.h")])
def test_decoder_layers_are_found(name: str, container: str) -> None:
    model = skeleton(name)
    assert decoder_layers_name(model) == container
    assert decoder_layers(model) is model.get_submodule(container)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(LexigramError, match="Sequential has no list of decoder layers"):
        decoder_layers_name(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.LayerNorm(2)])))


def test_a_list_inside_the_layers_is_not_taken_for_them() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block()])  # as many weights as the list within it
            self.heads = nn.ModuleList([nn.Linear(2, 2)])

    assert decoder_layers_name(Model()) == "blocks"


def test_weights_are_given_as_out_by_in() -> None:
    conv = Conv1D(5, 3)  # 3 inputs, 5 outputs, stores (3, 5)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert weight_of(conv).shape == (5, 3)
    assert torch.allclose(conv(x) - conv.bias, x @ weight_of(conv).T)
    assert is_linear(conv)
    assert is_linear(nn.Linear(2, 2))
    assert not is_linear(nn.Embedding(2, 2))


def kinds(targets: list[Target]) -> set[str]:
    return {target.kind for target in targets}


def test_include_and_exclude_patterns() -> None:
    model = skeleton("llama")
    everything = find_targets(model)
    assert kinds(find_targets(model, include=["q_proj"])) == {"q_proj"}
    assert len(find_targets(model, include=["q_proj"])) == 2
    assert kinds(find_targets(model, include=["*.mlp.*"])) == {"gate_proj", "up_proj", "down_proj"}
    assert [t.name for t in find_targets(model, include=["model.layers.1.self_attn.o_proj"])] == [
        "model.layers.1.self_attn.o_proj"
    ]
    assert kinds(find_targets(model, exclude=["down_proj", "*.self_attn.*"])) == {"gate_proj", "up_proj"}
    assert {t.layer for t in find_targets(model, exclude=["model.layers.0.*"])} == {1}
    assert find_targets(model, include=["*.self_attn.*", "*.mlp.*"]) == everything
    assert kinds(find_targets(model, include=["*_proj"], exclude=["q_proj"])) == kinds(everything) - {"q_proj"}
    # "proj" is no whole name, so it is no kind either.
    with pytest.raises(LexigramError, match="no linear layer matches 'proj'"):
        find_targets(model, include=["proj"])


def test_a_site_is_named_by_a_chosen_layer() -> None:
    targets = find_targets(skeleton("llama"), exclude=["q_proj"])
    sites = {target.name: target.site for target in targets}
    for layer in (0, 1):
        attention = f"model.layers.{layer}.self_attn"
        assert sites[f"{attention}.k_proj"] == sites[f"{attention}.v_proj"] == f"{attention}.k_proj"


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_wrong_pattern_names_the_nearest(where: str) -> None:
    with pytest.raises(LexigramError, match=r"no linear layer matches 'dwon_proj'; did you mean 'down_proj'\?"):
        find_targets(skeleton("llama"), **{where: ["dwon_proj"]})
    with pytest.raises(LexigramError, match=r"'12345'; the kinds are .*down_proj.*lm_head.*q_proj"):
        find_targets(skeleton("llama"), **{where: ["12345"]})


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(LexigramError, match="no linear layer is left"):
        find_targets(skeleton("llama"), exclude=["*_proj"])
    with pytest.raises(LexigramError, match="no linear layer is left"):
        find_targets(skeleton("llama"), include=["q_proj"], exclude=["q_proj"])


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2"])
def test_a_tied_head_is_refused_and_left_alone_by_default(name: str) -> None:
    model = skeleton(name)
    assert TOYS[name]().tie_word_embeddings
    assert "lm_head" not in {target.name for target in find_targets(model)}
    with pytest.raises(LexigramError, match="lm_head shares its weight with the input embedding"):
        find_targets(model, include=["lm_head"])
    assert find_targets(model, include=["*"], exclude=["lm_head"]) == find_targets(model)


def test_an_untied_head_can_be_included() -> None:
    targets = find_targets(skeleton("llama"), include=["*"])
    assert targets[:-1] == find_targets(skeleton("llama"))
    assert targets[-1] == Target("lm_head", (200, 64), None, "lm_head", transposed=False, bias=False)


def test_routed_experts_fall_back_to_a_site_a_layer() -> None:
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=50,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    targets = find_targets(skeleton(config))
    assert kinds(targets) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for target in targets:
        assert target.site in (target.name, target.name.rsplit(".", 1)[0] + ".q_proj")


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, TypeError, ValueError, KeyError, IndexError])
def test_a_model_that_cannot_run_without_values_falls_back(error: type[Exception]) -> None:
    model = skeleton("llama")

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error("needs values")

    model.model.layers[1].mlp.forward = fail
    targets = find_targets(model)
    assert len(targets) == 14
    assert all(target.site == target.name for target in targets)
    assert not any(module._forward_pre_hooks for module in model.modules()), "no hook is left behind"


def test_finding_targets_leaves_no_hooks() -> None:
    model = skeleton("phi")
    find_targets(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
