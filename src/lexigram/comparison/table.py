"""What a comparison found: its rows, the lines that they make, and the table as text. Rows in, text out.

A row is one model and its figures, or the error that stood in its way; a line is what one recipe at one ratio came to over all
calibration seeds. Not here: how rows are made (`order`), the plot (`plot`), the terminal (`reporting`).
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

DENSE = "dense"
"""The row of the model as it was."""

HEALED = ", healed"
"""Behind the name of a recipe: its models once their stored values are trained."""


class Row(BaseModel):
    """One model and its figures; with an `error`, neither. What `lexigram eval --json` writes has the same keys here.

    `seconds_fitting` is what the method took for itself, and the healing: neither the calibration, which all rows share, nor
    loading and saving.
    `run` is an excerpt of `run.json`, `made_from` all that decides the figures: rows of other origin cannot be compared.
    """

    model_config = ConfigDict(frozen=True)

    label: str
    recipe: str
    """The name of the recipe, without ratio and seed."""
    requested_ratio: float | None = None
    calibration_seed: int | None = None
    error: str | None = None

    model: str = ""
    reference: str | None = None
    text: str = ""
    dtype: str = ""
    device: str = ""
    context: int | None = None
    stride: int | None = None
    windows: int | None = None
    tokens: int | None = None
    words: int | None = None
    token_perplexity: float | None = None
    """None where it is beyond a float."""
    word_perplexity: float | None = None
    bits_per_byte: float | None = None
    negative_log_likelihood: float | None = None
    standard_error: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    seconds: float | None = None
    """Of the evaluation."""

    model_bytes: int | None = None
    bits_per_weight: float | None = None
    bytes_before: int | None = None
    """Of the compressed layers, in bfloat16."""
    bytes_after: int | None = None
    mean_relative_error: float | None = None
    """Of the fits; None of a healed model, whose layers are not measured one by one."""
    seconds_fitting: float | None = None
    run: dict[str, Any] = {}
    made_from: dict[str, Any] = {}
    versions: dict[str, str] = {}
    command: str = ""


class Line(NamedTuple):
    """The rows of one recipe at one ratio, one a calibration seed."""

    recipe: str
    ratio: float | None
    rows: tuple[Row, ...]

    @property
    def measured(self) -> list[Row]:
        """Those that have figures."""
        return [row for row in self.rows if row.error is None]


class Figure(NamedTuple):
    """A mean over calibration seeds; `spread` is half of the way from the least to the greatest, None of a single one."""

    mean: float
    spread: float | None


class Table(NamedTuple):
    """Cells as they are shown, and what is to be said below them."""

    header: list[str]
    cells: list[list[str]]
    notes: list[str]


def lines(rows: Iterable[Row]) -> list[Line]:
    """Rows by recipe and ratio, in the order of their first ones."""
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        found.setdefault((row.recipe, row.requested_ratio), []).append(row)
    return [Line(recipe, ratio, tuple(members)) for (recipe, ratio), members in found.items()]


def figure(values: Iterable[float | None]) -> Figure | None:
    """What is there of `values` as one; None where one of them is missing or there are none."""
    known = list(values)
    present = [value for value in known if value is not None]
    if not present or len(present) < len(known):
        return None
    spread = (max(present) - min(present)) / 2 if len(present) > 1 else None
    return Figure(sum(present) / len(present), spread)


def perplexity(value: float | None, digits: int = 2) -> str:
    """For people, below 1000 with so many digits after the point; None is what lies beyond a float."""
    if value is None:
        return "inf"
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:.{digits}f}" if value < 1000 else f"{value:,.0f}"


def _fixed(form: str, unit: float = 1) -> Callable[[float], str]:
    return lambda value: format(value / unit, form)


_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "bits_per_weight": ("bits a weight", _fixed(".2f")),
    "bytes_after": ("layers, MB", _fixed(",.2f", 1e6)),
    "model_bytes": ("model, MB", _fixed(",.2f", 1e6)),
    "token_perplexity": ("token perplexity", perplexity),
    "kl": ("KL", _fixed(".4f")),
    "top1_agreement": ("top-1 agreement", _fixed(".1%")),
    "mean_relative_error": ("output error", _fixed(".4f")),
    "seconds_fitting": ("fitting, s", _fixed(",.1f")),
}
"""Which figures the table shows, under which heads, and how they are written."""

_NOT_BRIEF = ("bytes_after", "mean_relative_error", "seconds_fitting")


def table(rows: Sequence[Row], *, brief: bool = False) -> Table:
    """One line a recipe and ratio, and a note for each row that failed or has no finite perplexity.

    Args:
        rows: dense first.
        brief: leave columns out, for 80 characters.
    """
    columns = {key: column for key, column in _COLUMNS.items() if not (brief and key in _NOT_BRIEF)}
    header = ["recipe", "ratio", *(head for head, _ in columns.values())]
    cells, notes = [], []
    for line in lines(rows):
        ratio = "" if line.ratio is None else f"{line.ratio:g}"
        # What some seeds came to stands beside a note on the others.
        shown = {key: _cell(line.measured, key, written) for key, (_, written) in columns.items()}
        if not line.measured:
            shown["token_perplexity"] = "failed"
        cells.append([line.recipe, ratio, *shown.values()])
        notes += [f"{row.label} failed: {row.error}" for row in line.rows if row.error is not None]
        notes += [f"{row.label}: the perplexity is beyond a float" for row in line.measured if _infinite(row)]
    return Table(header, cells, notes)


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The lines of the table as numbers: `{key: {mean, spread}}` for every column."""
    return [
        {
            "recipe": line.recipe,
            "requested_ratio": line.ratio,
            "calibration_seeds": [row.calibration_seed for row in line.measured if row.calibration_seed is not None],
            **{key: found._asdict() if (found := _figure(line.measured, key)) else None for key in _COLUMNS},
            "failed": len(line.rows) - len(line.measured),
        }
        for line in lines(rows)
    ]


def setting(rows: Sequence[Row]) -> str:
    """On what the figures were measured, and what their heads mean; empty where nothing was."""
    measured = [row for row in rows if row.error is None]
    if not measured:
        return ""
    dense, compressed = measured[0], [row for row in measured if row.run]
    read = f"context {dense.context}, {dense.windows} windows{' after BOS' * bool(dense.made_from.get('bos'))}"
    said = [f"Evaluated on {dense.text}, {read}, {dense.tokens:,} scored tokens."]
    seeds = sorted({row.calibration_seed for row in compressed if row.calibration_seed is not None})
    if compressed:
        said.append(f"All recipes are calibrated on {_calibration(compressed[0])}, {_counted('seed', seeds)}.")
    if healed := [row.made_from["healing"] for row in compressed if "healing" in row.made_from]:
        said.append(f"Healed rows are the same forms in the same bytes, their values trained {_training(healed[0])}.")
    said.append(
        "`ratio` is the share of the layers' bytes that was asked to be removed; sizes are stored bytes; KL (nats) and top-1 "
        "agreement are against dense; the output error is the layers' mean, relative, on the calibration text; fitting is the "
        "method's own time."
    )
    if len(seeds) > 1:
        said.append("Figures are means over the seeds, ± half of the way from the least to the greatest.")
    return " ".join(said)


def _calibration(row: Row) -> str:
    calibration = row.made_from["recipe"]["calibration"]
    sequences = calibration["sequences"]
    names = ", ".join(PurePath(name).name for name in calibration["text"])
    return f"{sequences} x {row.run['calibration_tokens'] // sequences} tokens of {names}"


def _training(settings: dict[str, Any]) -> str:
    names = ", ".join(PurePath(name).name for name in settings["texts"])
    ends = [f"{settings[unit]:g} {unit}" for unit in ("steps", "minutes") if settings[unit] is not None]
    told = f", {' or '.join(ends)} at most" if ends else ""
    steps = f"{settings['batch']} sequences a step, rate {settings['rate']:g}"
    weight = settings.get("layer_weight", 0)
    added = f" + {weight:g} x `layers`" if weight else ""
    return f"on {names} by the objective `{settings['objective']}`{added}{told}, {steps}"


def _counted(name: str, values: Sequence[int]) -> str:
    return f"{name}{'s' if len(values) > 1 else ''} {', '.join(map(str, values))}"


def markdown(rows: Sequence[Row], *, title: str, plot: str | None, command: str) -> str:
    """The table as a Markdown file.

    Args:
        rows: dense first.
        title: of the file.
        plot: the file of the plot, beside this one; None where there is none.
        command: that made the table.
    """
    header, cells, notes = table(rows)
    rules = ["---" if name == "recipe" else "---:" for name in header]
    parts = [
        f"# {title}",
        setting(rows),
        "\n".join(_markdown_row(line) for line in (header, rules, *cells)),
        "\n".join(f"- {' '.join(note.split())}" for note in notes),
        f"![token perplexity against stored bits a weight]({plot})" if plot else "",
        f"    {command}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def difference(old: Any, new: Any, path: str = "") -> tuple[str, str, str] | None:
    """The first key in which two pieces of plain data differ, with both values in short; None where they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*new, *old)):
            found = difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    return None if old == new else (path, _short(old), _short(new))


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cell(rows: Sequence[Row], key: str, written: Callable[[float], str]) -> str:
    found = _figure(rows, key)
    if found is None:
        return "inf" if key == "token_perplexity" and any(map(_infinite, rows)) else ""
    spread = written(found.spread or 0.0)
    return written(found.mean) if spread == written(0.0) else f"{written(found.mean)} ± {spread}"


def _figure(rows: Sequence[Row], key: str) -> Figure | None:
    return figure(getattr(row, key) for row in rows)


def _infinite(row: Row) -> bool:
    return row.error is None and row.token_perplexity is None


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."
