"""Text to token batches: files, the demo text, hub data sets, windows, sampling from the model."""

import gzip
import hashlib
import json
import struct
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import byte_tokenizer
from lexigram.calibration import sampling
from lexigram.calibration.sampling import sample_sequences
from lexigram.calibration.text import demo_text, read_texts
from lexigram.calibration.tokens import TokenSequences, token_hash, token_ids, token_sequences
from lexigram.errors import LexigramError
from lexigram.running import inference


def tiny_model(vocabulary: int = 258, seed: int = 0, **more: object) -> LlamaForCausalLM:
    """A Llama with random weights, large enough ones to be far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {
            "vocab_size": vocabulary,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
        }
        return LlamaForCausalLM(LlamaConfig(**(settings | more))).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(bos_token="<s>", model_max_length=16)


# ---------------------------------------------------------------------------------------------------------------- files


def test_files_are_read_as_they_stand_and_joined_by_a_blank_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n två\n".encode())
    (tmp_path / "b.RAW").write_bytes(b"three ")
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.RAW")]
    assert read_texts(names) == "one\r\n två\n\n\nthree "


def test_json_lines_keep_their_inner_line_separators(tmp_path: Path) -> None:
    documents = ["a\u2028b\nc", "", "d\x85e"]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n\n".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in documents) + "\n", "utf-8"
    )
    assert read_texts([str(path)]) == "\n\n".join(documents)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "line 2 is not JSON"),
        ('["text"]', "line 2 is a JSON list"),
        ('{"body": "a"}', r"line 2 has no field 'text' \(its fields: 'body'\)"),
        ('{"text": 3}', "line 2: the field 'text' is a int"),
        (r'{"text": "a\ud800"}', "line 2: the field 'text' holds half of a surrogate pair"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", "utf-8")
    with pytest.raises(LexigramError, match=rf"bad\.jsonl, {complaint}"):
        read_texts([str(path)])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.txt", None, "there is no file"),
        ("empty.txt", b" \n", "holds no text"),
        ("empty.jsonl", b'{"text": ""}\n', "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8: byte 3 is 0xe9"),
        ("book.pdf", b"%PDF", r"suffix '\.pdf'"),
        ("book.pdf.gz", b"%PDF", r"suffix '\.pdf'"),
        ("plain.txt.gz", b"plain", r"cannot be unpacked: Not a gzipped file.*; fetch or write it again"),
        (
            "short.txt.gz",
            gzip.compress(b"words " * 99, mtime=0)[:-9],
            "cannot be unpacked: Compressed file ended before",
        ),
        ("latin.txt.gz", gzip.compress(b"caf\xe9", mtime=0), "not UTF-8: byte 3 is 0xe9"),
        ("", None, "is a directory"),
    ],
)
def test_an_unusable_file_is_an_error(tmp_path: Path, name: str, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LexigramError, match=complaint):
        read_texts([str(tmp_path / name)])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.JSON.GZ", "a.txt.gz", "a.raw"])
def test_files_may_be_packed(name: str, tmp_path: Path) -> None:
    content = b'{"text": "one"}\n{"text": "two"}' if "json" in name.lower() else b"one\n\ntwo"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert read_texts([str(tmp_path / name)]) == "one\n\ntwo"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("letter", ["a", "å", "\U0001f600"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_of_a_long_file_the_beginning_is_read(suffix: str, letter: str, packed: bool, tmp_path: Path) -> None:
    """Whole lines, whole documents, whole characters; its bytes beyond, which are no UTF-8, are not looked at."""
    document = letter * 9
    line = document if suffix == ".txt" else json.dumps({"text": document}, ensure_ascii=False)
    content = f"{line}\n".encode() * 30 + b"\xff"
    file = tmp_path / f"a{suffix}{'.gz' * packed}"
    file.write_bytes(gzip.compress(content) if packed else content)
    found = read_texts([str(file)], characters=35)
    if suffix == ".txt":
        assert found == f"{document}\n" * 3
    else:
        assert found.split("\n\n") == [document] * (2 if letter > "å" else 4)  # of four bytes a character, with the key
    (tmp_path / "line.txt").write_text(letter * 99)
    assert read_texts([str(tmp_path / "line.txt")], characters=35) == letter * 35
    for all_of_it in ({"characters": None}, {}):
        with pytest.raises(LexigramError, match="is not UTF-8"):
            read_texts([str(file)], **all_of_it)


def test_no_name_is_an_error() -> None:
    with pytest.raises(LexigramError, match="no text was named"):
        read_texts([])


# ------------------------------------------------------------------------------------------------------------ demo, hub


def test_the_demo_text_has_two_parts_that_share_no_topic() -> None:
    from pydoc_data.topics import topics

    calibration, evaluation = demo_text("calibration"), demo_text("evaluation")
    whole = "\n\n".join(topics[key].strip() for key in sorted(topics))
    assert calibration + "\n\n" + evaluation == whole
    assert 0.5 < len(calibration) / len(whole) < 0.85
    assert read_texts(["demo"]) == calibration
    assert read_texts(["demo"], demo_part="evaluation") == evaluation
    with pytest.raises(LexigramError, match="no part 'test'"):
        demo_text("test")  # type: ignore[arg-type]


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: list[dict]) -> list[tuple]:
    """A stand-in for the package `datasets`; returns the list of calls."""
    calls: list[tuple] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict]:
        calls.append((name, config, split, streaming))
        if name == "nowhere":
            raise FileNotFoundError("no such data set")
        return rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_hub_data_set_is_streamed_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_datasets(monkeypatch, [{"text": "abc"}, {"text": "def"}, {"text": "ghi"}])
    assert read_texts(["hub:a/b"], characters=4) == "abc\n\ndef"
    assert read_texts(["hub:a/b:c"]) == "abc\n\ndef\n\nghi"
    read_texts(["hub:a/b:c:test", "hub:a/b::test"])
    assert calls == [
        ("a/b", None, "train", True),
        ("a/b", "c", "train", True),
        ("a/b", "c", "test", True),
        ("a/b", None, "test", True),
    ]


def test_what_goes_wrong_with_a_hub_data_set_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [{"text": "a"}, {"content": "b"}])
    for name in ("hub:", "hub:a:b:c:d"):
        with pytest.raises(LexigramError, match="does not name a hub data set"):
            read_texts([name])
    with pytest.raises(LexigramError, match="hub:a/b, row 2 has no field 'text'"):
        read_texts(["hub:a/b"])
    with pytest.raises(LexigramError, match="FileNotFoundError: no such data set"):
        read_texts(["hub:nowhere"])
    fake_datasets(monkeypatch, [])
    with pytest.raises(LexigramError, match="holds no text in its split 'train'"):
        read_texts(["hub:a/b"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LexigramError, match=r"pip install 'lexigram\[hub-data\]'"):
        read_texts(["hub:a/b"])


# --------------------------------------------------------------------------------------------------------------- tokens


def test_the_hash_is_of_the_shape_and_the_little_endian_ids() -> None:
    ids = torch.tensor([[1, 2, 70000], [3, 4, 5]])
    expected = hashlib.sha256(b"2x3:" + struct.pack("<6i", 1, 2, 70000, 3, 4, 5)).hexdigest()
    assert token_hash(ids) == TokenSequences(ids, "here").sha256 == expected
    assert token_hash(ids.view(3, 2)) != expected
    assert token_hash(ids.t().contiguous().t()) == expected


def test_token_sequences_compare_by_content_and_refuse_other_tensors() -> None:
    ids = torch.arange(6).view(2, 3)
    batch = TokenSequences(ids, "here")
    assert batch == TokenSequences(ids.clone(), "here")
    assert batch != TokenSequences(ids + 1, "here")
    assert (len(batch), batch.length, batch.tokens) == (2, 3, 6)
    for wrong in (ids.int(), ids[0], ids[:0]):
        with pytest.raises(LexigramError, match="int64 tensor"):
            TokenSequences(wrong, "here")


def test_the_whole_text_is_tokenised_quietly(
    tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert token_ids(tokenizer, "å b" * 100).tolist() == tokenizer.convert_tokens_to_ids(["Ã", "¥", "Ġ", "b"]) * 100
    captured = capfd.readouterr()
    assert "longer than" not in caplog.text + captured.err + captured.out


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_windows_are_consecutive_distinct_and_in_text_order(data: st.DataObject) -> None:
    tokenizer = byte_tokenizer()
    length = data.draw(st.integers(2, 9))
    text = "".join(data.draw(st.lists(st.sampled_from("abcdef "), min_size=length, max_size=80)))
    available = len(text) // length
    wanted = data.draw(st.integers(1, available))
    seed = data.draw(st.integers(0, 2**40))
    batch = token_sequences(tokenizer, text, wanted, length, seed)
    windows = [text[i * length : (i + 1) * length] for i in range(available)]
    position = -1
    for row in batch.ids:  # each row is a window further on than the row before it
        position = windows.index(tokenizer.decode(row), position + 1)
    assert batch.ids.shape == (wanted, length)
    assert batch == token_sequences(tokenizer, text, wanted, length, seed)
    if wanted == available:
        assert batch.ids.flatten().tolist() == token_ids(tokenizer, text).tolist()[: available * length]


@pytest.mark.parametrize(("text", "sequences", "length"), [("abcdefgh", 2, 5), ("abcdefghi", 3, 4), ("ab", 2, 2)])
def test_bos_is_a_windows_first_token(text: str, sequences: int, length: int) -> None:
    """All the rest is text, of which none is lost in between."""
    tokenizer = byte_tokenizer(bos_token="<s>")
    batch = token_sequences(tokenizer, text, sequences, length, 0, bos=True, source="here")
    assert batch.ids.shape == (sequences, length)
    assert batch.ids[:, 0].tolist() == [tokenizer.bos_token_id] * sequences
    assert tokenizer.decode(batch.ids[:, 1:].flatten()) == text[: sequences * (length - 1)]
    assert batch.source.endswith("seed 0, BOS first")
    with pytest.raises(LexigramError, match=f"too few for {sequences + 1} sequences of {length} .*what fits is "):
        token_sequences(tokenizer, text, sequences + 1, length, 0, bos=True)
    with pytest.raises(LexigramError, match="has no BOS token to begin windows with; leave out bos"):
        token_sequences(byte_tokenizer(), text, 1, 2, 0, bos=True)


def test_the_seed_chooses_and_the_source_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    text = demo_text("calibration")[:4000]
    state = torch.get_rng_state()
    first, second = (token_sequences(tokenizer, text, 5, 20, seed, source="demo") for seed in (0, 1))
    assert first.sha256 != second.sha256
    assert second.source == f"demo: 5 of {len(text.encode()) // 20} windows of 20 tokens, seed 1"
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("sequences", "length", "complaint"),
    [
        (
            3,
            5,
            r"\(here\) has 11 tokens, too few for 3 sequences of 5 \(15 tokens\).* 2 sequences of 5 or 3 of 3; give",
        ),
        (1, 12, "one sequence of 11"),
        (9, 5, "what fits is 2 sequences of 5; give"),
        (0, 5, "sequences is 0; it must be at least 1"),
        (1, 1, "length is 1; it must be at least 2"),
    ],
)
def test_too_little_text_says_what_fits(
    tokenizer: PreTrainedTokenizerFast, sequences: int, length: int, complaint: str
) -> None:
    with pytest.raises(LexigramError, match=complaint):
        token_sequences(tokenizer, "hello world", sequences, length, 0, source="here")


# ------------------------------------------------------------------------------------------------------------- sampling


def test_samples_are_what_a_loop_without_cache_draws() -> None:
    model = tiny_model(50)
    batch = sample_sequences(model, 1, 4, 12, seed=3, batch=4)
    ids = torch.full((4, 1), 1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _ in range(11):
            logits = model(ids, use_cache=False).logits[:, -1].float()
            noise = -torch.empty_like(logits).exponential_(generator=generator).log()
            ids = torch.cat([ids, (logits + noise).argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(batch.ids, ids)
    assert batch.source == "self: 4 sequences of 12 tokens sampled from the model, seed 3"


def test_the_noise_draws_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, -torch.inf, 1.0])
    draw = sampling._Draw(torch.Generator().manual_seed(0))
    rows = 40_000
    drawn = draw(torch.zeros(rows, 1), logits.expand(rows, -1)).argmax(dim=-1)
    shares = torch.bincount(drawn, minlength=5) / rows
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.01, rtol=0)
    assert shares[3] == 0


def test_the_seed_alone_decides_and_nothing_global_changes() -> None:
    model = tiny_model(50)
    published = model.generation_config
    torch.manual_seed(99)
    state, steps = torch.get_rng_state(), []
    first = sample_sequences(model, 1, 5, 12, seed=0, batch=2, progress=lambda done, total: steps.append((done, total)))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert first == sample_sequences(model, 1, 5, 12, seed=0, batch=2)
    assert first.sha256 != sample_sequences(model, 1, 5, 12, seed=1, batch=2).sha256
    assert steps == [(2, 5), (4, 5), (5, 5)]
    assert model.generation_config is published


def test_the_models_own_generation_settings_are_not_heeded() -> None:
    plain, fussy = tiny_model(8), tiny_model(8)
    fussy.generation_config = GenerationConfig(
        repetition_penalty=9.0, temperature=0.01, top_k=1, do_sample=True, eos_token_id=[2, 3], max_length=5
    )
    first = sample_sequences(plain, 1, 8, 16, seed=0)
    assert first == sample_sequences(fussy, 1, 8, 16, seed=0)
    ends = first.ids[:, :-1] == 2
    assert ends.any()  # past an end-of-sequence token the sequence goes on, and not with padding
    assert len(set(first.ids[:, 1:][ends].tolist())) > 1


def test_sequences_begin_with_bos_or_with_an_ordinary_token() -> None:
    model = tiny_model(258)
    with_bos, without = byte_tokenizer(bos_token="<s>"), byte_tokenizer()
    assert set(sample_sequences(model, with_bos, 3, 4, 0).ids[:, 0].tolist()) == {with_bos.bos_token_id}
    starts = sample_sequences(model, without, 60, 2, 0, batch=60).ids[:, 0].tolist()
    assert len(set(starts)) > 30
    assert without.eos_token_id not in starts
    assert max(sample_sequences(model, None, 60, 2, 0, batch=60).ids[:, 0].tolist()) < 258


def test_modules_get_their_own_mode_back() -> None:
    model = tiny_model(50)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    sample_sequences(model, 1, 1, 3, 0)
    assert [module.training for module in model.modules()] == before
    with inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before


def test_what_cannot_be_sampled_is_an_error() -> None:
    model = tiny_model(50)
    with pytest.raises(LexigramError, match=r"length 65 is more than the 64 positions .*; use length 64 or less"):
        sample_sequences(model, 1, 1, 65, 0)
    with pytest.raises(LexigramError, match="start token 50 is outside the model's vocabulary of 50"):
        sample_sequences(model, 50, 1, 8, 0)
    with pytest.raises(LexigramError, match="batch is 0"):
        sample_sequences(model, 1, 1, 8, 0, batch=0)
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(LexigramError, match="logits for token 1 of a sampled sequence are not finite"):
        sample_sequences(model, 1, 1, 8, 0)
