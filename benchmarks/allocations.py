"""How the bytes of `lowrank-sparse` are spent over the layers of a model of 260 thousand weights, way by way.

Uniform; the knapsack on measured sketches, as it is and refined by the loss of sketched models; one ranking of singular values
and entries. Recorded, of each calibration seed and as means: perplexity on text held out, the layers' mean relative error, and
the seconds that the choice took.

    python benchmarks/allocations.py
    python benchmarks/allocations.py --ways knapsack "knapsack, 20 steps" --ratios 0.8
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from recording import write
from stories import MODEL, compressed, means, perplexity, texts

from lexigram import LowRankSparseConfig

WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"allocation": "uniform"},
    "knapsack": {"allocation": "knapsack"},
    "knapsack, 20 steps": {"allocation": "knapsack", "refine": 20},
    "knapsack, 60 steps": {"allocation": "knapsack", "refine": 60},
    "global": {"allocation": "global"},
}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--value-bits", type=int, help="of all values; by default chosen too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    method, (text, held_out) = LowRankSparseConfig(value_bits=options.value_bits), texts()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "text.txt").write_text(text, encoding="utf-8")
        dense = perplexity(MODEL, held_out)
        for ratio in options.ratios:
            for name in options.ways:
                runs = []
                for seed in options.seeds:
                    record, figures = compressed(work, seed, held_out, method=method, ratio=ratio, **WAYS[name])
                    choice = record.stages.get("allocate")
                    runs.append({**figures, "seconds_of_the_choice": choice.seconds if choice else 0.0})
                rows.append({"way": name, "settings": WAYS[name], "ratio": ratio, "mean": means(runs), "runs": runs})
                print(ratio, name, {key: float(f"{value:.4g}") for key, value in means(runs).items()}, flush=True)
    figures = {"dense": dense, "value_bits": options.value_bits, "seeds": options.seeds, "rows": rows}
    print(write("allocations" + (f"-int{options.value_bits}" if options.value_bits else ""), figures))


if __name__ == "__main__":
    main()
