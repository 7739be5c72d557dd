"""`heal`: the stored values of a compressed model trained on a text, their places and forms as they are.

A sparse or low-rank model that was fitted layer by layer can be better as a whole: here its values follow the gradient of the
loss of the whole model, against the original one or on the text itself. Leaves compute with what would be stored
(`lexigram.factors.training`), so the result is the model that was trained, in the same bytes: only values and group scales
differ. What is not compressed, biases included, stays the original's.

The state of a training lies beside the output, as what `compress` has finished does; a run that was ended goes on from it and
ends in the same bytes, unless it is the clock that ends it. On a GPU two runs may differ by the rounding of sums.
"""

import math
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lexigram.calibration.text import read_texts
from lexigram.calibration.tokens import TokenSequences, token_sequences
from lexigram.devices import forward_dtype, resolve_device
from lexigram.distillation import NEEDS_TEACHER, Objective, recomputing
from lexigram.errors import LexigramError
from lexigram.factors import Factor, Leaf, TrainableLeaf
from lexigram.folders import lies_in
from lexigram.headers import read_metadata
from lexigram.memory import memory_told, peak_memory_bytes
from lexigram.recording import file_hashes, folder_sha256, other_files, tensor_hashes
from lexigram.records import HealingRecord, RunRecord, machine, read_run, versions
from lexigram.runfolder import MANIFEST, finished, opened, recover, run_folder
from lexigram.running import Silent, Stages, check_context
from lexigram.shards import Entry, file_tensors, write_tensors
from lexigram.source import Source
from lexigram.staging import RUN_FILE, check_outside, check_target, copy_file, staged
from lexigram.targets import decoder_layers_name
from lexigram.training import LENGTH, STATE, STATE_BYTES, HealingSettings, Training
from lexigram.transformers_io import open_model, replace_leaves, stored_tensors
from lexigram.verification import verify

_AT_ONCE = 2048  # tokens that are run at a time
_DECIDES_NOTHING = frozenset({"save_every", "checkpointing", "compute_dtype", "texts"})
"""Settings that change no byte of the result, or that are told better: the dtype that was taken, the hash of the text."""


@memory_told("free some, or take --checkpointing, a smaller --batch or --length, or --device cpu")
def heal(
    folder: str | Path,
    out: str | Path,
    settings: HealingSettings,
    *,
    against: str | None = None,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    resume: bool = False,
    progress: Stages | None = None,
) -> RunRecord:
    """Train the stored values of the compressed model in `folder` into the folder `out`, which appears when it is complete.

    Everything but values and group scales is as it was: config, forms, indices, sizes, and what is not compressed. The values
    are those with the least loss on held-out sequences, which may be the ones of before.

    Args:
        folder: what `compress`, `heal` or `merge` wrote.
        out: a folder that does not exist, is empty, or (with `overwrite`) holds an earlier result of ours.
        settings: what is trained for, on which text, and for how long.
        against: the model that was compressed, which is imitated; by default the one that the folder's `run.json` names. An
            objective that imitates none takes none, and one must be named where an adapter was merged since.
        device: where both models are put.
        overwrite: replace such a result.
        resume: go on with a training that ended early, if there is one.
        progress: is told how far the work is.

    Returns:
        The content of the new folder's `run.json`: that of the old one, with a record of this training.

    Raises:
        LexigramError: for a folder that is damaged, another original, too little text, an unfinished training of other
            settings, a loss that is not finite before anything became better, memory that does not suffice, and whatever
            else the user can mend; `out` is then as it was.
        KeyboardInterrupt: after Ctrl-C; the step that was being made is finished and kept.
    """
    folder, out, progress = Path(folder).expanduser(), Path(out), progress or Silent()
    if resume and finished(out) and _is_result(out, folder, settings):
        return read_run(out)
    recover(out)
    check_target(out, overwrite=overwrite)
    _check_begun(out, resume=resume)
    record = read_run(folder)
    check_outside(folder, out)
    check_target(out, overwrite=overwrite, needed_bytes=_needed_bytes(folder, record, out))
    place = resolve_device(device) if isinstance(device, str) else device
    dtype = forward_dtype(place, settings.compute_dtype)
    original = _original(record, settings, against)
    _check_folder(folder, original, named=against is not None, device=place, progress=progress)
    material = _Material.open(folder, original, settings, place, dtype)
    identity = _identity(folder, settings, material)
    with opened(out, identity, resume=resume) as run:
        check_target(out, overwrite=overwrite)  # another run may have ended meanwhile
        training = Training(settings, material.objective, material.train.ids, material.held.ids, run.folder)
        with recomputing(material.student, material.layers) if settings.checkpointing else nullcontext():
            training.run(progress)
        training.take_best()
        replace_leaves(material.student, _packed)
        with staged(out, overwrite=overwrite, within=run.folder) as staging, progress.stage("save", 1) as step:
            _write(folder, record, stored_tensors(material.student), staging)
            healing = _healing_record(settings, material, training, original, identity)
            healed = record.model_copy(
                update={
                    "healing": [*record.healing, healing],
                    "tensors_sha256": tensor_hashes(staging),
                    "files_sha256": file_hashes(staging),
                }
            )
            (staging / RUN_FILE).write_text(healed.model_dump_json(indent=1) + "\n", encoding="utf-8")
            run.complete(staging / RUN_FILE)
            step()
    return healed


@dataclass(frozen=True)
class _Material:
    """What a training works on: the model that is trained, with its leaves opened, the original beside it, and the text."""

    objective: Objective
    train: TokenSequences
    held: TokenSequences
    device: torch.device

    @classmethod
    def open(
        cls, folder: Path, original: str | None, settings: HealingSettings, device: torch.device, dtype: torch.dtype
    ) -> "_Material":
        """Load both models and draw the sequences; `dtype` is that of the forward pass."""
        student, tokenizer = open_model(str(folder), device=device, dtype=torch.float32)
        length = _length(settings, student)
        check_context(student, length, "length")
        train, held = _parts(tokenizer, settings, length)
        teacher = None if original is None else open_model(original, device=device, dtype=dtype)[0]
        if teacher is not None:
            teacher.requires_grad_(False)
        student.requires_grad_(False)
        replace_leaves(student, TrainableLeaf)
        layers = decoder_layers_name(Source.resolve(str(folder)).skeleton())  # they are known by their linear layers
        objective = Objective(settings.objective, student, teacher, layers, dtype, _AT_ONCE, settings.layer_weight)
        return cls(objective, train, held, device)

    @property
    def student(self) -> PreTrainedModel:
        """The model that is trained."""
        return self.objective.student

    @property
    def layers(self) -> str:
        """The name of its list of decoder layers."""
        return self.objective.layers

    @property
    def dtype(self) -> str:
        """Of the forward pass."""
        return str(self.objective.dtype).removeprefix("torch.")


def _identity(folder: Path, settings: HealingSettings, material: _Material) -> dict[str, str]:
    """All that decides the bytes of a result."""
    return {
        "a healing of": folder_sha256(folder),
        "the text": material.train.sha256,
        "the held-out text": material.held.sha256,
        **_deciding(settings.model_dump(mode="json")),
        "the device": material.device.type,
        "a forward pass in": material.dtype,
        "threads": str(torch.get_num_threads()),
        **{f"the version of {name}": version for name, version in versions().items() if name != "python"},
    }


def _healing_record(
    settings: HealingSettings,
    material: _Material,
    training: Training,
    original: str | None,
    identity: Mapping[str, str],
) -> HealingRecord:
    state = training.state
    assert state.stopped is not None
    return HealingRecord(
        lexigram=versions()["lexigram"],
        command=" ".join(sys.argv),
        versions=versions(),
        machine={**machine(material.device), "compute_dtype": material.dtype},
        original=original,
        settings=settings.model_dump(mode="json"),
        steps=state.step,
        best_step=state.best.step,
        stopped=state.stopped,
        remarks=_remarks(training),
        before=state.held_out[0],
        after=state.best,
        held_out=state.held_out,
        text_source=material.train.source,
        text_sha256=material.train.sha256,
        text_tokens=material.train.tokens,
        held_out_sha256=material.held.sha256,
        held_out_tokens=material.held.tokens,
        tensors_sha256=identity["a healing of"],
        seconds=state.seconds,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _remarks(training: Training) -> list[str]:
    """What one should know of the result."""
    state = training.state
    none = (
        f"no state had a smaller loss on held-out text than the first, so all values are as they were; a --rate below "
        f"{training.least_rate:g} may find one, if there is one"
    )
    back = (
        f"{state.gone_back} looks at held-out text found no smaller loss; training went on from the best state, with "
        f"{training.least_rate:g} for a rate in the end"
    )
    told = [state.remark or "", back if state.gone_back else "", none if state.best.step == 0 else ""]
    return [*filter(None, told), "the errors of the layers' fits are those before healing"]


def _deciding(settings: Mapping[str, Any]) -> dict[str, str]:
    """Those of the settings, as plain data, that decide the bytes of a result and are told by nothing else."""
    return {key: str(value) for key, value in settings.items() if key not in _DECIDES_NOTHING}


def _is_result(out: Path, folder: Path, settings: HealingSettings) -> bool:
    """Whether `out` came of this folder by these settings."""
    healing, wanted = read_run(out).healing, settings.model_dump(mode="json")
    if not healing or healing[-1].tensors_sha256 != folder_sha256(folder):
        return False
    found = healing[-1].settings
    return _deciding(found) == _deciding(wanted) and found.get("texts") == wanted["texts"]


def _needed_bytes(folder: Path, record: RunRecord, out: Path) -> int:
    """On disk beside what is there already: the result, and the state of the training while it is replaced."""
    result = sum((folder / name).stat().st_size for name in record.files if lies_in(folder, name))
    matrices = [*(layer.factors for layer in record.layers), *(shared.factors for shared in record.shared)]
    leaves = (leaf for matrix in matrices for _, leaf in matrix.leaves())
    trained = sum(_trained(leaf) for leaf in leaves)
    state = run_folder(out) / STATE
    return result + STATE_BYTES * trained - (state.stat().st_size if state.is_file() else 0)


def _trained(leaf: Leaf) -> int:
    """How many values and scales a leaf has."""
    scales = leaf.codec.stored(leaf.count).get("scales")
    return leaf.count + (math.prod(scales.shape) if scales else 0)


def _original(record: RunRecord, settings: HealingSettings, against: str | None) -> str | None:
    """The model that is imitated, where one is."""
    if settings.imitates:
        if record.merged and against is None:
            raise LexigramError(
                f"an adapter was merged into it, which its original {record.model} does not have and healing would undo; take "
                "--objective tokens, or name the original with --against to heal it nevertheless"
            )
        return against or record.model
    if against is not None:
        names = " or ".join(NEEDS_TEACHER)
        raise LexigramError(
            f"the objective {settings.objective} imitates no model; leave out --against {against}, or take --objective {names}"
        )
    return None


def _packed(leaf: Factor) -> Factor:
    assert isinstance(leaf, TrainableLeaf)
    return leaf.packed()


def _check_begun(out: Path, *, resume: bool) -> None:
    folder = run_folder(Path(os.path.abspath(out)))
    if (folder / MANIFEST).is_file() and not resume:
        raise LexigramError(f"{folder} holds an unfinished run; go on with --resume, or delete it")


def _check_folder(folder: Path, original: str | None, *, named: bool, device: torch.device, progress: Stages) -> None:
    """Refuse a folder that is not as it was written, and a model that it was not made from."""
    try:
        found = verify(folder, against=original, device=device, progress=progress)
    except LexigramError as error:
        if original is None or named:
            raise
        raise LexigramError(
            f"{error}; {folder} names {original} as its original, name another with --against"
        ) from error
    for check in found.failed:
        remedy = "name the model that was compressed with --against"
        if check.name not in ("original", "uncompressed"):
            remedy = "fetch it or compress again"
        raise LexigramError(f"{folder} cannot be healed: {check.message}; {remedy}")


def _length(settings: HealingSettings, model: Any) -> int:
    if settings.length is not None:
        return settings.length
    return min(LENGTH, getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH)


def _parts(tokenizer: Any, settings: HealingSettings, length: int) -> tuple[TokenSequences, TokenSequences]:
    """Sequences to train on, and others to judge by, at equal distances among all that are drawn from the text."""
    count = settings.sequences + settings.held_out
    source = ", ".join(settings.texts)
    text = read_texts(settings.texts)
    drawn = token_sequences(tokenizer, text, count, length, settings.seed, bos=settings.bos, source=source)
    held = torch.zeros(count, dtype=torch.bool)
    held[torch.arange(settings.held_out) * count // settings.held_out] = True
    return tuple(TokenSequences(drawn.ids[part], drawn.source) for part in (~held, held))  # type: ignore[return-value]


def _write(folder: Path, record: RunRecord, values: Mapping[str, Tensor], staging: Path) -> None:
    """The files of a result, with other `values` in the places of the tensors of these names."""
    others = set(other_files(record.files))
    for name in record.files:
        file = folder / name
        if name in others:
            copy_file(name, folder, staging)
        elif name != RUN_FILE:
            entries = {
                key: Entry(tensor.dtype, tensor.shape, partial(_value, values[key]) if key in values else tensor.read)
                for key, tensor in file_tensors(file).items()
            }
            metadata = {key: value for key, value in read_metadata(file).items() if key != "format"}
            write_tensors(staging / name, entries, metadata)


def _value(tensor: Tensor) -> Tensor:
    return tensor
