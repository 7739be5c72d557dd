"""The redundancy that was found: figures against stored tensors and hand counts, what is drawn, and every way to refuse."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console

import lexigram
from conftest import toy_folder
from ledgers import layer
from lexigram import LexigramError, Recipe, RunRecord, cli
from lexigram.factors import (
    Bfloat,
    Codec,
    DenseSpec,
    FactorSpec,
    Integer,
    ProductSpec,
    SharedSpec,
    Sparse,
    SparseSpec,
    SumSpec,
    empty,
    encode,
)
from lexigram.methods import METHODS
from lexigram.recipe import Calibration
from lexigram.records import LayerRecord
from lexigram.reporting import heat_maps, redundancy, tables
from lexigram.reporting.redundancy import (
    ATOM_BITS,
    ATOMS,
    BITS,
    COEFFICIENT_BITS,
    DENSITY,
    ENTRY_BITS,
    ERROR,
    LOW_RANK_BITS,
    NONZEROS,
    RANK,
    RANK_SHARE,
    LayerFigures,
)
from lexigram.staging import RUN_FILE

BF16 = Bfloat()


def low_rank(shape: tuple[int, int], rank: int, codec: Codec = BF16) -> ProductSpec:
    return ProductSpec(
        left=DenseSpec(rows=shape[0], cols=rank, codec=codec), right=DenseSpec(rows=rank, cols=shape[1], codec=codec)
    )


def sparse(shape: tuple[int, int], nonzeros: int, bits: Any = 4) -> SparseSpec:
    return SparseSpec(rows=shape[0], cols=shape[1], nonzeros=nonzeros, codec=Integer(bits=bits))


def dense(shape: tuple[int, int], bits: Any) -> DenseSpec:
    return DenseSpec(rows=shape[0], cols=shape[1], codec=Integer(bits=bits))


def dictionary(shape: tuple[int, int], atoms: int, nonzeros: int, shared: str | None = None) -> ProductSpec:
    right = (
        DenseSpec(rows=atoms, cols=shape[1], codec=Integer(bits=6))
        if shared is None
        else SharedSpec(name=shared, rows=atoms, cols=shape[1])
    )
    return ProductSpec(left=sparse((shape[0], atoms), nonzeros * shape[0], bits=8), right=right)


def record(layers: Sequence[LayerRecord], shared: Sequence[dict[str, Any]] = (), model: str = "m") -> RunRecord:
    after = sum(each.bytes_after for each in layers) + sum(each["bytes"] for each in shared)
    weights = sum(each.shape[0] * each.shape[1] for each in layers)
    return RunRecord.model_validate(
        {
            **dict.fromkeys(("lexigram", "command", "weights_sha256", "calibration_source", "calibration_sha256"), ""),
            **{key: {} for key in ("versions", "machine", "stages")},
            "recipe": {"method": {"name": "lowrank-sparse"}},
            "model": model,
            "calibration_tokens": 1,
            "requested_ratio": 0.2,
            "ratio": 1 - after / (2 * weights),
            "bits_per_weight": 8 * after / weights,
            "parameter_ratio": 0.2,
            "bytes_before": 2 * weights,
            "bytes_after": after,
            "model_bytes_before": 2 * weights,
            "model_bytes_after": after,
            "source_file_bytes": None,
            "bytes_by_kind": {"dense values": after},
            "mean_relative_error": 0.1,
            "seconds": 1.0,
            "peak_memory_bytes": 1,
            "device_peak_memory_bytes": None,
            "files": [],
            "layers": layers,
            "shared": shared,
        }
    )


def figures(*specs: FactorSpec) -> list[dict[str, float]]:
    """Of layers in these forms, one a decoder layer."""
    layers = [layer(f"model.layers.{i}.mlp.up_proj", i, spec) for i, spec in enumerate(specs)]
    return [each.figures for each in redundancy.layer_figures(record(layers))]


MIXED: list[LayerRecord] = [
    layer("model.layers.2.self_attn.q_proj", 2, low_rank((64, 32), 8, Integer(bits=8)), 0.5),
    layer("model.layers.2.mlp.up_proj", 2, sparse((64, 32), 512, bits=3), 0.1),
    layer(
        "model.layers.3.self_attn.q_proj",
        3,
        SumSpec(left=low_rank((64, 32), 4, Integer(bits=8)), right=sparse((64, 32), 1024)),
        0.2,
    ),
    layer("model.layers.5.self_attn.q_proj", 5, dense((64, 32), 8), 0.3),
    layer("model.layers.5.mlp.up_proj", 5, dictionary((64, 32), 20, 5), 0.4),
    layer("lm_head", None, dense((128, 32), 6), 0.01),
]
"""Every form, some layers left out and one outside of the decoder layers."""


# ---------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # 8 x 2 x 5 x (64 + 32) bits over 2048 weights
        (low_rank((64, 32), 5), {BITS: 3.75, RANK: 5, RANK_SHARE: 5 / 32, LOW_RANK_BITS: 16, ERROR: 0.1}),
        # 512 values of 4 bits and a scale of 16 + 4 for each 128 of them, a mask of 2048 bits
        (sparse((64, 32), 512), {BITS: (4 * 512 + 4 * 20 + 2048) / 2048, DENSITY: 0.25, ENTRY_BITS: 4, ERROR: 0.1}),
        (
            SumSpec(left=low_rank((64, 32), 4), right=sparse((64, 32), 512)),
            {
                BITS: 3.0 + (4 * 512 + 4 * 20 + 2048) / 2048,
                RANK: 4,
                RANK_SHARE: 4 / 32,
                DENSITY: 0.25,
                ENTRY_BITS: 4,
                LOW_RANK_BITS: 16,
                ERROR: 0.1,
            },
        ),
        # coefficients: 5 a row in 8 bits, 320 in 3 groups, a mask of 64 x 20; atoms: 640 in 6 bits and 5 groups
        (
            dictionary((64, 32), 20, 5),
            {
                BITS: (320 * 8 + 3 * 24 + 1280 + 640 * 6 + 5 * 16 + 32) / 2048,  # 5 zeros of 6 bits take 4 bytes
                ATOMS: 20,
                NONZEROS: 5,
                COEFFICIENT_BITS: 8,
                ATOM_BITS: 6,
                ERROR: 0.1,
            },
        ),
        (dense((64, 32), 4), {BITS: 4 + 20 / 128, ENTRY_BITS: 4, ERROR: 0.1}),
        # a product of two sparse matrices is none of the forms that have words of their own
        (
            ProductSpec(left=sparse((64, 64), 128, bits=8), right=sparse((64, 32), 128, bits=8)),
            {BITS: (2 * (128 * 8 + 24) + 64 * 64 + 64 * 32) / 2048, ERROR: 0.1},
        ),
    ],
    ids=["low rank", "sparse", "sum", "dictionary", "dense", "sparse product"],
)
def test_figures_of_every_form(spec: FactorSpec, expected: dict[str, float]) -> None:
    assert figures(spec) == [pytest.approx(expected)]
    assert list(figures(spec)[0]) == list(expected)


def test_figures_are_those_of_the_stored_tensors() -> None:
    """Oracle: the factors themselves, filled at random; numpy counts their rank, their non-zeros and their bytes."""
    generator = torch.Generator().manual_seed(0)
    spec = SumSpec(left=low_rank((48, 40), 7), right=sparse((48, 40), 480, bits=8))
    factor = empty(spec)
    left, right, entries = (torch.randn(size, generator=generator) for size in ((48, 7), (7, 40), (480,)))
    assert isinstance(spec.left, ProductSpec)
    product = [encode(left, spec.left.left), encode(right, spec.left.right)]
    support = torch.zeros(48 * 40, dtype=torch.bool)
    support[torch.randperm(48 * 40, generator=generator)[:480]] = True
    assert isinstance(spec.right, SparseSpec)
    kept = Sparse.encode(
        torch.zeros(48 * 40).masked_scatter_(support, entries).view(48, 40), spec.right, support.view(48, 40)
    )
    stored = sum(part.nbytes for module in (*product, kept) for part in module.parameters())
    assert stored == sum(part.nbytes for part in factor.parameters())
    [found] = figures(spec)
    dense_product = product[0].to_dense().numpy() @ product[1].to_dense().numpy()
    assert found[RANK] == np.linalg.matrix_rank(dense_product, tol=1e-3)
    assert found[DENSITY] == np.count_nonzero(kept.support().numpy()) / (48 * 40)
    assert found[BITS] == pytest.approx(8 * stored / (48 * 40))


def test_beside_other_forms_a_part_that_is_missing_is_told_as_nothing() -> None:
    """W = L + S: without L the rank is 0, without S the density; where no entry is dropped it is 1."""
    shape = (64, 32)
    found = figures(low_rank(shape, 8), sparse(shape, 512), dense(shape, 4), dictionary(shape, 20, 5))
    assert [each.get(RANK) for each in found] == [8, 0, 0, None]
    assert [each.get(RANK_SHARE) for each in found] == [0.25, 0, 0, None]
    assert [each.get(DENSITY) for each in found] == [0, 0.25, 1, None]
    assert [each.get(ATOMS) for each in found] == [None, None, None, 20]


def test_what_no_layer_has_is_not_told() -> None:
    shape = (64, 32)
    assert all(DENSITY not in each for each in figures(low_rank(shape, 8), dense(shape, 4)))
    assert all(RANK not in each for each in figures(sparse(shape, 512), dense(shape, 4)))
    assert all(not {RANK, DENSITY} & each.keys() for each in figures(dense(shape, 8), dense(shape, 4)))


def test_shared_bytes_are_split_by_weights_and_none_is_lost() -> None:
    layers = [
        layer("model.layers.0.self_attn.q_proj", 0, dictionary((64, 32), 20, 5, shared="group_0")),
        layer("model.layers.0.self_attn.k_proj", 0, dictionary((192, 32), 20, 5, shared="group_0")),
        layer("model.layers.0.self_attn.v_proj", 0, sparse((64, 32), 512)),
    ]
    leaf = DenseSpec(rows=20, cols=32, codec=Integer(bits=6))
    members = [each.name for each in layers[:2]]
    run = record(layers, [{"name": "group_0", "members": members, "factors": leaf.model_dump(), "bytes": leaf.bytes}])
    found = redundancy.layer_figures(run)
    bits = [each.figures[BITS] * each.weights for each in found]
    assert bits[0] == pytest.approx(8 * (layers[0].bytes_after + leaf.bytes / 4))
    assert bits[1] == pytest.approx(8 * (layers[1].bytes_after + leaf.bytes * 3 / 4))
    assert sum(bits) / sum(each.weights for each in found) == pytest.approx(run.bits_per_weight)
    assert found[0].figures[ATOMS] == found[1].figures[ATOMS] == 20
    assert found[0].figures[ATOM_BITS] == 6  # that of the matrix referred to


def test_a_shared_right_factor_is_a_low_rank() -> None:
    leaf = DenseSpec(rows=6, cols=32)
    spec = ProductSpec(left=DenseSpec(rows=64, cols=6), right=SharedSpec(name="group_0", rows=6, cols=32))
    shared = {"name": "group_0", "members": ["model.layers.0.q"], "factors": leaf.model_dump(), "bytes": leaf.bytes}
    [found] = redundancy.layer_figures(record([layer("model.layers.0.q", 0, spec)], [shared]))
    assert found.figures[RANK] == 6
    assert found.figures[BITS] == pytest.approx(8 * low_rank((64, 32), 6).bytes / 2048)


def test_means_by_kind_weigh_every_layer_by_its_weights() -> None:
    found = [
        LayerFigures("q_proj", 0, 100, {BITS: 4.0, RANK: 10}),
        LayerFigures("up_proj", 0, 100, {BITS: 1.0}),
        LayerFigures("q_proj", 1, 300, {BITS: 8.0}),
    ]
    first, second = redundancy.by_kind(found)
    assert first == ("q_proj", 2, {BITS: 7.0, RANK: 10})
    assert second == ("up_proj", 1, {BITS: 1.0})


# ------------------------------------------------------------------------------------------------------------------- maps


def test_maps_have_kinds_down_and_layers_across() -> None:
    found = redundancy.layer_figures(record(MIXED))
    maps = {each.quantity: each for each in redundancy.heat_maps(found)}
    assert all(each.kinds == ["q_proj", "up_proj"] and each.layers == [2, 3, 4, 5] for each in maps.values())
    none = np.nan
    expected = {
        ERROR: [[0.5, 0.2, none, 0.3], [0.1, none, none, 0.4]],
        RANK_SHARE: [[8 / 32, 4 / 32, none, 0], [0, none, none, none]],
        DENSITY: [[0, 0.5, none, 1], [0.25, none, none, none]],
        ATOMS: [[none] * 4, [none, none, none, 20]],
        NONZEROS: [[none] * 4, [none, none, none, 5]],
        ENTRY_BITS: [[none, 4, none, 8], [3, none, none, none]],
    }
    assert maps.keys() == expected.keys() | {BITS}
    for name, values in expected.items():
        np.testing.assert_allclose(maps[name].values, values, err_msg=name)
    assert redundancy.constants(found) == {LOW_RANK_BITS: 8, COEFFICIENT_BITS: 8, ATOM_BITS: 6}
    assert [each.kind for each in redundancy.outside(found)] == ["lm_head"]


def test_what_is_the_same_everywhere_is_told_and_not_drawn() -> None:
    layers = [layer(f"model.layers.{i}.q_proj", i, sparse((64, 32), 512), 0.1) for i in range(3)]
    found = redundancy.layer_figures(record(layers))
    assert [each.quantity for each in redundancy.heat_maps(found)] == [BITS, ERROR]
    assert redundancy.constants(found) == {DENSITY: 0.25, ENTRY_BITS: 4}


def test_two_layers_of_one_kind_in_a_decoder_layer_have_rows_of_their_own() -> None:
    """GPT-2 has a c_proj in its attention and one in its MLP."""
    layers = [
        layer(f"transformer.h.{i}.{name}", i, low_rank((64, 32), 1 + i))
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    ]
    found = redundancy.layer_figures(record(layers))
    assert all(
        each.kinds == ["attn.c_attn", "attn.c_proj", "mlp.c_proj"] and not np.isnan(each.values).any()
        for each in redundancy.heat_maps(found)
    )


def shown(run: RunRecord, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(tables.kinds_table(run))
    return console.export_text()


def test_the_table_by_kind_shows_the_means() -> None:
    layers = [layer(f"model.layers.{i}.q_proj", i, low_rank((64, 32), rank)) for i, rank in enumerate((4, 7))]
    lines = shown(record([*layers, MIXED[1]]), 80).splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert cells == [
        ["2", "q_proj", "4.125", "5.5", "0", "", "16"],  # 16 x 5.5 x (64 + 32) bits over 2048 weights
        ["1", "up_proj", f"{8 * MIXED[1].bytes_after / 2048:.4g}", "0", "0.25", "3", ""],
    ]


@pytest.mark.parametrize(("layers", "width"), [(MIXED[:4], 80), (MIXED, 120)])
def test_the_table_by_kind_fits_the_terminal(layers: list[LayerRecord], width: int) -> None:
    run = record(layers)
    told = redundancy.quantities(redundancy.layer_figures(run))
    drawn = shown(run, width)
    assert "…" not in drawn
    headers = "".join(drawn.split())  # words of a header stand below each other, so each is looked for
    assert all(word in headers for name in told if name not in (RANK_SHARE, ERROR) for word in name.split())
    assert len(drawn.splitlines()[-2].split("│")) == 2 + 2 + len(told) - 2


# ---------------------------------------------------------------------------------------------------------------- picture


@pytest.fixture
def plotted() -> None:
    pytest.importorskip("matplotlib")


def test_what_is_drawn_are_the_maps(plotted: None) -> None:
    from matplotlib.collections import QuadMesh

    run = record(MIXED)
    maps = redundancy.heat_maps(redundancy.layer_figures(run))
    drawing = heat_maps._drawing(run)
    panels = {axes.get_title("left"): axes for axes in drawing.axes if axes.get_title("left")}
    assert list(panels) == [each.quantity for each in maps]
    for each in maps:
        axes = panels[each.quantity]
        [mesh] = [drawn for drawn in axes.collections if isinstance(drawn, QuadMesh)]
        drawn = np.ma.filled(mesh.get_array(), np.nan)  # type: ignore[no-untyped-call]
        np.testing.assert_array_equal(drawn.reshape(each.values.shape), each.values)
        assert mesh.colorbar is not None
        assert mesh.colorbar.ax.get_ylabel()
        assert [label.get_text() for label in axes.get_yticklabels()] == each.kinds
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first kind is on top
    said = drawing.get_suptitle() + drawing.get_supxlabel()
    assert "bits of a low-rank factor 8" in said
    assert "lm_head: stored bits a weight 6.1" in said
    assert "hatched" in said


def test_the_largest_value_is_light_and_rounding_is_no_structure(plotted: None) -> None:
    layers = [layer(f"model.layers.{i}.q_proj", i, low_rank((64, 32), 5), 0.2 + i / 1000) for i in range(3)]
    axes = heat_maps._drawing(record(layers)).axes
    [errors] = [each for each in axes if each.get_title("left") == ERROR]
    low, high = errors.collections[0].get_clim()
    assert (low, high) == pytest.approx((0.9 * 0.202, 0.202))


@pytest.mark.parametrize(
    "layers",
    [
        MIXED[-1:],
        MIXED[:1],
        [layer("model.layers.0.q_proj", 0, low_rank((64, 32), 5), 0.0)],
        [layer(f"model.layers.{i}.q_proj", i, low_rank((64, 32), 1 + i % 30)) for i in range(100)],
        [layer(f"h.0.experts.{i}.up", 0, low_rank((64, 32), 1 + i % 30)) for i in range(100)],
    ],
    ids=["only outside", "a single layer", "no error", "100 layers", "100 experts"],
)
def test_any_record_can_be_drawn(layers: list[LayerRecord], plotted: None, tmp_path: Path) -> None:
    heat_maps.draw(record(layers, model="a $strange_name$ " * 20), tmp_path / "map.png")
    assert is_picture(tmp_path / "map.png")


def test_thirty_layers_of_seven_kinds_stand_beside_each_other(plotted: None) -> None:
    """No name, number or title stands on another panel's."""
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layers = [
        layer(
            f"model.layers.{i}.x.{kind}",
            i,
            SumSpec(
                left=low_rank((64, 32), 1 + (i + j) % 9), right=sparse((64, 32), 100 + i, bits=(3, 4, 6, 8)[j % 4])
            ),
            0.1 + i / 100,
        )
        for i in range(30)
        for j, kind in enumerate(kinds)
    ]
    drawing = heat_maps._drawing(record([*layers, MIXED[-1]]))
    drawing.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in drawing.axes]
    assert len(boxes) == 2 * 5
    drawn = [box for box in boxes if box is not None]
    assert not any(a.overlaps(b) for index, a in enumerate(drawn) for b in drawn[:index])
    whole = drawing.bbox
    assert all(whole.x0 <= box.x0 < box.x1 <= whole.x1 and whole.y0 <= box.y0 < box.y1 <= whole.y1 for box in drawn)


def is_picture(file: Path) -> bool:
    """Whether a file is what its suffix says, read by others than its writer."""
    if file.suffix.lower() == ".svg":
        return ElementTree.parse(file).getroot().tag.endswith("}svg")
    if file.suffix.lower() == ".pdf":
        return file.read_bytes().startswith(b"%PDF") and b"%%EOF" in file.read_bytes()[-10:]
    from PIL import Image

    with Image.open(file) as image:
        image.verify()
    return True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a run leaves it, without the model, which is not read."""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / RUN_FILE).write_text(record([MIXED[0], MIXED[-1]]).model_dump_json())
    return tmp_path / "small"


@pytest.mark.parametrize("name", ["map.png", "map.svg", "map.pdf", "MAP.SVG"])
def test_files_are_whole_and_the_same_each_time(
    name: str, folder: Path, plotted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # what would look for a display cannot be imported
    lexigram.plot_redundancy(folder, tmp_path / name)
    assert is_picture(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    lexigram.plot_redundancy(str(folder), str(tmp_path / name))
    assert (tmp_path / name).read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"small", name}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("map.jpg", r"'\.jpg', which is no known format; end it in \.png, \.svg, \.pdf"),
        ("map", "which is no known format"),
        ("none/map.png", "there is no folder .*none; make it, or name another file"),
        ("small/run.json/map.png", r"run\.json is not a folder"),
        ("folder.png", r"folder\.png is a folder"),
    ],
)
def test_a_file_that_cannot_be_is_refused(name: str, said: str, folder: Path, plotted: None, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(LexigramError, match=said):
        lexigram.plot_redundancy(folder, tmp_path / name)
    assert {file.name for file in tmp_path.iterdir()} == {"small", "folder.png"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"is no compressed model \(it has no run\.json\)"),
        ("{}", "was not written by lexigram"),
        ("[]", "holds no JSON object"),
    ],
)
def test_what_is_no_compressed_folder_is_refused(content: str | None, said: str, plotted: None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(LexigramError, match=said):
        lexigram.plot_redundancy(tmp_path, tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()


def test_without_matplotlib_it_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # any import of it fails
    with pytest.raises(LexigramError, match=r"matplotlib is not installed; run: pip install 'lexigram\[plot\]'"):
        lexigram.plot_redundancy(folder, tmp_path / "map.png")


def test_a_write_that_fails_leaves_nothing(plotted: None, tmp_path: Path) -> None:
    (tmp_path / "map.png").mkdir()
    with pytest.raises(LexigramError, match=r"map\.png cannot be written"):
        heat_maps.draw(record(MIXED[:1]), tmp_path / "map.png")
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


# ---------------------------------------------------------------------------------------------------------------- command


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["lexigram", *map(str, args)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0, *capsys.readouterr()  # type: ignore[return-value]


def test_the_command_draws_beside_its_tables(
    folder: Path, plotted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "map.png"
    code, out, _ = run(monkeypatch, capsys, "inspect", folder, "--plot", file)
    assert code == 0
    assert is_picture(file)
    assert "means by kind" in out
    assert f"written: {file}" in out
    file.unlink()
    code, out, _ = run(monkeypatch, capsys, "inspect", folder, "--json", "--plot", file)
    assert json.loads(out)["model"] == "m"
    assert is_picture(file)


def test_the_command_refuses_before_it_prints(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(monkeypatch, capsys, "inspect", folder, "--plot", tmp_path / "map.gif")
    assert (code, out) == (1, "")
    assert "no known format" in err


@pytest.mark.parametrize(
    ("name", "method", "drawn"),
    [
        ("gpt2", {"name": "wanda"}, {BITS, ERROR}),
        ("llama", {"name": "svd"}, {BITS, RANK_SHARE, ERROR}),
        ("llama", {"name": "oats", "rounds": 2}, {BITS, RANK_SHARE, DENSITY, ERROR}),
    ],
)
def test_a_compressed_toy_is_drawn(
    name: str, method: dict[str, Any], drawn: set[str], words: Path, plotted: None, tmp_path: Path
) -> None:
    config = METHODS[method["name"]].model_validate(method)
    recipe = Recipe(
        model=str(toy_folder(tmp_path / "toy", name)),
        method=config,  # type: ignore[arg-type]
        ratio=0.3,
        calibration=Calibration(text=(str(words),), sequences=4, length=32),
    )
    made = lexigram.compress(recipe, tmp_path / "small")
    found = redundancy.layer_figures(made)
    total = sum(each.figures[BITS] * each.weights for each in found) / sum(each.weights for each in found)
    assert total == pytest.approx(made.bits_per_weight)
    assert {each.quantity for each in redundancy.heat_maps(found)} >= drawn
    lexigram.plot_redundancy(tmp_path / "small", tmp_path / "map.svg")
    assert is_picture(tmp_path / "map.svg")
