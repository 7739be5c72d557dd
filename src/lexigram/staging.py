"""Folders and files that appear whole or not at all: written under another name beside the target, then renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from lexigram.errors import LexigramError

RUN_FILE = "run.json"
"""Its presence marks a folder as written by us."""

EXPORT_FILE = "export.json"
"""The same of an ordinary checkpoint, which is no result of a run."""

REPLACED = ".replaced-"
"""In the name of a folder with an earlier result that is about to be replaced."""


def check_target(out: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> None:
    """Raise where `out` could not be written in the end.

    Raises:
        LexigramError: where it exists and may not be replaced, its parent is not writable, or the disk is too small.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise LexigramError(f"{out} exists and is not a folder; name another output folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise LexigramError(f"{out} exists and is not empty; name another folder, or replace it with --overwrite")
        foreign = _foreign_files(out)
        if foreign:
            raise LexigramError(
                f"{out} holds {foreign[0]}, which lexigram did not write, and is left alone; name another folder"
            )
    parent = _existing_parent(out)
    if not parent.is_dir():
        raise LexigramError(f"{parent} is a file, so {out} cannot be made in it; name another output folder")
    if not os.access(parent, os.W_OK):
        raise LexigramError(f"{parent} is not writable; name another output folder")
    check_space({out: needed_bytes})


def check_space(needed_bytes: Mapping[Path, int]) -> None:
    """Raise where so many bytes could not be written to each of some places; what goes to one disk is added up.

    Raises:
        LexigramError: naming the places on a disk that is too small.
    """
    disks: dict[int, list[Path]] = {}
    for place in needed_bytes:
        disks.setdefault(_disk(place), []).append(place)
    for places in disks.values():
        needed, parent = sum(needed_bytes[place] for place in places), _existing_parent(places[0])
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise LexigramError(
                f"{' and '.join(map(str, places))} need{'s' * (len(places) == 1)} about {needed / 1e6:.0f} MB and {parent} has "
                f"{free / 1e6:.0f} MB free; free some space"
            )


def check_outside(folder: Path, out: Path) -> None:
    """Refuse a result inside of the folder that it is made from, which would then hold more than was written there.

    Raises:
        LexigramError: naming both.
    """
    if folder.resolve() in out.resolve().parents:
        raise LexigramError(f"{out} lies in {folder}, which has to stay as it is; name another output folder")


@contextmanager
def staged(out: Path, *, overwrite: bool = False, within: Path | None = None) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` when the context ends well, and is removed when it does not.

    Args:
        out: what it becomes.
        overwrite: replace an earlier result of ours.
        within: a folder on the same disk to make it in instead, of somebody who looks after what a kill leaves there.

    Raises:
        LexigramError: as `check_target` does, and for a failed write, whoever raised it.
    """
    try:
        with _staged(out, overwrite=overwrite, within=within) as staging:
            yield staging
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        remedy = "name another folder" if within is None else "go on with --resume"
        raise LexigramError(
            f"{out} could not be written: {reason}; nothing was left there, free some space or {remedy}"
        ) from error


@contextmanager
def _staged(out: Path, *, overwrite: bool, within: Path | None) -> Iterator[Path]:
    out = Path(os.path.abspath(out))  # "." has neither a name nor a parent
    check_target(out, overwrite=overwrite)
    place = within or out.parent
    place.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=place))
    try:
        yield staging
        _usual_modes(staging)
        for file in staging.rglob("*"):
            if file.is_file():
                flush(file)
        if out.is_dir() and any(out.iterdir()):
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}{REPLACED}", dir=place))
            os.replace(out, old / out.name)
            try:
                os.replace(staging, out)
            except OSError:
                os.replace(old / out.name, out)
                raise
            shutil.rmtree(old)
        else:
            os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def replacing(file: Path, *, lasting: bool = False) -> Iterator[Path]:
    """A name beside `file` to write to, which becomes `file` when the context ends well, and is removed when it does not.

    Args:
        file: what it becomes, in place of what stands there.
        lasting: it is to outlive a power cut.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        if lasting:
            flush(partial)
        partial.replace(file)
    finally:
        with suppress(OSError):
            partial.unlink()


def copy_file(name: str, folder: Path, other: Path) -> None:
    """Copy the file of this path in `folder` to the same path in `other`."""
    (other / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / name, other / name)


def flush(file: Path) -> None:
    """What was written is to outlive a power cut."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _foreign_files(folder: Path) -> list[str]:
    """What lies in `folder` and is not listed in a record of ours; other software uses such file names too."""
    files = _listed(folder / RUN_FILE) + _listed(folder / EXPORT_FILE)
    named = {PurePosixPath(name) for name in files if isinstance(name, str)} - {PurePosixPath()}
    ours = named.union(*(name.parents for name in named))
    paths = (PurePosixPath(path.relative_to(folder).as_posix()) for path in folder.rglob("*"))
    # Earlier versions named a folder for the files in it.
    return sorted(str(path) for path in paths if path not in ours and named.isdisjoint(path.parents))


def _listed(record: Path) -> list[str]:
    """The files that a record of ours names; none where it is not ours."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    files = content.get("files") if isinstance(content, dict) and "lexigram" in content else None
    return files if isinstance(files, list) else []


def _usual_modes(folder: Path) -> None:
    """What a plain mkdir and open would have given; temporary folders and safetensors files are closed to others."""
    mask = os.umask(0o077)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)


def _disk(path: Path) -> int:
    """What a file system is known by."""
    return _existing_parent(path).stat().st_dev


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent
