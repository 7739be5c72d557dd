"""The plot of a comparison: token perplexity against stored bits a weight, one line a recipe. Decides and measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lexigram import pictures
from lexigram.comparison.table import DENSE, Figure, Line, Row, figure, lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from matplotlib.transforms import Bbox

_SIZE = (9.0, 5.5)  # inches
_MARKERS = "osD^vPX"
_COLOURS = 10  # in matplotlib's own cycle, which begins again after them
_GREY, _LETTERS = "0.35", 9
_FARTHEST = 1000  # over the least perplexity; what is beyond is broken, and would press the rest into one line
_NARROW = 4  # greatest over least perplexity below which steps of 1, 2, 5 leave too few numbers on the axis
_PLACES = ((7, 4), (7, -11), (-7, 4), (-7, -11), (0, 8), (0, -16), (7, 14), (-7, 14), (7, -21), (-7, -21))
"""Where a label may stand beside its point, in points; what is left of it ends there. The first free one is taken."""


class Point(NamedTuple):
    """What a recipe came to at one ratio."""

    bits: Figure
    perplexity: Figure
    ratio: float | None


def missing() -> str | None:
    """Why a comparison goes without its plot, and the remedy; None where it does not."""
    why = pictures.missing()
    return why and f"the plot is left out: {why}"


def draw(rows: Sequence[Row], title: str, files: Sequence[Path]) -> None:
    """Write the plot into each of `files`, in the format that its suffix names.

    A row without a finite perplexity is left out.

    Raises:
        LexigramError: where a file cannot be written.
    """
    drawing = _drawing(rows, title)
    for file in files:
        pictures.save(drawing, file)


def curves(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """The points of every recipe that has any, by falling bits."""
    found: dict[str, list[Point]] = {}
    for line in lines(row for row in rows if row.recipe != DENSE):
        if point := _point(line):
            found.setdefault(line.recipe, []).append(point)
    return {name: sorted(points, key=lambda point: -point.bits.mean) for name, points in found.items()}


def _point(line: Line) -> Point | None:
    bits = figure(row.bits_per_weight for row in line.measured)
    perplexity = figure(row.token_perplexity for row in line.measured)
    return Point(bits, perplexity, line.ratio) if bits and perplexity else None


def _drawing(rows: Sequence[Row], title: str) -> Drawing:
    from matplotlib.figure import Figure as Drawing

    found = curves(rows)
    dense = next((row.token_perplexity for row in rows if row.recipe == DENSE), None)
    values = [point.perplexity.mean for points in found.values() for point in points]
    values += [] if dense is None else [dense]
    ceiling = _FARTHEST * min(values, default=1.0)

    drawing = Drawing(figsize=_SIZE, layout="constrained")
    axes = drawing.add_subplot()
    axes.set_title(title)
    axes.set_xlabel("stored bits a weight of the compressed layers")
    axes.set_ylabel(f"token perplexity (log scale{', ▲ beyond it' if max(values, default=0.0) > ceiling else ''})")
    axes.set_yscale("log")
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for number, (name, points) in enumerate(found.items()):
        _curve(axes, name, points, ceiling, number)
    if dense is not None:
        _dense_line(axes, dense)
    axes.margins(x=0.12, y=0.1)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    several = any(len(points) > 1 for points in found.values())
    if several:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, title="recipe, at ratio")
    _number_perplexities(axes, [min(value, ceiling) for value in values])
    _label(drawing, axes, found, ceiling, names=not several)
    return drawing


def _curve(axes: Axes, name: str, points: Sequence[Point], ceiling: float, number: int) -> None:
    """The line of one recipe; what lies above `ceiling` is a triangle on it."""
    colour = f"C{number % _COLOURS}"
    spreads = [point.perplexity.spread or 0.0 if point.perplexity.mean <= ceiling else 0.0 for point in points]
    axes.errorbar(
        [point.bits.mean for point in points],
        [min(point.perplexity.mean, ceiling) for point in points],
        yerr=spreads if any(spreads) else None,
        color=colour,
        marker=_MARKERS[number // _COLOURS % len(_MARKERS)],
        markersize=6,
        capsize=3,
        label=name,
    )
    beyond = [point.bits.mean for point in points if point.perplexity.mean > ceiling]
    axes.plot(beyond, [ceiling] * len(beyond), color=colour, marker="^", markersize=11, linestyle="")


def _dense_line(axes: Axes, dense: float) -> None:
    axes.axhline(dense, color=_GREY, linestyle="--", linewidth=1, zorder=1)
    axes.annotate(
        f"dense {dense:.4g}",
        (1, dense),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=_LETTERS,
        color=_GREY,
    )


def _number_perplexities(axes: Axes, values: Sequence[float]) -> None:
    """Plain numbers on the axis, enough of them also where all perplexities are near to each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    narrow = not values or max(values) < _NARROW * min(values)
    axes.yaxis.set_major_locator(MaxNLocator(7) if narrow else LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:,.10g}"))


def _label(drawing: Drawing, axes: Axes, found: dict[str, list[Point]], ceiling: float, *, names: bool) -> None:
    """A word beside every point: its recipe's name, or its ratio where lines have several; none over another.

    Beside a triangle stands its perplexity, too.
    """
    from matplotlib.transforms import Bbox

    drawing.draw_without_rendering()
    drawing.set_layout_engine("none")  # places are known now, and labels must not move them
    places = {
        point: (point.bits.mean, min(point.perplexity.mean, ceiling)) for points in found.values() for point in points
    }
    taken: list[Bbox] = []
    for place in places.values():
        x, y = axes.transData.transform(place)
        taken.append(Bbox.from_bounds(x - 5, y - 5, 10, 10))
    for number, (name, points) in enumerate(found.items()):
        for point in points:
            text = name if names or point.ratio is None else f"{point.ratio:g}"
            text += f" ({point.perplexity.mean:.0e})" if point.perplexity.mean > ceiling else ""
            taken.append(_placed(axes, text, places[point], f"C{number % _COLOURS}", taken))


def _placed(axes: Axes, text: str, point: tuple[float, float], colour: str, taken: Sequence[Bbox]) -> Bbox:
    """Write `text` beside its point, where it stands on nothing that is taken and inside of the axes; where it stands."""
    from matplotlib.patheffects import withStroke

    said = axes.annotate(
        text,
        point,
        xytext=_PLACES[0],
        textcoords="offset points",
        fontsize=_LETTERS,
        color=colour,
        path_effects=[withStroke(linewidth=3, foreground="white")],  # lines pass below
    )
    for place in (*_PLACES, _PLACES[0]):  # where nothing is free the first is as good as any
        said.set_position(place)
        said.set_horizontalalignment("left" if place[0] > 0 else "right" if place[0] < 0 else "center")
        box = said.get_window_extent()
        if _within(box, axes.bbox) and not any(box.overlaps(other) for other in taken):
            break
    return box


def _within(box: Bbox, frame: Bbox) -> bool:
    return bool(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)


def plot_files(folder: Path) -> Iterator[Path]:
    """Where the plot of a comparison lies: to look at, and to print."""
    yield from (folder / "plot.png", folder / "plot.svg")
