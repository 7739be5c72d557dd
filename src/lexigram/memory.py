"""How much memory a run takes: predicted before it is taken, kept under a limit, measured, and said where it was too little.

What is predicted is the peak of a process that holds one decoder layer and, unless they wait in files, the hidden states of all
calibration tokens. The terms are sizes of tensors that exist at once; the factors in front of some were measured.
"""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from lexigram.errors import LexigramError

BATCH_TOKENS = 2048
"""Tokens that are run through a layer at once."""

PLANNING = "plan"
"""The stage that is over once there is a prediction."""

_WORKER = 420_000_000  # bytes of a worker process before it has anything to do
_COMPUTING = 70_000_000  # bytes that libraries take for themselves once something is computed
_WHITENING = 7  # Grams: one, its factor and inverse, what an eigendecomposition works in, and what it leaves unused
_WHITENED = 3  # Grams: one, its factor and inverse
_BEFORE = 7  # weights in float32 that are there while their Gram is whitened
_WEIGHTS = 34  # weights in float32: signals in float64, what a decomposition works in, and what is left unused
_SHORT = 0.2
"""By this share of what a run adds to the process, its peak may be above the prediction and still be within a limit."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""In what torch says where memory did not suffice: that of a GPU, that of the CPU, on Windows, to the libraries of CUDA."""


@dataclass(frozen=True)
class Way:
    """How a run is carried out where memory decides; its bytes are the same whatever it is."""

    workers: int = 1
    spills: bool = False


@dataclass(frozen=True)
class Needs:
    """Sizes of what is in memory at once, in bytes unless another unit is told.

    `largest` is the largest tensor as it is stored; `outside` all parameters outside of the decoder layers in the dtype of the
    computation, `layer` those of the largest layer; `hidden` the hidden states of one token, `activations` what a layer makes
    of one token besides; `logits` those of one token in float32. `width` and `weights` are the inputs and the number of weights
    of the largest matrix that is fitted; `group` is how many are fitted together; `grams` those of one layer. `whole` is the
    whole model, where it is tried out, `held` that of weights that transformers has to convert, which stay, `compared` what
    is kept of all layers at once where they are compared.
    """

    tokens: int
    length: int
    layers: int
    largest: int
    outside: int
    layer: int
    hidden: int
    activations: int
    logits: int
    width: int
    weights: int
    group: int
    grams: int
    whole: int = 0
    held: int = 0
    compared: int = 0
    sensitivity_sequences: int = 0

    @property
    def spilled_bytes(self) -> int:
        """Of the hidden states that are in files at once, where they are."""
        before_layers = self.sensitivity_sequences * self.length * (self.layers + 1)
        return self.hidden * max(2 * self.tokens, before_layers)

    def stages(self, way: Way, resident: int) -> dict[str, int]:
        """The peak of every stage, of a process that takes `resident` bytes before it begins; of all processes together."""
        resident += self.held
        batch = min(self.tokens, max(BATCH_TOKENS, self.length))
        hidden = 0 if way.spills else self.tokens * self.hidden
        gram = 8 * self.width**2
        forward = max(
            self.outside + self.largest + batch * self.hidden,
            self.layer + self.largest + batch * (self.hidden + self.activations) + self.grams + 3 * gram,
        )
        weights = 4 * self.weights * self.group
        fit = max(_WHITENING * gram + _BEFORE * weights, _WHITENED * gram + _WEIGHTS * weights)
        stages = {
            "read the weights": resident + 2 * self.largest,
            "calibrate": resident + _COMPUTING + hidden + forward,
            "fit": resident
            + _COMPUTING
            + hidden
            + (fit if way.workers == 1 else gram + way.workers * (_WORKER + fit + gram)),
            "save": resident + 2 * self.largest,
        }
        if self.sensitivity_sequences:
            sequences = self.sensitivity_sequences * self.length * self.hidden
            states = sequences * (2 if way.spills else self.layers + 3)  # gradients are not spilled
            behind = self.outside + 4 * self.length * self.logits
            within = 2 * self.layer + 6 * self.length * self.activations
            stages["measure the loss"] = resident + states + max(behind, within)
        if self.whole:
            stages["try models out"] = resident + self.whole + 4 * self.length * self.logits
        if self.compared:
            stages["compare all layers"] = resident + _COMPUTING + self.compared
        return stages


def chosen_way(
    needs: Needs, resident: int, workers: int, limit: int | None, peak: int = 0, room: int | None = None
) -> tuple[Way, dict[str, int]]:
    """The fastest way whose peak is safely within a bound, and every stage's peak.

    Args:
        needs: the sizes that decide it.
        resident: bytes that the process takes before it begins.
        workers: the most that there may be.
        limit: bytes that are kept or refused.
        peak: what was reached already, which counts within the limit.
        room: without a limit, bytes that the machine has for this process. A prediction is no proof: where every way takes
            more, it is the fastest of those that take least.

    Raises:
        LexigramError: where no way is within the limit, with the smallest that would do.
    """
    ways = {way: needs.stages(way, resident) for way in _ways(workers)}
    wanted = {way: _safely(max(stages.values()), resident) for way, stages in ways.items()}
    smallest = min(ways, key=wanted.__getitem__)
    bound = room if limit is None else limit
    if limit is not None and (least := max(peak, wanted[smallest])) > limit:
        worst = max(ways[smallest], key=ways[smallest].__getitem__)
        raise LexigramError(
            f"a memory limit of {shown(limit)} is too small: at least {shown(least)} are needed, most to {worst}; give "
            f"--max-ram {least / 2**20 * 1.01 + 1:.0f}MiB"
        )
    way = next((way for way in ways if bound is None or wanted[way] <= bound), smallest)
    return way, {PLANNING: peak, **ways[way]}


def _safely(peak: int, resident: int) -> int:
    """The limit that a predicted peak is safely within."""
    return peak + int(_SHORT * (peak - resident))


def _ways(workers: int) -> Iterator[Way]:
    """From the fastest to the smallest."""
    yield Way(workers)
    for count in sorted({workers, *(2**power for power in range(8) if 2**power < workers)}, reverse=True):
        yield Way(count, spills=True)


def parsed(size: str) -> int:
    """Bytes of a size such as ``4GiB``, ``800 MB`` or ``2e9``.

    Raises:
        LexigramError: for anything else.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", size)
    with suppress(ValueError, OverflowError):
        if found and found[2].upper() in _UNITS:
            return int(float(found[1]) * _UNITS[found[2].upper()])
    raise LexigramError(f"{size!r} is no size of memory; write something like 4GiB, 800MiB or 2GB")


def shown(size: int) -> str:
    """A size in MiB."""
    return f"{size / 2**20:,.0f} MiB"


def short_of_memory(error: Exception) -> str | None:
    """What to say of an error that memory did not suffice; None for any other."""
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    ):
        return None
    return f"memory did not suffice ({' '.join(str(error).split())[:200] or type(error).__name__})"


@contextmanager
def memory_told(remedy: str) -> Iterator[None]:
    """Turn memory that does not suffice into an error with this remedy; any other error stays as it is.

    Raises:
        LexigramError: where it does not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        short = short_of_memory(error)
        if short is None:
            raise
        raise LexigramError(f"{short}; {remedy}") from error


def resident_bytes() -> int:
    """What this process takes now, once what it can give back is given back; 0 where the system does not tell."""
    release()
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * _page_bytes()
    return peak_memory_bytes()


def available_bytes() -> int | None:
    """What this process can still take: of what the machine has available, and of what its cgroups leave.

    None where the system does not tell: on others than Linux.
    """
    cgroups = memory_cgroups(_content(Path("/proc/self/cgroup")))
    told = [left_by_machine(_content(Path("/proc/meminfo")))]
    told += [left_by_cgroup(*(_content(folder / name) for name in names)) for folder, names in cgroups]
    return min((size for size in told if size is not None), default=None)


def left_by_machine(meminfo: str) -> int | None:
    """Bytes that are available by the content of ``/proc/meminfo``; None where it does not say."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def left_by_cgroup(limit: str, usage: str, stat: str) -> int | None:
    """Bytes that a cgroup leaves by the contents of its files; None where it has no limit, or they do not say."""
    if not (limit.strip().isdecimal() and usage.strip().isdecimal()):
        return None
    counts = {name: int(count) for name, count in re.findall(r"^(\w+) (\d+)$", stat, re.MULTILINE)}
    # Pages of files count as used, a model that was just downloaded too, and are given up when memory is short.
    files = sum(counts.get(f"total_{name}", counts.get(name, 0)) for name in ("active_file", "inactive_file"))
    return max(0, int(limit) - max(0, int(usage) - files))


def memory_cgroups(own: str) -> list[tuple[Path, tuple[str, str, str]]]:
    """Folders of the cgroups that may limit a process, by the content of its ``/proc/self/cgroup``, with their files' names.

    A limit holds for all cgroups below; in a container the outermost may be all that can be seen.
    """
    found = []
    for _, kinds, path in (line.split(":", 2) for line in own.splitlines() if line.count(":") >= 2):
        if kinds == "":
            place, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "memory.stat")
        elif "memory" in kinds.split(","):
            place = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        else:
            continue
        parts = path.strip("/").split("/")
        found += [(place.joinpath(*parts[:count]), names) for count in range(len(parts) + 1)]
    return list(dict.fromkeys(found))


def _content(file: Path) -> str:
    """Empty where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def release() -> None:
    """Give freed memory back to the system, where its allocator can be asked to (glibc)."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far; 0 where the system does not tell (Windows)."""
    # Linux's getrusage goes on counting from what the process that started this one had; its own record does not.
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _page_bytes() -> int:
    import resource

    return resource.getpagesize()
