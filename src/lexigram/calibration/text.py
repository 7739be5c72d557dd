"""Where text comes from: files, the demo text that comes with Python, a hub data set. Knows no tokens."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lexigram.errors import LexigramError

DemoPart = Literal["calibration", "evaluation"]
"""Which part of the demo text: the first 70 % or the rest."""

PLAIN_SUFFIXES = (".txt", ".raw")
LINES_SUFFIXES = (".jsonl", ".json")
BETWEEN_DOCUMENTS = "\n\n"

CHARACTERS = 10_000_000
"""Of one text, where some sequences are drawn from it: a tokenizer takes some 100 bytes of memory a character."""

HUB_CHARACTERS = 20_000_000
"""Of a hub data set that is read as a whole: many have no end."""


def read_texts(
    names: Sequence[str], *, demo_part: DemoPart = "calibration", characters: int | None = CHARACTERS
) -> str:
    """Read the named texts, in the order given, with a blank line between them.

    A name is one of:

    - a path to a `.txt` or `.raw` file, UTF-8, taken as it stands (a leading byte order mark is dropped);
    - a path to a `.jsonl` file, one JSON object a line with a string field `text`; blank lines are skipped, and the
      documents are joined with a blank line; `.json` is read in the same way;
    - one of these compressed by gzip, with `.gz` behind its suffix;
    - `demo`: the part `demo_part` of Python's own documentation topics (see `demo_text`);
    - `hub:NAME[:CONFIG[:SPLIT]]`: the column `text` of a hub data set, streamed in its own order through the optional
      package `datasets`. SPLIT is `train` unless given; CONFIG may be empty (`hub:NAME::test`).

    Of a text that is longer, about the first `characters` characters are read: whole lines of a plain text, whole
    documents of others. With None files are read to their ends, and data sets up to `HUB_CHARACTERS`.
    """
    if isinstance(names, str):
        names = [names]
    if not names:
        raise LexigramError("no text was named; name a .txt or .jsonl file, `demo`, or hub:NAME")
    texts = []
    for name in names:
        if name == "demo":
            texts.append(demo_text(demo_part))
        elif name.startswith("hub:"):
            texts.append(_read_hub(name, characters or HUB_CHARACTERS))
        else:
            texts.append(_read_file(Path(name).expanduser(), characters))
    return BETWEEN_DOCUMENTS.join(texts)


def demo_text(part: DemoPart) -> str:
    """The documentation topics that come with every CPython, in two parts that share no topic.

    Topics are taken in the order of their names and joined with a blank line. The first 70 % of the characters are for
    calibration, cut at the boundary of a topic that is nearest; the rest is for evaluation. The text differs a little
    from one Python version to the next: a comparison needs the same one.
    """
    from pydoc_data.topics import topics

    documents = [topics[key].strip() for key in sorted(topics)]
    ends = []
    total = 0
    for document in documents:
        total += len(document)
        ends.append(total)
    cut = min(range(1, len(documents)), key=lambda count: abs(ends[count - 1] - 0.7 * total))
    if part == "calibration":
        return BETWEEN_DOCUMENTS.join(documents[:cut])
    if part == "evaluation":
        return BETWEEN_DOCUMENTS.join(documents[cut:])
    raise LexigramError(f"the demo text has no part {part!r}; use 'calibration' or 'evaluation'")


def _read_file(path: Path, most: int | None) -> str:
    """The text of one file, by its suffix; about the first `most` characters of it."""
    packed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if packed else path.name).suffix.lower()
    if path.is_dir():
        raise LexigramError(f"{path} is a directory, not a text file; name the files in it one by one")
    if suffix not in (*PLAIN_SUFFIXES, *LINES_SUFFIXES):
        raise LexigramError(
            f"{path} has the suffix {suffix!r}, which is not known here; use plain text (.txt, .raw), .jsonl with a "
            "field `text`, either with .gz, the word `demo`, or hub:NAME for a hub data set"
        )
    if not path.exists():
        raise LexigramError(f"there is no file {path} (the working directory is {Path.cwd()}); check the path")
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            data = file.read(-1 if most is None else 4 * most)  # bytes, of which a character has four at most
            cut = bool(file.read(1))
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=not cut)
    except UnicodeDecodeError as error:
        raise LexigramError(
            f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; convert the file to UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LexigramError(f"{path} cannot be unpacked: {error}; fetch or write it again") from error
    except OSError as error:
        raise LexigramError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from error
    if suffix in LINES_SUFFIXES:
        documents = _json_lines(path, _whole_lines(text, len(text) - 1) if cut else text)
        text = BETWEEN_DOCUMENTS.join(_until(documents, most))
    elif most is not None:
        text = _whole_lines(text, most)
    if not text.strip():
        raise LexigramError(f"{path} holds no text; name a file with text in it")
    return text


def _whole_lines(text: str, most: int) -> str:
    """The lines that are whole within the first `most` characters; so many characters where there is none."""
    if len(text) <= most:
        return text
    return text[: text.rfind("\n", 0, most) + 1] or text[:most]


def _json_lines(path: Path, content: str) -> Iterator[str]:
    """The `text` fields of a JSON-lines file. Lines end at \\n only: JSON strings may hold other line separators."""
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise LexigramError(
                f"{where} is not JSON: {error.msg} at column {error.colno}; write one JSON object a line"
            ) from error
        if not isinstance(record, dict):
            raise LexigramError(
                f'{where} is a JSON {type(record).__name__}, not an object; write {{"text": "..."}} on each line'
            )
        yield _text_field(record, where)


def _text_field(record: dict[str, Any], where: str) -> str:
    """The string in a record's field `text`."""
    if "text" not in record:
        found = ", ".join(repr(key) for key in record) or "none"
        raise LexigramError(f"{where} has no field 'text' (its fields: {found}); rename the field to 'text'")
    text = record["text"]
    if not isinstance(text, str):
        raise LexigramError(f"{where}: the field 'text' is a {type(text).__name__}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LexigramError(
            f"{where}: the field 'text' holds half of a surrogate pair at character {error.start}; mend the text"
        ) from error
    return text


def _read_hub(name: str, limit: int) -> str:
    """The column `text` of a hub data set, until `limit` characters are reached."""
    parts = name.removeprefix("hub:").split(":")
    if len(parts) > 3 or not parts[0]:
        raise LexigramError(
            f"{name!r} does not name a hub data set; write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT"
        )
    data_set, config, split = (*parts, "", "")[:3]
    split = split or "train"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise LexigramError(
            f"{name!r} needs the package `datasets`, which is not installed; run: pip install 'lexigram[hub-data]'"
        ) from error
    try:
        rows = load_dataset(data_set, config or None, split=split, streaming=True)
        documents = (_text_field(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1))
        text = BETWEEN_DOCUMENTS.join(_until(documents, limit))
    except LexigramError:
        raise
    except Exception as error:  # whatever `datasets` or the network raises: no common class
        raise LexigramError(
            f"{name!r} could not be read: {type(error).__name__}: {error}; check the name, the configuration "
            f"{config or '(the default)'!s}, the split {split!r} and the network, or name a file"
        ) from error
    if not text.strip():
        raise LexigramError(f"{name!r} holds no text in its split {split!r}; name another split or data set")
    return text


def _until(documents: Iterable[str], limit: int | None) -> Iterator[str]:
    """The documents up to the one that reaches `limit` characters."""
    characters = 0
    for text in documents:
        yield text
        characters += len(text)
        if limit is not None and characters >= limit:
            return
