"""LoRA beside compressed layers, by PEFT, and merged into their forms.

The oracles: the same adapters beside the dense weights that the forms stand for; the product of the rounded matrices; the bytes
that rank, inputs and outputs make.
"""

import copy
import errno
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lexigram
from checkpoints import IDS, WEIGHTS, edit_tensors, logits
from conftest import TEMPLATE, Command, contents, templated_folder, toy_folder
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
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{words}")
    for words in ("is_gradient_checkpointing", "fan_in_fan_out", "merging LoRA weights won't be possible")
]

FORMS: dict[str, dict[str, Any]] = {
    "shared dictionaries": {"method": {"name": "cospadi", "iterations": 2}, "share": "site"},
    "shared bases": {"method": {"name": "svd"}, "group": 2, "share": "consecutive"},
    "int3": {"method": {"name": "quantize", "value_bits": 3}, "ratio": 0.7},
    "low rank + sparse": {"method": {"name": "oats", "rounds": 3}},
    "double-sparse": {"method": {"name": "double-sparse", "iterations": 2, "tightening": 2}, "ratio": 0.8},
}
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def compressed(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A toy in one of the forms; made once, so nobody may write into it."""
    made: dict[Any, Path] = {}
    place = tmp_path_factory.mktemp("adapters")

    def compress(form: str = "shared bases", toy: str = "llama", **settings: Any) -> Path:
        key = json.dumps([form, toy, settings])
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


def test_what_is_kept_for_gradients_are_stored_tensors(compressed: Callable[..., Path]) -> None:
    """Decoded, they would be the dense model."""
    for form in FORMS:
        model = opened(compressed(form))
        stored = {tensor.data_ptr() for tensor in model.state_dict().values() if not tensor.is_floating_point()}
        for _, layer in factored_layers(model):
            kept: list[Tensor] = []
            x = normal(2, 7, layer.in_features).requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
                layer(x)
            assert kept
            assert {tensor.data_ptr() for tensor in kept if tensor.numel()} <= stored


@pytest.mark.parametrize("form", ["int3", "shared bases", "low rank + sparse"])
def test_gradients_through_layers_that_are_offloaded(
    form: str, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    """Their tensors are gone again when the gradient is asked for."""
    found = []
    for offloaded in (False, True):
        model = opened(compressed(form)).requires_grad_(False)
        if offloaded:
            accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
        embedded = normal(2, 15, 64).requires_grad_()
        model(inputs_embeds=embedded, labels=IDS).loss.backward()
        found.append(embedded.grad)
    assert torch.allclose(*found, rtol=1e-5)


def test_transforms_of_functions(compressed: Callable[..., Path]) -> None:
    [(_, layer), *_] = factored_layers(opened(compressed("low rank + sparse")))
    x, direction = normal(3, layer.in_features, seed=1), normal(3, layer.in_features, seed=2)
    matrix = layer.factors.to_dense()
    gradient = torch.func.grad(lambda x: layer(x).sum())(x)
    assert torch.allclose(gradient, matrix.sum(0).expand(3, -1), atol=1e-5)
    _, forwards = torch.func.jvp(layer, (x.requires_grad_(),), (direction,))
    assert torch.allclose(forwards, direction @ matrix.T, atol=1e-5)


def test_a_saved_adapter_is_found_again(compressed: Callable[..., Path], tmp_path: Path) -> None:
    folder = compressed()
    model = adapted(opened(folder))
    model.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(opened(folder), tmp_path / "lora")
    assert torch.equal(logits(again), logits(model))
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own.load_adapter(str(tmp_path / "lora"))
    assert torch.equal(logits(own), logits(model))
    own.save_pretrained(tmp_path / "own")  # of such a model transformers saves the adapters, and a Trainer does so
    assert {file.name for file in (tmp_path / "own").iterdir()} >= {"adapter_config.json", ADAPTER}
    assert not (tmp_path / "own" / "config.json").exists()
    first, second = (load_file(tmp_path / name / ADAPTER) for name in ("lora", "own"))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    with pytest.raises(LexigramError, match="its adapters from `add_adapter` or `load_adapter`; save them, and open"):
        lexigram.merge_adapters(own)


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
    refusal = r"held as factors and has no weight to read or change \(`data` of.*`lexigram merge` merges it"
    for merging in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(LexigramError, match=refusal):
            merging()
        assert torch.equal(logits(model), expected)
    others = [
        peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights="pissa"),
        peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights="olora"),
        peft.AdaLoraConfig(target_modules="all-linear", total_step=10),
    ]
    for config in others:
        with pytest.raises(LexigramError, match="has no weight to read or change"):
            peft.get_peft_model(opened(folder), config)
    with pytest.raises(TypeError, match=r"got <class '.*CompressedWeight'>"):
        peft.get_peft_model(opened(folder), peft.LoraConfig(target_modules="all-linear", use_dora=True))


def test_a_layer_tells_its_shape_and_gives_no_values(compressed: Callable[..., Path]) -> None:
    for name, layer in factored_layers(opened(compressed("shared dictionaries"))):
        assert isinstance(layer, nn.Linear)
        assert tuple(layer.weight.shape) == (layer.out_features, layer.in_features)
        assert layer.weight.device == torch.device("cpu")
        assert not hasattr(layer.weight, "data")
        assert "weight" not in dict(layer.named_parameters()), name
        with pytest.raises(LexigramError, match="no weight to read or change"):
            layer.weight.sum()
        with pytest.raises(LexigramError, match="no weight to read or change"):
            layer.weight.data = torch.zeros(1)
        assert copy.deepcopy(layer.weight).shape == pickle.loads(pickle.dumps(layer.weight)).shape == layer.weight.shape


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
    with pytest.raises(LexigramError, match=r"values in .*down_proj\.lora_A.* that are not finite"):
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
        with pytest.raises(LexigramError, match=r"is (ia3|loha), and LoRA alone can|is no plain LoRA \(ALora"):
            lexigram.merge_adapters(other)
        assert beside(other), name


def test_what_peft_does_not_merge_leaves_compressed_layers_as_they_were(compressed: Callable[..., Path]) -> None:
    folder = compressed(include=["q_proj"])
    options = {"target_modules": ["k_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(opened(folder), peft.LoraConfig(**options, lora_bias=True))
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected, before = logits(model), beside(model)
    with pytest.raises(
        LexigramError, match=r"PEFT does not merge .* not compressed: RuntimeError: Impossible to merge"
    ):
        lexigram.merge_adapters(model)
    assert beside(model) == before != {}
    assert torch.equal(logits(model), expected)


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def adapter(compressed: Callable[..., Path], tmp_path: Path) -> Path:
    """Of the default toy."""
    return saved_adapter(compressed(), tmp_path / "lora")


def test_a_merged_folder_is_a_compressed_one(
    compressed: Callable[..., Path], adapter: Path, tmp_path: Path, command: Command, words: Path
) -> None:
    folder = compressed()
    before = contents(folder)
    ended = command("merge", folder, "--adapter", adapter, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "the forms grew by" in ended.out
    assert contents(folder) == before
    old, new = read_run(folder), read_run(tmp_path / "out")
    grown = sum(2 * 4 * sum(layer.shape) for layer in old.layers)
    assert new.bytes_after - old.bytes_after == new.merged[0].bytes == grown
    assert new.model_bytes_after - old.model_bytes_after == grown
    weights = sum(rows * cols for rows, cols in (layer.shape for layer in old.layers))
    assert new.bits_per_weight - old.bits_per_weight == pytest.approx(8 * grown / weights)
    assert new.parameter_ratio == pytest.approx(old.parameter_ratio - grown / 2 / weights)
    assert new.ratio == pytest.approx(1 - new.bytes_after / new.bytes_before)
    assert new.merged[0].changed == []
    sizes = {name: tensor.nbytes for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items()}
    assert sum(sizes.values()) == new.model_bytes_after
    model = peft.PeftModel.from_pretrained(opened(folder), adapter)
    assert torch.equal(logits(opened(tmp_path / "out")), logits(lexigram.merge_adapters(model)))
    found = lexigram.verify(tmp_path / "out", against=old.model, texts=[str(words)], length=32)
    assert found.passed, found.failed
    [errors] = [check for check in found.checks if check.name == "layer errors"]
    assert errors.passed is None
    assert "before merging" in errors.message
    assert len(command("inspect", tmp_path / "out").out.split("before merging")) == 3
    assert command("verify", tmp_path / "out").code == 0


def test_files_in_folders_are_merged_with_the_others(words: Path, tmp_path: Path) -> None:
    calibration = {"text": str(words), "sequences": 8, "length": 32}
    settings = {"model": str(templated_folder(tmp_path / "toy")), "ratio": 0.5, "device": "cpu"}
    small = tmp_path / "small"
    lexigram.compress(Recipe.parse({**settings, "calibration": calibration, "method": {"name": "svd"}}), small)
    (small / ".git").mkdir()
    record = lexigram.merge(small, saved_adapter(small, tmp_path / "lora"), tmp_path / "out")
    assert (tmp_path / "out" / TEMPLATE).read_bytes() == (small / TEMPLATE).read_bytes()
    assert TEMPLATE in record.files_sha256
    assert not (tmp_path / "out" / ".git").exists()
    assert lexigram.verify(tmp_path / "out").passed


def test_merging_goes_on_from_healed_and_from_merged(
    compressed: Callable[..., Path], adapter: Path, tmp_path: Path, words: Path
) -> None:
    settings = lexigram.HealingSettings.parse(
        {"texts": str(words), "sequences": 8, "held_out": 4, "length": 32, "batch": 4, "steps": 2, "warmup": 1}
    )
    lexigram.merge(compressed(), adapter, tmp_path / "once")
    with pytest.raises(LexigramError, match=r"an adapter was merged into it, which its original .* does not have"):
        lexigram.heal(tmp_path / "once", tmp_path / "healed", settings, device="cpu")
    settings = settings.model_copy(update={"objective": "tokens"})
    healed = lexigram.heal(tmp_path / "once", tmp_path / "healed", settings, device="cpu")
    assert healed.done_since_fit == "healing and merging"
    again = saved_adapter(tmp_path / "healed", tmp_path / "again", target_modules=["up_proj"])
    twice = lexigram.merge(tmp_path / "healed", again, tmp_path / "twice")
    assert len(twice.merged) == 2
    assert lexigram.verify(tmp_path / "twice", against=twice.model).passed
    model = peft.PeftModel.from_pretrained(opened(tmp_path / "healed"), again)
    assert torch.allclose(logits(opened(tmp_path / "twice")), logits(model), atol=0.05)


def test_what_is_not_compressed_may_be_changed_and_is_named(
    compressed: Callable[..., Path], tmp_path: Path, command: Command
) -> None:
    """Ordinary layers that have adapters, and a module that was trained as a whole."""
    folder = compressed(include=["q_proj"])
    model = peft.get_peft_model(
        opened(folder),
        peft.LoraConfig(
            target_modules=["q_proj", "k_proj"], modules_to_save=["post_attention_layernorm"], init_lora_weights=False
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "lora")
    ended = command("merge", folder, "-a", tmp_path / "lora", "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert (
        "no longer the original's: model.layers.0.post_attention_layernorm.weight, model.layers.0.self_attn.k"
        in ended.err
    )
    record = read_run(tmp_path / "out")
    kinds = {name.removesuffix(".weight").rpartition(".")[2] for name in record.merged[0].changed}
    assert kinds == {"k_proj", "post_attention_layernorm"}
    assert torch.allclose(logits(opened(tmp_path / "out")), wanted, atol=0.05)
    found = lexigram.verify(tmp_path / "out", against=record.model)
    assert found.passed, found.failed
    assert any("4 were changed by adapters" in check.message for check in found.checks)
    edit_tensors(tmp_path / "out", lambda tensors: tensors["model.layers.0.self_attn.v_proj.weight"].mul_(2))
    assert not lexigram.verify(tmp_path / "out", against=record.model).passed


def test_adapters_in_float32_leave_the_dtype_of_a_model(compressed: Callable[..., Path], tmp_path: Path) -> None:
    """The first parameter of a model decides what its config says."""
    folder = compressed(include=["q_proj"], dtype="bfloat16")
    model = peft.get_peft_model(
        opened(folder),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "lora")
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora" / ADAPTER).values()} == {torch.float32}
    record = lexigram.merge(folder, tmp_path / "lora", tmp_path / "out")
    grown = sum(2 * 8 * sum(layer.shape) for layer in record.layers)
    assert record.model_bytes_after == read_run(folder).model_bytes_after + grown
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    found = lexigram.verify(tmp_path / "out", against=record.model)
    assert found.passed, found.failed


def edit_adapter(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "adapter_config.json").read_text())
    change(content)
    (folder / "adapter_config.json").write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
STORED = "base_model.model.model.layers.0.self_attn.o_proj.base_layer.factors.left.values"
MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no adapter": (shutil.rmtree, "there is no folder .*lora; name the folder that PEFT"),
    "no config": (lambda lora: (lora / "adapter_config.json").unlink(), "adapter_config.json"),
    "no JSON": (lambda lora: (lora / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "no weights": (lambda lora: (lora / ADAPTER).unlink(), f"has no {ADAPTER}"),
    "cut short": (
        lambda lora: (lora / ADAPTER).write_bytes((lora / ADAPTER).read_bytes()[:-9]),
        "cannot be read: it has .* bytes, by its header",
    ),
    "another kind": (lambda lora: edit_adapter(lora, lambda it: it.update(peft_type="IA3")), "of the type 'IA3'"),
    "replicated": (
        lambda lora: edit_adapter(lora, lambda it: it.update(layer_replication=[[0, 2]])),
        "layer_replication",
    ),
    "another rank": (lambda lora: edit_adapter(lora, lambda it: it.update(r=10**9)), "cannot put the adapter"),
    "dora": (
        lambda lora: edit_adapter(lora, lambda it: it.update(use_dora=True)),
        "cannot put the adapter .*CompressedWeight",
    ),
    "a part of the weight": (
        lambda lora: edit_adapter(lora, lambda it: it.update(init_lora_weights="pissa")),
        "cannot put the adapter .*lora beside the model, since it changes weights that are compressed",
    ),
    "a module that is missing": (
        lambda lora: edit_adapter(lora, lambda it: it.update(modules_to_save=["lm_head"])),
        "lacks .*lm_head",
    ),
    "stored values": (
        lambda lora: edit_weights(lora, lambda it: it.update({STORED: torch.zeros(8, dtype=torch.uint8)})),
        "has .*factors.*unlike its configuration",
    ),
    "a norm": (
        lambda lora: edit_weights(lora, lambda it: it.update({"base_model.model.model.norm.weight": torch.zeros(64)})),
        "has .*norm.weight, unlike its configuration",
    ),
    "other layers": (
        lambda lora: edit_adapter(lora, lambda it: it.update(target_modules=["k_proj"])),
        "has .*lora_A.*unlike its configuration",
    ),
    "no layers": (
        lambda lora: edit_adapter(lora, lambda it: it.update(target_modules=["zork"])),
        "cannot put the adapter",
    ),
    "a tensor less": (lambda lora: edit_weights(lora, lambda it: it.pop(FIRST)), "lacks .*q_proj.lora_A"),
    "a tensor more": (
        lambda lora: edit_weights(lora, lambda it: it.update({FIRST.replace("layers.0", "layers.7"): it[FIRST] + 1})),
        "has .*layers.7.*unlike its configuration",
    ),
    "another shape": (
        lambda lora: edit_weights(lora, lambda it: it.update({FIRST: it[FIRST][:, 1:].contiguous()})),
        "cannot put the adapter",
    ),
    "NaN": (lambda lora: edit_weights(lora, lambda it: it[FIRST].fill_(float("nan"))), "q_proj.lora_A.* not finite"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_an_adapter(
    mistake: str, adapter: Path, compressed: Callable[..., Path], tmp_path: Path, command: Command
) -> None:
    make, says = MISTAKES[mistake]
    make(adapter)
    ended = command("merge", compressed(), "--adapter", adapter, "--out", tmp_path / "out")
    assert ended.code == 1
    assert re.search(says, ended.error), ended.error
    assert {path.name for path in tmp_path.iterdir()} <= {"lora"}


def test_biases_that_an_adapter_says_it_has(compressed: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT would leave those of the model in their place."""
    folder = compressed("int3", "gpt2")
    lora = saved_adapter(folder, tmp_path / "lora")
    edit_adapter(lora, lambda it: it.update(bias="all"))
    with pytest.raises(LexigramError, match=r"lora lacks .*bias, unlike its configuration"):
        lexigram.merge(folder, lora, tmp_path / "out")
    shutil.rmtree(lora)
    record = lexigram.merge(folder, saved_adapter(folder, lora, bias="all"), tmp_path / "out")
    assert record.merged[0].changed == []


def test_mistakes_around_it(
    adapter: Path, compressed: Callable[..., Path], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(compressed(), tmp_path / "small")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    assert "is not empty" in command("merge", folder, "-a", adapter, "-o", tmp_path / "there").error
    assert "lies in" in command("merge", folder, "-a", adapter, "-o", folder / "inside").error
    assert "no compressed model" in command("merge", adapter, "-a", adapter, "-o", tmp_path / "out").error

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("lexigram.staging.shutil.copyfile", full)
        said = command("merge", folder, "-a", adapter, "-o", tmp_path / "out").error
        assert "could not be written: No space left on device" in said
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "peft", None)
        assert (
            "pip install 'lexigram[adapters]'" in command("merge", folder, "-a", adapter, "-o", tmp_path / "out").error
        )
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    said = command("merge", folder, "-a", adapter, "-o", tmp_path / "out").error
    assert "is not as it was written" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "small", "there"]


@pytest.mark.slow
def test_adapters_on_a_real_model(data: Path, tmp_path: Path) -> None:
    """SmolLM2-135M at 4 bits: some steps on real text lower the loss on more of it, and merging keeps what was won."""
    text = (data / "tinystories" / "tinystories.txt").read_text()
    training, other = tmp_path / "training.txt", text[-20_000:]
    training.write_text(text[:-20_000])
    method = {"name": "quantize", "value_bits": 4, "rounding": "nearest"}
    calibration = {"text": str(training), "sequences": 2, "length": 64}
    lexigram.compress(
        Recipe.parse({"model": "demo", "method": method, "ratio": 0.72, "calibration": calibration}), tmp_path / "small"
    )
    model, tokenizer = lexigram.transformers_io.open_model(str(tmp_path / "small"))
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    ids = tokenizer(text[:-20_000], return_tensors="pt").input_ids[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(8):
        batch = ids[step * 512 : (step + 1) * 512].view(2, 256)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "lora")
    lexigram.merge(tmp_path / "small", tmp_path / "lora", tmp_path / "tuned")
    tuned, _ = lexigram.transformers_io.open_model(str(tmp_path / "tuned"))
    small, _ = lexigram.transformers_io.open_model(str(tmp_path / "small"))
    losses = [
        lexigram.evaluate(each, tokenizer, other, context=256, windows=4).negative_log_likelihood
        for each in (small, model.eval(), tuned)
    ]
    assert losses[1] < losses[0] - 0.1
    assert losses[2] == pytest.approx(losses[1], abs=0.02)
    assert lexigram.verify(tmp_path / "tuned", against="demo").passed
