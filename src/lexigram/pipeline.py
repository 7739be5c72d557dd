"""`compress`: the only file that knows the order of the stages. No mathematics here.

Plan, load, then decoder layer by decoder layer: Grams of its input sites, factors of its linear layers, factors put in
place; at any time only those Grams exist that a unit still waits for. Where the Grams decide on the allocation, all of them
are made first and kept in a folder. Then save.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lexigram.allocation.units import Allocation, Unit
from lexigram.calibration.passes import plain_grams, sequential_grams
from lexigram.calibration.sampling import sample_sequences
from lexigram.calibration.store import GramStore
from lexigram.calibration.tokens import TokenSequences
from lexigram.choice import choose_parts, parts_key
from lexigram.curves import decide
from lexigram.errors import LexigramError
from lexigram.gram import Gram
from lexigram.methods import Fitted, Member, fit_group
from lexigram.methods.base import assemble, chooses
from lexigram.planning import Plan, plan
from lexigram.recipe import Recipe
from lexigram.recording import Ledger, run_record
from lexigram.records import RunRecord, Stopwatch
from lexigram.running import Silent, Stages, counted
from lexigram.staging import RUN_FILE, check_target, staged
from lexigram.targets import decoder_layers, weight_of
from lexigram.transformers_io import FactoredLinear, attach_config, share
from lexigram.weights import check_finite, check_storable, model_sha256, weights_sha256

ALLOCATION_FILE = "allocation.json"


def compress(
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Stages | None = None,
    prepared: Plan | None = None,
    cache: str | Path | None = None,
) -> RunRecord:
    """Compress a model into the folder `out`, which appears only when everything in it is complete.

    Args:
        recipe: the whole run.
        out: a folder that does not exist, is empty, or (with `overwrite`) holds an earlier result of ours.
        overwrite: replace such a result.
        progress: is told how far the run is.
        prepared: the plan of this recipe, where it was made already.
        cache: see `plan`; of no use beside `prepared`, which has its own.

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
        prepared = prepared or plan(recipe, cache=cache)
        check_target(out, overwrite=overwrite, needed_bytes=prepared.disk_bytes)
    with watch.stage("load"), progress.stage("load the model", 1) as step:
        model = prepared.source.model(prepared.device)
        check_finite(model, recipe.model)
        check_storable(model, {target.name for target in prepared.targets}, recipe.dtype)
        step()
    tokens = prepared.tokens
    if tokens is None:
        with watch.stage("sample"):
            tokens = sampled(prepared, model, progress)
    digest = weights_sha256(model, prepared.targets)
    work = _Work(prepared, model, tokens, watch, progress)
    allocation = work.run(out)
    with staged(out, overwrite=overwrite) as folder:
        with watch.stage("save"), progress.stage("save", 1) as step:
            attach_config(model.to(getattr(torch, recipe.dtype)))
            model.save_pretrained(folder)
            prepared.source.tokenizer().save_pretrained(folder)
            step()
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (folder / ALLOCATION_FILE).write_text(allocation.model_dump_json(indent=1) + "\n", encoding="utf-8")
        record = run_record(folder, prepared, tokens, digest, allocation, work.ledger, watch)
        (folder / RUN_FILE).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
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
    """The middle of a run: from a loaded model and its calibration tokens to a model with factors in it."""

    def __init__(
        self,
        prepared: Plan,
        model: PreTrainedModel,
        tokens: TokenSequences,
        watch: Stopwatch,
        progress: Stages,
    ) -> None:
        self.prepared, self.model, self.tokens = prepared, model, tokens
        self.watch, self.progress = watch, progress
        self.targets = {target.name: target for target in prepared.targets}
        self.ledger = Ledger()

    def run(self, out: Path) -> Allocation:
        """Replace every target; the allocation that was used."""
        prepared, recipe = self.prepared, self.prepared.recipe
        allocation = prepared.allocation
        if allocation is not None and (recipe.sequential or prepared.cache is None):
            self._streamed(allocation)
            return allocation
        with self._gram_store(out) as store:
            self._calibrated(store)
            if allocation is None and chooses(recipe.method):
                return self._chosen(out, store)
            if allocation is None:
                with self.watch.stage("allocate"):
                    allocation = decide(prepared, self._weight, store, self.model, self.tokens.ids, self.progress)
            if recipe.sequential:
                self._streamed(allocation)
                return allocation
            with self.progress.stage("compress", len(self.targets)) as step:
                for unit in allocation.units:
                    with store.using(self.targets[name].site for name in unit.members) as grams:
                        self._fit(unit, grams)
                    for _ in unit.members:
                        step()
        return allocation

    def _chosen(self, out: Path, store: GramStore) -> Allocation:
        """Decompose all weights, choose among their parts, and put in place what was chosen."""
        with self._parts_folder(out) as folder:
            with self.watch.stage("allocate"):
                chosen = choose_parts(
                    self.prepared, self._weight, store, folder, self.model, self.tokens.ids, self.progress
                )
            with self.progress.stage("compress", len(self.targets)) as step:
                for unit in chosen.allocation.units:
                    (name,), (spec,) = unit.members, unit.spec.members
                    with store.using([self.targets[name].site]) as grams, self.watch.stage("fit"):
                        gram = grams[self.targets[name].site]
                        try:
                            fitted = assemble(unit.method, self._weight(name), gram, chosen.of(name), spec)
                        except ValueError as error:
                            raise LexigramError(f"{name} cannot be compressed: {error}") from error
                    self._put(unit, Fitted([fitted]))
                    step()
        return chosen.allocation

    @contextmanager
    def _parts_folder(self, out: Path) -> Iterator[Path]:
        """In the cache under what decides the parts, or beside `out` where it goes away."""
        if self.prepared.cache is None:
            with _temporary_folder(out, "parts") as folder:
                yield folder
            return
        key = hashlib.sha256(f"{model_sha256(self.model)} {parts_key(self.prepared.recipe)}".encode())
        yield self.prepared.cache / f"parts-{key.hexdigest()[:16]}"

    def _streamed(self, allocation: Allocation) -> None:
        """Fit every unit as soon as all its Grams are there, and let go of those that no unit waits for."""
        waiting, held = list(allocation.units), dict[str, Gram]()
        passes = self._passes(sequential_grams if self.prepared.recipe.sequential else plain_grams)
        with self.progress.stage("compress", len(self.targets)) as step:
            for grams in passes:
                held |= grams
                ready = [unit for unit in waiting if self._sites(unit) <= held.keys()]
                for unit in ready:
                    self._fit(unit, held)
                    for _ in unit.members:
                        step()
                waiting = [unit for unit in waiting if unit not in ready]
                needed = set().union(*map(self._sites, waiting))
                held = {site: gram for site, gram in held.items() if site in needed}
                del grams  # with all that was computed from them, before the next layer's are made

    def _calibrated(self, store: GramStore) -> None:
        """All Grams into the store, unless an earlier run left them there."""
        sites = {target.site for target in self.targets.values()}
        if store.holds(sites):
            return
        with self.progress.stage("calibrate", len(sites)) as step:
            for grams in self._passes(plain_grams):
                store.update(grams)
                for _ in grams:
                    step()
        store.seal(sites)

    def _passes(self, kind: Callable[..., Iterator[dict[str, Gram]]]) -> Iterator[dict[str, Gram]]:
        """Grams layer by layer; the time until the next ones is that of the calibration."""
        sites: dict[int | None, list[str]] = {}
        for target in self.targets.values():
            found = sites.setdefault(target.layer, [])
            if target.site not in found:
                found.append(target.site)
        layers = list(decoder_layers(self.model))
        passes = kind(self.model, layers, sites, self.tokens.ids, self.prepared.compute_dtype)
        while True:
            with self.watch.stage("calibrate"):
                grams = next(passes, None)
            if grams is None:
                return
            yield grams
            del grams

    @contextmanager
    def _gram_store(self, out: Path) -> Iterator[GramStore]:
        """In the cache under what decides the Grams, or in a folder beside `out` that goes away."""
        device = self.prepared.device
        if self.prepared.cache is not None:
            decides = (model_sha256(self.model), self.tokens.sha256, str(self.prepared.compute_dtype))
            key = hashlib.sha256(" ".join(decides).encode()).hexdigest()
            yield GramStore(self.prepared.cache / f"grams-{key[:16]}", device)
            return
        with _temporary_folder(out, "grams") as folder:
            yield GramStore(folder, device)

    def _sites(self, unit: Unit) -> set[str]:
        return {self.targets[name].site for name in unit.members}

    def _weight(self, name: str) -> Tensor:
        return weight_of(self.model.get_submodule(name)).detach()

    def _fit(self, unit: Unit, grams: Mapping[str, Gram]) -> None:
        """Factors of one unit, put in place and recorded."""
        targets = [self.targets[name] for name in unit.members]
        with self.watch.stage("fit"):
            correction = self.prepared.recipe.correction
            members = [Member(grams[t.site].aim(self._weight(t.name), correction), grams[t.site]) for t in targets]
            generator = _generator(self.prepared.recipe.seed, unit.members[0])
            try:
                fitted = fit_group(unit.method, members, unit.spec, generator)
            except ValueError as error:
                raise LexigramError(f"{' + '.join(unit.members)} cannot be compressed: {error}") from error
        self._put(unit, fitted)

    def _put(self, unit: Unit, fitted: Fitted) -> None:
        """Factors in the place of the weights, and on record."""
        targets = [self.targets[name] for name in unit.members]
        for target, (factors, report) in zip(targets, fitted.members, strict=True):
            module = self.model.get_submodule(target.name)
            bias = module.bias if isinstance(module.bias, Tensor) else None
            self.model.set_submodule(target.name, FactoredLinear(factors, bias, transposed=target.transposed))
            self.ledger.enter(target, factors, report)
        if fitted.shared is not None:
            name = next(fitted.members[0][0].spec.references()).name
            share(self.model, {name: fitted.shared})
            self.ledger.enter_shared(name, unit.members, fitted.shared)


@contextmanager
def _temporary_folder(out: Path, content: str) -> Iterator[Path]:
    """A folder beside `out` that goes away: what lies there may be as large as the model."""
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.{content}-", dir=parent) as folder:
        yield Path(folder)


def _generator(seed: int, name: str) -> torch.Generator:
    """One stream of random numbers a layer, whatever the order in which layers are fitted."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
