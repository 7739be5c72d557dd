"""The command line: toys from folder to folder, every kind of bad input, exit codes, and that everything is documented."""

import io
import json
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import typer
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import lexigram
from conftest import Command, Said, contents, toy_folder
from lexigram import cli, recording, staging
from lexigram.evaluation import records as evaluating
from lexigram.methods import METHODS
from lexigram.progress import drawing

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def text(data: Path) -> Path:
    return data / "tinystories" / "tinystories.txt"


@pytest.fixture(scope="session")
def quick(text: Path) -> tuple[object, ...]:
    """Options that make a run on stories260K take a second."""
    return ("--calibration", text, "--sequences", 4, "--length", 32, "--method", "svd")


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


# -------------------------------------------------------------------------------------------------- from folder to folder


QUICK: dict[str, tuple[object, ...]] = {
    "lowrank-sparse": ("--allocation", "uniform", "--rank-share", 0.1, "--rounds", 5),
    "cap": ("--iterations", 40, "--passes", 1, "--batch", 4),
    "oats": ("--rounds", 10),
    "double-sparse": ("--iterations", 2, "--tightening", 2),
}
"""Options that save time; a method that is not here runs with its defaults."""

ALONE = {"double-sparse", "lowrank-sparse", "structured"}  # in their forms
OTHERS = sorted(METHODS.keys() - {"cospadi", "svd", "quantize"})


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("llama", method) for method in ("cospadi", "svd", *sorted(ALONE))),
        *(pytest.param("llama", method, marks=pytest.mark.slow) for method in OTHERS if method not in ALONE),
        *(
            pytest.param(name, method, marks=pytest.mark.slow)
            for name in ("qwen3", "gemma3", "gpt2")
            for method in ("cospadi", "svd")
        ),
        # Fused attention has no heads that can be dropped by themselves.
        *(pytest.param("gpt2", method, marks=pytest.mark.slow) for method in OTHERS if method != "structured"),
    ],
)
def test_a_toy_goes_through_every_command(
    name: str, method: str, command: Command, words: Path, tmp_path: Path
) -> None:
    toy = toy_folder(tmp_path / "toy", name)
    small, dense, figures = tmp_path / "small", tmp_path / "dense", tmp_path / "figures.json"
    calibration = ("--calibration", words, "--sequences", 8, "--length", 64, "--dtype", "float32", "--device", "cpu")
    chosen = ("--method", method, *QUICK.get(method, ()))
    done = command("compress", toy, "--out", small, *chosen, "--ratio", 0.1, *calibration)
    assert done.code == 0, done.err
    record = json.loads((small / "run.json").read_text())
    stored = load_file(small / "lexigram.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == record["model_bytes_after"]
    assert record["bytes_after"] <= int(0.9 * record["bytes_before"])
    assert f"{record['bytes_after']:,}" in done.out
    assert record["command"].endswith("--device cpu")

    original, loaded = AutoModelForCausalLM.from_pretrained(toy), AutoModelForCausalLM.from_pretrained(small)
    expected, found = logits_of(original), logits_of(loaded)
    assert torch.equal(found, logits_of(lexigram.load(small)))
    # A transposed or misplaced factor would leave nothing in common.
    assert torch.nn.functional.cosine_similarity(expected.flatten(), found.flatten(), dim=0) > 0.8

    assert command("export", small, "--dense", dense).code == 0
    assert (dense / "model.safetensors").is_file()
    assert torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(dense)), found, atol=1e-4)

    evaluate = ("--text", words, "--context", 64, "--windows", 2)
    assert command("eval", small, *evaluate, "--reference", toy, "--json", figures).code == 0
    content = json.loads(figures.read_text())
    assert {"token_perplexity", "word_perplexity", "tokens", "kl", "top1_agreement"} <= content.keys()
    assert content["tokens"] == 2 * 63
    assert 0 < content["kl"] < 1
    for shown in (command("report", figures), command("inspect", small), command("generate", small, "w3 w4")):
        assert shown.code == 0
        assert shown.out.strip()
    assert json.loads(command("inspect", small, "--json").out) == record


def test_the_head_of_an_untied_model_is_compressed_on_request(command: Command, words: Path, tmp_path: Path) -> None:
    toy = toy_folder(tmp_path / "toy", "llama")
    options = ("--calibration", words, "--sequences", 8, "--length", 64, "--ratio", 0.1)
    assert (
        command("compress", toy, "-o", tmp_path / "out", *options, "--include", "lm_head", "--include", "*.mlp.*").code
        == 0
    )
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    head = next(layer for layer in record["layers"] if layer["name"] == "lm_head")
    assert (head["layer"], head["shape"]) == (None, [200, 64])
    assert len(record["layers"]) == 1 + 2 * 3
    assert not any("lm_head.weight" in key for key in load_file(tmp_path / "out" / "lexigram.safetensors"))
    expected, found = (logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / part)) for part in ("toy", "out"))
    assert torch.nn.functional.cosine_similarity(expected.flatten(), found.flatten(), dim=0) > 0.8
    assert "lm_head" in command("inspect", tmp_path / "out").out


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    command: Command, stories: Path, quick: tuple[object, ...], tmp_path: Path
) -> None:
    done = command("compress", stories, "--out", tmp_path / "out", *quick, "--ratio", 0.5, "--dry-run")
    assert done.code == 0
    assert "svd at ratio 0.5" in done.out
    assert "rank 10" in done.out  # k_proj, 32 x 64: half of 4096 bytes over 192 bytes a rank
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_file_repeats_a_run(
    command: Command, stories: Path, quick: tuple[object, ...], tmp_path: Path
) -> None:
    assert command("compress", stories, "--out", tmp_path / "one", *quick, "--include", "q_proj").code == 0
    recipe = tmp_path / "one" / "recipe.yaml"
    assert command("compress", stories, "--out", tmp_path / "two", "--recipe", recipe).code == 0
    one, two = ((tmp_path / part / "lexigram.safetensors").read_bytes() for part in ("one", "two"))
    assert one == two


def test_figures_that_are_infinite_are_null_in_json(
    command: Command, stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = tmp_path / "figures.json"
    real = evaluating.evaluate

    def infinite(*args: Any, **options: Any) -> lexigram.Evaluation:
        return real(*args, **options).model_copy(update={"word_perplexity": float("inf")})

    monkeypatch.setattr(evaluating, "evaluate", infinite)
    ended = command("eval", stories, "-t", text, "--context", 32, "--windows", 1, "--json", figures)
    assert ended.code == 0
    assert "inf" in ended.out

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(figures.read_text(), parse_constant=refuse)
    assert content["word_perplexity"] is None
    assert content["token_perplexity"] > 1
    reported = command("report", figures)
    assert reported.code == 0
    assert reported.out == ended.out


def test_a_reference_with_another_tokenizer_is_refused(command: Command, words: Path, tmp_path: Path) -> None:
    """Of the same vocabulary size: the divergence would be a number, and mean nothing."""
    toy, other = toy_folder(tmp_path / "toy", "llama"), toy_folder(tmp_path / "other", "llama")
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w7"], vocabulary["w8"] = vocabulary["w8"], vocabulary["w7"]
    file.write_text(json.dumps(content))
    evaluate = ("eval", toy, "--text", words, "--context", 64, "--windows", 2, "--reference")
    ended = command(*evaluate, other)
    assert ended.code == 1
    assert re.search("toy and .*other split the text into different tokens, .*; name the model", ended.error)
    assert command(*evaluate, toy).code == 0


def test_names_with_brackets_are_printed_as_they_are(
    command: Command, stories: Path, quick: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "[bold]model[/]"
    shutil.copytree(stories, folder)
    done = command("compress", folder, "--out", tmp_path / "[red]out", *quick, "--include", "k_proj")
    assert done.code == 0
    assert f"{tmp_path}/[red]out: " in done.out
    assert "[bold]model[/]:svd" in "".join(done.out.split())  # a title is broken to the width of its table
    assert command("compress", "[red]x", "-o", tmp_path / "no").error.startswith("there is no model '[red]x'")


# -------------------------------------------------------------------------------------------------------------- bad input


class Case(NamedTuple):
    """Bad input: what to prepare, what to run, and what must be said."""

    args: Callable[[SimpleNamespace], list[object]]
    says: str
    keeps_work: bool = False


def compress(*options: object, model: object = None) -> Callable[[SimpleNamespace], list[object]]:
    """`lexigram compress` on stories260K with a wrong option."""
    return lambda at: ["compress", model or at.stories, "--out", at.tmp / "out", *at.quick, *options]


def with_file(name: str, content: bytes, *args: object) -> Callable[[SimpleNamespace], list[object]]:
    """The same after writing a file; FILE in the arguments stands for its path."""

    def build(at: SimpleNamespace) -> list[object]:
        (at.tmp / name).write_bytes(content)
        found = [at.tmp / name if arg == "FILE" else arg for arg in args]
        return compress(*found)(at) if args[0] != "MODEL" else compress(model=at.tmp / name)(at)

    return build


def with_config(content: str) -> Callable[[SimpleNamespace], list[object]]:
    """A model folder that holds nothing but this config.json."""

    def build(at: SimpleNamespace) -> list[object]:
        (at.tmp / "model").mkdir()
        (at.tmp / "model" / "config.json").write_text(content)
        return compress(model=at.tmp / "model")(at)

    return build


def with_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[SimpleNamespace], list[object]]:
    """stories260K with other weights."""

    def build(at: SimpleNamespace) -> list[object]:
        shutil.copytree(at.stories, at.tmp / "model", copy_function=shutil.copyfile)
        (at.tmp / "model").chmod(0o755)
        tensors = load_file(at.tmp / "model" / "model.safetensors")
        change(tensors)
        save_file(tensors, at.tmp / "model" / "model.safetensors", metadata={"format": "pt"})
        return compress(model=at.tmp / "model")(at)

    return build


def truncated(at: SimpleNamespace) -> list[object]:
    args = with_weights(lambda tensors: None)(at)
    file = at.tmp / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])
    return args


def set_nan(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = float("nan")

    return change


def explode(tensors: dict[str, torch.Tensor]) -> None:
    for kind in ("up", "gate"):
        tensors[f"model.layers.1.mlp.{kind}_proj.weight"] *= 1e38


BAD_COMPRESS = {
    "model folder missing": Case(compress(model="/no/model"), "there is no model '/no/model': no such folder"),
    "model without config": Case(
        lambda at: compress(model=_made(at.tmp / "empty"))(at), r"has no config\.json; name a folder"
    ),
    "config of an image model": Case(
        with_config('{"model_type": "vit"}'), "is a ViT model, not a causal language model"
    ),
    "config of nothing": Case(with_config("{}"), "cannot open the config of .*model_type"),
    "config that is no JSON": Case(
        with_config("{"), r"config\.json is not JSON \(.*; check that the model is complete"
    ),
    "config of the future": Case(with_config('{"model_type": "zork"}'), "model type `zork`"),
    "config without weights": Case(
        with_config(json.dumps({"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96})),
        "cannot open the tokenizer of",
    ),
    "hub id that is not there": Case(compress(model="no/such-model"), "cannot open the config of no/such-model: .*hub"),
    "gguf missing": Case(compress(model="/no/x.gguf"), r"there is no file /no/x\.gguf; check the path"),
    "gguf garbage": Case(with_file("x.gguf", b"garbage" * 99, "MODEL"), "cannot open the config of .*GGUF"),
    "model is a text file": Case(with_file("x.txt", b"hello", "MODEL"), "is a file, but neither a folder nor .gguf"),
    "weight NaN": Case(
        with_weights(set_nan("model.layers.1.mlp.up_proj.weight")),
        r"model\.layers\.1\.mlp\.up_proj\.weight .*not finite",
    ),
    "norm NaN": Case(with_weights(set_nan("model.norm.weight")), r"model\.norm\.weight that are not finite.*; mend"),
    "activations infinite": Case(
        with_weights(explode),
        r"inputs of model\.layers\.1\.mlp\.down_proj are not finite .*--compute-dtype float32",
        keeps_work=True,
    ),
    "weights of another shape": Case(
        with_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)})),
        r"model\.norm\.weight has the shape \(63,\) in the weights and \(64,\) by config\.json",
    ),
    "weights missing": Case(
        with_weights(lambda tensors: tensors.__delitem__("model.norm.weight")),
        r"is not complete: model\.norm\.weight is missing",
    ),
    "weights truncated": Case(
        truncated, r"the weight file .*model\.safetensors cannot be read: .*fetch or write the model again"
    ),
    "text missing": Case(compress("-c", "/no/text.txt"), r"there is no file /no/text\.txt"),
    "text empty": Case(with_file("e.txt", b" \n", "-c", "FILE"), "holds no text"),
    "text binary": Case(with_file("b.txt", bytes(range(256)), "-c", "FILE"), "is not UTF-8: byte 128"),
    "text of unknown kind": Case(with_file("b.pdf", b"x", "-c", "FILE"), "has the suffix '.pdf'"),
    "text too long": Case(compress("--sequences", 10**6), "too few for 1000000 sequences of 32"),
    "jsonl without text": Case(with_file("j.jsonl", b'{"content": 1}\n', "-c", "FILE"), "line 1 has no field 'text'"),
    "self beside a file": Case(compress("-c", "self"), "'self' stands beside other calibration texts"),
    "ratio 0": Case(compress("-r", 0), r"ratio is 0\.0; it should be greater than 0"),
    "ratio 1": Case(compress("-r", 1), r"ratio is 1\.0; it should be less than 1"),
    "ratio -1": Case(compress("-r", -1), r"ratio is -1\.0; it should be greater than 0"),
    "ratio 2": Case(compress("-r", 2), r"ratio is 2\.0; it should be less than 1"),
    "ratio nan": Case(compress("-r", "nan"), "ratio is nan; it should be"),
    "ratio too large": Case(compress("-r", 0.9999), r"q_proj .* at ratio 0\.9999: .* too small: .*; lower the ratio"),
    "length beyond context": Case(compress("--length", 513), "length of 513 exceeds the model's context of 512; lower"),
    "no sequences": Case(compress("--sequences", 0), "^--sequences is 0; it should be greater"),
    "option of another method": Case(
        compress("--rho", 2),
        "^--rho is an option of cospadi, and the method is svd; leave it out, or take --method cospadi$",
    ),
    "preset of another method": Case(compress("--preset", "fast"), "leave it out for the method svd"),
    "unknown coding": Case(compress("-m", "cospadi", "--coding", "lars"), "^--coding is 'lars'; it should be 'htp'"),
    "recipe missing": Case(compress("--recipe", "/no/r.yaml"), r"the recipe /no/r\.yaml cannot be read: No such file"),
    "recipe is a folder": Case(compress("--recipe", "/tmp"), "the recipe /tmp cannot be read: Is a directory"),
    "recipe is no YAML": Case(with_file("r.yaml", b"a: [1", "--recipe", "FILE"), "is not YAML: .*line 1"),
    "recipe is a list": Case(with_file("r.yaml", b"- a", "--recipe", "FILE"), "holds no mapping"),
    "recipe with a misspelt key": Case(
        with_file("r.yaml", b"ratioo: 0.2", "--recipe", "FILE"), "unknown key 'ratioo'; did you mean 'ratio'"
    ),
    "recipe with a word as method": Case(
        with_file("r.yaml", b"method: svd", "--recipe", "FILE"), "method is 'svd'; write a mapping"
    ),
    "include matches nothing": Case(
        compress("--include", "q_prj"), "no linear layer matches 'q_prj'; did you mean 'q_proj'"
    ),
    "exclude matches nothing": Case(
        compress("--exclude", "zork"), "no linear layer matches 'zork'; the kinds are down_proj"
    ),
    "exclude matches all": Case(compress("--exclude", "*"), "no linear layer is left"),
    "head is tied": Case(compress("--include", "lm_head"), "lm_head shares its weight with the input embedding"),
    "device unknown": Case(compress("--device", "banana"), "the device 'banana' cannot be used: .*; name another"),
    "device absent": Case(compress("--device", "cuda:77"), "the device 'cuda:77' cannot be used: .*; name another"),
    "pattern bad": Case(
        compress("-m", "wanda", "--pattern", "bad"),
        r"^--pattern is 'bad'; write any, rows, N:M such as 2:4, or RxC such as 16x16$",
    ),
    "pattern too wide": Case(
        compress("-m", "magnitude", "--pattern", "1x7"),
        r"q_proj \(64, 64\) at ratio 0\.2: 64 columns are not whole groups of 7; choose another pattern",
    ),
    "pattern too high for the knapsack": Case(
        compress("-m", "magnitude", "--pattern", "5x1", "--allocation", "knapsack"),
        r"q_proj \(64, 64\): 64 rows are not whole tiles of 5; choose another pattern",
    ),
    "ratio too large for 2:4": Case(
        compress("-m", "sparsegpt", "--pattern", "2:4", "-r", 0.5),
        r"q_proj .* at ratio 0\.5: a budget of 4096 bytes is too small: .* need 4608; lower the ratio",
    ),
    "knapsack for what chooses by itself": Case(
        compress("-m", "cap", "--allocation", "knapsack"),
        "the method cap chooses by itself; take the allocation global or uniform",
    ),
    "dtype unknown": Case(compress("--dtype", "int8"), "dtype is 'int8'; it should be 'bfloat16'"),
}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.fixture
def at(stories: Path, quick: tuple[object, ...], text: Path, tmp_path: Path) -> SimpleNamespace:
    """Where bad input is prepared."""
    return SimpleNamespace(tmp=tmp_path, stories=stories, quick=quick, text=text)


@pytest.mark.parametrize("case", BAD_COMPRESS.values(), ids=BAD_COMPRESS)
def test_bad_input_to_compress(case: Case, command: Command, at: SimpleNamespace) -> None:
    args = case.args(at)
    before = contents(at.tmp)
    ended = command(*args)
    assert ended.code == 1
    assert re.search(case.says, ended.error), ended.error
    kept = str(at.tmp / "out.unfinished")
    after = contents(at.tmp)
    assert (kept in after) == case.keeps_work
    assert {path: content for path, content in after.items() if not path.startswith(kept)} == before


BAD_OTHERS = {
    "eval beyond context": Case(
        lambda at: ["eval", at.stories, "-t", at.text],
        "context 1024 is more than the 512 positions .*; use context 512",
    ),
    "eval on no text": Case(lambda at: ["eval", at.stories, "-t", "/no.txt"], r"there is no file /no\.txt"),
    "eval of no model": Case(lambda at: ["eval", _made(at.tmp / "x"), "-t", at.text], r"x has no config\.json"),
    "eval against no model": Case(
        lambda at: [
            "eval",
            at.stories,
            "-t",
            at.text,
            "--context",
            99,
            "--windows",
            1,
            "--reference",
            _made(at.tmp / "x"),
        ],
        r"x has no config\.json",
    ),
    "eval with a stride beyond the context": Case(
        lambda at: ["eval", at.stories, "-t", at.text, "--context", 99, "--stride", 100],
        "stride is 100 with context 99; it must be from 1 to 99",
    ),
    "eval with json into a folder": Case(
        lambda at: ["eval", at.stories, "-t", at.text, "--json", _made(at.tmp / "x")], "x is a folder; name a file"
    ),
    "eval with json below a file": Case(
        lambda at: ["eval", at.stories, "-t", at.text, "--json", at.text / "x.json"],
        r"x\.json cannot be written: .*txt is not",
    ),
    "generate from no model": Case(lambda at: ["generate", "/no/model", "Once"], "there is no model '/no/model'"),
    "inspect a model of another": Case(
        lambda at: ["inspect", at.stories],
        r"stories260K is no compressed model \(it has no run\.json\); name what `lexigram compress --out` wrote$",
    ),
    "inspect nothing": Case(
        lambda at: ["inspect", "/no/folder"], r"^/no/folder is no compressed model \(it has no run\.json\)"
    ),
    "verify a model of another": Case(
        lambda at: ["verify", at.stories], r"stories260K is no compressed model \(it has no run\.json\)"
    ),
    "heal a model of another": Case(
        lambda at: ["heal", at.stories, "--out", at.tmp / "out", "--text", at.text],
        r"stories260K is no compressed model \(it has no run\.json\)",
    ),
    "inspect a run of another": Case(
        lambda at: ["inspect", _file(at.tmp / "run.json", "{}").parent],
        r"run\.json was not written by lexigram .*missing",
    ),
    "inspect no JSON": Case(lambda at: ["inspect", _file(at.tmp / "run.json", "{").parent], r"run\.json is not JSON"),
    "inspect a list": Case(lambda at: ["inspect", _file(at.tmp / "run.json", "[]").parent], "holds no JSON object"),
    "export a model of another": Case(
        lambda at: ["export", at.stories, "--dense", at.tmp / "out"],
        "holds an ordinary model; open it with transformers",
    ),
    "export nothing": Case(
        lambda at: ["export", "/no/folder", "--dense", at.tmp / "out"], "there is no folder /no/folder"
    ),
    "export an empty folder": Case(
        lambda at: ["export", _made(at.tmp / "x"), "--dense", at.tmp / "out"], "cannot load .*/x: "
    ),
    "report a folder": Case(lambda at: ["report", at.tmp], "cannot be read: Is a directory"),
    "report nothing": Case(
        lambda at: ["report", "/no.json"],
        r"/no\.json cannot be read: No such file .*; name what `lexigram eval --json`",
    ),
    "report something else": Case(
        lambda at: ["report", _file(at.tmp / "run.json", '{"ratio": 1}')], r"run\.json holds no evaluation; name what"
    ),
}


def _file(file: Path, content: str) -> Path:
    file.write_text(content)
    return file


@pytest.mark.parametrize("case", BAD_OTHERS.values(), ids=BAD_OTHERS)
def test_bad_input_to_the_other_commands(case: Case, command: Command, at: SimpleNamespace) -> None:
    args = case.args(at)
    before = contents(at.tmp)
    ended = command(*args)
    assert ended.code == 1
    assert re.search(case.says, ended.error), ended.error
    assert contents(at.tmp) == before
    assert not ended.err.startswith("\n")  # no display of a progress that there was not


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--bogus"], "No such option: --bogus"),
        (["bogus"], "No such command 'bogus'"),
        (["compress"], "Missing argument|Missing parameter"),
        (["compress", "m"], "Missing option '--out'|Missing parameter"),
        (["compress", "m", "-o", "x", "--ratio", "much"], "ratio"),
        (["compress", "m", "-o", "x", "--method", "zork"], "'cospadi'"),
        (["compress", "m", "-o", "x", "--preset", "zork"], "'published'"),
        (["eval", "m", "-t", "x", "--dtype", "float99"], "'bfloat16'"),
        (["eval", "m", "-t", "x", "--context", "many"], "context"),
        (["eval", "m", "-t", "x", "--context", "1"], "'--context'.* 2"),
        (["eval", "m", "-t", "x", "--stride", "0"], "'--stride'.* 1"),
        (["eval", "m", "-t", "x", "--windows", "0"], "'--windows'.* 1"),
        (["generate", "m"], "Missing argument|Missing parameter"),
        (["generate", "m", "p", "--tokens", "0"], "'--tokens'.* 1"),
        (["export", "m"], "Missing option '--out'|Missing parameter"),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_in_2(args: list[str], says: str, command: Command) -> None:
    ended = command(*args)
    assert ended.code == 2
    assert re.search(says, ended.err), ended.err
    assert "Usage:" in ended.err


def test_a_windowing_that_cannot_be_is_told_before_a_model_is_opened(
    command: Command, at: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "open_model", lambda *_args, **_options: pytest.fail("a model was opened"))
    ended = command("eval", at.stories, "-t", at.text, "--context", 8, "--stride", 9)
    assert ended.code == 1
    assert "stride is 9 with context 8" in ended.error


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_leaves_nothing_on_a_screen_where_there_was_none(terminal: bool) -> None:
    """Nor in a file that errors go to."""
    console = Console(file=io.StringIO(), force_terminal=terminal, force_interactive=terminal, width=100)
    with pytest.raises(lexigram.LexigramError), drawing(console):
        raise lexigram.LexigramError("before the first stage")
    assert console.file.getvalue() == ""
    with drawing(console) as bars:
        with bars.stage("read", 2) as step:
            step()
        with bars.steps("evaluate") as update:
            update(3, 4)
    said = console.file.getvalue()
    assert all((text in said) == terminal for text in ("read", "1/2", "evaluate", "3/4"))
    assert bool(said) == terminal


# ------------------------------------------------------------------------------------------------------- the output folder


def test_an_output_that_is_not_empty_is_left_alone(command: Command, at: SimpleNamespace) -> None:
    _file(_made(at.tmp / "out") / "precious.txt", "mine")
    before = contents(at.tmp)
    ended = command(*compress()(at))
    assert (ended.code, contents(at.tmp)) == (1, before)
    assert re.search("out exists and is not empty; name another folder, or replace it with --overwrite", ended.error)


@pytest.mark.parametrize("run_file", [None, '{"loss": 0.1}', "not JSON", "[]"])
def test_overwrite_replaces_only_what_lexigram_wrote(
    run_file: str | None, command: Command, at: SimpleNamespace
) -> None:
    _file(_made(at.tmp / "out") / "precious.txt", "mine")
    if run_file is not None:  # other software writes a run.json too
        _file(at.tmp / "out" / "run.json", run_file)
    before = contents(at.tmp)
    ended = command(*compress("--overwrite")(at))
    assert (ended.code, contents(at.tmp)) == (1, before)
    assert "out holds precious.txt, which lexigram did not write" in ended.error


def test_overwrite_replaces_an_earlier_result_and_keeps_it_where_the_new_one_fails(
    command: Command, at: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = at.tmp / "out"
    assert command(*compress("--include", "q_proj", "-r", 0.3)(at)).code == 0
    first = contents(at.tmp)
    assert command(*compress("--include", "q_proj", "-r", 0.5)(at)).code == 1  # without --overwrite

    def full(_folder: Path) -> dict[str, int]:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recording, "stored_bytes", full)
        ended = command(*compress("--include", "q_proj", "-r", 0.5, "--overwrite")(at))
    assert ended.code == 1
    assert re.search("out could not be written: .*No space left on device", ended.error)
    kept = at.tmp / "out.unfinished"
    assert {path: content for path, content in contents(at.tmp).items() if not path.startswith(str(kept))} == first

    assert command(*compress("--include", "q_proj", "-r", 0.5, "--overwrite", "--resume")(at)).code == 0
    assert json.loads((out / "run.json").read_text())["requested_ratio"] == 0.5
    assert [path.name for path in at.tmp.iterdir()] == ["out"]

    _file(out / "notes.txt", "mine")
    before = contents(at.tmp)
    ended = command(*compress("--include", "q_proj", "--overwrite")(at))
    assert (ended.code, contents(at.tmp)) == (1, before)
    assert "out holds notes.txt, which lexigram did not write" in ended.error


def test_an_export_is_written_whole_or_not_at_all(
    command: Command, at: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*compress("--include", "q_proj")(at)).code == 0
    _file(_made(at.tmp / "taken") / "precious.txt", "mine")
    before = contents(at.tmp)

    def full(_self: object, folder: Path, **_options: object) -> None:
        _file(Path(folder) / "model.safetensors", "half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        ended = command("export", at.tmp / "out", "--dense", at.tmp / "dense")
    assert re.search("dense could not be written: No space left on device; nothing was left there", ended.error)
    for target, says in (
        ("taken", "taken exists and is not empty"),
        ("out/run.json/deep", "is a file, so .* cannot be made in it"),
    ):
        assert re.search(says, command("export", at.tmp / "out", "--dense", at.tmp / target).error)
    assert contents(at.tmp) == before


def test_an_export_replaces_what_compress_would(
    command: Command, at: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, dense = at.tmp / "out", _made(at.tmp / "dense")
    assert command(*compress("--include", "q_proj")(at)).code == 0
    export = ("export", small, "--dense", dense)
    assert command(*export).code == 0  # an empty folder
    first = contents(at.tmp)
    assert sorted(json.loads((dense / "export.json").read_text())["files"]) == sorted(p.name for p in dense.iterdir())
    assert "dense exists and is not empty; name another folder, or replace it with" in command(*export).error

    def full(_self: object, folder: Path, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        assert "No space left" in command(*export, "--overwrite").error
    assert contents(at.tmp) == first
    assert command(*export, "--dtype", "bfloat16", "--overwrite").code == 0
    stored = load_file(dense / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert {path.name for path in at.tmp.iterdir()} == {"out", "dense"}

    _file(dense / "notes.txt", "mine")
    before = contents(at.tmp)
    assert "dense holds notes.txt, which lexigram did not write" in command(*export, "--overwrite").error
    assert "which has to stay as it is" in command("export", small, "--dense", small / "dense").error
    assert "out is the compressed model itself" in command("export", small, "--dense", small, "--overwrite").error
    assert contents(at.tmp) == before


@pytest.mark.parametrize("run_file", ["run.json", "export.json"])
@pytest.mark.parametrize("content", ['{"files": ["precious.txt"]}', '{"lexigram": "1", "files": 5}', "{", "[]"])
def test_an_export_leaves_alone_what_lexigram_did_not_write(
    run_file: str, content: str, command: Command, at: SimpleNamespace
) -> None:
    _file(_made(at.tmp / "dense") / "precious.txt", "mine")
    _file(at.tmp / "dense" / run_file, content)
    before = contents(at.tmp)
    ended = command("export", at.stories, "--dense", at.tmp / "dense", "--overwrite")
    assert (ended.code, contents(at.tmp)) == (1, before)
    assert re.search(r"dense holds (precious\.txt|export\.json), which lexigram did not write", ended.error)


@pytest.mark.parametrize("kind", ["file", "link", "below a file"])
def test_an_output_that_cannot_be_a_folder(kind: str, command: Command, at: SimpleNamespace) -> None:
    file = _file(at.tmp / "file", "mine")
    (at.tmp / "link").symlink_to(at.tmp)
    out = {"file": file, "link": at.tmp / "link", "below a file": file / "deep" / "out"}[kind]
    before = contents(at.tmp)
    ended = command(*compress("--out", out)(at))
    assert (ended.code, contents(at.tmp)) == (1, before)
    assert re.search("is not a folder; name another|is a file, so .* name another output folder", ended.error)


def test_a_parent_that_is_not_writable(command: Command, at: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.os, "access", lambda _path, mode: mode != os.W_OK)  # root may write anywhere
    assert re.search("is not writable; name another output folder", command(*compress()(at)).error)
    assert list(at.tmp.iterdir()) == []


def test_a_disk_that_is_too_small_is_told_before_any_work(
    command: Command, at: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _path: SimpleNamespace(free=3_000_000))
    said = command(*compress()(at)).error
    assert re.search(r"needs about \d+ MB and .* has 3 MB free; free some space", said)


def test_the_current_folder_will_do_where_it_is_empty(
    command: Command, at: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(_made(at.tmp / "here"))
    assert command(*compress("--out", ".", "--include", "q_proj")(at)).code == 0
    assert [path.name for path in at.tmp.iterdir()] == ["here"]
    assert (at.tmp / "here" / "run.json").is_file()


# ------------------------------------------------------------------------------------------------------- real processes

HALF_WAY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
from lexigram import cli, recording
def stop(folder):
    print("half-way", flush=True)
    time.sleep(60)
recording.stored_bytes = stop
cli.main()
"""


@pytest.fixture
def half_way(at: SimpleNamespace) -> Iterator[subprocess.Popen[str]]:
    """A process that stands in the middle of saving."""
    args = list(map(str, compress("--include", "q_proj")(at)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "half-way\n":
            break
    assert len(list(at.tmp.glob("out.unfinished/.out.partial-*"))) == 1
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_keeps_what_is_finished_says_how_to_go_on_and_ends_in_130(
    half_way: subprocess.Popen[str], command: Command, at: SimpleNamespace
) -> None:
    half_way.send_signal(signal.SIGINT)
    _, said = half_way.communicate(timeout=60)
    assert half_way.returncode == 130
    assert [line for line in said.splitlines() if line.strip()] == [
        f"what is finished lies in {at.tmp / 'out.unfinished'}; give the same command with --resume to go on",
        "interrupted; nothing was left half-written",
    ]
    assert [path.name for path in at.tmp.iterdir()] == ["out.unfinished"]
    assert not list((at.tmp / "out.unfinished").glob(".*"))
    assert command(*compress("--include", "q_proj", "--resume")(at)).code == 0
    assert [path.name for path in at.tmp.iterdir()] == ["out"]


def test_after_a_kill_there_is_no_result_and_a_rerun_works(
    half_way: subprocess.Popen[str], command: Command, at: SimpleNamespace
) -> None:
    half_way.kill()
    half_way.wait(timeout=60)
    assert not (at.tmp / "out").exists()
    ended = command(*compress("--include", "q_proj")(at))
    assert ended.code == 1
    assert "holds an unfinished run of 5 fitted matrices or groups; go on with --resume, or delete it" in ended.error
    assert command(*compress("--include", "q_proj", "--resume")(at)).code == 0
    assert lexigram.load(at.tmp / "out") is not None
    assert [path.name for path in at.tmp.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_full_disk_ends_in_one_sentence_and_nothing_is_left(at: SimpleNamespace) -> None:
    """A limit on the size of files stands for the disk: the weights are larger, everything else is smaller."""
    args = list(map(str, compress()(at)))
    ended = subprocess.run(
        [Path(sys.executable).with_name("lexigram"), *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert ended.returncode == 1
    said = Said(ended.returncode, ended.stdout, ended.stderr).error
    assert re.search("out.unfinished.* cannot be written: .*; free some space", said)
    assert list(at.tmp.iterdir()) == []


def test_the_module_runs_like_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m lexigram", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lexigram", run_name="__main__")
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


# --------------------------------------------------------------------------------------------------------- documentation


def options_of(name: str) -> list[Any]:
    return [parameter for parameter in COMMANDS[name].params if parameter.name != "help"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_option_and_argument_is_explained(name: str) -> None:
    assert COMMANDS[name].help
    for parameter in options_of(name):
        assert getattr(parameter, "help", None), f"{name} {parameter.name} has no help"


@pytest.mark.parametrize(
    ("spelling", "metavar"),
    [
        ("--text", "TEXT"),
        ("--calibration", "TEXT"),
        ("--json", "FILE"),
        ("--out", "OUT"),
        ("--against", "MODEL"),
        ("--recipe", "FILE"),
        ("DIR", "DIR"),
        ("MODEL", "MODEL"),
        ("PROMPT", "PROMPT"),
    ],
)
def test_one_thing_is_written_and_shown_alike_by_all_commands(spelling: str, metavar: str) -> None:
    """`TEXT...` takes several at once; without a value an option is a flag, which means something else."""
    found = {
        (parameter.metavar or "").removesuffix("...")
        for name in COMMANDS
        for parameter in options_of(name)
        if spelling in (*parameter.opts, parameter.metavar) and parameter.metavar != ""
    }
    assert found == {metavar}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_argument_is_shown_in_small_letters(name: str) -> None:
    for parameter in options_of(name):
        if parameter.param_type_name == "argument":
            assert (parameter.metavar or "").isupper()


def test_both_spellings_set_one_parameter() -> None:
    def parsed(*args: str) -> dict[str, Any]:
        return COMMANDS[args[0]].make_context(args[0], list(args[1:])).params

    for spelling in ("--reference", "--against"):
        assert parsed("eval", "m", "-t", "x", spelling, "other")["reference"] == "other"
    for spelling in ("--dense", "--out", "-o"):
        assert parsed("export", "m", spelling, "there")["out"] == Path("there")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_parse(name: str) -> None:
    examples = re.findall(r"`(lexigram .*?)`", COMMANDS[name].epilog or "")
    assert examples
    for example in examples:
        _, written, *args = shlex.split(example)
        assert written == name
        COMMANDS[name].make_context(name, args)  # raises for an option that does not exist


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_at_80_columns(name: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for flag in ("--help", "-h"):
        shown = command(name, flag)
        assert shown.code == 0
        for parameter in options_of(name):
            for written in (text for text in parameter.opts if text.startswith("--")):
                assert written in shown.out


def test_defaults_in_help_are_the_real_ones() -> None:
    """Options default to None so that recipes can be overridden; their help tells the default, which must not go stale."""
    recipe = lexigram.Recipe(model="m")
    real = {key: value for config in reversed(METHODS.values()) for key, value in config().model_dump().items()}
    real |= {**recipe.calibration.model_dump(), **recipe.model_dump()}
    real |= {
        "workers": None,
        "method": "cospadi",
        "preset": "fast",
        "calibration": "self",
        "calibration_seed": recipe.calibration.seed,
    }
    told = 0
    for parameter in options_of("compress"):
        if found := re.search(r"\[default: ([^],]+)", parameter.help or ""):
            told += 1
            default = real[parameter.name]
            if default is not None:  # what nothing comes to is told in words
                # A default that differs by method is told for the first that has the field first.
                assert found[1].split(" for ")[0] == (f"{default:g}" if isinstance(default, float) else str(default))
    assert told > 20


@pytest.mark.parametrize("name", ["value_bits", "coding", "update", "start"])
def test_choices_in_help_are_the_real_ones(name: str) -> None:
    [told] = [parameter.metavar for parameter in options_of("compress") if parameter.name == name]
    with pytest.raises(ValidationError) as refused:
        lexigram.CospadiConfig(**{name: "zork"})
    [expected] = [error["ctx"]["expected"] for error in refused.value.errors()]
    assert told.split("|") == re.findall(r"[\w-]+", expected.replace(" or ", " "))


def test_without_a_command_the_help_is_shown(command: Command) -> None:
    ended = command()
    assert ended.code == 2
    assert "compress" in ended.out + ended.err


def test_version(command: Command) -> None:
    assert command("--version") == (
        0,
        f"lexigram {lexigram.__version__} (torch {torch.__version__}, transformers {__import__('transformers').__version__}, "
        f"Python {sys.version.split()[0]})\n",
        "",
    )


def test_the_readme_mentions_every_command() -> None:
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("README.md is not written yet")
    content = readme.read_text(encoding="utf-8")
    missing = [name for name in COMMANDS if not re.search(rf"\blexigram {name}\b", content)]
    assert missing == []
