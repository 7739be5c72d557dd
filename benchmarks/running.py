"""What streaming costs, what workers bring, and how well memory and time are predicted: `demo` compressed in several ways.

Each run is a process of its own, one after the other; seconds are compared as ratios within this one run. Then `demo`, and a
model of random weights more than three times as large as its limit, are compressed under limits that the system enforces. Run
from anywhere:

    python benchmarks/running.py
    python benchmarks/running.py --sequences 32 --method cospadi
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from recording import DATA, write

import lexigram

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from limits import compress_within
from test_memory import random_model, settings

MIB = 2**20

RUN = """
import json, sys
from dataclasses import replace
import lexigram
from lexigram.estimation import estimated_seconds
from lexigram.memory import Way
from lexigram.planning import plan
from lexigram.recipe import Recipe
from lexigram.source import Source
recipe, out, held, spills, workers = json.loads(sys.stdin.read())
if held:
    opened = Source.opened
    def hold(self, device="cpu"):
        frame, weights = opened(self, device)
        return frame, weights.hold()
    Source.opened = hold
prepared = plan(Recipe.parse(recipe), workers=workers)
prepared = replace(prepared, way=Way(workers, spills))
estimated = estimated_seconds(prepared)
record = lexigram.compress(prepared.recipe, out, prepared=prepared)
print(json.dumps({
    "seconds": {name: cost.seconds for name, cost in record.stages.items()},
    "estimated_seconds": estimated,
    "peak_memory_bytes": record.peak_memory_bytes,
    "workers_peak_memory_bytes": record.workers_peak_memory_bytes,
    "tensors_sha256": record.tensors_sha256,
}))
"""


def main() -> None:
    """Run all ways, then print and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=8, help="of 1024 tokens each, for calibration")
    parser.add_argument("--method", default="cospadi")
    parser.add_argument("--limits", type=int, nargs="*", default=[1229, 830], help="MiB, for `demo`")
    parser.add_argument("--large", type=int, default=760, help="MiB, for a model of 2.4 GB in float32")
    options = parser.parse_args()
    text = str(DATA / "c4" / "c4.txt")
    recipe = {
        "model": "demo",
        "ratio": 0.4,
        "device": "cpu",
        "method": {"name": options.method},
        "calibration": {"text": [text], "sequences": options.sequences, "length": 1024},
    }
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "all in memory": (True, False, 1),
            "streamed": (False, False, 1),
            "streamed, hidden states in files": (False, True, 1),
            "streamed, 2 workers": (False, False, 2),
        }
        found = {
            name: timed(recipe, Path(folder) / f"way-{number}", *way) for number, (name, way) in enumerate(ways.items())
        }
        hashes = [each.pop("tensors_sha256") for each in found.values()]
        limited = {limit: under(recipe, Path(folder) / f"limit-{limit}", limit) for limit in options.limits}
        stories = {**recipe, "model": str(DATA / "stories260K")}
        stories["calibration"] = {**recipe["calibration"], "length": 256}  # type: ignore[dict-item]
        predicted = {
            name: under(each, Path(folder) / f"free-{name}", None)
            for name, each in {"demo": recipe, "stories260K": stories}.items()
        }
        large = larger_than_memory(Path(folder), options.large)
    basis = found["all in memory"]["seconds"]
    content = {
        "sequences": options.sequences,
        "method": options.method,
        "ways": found,
        "seconds_over_all_in_memory": {
            name: {
                stage: seconds / basis[stage] for stage, seconds in each["seconds"].items() if basis.get(stage, 0) > 1
            }
            for name, each in found.items()
        },
        "same_bytes": all(each == hashes[0] for each in hashes),
        "under_a_limit_in_mib": limited,
        "larger_than_memory": large,
        "predicted": predicted,
    }
    print(json.dumps(content, indent=1))
    print(write(f"running-{options.method}", content))


def timed(recipe: dict[str, Any], out: Path, held: bool, spills: bool, workers: int) -> dict[str, Any]:
    """One run without a limit."""
    ended = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([recipe, str(out), held, spills, workers]),
        capture_output=True,
        text=True,
        check=True,
    )
    print(out.name, "done", flush=True)
    return dict(json.loads(ended.stdout))


def under(recipe: dict[str, Any], out: Path, limit: int | None) -> dict[str, Any]:
    """One run under a limit in MiB, or none; what it took, and what was predicted."""
    size = None if limit is None else limit * MIB
    ended = compress_within(recipe, out, size, **({} if size is None else {"max_ram": size}))
    print(out.name, "done", flush=True)
    found = json.loads(ended.out) if ended.code == 0 else {"error": ended.err.strip().splitlines()[-1]}
    return {"by": ended.by, "code": ended.code, **found}


def larger_than_memory(folder: Path, limit: int) -> dict[str, Any]:
    """A Llama of random float32 weights, all of whose linear layers are compressed under a limit in MiB, and loaded."""
    sizes = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 103, "num_attention_heads": 8}
    draw = random.Random(0)
    words = folder / "words.txt"
    words.write_text(" ".join(f"w{draw.randrange(196)}" for _ in range(2000)))
    model = random_model(folder / "large", **sizes)
    dense = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    found = under(settings(model, words), folder / "large-out", limit)
    if found["code"] == 0:
        found["loads"] = len(lexigram.load(folder / "large-out").state_dict()) > 0
    return {**sizes, "limit_mib": limit, "dense_bytes": dense, "over_the_limit": dense / (limit * MIB), **found}


if __name__ == "__main__":
    main()
