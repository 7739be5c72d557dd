"""What all tests share: where the data lies, toy models and tokenizers built on the spot, the command line, one thread for
what is tiny.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from huggingface_hub import constants as hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from lexigram import cli

DATA = Path(__file__).parents[2] / "shared" / "data"

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

TOYS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama-tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16),
    "mistral": lambda: MistralConfig(**_SIZES),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=200, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "phi": lambda: PhiConfig(**_SIZES),
}
"""Configs by name; a fresh one each call, because building a model writes into its config."""


def build_toy(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model of a few thousand random weights, in evaluation mode; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(TOYS[name](), dtype=dtype).eval()


def words_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word `w0` ... `w195`, for the toys' vocabulary of 200."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(196))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token a byte; special tokens, `</s>` among them, come after the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **options)


def toy_folder(folder: Path, name: str) -> Path:
    """A toy as a model folder that any software could have written."""
    build_toy(name).save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


TEMPLATE = "additional_chat_templates/tools.jinja"
"""Where transformers saves the second chat template of `templated_folder`."""


def templated_folder(folder: Path) -> Path:
    """A toy whose tokenizer has two chat templates."""
    tokenizer = words_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tools": "w1 {{ messages[0]['content'] }}"}
    tokenizer.save_pretrained(toy_folder(folder, "llama"))
    return folder


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text for `words_tokenizer`: 2000 random words."""
    numbers = torch.randint(0, 196, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    file = tmp_path_factory.mktemp("words") / "words.txt"
    file.write_text(" ".join(f"w{number}" for number in numbers))
    return file


@pytest.fixture(params=sorted(TOYS))
def toy(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Every toy in turn, float32."""
    return build_toy(request.param)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real text and models; tests that need it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"the data folder {DATA} is absent; it is not part of the repository")
    return DATA


@pytest.fixture(scope="session")
def stories(data: Path) -> Path:
    """A small trained model."""
    return data / "stories260K"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`, hidden ones too, with the content of the files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


class Said(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failed command says, blank lines of the progress display aside."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


Command = Callable[..., Said]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `lexigram ARGS` in this process; a traceback would come out as the exception that it is."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["lexigram", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return Said(stop.value.code or 0, *capsys.readouterr())  # type: ignore[arg-type]

    return run


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for tiny tensors: several only wait for each other."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
