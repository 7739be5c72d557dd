"""Perplexity against one naive pass, a brute-force loop and torch.distributions; a real small model where present."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from conftest import byte_tokenizer
from lexigram.calibration.tokens import token_ids
from lexigram.errors import LexigramError
from lexigram.evaluation import Evaluation, evaluate, greedy_sentence, perplexity

TEXT = "The cat sat on the mat, and the dog looked on from under the table. So it goes."


def tiny_model(seed: int = 0, vocabulary: int = 257) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.4,
            eos_token_id=256,
        )
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model()


@torch.no_grad()
def naive_logits(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Logits that predict tokens 1, 2, ... of the text, the text in one window."""
    return model(token_ids(tokenizer, text)[None]).logits[0, :-1].double()


@torch.no_grad()
def brute_force(model: LlamaForCausalLM, ids: torch.Tensor, context: int, stride: int) -> dict[int, float]:
    """Each scored token's loss, token by token: the first window that holds a token after its first one scores it."""
    losses = {}
    for target in range(1, len(ids)):
        begins = [b for b in range(0, len(ids), stride) if b < target < b + context]
        if not begins:
            continue
        logits = model(ids[None, begins[0] : target]).logits[0, -1].double()
        losses[target] = -logits.log_softmax(0)[ids[target]].item()
    return losses


# ----------------------------------------------------------------------------------------------------------- likelihood


def test_one_window_agrees_with_cross_entropy_in_one_go(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    result = evaluate(model, tokenizer, TEXT, context=128)
    targets = token_ids(tokenizer, TEXT)[1:]
    losses = torch.nn.functional.cross_entropy(naive_logits(model, tokenizer, TEXT), targets, reduction="none")
    total = losses.sum().item()
    assert result.negative_log_likelihood == pytest.approx(losses.mean().item(), rel=1e-5)
    assert result.token_perplexity == pytest.approx(math.exp(losses.mean().item()), rel=1e-4)
    assert result.word_perplexity == pytest.approx(math.exp(total / len(TEXT.split())), rel=1e-3)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / len(targets), rel=1e-5)
    assert (result.tokens, result.words, result.windows) == (len(targets), len(TEXT.split()), 1)
    assert (result.context, result.stride) == (128, 128)
    assert result.standard_error is result.kl is result.top1_agreement is None
    assert result.seconds > 0


@pytest.mark.parametrize(
    ("context", "stride"), [(16, None), (16, 16), (16, 8), (16, 5), (16, 2), (2, 1), (2, 2), (40, 10)]
)
def test_windows_and_strides_agree_with_a_loop_over_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, context: int, stride: int | None
) -> None:
    text = TEXT[:41]
    result = evaluate(model, tokenizer, text, context=context, stride=stride)
    losses = brute_force(model, token_ids(tokenizer, text), context, stride or context)
    assert result.tokens == len(losses)
    assert result.negative_log_likelihood == pytest.approx(sum(losses.values()) / len(losses), rel=1e-4)


@pytest.mark.parametrize(("context", "stride"), [(16, None), (16, 16), (16, 15), (16, 5), (2, 1), (100, 9)])
@torch.no_grad()
def test_windows_may_begin_with_bos(model: LlamaForCausalLM, context: int, stride: int | None) -> None:
    """Every token of the text is scored, by the first window that holds it, after BOS and what the window has before it."""
    tokenizer = byte_tokenizer(bos_token="</s>")
    bos, ids = torch.tensor([tokenizer.bos_token_id]), token_ids(tokenizer, TEXT)
    found = evaluate(model, tokenizer, TEXT, context=context, stride=stride, bos=True)
    own = context - 1
    assert (found.bos, found.tokens, found.stride) == (True, len(ids), min(own, stride or own))
    total = 0.0
    for target in range(len(ids)):
        begin = next(b for b in range(0, len(ids), found.stride) if b <= target < b + own)
        logits = model(torch.cat([bos, ids[begin:target]])[None]).logits[0, -1].double()
        total -= logits.log_softmax(0)[ids[target]].item()
    assert found.negative_log_likelihood == pytest.approx(total / len(ids), rel=1e-4)
    with pytest.raises(LexigramError, match="has no BOS token"):
        evaluate(model, byte_tokenizer(), TEXT, context=16, bos=True)


def test_the_first_windows_are_the_text_cut_there(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    part = evaluate(model, tokenizer, TEXT, context=16, windows=3)
    cut = evaluate(model, tokenizer, TEXT[:48], context=16)
    unlike = {"seconds"}
    assert part.model_dump(exclude=unlike) == cut.model_dump(exclude=unlike)
    assert (part.windows, part.tokens) == (3, 45)
    # 79 tokens: four full windows and one of 15, used only when the whole text is.
    assert len(TEXT) == 79
    assert [evaluate(model, tokenizer, TEXT, context=16, windows=n).tokens for n in (4, 5, 6, None)] == [60, 74, 74, 74]
    assert evaluate(model, tokenizer, TEXT[:65], context=16).windows == 4  # a last window of one token scores nothing


@given(st.integers(2, 200), st.integers(2, 40), st.data())
@settings(max_examples=100, deadline=None)
def test_a_plan_scores_each_token_once(tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    plan = perplexity._plan_windows(tokens, context, stride)
    scored = [token for window in plan for token in range(window.scored, window.end)]
    skipped = set(range(0, tokens, context)) if stride == context else {0}
    assert scored == [token for token in range(tokens) if token not in skipped]
    assert [window.begin for window in plan] == list(range(0, len(plan) * stride, stride))
    assert all(window.end - window.begin == context for window in plan[:-1])
    assert all(window.begin < window.scored < window.end for window in plan)


def test_a_model_that_knows_nothing_has_the_vocabulary_for_perplexity(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    model.lm_head.weight.data.zero_()
    result = evaluate(model, tokenizer, TEXT, context=16, stride=12)
    assert result.token_perplexity == pytest.approx(257, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)
    assert result.standard_error == pytest.approx(0, abs=1e-7)


def test_the_standard_error_is_that_of_the_mean_over_windows(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    means = [evaluate(model, tokenizer, TEXT[b : b + 16], context=16).negative_log_likelihood for b in range(0, 64, 16)]
    result = evaluate(model, tokenizer, TEXT, context=16, windows=4)
    assert result.negative_log_likelihood == pytest.approx(sum(means) / 4)
    assert result.standard_error == pytest.approx(torch.tensor(means).double().std().item() / 2)


def test_words_are_counted_in_the_scored_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "ab  cd\n\nef gå , ij"  # in windows of 4: [ab__][cd\n\n][ef_g][å_,][_ij], a token a byte
    assert evaluate(model, tokenizer, text, context=64).words == 6
    assert evaluate(model, tokenizer, text, context=4, stride=3).words == 6
    assert evaluate(model, tokenizer, "a </s> b", context=8).words == 2  # special tokens in the text are text
    assert evaluate(model, tokenizer, "a b", context=8).words == 1  # the first token is not scored
    with pytest.raises(LexigramError, match="2 tokens, holds no word"):
        evaluate(model, tokenizer, "a  ", context=8)


def test_many_nats_a_word_are_infinite_not_an_error(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    result = evaluate(model, tokenizer, "abcdefgh" * 60, context=128)
    assert result.words == 1
    assert result.word_perplexity == math.inf
    assert math.isfinite(result.token_perplexity)


# ------------------------------------------------------------------------------------------------------------ reference


def test_a_model_agrees_with_itself(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    result = evaluate(model, tokenizer, TEXT, context=32, reference=model)
    assert (result.kl, result.top1_agreement) == (0.0, 1.0)


def test_the_divergence_is_that_of_torch_distributions(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = tiny_model(seed=1)
    result = evaluate(model, tokenizer, TEXT, context=128, reference=other)
    ours, theirs = (naive_logits(each, tokenizer, TEXT) for each in (model, other))
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(categorical(logits=theirs), categorical(logits=ours))
    assert result.kl == pytest.approx(expected.mean().item(), rel=1e-4)
    assert result.top1_agreement == (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    backwards = evaluate(other, tokenizer, TEXT, context=128, reference=model)
    assert backwards.kl != pytest.approx(result.kl, rel=1e-2)


def test_the_rows_held_at_a_time_do_not_matter(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_model(seed=1)
    whole = evaluate(model, tokenizer, TEXT, context=50, reference=other).model_dump(exclude={"seconds"})
    for elements in (257, 257 * 7):
        monkeypatch.setattr(perplexity, "CHUNK_ELEMENTS", elements)
        assert evaluate(model, tokenizer, TEXT, context=50, reference=other).model_dump(
            exclude={"seconds"}
        ) == pytest.approx(whole, rel=1e-9)


def test_a_token_ruled_out_by_both_adds_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert perplexity._compare(logits, logits) == (0.0, 1)
    assert perplexity._compare(torch.zeros(1, 3), logits)[0] == pytest.approx(
        math.log(3) - torch.distributions.Categorical(logits=torch.tensor([0.0, 1.0])).entropy().item()
    )
    assert perplexity._compare(logits, torch.zeros(1, 3))[0] == math.inf


def test_half_precision_is_scored_in_single(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model().to(torch.bfloat16)
    result = evaluate(model, tokenizer, TEXT, context=128, reference=tiny_model())
    logits = naive_logits(model, tokenizer, TEXT)
    expected = torch.nn.functional.cross_entropy(logits, token_ids(tokenizer, TEXT)[1:]).item()
    assert result.negative_log_likelihood == pytest.approx(expected, rel=1e-5)
    assert model.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- record, errors, speech


def test_the_record_is_frozen_and_has_the_keys(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    steps: list[tuple[int, int]] = []
    result = evaluate(
        model, tokenizer, TEXT, context=16, windows=2, progress=lambda done, total: steps.append((done, total))
    )
    assert {"token_perplexity", "word_perplexity", "tokens", "kl", "top1_agreement"} <= result.model_dump().keys()
    assert Evaluation.model_validate_json(result.model_dump_json()) == result
    assert steps == [(1, 2), (2, 2)]
    with pytest.raises(ValueError, match="frozen"):
        result.tokens = 3  # type: ignore[misc]


def test_the_models_mode_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    first, second = (evaluate(model, tokenizer, TEXT, context=64) for _ in range(2))
    assert first.negative_log_likelihood == second.negative_log_likelihood
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("text", "options", "complaint"),
    [
        (TEXT, {"context": 129}, "context 129 is more than the 128 positions .*; use context 128 or less"),
        (TEXT, {}, "context 1024 is more than"),
        (TEXT, {"context": 1}, "context is 1; it must be at least 2"),
        (TEXT, {"context": 8, "stride": 9}, "stride is 9 with context 8"),
        (TEXT, {"context": 8, "stride": 0}, "stride is 0"),
        (TEXT, {"context": 8, "windows": 0}, "windows is 0"),
        ("a", {"context": 8}, "the text has 1 tokens"),
        ("", {"context": 8}, "the text has 0 tokens"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, options: dict, complaint: str
) -> None:
    with pytest.raises(LexigramError, match=complaint):
        evaluate(model, tokenizer, text, **options)


@pytest.mark.parametrize(
    ("windowing", "complaint"),
    [((1,), "context is 1"), ((8, 0), "stride is 0"), ((8, 9), "stride is 9"), ((8, None, 0), "windows is 0")],
)
def test_a_windowing_that_cannot_be_is_refused_without_a_model(windowing: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(LexigramError, match=complaint):
        perplexity.check_windowing(*windowing)
    perplexity.check_windowing(2)
    perplexity.check_windowing(8, 8, 1)


def test_models_that_do_not_belong_together_are_an_error(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(LexigramError, match="vocabulary has 257 entries and the reference's 300"):
        evaluate(model, tokenizer, TEXT, context=16, reference=tiny_model(vocabulary=300))
    with pytest.raises(LexigramError, match=r"token .* but the model's vocabulary has 40 entries"):
        evaluate(tiny_model(vocabulary=40), tokenizer, TEXT, context=16)


def test_a_loss_that_is_not_finite_names_its_window(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    broken = tiny_model()
    # Only the byte `,` breaks it; TEXT has one, token 22, in the second window of 16.
    broken.model.embed_tokens.weight.data[token_ids(tokenizer, ",")] = torch.nan
    assert TEXT.index(",") == 22
    with pytest.raises(LexigramError, match=r"loss in window 1 \(tokens 16 to 31\) is nan"):
        evaluate(broken, tokenizer, TEXT, context=16)
    with pytest.raises(LexigramError, match=r"KL\(reference \|\| model\) in window 1 \(tokens 16 to 31\) is nan"):
        evaluate(model, tokenizer, TEXT, context=16, reference=broken)


def test_greedy_speech_is_the_likeliest_token_each_time(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(seed=2)
    model.lm_head.weight.data[128:] = 0  # keep mostly to ASCII: letters decode one by one
    ids = token_ids(tokenizer, "Once")[None]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    expected = tokenizer.decode(ids[0], skip_special_tokens=True).removeprefix("Once")
    model.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=2.0)
    state = torch.get_rng_state()
    assert greedy_sentence(model, tokenizer, "Once", 12) == expected
    assert torch.equal(state, torch.get_rng_state())
    assert model.generation_config.repetition_penalty == 5.0


def test_speech_ends_at_the_end_of_sequence_token(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    likeliest = naive_logits(model, tokenizer, "Once upon")[-1].argmax().item()
    model.generation_config.eos_token_id = [256, likeliest]
    assert greedy_sentence(model, tokenizer, "Once upo", 9) == tokenizer.decode([likeliest])


def test_a_chat_goes_through_the_template(model: LlamaForCausalLM) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(LexigramError, match="no chat template"):
        greedy_sentence(model, tokenizer, "Hi", 5, chat=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    expected = greedy_sentence(model, tokenizer, "[user] Hi\n[assistant] ", 5)
    # A template writes its own special tokens: those that the tokenizer adds to plain text must not come on top.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    assert greedy_sentence(model, tokenizer, "Hi", 5, chat=True) == expected
    assert greedy_sentence(model, tokenizer, "[user] Hi\n[assistant] ", 5) != expected


@pytest.mark.parametrize(
    ("prompt", "count", "complaint"),
    [("", 5, "has no tokens"), ("Hi", 0, "max_new_tokens is 0"), ("Hi", 127, "prompt plus max_new_tokens 129")],
)
def test_what_cannot_be_said_is_an_error(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, count: int, complaint: str
) -> None:
    with pytest.raises(LexigramError, match=complaint):
        greedy_sentence(model, tokenizer, prompt, count)


# --------------------------------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def stories(data: Path) -> SimpleNamespace:
    folder, text = data / "stories260K", data / "tinystories" / "tinystories.txt"
    return SimpleNamespace(
        model=AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        text=text.read_text(encoding="utf-8"),
    )


def test_a_trained_model_has_its_perplexity(stories: SimpleNamespace) -> None:
    result = evaluate(stories.model, stories.tokenizer, stories.text, context=256, windows=20)
    ids = token_ids(stories.tokenizer, stories.text)[: 20 * 256].view(20, 256)
    with torch.no_grad():
        logits = stories.model(ids).logits[:, :-1]
    naive = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    assert result.token_perplexity == pytest.approx(naive, rel=1e-4)
    # The whole text (527 windows) gives 7.646, its first 20 windows 6.743.
    assert result.token_perplexity == pytest.approx(6.743, abs=0.02)
    assert result.tokens == 20 * 255
    assert 0 < result.standard_error < 0.1


def test_a_trained_model_speaks(stories: SimpleNamespace) -> None:
    said = greedy_sentence(stories.model, stories.tokenizer, "Once upon a time, there was a", 12)
    assert said.startswith(" little girl named Lily.")
