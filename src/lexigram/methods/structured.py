"""Structured pruning: channels of an MLP and heads of an attention are dropped from all matrices on both sides of them.

The last matrix of a group, the consumer (down, o), takes as inputs what the others, the producers (gate and up; q, k and v),
make. A dropped channel or head is columns of the consumer and rows of the producers: sparse leaves that keep whole blocks. What
goes is chosen by the Gram of the consumer's inputs alone (`lexigram.linalg.channels`). Nothing else reads a dropped channel, so
it does not matter what it comes to: a producer's bias may stay. `refit` moves the consumer to where its outputs stay closest.

Query heads that share a key/value head stand next to each other, as transformers repeats them. They go one by one, for the
outputs lose with each of them; a key/value head goes with the last that reads it, and nothing more is lost. The form within a
budget has as many query heads as possible, and then as many key/value heads, so that there is the most to choose from.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lexigram.factors import FactorSpec, GroupSpec, Sparse, SparseSpec
from lexigram.gram import Gram
from lexigram.linalg.channels import AsTheyStand, Refitted, choose_blocks, damped, refit_columns
from lexigram.linalg.rounding import DAMPING
from lexigram.methods.base import (
    Budget,
    BudgetTooSmallError,
    FitReport,
    Fitted,
    Member,
    MethodConfig,
    checked_weight,
    direct_report,
    fit,
    fit_coupled,
    layout,
    layout_coupled,
    metric,
    size,
    wrong_form,
)
from lexigram.methods.storing import Damping, Refit, StoredBits, ValueGroup, codec


class StructuredConfig(MethodConfig):
    """Channels and heads by what the outputs of the consumer lose: as they stand, or with `refit` after that."""

    name: Literal["structured"] = "structured"
    refit: Refit = False
    damping: Damping = DAMPING
    value_bits: StoredBits = 16
    value_group: ValueGroup = 128


class _Heads(NamedTuple):
    """The channels between producers and consumer: `blocks` of `width`, of which `together` read one key/value head."""

    width: int
    blocks: int
    together: int

    @property
    def groups(self) -> int:
        """Of blocks that read the same."""
        return self.blocks // self.together


@layout.register
def _(config: StructuredConfig, shape: tuple[int, int], budget: Budget) -> FactorSpec:
    """Of a matrix alone: whole columns."""
    return layout_coupled(config, [shape], budget, 1).members[0]


@layout_coupled.register
def _(config: StructuredConfig, shapes: Sequence[tuple[int, int]], budget: Budget, head_dim: int) -> GroupSpec:
    heads = _heads([rows for rows, _ in shapes[:-1]], shapes[-1][1], head_dim)

    def at(kept: int, groups: int) -> GroupSpec:
        return _form(config, shapes, heads, kept, groups)

    def fewest(kept: int) -> int:
        return -(-kept // heads.together)

    kept = _most(range(1, heads.blocks + 1), lambda count: at(count, fewest(count)), budget)
    return at(kept, _most(range(fewest(kept), min(kept, heads.groups) + 1), lambda count: at(kept, count), budget))


@fit.register
def _(
    config: StructuredConfig, weight: Tensor, gram: Gram, spec: FactorSpec, generator: torch.Generator
) -> tuple[Sparse, FitReport]:
    return _fitted(config, [Member(weight, gram)], [spec])[0]


@fit_coupled.register
def _(config: StructuredConfig, members: Sequence[Member], spec: GroupSpec, generator: torch.Generator) -> Fitted:
    return Fitted(list(_fitted(config, members, spec.members)))


def _fitted(
    config: StructuredConfig, members: Sequence[Member], specs: Sequence[FactorSpec]
) -> list[tuple[Sparse, FitReport]]:
    """Factors and report of every member; the time that the choice takes is the consumer's."""
    start = time.perf_counter()
    forms = [spec for spec in specs if isinstance(spec, SparseSpec)]
    heads = _heads_of(specs, forms)
    consumer, form = members[-1], forms[-1]
    weight, inputs = checked_weight(consumer.weight), metric(consumer.gram)
    if config.refit:
        inputs = damped(inputs, config.damping)
    losses = (Refitted if config.refit else AsTheyStand)(weight, inputs, heads.width)
    count = form.nonzeros // (form.rows * heads.width)
    groups = min(producer.nonzeros // (producer.cols * heads.width) for producer in forms[:-1]) if forms[1:] else None
    kept = choose_blocks(losses, count, together=heads.together, groups=groups)
    columns = kept.repeat_interleave(heads.width)
    values = refit_columns(weight, inputs, columns) if config.refit else weight
    factor = Sparse.encode(values, form, columns.expand_as(values))
    message = _kept(count, heads.blocks, heads.width) + (", refitted" if config.refit else "")
    own = direct_report(message, weight, factor, consumer.gram, time.perf_counter() - start)
    producers = zip(members[:-1], forms[:-1], strict=True)
    return [*(_rows_kept(member, side, kept) for member, side in producers), (factor, own)]


def _rows_kept(member: Member, form: SparseSpec, kept: Tensor) -> tuple[Sparse, FitReport]:
    """A producer without the heads (or channels) that only dropped ones read."""
    start = time.perf_counter()
    weight, width = checked_weight(member.weight), form.block[0]
    blocks, count = form.rows // width, form.nonzeros // (form.cols * width)
    read = kept.view(blocks, -1).any(dim=1)
    # Room that the choice left is filled: the form is fixed before it.
    read[(~read).nonzero().squeeze(1)[: count - int(read.sum())]] = True
    rows = read.repeat_interleave(width)[:, None].expand_as(weight)
    factor = Sparse.encode(weight, form, rows)
    return factor, direct_report(_kept(count, blocks, width), weight, factor, member.gram, time.perf_counter() - start)


def _kept(count: int, blocks: int, width: int) -> str:
    return f"{count} of {blocks} {'heads' if width > 1 else 'channels'} kept"


def _heads(outputs: Sequence[int], inputs: int, width: int) -> _Heads:
    """The heads between producers of so many outputs and a consumer of so many inputs.

    Raises:
        ValueError: where a producer makes neither all of the inputs nor, like the others that do not, a part of them that
            equally many heads each share.
    """
    blocks = inputs // width
    counts = {rows // width for rows in outputs} - {blocks}
    groups = min(counts, default=blocks)
    if any(number % width for number in (*outputs, inputs)) or len(counts) > 1 or not groups or blocks % groups:
        raise ValueError(
            f"outputs of {', '.join(map(str, outputs))} and inputs of {inputs} are not the two sides of the same channels, "
            f"{width} at a time"
        )
    return _Heads(width, blocks, blocks // groups)


def _form(
    config: StructuredConfig, shapes: Sequence[tuple[int, int]], heads: _Heads, kept: int, groups: int
) -> GroupSpec:
    """So many heads (or channels) of every matrix, and of those that several share so many."""
    values = codec(config.value_bits, config.value_group)
    *producers, (rows, cols) = shapes
    sides = []
    for outputs, width in producers:
        count = kept if outputs == cols else groups
        block = (heads.width, width)
        sides.append(SparseSpec.lightest(outputs, width, count * heads.width * width, values, block))
    consumer = SparseSpec.lightest(rows, cols, kept * heads.width * rows, values, (rows, heads.width))
    return GroupSpec(members=(*sides, consumer))


def _most(counts: range, form: Callable[[int], GroupSpec], budget: Budget) -> int:
    """The largest of the counts whose form is within the budget.

    Raises:
        BudgetTooSmallError: where not even that of the first is.
    """
    fitting = bisect_right(counts, budget.amount, key=lambda count: size(form(count), budget.unit))
    if not fitting:
        raise BudgetTooSmallError(size(form(counts[0]), budget.unit), budget)
    return counts[fitting - 1]


def _heads_of(specs: Sequence[FactorSpec], forms: Sequence[SparseSpec]) -> _Heads:
    """What the forms of a group were laid out for.

    Raises:
        ValueError: where they were not laid out here; an allocation file can hold anything.
    """
    if len(forms) < len(specs):
        raise wrong_form(next(spec for spec in specs if not isinstance(spec, SparseSpec)))
    *producers, consumer = forms
    width = consumer.block[1]
    heads = _heads([form.rows for form in producers], consumer.cols, width)
    fitting = consumer.block == (consumer.rows, width) and all(form.block == (width, form.cols) for form in producers)
    kept = {form.nonzeros // (width * form.cols) for form in producers if form.rows == consumer.cols}
    if not fitting or kept - {consumer.nonzeros // (width * consumer.rows)}:
        raise wrong_form(consumer)
    return heads
