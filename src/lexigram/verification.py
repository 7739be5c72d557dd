"""`verify`: whether a compressed folder is what its `run.json` says, and does what it says.

Loading compares headers with forms and indices with values, and trusts the values themselves: that is fast, and a bit that
flips inside of a value goes unnoticed. Here every byte is read and held against the hashes of the record. With the original
model, its weights are held against their hash, what is not compressed against the original, and with a text the layers' output
errors against those that the run measured.

Hashes find damage, not forgery: whoever changes a tensor on purpose can change `run.json`, too. With the original and the text
of the run there is nothing left to forge.
"""

import math
import os
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from lexigram.calibration.passes import plain_grams
from lexigram.calibration.text import read_texts
from lexigram.calibration.tokens import TokenSequences, token_sequences
from lexigram.errors import LexigramError
from lexigram.folders import lies_in, paths_in, printable
from lexigram.headers import Header, file_sha256, read_headers, tensor_sha256
from lexigram.recipe import Calibration, explain
from lexigram.recording import UNCOMPRESSED, bytes_by_kind, matrices, other_files, weight_files
from lexigram.records import RunRecord, read_run
from lexigram.running import Silent, Stages, check_context
from lexigram.source import Source
from lexigram.staging import RUN_FILE
from lexigram.targets import Target, decoder_layers, find_targets
from lexigram.transformers_io import SHARED, FactoredLinear, factored_layers, is_compressed, load, shared_matrices
from lexigram.weights import Weights, weights_sha256

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""By how much, as a share, an output error may differ from the recorded one, by the dtype of the calibration's forward pass.

The same text on another machine differs by the rounding of the forward pass, 2^-24 of an activation in float32 (2^-11 in TF32)
and 2^-9 in bfloat16, some of it carried on from layer to layer. An error is a quotient of sums over all tokens, so that single
roundings average out: on a model of 35 layers, a run in bfloat16 measured again in float32 is off by 0.2 % at most, and by
3e-7 in the same dtype on the same machine.
"""

_LEAST = 1e-5
"""An error that is smaller differs by the float32 of the sums that it was recorded with."""

_READ = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".json",
    ".jinja",
    ".model",
    ".txt",
    ".tiktoken",
    ".py",
)
"""Suffixes of files that transformers may read beside those that it needs: weights, tokens, templates, code."""

_PROSE = re.compile(r"(readme|licen[cs]e|notice)\b.*\.txt", re.IGNORECASE)
"""Names of texts that are put beside a model for people; those of tokens are `vocab.txt`, `merges.txt` and the like."""


class Check(BaseModel):
    """One thing that was looked at: `passed` is None where it could not be judged, and `message` says why."""

    model_config = ConfigDict(frozen=True)

    name: str
    passed: bool | None
    message: str


class Verification(BaseModel):
    """What `verify` found. `errors` are the layers' relative output errors on the given text, where they were measured."""

    model_config = ConfigDict(frozen=True)

    folder: str
    checks: list[Check]
    errors: dict[str, float] = {}

    @property
    def failed(self) -> list[Check]:
        """What is not as it should be."""
        return [check for check in self.checks if check.passed is False]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong with what could be judged."""
        return not self.failed


def verify(
    folder: str | Path,
    *,
    against: str | None = None,
    texts: Sequence[str] = (),
    sequences: int | None = None,
    length: int | None = None,
    calibration_seed: int | None = None,
    device: str | torch.device = "cpu",
    progress: Stages | None = None,
) -> Verification:
    """Hold a compressed folder against its `run.json`, and against the original model and a text where these are given.

    Args:
        folder: what `compress`, `heal` or `merge` wrote.
        against: the original model, as `compress` takes it.
        texts: to measure the layers' output errors on, as `compress` takes them for its calibration; needs `against`. Where the
            tokens drawn from them are those of the run, the errors are held against the recorded ones.
        sequences: how many sequences to draw; by default as many as the run did.
        length: tokens a sequence; by default those of the run.
        calibration_seed: decides which are drawn; by default that of the run.
        device: where the models are put.
        progress: is told how far the work is.

    Returns:
        One check each of files, tensors, loading and sizes; with `against` of the original and of what is not compressed; with
        `texts` of the layers' output errors. What is wrong with the folder is no exception.

    Raises:
        LexigramError: where there is no `run.json` that can be read, or the model or a text that was named cannot be opened.
    """
    if texts and against is None:
        raise LexigramError("output errors on a text are those against the original model; name it too (--against)")
    folder, progress = Path(folder).expanduser(), progress or Silent()
    record = read_run(folder)
    original = None if against is None else _Original.open(against, record, device)
    tokens = None if original is None or not texts else original.draw(texts, sequences, length, calibration_seed)
    checks = [_check_files(folder, record)]
    try:
        headers: dict[str, Header] | None = read_headers(weight_files(folder))
    except LexigramError as error:
        headers = None
        checks.append(_judged("tensors", [str(error)], ""))
    if headers is not None:
        checks += [_check_tensors(headers, record, progress), _check_sizes(headers, record)]
    model = None
    try:
        model = load(folder, device=device)
    except LexigramError as error:
        checks.append(_judged("loading", [str(error)], ""))
    else:
        checks.append(_check_forms(model, record))
    if original is None:
        return Verification(folder=str(folder), checks=checks)
    checks.append(original.check())
    if model is None or original.targets is None:
        return Verification(folder=str(folder), checks=checks)
    checks.append(_check_uncompressed(model, original.weights, record))
    if tokens is None:
        return Verification(folder=str(folder), checks=checks)
    errors = original.errors(model, tokens, progress)
    checks.append(_check_errors(errors, tokens, record))
    return Verification(folder=str(folder), checks=checks, errors=errors)


def _judged(name: str, wrong: Sequence[str], right: str) -> Check:
    """A check with a list of all that is wrong, of which the first is told."""
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return Check(name=name, passed=not wrong, message=f"{wrong[0]}{more}" if wrong else right)


def _check_files(folder: Path, record: RunRecord) -> Check:
    """All files of the record are there and, where it has their hashes, the same; no others can be taken for some."""
    recorded, hashes = dict.fromkeys(record.files), record.files_sha256
    beside = [name for name in paths_in(folder) if name not in recorded]
    there = {name for name in recorded if lies_in(folder, name)}
    wrong = [
        f"{printable(name)} {'is a folder and no file' if os.path.isdir(folder / name) else 'is missing'}"
        for name in recorded
        if name not in there
    ]
    read = [name for name in beside if _might_be_read(folder / name)]
    wrong += [
        f"{printable(name)} is none of the run's files, and might be read in their place: remove it" for name in read
    ]
    others = other_files(recorded)
    wrong += [
        f"{printable(name)} is not as it was written"
        for name in others
        if name in there and name in hashes and file_sha256(folder / name) != hashes[name]
    ]
    if hashes:
        wrong += [f"the record has no hash of {printable(name)}" for name in others if name not in hashes]
    done = "are as they were written" if hashes else f"are there; {_without_hashes(record)}"
    more = f" (and {len(beside) - 1} more)" if len(beside) > 1 else ""
    unread = f"; {printable(beside[0])}{more} beside them, which nothing reads" if beside else ""
    return _judged("files", wrong, f"{len(record.files)} files {done}{unread}")


def _might_be_read(entry: Path) -> bool:
    """By transformers or by us, where it is found. Nothing is known of what a link to a folder leads to."""
    return entry.is_dir() or (entry.name.endswith(_READ) and not _PROSE.fullmatch(entry.name))


def _check_tensors(headers: Mapping[str, Header], record: RunRecord, progress: Stages) -> Check:
    """Every tensor's dtype, shape and bytes are those that were written."""
    if not record.tensors_sha256:
        return Check(name="tensors", passed=None, message=_without_hashes(record))
    wrong = [f"{name} is missing" for name in record.tensors_sha256 if name not in headers]
    with progress.stage("hash the tensors", len(headers)) as step:
        for name, header in headers.items():
            if name not in record.tensors_sha256:
                wrong.append(f"{name} was not written by the run")
            elif tensor_sha256(header) != record.tensors_sha256[name]:
                wrong.append(f"{name} in {header.file.name} is not as it was written")
            step()
    return _judged("tensors", wrong, f"{len(headers)} tensors are as they were written")


def _without_hashes(record: RunRecord) -> str:
    return f"{RUN_FILE} is of lexigram {record.lexigram} and holds no hashes; compress the model again to have them"


def _check_sizes(headers: Mapping[str, Header], record: RunRecord) -> Check:
    """The tensors weigh what the record says, layer by layer and in all."""
    sizes = {name: header.bytes for name, header in headers.items()}
    expected = {f"{layer.name}.factors": layer.bytes_after for layer in record.layers}
    expected |= {f"{SHARED}.{shared.name}": shared.bytes for shared in record.shared}
    found = dict.fromkeys(expected, 0)
    for name, size in sizes.items():
        owner = _owner(name, expected)
        if owner is not None:
            found[owner] += size
    wrong = [
        f"{name} weighs {found[name]:,} bytes, by the record {size:,}"
        for name, size in expected.items()
        if found[name] != size
    ]
    totals = {
        "all tensors weigh": (sum(sizes.values()), record.model_bytes_after),
        "the compressed layers weigh": (sum(found.values()), record.bytes_after),
        "what is not compressed weighs": (
            sum(sizes.values()) - sum(found.values()),
            record.bytes_by_kind.get(UNCOMPRESSED, 0),
        ),
    }
    wrong += [
        f"{what} {there:,} bytes, by the record {said:,}" for what, (there, said) in totals.items() if there != said
    ]
    if not wrong and bytes_by_kind(sizes, matrices(record.layers, record.shared)) != record.bytes_by_kind:
        wrong.append("the bytes by kind are not those of the record")
    return _judged(
        "sizes", wrong, f"{len(expected)} layers and shared matrices weigh what the record says, to the byte"
    )


def _owner(tensor: str, owners: Container[str]) -> str | None:
    """The matrix that a tensor belongs to: the longest name that it goes on from, at a dot."""
    parts = tensor.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((name for name in names if name in owners), None)


def _check_forms(model: PreTrainedModel, record: RunRecord) -> Check:
    """The model has loaded, with every check on; its forms are those of the record."""
    wrong = []
    kinds = {
        "layer": ({name: layer.factors.spec for name, layer in factored_layers(model)}, record.layers),
        "shared matrix": ({name: matrix.spec for name, matrix in shared_matrices(model).items()}, record.shared),
    }
    for what, (specs, entries) in kinds.items():
        recorded = {each.name: each.factors for each in entries}  # type: ignore[attr-defined]
        for name in sorted(specs.keys() ^ recorded.keys()):
            wrong.append(f"the {what} {name} stands in only one of config.json and the record")
        for name in specs.keys() & recorded.keys():
            if recorded[name] != specs[name]:
                wrong.append(f"{name} has another form in config.json than in the record")
    done = f"{len(record.layers)} layers; headers and indices fit their forms, all values are finite"
    return _judged("loading", wrong, done)


def _check_uncompressed(model: PreTrainedModel, original: Weights, record: RunRecord) -> Check:
    """Whatever is no factor, and no adapter changed, is the original's, rounded to the dtype that it is stored in."""
    theirs, wrong, count = original.entries, [], 0
    changed = {name for merged in record.merged for name in merged.changed}
    for name, found in model.named_parameters():
        if ".factors." in name or name.startswith(f"{SHARED}.") or name in changed:
            continue
        count += 1
        if name not in theirs or theirs[name].shape != found.shape:
            wrong.append(f"the original has no {name} of shape {tuple(found.shape)}")
        elif not torch.equal(theirs[name].read().to(found.device, found.dtype), found.detach()):
            wrong.append(f"{name} is not that of the original")
    others = f"; {len(changed)} were changed by adapters" if changed else ""
    return _judged("uncompressed", wrong, f"{count} tensors that are not compressed are the original's{others}")


def _check_errors(errors: Mapping[str, float], tokens: TokenSequences, record: RunRecord) -> Check:
    """The errors are those of the run, where they can be: on the same tokens, by the same definition."""
    mean = sum(errors.values()) / len(errors)
    since = f" before {record.done_since_fit}" if record.done_since_fit else ""
    said = f"the mean is {mean:.4f}, by the record {record.mean_relative_error:.4f}{since}"
    if tokens.sha256 != record.calibration_sha256:
        reason = "these tokens are not those that the run was calibrated on"
        return Check(name="layer errors", passed=None, message=f"{said}; not held against each other, since {reason}")
    if record.done_since_fit:
        reason = f"the run measured before {record.done_since_fit}"
        return Check(name="layer errors", passed=None, message=f"{said}; not held against each other, since {reason}")
    if record.recipe.get("sequential"):
        reason = "the run measured on inputs from the compressed layers before, and these are the original model's"
        return Check(name="layer errors", passed=None, message=f"{said}; not held against each other, since {reason}")
    tolerance = TOLERANCE[_compute_dtype(record)]
    recorded = {layer.name: layer.fit.relative_error for layer in record.layers}
    wrong = [
        f"{name} has the error {error:.5f}, by the record {recorded[name]:.5f}"
        for name, error in errors.items()
        if not math.isclose(error, recorded[name], rel_tol=tolerance, abs_tol=_LEAST)
    ]
    return _judged("layer errors", wrong, f"{said}; every layer's is that of the record, to {tolerance:g} of it")


@dataclass(frozen=True)
class _Original:
    """The model that was compressed. `targets` is None where it has not the layers of the record, and `missing` says which."""

    source: Source
    model: PreTrainedModel
    weights: Weights
    record: RunRecord
    targets: list[Target] | None
    missing: str

    @classmethod
    def open(cls, name: str, record: RunRecord, device: str | torch.device) -> "_Original":
        source = Source.resolve(name)
        if is_compressed(source.config()):
            raise LexigramError(f"{name} is compressed itself; name the original model")
        model, weights = source.opened(device)
        wanted = {layer.name: layer for layer in record.layers}
        try:
            targets = [target for target in find_targets(source.skeleton(), list(wanted)) if target.name in wanted]
        except LexigramError as error:
            return cls(source, model, weights, record, None, str(error))
        for target in targets:
            if target.shape != wanted[target.name].shape:
                shapes = f"{target.shape}, by the record {wanted[target.name].shape}"
                return cls(source, model, weights, record, None, f"{target.name} has the shape {shapes}")
        return cls(source, model, weights, record, targets, "")

    def check(self) -> Check:
        """Its layers and their weights are those that were compressed."""
        wrong = [f"{self.source.name} is not the model that was compressed: {self.missing}"] if self.missing else []
        if self.targets is not None and weights_sha256(self.weights, self.targets) != self.record.weights_sha256:
            wrong.append(f"the weights of {self.source.name} are not those that were compressed")
        return _judged(
            "original", wrong, f"{len(self.record.layers)} layers have the shapes and weights that were compressed"
        )

    def draw(self, texts: Sequence[str], sequences: int | None, length: int | None, seed: int | None) -> TokenSequences:
        """Tokens of `texts`, drawn as the run drew its own."""
        try:
            own = Calibration.model_validate(self.record.recipe.get("calibration", {}))
        except ValidationError as error:
            raise LexigramError(f"the recipe in {RUN_FILE} cannot be read: {explain(error)}; compress again") from error
        if length is None:
            length = max(2, self.record.calibration_tokens // own.sequences)
        check_context(self.model, length, "length")
        return token_sequences(
            self.source.tokenizer(),
            read_texts(texts),
            own.sequences if sequences is None else sequences,
            length,
            own.seed if seed is None else seed,
            bos=own.bos,
            source=", ".join(texts),
        )

    def errors(self, model: PreTrainedModel, tokens: TokenSequences, progress: Stages) -> dict[str, float]:
        """``||X (W - W^)^T|| / ||X W^T||`` of every layer (Frobenius norms), with ``X`` as the original model gives it."""
        assert self.targets is not None
        sites: dict[int | None, list[str]] = {}
        for target in self.targets:
            if target.site not in sites.setdefault(target.layer, []):
                sites[target.layer].append(target.site)
        layers = list(decoder_layers(self.model))
        found: dict[str, float] = {}
        with progress.stage("measure the layers' errors", len(self.targets)) as step:
            passes = plain_grams(
                self.model, layers, sites, tokens.ids, _compute_dtype(self.record), weights=self.weights
            )
            for grams in passes:
                for target in (target for target in self.targets if target.site in grams):
                    module = model.get_submodule(target.name)
                    assert isinstance(module, FactoredLinear)
                    weight = self.weights.weight(target).to(grams[target.site].matrix.device)
                    found[target.name] = _relative_error(weight, module.factors.to_dense, grams[target.site].matrix)
                    step()
        return {target.name: found[target.name] for target in self.targets}


def _relative_error(weight: Tensor, dense: Callable[[], Tensor], gram: Tensor) -> float:
    """The root of ``tr E G E^T / tr W G W^T`` with ``E = W - W^``, in float64; 0 where the outputs are all zero."""
    original = weight.to(gram)
    error = original - dense().to(gram)
    scale, lost = (float(((matrix @ gram) * matrix).sum()) for matrix in (original, error))
    return math.sqrt(max(lost, 0.0) / scale) if scale > 0 else 0.0


def _compute_dtype(record: RunRecord) -> torch.dtype:
    """Of the run's forward pass."""
    return torch.bfloat16 if record.machine.get("compute_dtype") == "bfloat16" else torch.float32
