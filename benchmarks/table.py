"""Results of `quality.py` or `healing.py` as one Markdown table: rows down, ratios across, perplexities.

One for each calibration seed; of healed models, before and after.

python benchmarks/table.py results/quality-variants-*.json
python benchmarks/table.py results/healing-*.json --text tinystories
python benchmarks/table.py results/quality-*.json --rows wanda oats cospadi --plot results/quality.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

from lexigram.comparison import plot
from lexigram.comparison.table import DENSE, Row


def main() -> None:
    """Read, arrange, print; and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rows", nargs="+", help="only these, in this order")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="perplexity against stored bits a weight, as a picture"
    )
    parser.add_argument("--text", default="wikitext", help="that healed models were evaluated on")
    options = parser.parse_args()
    runs = [json.loads(file.read_text()) for file in options.files]
    measured = {
        (row["row"], row["requested_ratio"], row["calibration_seed"]): row for run in runs for row in run["rows"]
    }
    rows = list(measured.values())  # what was measured twice stands once
    if options.rows:
        rows = [row for name in options.rows for row in rows if row["row"] == name]
    print(table([row for row in rows if options.text in row.get("perplexity", [options.text])], options.text))
    if options.plot:
        dense = Row(label=DENSE, recipe=DENSE, token_perplexity=runs[0]["dense"]["token_perplexity"])
        plot.draw([dense, *map(_point, rows)], "SmolLM2-135M-Instruct, WikiText-2 test", [options.plot])


def table(rows: list[dict[str, Any]], text: str) -> str:
    """Markdown; a row that has its own size whatever is asked for stands once, with its bits a weight."""
    ratios = sorted({row["requested_ratio"] for row in rows})
    heads = [f"{ratio:g} ({16 * (1 - ratio):.4g} bits a weight)" for ratio in ratios]
    lines = [["", *heads], ["---"] * (len(ratios) + 1)]
    for name in dict.fromkeys(row["row"] for row in rows):
        mine = [row for row in rows if row["row"] == name]
        if name.startswith(("quantize", "nearest")):
            first = {row["calibration_seed"]: row for row in mine}
            lines.append(
                [f"{name}, {mine[0]['bits_per_weight']:.2f} bits a weight: {_cell(list(first.values()), text)}"]
            )
            continue
        columns = ([row for row in mine if row["requested_ratio"] == ratio] for ratio in ratios)
        lines.append([name, *(_cell(column, text) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _point(row: dict[str, Any]) -> Row:
    """One line for all bits of `quantize`, which has its own size whatever is asked for."""
    name = row["row"]
    recipe, ratio = (name, row["requested_ratio"])
    if name.startswith("quantize"):
        recipe, ratio = "quantize", round(row["ratio"], 2)
    return Row(
        label=name,
        recipe=f"cospadi, {recipe}" if recipe.startswith("paper bits") else recipe,
        requested_ratio=ratio,
        calibration_seed=row["calibration_seed"],
        bits_per_weight=row["bits_per_weight"],
        token_perplexity=row["token_perplexity"],
    )


def _cell(rows: list[dict[str, Any]], text: str) -> str:
    found = sorted(rows, key=lambda row: row["calibration_seed"])
    figures = (row["perplexity"][text] if "perplexity" in row else [row["token_perplexity"]] for row in found)
    return " / ".join(" -> ".join(f"{figure:.3g}" for figure in each) for each in figures)


if __name__ == "__main__":
    main()
