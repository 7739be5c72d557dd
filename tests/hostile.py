"""Compressed folders damaged on purpose, and what comes of opening them: for the fuzzing tests and the benchmark of the same.

A mutator changes one thing in a folder, at a place that it draws. Nothing here knows which outcome is right for which.
"""

import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from conftest import words_tokenizer
from lexigram import LexigramError, Recipe, Verification, compress, load, verify
from lexigram.cli import show
from lexigram.source import Source

IDS = torch.arange(3, 33).view(2, 15)
WEIGHTS = "lexigram.safetensors"
SECONDS = 10.0  # longer is a hang: an undamaged folder takes a few hundredths of one
MEMORY = 2**30  # bytes beyond what the process had before
PWNED = "pwned"  # a file that appears where a pickle was run

FORMS: dict[str, dict[str, Any]] = {
    "shared dictionary": {"method": {"name": "cospadi"}, "share": "site"},
    "low rank and sparse": {
        "method": {"name": "lowrank-sparse", "value_bits": 4, "rank_share": 0.3, "rounds": 2},
        "allocation": "uniform",
    },
    "int4": {"method": {"name": "quantize", "value_bits": 4}, "ratio": 0.7},
    "pruned": {"method": {"name": "magnitude"}, "ratio": 0.3},
}
"""What the folders consist of: recipes of one toy."""


def build(parent: Path) -> dict[str, Path]:
    """One compressed folder of every form, of a model of one layer."""
    toy = parent / "toy"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=200,
                max_position_embeddings=64,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
    model.save_pretrained(toy)
    words_tokenizer().save_pretrained(toy)
    text = parent / "words.txt"
    draw = random.Random(0)
    text.write_text(" ".join(f"w{draw.randrange(196)}" for _ in range(1000)))
    found = {}
    for name, settings in FORMS.items():
        calibration = {"text": str(text), "sequences": 4, "length": 32}
        recipe = Recipe.parse(
            {"model": str(toy), "ratio": 0.2, "calibration": calibration, "device": "cpu", **settings}
        )
        found[name] = parent / name.replace(" ", "-")
        compress(recipe, found[name])
    return found


# ------------------------------------------------------------------------------------------------------------- what comes of it


class Outcome(NamedTuple):
    """`kind` is one of `KINDS`; `said` is the sentence, or what shows that it is a failure."""

    kind: str
    said: str


REFUSED, IDENTICAL, VERIFIED = "refused", "loads bit-identical", "named by verify"
FAILURES = CRASH, HANG, MEMORY_FAILURE, SILENT, RAN, BABBLE = (
    "crash",
    "hang",
    "memory",
    "silent difference",
    "code was run",
    "no sentence",
)
KINDS = (REFUSED, IDENTICAL, VERIFIED, *FAILURES)


class State(NamedTuple):
    """What a folder loads as: tensors, outputs, and the tokens of a text."""

    tensors: dict[str, torch.Tensor]
    logits: torch.Tensor
    tokens: list[int]

    @classmethod
    def of(cls, folder: Path) -> "State":
        model: PreTrainedModel = load(folder)
        tokenizer = Source(str(folder), str(folder)).tokenizer()
        with torch.no_grad():
            logits = model(input_ids=IDS).logits
        tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        return cls(tensors, logits, list(tokenizer("w3 w4 w5").input_ids))

    def same(self, other: "State") -> bool:
        """Bit for bit, dtypes included."""
        return (
            self.tensors.keys() == other.tensors.keys()
            and self.tokens == other.tokens
            and all(_same(tensor, other.tensors[key]) for key, tensor in self.tensors.items())
            and _same(self.logits, other.logits)
        )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.equal(other)


def outcome(folder: Path, original: State) -> Outcome:
    """Load, look into and verify a folder; what it ends in."""
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("load", lambda: State.of(folder)),
        ("inspect", lambda: _inspect(folder)),
        ("verify", lambda: verify(folder)),
    ]
    found: dict[str, Any] = {}
    refusals: dict[str, str] = {}
    for name, step in steps:
        start = time.perf_counter()
        try:
            with _limits():
                found[name] = step()
        except LexigramError as error:
            refusals[name] = str(error)
        except BaseException as error:
            return Outcome(CRASH, f"{name}: {type(error).__name__}: {error}")
        if time.perf_counter() - start > SECONDS:
            return Outcome(HANG, name)
        said = refusals.get(name, "a sentence")
        if "MemoryError" in said or "allocate" in said:
            return Outcome(MEMORY_FAILURE, said)
        if not said.strip() or len(said.splitlines()) > 1 or len(said) > 1500 or not said.isprintable():
            return Outcome(BABBLE, repr(said))
    if (folder / PWNED).exists() or (folder.parent / PWNED).exists():
        return Outcome(RAN, "a pickle was opened")
    if "load" in refusals:
        verified = found.get("verify")
        if isinstance(verified, Verification) and verified.passed:
            return Outcome(SILENT, f"verify passes what load refuses: {refusals['load']}")
        return Outcome(REFUSED, refusals["load"])
    if found["load"].same(original):
        return Outcome(IDENTICAL, "")
    if "verify" in refusals:
        return Outcome(VERIFIED, refusals["verify"])
    if found["verify"].passed:
        return Outcome(SILENT, "another model, and verify passes")
    return Outcome(VERIFIED, found["verify"].failed[0].message)


def _inspect(folder: Path) -> str:
    with redirect_stdout(io.StringIO()) as shown:
        show.inspect(folder)
        show.inspect(folder, as_json=True)
    return shown.getvalue()


class _TooLong(BaseException):
    """The alarm went."""


@contextmanager
def _limits() -> Iterator[None]:
    """An alarm after twice the seconds that are allowed, and no more address space than is allowed."""

    def ring(*_: object) -> None:
        raise _TooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -------------------------------------------------------------------------------------------------------------------- mutators

Mutator = Callable[[Path, random.Random], None]
MUTATORS: dict[str, Mutator] = {}
"""By name; each changes one thing in a folder, or nothing where there is no such thing."""

_JSON = ("config.json", "config.json", "run.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_DEEP = 5000
_NUMBERS = (-1, 0, 1, 3, 2**31, 10**9, 10**12, 2**70, -(2**63), 1e308, -0.5, 0.5)
_WORDS = ("", "x", "../x", "/etc/passwd", "[/x]", "\x1b[2J", "a\nb", "\ud800", "w" * 10_000, "int8", "NaN", "posix")
_COUNTS = (
    "num_hidden_layers",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_labels",
    "pad_token_id",
)
_KEYS: dict[str, Any] = {
    "auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]},
    "attn_implementation": "someone/kernel",
    "_attn_implementation": "someone/kernel",
    "fusion_config": {"rms_norm": True},
    "transformers_weights": "model.safetensors",
    "num_labels": 10**9,
    "id2label": {str(i): "x" for i in range(100)},
    "layer_types": ["full_attention"] * 9,
    "tie_word_embeddings": True,
    "per_layer_config": {"0": {"hidden_size": 7}},
    "torch_dtype": "float64",
    "pruned_heads": {"0": [0]},
    "rope_scaling": {"rope_type": "yarn", "factor": 0},
    "is_encoder_decoder": True,
    "weights": "../x",
    "text_config": {"model_type": "llama"},
    "tensors_sha256": {},
}


def mutator(function: Mutator) -> Mutator:
    """Enter a mutator by its name."""
    MUTATORS[function.__name__.replace("_", " ")] = function
    return function


def _paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from _paths(value, (*path, key))


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def _edit(folder: Path, draw: random.Random, change: Callable[[Any, tuple[Any, ...]], None]) -> None:
    """Change a drawn place of a drawn JSON file."""
    file = folder / draw.choice(_JSON)
    content = json.loads(file.read_text())
    if file.name == "config.json" and draw.random() < 0.5:
        places = [("quantization_config", *path) for path in _paths(content["quantization_config"])]
    else:
        places = list(_paths(content))
    change(content, draw.choice(places))
    file.write_text(json.dumps(content))


@mutator
def json_value_replaced(folder: Path, draw: random.Random) -> None:
    def change(content: Any, path: tuple[Any, ...]) -> None:
        choices = [None, True, False, [], {}, [[]], {"a": 1}, float("nan"), float("inf"), draw.choice(_NUMBERS)]
        choices += [draw.choice(_NUMBERS), draw.choice(_WORDS), _at(content, draw.choice(list(_paths(content))))]
        _at(content, path[:-1])[path[-1]] = draw.choice(choices)

    _edit(folder, draw, change)


@mutator
def json_number_moved(folder: Path, draw: random.Random) -> None:
    def change(content: Any, _path: tuple[Any, ...]) -> None:
        numbers = [path for path in _paths(content) if type(_at(content, path)) in (int, float)]
        if numbers:
            path = draw.choice(numbers)
            value = _at(content, path)
            _at(content, path[:-1])[path[-1]] = draw.choice([value + 1, value - 1, -value, 2 * value, value * 10**9])

    _edit(folder, draw, change)


@mutator
def json_key_removed(folder: Path, draw: random.Random) -> None:
    def change(content: Any, path: tuple[Any, ...]) -> None:
        del _at(content, path[:-1])[path[-1]]

    _edit(folder, draw, change)


@mutator
def json_key_renamed(folder: Path, draw: random.Random) -> None:
    def change(content: Any, path: tuple[Any, ...]) -> None:
        inside = _at(content, path[:-1])
        if isinstance(inside, dict):
            inside[draw.choice([f"{path[-1]}x", *_WORDS, *inside])] = inside.pop(path[-1])

    _edit(folder, draw, change)


@mutator
def json_key_added(folder: Path, draw: random.Random) -> None:
    file = folder / draw.choice(("config.json", "config.json", "tokenizer_config.json", "run.json"))
    content = json.loads(file.read_text())
    key = draw.choice(list(_KEYS))
    inside = draw.choice([content, content, content.get("quantization_config", content)])
    inside[key] = _KEYS[key]
    file.write_text(json.dumps(content))
    (folder / "evil.py").write_text(f"open({str(folder / PWNED)!r}, 'w')\nclass Evil: pass\n")


@mutator
def json_key_duplicated(folder: Path, draw: random.Random) -> None:
    file = folder / draw.choice(_JSON)
    content = json.loads(file.read_text())
    key = draw.choice(list(content))
    value = draw.choice([None, 7, [], {}, content[key], draw.choice(_WORDS)])
    file.write_text(file.read_text().rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}")


@mutator
def config_count_absurd(folder: Path, draw: random.Random) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content[draw.choice(_COUNTS)] = draw.choice(_NUMBERS)
    file.write_text(json.dumps(content))


@mutator
def json_nested_deep(folder: Path, draw: random.Random) -> None:
    file = folder / draw.choice(_JSON)
    depth = draw.choice([100, 300, _DEEP])
    left, right = draw.choice([("[", "]"), ('{"left":', "}")])
    deep = left * depth + "1" + right * depth
    content = json.loads(file.read_text())
    if file.name == "config.json":
        layers = content["quantization_config"]["layers"]
        layers[draw.choice(list(layers))] = "DEEP"
    else:
        content[draw.choice(list(content))] = "DEEP"
    file.write_text(json.dumps(content).replace('"DEEP"', deep))


@mutator
def json_byte_flipped(folder: Path, draw: random.Random) -> None:
    _flip(folder / draw.choice(_JSON), draw)


@mutator
def json_truncated(folder: Path, draw: random.Random) -> None:
    file = folder / draw.choice(_JSON)
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])


@mutator
def json_of_another_kind(folder: Path, draw: random.Random) -> None:
    kinds = (
        b"",
        b"null",
        b"[]",
        b"1",
        b'"x"',
        b"{}",
        b"\xff\xfe{}",
        b"\x00" * 9,
        b"{" * 9999,
        b"1" * 9999,
        b"\xef\xbb\xbf{}",
    )
    (folder / draw.choice(_JSON)).write_bytes(draw.choice(kinds))


def _flip(file: Path, draw: random.Random, begin: int = 0, end: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(begin, end or len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def _header(folder: Path) -> tuple[int, dict[str, Any], bytes]:
    """Length, content and what comes after it."""
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return size, json.loads(content[8 : 8 + size]), content[8 + size :]


def _rewrite(folder: Path, header: dict[str, Any] | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


@mutator
def weights_header_byte_flipped(folder: Path, draw: random.Random) -> None:
    _flip(folder / WEIGHTS, draw, 0, 8 + _header(folder)[0])


@mutator
def weights_data_bit_flipped(folder: Path, draw: random.Random) -> None:
    _flip(folder / WEIGHTS, draw, 8 + _header(folder)[0])


@mutator
def weights_data_overwritten(folder: Path, draw: random.Random) -> None:
    _, header, data = _header(folder)
    begin, end = header[draw.choice([key for key in header if key != "__metadata__"])]["data_offsets"]
    fill = draw.choice([b"\x00", b"\xff", b"\x7f", None])
    new = draw.randbytes(end - begin) if fill is None else fill * (end - begin)
    _rewrite(folder, header, data[:begin] + new + data[end:])


@mutator
def weights_not_a_number(folder: Path, draw: random.Random) -> None:
    _, header, data = _header(folder)
    begin, end = header[draw.choice([key for key in header if header[key].get("dtype") == "BF16"])]["data_offsets"]
    place = draw.randrange(begin, end, 2)
    _rewrite(folder, header, data[:place] + draw.choice([b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"]) + data[place + 2 :])


@mutator
def weights_truncated(folder: Path, draw: random.Random) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: draw.choice([0, 4, 8, draw.randrange(len(content)), len(content) - 1])])


@mutator
def weights_appended(folder: Path, draw: random.Random) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(draw.randbytes(draw.choice([1, 8, 1000])))


@mutator
def weights_header_length(folder: Path, draw: random.Random) -> None:
    content = (folder / WEIGHTS).read_bytes()
    length = draw.choice([0, 1, 2**31, 2**63, 2**64 - 1, 10**8 + 1, len(content) - 8])
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + content[8:])


@mutator
def weights_header_edited(folder: Path, draw: random.Random) -> None:
    _, header, data = _header(folder)
    name = draw.choice([key for key in header if key != "__metadata__"])
    each = header[name]
    begin, end = each["data_offsets"]
    change: dict[str, Callable[[], Any]] = {
        "offsets": lambda: each.update(
            data_offsets=draw.choice([[0, end], [begin, end + 2], [end, begin], [-1, end], []])
        ),
        "huge offsets": lambda: each.update(data_offsets=[2**62, 2**63]),
        "shape": lambda: each.update(shape=draw.choice([[], [-1], [0], [1, *each["shape"]], [2**62, 4], ["2"], None])),
        "transposed": lambda: each.update(shape=each["shape"][::-1]),
        "metadata": lambda: header.update(__metadata__=draw.choice([None, {}, {"format": "tf"}, {"format": 1}, [1]])),
        "gone": lambda: header.pop(name),
        "key gone": lambda: each.pop(draw.choice(list(each))),
        "empty": lambda: header.clear(),
    }
    draw.choice(list(change.values()))()
    _rewrite(folder, header, data)


@mutator
def weights_dtype_swapped(folder: Path, draw: random.Random) -> None:
    _, header, data = _header(folder)
    each = header[draw.choice([key for key in header if key != "__metadata__"])]
    names = {"BF16": ["F16", "I16", "U16"], "I16": ["BF16", "U16", "F16"], "U8": ["I8", "BOOL", "F8_E4M3", "F8_E8M0"]}
    each["dtype"] = draw.choice([*names.get(each["dtype"], ["BF16"]), "F64", "ZORK", 3])
    _rewrite(folder, header, data)


@mutator
def weights_tensors_swapped(folder: Path, draw: random.Random) -> None:
    """Of the same dtype and shape, where there are such two: nothing but their bytes tells them apart."""
    _, header, data = _header(folder)
    names = [key for key in header if key != "__metadata__"]
    alike = [
        (a, b)
        for a in names
        for b in names
        if a < b and all(header[a][key] == header[b][key] for key in ("dtype", "shape"))
    ]
    one, other = draw.choice(alike or [(names[0], names[1])])
    header[one], header[other] = header[other], header[one]
    _rewrite(folder, header, data)


@mutator
def weights_tensor_renamed(folder: Path, draw: random.Random) -> None:
    _, header, data = _header(folder)
    name = draw.choice([key for key in header if key != "__metadata__"])
    part = draw.choice(["", "x", "a\nb", "\x1b[2J", "model.surprise", f"{name}x", name.replace("layers.0", "layers.7")])
    header[part] = header.pop(name)
    _rewrite(folder, header, data)


@mutator
def weights_tensor_doubled(folder: Path, draw: random.Random) -> None:
    """The same name twice in the header, with other bytes."""
    _, header, data = _header(folder)
    name = draw.choice([key for key in header if key != "__metadata__"])
    other = draw.choice([key for key in header if key != "__metadata__"])
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}"
    _rewrite(folder, text, data)


@mutator
def weights_of_another_folder(folder: Path, draw: random.Random) -> None:
    _, header, data = _header(folder)
    _rewrite(folder, header, draw.randbytes(len(data)))


@mutator
def weights_sharded(folder: Path, draw: random.Random) -> None:
    """An index in the place of the file, pointing here, elsewhere, or nowhere."""
    _, header, _ = _header(folder)
    index = folder / "lexigram.safetensors.index.json"
    target = draw.choice([WEIGHTS, "../toy/model.safetensors", "/dev/zero", "nowhere", "", ".", 7, None])
    names = [key for key in header if key != "__metadata__"]
    weight_map: Any = draw.choice([dict.fromkeys(names, target), {names[0]: target}, [], {}, None])
    index.write_text(json.dumps(draw.choice([{"metadata": {}}, {}, {"metadata": None}]) | {"weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weights"] = index.name
    (folder / "config.json").write_text(json.dumps(config))


@mutator
def file_removed(folder: Path, draw: random.Random) -> None:
    _any_file(folder, draw).unlink()


@mutator
def file_renamed(folder: Path, draw: random.Random) -> None:
    file = _any_file(folder, draw)
    file.rename(
        folder
        / draw.choice(["x", f"{file.name}.bak", "model.safetensors", "lexigram-2.safetensors", "pytorch_model.bin"])
    )


@mutator
def file_swapped(folder: Path, draw: random.Random) -> None:
    one, other = _any_file(folder, draw), _any_file(folder, draw)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@mutator
def file_is_none(folder: Path, draw: random.Random) -> None:
    """A folder, a pipe, a device, or a link to one, to itself or to nothing, in the place of a file."""
    file = _any_file(folder, draw)
    file.unlink()
    kind = draw.choice(["folder", "pipe", "zero", "itself", "nothing", "folder link"])
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"zero": "/dev/zero", "itself": file.name, "nothing": "/no/such", "folder link": "/"}[kind])


@mutator
def file_linked(folder: Path, draw: random.Random) -> None:
    """A link to the same file elsewhere: the hub's cache consists of such."""
    file = _any_file(folder, draw)
    place = folder.parent / f"elsewhere-{folder.name}"
    place.mkdir(exist_ok=True)
    shutil.move(file, place / file.name)
    file.symlink_to(place / file.name)


@mutator
def file_beside(folder: Path, draw: random.Random) -> None:
    """Weights, code or an adapter that nobody asked for."""
    pickled = pickle.dumps(_Payload(folder / PWNED))
    names = [
        "pytorch_model.bin",
        "model.safetensors",
        "adapter_config.json",
        "modeling.py",
        "custom_generate",
        "lexigram-2.safetensors",
    ]
    name = draw.choice(
        [*names, "pytorch_model.bin.index.json", "special_tokens_map.json", "added_tokens.json", ".metadata"]
    )
    if name == "custom_generate":
        (folder / name).mkdir()
        (folder / name / "generate.py").write_text(f"open({str(folder / PWNED)!r}, 'w')\n")
    elif name.endswith((".bin", ".metadata")):
        (folder / name).write_bytes(pickled)
    elif name == "model.safetensors":
        shutil.copy(folder / WEIGHTS, folder / name)
    else:
        (folder / name).write_text(draw.choice(["{}", "", '{"peft_type": "LORA", "base_model_name_or_path": "x"}']))
    if draw.random() < 0.3:  # and a config that no longer says what the folder is
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["quant_method"] = draw.choice(["zork", "gptq", "bitsandbytes", None])
        (folder / "config.json").write_text(json.dumps(config))


class _Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


def _any_file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(file for file in folder.iterdir() if file.is_file()))
