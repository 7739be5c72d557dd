"""What an unfinished run has on disk, so that another process can go on with it: whose it is, and every fitted unit.

The folder lies beside the output and goes away when that is complete. Each unit's factors are a file that is named by the hash
of its content; the manifest, which is replaced as a whole, lists them. Whatever a kill leaves behind besides is removed.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from lexigram.allocation.units import Allocation, Unit
from lexigram.calibration.tokens import TokenSequences
from lexigram.errors import LexigramError
from lexigram.headers import file_sha256, read_metadata
from lexigram.records import UnitRecord
from lexigram.shards import Entry, FileTensor, file_tensors, write_tensors
from lexigram.staging import REPLACED, RUN_FILE, flush, replacing

MANIFEST = "manifest.json"
_TOKENS = "tokens.safetensors"
_LOCK = "lock"


class Manifest(BaseModel):
    """The content of the file of that name.

    `identity` is everything that decides the bytes of the result, by name; `allocation` what was decided, where the Grams had
    to decide; `units` the SHA-256 of every fitted unit's file by the unit's key; `result` that of the result's record, once
    nothing is left but to put its folder in its place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: dict[str, str]
    allocation: Allocation | None = None
    result: str | None = None
    units: dict[str, str] = {}


class RunFolder:
    """The folder of a run that this process holds the lock of; made by `opened`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self._manifest = manifest
        self._objects = folder / "objects"
        self._objects.mkdir(exist_ok=True)

    @property
    def allocation(self) -> Allocation | None:
        """What the Grams decided, where they had to and have."""
        return self._manifest.allocation

    def decide(self, allocation: Allocation) -> None:
        """Keep what the Grams decided."""
        self._replace(self._manifest.model_copy(update={"allocation": allocation}))

    def complete(self, record: Path) -> None:
        """Say that the result is complete but for its place; `record` is its file."""
        self._replace(self._manifest.model_copy(update={"result": file_sha256(record)}))

    @property
    def tokens(self) -> TokenSequences | None:
        """The calibration that was sampled from the model, where it was."""
        file = self.folder / _TOKENS
        if not file.is_file():
            return None
        return TokenSequences(file_tensors(file)["ids"].read(), read_metadata(file)["source"])

    def keep_tokens(self, tokens: TokenSequences) -> None:
        """Keep what was sampled from the model, which takes long."""
        with writing(self.folder), replacing(self.folder / _TOKENS) as file:
            write_tensors(file, {"ids": _entry(tokens.ids)}, {"source": tokens.source})

    def temporary(self, name: str) -> Path:
        """A folder for what is of no use to another run."""
        return self.folder / f".{name}"

    def tidy(self) -> None:
        """Remove what is of no use to another run, and what a kill left half-written."""
        for path in self.folder.glob(".*"):
            if path.is_dir() and REPLACED not in path.name:
                shutil.rmtree(path, ignore_errors=True)
        for path in [*self.folder.rglob("*partial"), *self.folder.rglob(".tmp*")]:
            path.unlink(missing_ok=True)

    @property
    def worth_keeping(self) -> bool:
        """Whether anything is here that another run need not do again."""
        kept = (path for path in self.folder.rglob("*") if path.name not in (MANIFEST, _LOCK))
        return self.allocation is not None or any(path.is_file() for path in kept)

    def has(self, unit: Unit) -> bool:
        """Whether the unit's factors are here, undamaged: their hash is computed."""
        wanted = self._manifest.units.get(key(unit))
        return wanted is not None and _hash(self._file(wanted)) == wanted

    def put(self, unit: Unit, tensors: Mapping[str, Tensor], record: UnitRecord) -> None:
        """Keep the factors of a unit, by their names in the result."""
        partial = self._objects / "partial"
        with writing(self.folder):
            entries = {name: _entry(tensor) for name, tensor in tensors.items()}
            write_tensors(partial, entries, {"record": record.model_dump_json()})
            flush(partial)
            digest = file_sha256(partial)
            partial.replace(self._file(digest))
        self._replace(self._manifest.model_copy(update={"units": {**self._manifest.units, key(unit): digest}}))

    def get(self, unit: Unit) -> tuple[dict[str, FileTensor], UnitRecord]:
        """Where the factors of a unit lie, and its record.

        Raises:
            LexigramError: where the file is damaged.
        """
        file = self._file(self._manifest.units[key(unit)])
        try:
            return file_tensors(file), UnitRecord.model_validate_json(read_metadata(file).get("record", ""))
        except ValidationError as error:
            raise LexigramError(f"{file} is damaged; delete {self.folder} and run again") from error

    def _file(self, digest: str) -> Path:
        return self._objects / f"{digest}.safetensors"

    def _replace(self, manifest: Manifest) -> None:
        _write(self.folder, manifest)
        self._manifest = manifest


def run_folder(out: Path) -> Path:
    """Where the run that is to become `out` has its folder."""
    out = Path(os.path.abspath(out))
    return out.with_name(f"{out.name}.unfinished")


def held_bytes(folder: Path) -> int:
    """On disk of an unfinished run in its `run_folder`: of use to one that goes on, or removed by it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    # An earlier result that was to be replaced goes back to its place, and frees nothing.
    return sum(file.stat().st_size for file in files if REPLACED not in str(file.relative_to(folder)))


def finished(out: Path) -> bool:
    """Whether the run that was to become `out` was ended when it had; what is left of its folder is then removed."""
    folder, record = run_folder(out), out / RUN_FILE
    if not folder.is_dir() or not record.is_file():
        return False
    if (folder / MANIFEST).is_file():
        if _read(folder).result != file_sha256(record):
            return False
    elif any(path.name != _LOCK for path in folder.iterdir()):
        return False
    _remove(folder)
    return True


def recover(out: Path) -> None:
    """Put an earlier result back that was to be replaced when a run was ended: before anybody is told to delete that run.

    Raises:
        LexigramError: where another process works on the run that is to become `out`.
    """
    folder = run_folder(out)
    if (folder / _LOCK).exists() or any(_put_aside(folder)):
        with _locked(folder):
            _restore(folder, out)


@contextmanager
def opened(out: Path, identity: Mapping[str, str], *, resume: bool) -> Iterator[RunFolder]:
    """The folder of the run that is to become `out`, locked.

    It goes away when the context ends well, and when it does not and nothing that takes long was finished.

    Raises:
        LexigramError: where another process has the folder; where there is an unfinished run and `resume` is not asked for;
            where that run was of something else, with the first difference named; where the folder cannot be written.
    """
    folder = run_folder(out)
    made = [place for place in folder.parents if not place.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _restore(folder, out)
        run = RunFolder(folder, _manifest(folder, dict(identity), resume=resume))
        run.tidy()
        try:
            yield run
        except BaseException:
            run.tidy()
            if not run.worth_keeping:
                _remove(folder)
                for place in made:
                    with suppress(OSError):
                        place.rmdir()
            raise
        _remove(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise LexigramError(f"another run works on {folder}; wait for it, or name another output folder") from error
    except OSError as error:
        raise LexigramError(
            f"{folder} cannot be locked: {error.strerror or error}; name another output folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _remove(folder: Path) -> None:
    """The manifest last: while it is there, `finished` knows what the rest is."""
    for path in [path for path in folder.iterdir() if path.name not in (MANIFEST, _LOCK)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what can go wrong with a disk into a LexigramError."""
    try:
        yield
    except OSError as error:
        raise LexigramError(
            f"{folder} cannot be written: {error.strerror or error}; free some space and go on with --resume"
        ) from error


def key(unit: Unit) -> str:
    """What a unit is known by: its members, its method and its form."""
    return hashlib.sha256(unit.model_dump_json().encode()).hexdigest()


def _manifest(folder: Path, identity: dict[str, str], *, resume: bool) -> Manifest:
    file = folder / MANIFEST
    if not file.is_file():
        manifest = Manifest(identity=identity)
        _write(folder, manifest)
        return manifest
    found = _read(folder)
    if not resume:
        raise LexigramError(
            f"{folder} holds an unfinished run of {len(found.units)} fitted matrices or groups; go on with --resume, or delete "
            "it"
        )
    for name in [*identity, *found.identity]:
        before, now = found.identity.get(name, "nothing"), identity.get(name, "nothing")
        if before != now:
            raise LexigramError(
                f"{folder} was begun with {name} {before}, and this run has {now}; run it as it was begun, or delete the folder"
            )
    return found


def _read(folder: Path) -> Manifest:
    file = folder / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LexigramError(f"{file} cannot be read; delete {folder} and run again") from error


def _restore(folder: Path, out: Path) -> None:
    """Put an earlier result back that was to be replaced when a run was ended."""
    out = Path(os.path.abspath(out))
    for place in _put_aside(folder):
        if (place / out.name).is_dir():
            with suppress(OSError):
                out.rmdir()  # an empty folder is no result
            if not out.exists():
                os.replace(place / out.name, out)
        shutil.rmtree(place, ignore_errors=True)


def _put_aside(folder: Path) -> list[Path]:
    """Folders with an earlier result that a run was to replace."""
    return list(folder.glob(f"*{REPLACED}*"))


def _write(folder: Path, manifest: Manifest) -> None:
    """In the place of an earlier one, as a whole."""
    with writing(folder), replacing(folder / MANIFEST, lasting=True) as file:
        file.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _entry(tensor: Tensor) -> Entry:
    return Entry(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _hash(file: Path) -> str | None:
    """None where there is no such file."""
    try:
        return file_sha256(file)
    except LexigramError:
        return None
