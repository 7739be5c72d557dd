"""Perplexity of `demo` after compression: dense, svd and cospadi at several ratios and seeds, at equal stored bytes.

Each row is one `lexigram compress` and one `lexigram eval`; the exact commands are in the result. Run from anywhere:

    python benchmarks/quality.py --ratios 0.2 0.4 --seeds 0 1 --windows 40
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from recording import DATA, write


def main() -> None:
    """Run all rows, then print and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--methods", nargs="+", default=["svd", "cospadi"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the calibration")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--name", default="quality-smollm2-135m")
    parser.add_argument("--work", type=Path, help="keep models and figures there; a row that lies there is not run again")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        dense = evaluate("demo", work / "dense.json", options.windows, ["--dtype", "bfloat16"])
        rows: list[dict[str, Any]] = []
        for ratio in options.ratios:
            for seed in options.seeds:
                for method in options.methods:
                    rows.append(row(work, method, ratio, seed, options.windows, dense))
                    print(json.dumps({key: value for key, value in rows[-1].items() if key != "commands"}), flush=True)
    file = write(options.name, {"dense": dense, "rows": rows, "shares": shares(rows)})
    print(json.dumps(shares(rows), indent=1))
    print(file)


def row(work: Path, method: str, ratio: float, seed: int, windows: int, dense: dict[str, Any]) -> dict[str, Any]:
    """Compress and evaluate once."""
    out = work / f"{method}-{ratio}-{seed}"
    arguments = ["compress", "demo", "--method", method, "--ratio", str(ratio), "--out", str(out)]
    arguments += ["--calibration", str(DATA / "c4" / "c4.txt"), "--sequences", "64", "--length", "1024"]
    arguments += ["--calibration-seed", str(seed)]
    if not out.exists():
        lexigram(arguments)
    run = json.loads((out / "run.json").read_text())
    figures = evaluate(str(out), work / f"{out.name}.json", windows, [])
    return {
        "method": method,
        "requested_ratio": ratio,
        "calibration_seed": seed,
        **{key: run[key] for key in ("ratio", "bytes_before", "bytes_after", "model_bytes_after", "seconds")},
        **{key: run[key] for key in ("peak_memory_bytes", "mean_relative_error", "calibration_sha256", "stages")},
        **{key: figures[key] for key in ("token_perplexity", "word_perplexity", "standard_error", "tokens")},
        "log_perplexity_above_dense": math.log(figures["token_perplexity"] / dense["token_perplexity"]),
        "commands": [" ".join(["lexigram", *arguments]), figures["command"]],
    }


def evaluate(model: str, file: Path, windows: int, more: list[str]) -> dict[str, Any]:
    """WikiText-2 test at context 1024, the first `windows` windows."""
    text = str(DATA / "wikitext-2-raw" / "wiki.test.raw")
    arguments = ["eval", model, "--text", text, "--context", "1024", "--windows", str(windows), "--json", str(file)]
    if not file.exists():
        lexigram([*arguments, *more])
    return dict(json.loads(file.read_text()))


def shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each row costs in log-perplexity above dense, as a share of what svd costs at the same ratio and seed."""
    svd = {
        (row["requested_ratio"], row["calibration_seed"]): row["log_perplexity_above_dense"]
        for row in rows
        if row["method"] == "svd"
    }
    return [
        {
            "method": row["method"],
            "ratio": row["requested_ratio"],
            "calibration_seed": row["calibration_seed"],
            "cost_over_svd": row["log_perplexity_above_dense"] / svd[row["requested_ratio"], row["calibration_seed"]],
        }
        for row in rows
        if row["method"] != "svd" and (row["requested_ratio"], row["calibration_seed"]) in svd
    ]


def lexigram(arguments: list[str]) -> None:
    """Run the command as a user would."""
    subprocess.run([sys.executable, "-m", "lexigram", *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
