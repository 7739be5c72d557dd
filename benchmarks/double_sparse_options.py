"""What each option of `double-sparse` does: its other values against the defaults, one at a time, on two matrices of `demo`.

Recorded at equal stored bytes: the relative error of the outputs, the seconds of a fit, and how much of the budget is used.

    python benchmarks/double_sparse_options.py
    python benchmarks/double_sparse_options.py --only default l1 --ratios 0.7
"""

import argparse
from typing import Any
from unittest.mock import patch

import torch
from recording import write
from solvers import layer_problem

from lexigram import DoubleSparseConfig
from lexigram.linalg import palm
from lexigram.methods.base import Budget, fit, layout

KINDS = ["self_attn.q_proj", "mlp.gate_proj"]

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "l1": {"penalty": "l1"},
    "l1, no refit": {"penalty": "l1"},
    "l1, 20 iterations": {"penalty": "l1", "iterations": 20},
    "l0, price .001": {"code_penalty": 0.001, "dictionary_penalty": 0.001},
    "l0, price .01": {"code_penalty": 0.01, "dictionary_penalty": 0.01},
    "inertia": {"inertia": True},
    "no sizes on the way": {"tightening": 0},
    "2 sizes": {"tightening": 2},
    "6 sizes": {"tightening": 6},
    "32 sizes": {"tightening": 32},
    "3 iterations": {"iterations": 3},
    "20 iterations": {"iterations": 20},
    "1 refit": {"refits": 1},
    "12 refits": {"refits": 12},
    "density .2": {"density": 0.2},
    "density .3": {"density": 0.3},
    "density .5": {"density": 0.5},
    "density .6": {"density": 0.6},
    "density .8": {"density": 0.8},
    "density 1": {"density": 1.0},
    "no damping": {"damping": 0.0},
    "damping .01": {"damping": 0.01},
}
"""Fields of `DoubleSparseConfig` that are not as they are by default."""

PARTS: dict[str, dict[str, Any]] = {
    "no long first step": {"_STEPS": palm._STEPS[1:]},
    "steps of the proven length alone": {"_STEPS": (1.0,)},
    "no refit": {"refit": lambda _signals, _factor, pair, *_supports, **_options: pair},
    "l1, no refit": {"refit": lambda _signals, _factor, pair, *_supports, **_options: pair},
}
"""Parts of the solver that have no option, as they are to be instead: what each is good for."""


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.9])
    names = list(dict.fromkeys([*VARIANTS, *PARTS]))
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights, grams = layer_problem(options.layer, KINDS)
    rows = []
    for ratio in options.ratios:
        for name in options.only:
            fields, parts = VARIANTS.get(name, {}), PARTS.get(name, {})
            row: dict[str, Any] = {"row": name, "fields": fields, "parts": list(parts), "ratio": ratio, "fits": {}}
            for kind in KINDS:
                weight, gram = weights[kind], grams[kind]
                config, budget = DoubleSparseConfig(**fields), Budget(round((1 - ratio) * 2 * weight.numel()))
                spec = layout(config, (weight.shape[0], weight.shape[1]), budget)
                with patch.dict(vars(palm), parts):
                    factor, report = fit(config, weight, gram, spec, torch.Generator().manual_seed(0))
                row["fits"][kind] = {
                    "relative_error": report.relative_error,
                    "seconds": report.seconds,
                    "share_of_budget": factor.spec.bytes / budget.amount,
                    **report.details,
                }
            rows.append(row)
            shown = [f"{each['relative_error']:.4f} {each['seconds']:.1f}s" for each in row["fits"].values()]
            print(ratio, name, *shown, flush=True)
    print(write("double-sparse-options", {"layer": options.layer, "rows": rows}))


if __name__ == "__main__":
    main()
