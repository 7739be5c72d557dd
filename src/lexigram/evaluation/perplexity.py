"""Perplexity of a model on a text, and its distance from a reference model, window and stride stated.

Not here: tasks, speed, and where the text comes from.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict

from lexigram.calibration.tokens import leading_tokens, token_ids
from lexigram.errors import LexigramError
from lexigram.losses import CHUNK_ELEMENTS
from lexigram.running import Progress, check_context, inference, plain_generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Evaluation(BaseModel):
    """What `evaluate` measured; logarithms are natural unless named bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_perplexity: float
    """exp of the mean negative log-likelihood of a scored token."""
    word_perplexity: float
    """exp of the summed negative log-likelihood divided by `words`; infinite where that is beyond a float."""
    bits_per_byte: float
    """The summed negative log-likelihood in bits, divided by the UTF-8 bytes of the decoded scored tokens."""
    negative_log_likelihood: float
    """Mean over the scored tokens, in nats."""
    standard_error: float | None
    """Of `negative_log_likelihood`, from its spread between windows; None with a single window."""
    tokens: int
    """Scored tokens."""
    words: int
    """Whitespace-separated words of the decoded scored tokens."""
    context: int
    """Tokens of a window."""
    stride: int
    """Tokens from one window's beginning to the next one's."""
    windows: int
    """Windows evaluated, a last shorter one included."""
    bos: bool = False
    """Whether every window begins with the BOS token, one of its `context` tokens, so that all of its text is scored."""
    kl: float | None
    """Mean over the scored tokens of KL(reference || model) in nats; None without a reference."""
    top1_agreement: float | None
    """Share of scored positions where model and reference put the same token first; None without a reference."""
    seconds: float
    """Wall-clock time, tokenising included."""


@dataclass(frozen=True)
class _Window:
    """Tokens `begin:end` of the text are read; of these `scored:end` are scored, which no window before has scored."""

    begin: int
    scored: int
    end: int


@dataclass(frozen=True)
class _Score:
    """What a window came to, summed over its scored tokens."""

    tokens: int
    likelihood: float
    """The negative log-likelihood in nats."""
    divergence: float = 0.0
    """KL(reference || model) in nats."""
    agreeing: int = 0
    """Positions where model and reference put the same token first."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int = 1024,
    stride: int | None = None,
    windows: int | None = None,
    bos: bool = False,
    reference: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the model's perplexity on the text and, given a reference, its distance from that.

    The whole text is tokenised without special tokens and read in windows of `context` tokens that begin every
    `stride` tokens. Without a stride the windows follow each other without overlap, and the first token of each is not
    scored, since nothing comes before it. With a smaller stride each window scores the tokens that no window before it
    has scored, so that only the first token of the text is left out. `windows` keeps the first so many; the last
    window, shorter than the others, is used only when the whole text is, and has at least two tokens.

    With `bos` every window begins with the BOS token, one of its `context` tokens, and the first token of its text is
    scored as well. Figures in papers are mostly without, from one long row of tokens that is cut into windows; but some
    models (Gemma) make no sense of a text that begins otherwise.

    `tokens` counts scored tokens. `words` counts the whitespace-separated words of the scored tokens decoded in one
    piece: punctuation set apart by spaces counts as words, and a word whose first token opens a window without overlap
    is joined to the word before it.

    Both models run in their own dtype on their own device, without a cache; logits are turned to float32 some rows at
    a time and summed in float64. Progress is called with (windows done, windows in all).
    """
    began = time.perf_counter()
    check_windowing(context, stride, windows)
    first = leading_tokens(tokenizer, bos)
    own = context - len(first)
    stride = min(own, stride or own)
    for each in (model, reference):
        if each is not None:
            check_context(each, context, "context")
    ids = token_ids(tokenizer, text)
    _check_tokens(ids, model)
    plan = _plan_windows(ids.numel(), own, stride, unscored=1 - len(first))[:windows]

    scores = []
    for number, window in enumerate(plan):
        scores.append(_score(model, reference, ids, window, number, first))
        if progress is not None:
            progress(number + 1, len(plan))
    words, size = _words_and_bytes(tokenizer, ids, plan)
    likelihoods, counts = [score.likelihood for score in scores], [score.tokens for score in scores]
    total, tokens = math.fsum(likelihoods), sum(counts)
    return Evaluation(
        token_perplexity=_exp(total / tokens),
        word_perplexity=_exp(total / words),
        bits_per_byte=total / math.log(2) / size,
        negative_log_likelihood=total / tokens,
        standard_error=_standard_error(likelihoods, counts),
        tokens=tokens,
        words=words,
        context=context,
        stride=stride,
        windows=len(plan),
        bos=bos,
        kl=None if reference is None else sum(score.divergence for score in scores) / tokens,
        top1_agreement=None if reference is None else sum(score.agreeing for score in scores) / tokens,
        seconds=time.perf_counter() - began,
    )


def greedy_sentence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 32,
    *,
    chat: bool = False,
) -> str:
    """What the model says after the prompt, the likeliest token each time; the prompt itself is not returned.

    With `chat` the prompt is put as a user's message through the tokenizer's chat template. Otherwise it is tokenised
    as the tokenizer does by itself, special tokens included. Ends at the model's end-of-sequence token; no other of its
    generation settings is heeded (no repetition penalty). Special tokens are left out of the answer.
    """
    from transformers import GenerationConfig

    if max_new_tokens < 1:
        raise LexigramError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if chat:
        if not tokenizer.chat_template:
            raise LexigramError(
                f"the tokenizer ({tokenizer.name_or_path}) has no chat template; ask without `chat`, or use the "
                "tokenizer of a chat model"
            )
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt")["input_ids"].to(torch.int64)
    if ids.shape[1] == 0:
        raise LexigramError(f"the prompt {prompt!r} has no tokens; give a prompt of a word or more")
    check_context(model, ids.shape[1] + max_new_tokens, "prompt plus max_new_tokens")
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    pad = end[0] if isinstance(end, list) else end
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=pad, use_cache=True
    )
    said = plain_generate(model, ids, settings)[0].tolist()
    # Decoded with the prompt and cut, as some tokenizers drop the space at the beginning of what they decode.
    head = tokenizer.decode(said[: ids.shape[1]], skip_special_tokens=True)
    whole = tokenizer.decode(said, skip_special_tokens=True)
    if whole.startswith(head):
        return whole[len(head) :]
    return tokenizer.decode(said[ids.shape[1] :], skip_special_tokens=True)


def check_windowing(context: int, stride: int | None = None, windows: int | None = None) -> None:
    """Refuse a context, stride or number of windows that cannot be, before anything is opened.

    Args:
        context: tokens of a window.
        stride: tokens between windows' beginnings; None for the context.
        windows: how many are used; None for all.

    Raises:
        LexigramError: naming the value and what would do.
    """
    if context < 2:
        raise LexigramError(f"context is {context}; it must be at least 2: a token to read and a token to score")
    if stride is not None and not 1 <= stride <= context:
        raise LexigramError(
            f"stride is {stride} with context {context}; it must be from 1 to {context}: beyond it, text is skipped"
        )
    if windows is not None and windows < 1:
        raise LexigramError(f"windows is {windows}; it must be at least 1, or None for the whole text")


def _check_tokens(ids: torch.Tensor, model: PreTrainedModel) -> None:
    """Refuse a text that is too short, or tokens that the model does not know."""
    if ids.numel() < 2:
        raise LexigramError(f"the text has {ids.numel()} tokens, and scoring needs at least 2; give more text")
    largest, vocabulary = int(ids.max()), model.config.get_text_config().vocab_size
    if largest >= vocabulary:
        raise LexigramError(
            f"the tokenizer gives the token {largest}, but the model's vocabulary has {vocabulary} entries; use the "
            "model's own tokenizer"
        )


def _plan_windows(tokens: int, context: int, stride: int, unscored: int = 1) -> list[_Window]:
    """The windows over a text of `tokens` tokens, the last one possibly shorter than `context`; of each, so many tokens at the
    beginning have nothing before them.
    """
    plan: list[_Window] = []
    begin = reached = 0
    while reached < tokens and tokens - begin > unscored:
        end = min(begin + context, tokens)
        plan.append(_Window(begin, max(begin + unscored, reached), end))
        begin, reached = begin + stride, end
    return plan


def _score(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    ids: torch.Tensor,
    window: _Window,
    number: int,
    first: torch.Tensor,
) -> _Score:
    """Run the window, the plan's `number`th, through the model and, where there is one, the reference."""
    where = f"window {number} (tokens {window.begin} to {window.end - 1})"
    logits = _logits(model, ids, window, first)
    targets = ids[window.scored : window.end].to(logits.device)
    likelihood = _negative_log_likelihood(logits, targets)
    if not math.isfinite(likelihood):
        raise LexigramError(
            f"the loss in {where} is {likelihood}: the model ({model.dtype}) gives values that are not finite; "
            "load it in float32 or bfloat16; if it still fails, its weights are broken"
        )
    if reference is None:
        return _Score(targets.numel(), likelihood)
    other = _logits(reference, ids, window, first)
    if other.shape != logits.shape:
        raise LexigramError(
            f"the model's vocabulary has {logits.shape[-1]} entries and the reference's {other.shape[-1]}; use "
            "the model that this one was made from as the reference"
        )
    divergence, agreeing = _compare(logits, other)
    if not math.isfinite(divergence):
        raise LexigramError(
            f"KL(reference || model) in {where} is {divergence}: the reference ({reference.dtype}) gives values that "
            "are not finite, or the model rules out a token that the reference does not; load both in float32"
        )
    return _Score(targets.numel(), likelihood, divergence, agreeing)


def _words_and_bytes(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, plan: list[_Window]) -> tuple[int, int]:
    """Whitespace-separated words and UTF-8 bytes of the scored tokens, decoded in one piece."""
    scored = torch.cat([ids[window.scored : window.end] for window in plan])
    decoded = tokenizer.decode(scored.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    words = len(decoded.split())
    if not words:
        raise LexigramError(
            f"the scored text, {scored.numel()} tokens, holds no word, only whitespace; give text with words"
        )
    return words, len(decoded.encode("utf-8"))


def _logits(model: PreTrainedModel, ids: torch.Tensor, window: _Window, first: torch.Tensor) -> torch.Tensor:
    """The logits that predict the window's scored tokens, (scored, vocabulary), in the model's dtype."""
    tokens = torch.cat([first, ids[window.begin : window.end]]).unsqueeze(0).to(model.device)
    with inference(model):
        logits = model(input_ids=tokens, use_cache=False).logits
    return logits[0, window.scored - window.end - 1 : -1]


def _rows(logits: torch.Tensor) -> list[slice]:
    """Slices of rows, each of at most `CHUNK_ELEMENTS` logits (one row at least)."""
    step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return [slice(begin, begin + step) for begin in range(0, logits.shape[0], step)]


def _negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Summed over the rows, in nats."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in _rows(logits):
        losses = torch.nn.functional.cross_entropy(logits[rows].float(), targets[rows], reduction="none")
        total += losses.cpu().double().sum()
    return total.item()


def _compare(logits: torch.Tensor, reference: torch.Tensor) -> tuple[float, int]:
    """KL(reference || model) summed over the rows in nats, and the rows where both put the same token first."""
    divergence, agreeing = torch.zeros((), dtype=torch.float64), 0
    for rows in _rows(logits):
        model_log = torch.log_softmax(logits[rows].float(), dim=-1)
        reference_log = torch.log_softmax(reference[rows].to(logits.device).float(), dim=-1)
        agreeing += int((model_log.argmax(dim=-1) == reference_log.argmax(dim=-1)).sum())
        probability = reference_log.exp()
        terms = probability * (reference_log - model_log)
        # 0 log 0 = 0: tokens that the reference rules out add nothing.
        terms = terms.masked_fill_(probability == 0, 0.0)
        divergence += terms.sum(dim=-1).cpu().double().sum()
    return divergence.item(), agreeing


def _standard_error(sums: list[float], counts: list[int]) -> float | None:
    """Of the ratio sum(sums) / sum(counts), the windows taken as independent draws.

    With windows of equal counts this is the standard deviation of their means (n - 1) over the square root of n.
    """
    n, tokens = len(sums), sum(counts)
    if n < 2:
        return None
    mean = math.fsum(sums) / tokens
    spread = math.fsum((total - mean * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return math.sqrt(spread * n / (n - 1)) / tokens


def _exp(value: float) -> float:
    """The exponential, infinite where it is beyond a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
