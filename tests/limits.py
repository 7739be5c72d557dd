"""Processes under a limit of memory that the system enforces."""

import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

RUN = """
import json, sys
import lexigram
from lexigram.planning import plan
from lexigram.recipe import Recipe
recipe, out, options = json.loads(sys.stdin.read())
prepared = plan(Recipe.parse(recipe), **options)
record = lexigram.compress(prepared.recipe, out, prepared=prepared)
print(json.dumps({"peak": record.peak_memory_bytes, "predicted": prepared.memory_bytes, "stages": prepared.memory}))
"""


class Limited(NamedTuple):
    """How a process ended under its limit, and what enforced it."""

    code: int
    out: str
    err: str
    by: str


def compress_within(recipe: dict[str, Any], out: Path, limit: int | None, **options: Any) -> Limited:
    """`lexigram.compress` in a process that cannot have more than `limit` bytes: a memory cgroup where one can be made, else a
    limit on its private data (``ulimit -d``).
    """
    group = None if limit is None else _group(limit)

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        elif limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    try:
        ended = subprocess.run(
            [sys.executable, "-c", RUN],
            input=json.dumps([recipe, str(out), options]),
            capture_output=True,
            text=True,
            check=False,
            timeout=1500,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=enter,
        )
    finally:
        if group is not None:
            group.rmdir()
    by = "nothing" if limit is None else "a cgroup" if group is not None else "ulimit -d"
    return Limited(ended.returncode, ended.stdout, ended.stderr, by)


def _group(limit: int) -> Path | None:
    """A new memory cgroup below that of this process; None where one cannot be made."""
    with suppress(OSError):
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        own = {kind: path.lstrip("/") for _, kind, path in lines}
        for base, name in (
            (Path("/sys/fs/cgroup/memory") / own.get("memory", ""), "memory.limit_in_bytes"),
            *_unified(own),
        ):
            group = base / f"lexigram-{os.getpid()}"
            with suppress(OSError):
                group.mkdir()
                with suppress(OSError):
                    (group / name).write_text(str(limit))
                    return group
                group.rmdir()
    return None


def _unified(own: dict[str, str]) -> list[tuple[Path, str]]:
    return [(Path("/sys/fs/cgroup") / own[""], "memory.max")] if "" in own else []
