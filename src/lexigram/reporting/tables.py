"""Records to tables, as rich renderables. A pure function of what stands in the JSON files; called by the command line."""

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lexigram.comparison import table as comparison
from lexigram.comparison.planning import ComparisonPlan, Job
from lexigram.factors import DenseSpec, FactorSpec, Leaf, ProductSpec, SharedSpec, SparseSpec, SumSpec
from lexigram.planning import Plan
from lexigram.records import LayerRecord, RunRecord
from lexigram.reporting import redundancy
from lexigram.targets import Target

_NEAR = 0.01  # of the ratio asked for, when a form uses its bytes up


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def plan_table(plan: Plan) -> Table:
    """What a run will do: one row a kind, shape and form of layer."""
    table = Table(title=_plan_title(plan))
    for column, justify in (("layers", "right"), ("kind", "left"), ("shape", "right"), ("form", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    groups: dict[tuple[str, tuple[int, int], str], list[Target]] = defaultdict(list)
    specs = plan.specs
    for target in plan.targets:
        said = form(specs[target.name]) if specs else "by the Grams"
        groups[target.kind, target.shape, said].append(target)
    for (kind, shape, said), members in groups.items():
        before = sum(target.dense_bytes for target in members)
        after = size(sum(specs[target.name].bytes for target in members)) if specs else ""
        table.add_row(str(len(members)), kind, f"{shape[0]}x{shape[1]}", said, size(before), after)
    shared = [unit.spec.shared for unit in plan.allocation.units if unit.spec.shared] if plan.allocation else []
    if shared:
        table.add_row(str(len(shared)), "shared", "", "dictionaries", "", size(sum(spec.bytes for spec in shared)))
    table.add_section()
    table.add_row(str(len(plan.targets)), "all", "", "", size(plan.bytes_before), size(plan.bytes_after))
    weights = sum(target.weight_count for target in plan.targets)
    table.add_row(
        "", "bits a weight", "", "", *(f"{8 * b / weights:.2f}" for b in (plan.bytes_before, plan.bytes_after))
    )
    rest = plan.uncompressed_bytes
    table.add_row("", "rest", "", plan.recipe.dtype, size(rest), size(rest))
    table.add_row("", "model", "", "", *(size(b + rest) for b in (plan.bytes_before, plan.bytes_after)))
    return table


def stages_table(plan: Plan, seconds: Mapping[str, float]) -> Table:
    """What every stage takes: the peak of memory, and the time where it is known."""
    way = plan.way
    how = f"{way.workers} worker{'s' * (way.workers > 1)}"
    table = Table(title=how + (", hidden states in files" if way.spills else ""))
    table.add_column("stage")
    table.add_column("memory", justify="right")
    table.add_column("time", justify="right")
    for name in dict.fromkeys([*plan.memory, *seconds]):
        peak = plan.memory.get(name)
        told = f"about {duration(seconds[name])}" if name in seconds else ""
        table.add_row(name, "" if peak is None else size(peak), told)
    table.add_section()
    total = f"about {duration(sum(seconds.values()))}" if seconds else ""
    table.add_row("all", size(plan.memory_bytes), total)
    return table


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _plan_title(plan: Plan) -> str:
    """The model, the method and the ratio asked for, and what comes of it where the forms stop short of that."""
    wanted, found = plan.ratio, 1 - plan.bytes_after / plan.bytes_before
    title = f"{escape(plan.recipe.model)}: {plan.recipe.method.name} at ratio {wanted:g}"
    if plan.recipe.ratio is None:
        title += f" for {plan.recipe.amount}"
    return title if found < wanted + _NEAR else f"{title}, reaching {found:.3f}"


def bytes_table(record: RunRecord) -> Table:
    """Where the bytes are."""
    table = Table(title="stored bytes")
    table.add_column("kind")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    for kind, count in sorted(record.bytes_by_kind.items(), key=lambda item: -item[1]):
        table.add_row(kind, f"{count:,}", f"{count / record.model_bytes_after:.1%}")
    table.add_section()
    table.add_row(
        "model",
        f"{record.model_bytes_after:,}",
        f"{record.model_bytes_after / record.model_bytes_before:.1%} of before",
    )
    table.add_row("compressed layers", f"{record.bytes_after:,}", f"{1 - record.ratio:.1%} of before")
    table.add_row("bits a weight", f"{record.bits_per_weight:.3f}", "")
    return table


def error_map(layers: Sequence[LayerRecord], *, before: str = "") -> Table:
    """Every layer's relative output error, decoder layers down, kinds across, the worse the redder.

    `before`: what was done to the values since (`RunRecord.done_since_fit`), which the title then says.
    """
    names = redundancy.names_within(layers)
    kinds = list(dict.fromkeys(names))
    errors = {(layer.layer, name): layer.fit.relative_error for layer, name in zip(layers, names, strict=True)}
    worst = max(errors.values()) or 1.0
    table = Table(title=f"relative error of each layer's output on the calibration text{_since(before)}")
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for index in dict.fromkeys(layer.layer for layer in layers):
        cells = []
        for kind in kinds:
            error = errors.get((index, kind))
            if error is None:
                cells.append(Text(""))
                continue
            red = int(55 + 200 * error / worst)
            cells.append(Text(f"{error:.4f}", style=f"rgb({red},{255 - red // 2},80)"))
        table.add_row("-" if index is None else str(index), *cells)
    return table


def _since(before: str) -> str:
    return f" before {before}" if before else ""


def kinds_table(record: RunRecord) -> Table:
    """The means of each kind of layer: stored bits a weight, and rank, density or atoms where the forms have them.

    Errors are left to `forms_table`, to fit 80 columns.
    """
    found = redundancy.layer_figures(record)
    elsewhere = (redundancy.RANK_SHARE, redundancy.ERROR)
    names = [name for name in redundancy.quantities(found) if name not in elsewhere]
    table = Table(title="means by kind")
    table.add_column("layers", justify="right")
    table.add_column("kind")
    for name in names:
        # Rich, left to break the headers, drops columns of a table that would fit.
        table.add_column(textwrap.fill(name, 9, break_long_words=False, break_on_hyphens=False), justify="right")
    for kind in redundancy.by_kind(found):
        cells = (_number(kind.means.get(name), ".4g") for name in names)
        table.add_row(str(kind.layers), kind.kind, *cells)
    return table


def forms_table(layers: Sequence[LayerRecord], *, before: str = "") -> Table:
    """The forms of each kind of layer, and their mean and worst error; `before` as in `error_map`."""
    table = Table(title=f"forms{', errors' * bool(before)}{_since(before)}")
    narrow = {"layers": 6, "each": 8, "mean error": 6, "worst error": 6}  # leaves the form most of 80 columns
    for column in ("layers", "kind", "shape", "form", "each", "mean error", "worst error"):
        table.add_column(column, justify="left" if column in ("kind", "form") else "right", width=narrow.get(column))
    groups: dict[tuple[str, tuple[int, int], str], list[LayerRecord]] = defaultdict(list)
    for layer in layers:
        groups[layer.kind, layer.shape, form(layer.factors)].append(layer)
    for (kind, shape, said), members in groups.items():
        errors = [member.fit.relative_error for member in members]
        table.add_row(
            str(len(members)),
            kind,
            f"{shape[0]}x{shape[1]}",
            said,
            size(members[0].bytes_after),
            f"{sum(errors) / len(errors):.4f}",
            f"{max(errors):.4f}",
        )
    return table


def evaluation_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Evaluations side by side, as `lexigram eval --json` wrote them; a table for each text and windowing, since only figures
    on the same can be compared.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[_text_and_windows(row)].append(row)
    return [_evaluation_table(title, members) for title, members in groups.items()]


def _evaluation_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=escape(title))
    columns = ("size", "bits a weight", "token perplexity", "word perplexity", "KL", "top-1 agreement", "tokens")
    table.add_column("model")
    for column in columns:
        # Rich, left to break the headers, drops columns of a table that would fit.
        table.add_column(column.replace(" ", "\n"), justify="right")
    for row in rows:
        table.add_row(
            escape(str(row.get("label", ""))),
            size(row["model_bytes"]) if row.get("model_bytes") else "",
            _number(row.get("bits_per_weight"), ".2f"),
            _perplexity(row, "token_perplexity", digits=2),
            _perplexity(row, "word_perplexity", digits=1),
            _number(row.get("kl"), ".4f"),
            _number(row.get("top1_agreement"), ".1%"),
            _number(row.get("tokens"), ",d"),
        )
    return table


def _perplexity(row: Mapping[str, Any], key: str, digits: int) -> str:
    """Empty where it was not measured; JSON has null for one that is infinite."""
    return comparison.perplexity(row[key], digits) if key in row else ""


def comparison_plan_table(plan: ComparisonPlan) -> Table:
    """What a comparison will do: one line a row, with the bits that its recipe comes to where they are known before."""
    table = Table(title="rows to compare")
    for column in ("row", "method", "ratio", "bits a weight", ""):
        table.add_column(column, justify="right" if column in ("ratio", "bits a weight") else "left")
    table.add_row(comparison.DENSE, "", "", "", "there already" if plan.dense else "to evaluate")
    for job in plan.jobs:
        ratio = "" if job.ratio is None else f"{job.ratio:g}"
        table.add_row(escape(job.name), job.recipe.method.name, ratio, _planned_bits(job), _state(job))
    return table


def _planned_bits(job: Job) -> str:
    if job.plan is None or job.plan.allocation is None:
        return ""
    return f"{8 * job.plan.bytes_after / sum(target.weight_count for target in job.plan.targets):.2f}"


def _state(job: Job) -> str:
    if job.error is not None:
        return "cannot be made"
    if job.done is not None:
        return "there already"
    return "to evaluate" if job.kept else "to compress"


def comparison_table(table: comparison.Table) -> Table:
    """The same table for the terminal."""
    drawn = Table(title="comparison")
    for head in table.header:
        longest = max(map(len, head.split()))  # a head is broken between words, not in them
        drawn.add_column(head, justify="left" if head == "recipe" else "right", min_width=longest)
    for cells in table.cells:
        drawn.add_row(*map(escape, cells))
    return drawn


def form(spec: FactorSpec) -> str:
    """A factor expression in one line, in the field's words: `k 306 s 155` (CoSpaDi), `rank 230` (low rank)."""
    shape = f"{spec.rows}x{spec.cols}"
    match spec:
        case SumSpec():
            return f"{form(spec.left)} + {form(spec.right)}"
        case ProductSpec(left=DenseSpec() as left, right=DenseSpec() | SharedSpec() as right):
            beside = " shared" if isinstance(right, SharedSpec) else ""
            return f"rank {left.cols}{_bits(left)}{beside}"
        case ProductSpec(left=SparseSpec() as left, right=DenseSpec() | SharedSpec() as right):
            beside = " shared" if isinstance(right, SharedSpec) else _bits(right).replace(" ", " x ")
            return f"k {left.cols} s {left.nonzeros / left.rows:g}{_blocks(left)}{_bits(left)}{beside}"
        case ProductSpec():
            return f"({form(spec.left)}) ({form(spec.right)})"
        case SparseSpec():
            return f"sparse {shape}, {_kept(spec)}{_bits(spec)}"
        case DenseSpec():
            return f"dense {shape}{_bits(spec)}"
        case SharedSpec():
            return f"shared {shape}"


def _kept(leaf: SparseSpec) -> str:
    """How much of a sparse matrix is stored: whole rows or columns, or values a row."""
    blocks = leaf.places.count
    if leaf.block == (1, 1):
        return f"{leaf.nonzeros / leaf.rows:g} a row"
    if leaf.block == (1, leaf.cols):
        return f"{blocks} of {leaf.rows} rows"
    if leaf.block == (leaf.rows, 1):
        return f"{blocks} of {leaf.cols} columns"
    return f"{leaf.nonzeros / leaf.rows:g} a row{_blocks(leaf)}"


def _blocks(leaf: SparseSpec) -> str:
    """The blocks of a sparse leaf where they are not single entries."""
    return "" if leaf.block == (1, 1) else f" in {leaf.block[0]}x{leaf.block[1]} blocks"


def _bits(leaf: Leaf) -> str:
    """The codec of a leaf where it is not plain bfloat16."""
    said = leaf.codec.describe()
    return "" if said == "bf16" else f" {said}"


def _text_and_windows(row: dict[str, Any]) -> str:
    context, stride = row.get("context"), row.get("stride")
    lead = 1 if row.get("bos") else 0
    overlap = "" if stride is None or stride == (context or 0) - lead else f", stride {stride}"
    said = f"{row.get('text', 'text')}, context {context}{overlap}, {row.get('windows')} windows"
    return f"{said} after BOS" if lead else said


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
