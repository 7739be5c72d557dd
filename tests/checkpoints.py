"""Compressed checkpoints as tests handle them: opened by transformers, evaluated, and damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

WEIGHTS = "lexigram.safetensors"
IDS = torch.arange(3, 33).view(2, 15)


def opened(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return model


def logits(model: PreTrainedModel) -> Tensor:
    """Of `IDS`."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    assert bool(found.isfinite().all())
    return found


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what config.json says of the format."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content["quantization_config"])
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of the weight file, by name."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
