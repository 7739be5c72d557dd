"""Objective against seconds of the presets `published` and `fast`, on layer 10's q, gate and down matrices of `demo`.

Both run in this process, one after the other, on the same signals. Recorded: the relative whitened error after every outer
iteration with the seconds that it took, and how many times sooner `fast` reaches what `published` has at its end.

    python benchmarks/solvers.py --iterations 10
"""

import argparse
import time
from typing import Any

import torch
from recording import DATA, write

from lexigram.calibration.gram import collecting
from lexigram.calibration.layerwise import LayerRunner
from lexigram.calibration.text import read_texts
from lexigram.calibration.tokens import token_sequences
from lexigram.devices import forward_dtype
from lexigram.gram import Gram
from lexigram.linalg.dictionary_learning import learn_dictionary
from lexigram.methods import PRESETS, Budget, CospadiConfig, layout
from lexigram.methods.cospadi import solver
from lexigram.source import Source
from lexigram.targets import decoder_layers, weight_of


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--iterations", type=int, default=10, help="outer iterations of `published`")
    parser.add_argument("--kinds", nargs="+", default=["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"])
    options = parser.parse_args()

    weights, grams = layer_problem(options.layer, options.kinds)
    matrices: dict[str, Any] = {}
    for kind in options.kinds:
        weight, gram = weights[kind], grams[kind]
        published = PRESETS["published"].model_copy(update={"iterations": options.iterations})
        fast = PRESETS["fast"]
        budget = Budget(int((1 - options.ratio) * 2 * weight.numel()))
        # The same form for both, that of the recorded figures: what differs is the solver alone.
        form = CospadiConfig(rho=2.0, value_bits=12, dictionary_bits=16)
        spec = layout(form, (weight.shape[0], weight.shape[1]), budget)
        signals = gram.whitening.whiten(weight)
        curves = {
            name: curve(signals, spec.left.cols, spec.left.nonzeros // spec.left.rows, config)
            for name, config in (("fast", fast), ("published", published))
        }
        goal, needed = curves["published"][-1]
        reached = next((seconds for error, seconds in curves["fast"] if error <= goal), None)
        matrices[kind] = {
            "shape": list(weight.shape),
            "atoms": spec.left.cols,
            "nonzeros_per_column": spec.left.nonzeros // spec.left.rows,
            "curves": {
                name: [{"relative_error": e, "seconds": s} for e, s in points] for name, points in curves.items()
            },
            "times_sooner": needed / reached if reached else None,
            "share_of_time_of_fast": profiled(signals, spec.left.cols, spec.left.nonzeros // spec.left.rows, fast),
        }
        print(
            f"{kind:20} published {goal:.4f} in {needed:.1f} s; fast reaches it in "
            f"{'never' if reached is None else f'{reached:.2f} s: {needed / reached:.0f} times sooner'}; "
            f"fast ends at {curves['fast'][-1][0]:.4f} in {curves['fast'][-1][1]:.1f} s, "
            f"{matrices[kind]['share_of_time_of_fast']['matrix products']:.0%} of it in matrix products",
            flush=True,
        )
    print(write("solvers-smollm2-135m", {"layer": options.layer, "ratio": options.ratio, "matrices": matrices}))


def curve(signals: torch.Tensor, atoms: int, sparsity: int, config: CospadiConfig) -> list[tuple[float, float]]:
    """(relative error, seconds since the start) after every outer iteration."""
    scale = float(signals.double().square().sum())
    points: list[tuple[float, float]] = []
    began = time.perf_counter()
    learn_dictionary(
        signals,
        atoms,
        sparsity,
        **solver(config),
        generator=torch.Generator().manual_seed(42),
        callback=lambda _iteration, error: points.append(((error / scale) ** 0.5, time.perf_counter() - began)),
    )
    return points


def profiled(signals: torch.Tensor, atoms: int, sparsity: int, config: CospadiConfig) -> dict[str, float]:
    """Where the time of one fit goes, by torch's profiler, as shares of the time inside torch."""
    kinds = {"mm": "matrix products", "addmm": "matrix products", "cholesky_solve": "factorisations"}
    kinds |= {"linalg_cholesky_ex": "factorisations", "linalg_eigh": "factorisations", "_linalg_eigh": "factorisations"}
    kinds |= {"linalg_qr": "factorisations", "kthvalue": "selection"}
    shares: dict[str, float] = {"matrix products": 0.0, "factorisations": 0.0, "selection": 0.0, "elementwise": 0.0}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        curve(signals, atoms, sparsity, config)
    for event in profile.key_averages():
        shares[kinds.get(event.key.removeprefix("aten::"), "elementwise")] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: time / total for kind, time in shares.items()}


def layer_problem(layer: int, kinds: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Gram]]:
    """Weights and Grams of one decoder layer on 64 x 1024 tokens of C4."""
    source = Source.resolve("demo")
    model = source.model()
    tokens = token_sequences(source.tokenizer(), read_texts([str(DATA / "c4" / "c4.txt")]), 64, 1024, 0)
    layers = list(decoder_layers(model))
    runner = LayerRunner(model, layers, tokens.ids, compute_dtype=forward_dtype(torch.device("cpu")))
    for index in range(layer):
        runner.run(index)
    modules = {kind: layers[layer].get_submodule(kind) for kind in kinds}
    with collecting(modules) as accumulators:
        runner.run(layer)
    return (
        {kind: weight_of(module).detach().float() for kind, module in modules.items()},
        {kind: accumulator.result(kind) for kind, accumulator in accumulators.items()},
    )


if __name__ == "__main__":
    main()
