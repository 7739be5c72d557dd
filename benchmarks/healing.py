"""What healing brings: rows of `quality.py` on `demo`, before and after their stored values are trained for some minutes on C4.

Perplexity on WikiText-2 test and on TinyStories, neither of which is of the training text's kind. Run from anywhere:

    python benchmarks/healing.py --rows cospadi "wanda, refit" --ratios 0.4 --minutes 10
    python benchmarks/healing.py --rows double-sparse --ratios 0.5 0.9 --steps 100 --work kept
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from quality import CALIBRATION, ROWS, WIKITEXT, evaluate, folder, lexigram, row
from recording import DATA, write

TEXTS = {"wikitext": WIKITEXT, "tinystories": DATA / "tinystories" / "tinystories.txt"}


def main() -> None:
    """Compress, evaluate, heal, evaluate again; then print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["cospadi"])
    parser.add_argument("--minutes", type=float, help="of training, at most")
    parser.add_argument("--steps", type=int, help="of training, at most")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--name", default="healing")
    parser.add_argument("--work", type=Path, help="keep models and figures there; what lies there is not run again")
    options = parser.parse_args()
    text = ["--calibration", str(DATA / CALIBRATION["c4"]), "--sequences", "64", "--length", "1024"]
    limits = [
        str(part) for key in ("minutes", "steps") if (value := vars(options)[key]) for part in (f"--{key}", value)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        dense = {name: perplexity("demo", work / f"dense-{name}", options.windows, name) for name in TEXTS}
        whole = evaluate("demo", work / "dense.json", options.windows, ["--dtype", "bfloat16"])
        rows = []
        for ratio in options.ratios:
            for name in options.rows:
                before = row(work, name, ratio, 0, options.windows, whole, text)
                rows.append({**before, **healed(folder(work, name, ratio, 0), limits, options.windows)})
                print(json.dumps({key: value for key, value in rows[-1].items() if key != "commands"}), flush=True)
    print(write(options.name, {"dense": dense, "rows": rows}))


def healed(out: Path, limits: list[str], windows: int) -> dict[str, Any]:
    """The figures of a compressed model before and after."""
    after = out.with_name(f"{out.name}-healed-{'-'.join(limits).replace('--', '')}")
    arguments = ["heal", str(out), "--text", str(DATA / "c4" / "c4.txt"), "--out", str(after), *limits]
    if not after.exists():
        lexigram([*arguments, "--resume"])
    record = json.loads((after / "run.json").read_text())
    bytes_before, bytes_after = (
        sum(file.stat().st_size for file in each.glob("*.safetensors")) for each in (out, after)
    )
    return {
        "healing": record["healing"][-1],
        "command": " ".join(["lexigram", *arguments]),
        "weight_file_bytes": [bytes_before, bytes_after],
        "perplexity": {
            name: [perplexity(str(each), each.with_name(f"{each.name}-{name}"), windows, name) for each in (out, after)]
            for name in TEXTS
        },
    }


def perplexity(model: str, file: Path, windows: int, text: str) -> float:
    """Of tokens."""
    file = file.with_name(f"{file.name}.json")
    return float(evaluate(model, file, windows, ["--dtype", "bfloat16"], TEXTS[text])["token_perplexity"])


if __name__ == "__main__":
    main()
