"""What each option of `cap` does: its other values against the defaults, one at a time, on a model of 260 thousand weights.

Lengths of the calibration's sequences are compared at the same number of tokens, of which a step sees as many.

The first nine tenths of TinyStories calibrate, the last is what the perplexity is taken on. Recorded, of each calibration
seed and as means: perplexity, the layers' mean relative error, and how robust PCA ended.

    python benchmarks/cap_options.py
    python benchmarks/cap_options.py --only "published penalty" "4 samples" --seeds 0
"""

import argparse
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from recording import write
from stories import CONTEXT, MODEL, compressed, means, perplexity, texts

from lexigram import CapConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "published penalty": {"mu": "candes", "growth": 1, "relaxation": 1},
    "published penalty, growing": {"mu": "candes"},
    "fixed penalty": {"growth": 1},
    "fast growth": {"growth": 1.1, "rise": 1e6},
    "no relaxation": {"relaxation": 1},
    "tolerance 1e-2": {"tolerance": 1e-2},
    "tolerance 1e-3": {"tolerance": 1e-3},
    "tolerance 1e-5": {"tolerance": 1e-5},
    "lambda .05": {"sparse_weight": 0.05},
    "lambda .2": {"sparse_weight": 0.2},
    "score magnitude": {"score": "magnitude"},
    "score energy": {"score": "energy"},
    "first uniform": {"first": "uniform"},
    "first random": {"first": "random"},
    "first largest": {"first": "largest"},
    "levelled together": {"together": True, "per_bit": False},
    "not per bit": {"per_bit": False},
    "no passes": {"passes": 0},
    "1 pass": {"passes": 1},
    "10 passes": {"passes": 10},
    "batch 4": {"batch": 4},
    "batch 64": {"batch": 64},
    "4 samples": {"samples": 4},
    "kl": {"objective": "kl"},
    "kl, 4 samples": {"objective": "kl", "samples": 4},
    "kl, eps .1": {"objective": "kl", "eps": 0.1},
    "kl, 10 passes": {"objective": "kl", "passes": 10},
    "rate .005": {"rate": 0.005},
    "rate .2": {"rate": 0.2},
    "memory 0": {"memory": 0.0},
    "memory .95": {"memory": 0.95},
    "eps .1": {"eps": 0.1},
    "eps 1e-8": {"eps": 1e-8},
    "euclidean": {"projection": "euclidean"},
    "refit": {"refit": True},
    "sequences of 256": {"batch": 32},
    "sequences of 128": {"batch": 64},
    "sequences of 64": {"batch": 128},
    "sequences of 256, no passes": {"passes": 0},
    "sequences of 128, no passes": {"passes": 0},
    "sequences of 64, no passes": {"passes": 0},
}
"""Fields of `CapConfig` that are not as they are by default; the name may say how long sequences are."""


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    text, held_out = texts()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "text.txt").write_text(text, encoding="utf-8")
        dense = perplexity(MODEL, held_out)
        print("dense", round(dense, 3), flush=True)
        for ratio in options.ratios:
            for name in options.only:
                runs = [run(work, name, ratio, seed, held_out) for seed in options.seeds]
                mean = means(runs)
                fields = {"fields": VARIANTS[name], "length": length_of(name)}
                rows.append({"row": name, **fields, "ratio": ratio, "mean": mean, "runs": runs})
                print(ratio, name, {key: float(f"{value:.4g}") for key, value in mean.items()}, flush=True)
    print(write("cap-options", {"dense": dense, "seeds": options.seeds, "rows": rows}))


def run(work: Path, name: str, ratio: float, seed: int, held_out: str) -> dict[str, float]:
    """Figures of one compression."""
    method = CapConfig(**VARIANTS[name])
    record, figures = compressed(work, seed, held_out, length=length_of(name), method=method, ratio=ratio)
    return {
        **figures,
        "robust_pca_iterations": statistics.fmean(each.fit.details["robust_pca_iterations"] for each in record.layers),
        "robust_pca_converged": statistics.fmean(each.fit.status == "converged" for each in record.layers),
    }


def length_of(name: str) -> int:
    """Tokens of a sequence in a variant."""
    found = re.match(r"sequences of (\d+)", name)
    return int(found[1]) if found else CONTEXT


if __name__ == "__main__":
    main()
