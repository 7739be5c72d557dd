"""`compare`: its figures are those of the other commands, what is done stays done, and errors come before the work."""

import errno
import json
import math
import os
import re
import shutil
import struct
import sys
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import pytest
import torch

import lexigram
from conftest import Command, Said, build_toy, byte_tokenizer, contents, toy_folder
from lexigram import (
    ComparisonSettings,
    HealingSettings,
    LexigramError,
    Plan,
    Recipe,
    cli,
    pipeline,
    recording,
    staging,
)
from lexigram.calibration.text import read_texts
from lexigram.calibration.tokens import TokenSequences
from lexigram.cli import compare as comparing_command
from lexigram.cli.arguments import DtypeName
from lexigram.cli.compare import repeated
from lexigram.cli.fields import choices
from lexigram.comparison import order, origin, planning, plot
from lexigram.comparison.table import DENSE, Row, difference, figure, markdown, table
from lexigram.comparison.table import lines as lines_of
from lexigram.distillation import ObjectiveName
from lexigram.evaluation.records import evaluated
from lexigram.methods import Fitted, fit_group
from lexigram.recipe import Calibration
from lexigram.runfolder import run_folder
from lexigram.source import Source
from lexigram.staging import REPLACED

SVD, BITS = (f"method: {method}\ninclude: q_proj\n" for method in ("{name: svd}", "{name: svd, value_bits: 8}"))
BITS += "ratio: 0.4\n"


class Place(NamedTuple):
    """A toy, recipes for it, and the command that compares them."""

    folder: Path
    toy: Path
    words: Path
    run: Command

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def recipe(self, name: str, content: str) -> Path:
        """A file below the folder."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        return file

    def compare(self, *recipes: Path, **changes: object) -> Said:
        """The command with tiny calibration and evaluation; a change of None leaves an option out, True makes it a flag."""
        options: dict[str, object] = {
            "calibration": self.words,
            "sequences": 8,
            "length": 64,
            "text": self.words,
            "context": 64,
            "windows": 2,
            "out": self.out,
            "device": "cpu",
            **changes,
        }
        args: list[object] = []
        for name, value in options.items():
            if value is not None and value is not False:
                values = () if value is True else value if isinstance(value, (list, tuple)) else (value,)
                args += [f"--{name.replace('_', '-')}", *values]
        return self.run("compare", self.toy, "--recipes", *recipes, *args)

    def library(self, **settings: Any) -> Recipe:
        """The recipe of `SVD` with the same calibration."""
        calibration = Calibration(text=(str(self.words),), sequences=8, length=64)
        told = {"method": lexigram.SvdConfig(), "calibration": calibration, "device": "cpu", "include": ("q_proj",)}
        return Recipe(model=str(self.toy), **{**told, **settings})

    @property
    def settings(self) -> ComparisonSettings:
        return ComparisonSettings(texts=(str(self.words),), context=64, windows=2)

    def row(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.out / "rows" / f"{name}.json").read_text()))

    def table(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "table.json").read_text()))


@pytest.fixture
def place(command: Command, words: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, toy_folder(tmp_path / "toy", "llama"), words, command)


@pytest.fixture
def long(place: Place) -> Path:
    """A text that is long enough for the usual number of sequences to heal on."""
    return place.recipe("long.txt", f"{place.words.read_text()} " * 18)


@pytest.fixture
def plotted() -> None:
    """Asked for by tests of the plot, which takes as long as everything else."""
    pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _plotless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "plotted" not in request.fixturenames:
        monkeypatch.setattr(planning, "missing", lambda: "no plot in this test")


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that are compressed from now on."""
    names: list[str] = []
    real = order.compress

    def counted(recipe: Recipe, out: Path, **options: Any) -> Any:
        names.append(Path(out).name)
        return real(recipe, out, **options)

    monkeypatch.setattr(order, "compress", counted)
    return names


def markdown_cells(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown file's only table, by its heads."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


# ---------------------------------------------------------------------------------------------------------------- figures


def test_figures_are_those_of_compress_and_eval(place: Place) -> None:
    svd, bits = place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS)
    ended = place.compare(svd, bits, ratio=[0.4, 0.5])
    assert ended.code == 0, ended.err
    names = ["dense", "low-0.4", "low-0.5", "bits-0.4", "bits-0.5"]
    found = place.table()
    assert [row["label"] for row in found["rows"]] == names
    assert sorted(file.stem for file in (place.out / "rows").iterdir()) == sorted(names)

    recipe = place.recipe("again.yaml", SVD)
    calibrate = ("--calibration", place.words, "--sequences", 8, "--length", 64, "--device", "cpu")
    alone, figures = place.folder / "alone", place.folder / "figures.json"
    done = place.run("compress", place.toy, "--recipe", recipe, "--ratio", 0.5, "--out", alone, *calibrate)
    assert done.code == 0, done.err
    evaluate = ("--text", place.words, "--context", 64, "--windows", 2, "--json", figures)
    assert place.run("eval", alone, "--reference", place.toy, *evaluate).code == 0
    run, measured = json.loads((alone / "run.json").read_text()), json.loads(figures.read_text())
    row = place.row("low-0.5")
    for key in (
        "token_perplexity",
        "word_perplexity",
        "kl",
        "top1_agreement",
        "tokens",
        "model_bytes",
        "bits_per_weight",
        "standard_error",
    ):
        assert row[key] == measured[key], key
    for key in ("bits_per_weight", "bytes_before", "bytes_after", "mean_relative_error"):
        assert row[key] == run[key], key
    for key in ("calibration_sha256", "weights_sha256", "requested_ratio", "ratio"):
        assert row["run"][key] == run[key], key
    assert (row["recipe"], row["requested_ratio"]) == ("low", 0.5)

    assert place.run("eval", place.toy, *evaluate).code == 0
    measured, dense = json.loads(figures.read_text()), place.row("dense")
    assert dense["token_perplexity"] == measured["token_perplexity"]
    assert dense["model_bytes"] == measured["model_bytes"]
    assert (dense["kl"], dense["bits_per_weight"]) == (None, 32)  # the toy is float32

    shown = markdown_cells((place.out / "table.md").read_text())
    assert [(line["recipe"], line["ratio"]) for line in shown] == [
        ("dense", ""),
        ("low", "0.4"),
        ("low", "0.5"),
        ("bits", "0.4"),
        ("bits", "0.5"),
    ]
    assert shown[2]["token perplexity"] == f"{row['token_perplexity']:.2f}"
    assert shown[2]["bits a weight"] == f"{run['bits_per_weight']:.2f}"
    assert shown[2]["layers, MB"] == f"{run['bytes_after'] / 1e6:.2f}"
    assert shown[2]["KL"] == f"{row['kl']:.4f}"
    assert shown[0]["layers, MB"] == f"{2 * run['bytes_before'] / 1e6:.2f}"
    assert shown[2]["token perplexity"] in ended.out
    assert found["table"][2]["token_perplexity"] == {"mean": row["token_perplexity"], "spread": None}
    assert found["recipes"]["low-0.5"] == run["recipe"]
    assert found["command"].startswith("lexigram compare ")
    assert found["versions"]["lexigram"] == lexigram.__version__
    assert place.run("report", place.out / "rows" / "dense.json", place.out / "rows" / "low-0.5.json").code == 0


def test_a_recipe_keeps_its_ratio_where_none_is_given(place: Place) -> None:
    ended = place.compare(place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS))
    assert ended.code == 0
    rows = place.table()["rows"]
    assert [(row["label"], row["requested_ratio"]) for row in rows] == [("dense", None), ("low", 0.2), ("bits", 0.4)]


def test_amounts_of_every_kind_are_compared_at_their_ratios_and_at_any_other(place: Place) -> None:
    low, bits = place.recipe("low.yaml", SVD), place.recipe("bits.yaml", f"{SVD}bits: 8\n")
    size = place.recipe("size.yaml", f"{SVD}size: 195kB\n")
    ended = place.compare(low, bits, size)
    assert ended.code == 0, ended.err
    found = {row["label"]: row for row in place.table()["rows"]}
    assert [found[name]["requested_ratio"] for name in ("low", "bits")] == [0.2, 0.5]
    assert found["bits"]["bits_per_weight"] <= 8
    assert found["size"]["run"]["model_bytes_after"] <= 195_000
    assert found["size"]["requested_ratio"] == found["size"]["run"]["requested_ratio"]
    assert "there already" in place.compare(low, bits, size).out

    assert place.compare(bits, size, ratio=[0.3], out=place.folder / "other").code == 0
    rows = json.loads((place.folder / "other" / "table.json").read_text())["rows"]
    assert [row["requested_ratio"] for row in rows] == [None, 0.3, 0.3]
    assert rows[1]["bytes_after"] == rows[2]["bytes_after"]


def test_a_size_that_cannot_be_had_is_a_row(place: Place) -> None:
    low, size = place.recipe("low.yaml", SVD), place.recipe("size.yaml", f"{SVD}size: 10kB\n")
    ended = place.compare(low, size)
    assert ended.code == 1
    assert "size cannot be made: a size of 10kB is too small" in ended.out
    [_, _, row] = place.table()["rows"]
    assert row["requested_ratio"] is None


def test_seeds_give_means_and_spreads(place: Place) -> None:
    ended = place.compare(place.recipe("low.yaml", "method: {name: svd}"), ratio=[0.5], seeds=[0, 1])
    assert ended.code == 0, ended.err
    first, second = (place.row(f"low-0.5-seed{seed}") for seed in (0, 1))
    assert first["run"]["calibration_sha256"] != second["run"]["calibration_sha256"]
    values = [row["token_perplexity"] for row in (first, second)]
    [_, line] = place.table()["table"]
    assert line["token_perplexity"] == {"mean": sum(values) / 2, "spread": (max(values) - min(values)) / 2}
    assert line["calibration_seeds"] == [0, 1]
    text = (place.out / "table.md").read_text()
    [_, shown] = markdown_cells(text)
    assert " ± " in shown["token perplexity"]
    assert " ± " not in shown["layers, MB"]
    assert "seeds 0, 1" in text


def test_grams_are_made_once_for_all_rows(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = pipeline.plain_grams

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(pipeline, "plain_grams", counted)
    assert place.compare(place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS), ratio=[0.4, 0.5]).code == 0
    assert len(calls) == 1
    assert len(list((place.out / "cache").iterdir())) == 1
    hashes = {row["run"]["calibration_sha256"] for row in place.table()["rows"] if row["recipe"] != DENSE}
    assert len(hashes) == 1


def test_a_calibration_from_the_model_is_sampled_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = pipeline.sample_sequences

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(pipeline, "sample_sequences", counted)
    assert place.compare(place.recipe("low.yaml", SVD), ratio=[0.4, 0.5], calibration="self").code == 0
    assert len(calls) == 1
    assert len(list((place.out / "cache").iterdir())) == 1


def test_the_library_does_the_same(place: Place) -> None:
    assert place.compare(place.recipe("low.yaml", SVD), ratio=[0.5]).code == 0
    calibration = Calibration(text=(str(place.words),), sequences=8, length=64)
    recipe = Recipe(
        model=str(place.toy), method=lexigram.SvdConfig(), calibration=calibration, device="cpu", include=("q_proj",)
    )
    settings = ComparisonSettings(texts=str(place.words), ratios=[0.5], context=64, windows=2)
    found = lexigram.compare({"low": recipe}, place.folder / "library", settings)
    assert found.failed == []
    assert [row.label for row in found.rows] == ["dense", "low-0.5"]
    assert found.rows[1].token_perplexity == place.row("low-0.5")["token_perplexity"]
    assert all(file.is_file() for file in found.files)


SETTINGS: dict[str, tuple[list[object], object]] = {
    "texts": (["--text", "a.txt", "b.txt"], ("a.txt", "b.txt")),
    "ratios": (["-r", 0.25, 0.5], (0.25, 0.5)),
    "seeds": (["--calibration-seed", 3, 4], (3, 4)),
    "context": (["--context", 7], 7),
    "windows": (["--windows", 7], 7),
    "bos": (["--bos"], True),
    "dtype": (["--dtype", "float16"], "float16"),
    "heal": (
        [
            *("--heal", "a.txt", "b.txt", "--heal-steps", 3, "--heal-minutes", 1.5),
            *("--heal-objective", "tokens", "--heal-batch", 5, "--heal-rate", 0.01),
        ],
        HealingSettings(texts=("a.txt", "b.txt"), steps=3, minutes=1.5, objective="tokens", batch=5, rate=0.01),
    ),
    "drop_models": (["--drop-models"], True),
}


@pytest.mark.parametrize("key", ComparisonSettings.model_fields)
def test_every_setting_has_an_option_that_reaches_it_alone(
    key: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[ComparisonSettings] = []

    def stop(_recipes: object, _out: object, settings: ComparisonSettings, **_options: object) -> None:
        found.append(settings)
        raise LexigramError("far enough")

    monkeypatch.setattr(comparing_command, "plan_comparison", stop)
    written, value = SETTINGS[key]
    text = [] if key == "texts" else ["--text", "demo"]
    args = "compare", place.toy, "--recipes", place.recipe("low.yaml", SVD), "--out", place.out
    assert place.run(*args, *text, *written).error == "far enough"
    usual = ComparisonSettings(texts=("demo",))
    assert found == [usual.model_copy(update={key: value})] != [usual]


def test_bos_is_in_the_calibration_and_in_every_window_and_the_table_says_so(place: Place) -> None:
    assert place.compare(place.recipe("low.yaml", SVD), bos=True, context=32).code == 0
    dense, low = (json.loads((place.out / "rows" / f"{name}.json").read_text()) for name in (DENSE, "low"))
    assert low["made_from"]["recipe"]["calibration"]["bos"]
    assert dense["tokens"] % 31 == 0, "all tokens of a window but BOS"
    assert " windows after BOS, " in (place.out / "table.md").read_text()


def test_the_dtypes_are_those_of_eval() -> None:
    assert set(choices(ComparisonSettings.model_fields["dtype"])) == {name.value for name in DtypeName}


# ----------------------------------------------------------------------------------------------------------------- resume


def test_only_what_is_not_there_is_made(place: Place, compressed: list[str]) -> None:
    files = place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS)
    assert place.compare(*files, ratio=[0.4, 0.5], drop_models=True).code == 0
    assert compressed == ["low-0.4", "low-0.5", "bits-0.4", "bits-0.5"]
    assert list((place.out / "models").iterdir()) == []
    before, text = contents(place.out / "rows"), (place.out / "table.md").read_text()

    compressed.clear()
    (place.out / "rows" / "low-0.5.json").unlink()
    ended = place.compare(*files, ratio=[0.4, 0.5])
    assert ended.code == 0
    assert compressed == ["low-0.5"]
    after = contents(place.out / "rows")
    assert {name for name in after if after[name] != before[name]} <= {str(place.out / "rows" / "low-0.5.json")}
    told = "token perplexity", "KL", "bits a weight"
    again = (place.out / "table.md").read_text()
    assert [[line[key] for key in told] for line in markdown_cells(again)] == [
        [line[key] for key in told] for line in markdown_cells(text)
    ]


def test_a_comparison_that_goes_on_needs_no_room_for_what_is_there(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = {"low": place.library()}
    whole = planning.plan_comparison(low, place.out, place.settings).jobs[0].plan
    assert whole is not None
    grams = sum(8 * width**2 for width in {target.site: target.shape[1] for target in whole.targets}.values())
    free = whole.disk_bytes + grams - 1000
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))
    with pytest.raises(LexigramError, match="free some space"):
        planning.plan_comparison(low, place.out, place.settings)
    there = run_folder(place.out / "models" / "low") / "objects" / "fitted"
    there.parent.mkdir(parents=True)
    (place.out / "rows").mkdir()
    there.write_bytes(bytes(1000))
    planning.plan_comparison(low, place.out, place.settings)


def test_a_killed_comparison_goes_on_at_its_next_row(
    place: Place, compressed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS)
    real = recording.stored_bytes

    def killed(folder: Path) -> dict[str, int]:
        if len(compressed) > 1:
            raise RuntimeError("killed")
        return real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "stored_bytes", killed)
        with pytest.raises(RuntimeError, match="killed"):
            cli.app(_arguments(place, *files), standalone_mode=False)
    assert sorted(file.name for file in (place.out / "rows").iterdir()) == ["dense.json", "low.json"]
    assert sorted(folder.name for folder in (place.out / "models").iterdir()) == ["bits.unfinished", "low"]
    assert not (place.out / "table.md").exists()
    before = contents(place.out / "rows")

    compressed.clear()
    assert place.compare(*files).code == 0
    assert compressed == ["bits"]
    assert sorted(folder.name for folder in (place.out / "models").iterdir()) == ["bits", "low"]
    after = contents(place.out / "rows")
    assert {name: after[name] for name in before} == before
    assert len(place.table()["rows"]) == 3


def _arguments(place: Place, *files: Path) -> list[str]:
    """Those of `Place.compare`, for a run whose exception is to come out."""
    told = [place.toy, "--recipes", *files, "--calibration", place.words, "--sequences", 8, "--length", 64]
    told += ["--text", place.words, "--context", 64, "--windows", 2, "--out", place.out, "--device", "cpu"]
    return ["compare", *map(str, told)]


def test_a_model_without_a_row_is_only_evaluated(place: Place, compressed: list[str]) -> None:
    files = place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS)
    assert place.compare(*files).code == 0
    before = place.row("low")
    (place.out / "rows" / "low.json").unlink()
    compressed.clear()
    ended = place.compare(*files)
    assert ended.code == 0
    assert "to evaluate" in ended.out
    assert compressed == []
    assert {**place.row("low"), "seconds": 0} == {**before, "seconds": 0}


CHANGES: dict[str, tuple[str, dict[str, object], str, bool]] = {
    "method": (SVD.replace("svd", "svd, value_bits: 8"), {}, "recipe.method.value_bits was 16 and is 8", True),
    "ratio": (f"{SVD}ratio: 0.3\n", {}, "recipe.ratio was 0.2 and is 0.3", True),
    "windows": (SVD, {"windows": 3}, "windows was 2 and is 3", False),
    "text": (SVD, {"text": "demo"}, "text_sha256 was '", False),
    "calibration": (SVD, {"sequences": 7}, "recipe.calibration.sequences was 8 and is 7", True),
}
"""What changes, what is said, and whether it makes another model."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_of_other_origin_is_refused_or_replaced(change: str, place: Place, compressed: list[str]) -> None:
    content, options, says, another = CHANGES[change]
    low = place.recipe("low.yaml", SVD)
    assert place.compare(low).code == 0
    before = contents(place.out)
    place.recipe("low.yaml", content)
    compressed.clear()
    ended = place.compare(low, **options)
    assert ended.code == 1
    assert f"was made from something else: {says}" in ended.error
    assert "--overwrite" in ended.error
    assert (compressed, contents(place.out)) == ([], before)

    assert place.compare(low, overwrite=True, **options).code == 0
    assert compressed == (["low"] if another else [])
    assert contents(place.out / "rows") != before
    assert place.compare(low, **options).code == 0  # and is there now


def test_a_changed_recipe_leaves_the_rows_of_the_others(place: Place, compressed: list[str]) -> None:
    low, bits = place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS)
    assert place.compare(low, bits).code == 0
    place.recipe("low.yaml", f"{SVD}ratio: 0.3\n")
    compressed.clear()
    assert place.compare(low, bits, overwrite=True).code == 0
    assert compressed == ["low"]


def test_a_change_in_the_calibration_text_is_refused(place: Place) -> None:
    text = place.recipe("text.txt", place.words.read_text())
    low = place.recipe("low.yaml", SVD)
    assert place.compare(low, calibration=text).code == 0
    text.write_text(text.read_text()[::-1].replace("w", " w"))
    assert "calibration_sha256 was" in place.compare(low, calibration=text).error


def test_rows_of_other_weights_are_told_and_measured_again(place: Place, compressed: list[str]) -> None:
    """Although name and size of the model are the same; also beside a recipe that is new."""
    low, bits = place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS)
    assert place.compare(low).code == 0
    weights = place.toy / "model.safetensors"
    size, before = weights.stat().st_size, contents(place.out)
    build_toy("llama", seed=1).save_pretrained(place.toy)
    assert weights.stat().st_size == size
    compressed.clear()
    for files in ([low], [low, bits]):
        ended = place.compare(*files)
        assert ended.code == 1
        assert "dense.json was made from something else: model_sha256 was '" in ended.error
        assert (compressed, contents(place.out)) == ([], before)

    ended = place.compare(low, bits, overwrite=True)
    assert ended.code == 0, ended.err
    for name in ("dense", "low"):
        assert f"{name} is made again: model_sha256 was '" in ended.out
    assert "bits is made again" not in ended.out
    assert place.compare(low, bits, out=place.folder / "fresh").code == 0
    assert compressed == ["low", "bits"] * 2
    for name in ("dense", "low", "bits"):
        fresh = json.loads((place.folder / "fresh" / "rows" / f"{name}.json").read_text())
        for key in ("token_perplexity", "kl", "mean_relative_error", "made_from"):
            assert place.row(name)[key] == fresh[key], (name, key)


def test_a_model_without_a_row_is_not_that_of_other_weights(place: Place, compressed: list[str]) -> None:
    low = place.recipe("low.yaml", SVD)
    assert place.compare(low).code == 0
    build_toy("llama", seed=1).save_pretrained(place.toy)
    for name in ("dense", "low"):
        (place.out / "rows" / f"{name}.json").unlink()
    compressed.clear()
    ended = place.compare(low)
    assert "models/low was made from something else: model_sha256 was '" in ended.error
    assert place.compare(low, overwrite=True).code == 0
    assert compressed == ["low"]


def test_a_model_that_was_to_be_replaced_is_not_taken_for_the_new_one(
    place: Place, compressed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    low = place.recipe("low.yaml", SVD)
    assert place.compare(low).code == 0
    place.recipe("low.yaml", f"{SVD}ratio: 0.3\n")
    with monkeypatch.context() as patch:
        patch.setattr(recording, "stored_bytes", lambda _folder: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            cli.app([*_arguments(place, low), "--overwrite"], standalone_mode=False)
    compressed.clear()
    assert place.compare(low, overwrite=True).code == 0
    assert compressed == ["low"]
    assert place.row("low")["run"]["requested_ratio"] == 0.3


def test_a_model_that_is_put_back_is_not_taken_for_the_new_one(place: Place, compressed: list[str]) -> None:
    """A kill between two renames has left it aside, without its origin."""
    low, folder = place.recipe("low.yaml", SVD), place.out / "models" / "low"
    assert place.compare(low).code == 0
    aside = folder.with_name("low.unfinished") / f".low{REPLACED}x" / "low"
    aside.parent.mkdir(parents=True)
    folder.replace(aside)
    for file in place.out.glob("[or]*s/low.json"):
        file.unlink()
    place.recipe("low.yaml", f"{SVD}ratio: 0.3\n")
    assert "low exists and is not empty" in str(place.compare(low).out)
    assert "was made from something else" in place.compare(low).error
    assert place.compare(low, overwrite=True).code == 0
    assert place.row("low")["run"]["requested_ratio"] == 0.3


def test_rows_of_another_version_are_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    low = place.recipe("low.yaml", SVD)
    assert place.compare(low).code == 0
    own = lexigram.__version__
    assert place.row("low")["made_from"]["versions"]["lexigram"] == own
    monkeypatch.setattr(origin, "versions", lambda: {"lexigram": "9.9", "transformers": "1"})
    assert f"versions.lexigram was '{own}' and is '9.9'" in place.compare(low).error


def test_weights_are_hashed_where_their_files_have_changed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = origin.checked

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(origin, "checked", counted)
    low = place.recipe("low.yaml", SVD)
    hashed = []
    for change in (lambda: None, lambda: None, lambda: os.utime(place.toy / "model.safetensors"), lambda: None):
        change()
        assert place.compare(low).code == 0
        hashed.append(len(calls))
    assert hashed == [1, 1, 2, 2]
    (place.out / "weights.json").write_text("{")
    assert place.compare(low).code == 0
    assert len(calls) == 3


def test_a_model_on_the_hub_is_known_by_its_commit(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_toy("llama").config
    config._commit_hash = "0123"
    monkeypatch.setattr(Source, "config", lambda _self: config)
    hub = Source("owner/name", "owner/name")
    assert origin.hashed(hub, place.out / "weights.json") is None
    found = origin.origin(hub, None)
    assert (found["model_sha256"], found["model_commit"]) == (None, "0123")


def test_a_damaged_row_is_told_and_replaced_on_request(place: Place) -> None:
    low = place.recipe("low.yaml", SVD)
    assert place.compare(low).code == 0
    (place.out / "rows" / "low.json").write_text("{")
    assert "low.json is damaged" in place.compare(low).error
    (place.out / "rows" / "low.json").write_text("[]")
    assert place.compare(low, overwrite=True).code == 0
    assert place.row("low")["label"] == "low"


# --------------------------------------------------------------------------------------------------------------- failures


def test_a_budget_that_is_too_small_is_a_row(place: Place) -> None:
    low, bits = place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS)
    ended = place.compare(low, bits, ratio=[0.5, 0.99])
    assert ended.code == 1
    assert "low-0.99 cannot be made: " in ended.out
    assert ended.out.index("low-0.99 cannot be made") < ended.out.index("low-0.5: ")
    rows = {row["label"]: row for row in place.table()["rows"]}
    assert rows["low-0.5"]["error"] is None
    assert "at ratio 0.99" in rows["low-0.99"]["error"]
    text = (place.out / "table.md").read_text()
    assert [line["token perplexity"] for line in markdown_cells(text) if line["ratio"] == "0.99"] == ["failed"] * 2
    assert f"- low-0.99 failed: {rows['low-0.99']['error']}" in text
    assert not (place.out / "rows" / "low-0.99.json").exists()


def test_a_recipe_that_fails_at_work_does_not_end_the_others(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = order.compress

    def failing(recipe: Recipe, out: Path, **options: Any) -> Any:
        if Path(out).name == "low":
            raise LexigramError("the fit came to nothing")
        return real(recipe, out, **options)

    files = place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS)
    with monkeypatch.context() as patch:
        patch.setattr(order, "compress", failing)
        ended = place.compare(*files)
    assert ended.code == 1
    assert "low failed: the fit came to nothing" in ended.out
    rows = {row["label"]: row for row in place.table()["rows"]}
    assert rows["bits"]["error"] is None
    assert rows["low"]["error"] == "the fit came to nothing"
    assert place.compare(*files).code == 0  # what failed is tried again
    assert place.table()["rows"][1]["error"] is None


OUT_OF_MEMORY: dict[str, tuple[Callable[[], object], str]] = {
    "python": (lambda: bytearray(2**62), "MemoryError"),
    "torch": (lambda: torch.empty(10**15), "can't allocate memory"),
    "a GPU": (
        lambda: _raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        "Tried to allocate",
    ),
}


def _raised(error: BaseException) -> None:
    raise error


def failing(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], object]) -> None:
    """Let the compression of this name do something else."""
    real = order.compress

    def instead(recipe: Recipe, out: Path, **options: Any) -> Any:
        return act() if Path(out).name == name else real(recipe, out, **options)

    monkeypatch.setattr(order, "compress", instead)


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_memory_that_does_not_suffice_for_a_row_ends_no_other(
    kind: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, says = OUT_OF_MEMORY[kind]
    failing(monkeypatch, "low", act)
    ended = place.compare(place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS))
    assert ended.code == 1
    rows = {row["label"]: row for row in place.table()["rows"]}
    assert "memory did not suffice (" in rows["low"]["error"]
    assert says in rows["low"]["error"]
    assert "--workers" in rows["low"]["error"]
    assert rows["bits"]["error"] is None


def test_the_error_of_a_row_names_the_layer_that_could_not_be_fitted(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def diverging(*args: Any) -> Fitted:
        calls.append(1)
        if len(calls) == 1:
            torch.linalg.eigh(torch.full((3, 3), torch.nan))
        return fit_group(*args)

    monkeypatch.setattr("lexigram.fitting.fit_group", diverging)
    ended = place.compare(place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS), workers=1)
    assert ended.code == 1
    rows = {row["label"]: row for row in place.table()["rows"]}
    assert re.match(r"model\.layers\.\d\.\S+ cannot be compressed: .*failed to converge", rows["low"]["error"])
    assert rows["bits"]["error"] is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TypeError("a mistake"), RuntimeError("shapes differ")])
def test_what_nobody_can_mend_ends_everything(
    error: BaseException, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "low", lambda: _raised(error))
    with pytest.raises(type(error)):
        lexigram.compare({"low": place.library()}, place.out, place.settings)


def test_another_tokenizer_beside_a_model_is_an_error_in_its_row(place: Place) -> None:
    low = place.recipe("low.yaml", SVD)
    assert place.compare(low).code == 0
    (place.out / "rows" / "low.json").unlink()
    byte_tokenizer().save_pretrained(place.out / "models" / "low")
    assert place.compare(low).code == 1
    assert "split the text into different tokens" in place.table()["rows"][1]["error"]


BAD: dict[str, tuple[Callable[[Place], Said], str]] = {
    "unknown key": (
        lambda at: at.compare(at.recipe("a.yaml", "ratioo: 1")),
        "a.yaml: unknown key 'ratioo'; did you mean",
    ),
    "unknown method": (lambda at: at.compare(at.recipe("a.yaml", "method: {name: x}")), "a.yaml: unknown method 'x'"),
    "no mapping": (lambda at: at.compare(at.recipe("a.yaml", "- a")), "holds no mapping"),
    "missing file": (lambda at: at.compare(at.folder / "no.yaml"), "no.yaml cannot be read: No such file"),
    "one stem twice": (
        lambda at: at.compare(at.recipe("a.yaml", SVD), at.recipe("more/a.yml", BITS)),
        "more/a.yml would both be the row 'a'; rename",
    ),
    "a recipe named dense": (lambda at: at.compare(at.recipe("dense.yaml", SVD)), "'dense' is the row of"),
    "ratio out of range": (lambda at: at.compare(at.recipe("a.yaml", SVD), ratio=[2]), "a: ratio is 2.0; it should be"),
    "two ratios of one name": (
        lambda at: at.compare(at.recipe("a.yaml", SVD), ratio=[0.4, 0.4000001]),
        "a at ratio 0.4 and a at ratio 0.4000001 would both be the row 'a-0.4'",
    ),
    "a name that no file should have": (
        lambda at: at.compare(at.recipe(".a.yaml", SVD)),
        "the recipe's name '.a' cannot be that of a file",
    ),
    "the name of a healed row": (
        lambda at: at.compare(at.recipe("a.yaml", SVD), at.recipe("a, healed.yaml", BITS), heal=at.words),
        "'a, healed' is the row of 'a' once it is healed; give that recipe another name",
    ),
    "healing on nothing": (
        lambda at: at.compare(at.recipe("a.yaml", SVD), heal_steps=2),
        "--heal-steps says how to heal, and nothing on what; name a text with --heal",
    ),
    "missing text to heal on": (
        lambda at: at.compare(at.recipe("a.yaml", SVD), heal="/no.txt"),
        "there is no file /no.txt",
    ),
    "too little memory": (
        lambda at: at.compare(at.recipe("a.yaml", SVD), max_ram="1MiB"),
        "a memory limit of 1 MiB is too small",
    ),
    "no size of memory": (lambda at: at.compare(at.recipe("a.yaml", SVD), max_ram="x"), "'x' is no size of memory"),
    "no recipe can be made": (lambda at: at.compare(at.recipe("a.yaml", SVD), ratio=[0.99, 0.999]), "at ratio 0.99"),
    "missing text": (lambda at: at.compare(at.recipe("a.yaml", SVD), text="/no.txt"), "there is no file /no.txt"),
    "missing calibration": (
        lambda at: at.compare(at.recipe("a.yaml", SVD), calibration="/no.txt"),
        "there is no file /no.txt",
    ),
    "context too long": (lambda at: at.compare(at.recipe("a.yaml", SVD), context=129), "more than the 128 positions"),
    "no windows": (lambda at: at.compare(at.recipe("a.yaml", SVD), windows=0), "windows is 0; it must be at least 1"),
    "no context": (lambda at: at.compare(at.recipe("a.yaml", SVD), context=1), "context is 1; it must be at least 2"),
    "a wrong option beside a recipe": (
        lambda at: at.compare(at.recipe("a.yaml", SVD), sequences=0),
        "--sequences is 0; it should be greater than or equal to 1",
    ),
    "two calibrations": (
        lambda at: at.compare(
            at.recipe("a.yaml", SVD), at.recipe("b.yaml", f"{SVD}calibration: {{seed: 3}}"), calibration="demo"
        ),
        "a and b differ in calibration.seed: 0 and 3; all rows share",
    ),
    "out is a file": (
        lambda at: at.compare(at.recipe("a.yaml", SVD), out=at.recipe("file", "x")),
        "file exists and is not a folder",
    ),
    "out holds something else": (
        lambda at: at.compare(at.recipe("a.yaml", SVD), out=at.recipe("other/x.txt", "x").parent),
        "other is not empty and holds no comparison",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_before_any_work(case: str, place: Place, compressed: list[str]) -> None:
    run, says = BAD[case]
    ended = run(place)
    assert ended.code == 1
    assert says in ended.error, ended.error
    assert compressed == []
    assert not place.out.exists()


@pytest.mark.parametrize("missing", ["--recipes", "--text", "--out"])
def test_what_must_be_given(missing: str, place: Place) -> None:
    options = {"--recipes": "a.yaml", "--text": "demo", "--out": "x"}
    del options[missing]
    ended = place.run("compare", place.toy, *(part for pair in options.items() for part in pair))
    assert ended.code == 2
    assert f"'{missing}'" in ended.err


def test_no_recipes_in_the_library(tmp_path: Path) -> None:
    with pytest.raises(LexigramError, match="there are no recipes to compare"):
        lexigram.compare({}, tmp_path / "out", ComparisonSettings(texts=["demo"]))


@pytest.mark.parametrize("name", ["a/b", "a\\b", "..", ".a", "", "a\nb"])
def test_a_name_that_would_be_another_place_is_refused(name: str, place: Place) -> None:
    with pytest.raises(LexigramError, match="cannot be that of a file, which its row"):
        planning.plan_comparison({name: place.library()}, place.out, place.settings)


def test_a_dry_run_writes_nothing(place: Place) -> None:
    ended = place.compare(place.recipe("low.yaml", SVD), ratio=[0.4, 0.5], dry_run=True)
    assert ended.code == 0
    assert "low-0.5" in ended.out
    assert not place.out.exists()


# ----------------------------------------------------------------------------------------------------------------- memory


def comparable(found: Plan) -> dict[str, int]:
    """The stages' memory without what the process takes anyway."""
    return {name: size - found.memory["save"] for name, size in found.memory.items() if name != "plan"}


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> dict[str, Plan]:
    """The plans that compressions are given from now on, by name; nothing is compressed."""
    plans: dict[str, Plan] = {}

    def instead(_recipe: Recipe, out: Path, *, prepared: Plan, **_options: Any) -> Any:
        plans[Path(out).name] = prepared
        raise LexigramError("far enough")

    monkeypatch.setattr(order, "compress", instead)
    return plans


def test_every_row_is_planned_as_it_would_be_alone(place: Place) -> None:
    recipes = {"low": place.library(), "pruned": place.library(method=lexigram.WandaConfig())}
    settings = place.settings.model_copy(update={"ratios": (0.4, 0.5)})
    found = planning.plan_comparison(recipes, place.out, settings, workers=2)
    assert len(found.jobs) == 4
    for job in found.jobs:
        alone = lexigram.plan(job.recipe, cache=place.out / "cache", workers=2)
        assert job.plan is not None
        assert job.plan.tokens == alone.tokens
        assert (job.plan.way, comparable(job.plan)) == (alone.way, comparable(alone))
        assert "try models out" not in job.plan.memory


def test_rows_are_planned_again_once_the_model_has_written_its_text(place: Place, prepared: dict[str, Plan]) -> None:
    """It is sampled in no row's own time, so that no row needs the whole model for it."""
    calibration = Calibration(sequences=2, length=16)
    settings = place.settings.model_copy(update={"ratios": (0.4, 0.5)})
    recipes = {"low": place.library(calibration=calibration)}
    found = planning.plan_comparison(recipes, place.out, settings)
    assert all(job.plan is not None and "try models out" in job.plan.memory for job in found.jobs)
    order.run_comparison(found)
    assert list(prepared) == ["low-0.4", "low-0.5"]
    for each in prepared.values():
        assert each.tokens is not None
        assert each.tokens == prepared["low-0.4"].tokens
        assert "try models out" not in each.memory


def test_tokens_that_are_there_are_those_of_the_recipe(place: Place) -> None:
    recipe = place.library()
    read = lexigram.plan(recipe).tokens
    assert read is not None
    assert lexigram.plan(recipe, tokens=read).tokens is read
    with pytest.raises(LexigramError, match="are 3 sequences of 64, and the recipe asks for 8 of 64; leave them out"):
        lexigram.plan(recipe, tokens=TokenSequences(read.ids[:3], "a part"))


def test_workers_and_the_limit_reach_every_compression(
    place: Place, prepared: dict[str, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS)
    assert place.compare(*files, workers=2, ratio=0.4).code == 1  # nothing is compressed here
    assert [plan.way.workers for plan in prepared.values()] == [2, 2]
    many = max(plan.memory_bytes for plan in prepared.values())
    assert place.compare(*files, workers=1, ratio=0.4).code == 1
    few = max(plan.memory_bytes for plan in prepared.values())
    prepared.clear()
    assert place.compare(*files, workers=2, ratio=0.4, max_ram=(few + many) // 2, out=place.folder / "less").code == 1
    assert [plan.way.workers for plan in prepared.values()] == [1, 1]
    prepared.clear()
    lexigram.compare({"low": place.library()}, place.out, place.settings, workers=3)
    assert prepared["low"].way.workers == 3
    monkeypatch.setattr("lexigram.planning._WORTH_WORKERS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    lexigram.compare({"low": place.library()}, place.out, place.settings)
    assert prepared["low"].way.workers == 2, "one a core"
    with pytest.raises(LexigramError, match="a memory limit of 1 MiB is too small"):
        lexigram.compare({"low": place.library()}, place.out, place.settings, max_ram=2**20)


# ---------------------------------------------------------------------------------------------------------------- healing

FORMS = ("bits_per_weight", "bytes_before", "bytes_after", "model_bytes", "requested_ratio", "calibration_seed")


def test_both_factors_sparse_and_healed(place: Place, long: Path) -> None:
    """At a ratio that this form is for; its figures are those of its folders by themselves."""
    method = "method: {name: double-sparse, iterations: 2, tightening: 2}\ninclude: q_proj\n"
    ended = place.compare(place.recipe("both.yaml", method), ratio=[0.9], heal=long, heal_steps=2)
    assert ended.code == 0, ended.err
    assert [row["label"] for row in place.table()["rows"]] == ["dense", "both-0.9", "both, healed-0.9"]
    plain, healed = place.row("both-0.9"), place.row("both, healed-0.9")
    assert {key: healed[key] for key in FORMS} == {key: plain[key] for key in FORMS}
    assert plain["bytes_after"] <= 0.1 * plain["bytes_before"]
    assert all(math.isfinite(row["token_perplexity"]) for row in (plain, healed))
    records = [json.loads(file.read_text()) for file in sorted((place.out / "models").glob("*/run.json"))]
    assert sorted(len(record["healing"]) for record in records) == [0, 1]
    leaves = [layer["factors"][side] for record in records for layer in record["layers"] for side in ("left", "right")]
    assert {leaf["form"] for leaf in leaves} == {"sparse"}


def test_a_healed_row_stands_behind_its_own(place: Place, long: Path) -> None:
    """The oracle: `heal` and `eval` by themselves."""
    low = place.recipe("low.yaml", SVD)
    ended = place.compare(low, ratio=[0.4, 0.5], heal=long, heal_steps=2)
    assert ended.code == 0, ended.err
    assert "low, healed-0.4: to heal" in ended.out
    names = ["dense", "low-0.4", "low, healed-0.4", "low-0.5", "low, healed-0.5"]
    found = place.table()
    assert [row["label"] for row in found["rows"]] == names
    plain, healed = place.row("low-0.5"), place.row("low, healed-0.5")
    assert healed["recipe"] == "low, healed"
    assert {key: healed[key] for key in FORMS} == {key: plain[key] for key in FORMS}
    assert healed["made_from"]["recipe"] == plain["made_from"]["recipe"]
    assert (healed["made_from"]["healing"]["steps"], healed["made_from"]["healing"]["texts"]) == (2, [str(long)])
    assert len(healed["made_from"]["healing_text_sha256"]) == 64
    assert (len(plain["run"]["healing"]), len(healed["run"]["healing"])) == (0, 1)
    assert healed["run"]["healing"][0]["steps"] == 2
    assert (plain["mean_relative_error"] is None, healed["mean_relative_error"]) == (False, None)
    assert healed["seconds_fitting"] > healed["run"]["healing"][0]["seconds"] > 0

    alone, figures = place.folder / "alone", place.folder / "figures.json"
    by_hand = place.run(
        *("heal", place.out / "models" / "low-0.5", "--text", long, "--steps", 2, "--out", alone),
        *("--against", place.toy, "--device", "cpu"),
    )
    assert by_hand.code == 0, by_hand.err
    evaluate = ("--text", place.words, "--context", 64, "--windows", 2, "--json", figures)
    assert place.run("eval", alone, "--reference", place.toy, *evaluate).code == 0
    measured = json.loads(figures.read_text())
    for key in ("token_perplexity", "word_perplexity", "kl", "top1_agreement", "bits_per_weight", "reference", "text"):
        assert healed[key] == measured[key], key

    text = (place.out / "table.md").read_text()
    shown = [(line["recipe"], line["ratio"], line["output error"] == "") for line in markdown_cells(text)]
    assert shown[1:3] == [("low", "0.4", False), ("low, healed", "0.4", True)]
    said = "trained on long.txt by the objective `kl`, 2 steps at most, 8 sequences a step, rate 0.002."
    assert f"their values {said}" in text
    curves = plot.curves([Row.model_validate(row) for row in found["rows"]])
    assert {name: [point.ratio for point in points] for name, points in curves.items()} == {
        "low": [0.4, 0.5],
        "low, healed": [0.4, 0.5],
    }


@pytest.mark.parametrize("objective", get_args(ObjectiveName))
def test_every_objective_heals(objective: str, place: Place, long: Path) -> None:
    """`tokens` imitates no model, and so is given none."""
    low = place.recipe("low.yaml", SVD)
    ended = place.compare(low, heal=long, heal_steps=1, heal_objective=objective)
    assert ended.code == 0, ended.err
    [healing] = place.row("low, healed")["run"]["healing"]
    assert healing["settings"]["objective"] == objective
    assert (healing["original"] is None) == (objective == "tokens")


@pytest.fixture
def healed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that are healed from now on."""
    names: list[str] = []
    real = order.heal

    def counted(folder: Path, out: Path, settings: HealingSettings, **options: Any) -> Any:
        assert options["resume"] is True  # a training that ended early goes on
        names.append(Path(out).name)
        return real(folder, out, settings, **options)

    monkeypatch.setattr(order, "heal", counted)
    return names


def test_a_comparison_that_was_killed_goes_on_with_its_healing(
    place: Place, long: Path, compressed: list[str], healed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    low = place.recipe("low.yaml", SVD)
    options = {"heal": long, "heal_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(order, "heal", lambda *_args, **_options: _raised(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            cli.app([*_arguments(place, low), "--heal", str(long), "--heal-steps", "1"], standalone_mode=False)
    assert sorted(file.stem for file in (place.out / "rows").iterdir()) == ["dense", "low"]
    before = contents(place.out / "rows")
    compressed.clear()
    assert place.compare(low, **options).code == 0
    assert (compressed, healed) == ([], ["low, healed"])
    after = contents(place.out / "rows")
    assert {name: after[name] for name in before} == before

    row = place.row("low, healed")
    (place.out / "rows" / "low, healed.json").unlink()
    ended = place.compare(low, **options)
    assert "low, healed: to evaluate" in ended.out
    assert (compressed, healed) == ([], ["low, healed"])
    assert place.row("low, healed")["token_perplexity"] == row["token_perplexity"]
    assert "low, healed: there already" in place.compare(low, **options).out


def test_a_model_that_was_dropped_is_made_once_more_to_be_healed(
    place: Place, long: Path, compressed: list[str], healed: list[str]
) -> None:
    low = place.recipe("low.yaml", SVD)
    assert place.compare(low, drop_models=True).code == 0
    before = (place.out / "rows" / "low.json").read_bytes()
    compressed.clear()
    ended = place.compare(low, drop_models=True, heal=long, heal_steps=1)
    assert ended.code == 0, ended.err
    assert "low, healed: to heal; low was dropped, and is compressed again for it" in ended.out
    assert (compressed, healed) == (["low"], ["low, healed"])
    assert (place.out / "rows" / "low.json").read_bytes() == before
    assert [row["error"] for row in place.table()["rows"]] == [None] * 3
    assert list((place.out / "models").iterdir()) == list((place.out / "origins").iterdir()) == []


def test_only_models_that_were_made_just_now_are_dropped(
    place: Place, long: Path, compressed: list[str], healed: list[str]
) -> None:
    """One that an earlier call has kept stays, whether its row is there, to be made, or only its healed one is."""
    low, bits, kept = place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS), place.out / "models" / "low"
    assert place.compare(low).code == 0
    before = contents(kept)
    assert place.compare(low, bits, drop_models=True).code == 0
    (place.out / "rows" / "low.json").unlink()
    assert place.compare(low, bits, drop_models=True).code == 0
    assert place.compare(low, drop_models=True, heal=long, heal_steps=1).code == 0
    assert (compressed, healed) == (["low", "bits"], ["low, healed"])
    assert list((place.out / "models").iterdir()) == [kept]
    assert contents(kept) == before
    assert [file.name for file in (place.out / "origins").iterdir()] == ["low.json"]


def test_what_somebody_else_put_beside_a_model_is_not_dropped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(model: str, *args: Any, **options: Any) -> Any:
        if Path(model).name == "low":
            (Path(model) / "notes.txt").write_text("mine")
        return evaluated(model, *args, **options)

    monkeypatch.setattr(order, "evaluated", noted)
    assert place.compare(place.recipe("low.yaml", SVD), drop_models=True).code == 0
    assert [file.name for file in (place.out / "models" / "low").iterdir()] == ["notes.txt"]
    assert list((place.out / "origins").iterdir()) == []


def test_other_settings_or_another_text_make_another_healed_row(
    place: Place, long: Path, compressed: list[str], healed: list[str]
) -> None:
    low = place.recipe("low.yaml", SVD)
    assert place.compare(low, heal=long, heal_steps=1).code == 0
    plain = (place.out / "rows" / "low.json").read_bytes()
    ended = place.compare(low, heal=long, heal_steps=2)
    assert "low, healed.json was made from something else: healing.steps was 1 and is 2" in ended.error
    long.write_text(f"w0 {long.read_text()}")
    assert "healing_text_sha256 was '" in place.compare(low, heal=long, heal_steps=1).error
    compressed.clear()
    healed.clear()
    ended = place.compare(low, heal=long, heal_steps=2, overwrite=True)
    assert ended.code == 0, ended.err
    assert "low, healed is made again: healing.steps was 1 and is 2" in ended.out
    assert (compressed, healed) == ([], ["low, healed"])
    assert place.row("low, healed")["run"]["healing"][0]["settings"]["steps"] == 2
    assert (place.out / "rows" / "low.json").read_bytes() == plain


def test_what_failed_is_not_healed(
    place: Place, long: Path, healed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "low", lambda: _raised(LexigramError("the fit came to nothing")))
    files = place.recipe("low.yaml", SVD), place.recipe("bits.yaml", BITS)
    assert place.compare(*files, heal=long, heal_steps=1).code == 1
    errors = {row["label"]: row["error"] for row in place.table()["rows"]}
    assert errors == {
        "dense": None,
        "low": "the fit came to nothing",
        "low, healed": "low failed: the fit came to nothing",
        "bits": None,
        "bits, healed": None,
    }
    assert healed == ["bits, healed"]


# ------------------------------------------------------------------------------------------------------------------- plot


def png_is_whole(content: bytes) -> bool:
    """Whether the chunks of a PNG follow each other to the last one, each with the right checksum."""
    at, kinds = 8, []
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, checked = content[at + 4 : at + 8], content[at + 4 : at + 8 + length]
        kinds.append(kind)
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length]) == (zlib.crc32(checked),)
        at += 12 + length
    return content[:8] == b"\x89PNG\r\n\x1a\n" and kinds[0] == b"IHDR" and kinds[-1] == b"IEND"


def test_the_plot_is_there_in_both_formats(place: Place, plotted: None) -> None:
    assert place.compare(place.recipe("low.yaml", SVD), ratio=[0.4, 0.5]).code == 0
    assert png_is_whole((place.out / "plot.png").read_bytes())
    assert ElementTree.parse(place.out / "plot.svg").getroot().tag.endswith("}svg")
    assert "](plot.svg)" in (place.out / "table.md").read_text()
    before = (place.out / "plot.svg").read_bytes()
    assert place.compare(place.recipe("low.yaml", SVD), ratio=[0.4, 0.5]).code == 0
    assert (place.out / "plot.svg").read_bytes() == before


def test_without_matplotlib_the_plan_says_so_and_the_table_is_there(
    place: Place, plotted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = place.recipe("low.yaml", SVD)
    assert place.compare(low).code == 0
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # any import of it fails
    dry = place.compare(low, dry_run=True)
    assert "matplotlib is not installed; run: pip install 'lexigram[plot]'" in dry.out
    ended = place.compare(low)
    assert ended.code == 0
    assert ended.out.index("the plot is left out") < ended.out.index("written: ")
    assert (place.out / "table.md").is_file()
    assert not list(place.out.glob("plot.*"))  # an earlier plot would belong to another table
    assert "plot.svg" not in (place.out / "table.md").read_text()


def row(recipe: str, ratio: float | None = None, seed: int = 0, **figures: Any) -> Row:
    return Row(label=f"{recipe}-{ratio}-{seed}", recipe=recipe, requested_ratio=ratio, calibration_seed=seed, **figures)


def rows_to_draw() -> list[Row]:
    return [
        row(DENSE, token_perplexity=10.0, bits_per_weight=16.0),
        *(
            row(name, ratio, seed, token_perplexity=base / (1 - ratio) + seed, bits_per_weight=16 * (1 - ratio))
            for name, base in (("one", 11.0), ("two", 12.0))
            for ratio in (0.2, 0.6)
            for seed in (0, 1)
        ),
        row("broken", 0.2, error="it failed"),
        row("endless", 0.2, token_perplexity=None, bits_per_weight=3.0),
    ]


def test_what_is_drawn_is_what_was_measured() -> None:
    found = plot.curves(rows_to_draw())
    assert list(found) == ["one", "two"]
    first, second = found["one"]
    assert (first.ratio, second.ratio) == (0.2, 0.6)
    assert first.bits.mean == pytest.approx(12.8)
    assert first.perplexity.mean == pytest.approx(11 / 0.8 + 0.5)
    assert first.perplexity.spread == pytest.approx(0.5)


@pytest.mark.parametrize("single", [False, True])
def test_labels_stand_on_no_other_and_the_axis_is_logarithmic(single: bool, plotted: None) -> None:
    from matplotlib.text import Annotation

    rows = [each for each in rows_to_draw() if not single or each.requested_ratio != 0.6]
    drawing = plot._drawing(rows, "title")
    [axes] = drawing.axes
    assert axes.get_yscale() == "log"
    boxes = [child.get_window_extent() for child in axes.get_children() if isinstance(child, Annotation)]
    said = [child.get_text() for child in axes.get_children() if isinstance(child, Annotation)]
    assert said == ["dense 10", "one", "two"] if single else ["dense 10", "0.2", "0.6", "0.2", "0.6"]
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])
    assert (axes.get_legend() is None) == single


def test_a_broken_model_does_not_press_the_others_into_one_line(plotted: None) -> None:
    from matplotlib.text import Annotation

    rows = [*rows_to_draw(), row("one", 0.9, token_perplexity=3e12, bits_per_weight=1.6)]
    [axes] = plot._drawing(rows, "title").axes
    assert axes.get_ylim()[1] < 1e5
    assert "0.9 (3e+12)" in [child.get_text() for child in axes.get_children() if isinstance(child, Annotation)]


@pytest.mark.parametrize("rows", [[], [row(DENSE, token_perplexity=10.0)], [row("one", 0.2, error="it failed")]])
def test_a_plot_of_nothing_is_still_a_plot(rows: list[Row], plotted: None, tmp_path: Path) -> None:
    plot.draw(rows, "nothing", [tmp_path / "plot.png"])
    assert png_is_whole((tmp_path / "plot.png").read_bytes())


# ------------------------------------------------------------------------------------------------------------ small parts


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("m --recipes a b --out x", "m --recipes a --recipes b --out x"),
        ("m --recipes a --recipes b c", "m --recipes a --recipes b --recipes c"),
        ("m -r 1 2 --windows 3 -r 4", "m -r 1 -r 2 --windows 3 -r 4"),
        ("m --out x y", "m --out x y"),
        ("--recipes=a b", "--recipes=a b"),
        ("--recipes a -- m", "--recipes a -- m"),
        ("", ""),
    ],
)
def test_several_values_of_one_option(given: str, expected: str) -> None:
    assert repeated(given.split(), {"--recipes", "-r"}) == expected.split()


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ("a.b", "[1, 2]", "[1, 3]")),
        ({}, {"a": 1}, ("a", "None", "1")),
        ({"a": 1}, {}, ("a", "1", "None")),
        ({"a": {"b": 1}}, {"a": None}, ("a", "{'b': 1}", "None")),
    ],
)
def test_the_first_difference_is_named(old: Mapping[str, Any], new: Mapping[str, Any], found: Any) -> None:
    assert difference(dict(old), dict(new)) == found


def test_means_and_spreads() -> None:
    assert figure([]) is None
    assert figure([1.0, None]) is None
    assert figure([2.0]) == (2.0, None)
    assert figure([1.0, 4.0, 2.5]) == (2.5, 1.5)


def test_what_failed_or_is_infinite_stands_in_the_table_with_a_note() -> None:
    header, cells, notes = table(rows_to_draw())
    at = header.index("token perplexity")
    assert {line[0]: line[at] for line in cells if line[0] in ("broken", "endless")} == {
        "broken": "failed",
        "endless": "inf",
    }
    assert notes == ["broken-0.2-0 failed: it failed", "endless-0.2-0: the perplexity is beyond a float"]


def test_one_failed_seed_leaves_the_others_in_their_line() -> None:
    rows = [row("a", 0.2, 0, token_perplexity=5.0), row("a", 0.2, 1, error="no")]
    [line] = lines_of(rows)
    assert len(line.measured) == 1
    header, [cells], notes = table(rows)
    assert cells[header.index("token perplexity")] == "5.00"
    assert notes == ["a-0.2-1 failed: no"]


def test_names_do_not_break_the_markdown_table() -> None:
    text = markdown([row("a|b", 0.2, error="two\nlines")], title="t", plot=None, command="c")
    assert "| a\\|b | 0.2 |" in text
    assert "failed: two lines\n" in text


@pytest.mark.parametrize("ending", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("killed")])
def test_a_table_is_never_half_written(ending: Exception, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    low = place.recipe("low.yaml", SVD)
    assert place.compare(low).code == 0
    before = (place.out / "table.md").read_bytes()
    real = Path.write_text

    def half(file: Path, text: str, **options: Any) -> int:
        if "table.md" not in file.name:
            return real(file, text, **options)
        real(file, text[: len(text) // 2], **options)
        raise ending

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises((LexigramError, RuntimeError), match=r"killed|table\.md cannot be written: No space left"):
        lexigram.compare({"low": place.library()}, place.out, place.settings)
    assert (place.out / "table.md").read_bytes() == before


def test_a_record_of_an_evaluation_is_that_of_eval(place: Place) -> None:
    figures = place.folder / "figures.json"
    told = ("--text", place.words, "--context", 64, "--stride", 32, "--windows", 2, "--reference", place.toy)
    assert place.run("eval", place.toy, *told, "--device", "cpu", "--json", figures).code == 0
    steps: list[tuple[int, int]] = []
    found = evaluated(
        str(place.toy),
        [str(place.words)],
        read_texts([str(place.words)]),
        reference=str(place.toy),
        context=64,
        stride=32,
        windows=2,
        device=torch.device("cpu"),
        progress=lambda done, total: steps.append((done, total)),
    )
    measured = json.loads(figures.read_text())
    assert {**measured, "seconds": 0} == {"label": str(place.toy), **found, "seconds": 0}
    assert steps == [(1, 2), (2, 2)]


def test_rows_are_watched_by_their_names(place: Place) -> None:
    """And told when they are done, in their order."""
    calibration = Calibration(text=(str(place.words),), sequences=8, length=64)
    recipe = Recipe(
        model=str(place.toy), method=lexigram.SvdConfig(), calibration=calibration, device="cpu", include=("q_proj",)
    )
    settings = ComparisonSettings(texts=(str(place.words),), context=64, windows=2)
    prepared = planning.plan_comparison({"low": recipe}, place.out, settings)
    seen: list[str] = []

    @contextmanager
    def watch(name: str) -> Iterator[Any]:
        seen.append(name)
        yield order.Silent()

    order.run_comparison(prepared, watch=watch, tell=lambda done: seen.append(f"{done.label} done"))
    assert seen == ["dense", "dense done", "low", "low done"]
    shutil.rmtree(place.out)
