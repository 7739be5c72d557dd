"""LoRA beside compressed layers, by PEFT, and merged into their forms.

The oracles: the same adapters beside the dense weights that the forms stand for; the product of the rounded matrices; the bytes
that rank, inputs and outputs make.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lexigram
from checkpoints import IDS, WEIGHTS, logits
from conftest import toy_folder
from drawn import normal
from lexigram import LexigramError, Recipe
from lexigram.factors import (
    Bfloat,
    Codec,
    Dense,
    DenseSpec,
    Factor,
    Integer,
    Product,
    Sparse,
    SparseSpec,
    Sum,
    encode,
)
from lexigram.records import read_run
from lexigram.transformers_io import FactoredLinear, factored_layers

peft = pytest.importorskip("peft")

FORMS: dict[str, dict[str, Any]] = {
    "shared dictionaries": {"method": {"name": "cospadi", "iterations": 2}, "share": "site"},
    "shared bases": {"method": {"name": "svd"}, "group": 2, "share": "consecutive"},
    "int3": {"method": {"name": "quantize", "value_bits": 3}, "ratio": 0.7},
    "low rank + sparse": {"method": {"name": "oats", "rounds": 3}},
    "double-sparse": {"method": {"name": "double-sparse", "iterations": 3}, "ratio": 0.8},
}
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def compressed(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A toy in one of the forms; made once, so nobody may write into it."""
    made: dict[Any, Path] = {}
    place = tmp_path_factory.mktemp("adapters")

    def compress(form: str = "shared bases", toy: str = "llama", **settings: Any) -> Path:
        key = (form, toy, *settings.items().__str__().split())
        if key not in made:
            model = place / toy
            if not model.exists():
                toy_folder(model, toy)
            calibration = {"text": str(words), "sequences": 8, "length": 32}
            common = {"model": str(model), "ratio": 0.5, "device": "cpu", "compute_dtype": "float32"}
            made[key] = place / f"{len(made)}"
            lexigram.compress(
                Recipe.parse({**common, "calibration": calibration, **FORMS[form], **settings}), made[key]
            )
        return made[key]

    return compress


def opened(folder: Path, **options: Any) -> Any:
    return lexigram.load(folder, dtype=torch.float32, **options)


def adapted(model: nn.Module, **options: Any) -> Any:
    """With adapters that already do something; the same ones for models of the same layers."""
    config = peft.LoraConfig(**{"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM", **options})
    found = peft.get_peft_model(model, config)
    with torch.no_grad():
        own = [parameter for name, parameter in found.named_parameters() if "lora_" in name]
        for number, parameter in enumerate(own):
            parameter.copy_(0.1 * normal(*parameter.shape, seed=number))
    return found


def beside(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers around compressed ones, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), FactoredLinear)
    }


def saved_adapter(folder: Path, out: Path, **options: Any) -> Path:
    adapted(opened(folder), **options).save_pretrained(out)
    return out


# ---------------------------------------------------------------------------------------------------------- beside a layer


@pytest.mark.parametrize("form", FORMS)
def test_adapters_train_as_beside_dense_weights(form: str, compressed: Callable[..., Path]) -> None:
    """`all-linear` finds every compressed layer; outputs and gradients are those of the dense model, and stored values stay."""
    folder = compressed(form)
    before = load_file(folder / WEIGHTS)
    gradients = []
    for dense in (False, True):
        torch.manual_seed(0)
        model = adapted(opened(folder, dense=dense))
        assert len(beside(model)) == (0 if dense else len(read_run(folder).layers))
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if not dense:
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
            assert model(input_ids=IDS, labels=IDS).loss.item() < loss.item()
            stored = model.unload().state_dict()
            assert all(torch.equal(stored[name], tensor) for name, tensor in before.items() if ".factors." in name)
    assert gradients[0].keys() == gradients[1].keys()
    assert all("lora_" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6, rtol=1e-3), name


@pytest.mark.parametrize("toy", ["gpt2", "phi", "gemma3"])
def test_other_architectures(toy: str, compressed: Callable[..., Path]) -> None:
    folder = compressed("int3", toy)
    found, expected = (logits(adapted(opened(folder, dense=dense))) for dense in (False, True))
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, logits(opened(folder)), atol=1e-2)


@pytest.mark.parametrize("codec", [Bfloat(), Bfloat(bits=12), Integer(bits=4, group=16)], ids=str)
def test_gradients_in_the_inputs(codec: Codec) -> None:
    """Of both leaves, of products and sums of them, against differences in float64."""
    matrix = normal(6, 5, seed=1)
    dense = encode(matrix, DenseSpec(rows=6, cols=5, codec=codec))
    sparse = Sparse.encode(matrix * (matrix > 0), SparseSpec(rows=6, cols=5, nonzeros=20, codec=codec))
    square = Dense.encode(normal(5, 5, seed=2), DenseSpec(rows=5, cols=5, codec=codec))
    factors: list[Factor] = [dense, sparse, Product(sparse, square), Sum(dense, Product(dense, square))]
    for factor in factors:
        x = normal(3, 5, seed=3).double().requires_grad_()
        assert torch.autograd.gradcheck(FactoredLinear(factor), (x,))
        assert torch.autograd.gradgradcheck(FactoredLinear(factor), (x,))


def test_no_decoded_matrix_waits_for_the_gradient(compressed: Callable[..., Path]) -> None:
    """What autograd keeps of compressed layers would otherwise be the dense model."""
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    for form in FORMS:
        for _, layer in factored_layers(opened(compressed(form))):
            x = normal(2, 7, layer.in_features).requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                layer(x)
            assert kept == []
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                nn.functional.linear(x, layer.factors.to_dense())
            assert sorted(kept.pop()) == sorted(layer.weight.shape)
            kept.clear()


def test_a_saved_adapter_is_found_again(compressed: Callable[..., Path], tmp_path: Path) -> None:
    folder = compressed()
    model = adapted(opened(folder))
    model.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(opened(folder), tmp_path / "lora")
    assert torch.equal(logits(again), logits(model))
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own.load_adapter(str(tmp_path / "lora"))
    assert torch.equal(logits(own), logits(model))


def test_a_trainer_trains_adapters_and_nothing_else(compressed: Callable[..., Path], tmp_path: Path) -> None:
    folder = compressed()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "none"), use_cpu=True, report_to=[], max_steps=6, learning_rate=0.01, logging_steps=1
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    with pytest.raises(ValueError, match=r"attach trainable adapters"):
        Trainer(model=opened(folder), args=arguments, train_dataset=rows)
    model = adapted(opened(folder), init_lora_weights=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    stored = model.unload().state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in load_file(folder / WEIGHTS).items())


# --------------------------------------------------------------------------------------------- what asks for a weight


def test_what_would_change_a_weight_is_refused(compressed: Callable[..., Path]) -> None:
    """PEFT's own merging, and adapters that begin with a part of the weight; the model computes as before."""
    folder = compressed()
    model = adapted(opened(folder))
    expected = logits(model)
    refusal = r"held as factors and has no weight to read or change.*lexigram\.merge_adapters"
    for merging in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(LexigramError, match=refusal):
            merging()
        assert torch.equal(logits(model), expected)
    for start in ("pissa", "olora"):
        with pytest.raises(LexigramError, match=refusal):
            peft.get_peft_model(
                opened(folder), peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=start)
            )


def test_a_layer_tells_its_shape_and_gives_no_values(compressed: Callable[..., Path]) -> None:
    for name, layer in factored_layers(opened(compressed("shared dictionaries"))):
        assert isinstance(layer, nn.Linear)
        assert tuple(layer.weight.shape) == (layer.out_features, layer.in_features)
        assert layer.weight.device == torch.device("cpu")
        assert not hasattr(layer.weight, "data")
        assert "weight" not in dict(layer.named_parameters()), name
        with pytest.raises(LexigramError, match="no weight to read or change"):
            layer.weight.sum()


# ---------------------------------------------------------------------------------------------------------- merged


def bfloat(matrix: Tensor) -> Tensor:
    return matrix.bfloat16().float()


@pytest.mark.parametrize("form", FORMS)
def test_merged_layers_are_the_sum(form: str, compressed: Callable[..., Path], tmp_path: Path) -> None:
    """``M + bf(s B) bf(A)``; what is saved and loaded again computes the same, to the bit."""
    folder = compressed(form)
    model = adapted(opened(folder), lora_alpha=6, use_rslora=True)
    around = beside(model)
    expected = {}
    for name, layer in around.items():
        scaled = layer.scaling["default"] * layer.lora_B["default"].weight
        assert layer.scaling["default"] == pytest.approx(3)
        product = bfloat(scaled) @ bfloat(layer.lora_A["default"].weight)
        expected[name.removeprefix("base_model.model.")] = layer.base_layer.factors.to_dense() + product
    wanted = logits(model)
    merged = lexigram.merge_adapters(model)
    assert type(merged) is type(opened(folder))
    found = dict(factored_layers(merged))
    assert found.keys() == expected.keys() == {layer.name for layer in read_run(folder).layers}
    with torch.no_grad():
        for name, matrix in expected.items():
            assert torch.allclose(found[name].factors.to_dense(), matrix, atol=1e-6)
    assert torch.allclose(logits(merged), wanted, atol=0.05)
    assert not torch.allclose(logits(opened(folder)), wanted, atol=0.2)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(opened(tmp_path / "merged")), logits(merged))


def test_several_active_adapters_are_added(compressed: Callable[..., Path]) -> None:
    model = adapted(opened(compressed()))
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    wanted = logits(model)
    merged = lexigram.merge_adapters(model)
    ranks = {name.rpartition(".")[2]: layer.factors.right.left.spec.cols for name, layer in factored_layers(merged)}
    assert ranks.pop("q_proj") == 6
    assert set(ranks.values()) == {4}
    assert torch.allclose(logits(merged), wanted, atol=0.05)


def test_the_bias_of_an_adapter_is_added_to_that_of_the_layer(compressed: Callable[..., Path]) -> None:
    model = adapted(opened(compressed("int3", "gpt2")), lora_bias=True)
    wanted = logits(model)
    assert torch.allclose(logits(lexigram.merge_adapters(model)), wanted, atol=0.05)
    model = adapted(opened(compressed()), lora_bias=True)
    with pytest.raises(LexigramError, match="has a bias, and the layer has none"):
        lexigram.merge_adapters(model)


def test_ordinary_layers_are_merged_by_peft(compressed: Callable[..., Path], tmp_path: Path) -> None:
    folder = compressed(include=["q_proj"])
    model = adapted(opened(folder))
    assert all("q_proj" in name for name in beside(model))
    wanted = logits(model)
    merged = lexigram.merge_adapters(model)
    assert torch.allclose(logits(merged), wanted, atol=0.05)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(opened(tmp_path / "merged")), logits(merged))


def test_what_cannot_be_merged_is_refused_and_left(compressed: Callable[..., Path]) -> None:
    with pytest.raises(LexigramError, match="LlamaForCausalLM has no adapters to merge"):
        lexigram.merge_adapters(opened(compressed()))
    model = adapted(opened(compressed()))
    expected = logits(model)
    with torch.no_grad():
        last = list(beside(model).values())[-1].lora_A["default"].weight
        before = last.clone()
        last[0, 0] = float("nan")
    with pytest.raises(LexigramError, match=r"adapter of .*down_proj cannot be stored: .*finite"):
        lexigram.merge_adapters(model)
    with torch.no_grad():
        last.copy_(before)
    assert torch.equal(logits(model), expected)
    others = {
        "IA3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False),
        "LoHa": peft.LoHaConfig(target_modules=["q_proj"], r=2),
        "a variant": peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
    }
    for name, config in others.items():
        other = peft.get_peft_model(opened(compressed()), config)
        with pytest.raises(LexigramError, match=r"LoRA alone can be merged|is no plain LoRA \(ALora"):
            lexigram.merge_adapters(other)
        assert beside(other), name
