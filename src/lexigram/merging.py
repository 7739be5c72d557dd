"""`merge`: a LoRA adapter that was trained beside a compressed model, made a part of its forms.

The result is a compressed folder like any other: it loads without PEFT, and its record tells what the adapter added. Compressed
layers take the adapter as one more term of low rank; ordinary ones, and modules that were trained as a whole, are changed.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lexigram.errors import LexigramError
from lexigram.factors import FactorSpec
from lexigram.folders import CONFIG, check_plain, opening, printable
from lexigram.headers import DTYPES, file_sha256, read_headers
from lexigram.jsonfiles import read_json
from lexigram.recording import content, folder_sha256, matrices, other_files, tensor_hashes, weight_files
from lexigram.records import MergeRecord, RunRecord, read_run, versions
from lexigram.running import Silent, Stages
from lexigram.staging import RUN_FILE, check_outside, check_target, copy_file, staged
from lexigram.transformers_io import factored_layers, load, merge_adapters
from lexigram.transformers_io.linear import NoWeightError
from lexigram.verification import verify
from lexigram.weights import check_finite

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def merge(
    folder: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Stages | None = None,
) -> RunRecord:
    """Write the compressed model in `folder`, with a LoRA adapter merged into it, to the folder `out`.

    Args:
        folder: what `compress`, `heal` or this wrote, and the adapter was trained beside.
        adapter: the folder that PEFT's `save_pretrained` wrote.
        out: a folder that does not exist, is empty, or (with `overwrite`) holds an earlier result of ours.
        overwrite: replace such a result.
        progress: is told how far the work is.

    Returns:
        The content of the new folder's `run.json`: that of the old one with other forms and sizes, and a record of this. The
        layers' errors are those of before.

    Raises:
        LexigramError: for a folder that is damaged, an adapter that is no LoRA or not of this model, values that are not
            finite, and whatever else the user can mend; `out` is then as it was.
    """
    started = time.perf_counter()
    folder, adapter, out = Path(folder).expanduser(), Path(adapter).expanduser(), Path(out)
    progress = progress or Silent()
    check_target(out, overwrite=overwrite)
    record = read_run(folder)
    check_outside(folder, out)
    _check_adapter(adapter)
    if failed := verify(folder, progress=progress).failed:
        raise LexigramError(f"{folder} is not as it was written: {failed[0].message}; fetch it or compress again")
    with progress.stage("merge the adapter", 1) as step:
        model = load(folder)
        dtype = model.dtype
        merged = merge_adapters(_adapted(model, adapter))
        _store_in(merged, folder, dtype)
        check_finite(merged, f"{folder} with {adapter}")
        with staged(out, overwrite=overwrite) as staging:
            merged.save_pretrained(staging)
            for name in other_files(record.files):
                if name != CONFIG and ".safetensors" not in name:
                    copy_file(name, folder, staging)
            grown = _with_forms(record, {name: layer.factors.spec for name, layer in factored_layers(merged)}, staging)
            merging = MergeRecord(
                lexigram=versions()["lexigram"],
                command=" ".join(sys.argv),
                versions=versions(),
                adapter=str(adapter),
                adapter_sha256={name: file_sha256(adapter / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)},
                bytes=grown.bytes_after - record.bytes_after,
                changed=_changed(tensor_hashes(folder), grown),
                tensors_sha256=folder_sha256(folder),
                seconds=time.perf_counter() - started,
            )
            result = grown.model_copy(update={"merged": [*record.merged, merging]})
            (staging / RUN_FILE).write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        step()
    return result


def _check_adapter(adapter: Path) -> None:
    """Refuse what is no LoRA adapter, would change the model's layers before it is merged, or has its weights in a pickle."""
    remedy = "name the folder that PEFT's save_pretrained wrote"
    if not adapter.is_dir():
        raise LexigramError(f"there is no folder {adapter}; {remedy}")
    check_plain(adapter)
    config = read_json(adapter / ADAPTER_CONFIG, remedy=remedy)
    if config.get("peft_type") != "LORA":
        raise LexigramError(
            f"{adapter} holds an adapter of the type {config.get('peft_type')!r}, and only LoRA can be merged into a "
            "compressed model"
        )
    if config.get("layer_replication"):
        raise LexigramError(f"{adapter} replicates layers of its model (layer_replication) and cannot be merged")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise LexigramError(f"{adapter} has no {ADAPTER_WEIGHTS}; save the adapter again with safe_serialization")


def _adapted(model: PreTrainedModel, adapter: Path) -> Any:
    """The model with the adapter beside it: all of the adapter's tensors are in the file, and no others."""
    try:
        import peft
    except ImportError as error:
        raise LexigramError(
            "merging an adapter needs PEFT, which reads it; run: pip install 'lexigram[adapters]'"
        ) from error
    what = f"cannot put the adapter {adapter} beside the model"
    with opening(what, "only plain LoRA that was trained beside this very model can be merged"):
        try:
            config = peft.PeftConfig.from_pretrained(str(adapter))
            config.inference_mode = True
            # Not the place that the adapter was trained beside decides, but whether its tensors fit.
            config.base_model_name_or_path = None
            adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
            own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
            found = read_headers([adapter / ADAPTER_WEIGHTS]).keys()
            if own != found:
                name = min(own ^ found)
                raise LexigramError(
                    f"the adapter {adapter} {'has' if name in found else 'lacks'} {printable(name)}, unlike its configuration "
                    "beside this model; name the model that it was trained beside"
                )
            adapted.load_adapter(str(adapter), "default", torch_device="cpu", low_cpu_mem_usage=True)
        except NoWeightError as error:
            raise LexigramError(f"{what}, since it changes weights that are compressed: {error}") from error
    return adapted


def _store_in(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Have every value in the dtype that it has in the files of `folder`, or in `dtype`: adapters are trained in others."""
    stored = {name: DTYPES[header.dtype] for name, header in read_headers(weight_files(folder)).items()}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(stored.get(name, dtype))


def _with_forms(record: RunRecord, forms: dict[str, FactorSpec], folder: Path) -> RunRecord:
    """The record of the files in `folder`, whose layers have other forms than those of `record`."""
    layers = [
        layer.model_copy(
            update={
                "factors": forms[layer.name],
                "bytes_after": forms[layer.name].bytes,
                "parameters_after": forms[layer.name].parameters,
            }
        )
        for layer in record.layers
    ]
    return record.model_copy(update={"layers": layers, **content(folder, layers, record.shared)})


def _changed(before: Mapping[str, str], after: RunRecord) -> list[str]:
    """Tensors that belong to no form and are not what they were, by the hashes of `before`."""
    factors = tuple(f"{name}." for name in matrices(after.layers, after.shared))
    return sorted(
        name
        for name, digest in after.tensors_sha256.items()
        if not name.startswith(factors) and before.get(name) != digest
    )
