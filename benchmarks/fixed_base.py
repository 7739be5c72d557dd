"""Whether the dictionary of `double-sparse` should be sparse over a fixed fast base instead of over the inputs themselves.

``W ~ C S B`` with an orthogonal ``B``: the cosine transform, the Walsh-Hadamard transform (of blocks, as long as powers of two
divide the width), and a random rotation for comparison. As ``B`` is orthogonal, these are fits of ``W B^T`` with the Gram ``B G
B^T``. Recorded: the relative error of the outputs and the seconds of a fit, on three matrices of `demo`. In favour of the base,
nothing is charged for its application.

    python benchmarks/fixed_base.py
"""

import argparse
import math

import torch
from recording import write
from solvers import layer_problem
from torch import Tensor

from lexigram import DoubleSparseConfig
from lexigram.gram import Gram
from lexigram.methods.base import Budget, fit, layout

KINDS = ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"]


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.9, 0.99])
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights, grams = layer_problem(options.layer, KINDS)
    rows = []
    for kind in KINDS:
        weight, gram = weights[kind], grams[kind]
        for ratio in options.ratios:
            config = DoubleSparseConfig()
            budget = Budget(round((1 - ratio) * 2 * weight.numel()), "bytes")
            spec = layout(config, tuple(weight.shape), budget)
            found = {}
            for name, base in bases(weight.shape[1]).items():
                turned = Gram(base @ gram.matrix @ base.T, gram.tokens)
                report = fit(config, weight @ base.T.float(), turned, spec, torch.Generator().manual_seed(0))[1]
                found[name] = {"relative_error": report.relative_error, "seconds": report.seconds}
            rows.append({"kind": kind, "ratio": ratio, "bases": found})
            print(kind, ratio, {name: round(each["relative_error"], 5) for name, each in found.items()}, flush=True)
    print(write("fixed-base", {"layer": options.layer, "rows": rows}))


def bases(width: int) -> dict[str, Tensor]:
    """Orthogonal matrices (width, width), float64; the first is none."""
    identity = torch.eye(width, dtype=torch.float64)
    random = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {
        "inputs": identity,
        "cosine": cosine(width),
        "hadamard": hadamard(width),
        "rotation": torch.linalg.qr(random)[0],
    }


def cosine(width: int) -> Tensor:
    """The discrete cosine transform II, orthonormal."""
    steps = torch.arange(width, dtype=torch.float64)
    found = torch.cos(math.pi / width * (steps + 0.5) * steps[:, None]) * math.sqrt(2 / width)
    found[0] /= math.sqrt(2)
    return found


def hadamard(width: int) -> Tensor:
    """Walsh-Hadamard transforms of blocks of the largest power of two that divides the width."""
    block = width & -width
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < block:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)]) / math.sqrt(2)
    return torch.block_diag(*[found] * (width // block))


if __name__ == "__main__":
    main()
