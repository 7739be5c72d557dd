"""Opening compressed folders with every check on, and writing them out as ordinary ones."""

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lexigram.errors import LexigramError
from lexigram.folders import CONFIG, REMEDY, Frugal, check_config, opening, paths_in, printable, read_config
from lexigram.headers import read_headers
from lexigram.jsonfiles import read_json, write_json
from lexigram.source import Source, check_loaded
from lexigram.staging import EXPORT_FILE, check_outside, check_target, staged
from lexigram.transformers_io import quantizer
from lexigram.transformers_io.linear import factored_layers
from lexigram.weights import check_finite


def is_compressed(config: Any) -> bool:
    """Whether a transformers config describes one of our checkpoints."""
    content = getattr(config, "quantization_config", None)
    method = content.get("quant_method") if isinstance(content, dict) else getattr(content, "quant_method", None)
    return method == quantizer.QUANT_METHOD


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = "auto",
    dense: bool = False,
) -> PreTrainedModel:
    """Open a compressed model, in evaluation mode.

    ``AutoModelForCausalLM.from_pretrained(path)`` does the same once lexigram is imported; this also turns missing or
    unexpected tensors, of which transformers only warns, into errors.

    Args:
        path: the folder (``~`` is expanded), or a hub id.
        device: where to put it.
        dtype: of the parts that are not compressed, and of the dense weights.
        dense: multiply the factors out once, for speed; the model then has its original size in memory.

    Raises:
        LexigramError: where the folder is not a complete, undamaged compressed model.
    """
    path = os.path.expanduser(path)
    if not Path(path).is_dir() and path.count("/") != 1:
        raise LexigramError(f"there is no folder {path}; name what `lexigram compress --out` wrote")
    ordinary = LexigramError(f"{path} holds an ordinary model; open it with transformers")
    building: AbstractContextManager[Any] = nullcontext()
    if Path(path).is_dir():
        try:
            compressed, tensors = _checked(Path(path))
        except LexigramError as error:
            raise LexigramError(f"cannot load {path}: {error}") from error
        if not compressed:
            raise ordinary
        building = Frugal(tensors)
    with opening(f"cannot load {path}"), building:
        # Of a wrong shape the report names the tensor, where transformers' own error only points to its log.
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    check_loaded(path, report, exact=True)
    if not any(True for _ in factored_layers(model)):
        raise ordinary
    check_finite(model, path)
    if dense:
        with opening(f"cannot multiply out {path}", "load it without `dense`"):
            model = model.dequantize()
    return model.to(device).eval()


def _checked(folder: Path) -> tuple[bool, int]:
    """Whether the folder holds one of our checkpoints, and how many tensors its weight files say that they hold.

    Raises:
        LexigramError: for what no library should be let open.
    """
    content = read_config(folder)
    quantization = content.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != quantizer.QUANT_METHOD:
        return False, 0
    read_json(folder / CONFIG, remedy=REMEDY)  # ours holds no number that is not finite
    tensors = len(read_headers(_weight_files(folder, quantization.get("weights"))))
    check_config(folder, content, tensors)
    return True, tensors


def _weight_files(folder: Path, named: Any) -> list[Path]:
    """The files that the config names, or an index that it names; none for a name that the config's own check will refuse.

    Raises:
        LexigramError: for an index that cannot be read or names what does not lie in `folder`.
    """
    if not quantizer.is_weights_name(named):
        return []
    if not named.endswith(".json"):
        return [folder / named]
    listed = read_json(folder / named, remedy=REMEDY).get("weight_map")
    names = (
        set(listed.values()) if isinstance(listed, dict) and all(isinstance(n, str) for n in listed.values()) else set()
    )
    if not names:
        raise LexigramError(f"{folder / named} has no weight_map from tensors to files; {REMEDY}")
    for name in sorted(names):
        if Path(name).name != name:
            raise LexigramError(
                f"the index {folder / named} names files outside of its folder: {printable(name)}; {REMEDY}"
            )
    return [folder / name for name in sorted(names)]


def export_dense(
    path: str | Path, out: str | Path, dtype: torch.dtype | str = "auto", *, overwrite: bool = False
) -> None:
    """Write the compressed model in `path` as an ordinary checkpoint with dense weights, and its tokenizer if it has one.

    Args:
        path: of the compressed model.
        out: a folder that does not exist, is empty, or (with `overwrite`) holds an earlier result of ours. What is written
            there, `export.json` lists.
        dtype: of the weights; ``auto`` for the compressed model's own.
        overwrite: replace such a result.

    Raises:
        LexigramError: as `load` does, and where `out` may not be written; it is then as it was.
    """
    check_target(Path(out), overwrite=overwrite)
    path = os.path.expanduser(path)
    if Path(path).is_dir():
        if Path(path).resolve() == Path(out).resolve():
            raise LexigramError(f"{out} is the compressed model itself, which has to stay; name another output folder")
        check_outside(Path(path), Path(out))
    model = load(path, dtype=dtype, dense=True)
    has_tokenizer = not Path(path).is_dir() or (Path(path) / "tokenizer_config.json").is_file()
    tokenizer = Source(path, path).tokenizer() if has_tokenizer else None  # its errors are not those of writing
    with staged(Path(out), overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = sorted({EXPORT_FILE, *paths_in(folder)})
        write_json(folder / EXPORT_FILE, {"lexigram": version("lexigram"), "model": str(path), "files": files})


def open_model(
    name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """Any model, compressed or not, with its tokenizer; `name` is whatever a command takes as MODEL."""
    source = Source.resolve(name)
    if Path(source.path).is_dir() and source.gguf is None:
        _checked(Path(source.path))
    compressed = is_compressed(source.config())
    model = load(source.path, device=device, dtype=dtype) if compressed else source.model(device, dtype)
    _check_tokens(model, name)
    return model, source.tokenizer()


def _check_tokens(model: PreTrainedModel, name: str) -> None:
    """Have the model refuse token ids that it has no embedding for: a tokenizer may know more than occur in any text."""
    embeddings = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]

    def check(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0].numel() and not 0 <= int(args[0].amin()) <= int(args[0].amax()) < rows:
            raise LexigramError(
                f"the tokenizer of {name} gives the id {int(args[0].amax())}, and the model has {rows} embeddings; {REMEDY}"
            )

    embeddings.register_forward_pre_hook(check)
