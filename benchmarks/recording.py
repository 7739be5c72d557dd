"""Writes one measured run into `results/`: the figures, and the command, commit, versions and machine they come from."""

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lexigram.records import machine, versions

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/NAME-COMMIT.json``; an existing file is never changed.

    Raises:
        FileExistsError: where this commit has such a result already.
    """
    commit = _git("rev-parse", "--short=10", "HEAD")
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no", "src"))
    record = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit + ("+changes" if dirty else ""),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "machine": {**machine(torch.device("cpu")), "python": platform.python_implementation()},
        **figures,
    }
    file = ROOT / "results" / f"{name}-{commit}.json"
    file.parent.mkdir(exist_ok=True)
    with file.open("x", encoding="utf-8") as stream:
        # Where data and temporary folders lie is nobody's business.
        content = json.dumps(record, indent=1).replace(str(DATA), "DATA").replace(str(ROOT), ".")
        stream.write(content.replace(f"{tempfile.gettempdir()}/", "") + "\n")
    return file


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
