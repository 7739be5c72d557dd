"""`save_pretrained` for a compressed model: the same call, our file names, nothing half-written.

Without lexigram, transformers would load ``model.safetensors`` into dense layers with random weights and only warn. So our
weights get a name that only our quantizer asks for, and such a load ends in an error.
"""

import json
import os
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lexigram.errors import LexigramError

_PLAIN = "model"
_OURS = "lexigram"
_OUR_WEIGHTS = rf"{_OURS}(-\d{{5}}-of-\d{{5}})?\.safetensors|{_OURS}\.safetensors\.index\.json"


def attach_methods(model: PreTrainedModel) -> None:
    """Let ``model.save_pretrained`` write our format, and ``float`` and ``half`` work.

    transformers refuses these casts for quantised models; ours store integers that no cast can touch.
    """
    # Not bound methods: these are pickled as names, under which an unpickled model has its class's own.
    model.save_pretrained = partial(_save_pretrained, model)
    model.float = partial(nn.Module.float, model)
    model.half = partial(nn.Module.half, model)


def detach_methods(model: PreTrainedModel) -> None:
    """Undo `attach_methods`, for a model that has become an ordinary one."""
    del model.save_pretrained, model.float, model.half


def _save_pretrained(
    self: PreTrainedModel, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """Write the compressed model; files appear in `save_directory` only when all of them are complete, the config last.

    Of a model with adapters (`model.add_adapter`) these are written, as transformers does of any model.

    Raises:
        LexigramError: for options that would write names which transformers loads without lexigram.
    """
    if push_to_hub or kwargs.get("variant"):
        raise LexigramError(
            "a compressed model is saved locally and without `variant`; upload the folder with `hf upload`"
        )
    if getattr(self, "_hf_peft_config_loaded", False):  # transformers then saves the adapters alone
        type(self).save_pretrained(self, save_directory, push_to_hub=push_to_hub, **kwargs)
        return
    folder = Path(save_directory)
    for pattern in ("model*.safetensors*", "pytorch_model*.bin*"):
        for file in folder.glob(pattern):
            raise LexigramError(
                f"{folder} holds ordinary weights ({file.name}), which transformers would load without lexigram; name another "
                "folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".lexigram-", dir=folder))
    try:
        type(self).save_pretrained(self, staging, **kwargs)
        _rename_weights(staging)
        written = sorted(staging.iterdir(), key=lambda file: file.name == "config.json")
        for file in written:
            os.replace(file, folder / file.name)
        # Shards, or their index, of an earlier save of ours.
        new = {file.name for file in written}
        for file in list(folder.iterdir()):
            if re.fullmatch(_OUR_WEIGHTS, file.name) and file.name not in new:
                file.unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _rename_weights(folder: Path) -> None:
    renamed = {
        file.name: _OURS + file.name[len(_PLAIN) :]
        for file in folder.iterdir()
        if file.name.startswith(_PLAIN) and ".safetensors" in file.name
    }
    for old, new in renamed.items():
        os.replace(folder / old, folder / new)
    index = folder / f"{_OURS}.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {key: renamed[file] for key, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2) + "\n")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weights"] = index.name if index.exists() else f"{_OURS}.safetensors"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
