"""Text to fixed batches of tokens, each batch known by a hash of its content.

Here text is found (files, the demo text that comes with Python, a hub data set), tokenised and cut into windows; or the
tokens are sampled from the model itself. Nothing here knows about weights, Grams or methods.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lexigram.errors import LexigramError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

DemoPart = Literal["calibration", "evaluation"]
"""Which part of the demo text: the first 70 % or the rest."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all) after every step."""

PLAIN_SUFFIXES = (".txt", ".raw")
BETWEEN_DOCUMENTS = "\n\n"
HUB_CHARACTERS = 20_000_000


# ---------------------------------------------------------------------------------------------------------------- text


def read_texts(
    names: Sequence[str], *, demo_part: DemoPart = "calibration", hub_characters: int = HUB_CHARACTERS
) -> str:
    """Read the named texts, in the order given, with a blank line between them.

    A name is one of:

    - a path to a `.txt` or `.raw` file, UTF-8, taken as it stands (a leading byte order mark is dropped);
    - a path to a `.jsonl` file, one JSON object a line with a string field `text`; blank lines are skipped, and the
      documents are joined with a blank line;
    - `demo`: the part `demo_part` of Python's own documentation topics (see `demo_text`);
    - `hub:NAME[:CONFIG[:SPLIT]]`: the column `text` of a hub data set, streamed in its own order through the optional
      package `datasets`, until `hub_characters` characters are reached. SPLIT is `train` unless given; CONFIG may be
      empty (`hub:NAME::test`).
    """
    if isinstance(names, str):
        names = [names]
    if not names:
        raise LexigramError("No text was named. Name a .txt or .jsonl file, `demo`, or hub:NAME.")
    texts = []
    for name in names:
        if name == "demo":
            texts.append(demo_text(demo_part))
        elif name.startswith("hub:"):
            texts.append(_read_hub(name, hub_characters))
        else:
            texts.append(_read_file(Path(name).expanduser()))
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
    raise LexigramError(f"The demo text has no part {part!r}. Use 'calibration' or 'evaluation'.")


def _read_file(path: Path) -> str:
    """The text of one file, by its suffix."""
    suffix = path.suffix.lower()
    if path.is_dir():
        raise LexigramError(f"{path} is a directory, not a text file. Name the files in it one by one.")
    if suffix not in (*PLAIN_SUFFIXES, ".jsonl"):
        raise LexigramError(
            f"{path} has the suffix {suffix!r}, which is not known here. Use plain text (.txt, .raw), .jsonl with a "
            "field `text`, the word `demo`, or hub:NAME for a hub data set."
        )
    if not path.exists():
        raise LexigramError(f"There is no file {path}. Check the path; the working directory is {Path.cwd()}.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LexigramError(
            f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}. Convert the file to UTF-8."
        ) from error
    except OSError as error:
        raise LexigramError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    if suffix == ".jsonl":
        text = BETWEEN_DOCUMENTS.join(_json_lines(path, text))
    if not text.strip():
        raise LexigramError(f"{path} holds no text. Name a file with text in it.")
    return text


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
                f"{where} is not JSON: {error.msg} at column {error.colno}. Write one JSON object a line."
            ) from error
        if not isinstance(record, dict):
            raise LexigramError(
                f'{where} is a JSON {type(record).__name__}, not an object. Write {{"text": "..."}} on each line.'
            )
        yield _text_field(record, where)


def _text_field(record: dict[str, Any], where: str) -> str:
    """The string in a record's field `text`."""
    if "text" not in record:
        found = ", ".join(repr(key) for key in record) or "none"
        raise LexigramError(f"{where} has no field 'text' (its fields: {found}). Rename the field to 'text'.")
    text = record["text"]
    if not isinstance(text, str):
        raise LexigramError(f"{where}: the field 'text' is a {type(text).__name__}. It must be a string.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LexigramError(
            f"{where}: the field 'text' holds half of a surrogate pair at character {error.start}. Mend the text."
        ) from error
    return text


def _read_hub(name: str, limit: int) -> str:
    """The column `text` of a hub data set, until `limit` characters are reached."""
    parts = name.removeprefix("hub:").split(":")
    if len(parts) > 3 or not parts[0]:
        raise LexigramError(
            f"{name!r} does not name a hub data set. Write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT."
        )
    data_set, config, split = (*parts, "", "")[:3]
    split = split or "train"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise LexigramError(
            f"{name!r} needs the package `datasets`, which is not installed. Run: pip install 'lexigram[hub-data]'"
        ) from error
    try:
        rows = load_dataset(data_set, config or None, split=split, streaming=True)
        text = BETWEEN_DOCUMENTS.join(_until(rows, limit, name))
    except LexigramError:
        raise
    except Exception as error:  # whatever `datasets` or the network raises: no common class
        raise LexigramError(
            f"{name!r} could not be read: {type(error).__name__}: {error}. Check the name, the configuration "
            f"{config or '(the default)'!s}, the split {split!r} and the network, or name a file."
        ) from error
    if not text.strip():
        raise LexigramError(f"{name!r} holds no text in its split {split!r}. Name another split or data set.")
    return text


def _until(rows: Iterable[dict[str, Any]], limit: int, name: str) -> Iterator[str]:
    """Texts of the rows up to the one that reaches `limit` characters."""
    characters = 0
    for number, row in enumerate(rows, start=1):
        text = _text_field(row, f"{name}, row {number}")
        yield text
        characters += len(text)
        if characters >= limit:
            return


# -------------------------------------------------------------------------------------------------------------- tokens


def token_hash(ids: torch.Tensor) -> str:
    """SHA-256 of a table of token ids: its shape as the text `ROWSxCOLUMNS:`, then little-endian int32 by rows."""
    rows, columns = ids.shape
    digest = hashlib.sha256(f"{rows}x{columns}:".encode("ascii"))
    digest.update(ids.detach().cpu().contiguous().numpy().astype("<i4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class TokenSequences:
    """Token sequences of one length, with the hash of their content and a line on where they come from.

    Two of these are equal when their hashes and sources are.
    """

    ids: torch.Tensor = field(compare=False)  # int64, (sequences, length), on the CPU
    source: str
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64 or self.ids.numel() == 0:
            raise LexigramError(
                f"Token sequences need an int64 tensor (sequences, length) that is not empty; this one is "
                f"{self.ids.dtype} {tuple(self.ids.shape)}. Convert it with .to(torch.int64) and give it two axes."
            )
        object.__setattr__(self, "ids", self.ids.detach().cpu().contiguous())
        object.__setattr__(self, "sha256", token_hash(self.ids))

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens in each sequence."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.ids.numel()


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The whole text as one int64 row of token ids, no special tokens added, no warning on its length."""
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def token_sequences(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    sequences: int,
    length: int,
    seed: int,
    *,
    source: str = "text",
) -> TokenSequences:
    """Choose `sequences` windows of `length` tokens from the text.

    The whole text is tokenised without special tokens and cut into consecutive windows that do not overlap; a last
    shorter one is left out. The windows are drawn without replacement by a generator seeded with `seed`, and kept in
    the order of the text. `source` names the text in the result's description.
    """
    _check_at_least("sequences", sequences, 1)
    _check_at_least("length", length, 2)
    ids = token_ids(tokenizer, text)
    available = ids.numel() // length
    if available < sequences:
        if available:
            fits = f"{available} sequences of {length}"
            if ids.numel() // sequences >= 2:
                fits += f" or {sequences} of {ids.numel() // sequences}"
        else:
            fits = f"one sequence of {ids.numel()}" if ids.numel() >= 2 else "nothing"
        raise LexigramError(
            f"The text ({source}) has {ids.numel()} tokens, too few for {sequences} sequences of {length} "
            f"({sequences * length} tokens). What fits: {fits}. Give more text, or fewer or shorter sequences."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:sequences].sort().values
    table = ids[: available * length].view(available, length)[chosen]
    return TokenSequences(table, f"{source}: {sequences} of {available} windows of {length} tokens, seed {seed}")


def sample_sequences(
    model: PreTrainedModel,
    start: PreTrainedTokenizerBase | int | None,
    sequences: int,
    length: int,
    seed: int,
    *,
    batch: int = 8,
    progress: Progress | None = None,
) -> TokenSequences:
    """Sample `sequences` sequences of `length` tokens from the model itself.

    Each begins with the tokenizer's BOS token (or the id given as `start`); without one (a tokenizer that has none, or
    None) with a token drawn evenly from the vocabulary, special tokens of the tokenizer excepted. The following
    `length - 1` tokens are drawn from the model's own distribution: temperature 1, nothing cut off, nothing penalised,
    whatever the model's generation settings say. An end-of-sequence token does not end a sequence.

    The same model, seed, batch and device give the same tokens. The global random state is neither used nor changed.
    """
    from transformers import GenerationConfig

    _check_at_least("sequences", sequences, 1)
    _check_at_least("length", length, 2)
    _check_at_least("batch", batch, 1)
    check_context(model, length, "length")
    first = _first_tokens(model, start, sequences, seed)
    settings = GenerationConfig(do_sample=False, max_new_tokens=length - 1, use_cache=True)
    draw = _Draw(torch.Generator(model.device).manual_seed(seed))
    parts = []
    for begin in range(0, sequences, batch):
        parts.append(plain_generate(model, first[begin : begin + batch], settings, [draw]))
        if progress is not None:
            progress(min(begin + batch, sequences), sequences)
    ids = torch.cat(parts)
    return TokenSequences(ids, f"self: {sequences} sequences of {length} tokens sampled from the model, seed {seed}")


def _first_tokens(
    model: PreTrainedModel, start: PreTrainedTokenizerBase | int | None, sequences: int, seed: int
) -> torch.Tensor:
    """The first token of each sequence, (sequences, 1)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    special: set[int] = set()
    if start is None or isinstance(start, int):
        bos = start
    else:
        bos = start.bos_token_id
        vocabulary = min(vocabulary, len(start))
        special = set(start.all_special_ids)
    if bos is not None:
        if not 0 <= bos < vocabulary:
            raise LexigramError(
                f"The start token {bos} is outside the model's vocabulary of {vocabulary}. Use the model's own "
                "tokenizer."
            )
        return torch.full((sequences, 1), bos, dtype=torch.int64)
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special], dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    return ordinary[torch.randint(len(ordinary), (sequences, 1), generator=generator)]


class _Draw:
    """A logits processor that turns the likeliest token into a draw from the model's distribution, by Gumbel noise.

    argmax(logits + noise) is distributed as softmax(logits), and the randomness is the generator's own: the global
    random state has no part in it.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.amax(dim=-1).isfinite().all():
            raise LexigramError(
                f"The model's logits for token {input_ids.shape[1]} of a sampled sequence are not finite. Load the "
                "model in float32 or bfloat16, or calibrate on text; if it still fails, its weights are broken."
            )
        return scores - torch.empty_like(scores).exponential_(generator=self.generator).log_()


# --------------------------------------------------------------------------------------------------- running a model


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; each module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def plain_generate(
    model: PreTrainedModel, ids: torch.Tensor, settings: GenerationConfig, processors: Sequence[Any] = ()
) -> torch.Tensor:
    """`model.generate` from `ids` (batch, length) by `settings` and `processors`, and nothing else; on the CPU.

    What `settings` leaves unset would be filled from the model's generation settings (a repetition penalty, an
    end-of-sequence token). So these are set aside for the call.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    ids = ids.to(model.device)
    published = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with inference(model):
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=LogitsProcessorList(processors),
            ).cpu()
    finally:
        model.generation_config = published


def check_context(model: PreTrainedModel, tokens: int, what: str) -> None:
    """Refuse more tokens in one go than the model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise LexigramError(
            f"{what} {tokens} is more than the {positions} positions of the model "
            f"({type(model).__name__}, max_position_embeddings). Use {what} {positions} or less."
        )


def _check_at_least(name: str, value: int, least: int) -> None:
    """Refuse a count below its least value."""
    if value < least:
        raise LexigramError(f"{name} is {value}. It must be at least {least}.")
