"""Perplexity of `demo` after compression: dense and several ways of compressing, ratios and seeds, at equal stored bytes.

Each row is one `lexigram compress`, one `lexigram export --dense` (so that long texts are read at the speed of a dense model)
and one `lexigram eval`; the exact commands are in the result. Run from anywhere:

    python benchmarks/quality.py --ratios 0.2 0.4 --seeds 0 1 --windows 40
    python benchmarks/quality.py --rows "paper bits" "paper bits, mean groups" "paper bits, exact groups" --ratios 0.3
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from recording import DATA, write

PAPER = ["--rho", "2", "--value-bits", "14", "--dictionary-bits", "16"]
"""The form of the CoSpaDi paper, from `fast`'s solver."""

UNIFORM = ["--method", "lowrank-sparse", "--allocation", "uniform"]
GLOBAL = ["--method", "lowrank-sparse", "--allocation", "global"]

ROWS: dict[str, list[str]] = {
    "svd": ["--method", "svd"],
    "svd, groups": ["--method", "svd", "--group", "2"],
    "svd, int8": ["--method", "svd", "--value-bits", "8"],
    "cospadi": [],
    "paper bits": PAPER,
    "paper bits, one-shot": [*PAPER, "--preset", "one-shot"],
    "paper bits, mean groups": [*PAPER, "--group", "2", "--metric", "mean"],
    "paper bits, exact groups": [*PAPER, "--group", "2"],
    "paper bits, site groups": [*PAPER, "--share", "site"],
    "paper bits, matched pairs": [*PAPER, "--share", "matched"],
    "paper bits, knapsack": [*PAPER, "--allocation", "knapsack"],
    "paper bits, knapsack, relative": [*PAPER, "--allocation", "knapsack", "--measure", "relative"],
    "paper bits, knapsack, absolute": [*PAPER, "--allocation", "knapsack", "--measure", "absolute"],
    "paper bits, sequential": [*PAPER, "--sequential"],
    "paper bits, sequential, whole correction": [*PAPER, "--sequential", "--correction", "1"],
    "paper bits, knapsack, sequential": [*PAPER, "--allocation", "knapsack", "--sequential"],
    "matched pairs, knapsack": [*PAPER, "--share", "matched", "--allocation", "knapsack"],
    "int8 values": [*PAPER, "--value-bits", "8"],
    "int4 values": [*PAPER, "--value-bits", "4"],
    "cospadi, knapsack": ["--allocation", "knapsack"],
    "quantize int8": ["--method", "quantize", "--value-bits", "8"],
    "quantize int4": ["--method", "quantize", "--value-bits", "4"],
    "quantize int3": ["--method", "quantize", "--value-bits", "3"],
    "quantize int2": ["--method", "quantize", "--value-bits", "2"],
    "nearest int4": ["--method", "quantize", "--value-bits", "4", "--rounding", "nearest"],
    "nearest int3": ["--method", "quantize", "--value-bits", "3", "--rounding", "nearest"],
    "magnitude": ["--method", "magnitude"],
    "wanda": ["--method", "wanda"],
    "wanda, refit": ["--method", "wanda", "--refit"],
    "sparsegpt": ["--method", "sparsegpt"],
    "structured": ["--method", "structured"],
    "structured, refit": ["--method", "structured", "--refit"],
    "oats": ["--method", "oats"],
    "double-sparse": ["--method", "double-sparse"],
    "double-sparse, 6 sizes": ["--method", "double-sparse", "--tightening", "6"],
    "double-sparse, quick": ["--method", "double-sparse", "--tightening", "2", "--iterations", "3"],
    "cap": ["--method", "cap"],
    "cap, refit": ["--method", "cap", "--refit"],
    "cap, no policy": ["--method", "cap", "--passes", "0"],
    "cap, no policy, refit": ["--method", "cap", "--passes", "0", "--refit"],
    "cap, random start": ["--method", "cap", "--first", "random"],
    "cap, random start, no policy": ["--method", "cap", "--first", "random", "--passes", "0"],
    "cap, uniform": ["--method", "cap", "--allocation", "uniform"],
    "lowrank-sparse": ["--method", "lowrank-sparse"],
    "lowrank-sparse, uniform": UNIFORM,
    "lowrank-sparse, bfloat16": ["--method", "lowrank-sparse", "--value-bits", "16"],
    "lowrank-sparse, bfloat16, uniform": [*UNIFORM, "--value-bits", "16"],
    "lowrank-sparse, bfloat16, uniform, rank": [*UNIFORM, "--value-bits", "16", "--rank-share", "0.2"],
    "lowrank-sparse, int4": ["--method", "lowrank-sparse", "--value-bits", "4"],
    "lowrank-sparse, int4, uniform": [*UNIFORM, "--value-bits", "4"],
    "lowrank-sparse, int4, one pass": ["--method", "lowrank-sparse", "--value-bits", "4", "--support", "one-pass"],
    "lowrank-sparse, int4, one pass, no sweeps": [
        *["--method", "lowrank-sparse", "--value-bits", "4", "--support", "one-pass", "--sweeps", "0"]
    ],
    "lowrank-sparse, int3, one pass": ["--method", "lowrank-sparse", "--value-bits", "3", "--support", "one-pass"],
    "lowrank-sparse, int3": ["--method", "lowrank-sparse", "--value-bits", "3"],
    "lowrank-sparse, global": GLOBAL,
    "lowrank-sparse, int4, global": [*GLOBAL, "--value-bits", "4"],
    "lowrank-sparse, bfloat16, global": [*GLOBAL, "--value-bits", "16"],
    "lowrank-sparse, int3, refined": ["--method", "lowrank-sparse", "--value-bits", "3", "--refine", "10"],
    "lowrank-sparse, int3, uniform": [*UNIFORM, "--value-bits", "3"],
}
"""What distinguishes the rows; `quantize` has its own bytes whatever the ratio."""

WIKITEXT = DATA / "wikitext-2-raw" / "wiki.test.raw"
CALIBRATION = {"c4": "c4/c4.txt", "wikitext": "wikitext-2-raw/wiki.valid.raw"}


def main() -> None:
    """Run all rows, then print and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["svd", "cospadi"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the calibration")
    parser.add_argument("--calibration", choices=list(CALIBRATION), default="c4")
    parser.add_argument("--sequences", type=int, default=64, help="of 1024 tokens each, for calibration")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--name", default="quality-smollm2-135m")
    parser.add_argument(
        "--work", type=Path, help="keep models and figures there; a row that lies there is not run again"
    )
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        dense = evaluate("demo", work / "dense.json", options.windows, ["--dtype", "bfloat16"])
        rows: list[dict[str, Any]] = []
        for ratio in options.ratios:
            for seed in options.seeds:
                for name in options.rows:
                    text = ["--calibration", str(DATA / CALIBRATION[options.calibration])]
                    text += ["--sequences", str(options.sequences), "--length", "1024"]
                    rows.append(row(work, name, ratio, seed, options.windows, dense, text))
                    print(json.dumps({key: value for key, value in rows[-1].items() if key != "commands"}), flush=True)
    file = write(options.name, {"dense": dense, "rows": rows, "shares": shares(rows)})
    print(json.dumps(shares(rows), indent=1))
    print(file)


def row(
    work: Path, name: str, ratio: float, seed: int, windows: int, dense: dict[str, Any], calibration: list[str]
) -> dict[str, Any]:
    """Compress and evaluate once."""
    out, figures = compressed(work, name, ratio, seed, calibration)
    export = ["export", str(out), "--dense", str(work / "dense" / out.name)]
    if not (work / f"{out.name}.json").exists() and not Path(export[-1]).exists():
        lexigram(export)
    found = evaluate(export[-1], work / f"{out.name}.json", windows, [])
    shutil.rmtree(export[-1], ignore_errors=True)
    return {
        **figures,
        **{key: found[key] for key in ("token_perplexity", "word_perplexity", "standard_error", "tokens")},
        "log_perplexity_above_dense": math.log(found["token_perplexity"] / dense["token_perplexity"]),
        "commands": [*figures["commands"], " ".join(["lexigram", *export]), found["command"]],
    }


def compressed(work: Path, name: str, ratio: float, seed: int, calibration: list[str]) -> tuple[Path, dict[str, Any]]:
    """Where the model of a row lies, and what its run tells; compressed unless it lies there already."""
    out = folder(work, name, ratio, seed)
    arguments = [
        "compress",
        "demo",
        *ROWS[name],
        "--ratio",
        str(ratio),
        "--out",
        str(out),
        "--cache",
        str(work / "cache"),
    ]
    arguments += [*calibration, "--calibration-seed", str(seed)]
    if not out.exists():
        lexigram(arguments)
    run = json.loads((out / "run.json").read_text())
    return out, {
        "row": name,
        "requested_ratio": ratio,
        "calibration_seed": seed,
        **{key: run[key] for key in ("ratio", "bits_per_weight", "bytes_before", "bytes_after", "seconds")},
        "model_bytes_after": run["model_bytes_after"],
        **{key: run[key] for key in ("peak_memory_bytes", "mean_relative_error", "calibration_sha256", "stages")},
        "commands": [" ".join(["lexigram", *arguments])],
    }


def folder(work: Path, name: str, ratio: float, seed: int) -> Path:
    """Where the model of a row lies."""
    return work / f"{name.replace(', ', '-').replace(' ', '_')}-{ratio}-{seed}"


def evaluate(model: str, file: Path, windows: int, more: list[str], text: Path = WIKITEXT) -> dict[str, Any]:
    """A text, by default WikiText-2 test, at context 1024, the first `windows` windows."""
    arguments = [
        "eval",
        model,
        "--text",
        str(text),
        "--context",
        "1024",
        "--windows",
        str(windows),
        "--json",
        str(file),
    ]
    if not file.exists():
        lexigram([*arguments, *more])
    return dict(json.loads(file.read_text()))


def shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each row costs in log-perplexity above dense, as a share of what svd costs at the same ratio and seed."""
    svd = {
        (row["requested_ratio"], row["calibration_seed"]): row["log_perplexity_above_dense"]
        for row in rows
        if row["row"] == "svd"
    }
    return [
        {
            "row": row["row"],
            "ratio": row["requested_ratio"],
            "calibration_seed": row["calibration_seed"],
            "cost_over_svd": row["log_perplexity_above_dense"] / svd[row["requested_ratio"], row["calibration_seed"]],
        }
        for row in rows
        if row["row"] != "svd" and (row["requested_ratio"], row["calibration_seed"]) in svd
    ]


def lexigram(arguments: list[str]) -> None:
    """Run the command as a user would."""
    subprocess.run([sys.executable, "-m", "lexigram", *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
