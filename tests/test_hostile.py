"""Folders from somewhere else: whatever is in them, opening one ends in one sentence, or in the model that was written.

The oracle is the undamaged folder: a damaged one is refused, loads as the same bits, or loads as others and `verify` names the
difference. Anything else is a failure: another exception, a wait, memory beyond what the files hold, code that runs, silence.
"""

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conftest import Command
from hostile import FAILURES, FORMS, IDENTICAL, MUTATORS, PWNED, REFUSED, VERIFIED, WEIGHTS, State, build, outcome
from lexigram import LexigramError, load
from lexigram.folders import Frugal, check_config, first_line, opening, printable
from lexigram.headers import read_headers
from lexigram.jsonfiles import read_json

UNDER_LIMITS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One undamaged folder of every form."""
    return build(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def states(folders: dict[str, Path]) -> dict[str, State]:
    return {form: State.of(folder) for form, folder in folders.items()}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of one's own, to be damaged."""
    return Path(shutil.copytree(folders["shared dictionary"], tmp_path / "folder"))


def try_out(form: str, name: str, seed: int, folders: dict[str, Path], states: dict[str, State], place: Path) -> None:
    """Damage a copy and say what came of it where that is a failure."""
    damaged = place / f"{name.replace(' ', '-')}-{form.replace(' ', '-')}-{seed}"
    shutil.copytree(folders[form], damaged, dirs_exist_ok=True)
    try:
        MUTATORS[name](damaged, random.Random(seed))
        found = outcome(damaged, states[form])
        assert found.kind not in FAILURES, f"{name}, {form}, seed {seed}: {found.kind}: {found.said}"
    finally:
        shutil.rmtree(damaged)


cases = given(form=st.sampled_from(list(FORMS)), name=st.sampled_from(list(MUTATORS)), seed=st.integers(0, 2**32))


@settings(max_examples=100, derandomize=True, **UNDER_LIMITS)  # type: ignore[arg-type]
@cases
def test_a_damaged_folder_is_refused_or_the_same_or_named(
    form: str, name: str, seed: int, folders: dict[str, Path], states: dict[str, State], tmp_path: Path
) -> None:
    try_out(form, name, seed, folders, states, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=2000, derandomize=True, **UNDER_LIMITS)  # type: ignore[arg-type]
@cases
def test_thousands_of_damaged_folders(
    form: str, name: str, seed: int, folders: dict[str, Path], states: dict[str, State], tmp_path: Path
) -> None:
    try_out(form, name, seed, folders, states, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATORS)
def test_every_mutator_is_tried_on_every_form(
    name: str, folders: dict[str, Path], states: dict[str, State], tmp_path: Path
) -> None:
    for form in FORMS:
        try_out(form, name, 1, folders, states, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_an_undamaged_folder_is_the_same(form: str, folders: dict[str, Path], states: dict[str, State]) -> None:
    assert outcome(folders[form], states[form]).kind == IDENTICAL


def test_the_outcomes_tell_damage_apart(folder: Path, states: dict[str, State]) -> None:
    """The oracle of the fuzzing itself: each kind of damage has the outcome that it must have."""
    original = states["shared dictionary"]
    MUTATORS["weights data bit flipped"](folder, random.Random(0))
    assert outcome(folder, original).kind == VERIFIED
    record = json.loads((folder / "run.json").read_text())
    record["tensors_sha256"] = dict.fromkeys(record["tensors_sha256"], "")
    (folder / "run.json").write_text(json.dumps(record))
    assert outcome(folder, original).kind == VERIFIED
    record["tensors_sha256"] = {}
    (folder / "run.json").write_text(json.dumps(record))
    assert outcome(folder, original).kind == "silent difference"
    (folder / "config.json").unlink()
    assert outcome(folder, original).kind == REFUSED


# ------------------------------------------------------------------------------------------------- what the config says


def edit(folder: Path, name: str, **changes: Any) -> None:
    content = json.loads((folder / name).read_text())
    content.update(changes)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10**9}, r"says num_hidden_layers: 1e\+09, and the weight files hold \d+ tensors"),
        ({"num_labels": 10**9}, r"says num_labels: 1e\+09"),
        (
            {"vocab_size": 10**12},
            r"embed_tokens\.weight has the shape \(200, 32\) in the weights and \(1000000000000, 32\)",
        ),
        ({"hidden_size": 10**9}, "by config.json|is missing|1000000000"),
        ({"num_hidden_layers": 200}, r"is missing|not complete"),
        ({"num_hidden_layers": -1}, "."),
        ({"tie_word_embeddings": True, "vocab_size": 2**40}, "by config.json"),
        (
            {"attn_implementation": "someone/kernel"},
            r"asks for code from elsewhere \(attn_implementation: 'someone/kernel'\)",
        ),
        ({"fusion_config": {"x": True}}, "fusion_config, which replaces code"),
        ({"model_type": "zork", "auto_map": {"AutoConfig": "evil.Evil"}}, "."),
        ({"model_type": "a\nb"}, "."),
    ],
)
def test_what_a_config_may_not_ask_for(changes: dict[str, Any], says: str, folder: Path, command: Command) -> None:
    """Neither with `load` nor with a command; and soon."""
    edit(folder, "config.json", **changes)
    (folder / "evil.py").write_text(f"open({str(folder / PWNED)!r}, 'w')\nclass Evil: pass\n")
    start = time.perf_counter()
    with pytest.raises(LexigramError, match=says) as refused:
        load(folder)
    assert len(str(refused.value).splitlines()) == 1
    assert ";" in str(refused.value)  # cause and remedy
    for args in (["generate", folder, "w3"], ["export", folder, "--dense", folder.parent / "out"]):
        assert command(*args).code == 1
    assert command("verify", folder).code == 1
    assert time.perf_counter() - start < 20
    assert not (folder / PWNED).exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10**9}, r"says num_hidden_layers: 1e\+09, and the weight files hold \d+ tensors"),
        ({"num_labels": 10**9}, r"says num_labels: 1e\+09"),
        ({"vocab_size": 10**12}, "."),
        ({"hidden_size": 10**9}, "."),
        ({"num_hidden_layers": 20}, "."),
        ({"num_hidden_layers": -1}, "."),
        ({"tie_word_embeddings": True, "vocab_size": 2**40}, "."),
        ({"attn_implementation": "someone/kernel"}, "asks for code from elsewhere"),
        ({"fusion_config": {"x": True}}, "fusion_config, which replaces code"),
        ({"model_type": "zork", "auto_map": {"AutoConfig": "evil.Evil"}}, "."),
        ({"model_type": "a\nb"}, "."),
    ],
    ids=str,
)
def test_an_original_is_data_too(
    changes: dict[str, Any], says: str, folders: dict[str, Path], words: Path, tmp_path: Path, command: Command
) -> None:
    """A folder that is to be compressed, or evaluated; soon, in a sentence, and nothing is written."""
    model = Path(shutil.copytree(folders["int4"].parent / "toy", tmp_path / "toy"))
    edit(model, "config.json", **changes)
    (model / "evil.py").write_text(f"open({str(model / PWNED)!r}, 'w')\nclass Evil: pass\n")
    text = ["--sequences", 4, "--length", 32, "-c", words]
    for args in (["compress", model, "--out", tmp_path / "out", *text], ["plan", model, *text], ["eval", model]):
        start = time.perf_counter()
        said = command(*args, *(["--text", words] if args[0] == "eval" else []))
        assert said.code == 1
        assert len(said.error.splitlines()) == 1
        assert re.search(says, said.error), said.error
        assert time.perf_counter() - start < 20
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    assert not (model / PWNED).exists()


@pytest.mark.filterwarnings("ignore")
def test_no_known_architecture_is_refused_for_its_numbers(tmp_path: Path) -> None:
    """Every default config of a causal language model: beside counts of layers there are sizes, periods, angles a layer."""
    configs = []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with suppress(Exception):  # a few have no defaults
            configs.append(json.loads(CONFIG_MAPPING[name]().to_json_string()))
    assert len(configs) > 100
    for config in configs:
        check_config(tmp_path, config, tensors=300)


def test_a_model_of_too_many_parts_is_not_built() -> None:
    with pytest.raises(LexigramError, match="far more parts than the 3 tensors"), Frugal(3), torch.device("meta"):
        nn.ModuleList(nn.Linear(1, 1) for _ in range(10**7))


def test_ids_that_the_model_has_no_embedding_for(folder: Path, command: Command, words: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["w3"] = 10**6
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for args in (["generate", folder, "w3"], ["eval", folder, "--text", words, "--context", 32]):
        ended = command(*args)
        assert ended.code == 1
        assert re.search(r"gives the (id|token) 1000000, .*the model.* has 200 (embeddings|entries); ", ended.error)


def test_pickles_beside_are_never_opened(folder: Path) -> None:
    MUTATORS["file beside"](folder, random.Random(0))
    config = json.loads((folder / "config.json").read_text())
    for method in ("zork", "gptq"):
        config["quantization_config"]["quant_method"] = method
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(LexigramError, match="holds an ordinary model"):
            load(folder)
    assert not (folder / PWNED).exists()


# --------------------------------------------------------------------------------------------------- what the files are


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "generation_config.json", "run.json"])
def test_a_pipe_is_not_waited_for(name: str, folder: Path, command: Command) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(LexigramError, match=rf"{re.escape(name)} is neither a file nor a folder"):
        load(folder)
    for args in (["inspect", folder], ["verify", folder]):
        ended = command(*args)
        assert (ended.code, "is neither a file nor a folder" in ended.error) == (1, True)


def test_links_to_files_are_files(folder: Path, states: dict[str, State]) -> None:
    """A folder in the cache of the hub consists of them."""
    for file in list(folder.iterdir()):
        shutil.move(file, folder.parent / file.name)
        file.symlink_to(folder.parent / file.name)
    assert State.of(folder).same(states["shared dictionary"])


def test_an_adapter_beside_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(LexigramError, match=r"holds an adapter \(adapter_config\.json\)"):
        load(folder)


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].view(torch.int16)}),
            r"model\.norm\.weight is stored as I16, and LlamaForCausalLM has it as bfloat16",
        ),
        (
            lambda t: t["model.norm.weight"].fill_(torch.nan),
            r"has values in model\.norm\.weight that are not finite",
        ),
        (
            lambda t: t["model.embed_tokens.weight"][7].fill_(torch.inf),
            r"has values in model\.embed_tokens\.weight that are not finite",
        ),
    ],
)
def test_what_is_not_compressed_is_looked_at(change: Any, says: str, folder: Path) -> None:
    rewritten(folder, change)
    with pytest.raises(LexigramError, match=says):
        load(folder)


def test_two_files_with_one_tensor(folder: Path) -> None:
    other = folder / "lexigram-2.safetensors"
    shutil.copy(folder / WEIGHTS, other)
    with pytest.raises(LexigramError, match=r"stands in lexigram-2\.safetensors and in lexigram\.safetensors"):
        read_headers([other, folder / WEIGHTS])


# ------------------------------------------------------------------------------------------------------------ its parts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": NaN}', "the number NaN is not finite"),
        ('{"a": -1e999}', "the number -1e999 is not finite"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds no JSON object"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON"),
    ],
)
def test_json_that_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(LexigramError, match=says):
        read_json(tmp_path / "x.json", remedy="write it again")


def test_numbers_that_are_not_finite_may_be_let_pass(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": Infinity, "b": 1.5}')
    assert read_json(tmp_path / "x.json", finite=False, remedy="write it again") == {"a": float("inf"), "b": 1.5}


class Panic(BaseException):
    """As a library written in Rust raises it."""


def test_a_panic_is_an_error_and_an_interrupt_is_none() -> None:
    with pytest.raises(LexigramError, match=r"^cannot look: Panic: boo; check that"), opening("cannot look"):
        raise Panic("boo.\nand more")
    with pytest.raises(KeyboardInterrupt), opening("cannot look"):
        raise KeyboardInterrupt
    with pytest.raises(LexigramError, match=r"^as it is$"), opening("cannot look"):
        raise LexigramError("as it is")


def test_what_a_folder_says_is_shown_in_a_line() -> None:
    assert printable("a\nb\x1b") == r"a\nb\x1b"
    assert printable("é 1") == "é 1"
    assert len(printable("x" * 10_000)) < 400
    assert first_line(ValueError("\n one.\ntwo")) == "ValueError: one"


# -------------------------------------------------------------------------------------------------------------- inspect


def layer(record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = record["layers"][0]
    return found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: layer(r).update(factors={"form": "tucker"}), r"layers\.0\.factors: .*tucker"),
        (lambda r: layer(r).update(factors=[]), "factors"),
        (lambda r: layer(r).update(shape=[1, 2]), r"its factors are .* the layer is 1 x 2"),
        (lambda r: layer(r).update(kind="[/bold]"), r"layers\.0\.kind"),
        (lambda r: layer(r).update(layer=10**9), r"layers\.0\.layer"),
        (lambda r: layer(r)["fit"].update(relative_error=-1.0), "its relative error is -1"),
        (lambda r: r.update(layers=[], shared=[]), "tells of no layer"),
        (lambda r: r.update(model_bytes_after=0), "model_bytes_after"),
        (lambda r: r.update(bytes_before=10**400), "bytes_before"),
        (lambda r: r.update(shared=[]), "shares .*, which is not in it"),
        (lambda r: r["shared"][0].update(members=["x"]), "belongs to a layer that is not in it"),
        (lambda r: r["layers"].append(layer(r)), "a layer stands twice"),
        (lambda r: r["recipe"].update(method=None), "its recipe has no method"),
    ],
)
def test_inspect_says_what_is_wrong_with_a_record(change: Any, says: str, folder: Path, command: Command) -> None:
    record = json.loads((folder / "run.json").read_text())
    change(record)
    (folder / "run.json").write_text(json.dumps(record))
    for args in (["inspect", folder], ["inspect", folder, "--plot", folder / "x.png"], ["verify", folder]):
        ended = command(*args)
        assert ended.code == 1
        assert re.search(says, ended.error), ended.error
