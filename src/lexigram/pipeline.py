"""`compress`: the only file that knows the order of the stages. No mathematics here.

Plan, then read the weights once to check them; then decoder layer by decoder layer: Grams of its input sites, factors of its
linear layers, which go to disk at once; at any time only those Grams exist that a unit still waits for. Where the Grams decide
on the allocation, all of them are made first. Then the result is written, tensor by tensor. No more than one decoder layer's
weights are in memory, but for methods that try whole models out.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexigram.allocation.units import Allocation, Unit
from lexigram.calibration.passes import plain_grams, sequential_grams
from lexigram.calibration.sampling import sample_sequences
from lexigram.calibration.spilling import spilling
from lexigram.calibration.store import GramStore
from lexigram.calibration.tokens import TokenSequences
from lexigram.choice import choose_parts
from lexigram.curves import decide
from lexigram.errors import LexigramError
from lexigram.factors import Factor, FactorSpec, empty
from lexigram.fitting import LESS_MEMORY, AssembleTask, FitTask, Task, fitted
from lexigram.gram import Gram
from lexigram.interruption import deferred
from lexigram.memory import memory_told, release
from lexigram.methods import Fitted
from lexigram.methods.base import chooses, decomposition_key, trials
from lexigram.planning import Plan, plan
from lexigram.recipe import Recipe
from lexigram.recording import Ledger, run_record, unit_record
from lexigram.records import RunRecord, Stopwatch, read_run, versions
from lexigram.runfolder import RunFolder, finished, held_bytes, opened, recover, run_folder
from lexigram.running import Silent, Stages, counted
from lexigram.shards import FileTensor
from lexigram.staging import RUN_FILE, check_space, check_target, staged
from lexigram.targets import decoder_layers
from lexigram.transformers_io import SHARED, FactoredLinear
from lexigram.transformers_io.writing import write_model
from lexigram.weights import Digests, Weights, checked, model_sha256
from lexigram.workers import Workers

ALLOCATION_FILE = "allocation.json"


@memory_told(LESS_MEMORY)
def compress(
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Stages | None = None,
    prepared: Plan | None = None,
    cache: str | Path | None = None,
    resume: bool = False,
    workers: Workers | None = None,
) -> RunRecord:
    """Compress a model into the folder `out`, which appears only when everything in it is complete.

    What is finished meanwhile lies in a folder beside it, `out` with ``.unfinished`` behind its name. It stays there when the
    run ends early for whatever reason, and another run can go on from it.

    Args:
        recipe: the whole run.
        out: a folder that does not exist, is empty, or (with `overwrite`) holds an earlier result of ours.
        overwrite: replace such a result.
        progress: is told how far the run is.
        prepared: the plan of this recipe, where it was made already.
        cache: see `plan`; of no use beside `prepared`, which has its own.
        resume: go on with a run that ended early, if there is one.
        workers: where matrices are fitted; by default so many processes as the plan says. The bytes are the same.

    Returns:
        The content of the folder's `run.json`.

    Raises:
        LexigramError: for whatever the user can mend; `out` is then as it was.
        KeyboardInterrupt: after Ctrl-C; the matrix that was being fitted is finished first.
    """
    progress, watch, out = progress or Silent(), Stopwatch(), Path(out)
    if resume and finished(out) and (record := read_run(out)).recipe == recipe.model_dump(mode="json"):
        return record
    recover(out)
    check_target(out, overwrite=overwrite)
    if prepared is not None:
        if prepared.recipe != recipe:
            raise LexigramError("the plan was made from another recipe; plan again, or leave it out")
        watch.credit("plan", prepared.seconds)
    with watch.stage("plan"):
        prepared = prepared or plan(recipe, cache=cache)
        there = held_bytes(run_folder(out)) if resume else 0
        check_target(out, overwrite=overwrite, needed_bytes=prepared.disk_bytes - there)
    with watch.stage("load"):
        frame, weights = prepared.source.opened(prepared.device)
        with progress.stage("read the weights", len(weights.entries)) as step:
            digests = checked(weights, prepared.targets, recipe.model, recipe.dtype, step)
    with opened(out, _identity(prepared, digests, frame), resume=resume) as run:
        check_target(out, overwrite=overwrite)  # another run may have ended meanwhile
        tokens = prepared.tokens or run.tokens
        if tokens is None:
            with watch.stage("sample"):
                tokens = sampled(prepared, prepared.source.model(prepared.device), progress)
            run.keep_tokens(tokens)
        with workers or Workers(prepared.way.workers) as pool:
            release()
            work = _Work(prepared, frame, weights, digests, tokens, run, pool, watch, progress)
            allocation = work.run()
        with staged(out, overwrite=overwrite, within=run.folder) as folder:
            ledger, tensors = work.result(allocation)
            release()
            with watch.stage("save"), progress.stage("save", 1) as step:
                layers, shared = ledger.specs(prepared.targets)
                write_model(folder, frame, weights, layers, shared, tensors, getattr(torch, recipe.dtype))
                prepared.source.tokenizer().save_pretrained(folder)
                step()
            (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            (folder / ALLOCATION_FILE).write_text(allocation.model_dump_json(indent=1) + "\n", encoding="utf-8")
            record = run_record(folder, prepared, tokens, digests.targets, ledger, watch, pool.peak_memory_bytes)
            (folder / RUN_FILE).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
            run.complete(folder / RUN_FILE)
    return record


def sampled(prepared: Plan, model: PreTrainedModel, progress: Stages) -> TokenSequences:
    """The calibration of a plan that has no tokens, sampled from the model itself."""
    calibration = prepared.recipe.calibration
    with progress.stage("sample calibration text", calibration.sequences) as step:
        return sample_sequences(
            model,
            prepared.source.tokenizer(),
            calibration.sequences,
            prepared.length,
            calibration.seed,
            progress=counted(step),
        )


class _Work:
    """The middle of a run: from weights and calibration tokens to factors on disk."""

    def __init__(
        self,
        prepared: Plan,
        frame: PreTrainedModel,
        weights: Weights,
        digests: Digests,
        tokens: TokenSequences,
        run: RunFolder,
        pool: Workers,
        watch: Stopwatch,
        progress: Stages,
    ) -> None:
        self.prepared, self.frame, self.weights, self.digests = prepared, frame, weights, digests
        self.tokens, self.kept, self.pool, self.watch, self.progress = tokens, run, pool, watch, progress
        self.targets = {target.name: target for target in prepared.targets}
        self.streaming: dict[str, Any] = {"weights": weights, "device": prepared.device}
        if prepared.way.spills:
            self.streaming["keep"] = spilling(run.temporary("hidden"))

    def run(self) -> Allocation:
        """Fit every unit that is not on disk; the allocation that was used."""
        prepared, recipe = self.prepared, self.prepared.recipe
        allocation = prepared.allocation
        if allocation is not None and (recipe.sequential or prepared.cache is None):
            self._streamed(allocation)
            return allocation
        allocation = allocation or self.kept.allocation
        store = self._store(prepared.cache, "grams", str(prepared.compute_dtype), self.tokens.sha256)
        self._calibrated(store)
        if allocation is None and chooses(recipe.method):
            return self._chosen(store)
        if allocation is None:
            with self.watch.stage("allocate"):
                allocation = decide(
                    prepared,
                    self._weight,
                    store,
                    self.frame,
                    self.tokens.ids,
                    self.pool,
                    self.progress,
                    self.streaming,
                )
            self.kept.decide(allocation)
            store.forget()
        if recipe.sequential:
            self._streamed(allocation)
        else:
            with self.progress.stage("compress", len(self.targets)) as step:
                self._fit(allocation.units, partial(self._task, store), step)
        return allocation

    def result(self, allocation: Allocation) -> tuple[Ledger, dict[str, FileTensor]]:
        """What is known of all units, and where their tensors lie, by their names in the result."""
        ledger, tensors = Ledger(), dict[str, FileTensor]()
        for unit in allocation.units:
            found, record = self.kept.get(unit)
            tensors |= found
            ledger.enter(record)
        return ledger, tensors

    def _chosen(self, store: GramStore) -> Allocation:
        """Decompose all weights, choose among their parts, and assemble what was chosen."""
        config = self.prepared.recipe.method
        folder = self._folder(self.prepared.cache, "parts", decomposition_key(config))
        model = self.prepared.source.model(self.prepared.device) if trials(config).runs else self.frame
        with self.watch.stage("allocate"):
            chosen = choose_parts(
                self.prepared, self._weight, store, folder, model, self.tokens.ids, self.pool, self.progress
            )
        del model

        def task(unit: Unit) -> Task:
            (name,) = unit.members
            with store.using([self.targets[name].site]) as grams:
                return AssembleTask(unit, self._weight(name), grams[self.targets[name].site], chosen.of(name))

        with self.progress.stage("compress", len(self.targets)) as step:
            self._fit(chosen.allocation.units, task, step)
        return chosen.allocation

    def _streamed(self, allocation: Allocation) -> None:
        """Fit every unit as soon as all its Grams are there, and let go of those that no unit waits for."""
        sequential = self.prepared.recipe.sequential
        waiting = [unit for unit in allocation.units if not self.kept.has(unit)]
        store, there = GramStore(self.kept.temporary("streamed"), self.prepared.device), set[str]()
        with self.progress.stage("compress", len(self.targets)) as step:
            for _ in range(len(self.targets) - sum(len(unit.members) for unit in waiting)):
                step()
            wanted = {site for unit in waiting for site in self._sites(unit)}
            placed = _Placed(self.frame)
            for layer, grams in self._passes(sequential_grams if sequential else plain_grams, wanted):
                placed.undo()
                store.update(grams)
                there |= grams.keys()
                del grams
                release()
                ready = [unit for unit in waiting if self._sites(unit) <= there]
                self._fit(ready, partial(self._task, store), step)
                waiting = [unit for unit in waiting if unit not in ready]
                unneeded = there - {site for unit in waiting for site in self._sites(unit)}
                store.drop(unneeded)
                there -= unneeded
                if sequential:
                    own = [unit for unit in allocation.units if self.targets[unit.members[0]].layer == layer]
                    placed.put({name: module for unit in own for name, module in self._modules(unit).items()})
            placed.undo()

    def _calibrated(self, store: GramStore) -> None:
        """All Grams into the store, unless an earlier run left them there."""
        sites = {target.site for target in self.targets.values()}
        if store.holds(sites):
            return
        missing = store.missing(sites)
        if self.prepared.cache is not None:
            needed = sum(self.prepared.gram_bytes[site] for site in missing)
            own = self.prepared.disk_bytes - held_bytes(self.kept.folder)
            check_space({self.kept.folder: own, store.folder: needed})
        with self.progress.stage("calibrate", len(sites)) as step:
            for _ in sites - missing:
                step()
            for _, grams in self._passes(plain_grams, missing):
                store.update(grams)
                for _ in grams:
                    step()
        store.seal(sites)

    def _passes(
        self, kind: Callable[..., Iterator[dict[str, Gram]]], wanted: set[str]
    ) -> Iterator[tuple[int | None, dict[str, Gram]]]:
        """(layer, Grams of its sites that are wanted), layer by layer; the time until the next ones is the calibration's."""
        if not wanted:
            return
        sites: dict[int | None, list[str]] = {}
        for target in self.targets.values():
            if target.site in wanted and target.site not in sites.setdefault(target.layer, []):
                sites[target.layer].append(target.site)
        layers = list(decoder_layers(self.frame))
        passes = kind(self.frame, layers, sites, self.tokens.ids, self.prepared.compute_dtype, **self.streaming)
        for number in range(len(layers) + 1):
            with self.watch.stage("calibrate"):
                grams = next(passes, None)
            if grams is None:
                return
            yield (number if number < len(layers) else None), grams
            del grams

    def _fit(self, units: Iterable[Unit], task: Callable[[Unit], Task], step: Callable[[], None]) -> None:
        """Factors of units that are not on disk, each on disk as soon as it is fitted."""
        missing = [unit for unit in units if not self.kept.has(unit)]
        with self.watch.stage("fit"), deferred() as interrupted:
            for unit, found in self.pool.run(fitted, map(task, missing), stop=interrupted):
                record = unit_record([self.targets[name] for name in unit.members], found)
                self.kept.put(unit, unit_tensors(unit, found), record)
                for _ in unit.members:
                    step()
        if interrupted():
            raise KeyboardInterrupt

    def _task(self, store: GramStore, unit: Unit) -> Task:
        recipe, sites = self.prepared.recipe, [self.targets[name].site for name in unit.members]
        with store.using(sites) as grams:
            weights = [self._weight(name) for name in unit.members]
            return FitTask(unit, weights, [grams[site] for site in sites], recipe.correction, recipe.seed)

    def _store(self, cache: Path | None, *kind: str) -> GramStore:
        return GramStore(self._folder(cache, *kind), self.prepared.device)

    def _folder(self, cache: Path | None, kind: str, *decides: str) -> Path:
        """In the cache under what decides its content, or with the run, where it goes away."""
        if cache is None:
            return self.kept.folder / kind
        machine = (self.prepared.device.type, str(torch.get_num_threads()), *versions().values())
        model = model_sha256(self.digests, self.frame.config)
        return cache / f"{kind}-{hashlib.sha256(' '.join([model, *machine, *decides]).encode()).hexdigest()[:16]}"

    def _modules(self, unit: Unit) -> dict[str, FactoredLinear]:
        """What stands for a unit's layers, by name, with factors that are on disk."""
        stored, record = self.kept.get(unit)
        tensors = {name: tensor.read().to(self.prepared.device) for name, tensor in stored.items()}
        shared = {each.name: loaded(each.factors, tensors, f"{SHARED}.{each.name}.") for each in record.shared}
        found = {}
        for layer in record.layers:
            factors = loaded(layer.factors, tensors, f"{layer.name}.factors.", shared)
            bias = self.frame.get_submodule(layer.name).bias
            found[layer.name] = FactoredLinear(factors, bias, transposed=self.targets[layer.name].transposed)
        return found

    def _sites(self, unit: Unit) -> set[str]:
        return {self.targets[name].site for name in unit.members}

    def _weight(self, name: str) -> Tensor:
        return self.weights.weight(self.targets[name]).detach().to(self.prepared.device)


class _Placed:
    """Modules that stand in a model for a while."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._original: dict[str, nn.Module] = {}

    def put(self, modules: Mapping[str, nn.Module]) -> None:
        """Let these stand in the places of their names."""
        for name, module in modules.items():
            self._original[name] = self._model.get_submodule(name)
            self._model.set_submodule(name, module)

    def undo(self) -> None:
        """Put back what stood there."""
        for name, module in self._original.items():
            self._model.set_submodule(name, module)
        self._original.clear()


def unit_tensors(unit: Unit, found: Fitted) -> dict[str, Tensor]:
    """The tensors of a unit's factors by their names in the result."""
    matrices = {f"{name}.factors": factors for name, (factors, _) in zip(unit.members, found.members, strict=True)}
    if found.shared is not None:
        matrices[f"{SHARED}.{next(found.members[0][0].spec.references()).name}"] = found.shared
    return {f"{name}.{key}": tensor for name, matrix in matrices.items() for key, tensor in matrix.state_dict().items()}


def loaded(
    spec: FactorSpec, tensors: Mapping[str, Tensor], prefix: str, shared: Mapping[str, Factor] = MappingProxyType({})
) -> Factor:
    """The factors of a form from those of `tensors` whose names begin with `prefix`."""
    with torch.device("meta"):
        factors = empty(spec, shared)
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    factors.load_state_dict(own, assign=True)
    return factors


def _short(allocation: Allocation | None) -> str:
    return "made here" if allocation is None else hashlib.sha256(allocation.model_dump_json().encode()).hexdigest()


def _identity(prepared: Plan, digests: Digests, frame: PreTrainedModel) -> dict[str, str]:
    """All that decides the bytes of a result, by the names that a message may give."""
    recipe = prepared.recipe
    settings = recipe.model_dump(mode="json", exclude={"model", "calibration", "device", "compute_dtype"})
    method = settings.pop("method")
    calibration = prepared.tokens.sha256 if prepared.tokens else recipe.calibration.model_dump_json()
    return {
        "the model": model_sha256(digests, frame.config),
        "the calibration": calibration,
        **{key: str(value) for key, value in settings.items()},
        **{f"the method's {key}": str(value) for key, value in method.items()},
        "the allocation": _short(prepared.allocation),
        "the device": prepared.device.type,
        "a forward pass in": str(prepared.compute_dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        **{f"the version of {name}": version for name, version in versions().items() if name != "python"},
    }
