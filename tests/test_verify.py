"""`verify`: an untouched result passes, anything touched is found and named, and errors come out as the run measured them.

The oracles: the bytes as they were written, the original model, and outputs computed with `nn.functional.linear` on inputs
that a hook recorded.
"""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import TEMPLATE, TOYS, Command, templated_folder, toy_folder
from lexigram import LexigramError, Recipe, RunRecord, compress, load, recording, verify
from lexigram.calibration.text import read_texts
from lexigram.calibration.tokens import token_sequences
from lexigram.headers import file_sha256, read_headers, tensor_sha256
from lexigram.records import read_run
from lexigram.source import Source

WEIGHTS = "lexigram.safetensors"
LAYER = "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("model") / "toy", "llama")


def made(toy: Path, words: Path, out: Path, **settings: Any) -> RunRecord:
    calibration = {"text": str(words), "sequences": 8, "length": 32}
    content = {"model": str(toy), "ratio": 0.3, "device": "cpu", "compute_dtype": "float32", "calibration": calibration}
    return compress(Recipe.parse({**content, **settings}), out)


@pytest.fixture(scope="module")
def result(toy: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result with shared dictionaries, undamaged."""
    out = tmp_path_factory.mktemp("result") / "small"
    made(toy, words, out, share="site")
    return out


@pytest.fixture
def folder(result: Path, tmp_path: Path) -> Path:
    """A copy of one's own."""
    return Path(shutil.copytree(result, tmp_path / "small"))


def outcomes(found: Any) -> dict[str, bool | None]:
    return {check.name: check.passed for check in found.checks}


def only_failure(folder: Path, **options: Any) -> str:
    """What the first check says that failed."""
    found = verify(folder, **options)
    assert not found.passed
    return found.failed[0].message


# ----------------------------------------------------------------------------------------------------- what was written


@pytest.mark.parametrize(
    "settings",
    [
        {"share": "site"},
        {"method": {"name": "svd"}},
        {"method": {"name": "quantize", "value_bits": 4}},
        {"method": {"name": "structured"}},
        {"method": {"name": "oats", "rounds": 3}},
        {"method": {"name": "double-sparse", "iterations": 2, "tightening": 2}, "ratio": 0.7},
        {"method": {"name": "wanda"}},
        {"compute_dtype": "bfloat16", "dtype": "float32"},
    ],
)
def test_an_untouched_result_passes_every_check(
    settings: dict[str, Any], toy: Path, words: Path, tmp_path: Path
) -> None:
    record = made(toy, words, tmp_path / "small", **settings)
    found = verify(tmp_path / "small", against=str(toy), texts=[str(words)])
    assert outcomes(found) == dict.fromkeys(
        ["files", "tensors", "sizes", "loading", "original", "uncompressed", "layer errors"], True
    )
    assert found.errors.keys() == {layer.name for layer in record.layers}
    for layer in record.layers:
        assert found.errors[layer.name] == pytest.approx(layer.fit.relative_error, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "llama-tied"])
def test_other_models_pass(name: str, words: Path, tmp_path: Path) -> None:
    toy = toy_folder(tmp_path / "toy", name)
    made(toy, words, tmp_path / "small", method={"name": "svd"})
    assert set(outcomes(verify(tmp_path / "small", against=str(toy), texts=[str(words)])).values()) == {True}


def test_hashes_are_those_of_the_bytes(result: Path) -> None:
    record = read_run(result)
    tensors = load_file(result / WEIGHTS)
    with safe_open(result / WEIGHTS, framework="pt") as file:
        for name, tensor in tensors.items():
            shape = "x".join(map(str, tensor.shape))
            content = (
                f"{file.get_slice(name).get_dtype()} {shape}:".encode() + tensor.view(torch.uint8).numpy().tobytes()
            )
            assert record.tensors_sha256[name] == hashlib.sha256(content).hexdigest()
    assert record.tensors_sha256.keys() == tensors.keys()
    assert record.files_sha256.keys() == set(record.files) - {WEIGHTS, "run.json"}
    for name, digest in record.files_sha256.items():
        assert digest == hashlib.sha256((result / name).read_bytes()).hexdigest() == file_sha256(result / name)


def test_sizes_come_from_headers(result: Path) -> None:
    assert recording.stored_bytes(result) == {name: t.nbytes for name, t in load_file(result / WEIGHTS).items()}


def test_every_tensor_s_bytes_lie_where_its_header_says(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(5, dtype=torch.int16),
        "b": torch.ones(2, 3, dtype=torch.bfloat16),
        "c": torch.empty(0),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    for name, header in read_headers([tmp_path / "x.safetensors"]).items():
        assert content[header.begin : header.end] == tensors[name].view(torch.uint8).numpy().tobytes()
        assert (header.bytes, header.shape) == (tensors[name].nbytes, tuple(tensors[name].shape))
        assert len(tensor_sha256(header)) == 64


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.slow
def test_one_flipped_bit_is_found_and_its_tensor_named(result: Path, folder: Path) -> None:
    """In every tensor, at a drawn place."""
    draw, content = random.Random(0), (result / WEIGHTS).read_bytes()
    for name, header in read_headers([result / WEIGHTS]).items():
        place, bit = draw.randrange(header.begin, header.end), draw.randrange(8)
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        (folder / WEIGHTS).write_bytes(damaged)
        failed = {check.name: check.message for check in verify(folder).failed}
        assert failed["tensors"] == f"{name} in {WEIGHTS} is not as it was written"


def test_one_flipped_bit_of_any_other_file_is_found_and_the_file_named(result: Path, folder: Path) -> None:
    draw = random.Random(0)
    for name in read_run(result).files_sha256:
        damaged = bytearray((result / name).read_bytes())
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(damaged)
        failed = {check.name: check.message for check in verify(folder).failed}
        assert failed["files"] == f"{name} is not as it was written"
        shutil.copy(result / name, folder / name)
    assert verify(folder).passed


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def record_of(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / "run.json").read_text())
    change(record)
    (folder / "run.json").write_text(json.dumps(record))


def swap(tensors: dict[str, torch.Tensor]) -> None:
    one, other = (f"model.layers.{layer}.mlp.down_proj.factors.left.values" for layer in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a file is missing": (lambda f: (f / "recipe.yaml").unlink(), "files", r"^recipe\.yaml is missing$"),
    "a name that no file can have": (
        lambda f: record_of(f, lambda r: r["files"].append("w" * 10_000)),
        "files",
        r"^w{300} \.\.\. is missing \(and 1 more\)$",
    ),
    "two files are missing": (
        lambda f: [(f / name).unlink() for name in ("recipe.yaml", "allocation.json")],
        "files",
        r"^allocation\.json is missing \(and 1 more\)$",
    ),
    "weights beside": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"x"),
        "files",
        r"^pytorch_model\.bin is none of the run's files",
    ),
    "code beside": (lambda f: (f / "generate.py").touch(), "files", r"^generate\.py is none of the run's files"),
    "code in a folder": (
        lambda f: [(f / "custom_generate").mkdir(), (f / "custom_generate" / "generate.py").touch()],
        "files",
        r"^custom_generate/generate\.py is none of the run's files",
    ),
    "two tensors swapped": (
        lambda f: rewrite(f, swap),
        "tensors",
        r"down_proj\.factors\.left\.values in .* \(and 1 more\)$",
    ),
    "a tensor is missing": (
        lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")),
        "tensors",
        r"^model\.norm\.weight is missing$",
    ),
    "a tensor too many": (
        lambda f: rewrite(f, lambda t: t.update({"model.x": torch.ones(3)})),
        "tensors",
        r"^model\.x was not written by the run$",
    ),
    "another dtype of the same bytes": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].view(torch.float16)})),
        "tensors",
        r"^model\.norm\.weight in .* is not as it was written$",
    ),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        "tensors",
        r"lexigram\.safetensors cannot be read",
    ),
    "a layer's bytes": (
        lambda f: record_of(f, lambda r: r["layers"][0].update(bytes_after=r["layers"][0]["bytes_after"] + 1)),
        "sizes",
        r"q_proj\.factors weighs [\d,]+ bytes, by the record [\d,]+$",
    ),
    "the model's bytes": (
        lambda f: record_of(f, lambda r: r.update(model_bytes_after=r["model_bytes_after"] + 1)),
        "sizes",
        "^all tensors weigh",
    ),
    "the bytes by kind": (
        lambda f: record_of(f, lambda r: r["bytes_by_kind"].update({"dense values": 3})),
        "sizes",
        "^the bytes by kind",
    ),
    "another form": (
        lambda f: record_of(f, lambda r: r["layers"][0]["factors"]["left"].update(nonzeros=5)),
        "loading",
        "q_proj has another form in config.json than in the record",
    ),
    "no hash of a file": (
        lambda f: record_of(f, lambda r: r["files_sha256"].pop("config.json")),
        "files",
        r"^the record has no hash of config\.json$",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind: str, folder: Path) -> None:
    change, check, says = DAMAGE[kind]
    change(folder)
    failed = {each.name: each.message for each in verify(folder).failed}
    assert re.search(says, failed[check]), failed


def test_a_result_of_an_earlier_version_has_no_hashes(folder: Path) -> None:
    record_of(folder, lambda r: [r.pop("tensors_sha256"), r.pop("files_sha256")])
    found = verify(folder)
    assert found.passed
    assert outcomes(found)["tensors"] is None
    assert "holds no hashes" in next(check.message for check in found.checks if check.name == "tensors")


# ------------------------------------------------------------------------------------------------------------ folders inside


@pytest.fixture(scope="module")
def templated(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result whose tokenizer has a chat template in a folder of its own, undamaged."""
    place = tmp_path_factory.mktemp("templated")
    made(templated_folder(place / "toy"), words, place / "small", method={"name": "svd"})
    return place / "small"


def test_files_in_folders_are_recorded_and_pass(templated: Path) -> None:
    record = read_run(templated)
    assert set(record.files) == {
        path.relative_to(templated).as_posix() for path in templated.rglob("*") if path.is_file()
    }
    assert record.files_sha256[TEMPLATE] == hashlib.sha256((templated / TEMPLATE).read_bytes()).hexdigest()
    assert verify(templated).passed
    assert "tools" in Source(str(templated), str(templated)).tokenizer().chat_template


def linked_away(folder: Path) -> None:
    """The folder of templates becomes a link to one of the same content."""
    inside = (folder / TEMPLATE).parent
    inside.rename(folder.parent / "elsewhere")
    inside.symlink_to(folder.parent / "elsewhere")


def of_an_earlier_version(folder: Path) -> None:
    """The record names the folder of templates, and has no hashes of them."""
    record_of(folder, lambda r: [r["files"].remove(TEMPLATE), r["files_sha256"].pop(TEMPLATE)])
    record_of(folder, lambda r: r["files"].insert(0, "additional_chat_templates"))
    assert read_run(folder).files[0] == "additional_chat_templates"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / TEMPLATE).write_text("w2"), f"^{TEMPLATE} is not as it was written$"),
        (lambda f: (f / TEMPLATE).unlink(), f"^{TEMPLATE} is missing$"),
        (lambda f: (f / TEMPLATE).with_name("x.jinja").write_text(""), "^additional_chat_templates/x.jinja is none of"),
        (lambda f: (f / TEMPLATE).with_name(".jinja").write_text(""), "^additional_chat_templates/.jinja is none of"),
        (linked_away, f"^{TEMPLATE} is missing"),
        (of_an_earlier_version, "^additional_chat_templates is a folder and no file"),
        (lambda f: (f / "custom_generate").symlink_to("/"), "^custom_generate is none of the run's files"),
    ],
)
def test_damage_in_folders_is_named(change: Callable[[Path], Any], says: str, templated: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(templated, tmp_path / "small"))
    change(folder)
    assert re.search(says, only_failure(folder))


def test_what_tools_and_people_put_beside_is_none_of_the_result(folder: Path) -> None:
    """A folder that was pushed to the hub and fetched again, or is a repository of git."""
    for name in (".cache/huggingface/download/x.json", ".git/hooks/x.py", ".gitattributes", "._lexigram.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    [before] = [check.message for check in verify(folder).checks if check.name == "files"]
    assert re.fullmatch(r"\d+ files are as they were written", before)
    (folder / "images").mkdir()
    for name in ("README.md", "LICENSE", "LICENSE.txt", "Notice.txt", "images/logo.png"):
        (folder / name).write_text("x")
    found = verify(folder)
    assert found.passed
    assert found.checks[0].message == f"{before}; LICENSE (and 4 more) beside them, which nothing reads"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "adapter_config.json",
        "x.py",
        "inside/x.py",
        "vocab.txt",
        "licensed_tokens.txt",
        "notice.json",
    ],
)
def test_what_might_be_read_is_refused_beside(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    [files] = [check for check in verify(folder).checks if check.name == "files"]
    assert (files.passed, files.message.startswith(f"{name} is none of the run's files")) == (False, True)


def test_what_cannot_be_verified_is_an_error(result: Path, toy: Path, words: Path, tmp_path: Path) -> None:
    with pytest.raises(LexigramError, match=r"is no compressed model \(it has no run\.json\); name what"):
        verify(toy)
    with pytest.raises(LexigramError, match="name it too"):
        verify(result, texts=[str(words)])
    with pytest.raises(LexigramError, match="there is no model"):
        verify(result, against="/no/model")
    with pytest.raises(LexigramError, match="there is no file"):
        verify(result, against=str(toy), texts=["/no/text.txt"])
    with pytest.raises(LexigramError, match="too few for 100000 sequences"):
        verify(result, against=str(toy), texts=[str(words)], sequences=100000)


# --------------------------------------------------------------------------------------------------------- the original


def test_another_original_is_found(result: Path, toy: Path, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(toy)
    with torch.no_grad():
        other.get_submodule(LAYER).weight[3, 3] += 1
        other.model.norm.weight[5] += 1
    other.save_pretrained(tmp_path / "other")
    failed = {check.name: check.message for check in verify(result, against=str(tmp_path / "other")).failed}
    assert failed == {
        "original": f"the weights of {tmp_path / 'other'} are not those that were compressed",
        "uncompressed": "model.norm.weight is not that of the original",
    }


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_original_of_other_layers_is_found(name: str, result: Path, tmp_path: Path) -> None:
    config = TOYS[name]()
    if name == "llama":
        config.intermediate_size = 96
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    message = only_failure(result, against=str(tmp_path / "other"))
    assert re.search("other is not the model that was compressed: .*(no linear layer matches|has the shape)", message)


def test_errors_are_those_of_the_outputs(result: Path, toy: Path, words: Path) -> None:
    """Against outputs of plain linear layers, on inputs that a hook recorded."""
    original, small = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32), load(result)
    ids = token_sequences(Source(str(toy), str(toy)).tokenizer(), read_texts([str(words)]), 8, 32, 0).ids
    seen: dict[str, torch.Tensor] = {}
    for name, module in original.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0].double()))
    with torch.no_grad():
        original(input_ids=ids)
    found = verify(result, against=str(toy), texts=[str(words)])
    assert found.errors.keys() == seen.keys()
    for name, inputs in seen.items():
        weight = original.get_submodule(name).weight.detach().double()
        wrong = weight - small.get_submodule(name).factors.to_dense().double()
        expected = (nn.functional.linear(inputs, wrong).norm() / nn.functional.linear(inputs, weight).norm()).item()
        assert found.errors[name] == pytest.approx(expected, rel=1e-4)


def test_wrong_errors_of_the_record_are_found(folder: Path, toy: Path, words: Path) -> None:
    record_of(
        folder, lambda r: r["layers"][2]["fit"].update(relative_error=r["layers"][2]["fit"]["relative_error"] * 1.01)
    )
    message = only_failure(folder, against=str(toy), texts=[str(words)])
    assert re.fullmatch(r"model\.layers\.0\.self_attn\.v_proj has the error \S+, by the record \S+", message)


@pytest.mark.parametrize("options", [{"sequences": 4}, {"length": 16}, {"calibration_seed": 7}])
def test_other_tokens_are_measured_and_not_judged(
    options: dict[str, int], result: Path, toy: Path, words: Path
) -> None:
    found = verify(result, against=str(toy), texts=[str(words)], **options)
    assert outcomes(found)["layer errors"] is None
    assert "these tokens are not those" in found.checks[-1].message
    assert len(found.errors) == 14


def test_a_sequential_run_is_not_judged_by_plain_inputs(toy: Path, words: Path, tmp_path: Path) -> None:
    made(toy, words, tmp_path / "small", sequential=True)
    found = verify(tmp_path / "small", against=str(toy), texts=[str(words)])
    assert found.passed
    assert outcomes(found)["layer errors"] is None
    assert "inputs from the compressed layers before" in found.checks[-1].message


# ----------------------------------------------------------------------------------------------------- the command line


def test_the_command_ends_in_0_where_nothing_is_wrong(
    result: Path, toy: Path, words: Path, tmp_path: Path, command: Command
) -> None:
    done = command(
        "verify", result, "--against", toy, "--text", words, "--json", tmp_path / "x.json", "--device", "cpu"
    )
    assert (done.code, done.out.count("passed")) == (0, 7)
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["passed"] is True
    assert len(content["errors"]) == 14


def test_the_command_ends_in_1_and_names_the_tensor(folder: Path, tmp_path: Path, command: Command) -> None:
    header = read_headers([folder / WEIGHTS])[f"{LAYER}.factors.left.values"]
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[header.begin + 5] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    ended = command("verify", folder, "--json", tmp_path / "x.json")
    assert ended.code == 1
    assert f"{LAYER}.factors.left.values in {WEIGHTS} is not as it was written; fetch it" in ended.error
    assert "failed" in ended.out
    assert json.loads((tmp_path / "x.json").read_text())["passed"] is False
    assert load(folder) is not None  # what loading cannot tell
