"""Seconds by stage for a model of Llama-3.2-1B's shapes: random weights, the real solver, real text.

The time of a fit does not depend on what the weights are, so a model that nobody can download is timed by its shapes.
The tokenizer is the demo model's. With a GPU:

    python benchmarks/shapes.py --device cuda
    python benchmarks/shapes.py --layers 1 --sequences 8
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from recording import DATA, write
from transformers import LlamaConfig, LlamaForCausalLM

from lexigram import Recipe, compress
from lexigram.recipe import Calibration
from lexigram.source import DEMO, Source

LAYERS = 16


def main() -> None:
    """Build the model, compress it, record the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of {LAYERS}")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        build(options.layers, options.seed).save_pretrained(model)
        Source.resolve(DEMO).tokenizer().save_pretrained(model)
        recipe = Recipe(
            model=str(model),
            ratio=options.ratio,
            calibration=Calibration(text=(str(DATA / "c4" / "c4.txt"),), sequences=options.sequences),
            device=options.device,
        )
        record = compress(recipe, Path(folder) / "small")
    figures = {
        "layers": options.layers,
        "sequences": options.sequences,
        "run_machine": record.machine,
        **record.model_dump(
            mode="json", include={"ratio", "bits_per_weight", "seconds", "stages", "peak_memory_bytes"}
        ),
        "device_peak_memory_bytes": record.device_peak_memory_bytes,
    }
    print(json.dumps(figures, indent=1))
    print(write("shapes-llama-3.2-1b", figures))


def build(layers: int, seed: int) -> LlamaForCausalLM:
    """Llama-3.2-1B with fewer or all layers and random weights, in bfloat16."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
