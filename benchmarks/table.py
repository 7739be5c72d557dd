"""Results of `quality.py` as one Markdown table: rows down, ratios across, a perplexity for each calibration seed.

python benchmarks/table.py results/quality-variants-*.json
"""

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    """Read, arrange, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    runs = [json.loads(file.read_text()) for file in parser.parse_args().files]
    print(table([row for run in runs for row in run["rows"]]))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; a row that has its own size whatever is asked for stands once, with its bits a weight."""
    ratios = sorted({row["requested_ratio"] for row in rows})
    heads = [f"{ratio:g} ({16 * (1 - ratio):.4g} bits a weight)" for ratio in ratios]
    lines = [["", *heads], ["---"] * (len(ratios) + 1)]
    for name in dict.fromkeys(row["row"] for row in rows):
        mine = [row for row in rows if row["row"] == name]
        if name.startswith(("quantize", "nearest")):
            first = {row["calibration_seed"]: row for row in mine}
            lines.append([f"{name}, {mine[0]['bits_per_weight']:.2f} bits a weight: {_cell(list(first.values()))}"])
            continue
        lines.append([name, *(_cell([row for row in mine if row["requested_ratio"] == ratio]) for ratio in ratios)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    found = sorted(rows, key=lambda row: row["calibration_seed"])
    return " / ".join(f"{row['token_perplexity']:.3g}" for row in found)


if __name__ == "__main__":
    main()
