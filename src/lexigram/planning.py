"""`plan`: a recipe resolved into targets, forms and sizes before any weight is read; every error that a user can make
is raised here, before any work.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lexigram.allocation.matching import consecutive, coupled, same_site, siblings
from lexigram.allocation.offers import MEASURED, RANKED, check_reach
from lexigram.allocation.uniform import budget, uniform
from lexigram.allocation.units import Allocation
from lexigram.calibration.text import read_texts
from lexigram.calibration.tokens import TokenSequences, token_sequences
from lexigram.devices import forward_dtype, resolve_device
from lexigram.errors import LexigramError
from lexigram.factors import LONGEST, FactorSpec
from lexigram.folders import CONFIG
from lexigram.memory import (
    PLANNING,
    Needs,
    Way,
    available_bytes,
    chosen_way,
    parsed,
    peak_memory_bytes,
    resident_bytes,
)
from lexigram.methods.base import chooses, couples, trials
from lexigram.recipe import GLOBAL, KNAPSACK, SELF, UNIFORM, Recipe
from lexigram.source import Source
from lexigram.targets import (
    Target,
    check_separate,
    decoder_layers,
    decoder_layers_name,
    find_targets,
    is_linear,
    weight_of,
)
from lexigram.transformers_io import is_compressed

SENSITIVITY_SEQUENCES = 8
"""So many of the calibration's sequences tell how much the loss feels an error."""

_DEFAULT_LENGTH = 1024
_DESCRIPTIONS = 20_000_000  # bytes on disk for tokenizer, configs and run.json
_PARTS = 8  # bytes of disk for every weight that is split into parts: some 1.6 numbers of 4 bytes, and a byte of their support
_SKETCHES = 8  # bytes of disk for every weight that a refinement makes sketches of: measured, some 4 forms in bfloat16
_CANDIDATES = 14  # bytes of memory for every weight whose parts are chosen among: measured, some 1.6 parts a weight
_WORTH_WORKERS = 20_000_000  # weights to compress


@dataclass(frozen=True)
class Plan:
    """What a run will do. Sizes are stored bytes."""

    recipe: Recipe
    ratio: float
    """The share of `bytes_before` to remove, in whichever way the recipe says it."""
    source: Source
    targets: list[Target]
    groups: list[tuple[str, ...]] | None
    """Names of the targets that are fitted together; None where the weights decide."""
    allocation: Allocation | None
    """None where the Grams decide."""
    cache: Path | None
    """Where Grams are kept for later runs."""
    length: int
    tokens: TokenSequences | None
    """None where the sequences will be sampled from the model itself."""
    uncompressed_bytes: int
    way: Way
    """How it is carried out where memory decides."""
    memory: dict[str, int]
    """The peak of memory in every stage, in bytes, as it is predicted: of the workers too."""
    room: int | None
    """Bytes of memory that the machine had for this process when it was planned; None where that is not known."""
    device: torch.device
    compute_dtype: torch.dtype
    spilled_bytes: int
    """Of hidden states that wait in files."""
    seconds: float
    """How long the planning took; reading and tokenising the text is most of it."""

    @property
    def specs(self) -> dict[str, FactorSpec]:
        """Every target's own form by its name, where the allocation is known."""
        return {} if self.allocation is None else self.allocation.specs

    @property
    def takes_long(self) -> bool:
        """Whether there is enough to do for workers, and for telling beforehand how long it takes."""
        return sum(target.weight_count for target in self.targets) >= _WORTH_WORKERS

    @property
    def bytes_before(self) -> int:
        """Of the layers to compress, in bfloat16."""
        return sum(target.dense_bytes for target in self.targets)

    @property
    def bytes_after(self) -> int:
        """Of the same layers' factors; where the Grams decide about them, the most that they may take."""
        if self.allocation is None:
            amount = budget(self.targets, self.ratio, "bytes").amount
            uncounted = self.recipe.accounting == "paper" and chooses(
                self.recipe.method
            )  # masks, and what fills up a byte
            return amount + sum(target.weight_count // 8 + 8 for target in self.targets) * uncounted
        return self.allocation.bytes

    @property
    def memory_bytes(self) -> int:
        """The peak of memory, as it is predicted."""
        return max(self.memory.values())

    @property
    def gram_bytes(self) -> dict[str, int]:
        """Of every site's Gram, in float64, by the site's name."""
        return {target.site: 8 * target.shape[1] ** 2 for target in self.targets}

    @property
    def beyond_room(self) -> bool:
        """Whether a stage that is to come is predicted to take more memory than the machine has for it."""
        to_come = max(peak for stage, peak in self.memory.items() if stage != PLANNING)
        return self.room is not None and to_come > self.room

    @property
    def disk_bytes(self) -> int:
        """What the run will need on disk: the output with its descriptions, and Grams and parts that are kept meanwhile.

        Grams in a cache are not in it: which of them are there already is known once the weights are.
        """
        widths: dict[int | None, dict[str, int]] = {}
        for target in self.targets:
            widths.setdefault(target.layer, {})[target.site] = target.shape[1]
        of_layers = [sum(8 * width**2 for width in sites.values()) for sites in widths.values()]
        decided_by_grams = self.allocation is None
        kept = (sum(of_layers) if self.cache is None else 0) if decided_by_grams else max(of_layers)
        if decided_by_grams and chooses(self.recipe.method):
            kept += sum(_PARTS * target.weight_count for target in self.targets)
        if self.recipe.refine and self.cache is None:
            kept += sum(_SKETCHES * target.weight_count for target in self.targets)
        # Factors are kept as soon as they are fitted, and once more in the result.
        return self.uncompressed_bytes + 2 * self.bytes_after + _DESCRIPTIONS + kept + self.spilled_bytes


def plan(
    recipe: Recipe,
    *,
    cache: str | Path | None = None,
    workers: int | None = None,
    max_ram: int | None = None,
    tokens: TokenSequences | None = None,
) -> Plan:
    """Resolve a recipe without reading weights.

    Args:
        recipe: the whole run.
        cache: a folder where Grams, curves and decompositions are kept, so that another run on the same weights and text need
            not make them again.
        workers: matrices that are fitted at once; None for one a core where models are worth it, and as many as the memory that
            is available holds by the prediction.
        max_ram: bytes of memory that the run may take, its workers included; kept or refused, however much is available.
        tokens: the calibration, where it is there already from this recipe's text and seed, read or sampled before.

    Raises:
        LexigramError: for a model, pattern, text, device, ratio or size that will not do, a memory limit that is too small, or
            tokens of another size than the recipe's.
    """
    start = time.perf_counter()
    source = Source.resolve(recipe.model)
    config = source.config()
    if is_compressed(config):
        raise LexigramError(f"{recipe.model} is compressed already; name the original model")
    _refuse_quantised(source, config)
    device = resolve_device(recipe.device)
    _check_cache(cache)
    skeleton = source.skeleton()
    targets = find_targets(skeleton, recipe.include, recipe.exclude)
    for target in targets:
        if max(target.shape) > LONGEST:
            raise LexigramError(
                f"{target.name} has the shape {target.shape} by {CONFIG}, more than {LONGEST} rows or columns; check the model"
            )
    groups = _groups(recipe, skeleton, targets)
    uncompressed_bytes = _uncompressed_bytes(recipe, skeleton, targets)
    ratio = _ratio(recipe, targets, uncompressed_bytes)
    allocation = _allocation(recipe, ratio, targets, groups)
    length = _length(recipe, config)
    if tokens is not None:
        _check_tokens(tokens, recipe.calibration.sequences, length)
    elif recipe.calibration.text != (SELF,):
        tokens = _read_tokens(recipe, source, length)
    compute_dtype = forward_dtype(device, recipe.compute_dtype)
    read = recipe.calibration.sequences * length, length
    needs = _needs(recipe, source, skeleton, targets, groups, read, compute_dtype, samples=tokens is None)
    before, resident = peak_memory_bytes(), resident_bytes()
    available = available_bytes() if device.type == "cpu" else None  # a GPU has memory of its own
    room = None if available is None else resident + available
    way, memory = chosen_way(
        needs,
        resident,
        workers or _default_workers(device, targets),
        max_ram,
        before,
        room if workers is None else None,
    )
    return Plan(
        recipe=recipe,
        ratio=ratio,
        source=source,
        targets=targets,
        groups=groups,
        allocation=allocation,
        cache=None if cache is None else Path(cache),
        length=length,
        tokens=tokens,
        uncompressed_bytes=uncompressed_bytes,
        way=way,
        memory=memory,
        room=room,
        device=device,
        compute_dtype=compute_dtype,
        spilled_bytes=needs.spilled_bytes if way.spills else 0,
        seconds=time.perf_counter() - start,
    )


def _default_workers(device: torch.device, targets: list[Target]) -> int:
    """One a core, unless starting the workers takes longer than they do."""
    count = sum(target.weight_count for target in targets)
    return torch.get_num_threads() if device.type == "cpu" and count >= _WORTH_WORKERS else 1


def _refuse_quantised(source: Source, config: Any) -> None:
    """A model that other software has quantised holds codes, not weights; only GGUF is dequantised on loading."""
    content = getattr(config, "quantization_config", None)
    if content and source.gguf is None:
        method = content.get("quant_method") if isinstance(content, dict) else getattr(content, "quant_method", None)
        raise LexigramError(f"{source.name} is quantised already ({method}); name the model that it was made from")


def _check_cache(cache: str | Path | None) -> None:
    """Raise where the cache could not be written in the end."""
    if cache is None:
        return
    place = Path(cache).absolute()
    parent = next(folder for folder in (place, *place.parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise LexigramError(
            f"the cache {cache} cannot be used: {parent} is not a folder that one can write to; name another --cache"
        )


def _groups(recipe: Recipe, skeleton: PreTrainedModel, targets: list[Target]) -> list[tuple[str, ...]] | None:
    """Which targets stand together, where their names and shapes tell it."""
    if couples(recipe.method):
        groups = coupled(targets)
        producers = {name for names in groups for name in names[:-1]}
        check_separate(skeleton, [target for target in targets if target.name in producers])
        return groups
    if recipe.share == "matched":
        return None
    if recipe.share == "none":
        return [(target.name,) for target in targets]
    if recipe.share == "site":
        groups = same_site(targets)
        needed = "two of them with one input (q, k, v; gate, up)"
    else:
        # Siblings in the whole model: q_proj shares over layers whether or not k_proj is compressed too.
        groups = consecutive(targets, recipe.group, siblings(find_targets(skeleton)))
        needed = "kinds with one input (q, k, v, gate, up) in neighbouring layers"
    if all(len(names) == 1 for names in groups):
        raise LexigramError(
            f"nothing among the {len(targets)} layers to compress in {recipe.model} can share by {recipe.share!r}, which takes "
            f"{needed}: the others are excluded, fused into one matrix, or the model cannot be traced; use "
            "`--share matched`, or leave sharing out"
        )
    return groups


def _ratio(recipe: Recipe, targets: list[Target], uncompressed_bytes: int) -> float:
    """The share of the targets' bytes to remove, in whichever way the recipe says it.

    Raises:
        LexigramError: for a size that what is not compressed exceeds, or that the whole model does not.
    """
    before = sum(target.dense_bytes for target in targets)
    if recipe.bits is not None:
        return 1 - recipe.bits / (8 * before / sum(target.weight_count for target in targets))
    if recipe.size is None:
        assert recipe.ratio is not None, "a recipe has one of AMOUNTS"
        return recipe.ratio
    left = parsed(recipe.size) - uncompressed_bytes
    if left <= 0:
        raise LexigramError(
            f"a size of {recipe.size} is too small: what is not compressed takes {uncompressed_bytes / 1e6:.3f} MB by itself; "
            "give a size above that, or compress more layers by include and exclude"
        )
    if left >= before:
        raise LexigramError(
            f"a size of {recipe.size} is no less than the {(uncompressed_bytes + before) / 1e6:.3f} MB that the model takes "
            "uncompressed; give a smaller one"
        )
    return 1 - left / before


def _allocation(
    recipe: Recipe, ratio: float, targets: list[Target], groups: list[tuple[str, ...]] | None
) -> Allocation | None:
    """Every unit's form where no Gram decides about it, and else None.

    Raises:
        LexigramError: for a file that will not do, and a ratio that is too large; in the words of the recipe, too.
    """
    by_name = {target.name: target for target in targets}
    if recipe.allocation not in (UNIFORM, KNAPSACK, GLOBAL):
        return _replayed(recipe, ratio, by_name)
    try:
        return _allocated(recipe, ratio, by_name, groups)
    except LexigramError as error:
        if recipe.ratio is not None:
            raise
        raise LexigramError(f"{recipe.amount} is a ratio of {ratio:.6g} here: {error}") from error


def _replayed(recipe: Recipe, ratio: float, targets: Mapping[str, Target]) -> Allocation:
    """The allocation in the file that a recipe names.

    Raises:
        LexigramError: as reading and checking it do; where it does not go with sequential calibration, or takes more than the
            bits or the size that are asked for.
    """
    replayed = Allocation.read(Path(recipe.allocation))
    replayed.check({name: target.shape for name, target in targets.items()})
    for unit in replayed.units:
        if recipe.sequential and len({targets[name].layer for name in unit.members}) > 1:
            raise LexigramError(
                f"sequential calibration needs a layer's factors before the next layer is run, and {recipe.allocation} "
                f"lets {' and '.join(unit.members)} share; leave one of the two out"
            )
    # A ratio may be nothing but the default, and the file wins over it.
    if recipe.ratio is None and replayed.bytes > (most := budget(list(targets.values()), ratio, "bytes").amount):
        raise LexigramError(
            f"the allocation {recipe.allocation} takes {replayed.bytes} bytes, and {recipe.amount} leaves {most}; name another "
            "file, or leave one of the two out"
        )
    return replayed


def _allocated(
    recipe: Recipe, ratio: float, targets: Mapping[str, Target], groups: list[tuple[str, ...]] | None
) -> Allocation | None:
    if groups is None or recipe.by_curves or chooses(recipe.method):
        amount = budget(list(targets.values()), ratio, recipe.accounting).amount
        if groups is not None and recipe.by_curves:
            # The last ones are ranked and not counted on: what is ranked may be some bytes larger than it was to be.
            ratios = MEASURED if recipe.allocation == KNAPSACK else RANKED[:-1]
            check_reach(recipe.method, [[targets[name] for name in names] for names in groups], amount, ratios)
        return None
    return uniform(groups, targets, recipe.method, ratio, recipe.accounting)


def _length(recipe: Recipe, config: Any) -> int:
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or _DEFAULT_LENGTH
    length = recipe.calibration.length or min(_DEFAULT_LENGTH, context)
    if length > context:
        raise LexigramError(
            f"a calibration length of {length} exceeds the model's context of {context}; lower --length"
        )
    return length


def _read_tokens(recipe: Recipe, source: Source, length: int) -> TokenSequences:
    calibration = recipe.calibration
    if SELF in calibration.text:
        raise LexigramError(f"{SELF!r} stands beside other calibration texts; name either it alone or only texts")
    text = read_texts(calibration.text)
    return token_sequences(
        source.tokenizer(),
        text,
        calibration.sequences,
        length,
        calibration.seed,
        bos=calibration.bos,
        source=", ".join(calibration.text),
    )


def _check_tokens(tokens: TokenSequences, sequences: int, length: int) -> None:
    """Raise where sequences that are there already are not those that a recipe asks for."""
    if (len(tokens), tokens.length) != (sequences, length):
        raise LexigramError(
            f"the tokens that are there are {len(tokens)} sequences of {tokens.length}, and the recipe asks for {sequences} of "
            f"{length}; leave them out, or plan with those of this recipe"
        )


def _uncompressed_bytes(recipe: Recipe, skeleton: PreTrainedModel, targets: list[Target]) -> int:
    """Of everything but the target weights, in the dtype that it will be stored in; a tied weight counts once."""
    left_out = {f"{target.name}.weight" for target in targets} | set(skeleton.all_tied_weights_keys)
    stored = getattr(torch, recipe.dtype)
    return sum(
        tensor.numel() * (stored if tensor.is_floating_point() else tensor.dtype).itemsize
        for name, tensor in skeleton.state_dict().items()
        if name not in left_out
    )


def _compared(recipe: Recipe, weights: int) -> int:
    """What is kept of so many weights while all are looked at: signals in float32, or scores, probabilities and masks."""
    if recipe.share == "matched":
        return 4 * weights
    return _CANDIDATES * weights if chooses(recipe.method) else 0


def _needs(
    recipe: Recipe,
    source: Source,
    skeleton: PreTrainedModel,
    targets: list[Target],
    groups: list[tuple[str, ...]] | None,
    tokens: tuple[int, int],
    compute: torch.dtype,
    *,
    samples: bool,
) -> Needs:
    """The sizes that decide what is in memory.

    `tokens` are the calibration's, and those of a sequence; `samples` says whether the model itself is still to write them.
    """
    config = skeleton.config.get_text_config()
    stored = source.dtype(skeleton.config)
    inside = tuple(f"{decoder_layers_name(skeleton)}.{index}." for index, _ in enumerate(decoder_layers(skeleton)))
    parameters = dict(skeleton.named_parameters())
    tied = set(skeleton.all_tied_weights_keys)
    count = {name: parameter.numel() for name, parameter in parameters.items() if name not in tied}
    of_layers = [sum(size for name, size in count.items() if name.startswith(prefix)) for prefix in inside]
    sites = {target.site: (target.layer, target.shape[1]) for target in targets}
    grams: dict[int | None, int] = {}
    for layer, width in sites.values():
        grams[layer] = grams.get(layer, 0) + 8 * width**2
    widths = [sum(weight_of(module).shape) for module in decoder_layers(skeleton)[0].modules() if is_linear(module)]
    whole = sum(count.values()) * stored.itemsize
    drawn = recipe.refine > 0 or trials(recipe.method).runs > 0
    tried = samples or drawn
    # A probability of 4 bytes and a mask of one byte for each of nearly as many candidates as there are weights.
    candidate = 3 + max(1, trials(recipe.method).at_once)
    return Needs(
        tokens=tokens[0],
        length=tokens[1],
        layers=len(inside),
        largest=max(count.values()) * stored.itemsize,
        outside=(sum(count.values()) - sum(of_layers)) * compute.itemsize,
        layer=max(of_layers) * compute.itemsize,
        hidden=config.hidden_size * compute.itemsize,
        activations=sum(widths) * compute.itemsize,
        logits=config.vocab_size * 4,
        width=max(target.shape[1] for target in targets),
        weights=max(target.weight_count for target in targets),
        group=max((len(names) for names in groups), default=1) if groups is not None else 2,
        grams=max(grams.values()) * (2 if recipe.sequential else 1),
        whole=tried * whole + drawn * candidate * sum(target.weight_count for target in targets),
        held=0 if source.streams(skeleton) else whole,
        compared=_compared(recipe, sum(target.weight_count for target in targets)),
        sensitivity_sequences=SENSITIVITY_SEQUENCES if recipe.by_curves and recipe.measure == "loss" else 0,
    )
