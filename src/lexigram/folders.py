"""A model folder from somewhere else, looked at before any library opens it.

It is data: nothing in it is run, and it cannot make its reader wait, or work and allocate far beyond what its files hold. What
transformers and tokenizers raise where a folder is damaged, which is any exception, ends in one sentence.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode

from lexigram.errors import LexigramError
from lexigram.jsonfiles import read_json

CONFIG = "config.json"
REMEDY = "check that the model is complete and undamaged"

_ADAPTER = "adapter_config.json"
# Keys of numbers that transformers makes lists of while it reads a config.
_COUNTS = re.compile(r"(^|_)(n_layer|layers|num_labels)$")
_LONGEST = 300  # characters of a text from a folder in a message
_FEW = 256  # such numbers are harmless, whatever the files hold
_CALLS = (
    100_000  # of torch functions while a model is built, beside those for every tensor: more than large models need
)
_CALLS_A_TENSOR = 1_000


@contextmanager
def opening(what: str, remedy: str = REMEDY, passing: type[Exception] = LexigramError) -> Iterator[None]:
    """Turn whatever goes wrong in a library that reads a folder into one sentence that begins with `what`.

    A panic in a library written in Rust is no Exception; ends that the user or the system asked for pass, and what the caller
    has a better sentence for.
    """
    try:
        yield
    except (LexigramError, KeyboardInterrupt, SystemExit, GeneratorExit, passing):
        raise
    except BaseException as error:
        raise LexigramError(f"{what}: {first_line(error)}; {remedy}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        LexigramError: where it or anything else in the folder is no plain file, or it is no JSON object.
    """
    check_plain(folder)
    return read_json(folder / CONFIG, finite=False, remedy=REMEDY)


def check_config(folder: Path, content: Mapping[str, Any], tensors: int) -> None:
    """Raise where `config.json` would have transformers fetch code, or build far more than the files hold.

    Args:
        folder: for the message.
        content: of the file.
        tensors: how many the weight files hold. There is one in every decoder layer.

    Raises:
        LexigramError: naming the key and its value.
    """
    if (folder / _ADAPTER).exists():
        raise LexigramError(f"{folder} holds an adapter ({_ADAPTER}), which would change the model; move it elsewhere")
    if content.get("fusion_config"):
        raise LexigramError(
            f"{folder / CONFIG} has a fusion_config, which replaces code of transformers; delete the key"
        )
    most = max(_FEW, tensors)
    for key, value in _numbers_and_texts(content):
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise LexigramError(
                f"{folder / CONFIG} asks for code from elsewhere ({printable(key)}: {printable(value)!r}); delete the key"
            )
        if _COUNTS.search(key) and isinstance(value, (int, float)) and not value <= most:
            raise LexigramError(
                f"{folder / CONFIG} says {printable(key)}: {value:g}, and the weight files hold {tensors} tensors; fetch or "
                "write the model again"
            )


class Frugal(TorchFunctionMode):
    """Ends the building of a model that calls far more torch functions than `tensors` stored tensors ask for.

    A config can ask for a billion modules by a number that nobody else looks at, under a key of its architecture's own.
    """

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self._left = _CALLS + _CALLS_A_TENSOR * tensors
        self._tensors = tensors

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._left -= 1
        if self._left < 0:
            raise LexigramError(
                f"{CONFIG} describes a model of far more parts than the {self._tensors} tensors that its files hold; fetch or "
                "write the model again"
            )
        return func(*args, **(kwargs or {}))


def check_plain(folder: Path) -> None:
    """Refuse what is neither a file nor a folder: a pipe or a device has no end. Links to files are files.

    Raises:
        LexigramError: naming the first such entry, and where the folder cannot be listed. One that is not there is passed by.
    """
    if not folder.is_dir():
        return
    with _listing(folder):
        for entry in sorted(folder.iterdir()):
            if entry.exists() and not entry.is_file() and not entry.is_dir():
                raise LexigramError(f"{entry} is neither a file nor a folder; a model folder holds files, delete it")


def paths_in(folder: Path) -> list[str]:
    """The paths in `folder` of all that is no folder, at any depth, as POSIX writes them. Links to folders are not entered.

    Hidden entries of `folder` itself are left out: tools keep theirs there (`.git`, `.cache`), and nothing reads them. Further
    inside they count, as transformers reads hidden templates, too.

    Raises:
        LexigramError: where a folder cannot be listed.
    """
    found = []
    with _listing(folder):
        waiting = [path for path in folder.iterdir() if not path.name.startswith(".")]
        while waiting:
            path = waiting.pop()
            if path.is_dir() and not path.is_symlink():
                waiting += path.iterdir()
            else:
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def lies_in(folder: Path, name: str) -> bool:
    """Whether a path in `folder` is that of a file, with no link to a folder on the way to it."""
    path = folder / name
    # Path.is_file raises where a name is too long.
    return os.path.isfile(path) and not any(parent.is_symlink() for parent in path.parents[: name.count("/")])


@contextmanager
def _listing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LexigramError(f"{folder} cannot be read: {error.strerror or error}; check its permissions") from error


def _numbers_and_texts(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) at any depth, our own part aside; values in a list have the list's key."""
    inside = content.items() if isinstance(content, dict) else ((key, value) for value in content)
    for name, value in inside:
        if name == "quantization_config":
            continue
        if isinstance(value, (dict, list)):
            yield from _numbers_and_texts(value, name)
        else:
            yield name, value


def first_line(error: BaseException) -> str:
    """What an exception says, in a line without a full stop."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {printable(line).rstrip('.')}"


def printable(text: str) -> str:
    """A text from a folder as a message can show it: no line breaks or control characters, and an end."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:_LONGEST])
    return shown if len(text) <= _LONGEST else f"{shown} ..."
