"""How much memory a run takes: predicted before it is taken, kept under a limit, and measured.

What is predicted is the peak of a process that holds one decoder layer and, unless they wait in files, the hidden states of all
calibration tokens. The terms are sizes of tensors that exist at once; the factors in front of some were measured.
"""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lexigram.errors import LexigramError

BATCH_TOKENS = 2048
"""Tokens that are run through a layer at once."""

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
    needs: Needs, resident: int, workers: int, limit: int | None, peak: int = 0
) -> tuple[Way, dict[str, int]]:
    """The fastest way whose peak is safely within `limit` bytes, and every stage's peak; `peak` is what was reached already.

    Raises:
        LexigramError: where none is, with the smallest limit that would do.
    """
    least: int | None = None
    for way in _ways(workers):
        stages = needs.stages(way, resident)
        most = max(stages.values())
        wanted = max(peak, most + int(_SHORT * (most - resident)))
        if limit is None or wanted <= limit:
            return way, {"plan": peak, **stages}
        least = wanted if least is None else min(least, wanted)
    worst = max(stages, key=lambda name: stages[name])
    raise LexigramError(
        f"a memory limit of {shown(limit or 0)} is too small: at least {shown(least or 0)} are needed, most to {worst}; give "
        f"--max-ram {(least or 0) / 2**20 * 1.01 + 1:.0f}MiB"
    )


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


def resident_bytes() -> int:
    """What this process takes now, once what it can give back is given back; 0 where the system does not tell."""
    release()
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * _page_bytes()
    return peak_memory_bytes()


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
