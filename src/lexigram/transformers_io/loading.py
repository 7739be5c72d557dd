"""Opening compressed folders with every check on, and writing them out as ordinary ones."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lexigram.errors import LexigramError
from lexigram.source import Source, check_loaded
from lexigram.staging import staged
from lexigram.transformers_io import quantizer
from lexigram.transformers_io.linear import factored_layers


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
    try:
        # Of a wrong shape the report names the tensor, where transformers' own error only points to its log.
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except LexigramError:
        raise
    except Exception as error:  # transformers raises many types here; all of them mean the same to the user
        raise LexigramError(f"cannot load {path}: {type(error).__name__}: {error}") from error
    check_loaded(path, report, exact=True)
    if not any(True for _ in factored_layers(model)):
        raise LexigramError(f"{path} holds an ordinary model; open it with transformers")
    if dense:
        model = model.dequantize()
    return model.to(device).eval()


def export_dense(path: str | Path, out: str | Path, dtype: torch.dtype | str = "auto") -> None:
    """Write the compressed model in `path` as an ordinary checkpoint with dense weights, and its tokenizer if it has one.

    Raises:
        LexigramError: as `load` does, and where `out` exists.
    """
    if Path(out).exists():
        raise LexigramError(f"{out} exists; name a new folder")
    path = os.path.expanduser(path)
    model = load(path, dtype=dtype, dense=True)
    has_tokenizer = not Path(path).is_dir() or (Path(path) / "tokenizer_config.json").is_file()
    tokenizer = Source(path, path).tokenizer() if has_tokenizer else None  # its errors are not those of writing
    with staged(Path(out)) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def open_model(
    name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """Any model, compressed or not, with its tokenizer; `name` is whatever a command takes as MODEL."""
    source = Source.resolve(name)
    if is_compressed(source.config()):
        return load(source.path, device=device, dtype=dtype), source.tokenizer()
    return source.model(device, dtype), source.tokenizer()
