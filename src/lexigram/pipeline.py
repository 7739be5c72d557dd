"""`compress`: the only file that knows the order of the stages. No mathematics here.

Plan, load, then decoder layer by decoder layer: Grams of its input sites, factors of its linear layers, factors put in
place. At any time only one layer's Grams exist. Then save.
"""

import hashlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexigram.calibration.gram import Gram, collecting
from lexigram.calibration.layerwise import LayerRunner
from lexigram.calibration.sampling import sample_sequences
from lexigram.calibration.tokens import TokenSequences
from lexigram.errors import LexigramError
from lexigram.methods import fit
from lexigram.planning import Plan, plan
from lexigram.recipe import Recipe
from lexigram.records import LayerRecord, RunRecord, Stopwatch, machine, peak_memory_bytes, versions
from lexigram.staging import RUN_FILE, check_target, staged
from lexigram.targets import Target, decoder_layers, weight_of
from lexigram.transformers_io import FactoredLinear, attach_config


class Progress(Protocol):
    """Told how far a run is; the command line draws bars from it."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """A stage of `total` steps begins; what the context gives is called after every step."""
        ...


class Silent:
    """Progress that nobody looks at."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """See `Progress`."""
        return nullcontext(lambda: None)


def compress(
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    prepared: Plan | None = None,
) -> RunRecord:
    """Compress a model into the folder `out`, which appears only when everything in it is complete.

    Args:
        recipe: the whole run.
        out: a folder that does not exist, is empty, or (with `overwrite`) holds an earlier result of ours.
        overwrite: replace such a result.
        progress: is told how far the run is.
        prepared: the plan of this recipe, where it was made already.

    Returns:
        The content of the folder's `run.json`.

    Raises:
        LexigramError: for whatever the user can mend; `out` is then as it was.
    """
    progress, watch, out = progress or Silent(), Stopwatch(), Path(out)
    check_target(out, overwrite=overwrite)
    if prepared is not None:
        if prepared.recipe != recipe:
            raise LexigramError("the plan was made from another recipe; plan again, or leave it out")
        watch.credit("plan", prepared.seconds)
    with watch.stage("plan"):
        prepared = prepared or plan(recipe)
        check_target(out, overwrite=overwrite, needed_bytes=prepared.disk_bytes)
    with watch.stage("load"), progress.stage("load the model", 1) as step:
        model = prepared.source.model(prepared.device)
        _check_finite(model, recipe.model)
        _check_storable(model, {target.name for target in prepared.targets}, recipe.dtype)
        step()
    tokens = prepared.tokens
    if tokens is None:
        with watch.stage("sample"):
            tokens = _sample(prepared, model, progress)
    digest = hashlib.sha256()
    layers = _replace_targets(prepared, model, tokens.ids, watch, progress, digest)
    with staged(out, overwrite=overwrite) as folder:
        with watch.stage("save"), progress.stage("save", 1) as step:
            attach_config(model.to(getattr(torch, recipe.dtype)))
            model.save_pretrained(folder)
            prepared.source.tokenizer().save_pretrained(folder)
            step()
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        record = _record(prepared, tokens, layers, folder, digest.hexdigest(), watch)
        (folder / RUN_FILE).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return record


def stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor in the weight files of `folder`, by name."""
    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                tensor = opened.get_tensor(key)
                sizes[key] = tensor.numel() * tensor.element_size()
    return sizes


def _sample(prepared: Plan, model: PreTrainedModel, progress: Progress) -> TokenSequences:
    calibration = prepared.recipe.calibration
    with progress.stage("sample calibration text", calibration.sequences) as step:
        done = 0

        def report(now: int, _total: int) -> None:
            nonlocal done
            for _ in range(now - done):
                step()
            done = now

        return sample_sequences(
            model,
            prepared.source.tokenizer(),
            calibration.sequences,
            prepared.length,
            calibration.seed,
            progress=report,
        )


def _replace_targets(
    prepared: Plan,
    model: PreTrainedModel,
    ids: Tensor,
    watch: Stopwatch,
    progress: Progress,
    digest: "hashlib._Hash",
) -> list[LayerRecord]:
    """Fit every target and put its factors in place, one decoder layer after another."""
    layers = list(decoder_layers(model))
    by_layer: dict[int | None, list[Target]] = {}
    for target in prepared.targets:
        by_layer.setdefault(target.layer, []).append(target)
    records: list[LayerRecord] = []
    with progress.stage("compress", len(prepared.targets)) as step:
        with watch.stage("calibrate"):
            runner = LayerRunner(model, layers, ids, compute_dtype=prepared.compute_dtype)
        runs: list[tuple[list[Target], Callable[[], None]]] = [
            (by_layer.get(index, []), partial(runner.run, index)) for index in range(len(layers))
        ]
        if None in by_layer:
            runs.append((by_layer[None], runner.run_rest))
        for targets, run in runs:
            with watch.stage("calibrate"):
                grams = _grams(model, {target.site for target in targets}, run)
            for target in targets:
                with watch.stage("fit"):
                    records.append(_replace(prepared, model, target, grams[target.site], digest))
                step()
    return records


def _grams(model: nn.Module, sites: set[str], run: Callable[[], None]) -> dict[str, Gram]:
    """The Gram of every input site, taken while `run` runs."""
    with collecting({site: model.get_submodule(site) for site in sites}) as accumulators:
        run()
    return {site: accumulator.result(site) for site, accumulator in accumulators.items()}


def _replace(prepared: Plan, model: nn.Module, target: Target, gram: Gram, digest: "hashlib._Hash") -> LayerRecord:
    module, spec = model.get_submodule(target.name), prepared.specs[target.name]
    bias = module.bias if isinstance(module.bias, Tensor) else None
    weight = weight_of(module).detach()
    digest.update(weight.contiguous().view(torch.uint8).cpu().numpy().data)
    generator = _generator(prepared.recipe.seed, target.name)
    try:
        factors, report = fit(prepared.recipe.method, weight, gram, spec, generator)
    except ValueError as error:
        raise LexigramError(f"{target.name} cannot be compressed: {error}") from error
    model.set_submodule(target.name, FactoredLinear(factors, bias, transposed=target.transposed))
    return LayerRecord(
        name=target.name,
        kind=target.kind,
        layer=target.layer,
        shape=target.shape,
        site=target.site,
        factors=spec.model_dump(),
        bytes_before=target.dense_bytes,
        bytes_after=spec.bytes,
        parameters_after=spec.parameters,
        fit=report,
    )


def _check_finite(model: nn.Module, name: str) -> None:
    """Raise where a weight is NaN or infinite, compressed or not: the result would be broken without a sign."""
    for parameter, values in model.named_parameters():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise LexigramError(
                f"{name} has values in {parameter} that are not finite (NaN or infinity); mend the checkpoint"
            )


def _check_storable(model: nn.Module, targets: set[str], dtype: str) -> None:
    """Raise, before any work, where what is not compressed would overflow in the dtype that it is stored in."""
    most = torch.finfo(getattr(torch, dtype)).max
    for parameter, values in model.named_parameters():
        if parameter.removesuffix(".weight") not in targets and float(values.detach().abs().max()) > most:
            raise LexigramError(
                f"{parameter} has values beyond {most:g}, the largest {dtype}; store it in another --dtype"
            )


def _generator(seed: int, name: str) -> torch.Generator:
    """One stream of random numbers a layer, whatever the order in which layers are fitted."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _record(
    prepared: Plan,
    tokens: TokenSequences,
    layers: list[LayerRecord],
    folder: Path,
    weights_sha256: str,
    watch: Stopwatch,
) -> RunRecord:
    recipe, device = prepared.recipe, prepared.device
    before, after = prepared.bytes_before, prepared.bytes_after
    by_kind: dict[str, int] = {}
    promised: dict[str, str] = {}
    for target in prepared.targets:
        for path, leaf in prepared.specs[target.name].leaves():
            for part in leaf.stored():
                name = ".".join(filter(None, (target.name, "factors", path, part)))
                promised[name] = f"{leaf.form} {part}"
    for name, size in stored_bytes(folder).items():
        kind = promised.get(name, "not compressed")
        by_kind[kind] = by_kind.get(kind, 0) + size
    uncompressed = by_kind.get("not compressed", 0)
    if sum(by_kind.values()) - uncompressed != after:
        raise AssertionError("the files do not weigh what the ledger says; please report this")
    return RunRecord(
        lexigram=versions()["lexigram"],
        command=" ".join(sys.argv),
        versions=versions(),
        machine={**machine(device), "compute_dtype": str(prepared.compute_dtype).removeprefix("torch.")},
        recipe=recipe.model_dump(mode="json"),
        model=recipe.model,
        weights_sha256=weights_sha256,
        calibration_source=tokens.source,
        calibration_sha256=tokens.sha256,
        calibration_tokens=tokens.ids.numel(),
        requested_ratio=recipe.ratio,
        ratio=1 - after / before,
        parameter_ratio=1
        - sum(layer.parameters_after for layer in layers) / sum(target.weight_count for target in prepared.targets),
        bytes_before=before,
        bytes_after=after,
        model_bytes_before=uncompressed + before,
        model_bytes_after=uncompressed + after,
        source_file_bytes=prepared.source.file_bytes(),
        bytes_by_kind=by_kind,
        mean_relative_error=sum(layer.fit.relative_error for layer in layers) / len(layers),
        seconds=watch.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        device_peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        stages=watch.stages,
        files=sorted({RUN_FILE, *(file.name for file in folder.iterdir())}),
        layers=layers,
    )
