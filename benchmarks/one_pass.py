"""Support and few-bit values in one pass, against a support first and its values afterwards, on three matrices of `demo`.

In one pass SparseGPT's columns are settled as GPTQ rounds them: what is dropped and what is rounded is carried on together, in
activation order, on a grid a row and group of inputs whose clipping is searched; a group is as wide as 128 kept values take on
average, since so many share a scale where they are stored. Recorded: the relative squared error of the outputs of that pass
and of the library's two stages (SparseGPT's support, or that of the search), as they are and with the sweeps over values and
scales that `lowrank-sparse` makes; with the seconds that it took.

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
from lexigram.linalg.support import Rows, wanda
from lexigram.linalg.surgeon import Pruned, settling_order, surgeon
from lexigram.methods.lowrank_sparse import SWEEPS
from lexigram.methods.storing import ValueBits, codec, store_pruned

KINDS = ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"]
FORMS: tuple[tuple[ValueBits, float], ...] = ((4, 0.6), (4, 0.4), (3, 0.55))
"""Bits of a value, and the share of the entries that is kept."""
CLIPS = torch.linspace(1.0, 0.4, 25)
BLOCK = 128
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
    spec = SparseSpec.lightest(weight.shape[0], weight.shape[1], kept, codec(bits, 128))
    order = settling_order(gram)

    def stored(pruned: Pruned, sweeps: int) -> Tensor:
        return store_pruned(weight, pruned, spec, gram, sweeps=sweeps).to_dense()

    def passed() -> Pruned:
        return one_pass(weight, gram, kept, bits, order)

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


def one_pass(weight: Tensor, gram: Tensor, kept: int, bits: int, order: Tensor) -> Pruned:
    """Values on grids, and their support: in every block of columns what is dearest to drop, beyond what rounding costs.

    The notation is that of `lexigram.linalg.surgeon`.
    """
    steps = (1 << bits) - 1
    scale, zero = (each.T[order] for each in grids(weight, gram, kept, steps))
    damped = gram[order][:, order].flip(0, 1)
    damped.diagonal().add_(DAMPING * gram.diagonal().mean())
    factor = torch.linalg.cholesky(damped, upper=True).flip(0, 1)
    carry = (factor / factor.diagonal()[:, None]).float()
    price = factor.diagonal().square().float()
    wanted = weight.T[order]
    values, support = wanted.clone(), torch.zeros(wanted.shape, dtype=torch.bool)
    for low in range(0, len(wanted), BLOCK):
        high = min(len(wanted), low + BLOCK)
        own = carry[low:high, low:high]
        missed = wanted[low:high] - values[low:high]
        asked = wanted[low:high] - torch.linalg.solve_triangular(own, missed, upper=False, unitriangular=True)
        missed = asked - rounded(asked, scale[low:high], zero[low:high], steps)
        gain = (asked.square() - missed.square()) * price[low:high, None]
        share = kept * high // len(wanted) - kept * low // len(wanted)
        support[low:high].view(-1)[gain.flatten().topk(share).indices] = True
        lost = torch.zeros_like(own[:, :1]).repeat(1, wanted.shape[1])
        for row in range(low, high):
            target = values[row] + carry[row, low:row] @ lost[: row - low]
            values[row] = torch.where(support[row], rounded(target, scale[row], zero[row], steps), 0.0)
            lost[row - low] = wanted[row] - values[row]
        values[high:].addmm_(carry[high:, low:high], lost)
    back = order.argsort()
    return Pruned(values[back].T.contiguous(), support[back].T.contiguous())


def grids(weight: Tensor, gram: Tensor, kept: int, steps: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of every entry (out, in), of asymmetric grids: the clipping that loses least where Wanda would keep.

    One for every row and group of inputs.
    """
    rows, cols = weight.shape
    widest = GROUP * weight.numel() // kept
    width = max(each for each in range(1, min(cols, widest) + 1) if cols % each == 0)
    support = wanda(weight, gram, kept // rows * rows, Rows()).view(rows, -1, width)
    strength = gram.diagonal().float().view(-1, width)
    groups = weight.view(rows, -1, width)
    inside = groups * support
    low, high = inside.amin(2, keepdim=True), inside.amax(2, keepdim=True)
    least = torch.full_like(low, float("inf"))
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for clip in CLIPS:
        tried = ((high - low) * clip / steps).clamp_min(1e-12)
        centre = (-low * clip / tried).round()
        missed = (((groups - rounded(groups, tried, centre, steps)) * support).square() * strength).sum(2, keepdim=True)
        better = missed < least
        least, scale, zero = (torch.where(better, *pair) for pair in ((missed, least), (tried, scale), (centre, zero)))
    scale, zero = (each.expand(groups.shape).reshape(rows, cols) for each in (scale, zero))
    return scale, zero


def rounded(x: Tensor, scale: Tensor, zero: Tensor, steps: int) -> Tensor:
    """The nearest value of a grid."""
    return (((x / scale).round() + zero).clamp(0, steps) - zero) * scale


if __name__ == "__main__":
    main()
