"""Fixed batches of tokens, known by a hash of their content: text tokenised and cut into windows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lexigram.errors import LexigramError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
                f"token sequences need an int64 tensor (sequences, length) that is not empty, and this one is "
                f"{self.ids.dtype} {tuple(self.ids.shape)}; convert it with .to(torch.int64) and give it two axes"
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


def leading_tokens(tokenizer: PreTrainedTokenizerBase, bos: bool) -> torch.Tensor:
    """What a window begins with before its text, int64, (0,) or, with `bos`, (1,).

    Raises:
        LexigramError: where the tokenizer has no such token.
    """
    if not bos:
        return torch.tensor([], dtype=torch.int64)
    if tokenizer.bos_token_id is None:
        raise LexigramError(
            f"the tokenizer ({tokenizer.name_or_path}) has no BOS token to begin windows with; leave out bos"
        )
    return torch.tensor([tokenizer.bos_token_id], dtype=torch.int64)


def token_sequences(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    sequences: int,
    length: int,
    seed: int,
    *,
    bos: bool = False,
    source: str = "text",
) -> TokenSequences:
    """Choose `sequences` windows of `length` tokens from the text.

    The whole text is tokenised without special tokens and cut into consecutive windows that do not overlap; a last
    shorter one is left out. The windows are drawn without replacement by a generator seeded with `seed`, and kept in
    the order of the text. With `bos` the first of a window's tokens is BOS. `source` names the text in the result's
    description.
    """
    check_at_least("sequences", sequences, 1)
    check_at_least("length", length, 2)
    ids = token_ids(tokenizer, text)
    first = leading_tokens(tokenizer, bos)
    lead = len(first)
    own = length - lead
    available = ids.numel() // own
    if available < sequences:
        if available:
            fits = f"{available} sequences of {length}"
            if ids.numel() // sequences + lead >= 2:
                fits += f" or {sequences} of {ids.numel() // sequences + lead}"
        else:
            fits = f"one sequence of {ids.numel() + lead}" if ids.numel() + lead >= 2 else "nothing"
        raise LexigramError(
            f"the text ({source}) has {ids.numel()} tokens, too few for {sequences} sequences of {length} "
            f"({sequences * own} tokens), and what fits is {fits}; give more text, or fewer or shorter sequences"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:sequences].sort().values
    table = ids[: available * own].view(available, own)[chosen]
    told = f"{source}: {sequences} of {available} windows of {length} tokens, seed {seed}"
    return TokenSequences(
        torch.cat([first.expand(sequences, lead), table], dim=1), f"{told}, BOS first" if bos else told
    )


def check_at_least(name: str, value: int, least: int) -> None:
    """Refuse a count below its least value."""
    if value < least:
        raise LexigramError(f"{name} is {value}; it must be at least {least}")
