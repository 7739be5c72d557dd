"""What an entry of a weight is worth: three prices against what SparseGPT loses in the end, on matrices of `demo`.

Of every matrix and share of entries that is kept, the squared error of SparseGPT's values over the sum, by each price, of the
entries that would be dropped: Wanda's, where no other entry makes up for one, the brain surgeon's, where all others do, and the
geometric mean of both that `--allocation global` ranks by.

    python benchmarks/entry_prices.py
"""

import argparse

import torch
from recording import write
from solvers import layer_problem
from torch import Tensor

from lexigram.linalg.ranking import input_prices
from lexigram.linalg.rounding import DAMPING
from lexigram.linalg.surgeon import surgeon

KINDS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"]
SHARES = (0.8, 0.5, 0.25, 0.1)
"""Of the entries."""


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 10, 28])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for layer in options.layers:
        weights, grams = layer_problem(layer, KINDS)
        for kind in KINDS:
            weight, gram = weights[kind].double(), grams[kind].matrix
            for share in SHARES:
                ratios = compared(weight, gram, share)
                rows.append({"layer": layer, "kind": kind, "kept": share, "error_over_sum": ratios})
                print(layer, kind, share, {name: round(ratio, 2) for name, ratio in ratios.items()}, flush=True)
    print(write("entry-prices", {"rows": rows}))


def compared(weight: Tensor, gram: Tensor, share: float) -> dict[str, float]:
    """SparseGPT's squared error over the sum by each price."""
    kept = int(share * weight.numel())
    lost = weight - surgeon(weight.float(), gram, kept).values
    error = float(torch.linalg.vecdot(lost, lost @ gram).sum())
    mean, wanda = input_prices(gram), gram.diagonal() + DAMPING * gram.diagonal().mean()
    prices = {"wanda": wanda, "surgeon": mean.square() / wanda, "mean": mean}
    return {name: error / dropped(weight, price, kept) for name, price in prices.items()}


def dropped(weight: Tensor, price: Tensor, kept: int) -> float:
    """What all entries but the best are worth together."""
    return float((weight.square() * price).flatten().sort().values[: weight.numel() - kept].sum())


if __name__ == "__main__":
    main()
