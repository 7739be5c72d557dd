"""The picture of a compressed model: rank, density, bits and errors, kinds of layer down and decoder layers across.

Decides and measures nothing: what is drawn comes from `redundancy`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lexigram.pictures import check_picture, save
from lexigram.records import RunRecord, read_run
from lexigram.reporting.redundancy import (
    ATOMS,
    DENSITY,
    ERROR,
    NONZEROS,
    RANK,
    RANK_SHARE,
    HeatMap,
    LayerFigures,
    constants,
    heat_maps,
    layer_figures,
    outside,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNITS = {
    RANK_SHARE: "share",
    DENSITY: "share",
    ATOMS: "atoms",
    NONZEROS: "non-zeros",
    ERROR: "relative error",
}
"""What stands beside the colour bar; of all other quantities, bits."""
_COLOURS = "viridis"  # rises evenly in lightness, for whatever colours are seen, and has no grey
_SPREAD = 0.1  # of the greatest value: a map with less does not use all colours, or rounding would look like structure
_CELL = (0.2, 0.2)  # inches
_FRAME = (2.1, 0.75)  # inches beside and above a map: names, numbers, colour bar
_LEAST, _MOST = (3.2, 1.0), (16.0, 12.0)  # inches of a map
_BESIDE = 40  # decoder layers up to which two maps stand side by side
_LETTERS = 8  # points
_LETTERS_AN_INCH = 13  # at most, of the title
_NAMES_AN_INCH = 7  # at most, one below the other


def plot_redundancy(folder: str | Path, file: str | Path) -> None:
    """Draw the redundancy that was found in a compressed model, by kind and decoder layer.

    One heat map each, kinds down and decoder layers across, of stored bits a weight, rank over min(out, in), density of the
    sparse part, atoms k and non-zeros s of dictionaries, bits of their values and relative error of the output: those that the
    forms have (`redundancy.layer_figures` tells how each is counted). What is the same in all layers is told above
    them instead, and layers outside of the decoder layers below. All of it stands in `folder/run.json`; no weight is read.

    Args:
        folder: what `compress` wrote.
        file: to write or replace, a .png, .svg or .pdf.

    Raises:
        LexigramError: where the folder is no result of `compress`, the file cannot be written, or matplotlib is not installed.
    """
    check_picture(Path(file))
    draw(read_run(Path(folder)), Path(file))


def draw(record: RunRecord, file: Path) -> None:
    """See `plot_redundancy`; `file` is checked already.

    Raises:
        LexigramError: where the file cannot be written.
    """
    save(_drawing(record), file)


def _drawing(record: RunRecord) -> Figure:
    from matplotlib.figure import Figure

    found = layer_figures(record)
    maps = heat_maps(found)
    across = 2 if len(maps) > 1 and len(maps[0].layers) <= _BESIDE else 1
    down = math.ceil(len(maps) / across)
    cells = (len(maps[0].layers), len(maps[0].kinds)) if maps else (0, 0)
    wide, high = (
        frame + min(max(cell * count, least), most)
        for frame, cell, count, least, most in zip(_FRAME, _CELL, cells, _LEAST, _MOST, strict=True)
    )
    title, notes = (
        _folded(lines, int(across * wide * _LETTERS_AN_INCH))
        for lines in (_title(record, constants(found)), _notes(record, found, maps))
    )
    lines = title.count("\n") + notes.count("\n") + 2
    drawing = Figure(figsize=(across * wide, down * high + lines * 0.16), layout="constrained")
    drawing.suptitle(title, fontsize=_LETTERS + 2, parse_math=False)
    drawing.supxlabel(notes, x=0.01, ha="left", fontsize=_LETTERS, color="0.3", parse_math=False)
    for place, one in enumerate(maps):
        axes = drawing.add_subplot(down, across, place + 1)
        _draw_map(axes, one, lowest=place // across == down - 1)
    return drawing


def _draw_map(axes: Axes, one: HeatMap, *, lowest: bool) -> None:
    """`lowest`: in the last row of maps, which tells what stands across."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    least, most = float(np.nanmin(one.values)), float(np.nanmax(one.values))
    whole = bool((one.values[~np.isnan(one.values)] % 1 == 0).all())
    mesh = axes.pcolormesh(
        np.arange(len(one.layers) + 1) + one.layers[0] - 0.5,
        np.arange(len(one.kinds) + 1) - 0.5,
        np.ma.masked_invalid(one.values),
        cmap=_COLOURS,
        vmin=min(least, (1 - _SPREAD) * most),
        vmax=most or 1.0,
        edgecolors="white",
        linewidth=0.4,
    )
    axes.patch.set(facecolor="0.92", hatch="/////", edgecolor="0.7")
    axes.set_title(one.quantity, fontsize=_LETTERS + 1, loc="left")
    axes.invert_yaxis()
    step = math.ceil(len(one.kinds) / (_MOST[1] * _NAMES_AN_INCH))
    axes.set_yticks(range(0, len(one.kinds), step), one.kinds[::step], fontsize=_LETTERS, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(min(len(one.layers), 15), steps=[1, 2, 5, 10], integer=True))
    axes.tick_params(length=2, labelsize=_LETTERS)
    axes.spines[:].set_visible(False)
    if lowest:
        axes.set_xlabel("decoder layer", fontsize=_LETTERS)
    bar = axes.figure.colorbar(
        mesh, ax=axes, pad=0.015, aspect=14, ticks=MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole)
    )
    bar.ax.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    bar.ax.tick_params(length=2, labelsize=_LETTERS)
    bar.outline.set_visible(False)
    bar.set_label(_UNITS.get(one.quantity, "bits"), fontsize=_LETTERS)


def _title(record: RunRecord, same: Mapping[str, float]) -> list[str]:
    method = record.recipe.get("method", {}).get("name", "compressed")
    first = f"{record.model}: {method} at ratio {record.ratio:.3g}, {record.bits_per_weight:.3g} bits a weight"
    return [first, *([f"everywhere the same: {_said(same)}"] if same else [])]


def _notes(record: RunRecord, found: Iterable[LayerFigures], maps: Iterable[HeatMap]) -> list[str]:
    notes = [f"outside of the decoder layers, {each.kind}: {_said(each.figures)}" for each in outside(found)]
    if record.done_since_fit:
        notes.append(f"errors are those before {record.done_since_fit}")
    if any(np.isnan(one.values).any() for one in maps):
        notes.append("hatched: not compressed, or without such a part")
    if record.shared:
        notes.append(
            f"the bytes of {len(record.shared)} shared matrices are split over their members in proportion to their weights"
        )
    return notes


def _said(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != RANK)


def _folded(lines: Iterable[str], width: int) -> str:
    return "\n".join(part for line in lines for part in textwrap.wrap(line, width))
