"""Support and few-bit values in one pass, against a support first and its values afterwards, on three matrices of `demo`.

The ways of `lowrank-sparse --support`: SparseGPT's support inside GPTQ's pass, SparseGPT's support before the values are
rounded, and the search for a support. Recorded: the relative squared error of the outputs as they come out of the first and
once they are stored, without and with the sweeps over values and scales; with the seconds that it took.

    python benchmarks/one_pass.py
"""

import argparse
import time
from collections.abc import Callable

import torch
from recording import write
from solvers import layer_problem
from torch import Tensor

from lexigram.factors import SparseSpec
from lexigram.linalg.pruning import prune
from lexigram.linalg.rounding import DAMPING
from lexigram.linalg.surgeon import Pruned, settling_order, surgeon
from lexigram.methods.lowrank_sparse import SWEEPS
from lexigram.methods.storing import ValueBits, codec, prune_rounding, store_pruned

KINDS = ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"]
FORMS: tuple[tuple[ValueBits, float], ...] = ((4, 0.6), (4, 0.4), (3, 0.55))
"""Bits of a value, and the share of the entries that is kept."""
GROUP = 128
"""Kept values that share a scale."""


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights, grams = layer_problem(options.layer, KINDS)
    rows = []
    for kind in KINDS:
        weight, gram = weights[kind].float().contiguous(), grams[kind].matrix
        for bits, share in FORMS:
            ways = compared(weight, gram, bits, share)
            rows.append({"kind": kind, "value_bits": bits, "kept": share, "ways": ways})
            print(kind, bits, share, {way: round(error, 5) for way, (error, _) in ways.items()}, flush=True)
    print(write("one-pass", {"layer": options.layer, "rows": rows}))


def compared(weight: Tensor, gram: Tensor, bits: ValueBits, share: float) -> dict[str, tuple[float, float]]:
    """Relative squared error and seconds of every way."""
    kept = int(share * weight.numel())
    spec = SparseSpec.lightest(weight.shape[0], weight.shape[1], kept, codec(bits, GROUP))
    order = settling_order(gram)

    def stored(pruned: Pruned, sweeps: int) -> Tensor:
        return store_pruned(weight, pruned, spec, gram, sweeps=sweeps).to_dense()

    def passed() -> Pruned:
        return prune_rounding(weight, spec, gram)

    def dropped() -> Pruned:
        return surgeon(weight, gram, kept, order=order)

    ways: dict[str, Callable[[], Tensor]] = {
        "one pass": lambda: passed().values,
        "one pass, sweeps": lambda: stored(passed(), SWEEPS),
        "SparseGPT's support, rounded": lambda: stored(dropped(), 0),
        "SparseGPT's support, sweeps": lambda: stored(dropped(), SWEEPS),
        "searched support, sweeps": lambda: stored(prune(weight, gram, kept, damping=DAMPING), SWEEPS),
    }
    found = {}
    for way, values in ways.items():
        begun = time.perf_counter()
        lost = (weight - values()).double()
        seconds = time.perf_counter() - begun
        whole = weight.double()
        found[way] = float(((lost @ gram) * lost).sum() / ((whole @ gram) * whole).sum()), seconds
    return found


if __name__ == "__main__":
    main()
