"""What healing brings: rows of `quality.py` on `demo`, before and after their stored values are trained for some steps on C4.

Perplexity on WikiText-2 test and on TinyStories, neither of which is of the training text's kind. Run from anywhere:

    python benchmarks/healing.py --rows cospadi "wanda, refit" --ratios 0.4 --heal "--minutes 10"
    python benchmarks/healing.py --rows double-sparse --ratios 0.5 0.9 --texts wikitext --work kept
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from quality import CALIBRATION, ROWS, WIKITEXT, compressed, evaluate, lexigram
from recording import DATA, write

TEXTS = {"wikitext": WIKITEXT, "tinystories": DATA / "tinystories" / "tinystories.txt"}


def main() -> None:
    """Compress, evaluate, heal, evaluate again; then print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["cospadi"])
    parser.add_argument("--heal", default="--steps 40 --batch 4", metavar="OPTIONS", help="of `lexigram heal`")
    parser.add_argument("--texts", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--name", default="healing")
    parser.add_argument("--work", type=Path, help="keep models and figures there; what lies there is not run again")
    options = parser.parse_args()
    calibration = ["--calibration", str(DATA / CALIBRATION["c4"]), "--sequences", "64", "--length", "1024"]
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        dense = {text: figures("demo", work / "dense", text, options.windows) for text in TEXTS}
        rows = []
        for ratio in options.ratios:
            for name in options.rows:
                out, before = compressed(work, name, ratio, 0, calibration)
                rows.append({**before, **healed(out, options.heal.split(), options.texts, options.windows)})
                print(json.dumps({key: value for key, value in rows[-1].items() if key != "commands"}), flush=True)
    print(write(options.name, {"dense": dense, "rows": rows}))


def healed(out: Path, options: list[str], texts: list[str], windows: int) -> dict[str, Any]:
    """The figures of a compressed model before and after."""
    after = out.with_name(f"{out.name}-healed{''.join(options).replace('--', '-')}")
    arguments = ["heal", str(out), "--text", str(DATA / "c4" / "c4.txt"), "--out", str(after), *options]
    if not after.exists():
        lexigram([*arguments, "--resume"])
    return {
        "healing": json.loads((after / "run.json").read_text())["healing"][-1],
        "heal_command": " ".join(["lexigram", *arguments]),
        "weight_file_bytes": [sum(file.stat().st_size for file in each.glob("*.safetensors")) for each in (out, after)],
        "perplexity": {
            text: [figures(str(each), each, text, windows)["token_perplexity"] for each in (out, after)]
            for text in texts
        },
    }


def figures(model: str, place: Path, text: str, windows: int) -> dict[str, Any]:
    """Of an evaluation in bfloat16, kept in a file beside `place`."""
    return evaluate(model, place.with_name(f"{place.name}-{text}.json"), windows, ["--dtype", "bfloat16"], TEXTS[text])


if __name__ == "__main__":
    main()
