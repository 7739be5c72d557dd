"""What comes of damaged folders: so many mutations of each kind, drawn by a seed, and how opening them ends.

A mutated folder is refused in one sentence, loads as the same bits, or loads as others and `lexigram verify` names the
difference. Everything else (another exception, a wait, memory beyond what the files hold, code that runs, a difference that
nobody names) is a failure, and is kept with the seed that repeats it. The mutators are those of the tests.

    python benchmarks/mutations.py --count 200
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import transformers
from recording import ROOT, write

sys.path.insert(0, str(ROOT / "tests"))
from hostile import FAILURES, KINDS, MUTATORS, State, build, outcome


def main() -> None:
    """Mutate, open, count, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="of mutations by each mutator")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folders = build(Path(place))
        states = {form: State.of(folder) for form, folder in folders.items()}
        counts: dict[str, Counter[str]] = {name: Counter() for name in MUTATORS}
        failures: list[dict[str, Any]] = []
        for name in MUTATORS:
            for number in range(options.count):
                seed = f"{options.seed} {name} {number}"
                draw = random.Random(seed)
                form = draw.choice(list(folders))
                inner = Path(place) / "mutated"
                damaged = Path(shutil.copytree(folders[form], inner / "folder"))
                MUTATORS[name](damaged, draw)
                found = outcome(damaged, states[form])
                counts[name][found.kind] += 1
                if found.kind in FAILURES:
                    failures.append({"seed": seed, "form": form, "kind": found.kind, "said": found.said})
                shutil.rmtree(inner)
            print(line(name, counts[name]), flush=True)
    total = sum(counts.values(), Counter())
    print(line("all", total))
    figures = {
        "count": options.count,
        "seed": options.seed,
        "mutations": total.total(),
        "seconds": time.perf_counter() - start,
        "outcomes": {name: {kind: found[kind] for kind in KINDS} for name, found in {**counts, "all": total}.items()},
        "failures": failures,
    }
    print(write("mutations", figures))
    if failures:
        sys.exit(f"{len(failures)} failures; the first: {failures[0]}")


def line(name: str, found: Counter[str]) -> str:
    """A row of the table, in Markdown."""
    cells = (str(found[kind]) for kind in KINDS)
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(f"| mutator | {' | '.join(KINDS)} |")
    print("|---" * (1 + len(KINDS)) + "|")
    main()
