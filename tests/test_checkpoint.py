"""Compressed checkpoints: what is written, that it comes back bit for bit, and that damage never goes unnoticed.

The oracles: the model in memory before it was saved, `to_dense` put into an ordinary model, plain transformers in a process
of its own that never imports lexigram, and files damaged on purpose.
"""

import copy
import functools
import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import lexigram
from checkpoints import IDS, edit_config, edit_tensors, logits, opened
from conftest import TOYS, build_toy
from lexigram.calibration.gram import GramAccumulator
from lexigram.errors import LexigramError
from lexigram.factors import (
    Bfloat,
    Codec,
    DenseSpec,
    Factor,
    Integer,
    Product,
    Shared,
    SharedSpec,
    Sparse,
    SparseSpec,
    Sum,
    encode,
)
from lexigram.methods import Budget, CospadiConfig, MethodConfig, SvdConfig, fit, layout
from lexigram.targets import find_targets, weight_of
from lexigram.transformers_io import (
    FactoredLinear,
    LexigramConfig,
    describe,
    export_dense,
    factored_layers,
    is_compressed,
    load,
    share,
)

METHODS: dict[str, MethodConfig] = {
    "cospadi": CospadiConfig(iterations=1),
    "cospadi 16": CospadiConfig(iterations=1, value_bits=16),
    "svd": SvdConfig(),
}


def compress(model: PreTrainedModel, method: MethodConfig, ratio: float = 0.4) -> PreTrainedModel:
    """Swap every target; the quality of the fit does not matter here, so the inputs are random."""
    for target in find_targets(model.to("cpu")):
        module = model.get_submodule(target.name)
        accumulator = GramAccumulator()
        accumulator.add(torch.randn(200, target.shape[1], generator=torch.Generator().manual_seed(1)))
        spec = layout(method, target.shape, Budget(int((1 - ratio) * 2 * target.weight_count)))
        generator = torch.Generator().manual_seed(2)
        factors, _ = fit(method, weight_of(module).detach(), accumulator.result(target.name), spec, generator)
        model.set_submodule(target.name, FactoredLinear(factors, module.bias, transposed=target.transposed))
    describe(model)
    return model


@functools.cache
def _compressed(name: str, method: str, dtype: torch.dtype) -> PreTrainedModel:
    return compress(build_toy(name, dtype), METHODS[method])


def compressed(name: str = "llama", method: str = "cospadi", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A compressed toy of one's own."""
    return copy.deepcopy(_compressed(name, method, dtype))


def pruned(weight: Tensor, codec: Codec, block: tuple[int, int] = (1, 1), index: Any = "bitmask") -> Factor:
    """The stronger half of a weight's blocks; a block's side of 0 is the whole side of the weight."""
    rows, cols = weight.shape
    height, width = block[0] or rows, block[1] or cols
    strength = weight.square().view(rows // height, height, cols // width, width).sum(dim=(1, 3))
    kept = strength >= strength.median()
    support = kept.repeat_interleave(height, 0).repeat_interleave(width, 1)
    spec = SparseSpec(
        rows=rows, cols=cols, nonzeros=int(support.sum()), codec=codec, index=index, block=(height, width)
    )
    return Sparse.encode(weight, spec, support)


def low_rank(weight: Tensor, rank: int = 5) -> Factor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    parts = u[:, :rank] * s[:rank], v[:rank]
    return Product(*(encode(part, DenseSpec(rows=part.shape[0], cols=part.shape[1])) for part in parts))


def low_rank_and_sparse(weight: Tensor) -> Factor:
    smooth = low_rank(weight)
    return Sum(smooth, pruned(weight - smooth.to_dense(), Integer(bits=4, group=32), index="list"))


FORMS: dict[str, Callable[[Tensor], Factor]] = {
    "pruned": lambda weight: pruned(weight, Bfloat()),
    "pruned, list, 14 bits": lambda weight: pruned(weight, Bfloat(bits=14), index="list"),
    "blocks int4": lambda weight: pruned(weight, Integer(bits=4, group=32), (4, 8)),
    "blocks, list": lambda weight: pruned(weight, Bfloat(), (1, 16), "list"),
    "rows": lambda weight: pruned(weight, Bfloat(), (1, 0)),
    "columns int8": lambda weight: pruned(weight, Integer(bits=8, group=16), (0, 1)),
    "low rank and sparse": low_rank_and_sparse,
    "sum of sums": lambda weight: Sum(Sum(pruned(weight, Bfloat()), low_rank(weight, 2)), low_rank(weight, 1)),
}
"""Whole forms of a layer, by its weight; no method has to make them for the format to have them."""

every_form = pytest.mark.parametrize("form", FORMS)


@functools.cache
def _formed(name: str, form: str) -> PreTrainedModel:
    model = build_toy(name)
    for target in find_targets(model):
        module = model.get_submodule(target.name)
        factors = FORMS[form](weight_of(module).detach().contiguous())
        model.set_submodule(target.name, FactoredLinear(factors, module.bias, transposed=target.transposed))
    describe(model)
    return model


def formed(name: str, form: str) -> PreTrainedModel:
    """A toy of one's own, every target in this form."""
    return copy.deepcopy(_formed(name, form))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small compressed Llama on disk, to be damaged."""
    compressed().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def factor_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".factors." in name}


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def without_lexigram(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in plain transformers; it fails if anything imported lexigram."""
    program = f"import sys\n{code}\nassert 'lexigram' not in sys.modules\n"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )


# --- save and load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in sorted(TOYS) for method in ("cospadi", "svd")] + [("llama", "cospadi 16")],
)
def test_a_saved_model_comes_back_bit_for_bit(name: str, method: str, tmp_path: Path) -> None:
    model = compressed(name, method)
    expected = logits(model)
    assert model.save_pretrained(tmp_path / "a") is None
    found = opened(tmp_path / "a")
    assert torch.equal(logits(found), expected)
    assert [name for name, _ in factored_layers(found)] == [target.name for target in find_targets(build_toy(name))]
    assert {n: m.spec for n, m in factored_layers(found)} == {n: m.spec for n, m in factored_layers(model)}
    found.save_pretrained(tmp_path / "b")
    first, second = (folder / "lexigram.safetensors" for folder in (tmp_path / "a", tmp_path / "b"))
    assert hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(second.read_bytes()).digest()
    quantisation = [json.loads((tmp_path / f / "config.json").read_text())["quantization_config"] for f in "ab"]
    assert quantisation[0] == quantisation[1]
    assert torch.equal(logits(load(tmp_path / "b")), expected)


def test_the_toys_are_really_compressed() -> None:
    """The tests above would pass on a model whose layers are as they were."""
    assert not torch.allclose(logits(compressed()), logits(build_toy("llama")), atol=1e-2)
    module = compressed().model.layers[0].mlp.up_proj
    assert isinstance(module, FactoredLinear)
    assert "weight" not in dict(module.named_parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_files_weigh_what_the_forms_say(name: str, tmp_path: Path) -> None:
    model = compressed(name, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "lexigram.safetensors",
    ]
    tensors = stored(tmp_path)
    ours = sum(t.numel() * t.element_size() for t in factor_tensors(tensors).values())
    assert ours == sum(module.spec.factors.bytes for _, module in factored_layers(model))
    before = sum(2 * target.weight_count for target in find_targets(build_toy(name)))
    assert 0.55 * before < ours <= 0.6 * before
    dense = {f"{target.name}.weight" for target in find_targets(build_toy(name))}
    assert not dense & tensors.keys()


@pytest.mark.parametrize("name", sorted(TOYS))
def test_logits_are_those_of_the_dense_matrices(name: str) -> None:
    model = compressed(name)
    reference = build_toy(name)
    for layer, module in factored_layers(model):
        with torch.no_grad():
            weight_of(reference.get_submodule(layer)).copy_(module.factors.to_dense())
    assert torch.allclose(logits(model), logits(reference), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["cospadi", "svd"])
def test_casts_leave_the_stored_values(method: str, tmp_path: Path) -> None:
    model = compressed("qwen2", method)
    model.save_pretrained(tmp_path / "before")
    expected = factor_tensors(stored(tmp_path / "before"))
    assert expected
    model = opened(tmp_path / "before")
    model.half().float().bfloat16().to(torch.float16).double().float()
    model.save_pretrained(tmp_path / "after")
    assert_equal_tensors(factor_tensors(stored(tmp_path / "after")), expected)
    load(tmp_path / "after")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_argument(dtype: torch.dtype, tmp_path: Path) -> None:
    compressed(dtype=torch.bfloat16).save_pretrained(tmp_path)
    for model in (opened(tmp_path, dtype=dtype), load(tmp_path, dtype=dtype)):
        assert model.dtype == dtype
        assert logits(model).dtype == dtype
        assert_equal_tensors(factor_tensors(dict(model.state_dict())), factor_tensors(stored(tmp_path)))
    assert opened(tmp_path).dtype == torch.bfloat16, "by default that of the file"
    assert load(tmp_path).dtype == torch.bfloat16
    assert opened(tmp_path, device_map="cpu").dtype == torch.bfloat16


def test_autocast_and_training_mode_keep_working() -> None:
    model = compressed()
    expected = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, rtol=0.1, atol=0.05)
    model.train()
    assert torch.equal(logits(model), expected), "toys have no dropout"


def test_gradients_flow_to_the_inputs() -> None:
    """Adapters on other layers train through compressed ones."""
    model = compressed()
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad is not None
    assert bool((embeddings.grad != 0).any())


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_sharded_checkpoints(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    model.save_pretrained(tmp_path / "a", max_shard_size="40KB")
    shards = sorted((tmp_path / "a").glob("lexigram-*.safetensors"))
    assert len(shards) > 2
    assert not list((tmp_path / "a").glob("model*"))
    assert torch.equal(logits(opened(tmp_path / "a")), logits(model))
    again = load(tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "lexigram.safetensors").is_file(), "and back into one file"
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))
    shards[1].unlink()
    with pytest.raises(LexigramError, match=shards[1].name):
        load(tmp_path / "a")


@pytest.mark.parametrize("sizes", [("40KB", "5GB"), ("5GB", "40KB"), ("40KB", "80KB")])
def test_saving_over_an_earlier_save_leaves_one_checkpoint(sizes: tuple[str, str], tmp_path: Path) -> None:
    other = compressed(method="svd")
    other.save_pretrained(tmp_path / "a", max_shard_size=sizes[0])
    mine = ("notes.txt", "lexigram-lora.safetensors", "lexigram.safetensors.bak", "lexigram-1-of-2.safetensors")
    for name in mine:
        (tmp_path / "a" / name).write_text("mine")
    model = compressed()
    model.save_pretrained(tmp_path / "a", max_shard_size=sizes[1])
    model.save_pretrained(tmp_path / "fresh", max_shard_size=sizes[1])
    assert torch.equal(logits(load(tmp_path / "a")), logits(model))
    files = {file.name for file in (tmp_path / "a").iterdir()}
    assert files - set(mine) == {file.name for file in (tmp_path / "fresh").iterdir()}
    assert all((tmp_path / "a" / name).read_text() == "mine" for name in mine)


def test_a_folder_with_ordinary_weights_is_refused(tmp_path: Path) -> None:
    """Beside them, plain transformers would load those under our config."""
    build_toy("llama").save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(LexigramError, match=r"model\.safetensors"):
        compressed().save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_pickled_model_computes_and_saves_the_same(tmp_path: Path) -> None:
    """As processes are given one."""
    model = compressed()
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), logits(model))
    twin.half().float().save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).lm_head.weight, model.lm_head.weight.half().float())


def test_a_deep_copy_saves_itself(tmp_path: Path) -> None:
    model = compressed()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.fill_(0.5)
    twin.save_pretrained(tmp_path / "twin")
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "twin")), logits(twin))
    assert torch.equal(logits(load(tmp_path / "model")), logits(model))
    assert not torch.equal(logits(model), logits(twin))


def test_a_failed_save_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        compressed().save_pretrained(tmp_path / "out")
    assert not [*(tmp_path / "out").glob("*"), *(tmp_path / "out").glob(".*")]


@pytest.mark.parametrize("options", [{"push_to_hub": True}, {"variant": "fp16"}])
def test_what_would_write_other_names_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LexigramError, match="saved locally and without `variant`"):
        compressed().save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_generation(name: str, tmp_path: Path) -> None:
    compressed(name).save_pretrained(tmp_path)
    prompt = torch.tensor([[1, 5, 9]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = compressed(name).generate(prompt, **options)
    assert expected.shape == (1, 11)
    assert torch.equal(load(tmp_path).generate(prompt, **options), expected)
    assert torch.equal(expected, compressed(name).generate(prompt, use_cache=False, **options))


def test_no_pickles(saved: Path) -> None:
    assert not [file for file in saved.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")]


def test_partly_compressed_models(tmp_path: Path) -> None:
    model = build_toy("llama")
    [target] = list(find_targets(model, include=["lm_head"]))
    spec = layout(SvdConfig(), target.shape, Budget(target.weight_count))
    accumulator = GramAccumulator()
    accumulator.add(torch.eye(64))
    factors, _ = fit(
        SvdConfig(), model.lm_head.weight.detach(), accumulator.result("x"), spec, torch.Generator().manual_seed(0)
    )
    model.lm_head = FactoredLinear(factors)
    describe(model)
    model.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert list(dict(factored_layers(found))) == ["lm_head"]
    assert torch.equal(logits(found), logits(model))
    assert torch.equal(logits(load(tmp_path, dense=True)), logits(load(tmp_path, dense=True)))


# --- every form as a whole layer ---------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_every_form_comes_back_bit_for_bit(name: str, form: str, tmp_path: Path) -> None:
    model = formed(name, form)
    expected = logits(model)
    assert not torch.allclose(expected, logits(build_toy(name)), atol=1e-2), "the layers are not what they were"
    model.save_pretrained(tmp_path / "a")
    found = opened(tmp_path / "a")
    assert torch.equal(logits(found), expected)
    assert {n: m.spec for n, m in factored_layers(found)} == {n: m.spec for n, m in factored_layers(model)}
    assert len(list(factored_layers(found))) == len(find_targets(build_toy(name)))
    tensors = factor_tensors(stored(tmp_path / "a"))
    ours = sum(t.numel() * t.element_size() for t in tensors.values())
    assert ours == sum(module.spec.factors.bytes for _, module in factored_layers(model))
    found.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("lexigram-*.safetensors"))) > 2
    assert_equal_tensors(stored(tmp_path / "sharded"), stored(tmp_path / "a"))
    assert torch.equal(logits(load(tmp_path / "sharded")), expected)
    found.half().float().bfloat16().double().float()
    found.save_pretrained(tmp_path / "b")
    assert_equal_tensors(factor_tensors(stored(tmp_path / "b")), tensors)
    configs = [json.loads((tmp_path / f / "config.json").read_text())["quantization_config"] for f in "ab"]
    assert configs[0] == configs[1]


@every_form
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_form_exports_as_an_ordinary_model(name: str, form: str, tmp_path: Path) -> None:
    model, reference = formed(name, form), build_toy(name)
    for layer, module in factored_layers(model):
        with torch.no_grad():
            weight_of(reference.get_submodule(layer)).copy_(module.factors.to_dense())
    assert torch.allclose(logits(model), logits(reference), rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "a")
    export_dense(tmp_path / "a", tmp_path / "b")
    ordinary = opened(tmp_path / "b")
    assert not list(factored_layers(ordinary))
    assert torch.equal(logits(ordinary), logits(reference))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["blocks int4", "low rank and sparse"])
def test_every_form_follows_the_dtype_argument(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = formed("llama", form)
    model.save_pretrained(tmp_path)
    found = load(tmp_path, dtype=dtype)
    assert logits(found).dtype == dtype
    assert torch.allclose(logits(found).float(), logits(model), rtol=0.1, atol=0.05)
    assert_equal_tensors(factor_tensors(dict(found.state_dict())), factor_tensors(stored(tmp_path)))
    assert {parameter.dtype for parameter in load(tmp_path, dtype=dtype, dense=True).parameters()} == {dtype}


def test_a_sum_with_a_shared_matrix_comes_back(tmp_path: Path) -> None:
    model = build_toy("llama")
    reference = SharedSpec(name="common", rows=8, cols=64)
    owner = low_rank(model.model.layers[0].self_attn.q_proj.weight.detach(), 8).right
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight.detach()
        left = encode(weight @ torch.linalg.pinv(owner.to_dense()), DenseSpec(rows=64, cols=8))
        smooth = Product(left, Shared(reference, owner))
        rest = pruned(weight - smooth.to_dense(), Bfloat(), index="list")
        layer.self_attn.q_proj = FactoredLinear(Sum(smooth, rest))
    share(model, {"common": owner})
    describe(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    found = load(tmp_path / "a")
    assert torch.equal(logits(found), expected)
    assert [key for key in stored(tmp_path / "a") if "common" in key] == ["lexigram_shared.common.values"]
    found.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(opened(tmp_path / "b")), expected)
    assert torch.allclose(logits(load(tmp_path / "b", dense=True)), expected, rtol=1e-3, atol=1e-4)
    edit_config(tmp_path / "b", lambda c: c["shared"]["common"].update(rows=9))
    with pytest.raises(LexigramError, match=r"q_proj shares common as 8 x 64, which is described as 9 x 64"):
        opened(tmp_path / "b")


def test_checkpoints_from_before_there_were_blocks_mean_the_same(tmp_path: Path) -> None:
    model = compressed()
    model.save_pretrained(tmp_path)

    def forget(config: dict[str, Any]) -> None:
        for layer in config["layers"].values():
            del layer["factors"]["left"]["index"], layer["factors"]["left"]["block"]

    edit_config(tmp_path, forget)
    assert "block" not in (tmp_path / "config.json").read_text()
    for found in (load(tmp_path), opened(tmp_path)):
        assert torch.equal(logits(found), logits(model))
        assert {n: m.spec for n, m in factored_layers(found)} == {n: m.spec for n, m in factored_layers(model)}


# --- dense again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TOYS))
def test_dense_models_hold_the_multiplied_factors(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    model.save_pretrained(tmp_path)
    for dense in (load(tmp_path, dense=True), opened(tmp_path).dequantize()):
        assert not list(factored_layers(dense))
        for layer, module in factored_layers(model):
            ordinary = dense.get_submodule(layer)
            assert type(ordinary) is (Conv1D if name == "gpt2" else nn.Linear)
            assert torch.equal(weight_of(ordinary), module.factors.to_dense())
            assert (ordinary.bias is None) == (module.bias is None)
        assert torch.allclose(logits(dense), logits(model), rtol=1e-3, atol=1e-4)
        assert not is_compressed(dense.config)


def test_a_dense_model_takes_the_dtype_that_the_model_has_now(tmp_path: Path) -> None:
    compressed(dtype=torch.bfloat16).save_pretrained(tmp_path)
    dense = opened(tmp_path).float().dequantize()
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.float32}
    logits(dense)
    assert {p.dtype for p in load(tmp_path, dense=True, dtype=torch.float16).parameters()} == {torch.float16}


def test_a_dense_model_saves_as_an_ordinary_one(tmp_path: Path) -> None:
    model = compressed()
    model.save_pretrained(tmp_path / "a")
    dense = load(tmp_path / "a", dense=True)
    dense.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "model.safetensors").is_file()
    assert "lexigram" not in (tmp_path / "b" / "config.json").read_text()
    assert torch.equal(logits(opened(tmp_path / "b")), logits(dense))
    # What stood in the way of casts and saving of a quantised model is gone with it.
    dense.half()


EXPORT_CHECK = """
import torch
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
expected = torch.load(sys.argv[2])
with torch.no_grad():
    found = model.eval()(input_ids=torch.arange(3, 33).view(2, 15)).logits
assert torch.equal(found, expected), (found - expected).abs().max()
"""


@pytest.mark.slow
def test_an_exported_model_needs_no_lexigram(data: Path, tmp_path: Path) -> None:
    """Also without a tokenizer, which `save_pretrained` of a model does not write."""
    torch.set_num_threads(1)
    compressed().save_pretrained(tmp_path / "a")
    torch.save(logits(load(tmp_path / "a", dense=True)), tmp_path / "logits.pt")
    export_dense(tmp_path / "a", tmp_path / "b")
    environment = "import torch; torch.set_num_threads(1)"
    done = without_lexigram(environment + EXPORT_CHECK, tmp_path / "b", tmp_path / "logits.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    with pytest.raises(LexigramError, match="exists"):
        export_dense(tmp_path / "a", tmp_path / "b")


def test_a_failed_export_leaves_nothing(saved: Path, tmp_path: Path) -> None:
    (saved / "lexigram.safetensors").write_bytes(b"damaged")
    with pytest.raises(LexigramError):
        export_dense(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_tokenizer_is_not_called_a_failed_write(saved: Path, tmp_path: Path) -> None:
    (saved / "tokenizer_config.json").write_text("{")
    with pytest.raises(LexigramError, match=r"cannot open the tokenizer of .*; check that the model is complete"):
        export_dense(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_users_folder_is_expanded(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load(f"~/{saved.name}") is not None
    export_dense(f"~/{saved.name}", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


PLAIN_LOAD = """
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except OSError as error:
        print("refused", error)
    else:
        sys.exit("loaded a model with random weights from " + folder)
raise OSError("as a script would end")
"""


@pytest.mark.slow
def test_without_lexigram_loading_fails_loudly(tmp_path: Path) -> None:
    saved, again, sharded = tmp_path / "saved", tmp_path / "again", tmp_path / "sharded"
    compressed().save_pretrained(saved)
    load(saved).save_pretrained(again)
    compressed().save_pretrained(sharded, max_shard_size="40KB")
    load(sharded).save_pretrained(sharded, max_shard_size="80KB")
    done = without_lexigram(PLAIN_LOAD, saved, again, sharded)
    assert done.stdout.count("refused") == 3, done.stdout + done.stderr[-2000:]
    assert done.returncode != 0


# --- damage ------------------------------------------------------------------------------------------------------

LAYER = "model.layers.1.mlp.gate_proj"


def flip(tensors: dict[str, Tensor], name: str, index: int, value: int) -> None:
    tensors[name][index] ^= value


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "factor missing": (lambda t: t.pop(f"{LAYER}.factors.left.mask"), rf"{LAYER}\.factors\.left\.mask is missing"),
    "a whole layer missing": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith(LAYER)],
        rf"{LAYER}\.factors\.left\.mask is missing",
    ),
    "values too short": (
        lambda t: t.update({f"{LAYER}.factors.right.values": t[f"{LAYER}.factors.right.values"][:-1].clone()}),
        rf"{LAYER}\.factors\.right\.values is .*its form says",
    ),
    "values of another dtype": (
        lambda t: t.update({f"{LAYER}.factors.right.values": t[f"{LAYER}.factors.right.values"].to(torch.int32)}),
        rf"{LAYER}\.factors\.right\.values is .*I32",
    ),
    "values as bfloat16": (
        lambda t: t.update({f"{LAYER}.factors.right.values": t[f"{LAYER}.factors.right.values"].view(torch.bfloat16)}),
        rf"{LAYER}\.factors\.right\.values is .*BF16",
    ),
    "a bit of a mask flipped": (
        lambda t: flip(t, f"{LAYER}.factors.left.mask", 7, 16),
        rf"damaged at {LAYER}: left: the mask has \d+ bits set",
    ),
    "a scale that is NaN": (
        lambda t: t[f"{LAYER}.factors.right.scales"].fill_(0x7FC0),
        rf"damaged at {LAYER}: right: a stored value is not finite",
    ),
    "norm missing": (
        lambda t: t.pop("model.norm.weight"),
        r"is not complete: model\.norm\.weight is missing in its weights; fetch or write",
    ),
    "embedding of another shape": (
        lambda t: t.update({"model.embed_tokens.weight": torch.zeros(7, 64)}),
        r"is damaged: model\.embed_tokens\.weight has the shape \(7, 64\) in the weights and .*; fetch or write",
    ),
    "a factor too many": (
        lambda t: t.update({"model.layers.9.mlp.up_proj.factors.left.mask": torch.zeros(3, dtype=torch.uint8)}),
        r"model\.layers\.9\.mlp\.up_proj\.factors\.left\.mask is stored",
    ),
    "dense weight beside": (
        lambda t: t.update({f"{LAYER}.weight": torch.zeros(128, 64)}),
        rf"is damaged: {LAYER}\.weight is in its weights, but the model has no such tensor; fetch",
    ),
    "unknown tensor": (
        lambda t: t.update({"model.surprise": torch.zeros(3)}),
        r"model\.surprise is in its weights, but",
    ),
}


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_damaged_tensors_are_named(kind: str, saved: Path) -> None:
    change, message = DAMAGE[kind]
    load(saved)
    edit_tensors(saved, change)
    with pytest.raises(LexigramError, match=message):
        load(saved)


@pytest.mark.parametrize("kind", [kind for kind in sorted(DAMAGE) if "factors" in DAMAGE[kind][1]])
def test_damaged_factors_also_stop_plain_from_pretrained(kind: str, saved: Path) -> None:
    change, message = DAMAGE[kind]
    edit_tensors(saved, change)
    with pytest.raises(LexigramError, match=message):
        opened(saved)


SUM_DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "counts": (lambda t: flip(t, f"{LAYER}.factors.right.counts", 0, 1), "right: the counts add up to"),
    "columns": (
        lambda t: t[f"{LAYER}.factors.right.columns"].fill_(0),
        "right: the column numbers of block-row 0 do not increase",
    ),
    "columns missing": (lambda t: t.pop(f"{LAYER}.factors.right.columns"), r"factors\.right\.columns is missing"),
    "a mask beside": (
        lambda t: t.update({f"{LAYER}.factors.right.mask": torch.zeros(3, dtype=torch.uint8)}),
        r"factors\.right\.mask is stored, but",
    ),
    "low rank": (
        lambda t: t[f"{LAYER}.factors.left.left.values"].fill_(0x7FC0),
        "left: left: a stored value is not finite",
    ),
}


@pytest.mark.parametrize("opener", [load, opened])
@pytest.mark.parametrize("kind", sorted(SUM_DAMAGE))
def test_damaged_sums_are_named(kind: str, opener: Callable[[Path], Any], tmp_path: Path) -> None:
    change, message = SUM_DAMAGE[kind]
    formed("llama", "low rank and sparse").save_pretrained(tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(LexigramError, match=f"damaged.*{LAYER}.*{message}"):
        opener(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": [3, 8]}, rf"malformed at {LAYER}.*blocks of 3 x 8 do not divide 128 x 64"),
        ({"block": [4, 4]}, rf"damaged: {LAYER}\.factors\.mask is"),
        ({"index": "list"}, rf"damaged: {LAYER}\.factors\.columns is missing"),
        ({"index": "tree"}, rf"malformed at {LAYER}.*'bitmask' or 'list'"),
        ({"nonzeros": 33}, rf"malformed at {LAYER}.*33 non-zeros are no whole number of blocks of 4 x 8"),
    ],
)
def test_a_damaged_description_of_blocks_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    formed("llama", "blocks int4").save_pretrained(tmp_path)
    edit_config(tmp_path, lambda c: c["layers"][LAYER]["factors"].update(change))
    with pytest.raises(LexigramError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("part", [0, 4, 0.5, 0.999])
def test_truncated_files(part: float, saved: Path) -> None:
    file = saved / "lexigram.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(part) if part >= 1 else int(part * len(content))])
    for opener in (load, opened):
        with pytest.raises(LexigramError, match=r"lexigram\.safetensors cannot be read"):
            opener(saved)


@pytest.mark.parametrize("file", ["lexigram.safetensors", "config.json"])
def test_a_missing_file_is_named(file: str, saved: Path) -> None:
    (saved / file).unlink()
    with pytest.raises(LexigramError, match=file.replace(".", r"\.") + "|model_type"):
        load(saved)


CONFIG_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format version": (lambda c: c.update(format_version=99), r"format version 99.*install the version"),
    "format version as text": (lambda c: c.update(format_version="1.5"), r"format version '1\.5'"),
    "unknown key": (lambda c: c.update(groups=2), "unknown keys: groups"),
    "path traversal": (lambda c: c.update(weights="../lexigram.safetensors"), r"names '\.\./lexigram\.safetensors'"),
    "absolute path": (lambda c: c.update(weights="/tmp/lexigram.safetensors"), "expected a file name"),
    "other weights": (lambda c: c.update(weights="model.safetensors"), r"names 'model\.safetensors'"),
    "pickled weights": (lambda c: c.update(weights="lexigram.bin"), r"names 'lexigram\.bin'"),
    "weights that are no name": (lambda c: c.update(weights=["lexigram.safetensors"]), "expected a file name"),
    "wrong layer name": (
        lambda c: c["layers"].update({"model.layers.7.mlp.gate_proj": c["layers"].pop(LAYER)}),
        r"model\.layers\.7\.mlp\.gate_proj",
    ),
    "layer that is no linear layer": (
        lambda c: c["layers"].update({"model.norm": c["layers"].pop(LAYER)}),
        r"model\.norm",
    ),
    "layer forgotten": (lambda c: c["layers"].pop(LAYER), LAYER.replace(".", r"\.")),
    "layers are no mapping": (lambda c: c.update(layers=[1, 2]), "quantization_config is malformed"),
    "no layers": (lambda c: c.update(layers={}), "describes no such factor"),
    "shape": (lambda c: c["layers"][LAYER]["factors"]["left"].update(rows=127), rf"{LAYER}|malformed"),
    "huge shape": (lambda c: c["layers"][LAYER]["factors"]["left"].update(rows=2**60), rf"malformed at {LAYER}"),
    "inner dimensions": (lambda c: c["layers"][LAYER]["factors"]["left"].update(cols=5), rf"malformed at {LAYER}"),
    "non-zeros": (lambda c: c["layers"][LAYER]["factors"]["left"].update(nonzeros=3), rf"{LAYER}\.factors\.left"),
    "unknown form": (lambda c: c["layers"][LAYER]["factors"].update(form="tucker"), rf"malformed at {LAYER}.*tucker"),
    "unknown key in a layer": (lambda c: c["layers"][LAYER].update(scale=2), rf"malformed at {LAYER}\.scale"),
    "unknown codec": (
        lambda c: c["layers"][LAYER]["factors"]["right"].update(codec={"name": "int4"}),
        rf"malformed at {LAYER}",
    ),
    "bias": (lambda c: c["layers"][LAYER].update(bias=True), rf"bias of {LAYER}"),
    "transposed": (lambda c: c["layers"][LAYER].update(transposed=True), rf"{LAYER}.*transposed"),
}


@pytest.mark.parametrize("opener", ["load", "from_pretrained"])
@pytest.mark.parametrize("kind", sorted(CONFIG_DAMAGE))
def test_damaged_configs_are_named(kind: str, opener: str, saved: Path) -> None:
    change, message = CONFIG_DAMAGE[kind]
    edit_config(saved, change)
    with pytest.raises(LexigramError, match=message):
        {"load": load, "from_pretrained": opened}[opener](saved)


def test_another_size_in_the_models_config_is_found(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(LexigramError, match=r"model\.layers\.0\.mlp\.down_proj as 64 x 128.* 64 x 96"):
        opened(saved)


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(LexigramError, match="there is no folder"):
        load(tmp_path / "nowhere")
    build_toy("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(LexigramError, match="ordinary model"):
        load(tmp_path / "dense")


def test_an_index_that_points_elsewhere(tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path / "a", max_shard_size="40KB")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    index = tmp_path / "a" / "lexigram.safetensors.index.json"
    content = json.loads(index.read_text())
    victim = next(iter(content["weight_map"].values()))
    (tmp_path / "a" / victim).unlink()
    content["weight_map"] = {
        key: f"../b/{file}" if file == victim else file for key, file in content["weight_map"].items()
    }
    index.write_text(json.dumps(content))
    with pytest.raises(LexigramError, match="files outside of its folder"):
        load(tmp_path / "a")


def test_the_config_is_its_own_description() -> None:
    config = LexigramConfig(layers={name: m.spec.model_dump() for name, m in factored_layers(compressed())})
    assert LexigramConfig(**json.loads(config.to_json_string())).to_dict() == config.to_dict()
    assert config.to_diff_dict() == config.to_dict()
    assert is_compressed(compressed().config)
    assert not is_compressed(build_toy("llama").config)
    assert "14 layers" in repr(config)


# --- a real model ------------------------------------------------------------------------------------------------


def test_a_real_model(data: Path, tmp_path: Path) -> None:
    model = compress(opened(data / "stories260K", dtype=torch.float32), SvdConfig(), ratio=0.2)
    model.save_pretrained(tmp_path / "a")
    found = load(tmp_path / "a")
    assert torch.equal(logits(found), logits(model))
    found.save_pretrained(tmp_path / "b")
    assert_equal_tensors(stored(tmp_path / "b"), stored(tmp_path / "a"))
    assert (tmp_path / "a" / "lexigram.safetensors").stat().st_size < (
        data / "stories260K" / "model.safetensors"
    ).stat().st_size
    assert lexigram.load is load
