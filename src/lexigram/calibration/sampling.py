"""Calibration without data: sequences sampled from the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lexigram.calibration.tokens import TokenSequences, check_at_least
from lexigram.errors import LexigramError
from lexigram.running import Progress, check_context, plain_generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    check_at_least("sequences", sequences, 1)
    check_at_least("length", length, 2)
    check_at_least("batch", batch, 1)
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
                f"the start token {bos} is outside the model's vocabulary of {vocabulary}; use the model's own "
                "tokenizer"
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
                f"the model's logits for token {input_ids.shape[1]} of a sampled sequence are not finite; load the "
                "model in float32 or bfloat16, or calibrate on text; if it still fails, its weights are broken"
            )
        return scores - torch.empty_like(scores).exponential_(generator=self.generator).log_()
