"""Tables: they show the figures that they were given, at the widths of real terminals, whatever the names look like."""

import io
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from rich.table import Table

import ledgers
from lexigram import CospadiConfig, Plan, Recipe, RunRecord, SvdConfig
from lexigram.allocation.units import Allocation, Unit
from lexigram.comparison import table as comparison
from lexigram.factors import (
    Bfloat,
    Codec,
    DenseSpec,
    FactorSpec,
    GroupSpec,
    Integer,
    ProductSpec,
    SharedSpec,
    SparseSpec,
    SumSpec,
    factor_spec,
)
from lexigram.records import LayerRecord
from lexigram.reporting import tables
from lexigram.targets import Target


def shown(table: Table, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def cells(table: Table, width: int = 200) -> list[list[str]]:
    """The rows of a table as drawn, first the header."""
    lines = [line.replace("┃", "│") for line in shown(table, width).splitlines()]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


def low_rank(shape: tuple[int, int], rank: int) -> ProductSpec:
    return ProductSpec(left=DenseSpec(rows=shape[0], cols=rank), right=DenseSpec(rows=rank, cols=shape[1]))


def dictionary(
    shape: tuple[int, int], atoms: int, sparsity: int, bits: Any = 16, codec: Codec | None = None
) -> ProductSpec:
    left = SparseSpec(rows=shape[0], cols=atoms, nonzeros=sparsity * shape[0], codec=codec or Bfloat(bits=bits))
    return ProductSpec(left=left, right=DenseSpec(rows=atoms, cols=shape[1], codec=codec or Bfloat()))


def sharing(shape: tuple[int, int], atoms: int, sparsity: int, codec: Codec) -> ProductSpec:
    left = SparseSpec(rows=shape[0], cols=atoms, nonzeros=sparsity * shape[0], codec=codec)
    return ProductSpec(left=left, right=SharedSpec(name="group_0", rows=atoms, cols=shape[1]))


def layer(name: str, index: int | None, error: float, spec: ProductSpec | None = None) -> LayerRecord:
    return ledgers.layer(name, index, spec or low_rank((64, 32), 5), error)


def record(**changes: Any) -> RunRecord:
    content: dict[str, Any] = {
        "lexigram": "0",
        "command": "",
        "versions": {},
        "machine": {},
        "recipe": {},
        "model": "m",
        "weights_sha256": "",
        "calibration_source": "",
        "calibration_sha256": "",
        "calibration_tokens": 1,
        "requested_ratio": 0.2,
        "ratio": 0.204,
        "bits_per_weight": 12.7364,
        "parameter_ratio": 0.25,
        "bytes_before": 10_000,
        "bytes_after": 7_960,
        "model_bytes_before": 1_212_345,
        "model_bytes_after": 1_210_305,
        "source_file_bytes": None,
        "bytes_by_kind": {
            "not compressed": 1_202_345,
            "dense values": 5_000,
            "sparse values": 2_900,
            "sparse mask": 60,
        },
        "mean_relative_error": 0.1,
        "seconds": 1.0,
        "peak_memory_bytes": 1,
        "device_peak_memory_bytes": None,
        "stages": {},
        "files": [],
        "layers": [],
    }
    return RunRecord.model_validate({**content, **changes})


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (123_456, "123.5 kB"),
        (98_362_432, "98.4 MB"),
        (2_500_000_000, "2.5 GB"),
        (14e12, "14000.0 GB"),
        (-1500, "-1.5 kB"),
    ],
)
def test_sizes(count: float, said: str) -> None:
    assert tables.size(count) == said


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (low_rank((576, 1536), 230), "rank 230"),
        (dictionary((1536, 576), 306, 153), "k 306 s 153"),
        (dictionary((1536, 576), 306, 153, bits=14), "k 306 s 153 14-bit"),
        (dictionary((1536, 576), 306, 153, codec=Integer(bits=8)), "k 306 s 153 int8 x int8"),
        (
            ProductSpec(
                left=SparseSpec(rows=1536, cols=306, nonzeros=153 * 1536, codec=Integer(bits=4)),
                right=DenseSpec(rows=306, cols=576),
            ),
            "k 306 s 153 int4",
        ),
        (
            ProductSpec(
                left=SparseSpec(rows=1536, cols=306, nonzeros=153 * 1536),
                right=DenseSpec(rows=306, cols=576, codec=Integer(bits=6)),
            ),
            "k 306 s 153 x int6",
        ),
        (sharing((1536, 576), 306, 153, Integer(bits=8)), "k 306 s 153 int8 shared"),
        (sharing((1536, 576), 306, 153, Bfloat()), "k 306 s 153 shared"),
        (
            ProductSpec(
                left=DenseSpec(rows=576, cols=230, codec=Integer(bits=8)),
                right=SharedSpec(name="group_1", rows=230, cols=1536),
            ),
            "rank 230 int8 shared",
        ),
        (DenseSpec(rows=3, cols=4), "dense 3x4"),
        (DenseSpec(rows=3, cols=4, codec=Integer(bits=4, symmetric=True)), "dense 3x4 int4"),
        (SparseSpec(rows=4, cols=9, nonzeros=10), "sparse 4x9, 2.5 a row"),
        (
            ProductSpec(left=SparseSpec(rows=4, cols=4, nonzeros=8), right=SparseSpec(rows=4, cols=9, nonzeros=4)),
            "(sparse 4x4, 2 a row) (sparse 4x9, 1 a row)",
        ),
        (SparseSpec(rows=4, cols=9, nonzeros=12, index="list", codec=Integer(bits=4)), "sparse 4x9, 3 a row int4"),
        (SparseSpec(rows=4, cols=9, nonzeros=12, block=(2, 3)), "sparse 4x9, 3 a row in 2x3 blocks"),
        (SparseSpec(rows=4, cols=9, nonzeros=18, block=(1, 9)), "sparse 4x9, 2 of 4 rows"),
        (SparseSpec(rows=4, cols=9, nonzeros=12, block=(4, 1)), "sparse 4x9, 3 of 9 columns"),
        (
            ProductSpec(
                left=SparseSpec(rows=8, cols=6, nonzeros=24, block=(1, 3), codec=Integer(bits=8)),
                right=DenseSpec(rows=6, cols=5, codec=Bfloat(bits=12)),
            ),
            "k 6 s 3 in 1x3 blocks int8 x 12-bit",
        ),
        (
            SumSpec(
                left=low_rank((64, 32), 5), right=SparseSpec(rows=64, cols=32, nonzeros=128, codec=Integer(bits=8))
            ),
            "rank 5 + sparse 64x32, 2 a row int8",
        ),
        (
            ProductSpec(
                left=SharedSpec(name="group_0", rows=4, cols=4),
                right=SumSpec(left=DenseSpec(rows=4, cols=9), right=SparseSpec(rows=4, cols=9, nonzeros=4)),
            ),
            "(shared 4x4) (dense 4x9 + sparse 4x9, 1 a row)",
        ),
    ],
)
def test_forms_in_the_fields_own_words(spec: FactorSpec, said: str) -> None:
    assert tables.form(spec) == said


def test_forms_of_records_from_before_there_were_blocks() -> None:
    spec = SparseSpec(rows=4, cols=9, nonzeros=10).model_dump()
    del spec["index"], spec["block"]
    assert tables.form(factor_spec.validate_python(spec)) == "sparse 4x9, 2.5 a row"


def test_the_bytes_table_shows_every_kind_largest_first_and_the_sums() -> None:
    rows = cells(tables.bytes_table(record()))
    assert rows[0] == ["kind", "bytes", "share"]
    assert rows[1] == ["not compressed", "1,202,345", "99.3%"]
    assert [row[0] for row in rows[1:5]] == ["not compressed", "dense values", "sparse values", "sparse mask"]
    assert rows[5] == ["model", "1,210,305", "99.8% of before"]
    assert rows[6] == ["compressed layers", "7,960", "79.6% of before"]
    assert rows[7:] == [["bits a weight", "12.736", ""]]


def test_the_error_map_has_a_row_a_layer_and_a_column_a_kind() -> None:
    layers = [
        layer("model.layers.0.self_attn.q_proj", 0, 0.1234),
        layer("model.layers.0.mlp.up_proj", 0, 0.2),
        layer("model.layers.7.self_attn.q_proj", 7, 0.0),
        layer("lm_head", None, 0.5),
    ]
    assert cells(tables.error_map(layers)) == [
        ["layer", "q_proj", "up_proj", "lm_head"],
        ["0", "0.1234", "0.2000", ""],
        ["7", "0.0000", "", ""],
        ["-", "", "", "0.5000"],
    ]


def test_two_layers_of_one_kind_in_a_decoder_layer_both_show() -> None:
    """GPT-2 has a c_proj in its attention and one in its MLP."""
    layers = [layer("transformer.h.0.attn.c_proj", 0, 0.1), layer("transformer.h.0.mlp.c_proj", 0, 0.3)]
    assert cells(tables.error_map(layers)) == [["layer", "attn.c_proj", "mlp.c_proj"], ["0", "0.1000", "0.3000"]]


def test_layers_without_any_error_do_not_break_the_colours() -> None:
    assert cells(tables.error_map([layer("model.layers.0.q", 0, 0.0)]))[1] == ["0", "0.0000"]


def test_the_forms_table_groups_by_kind_and_shape() -> None:
    layers = [
        layer("model.layers.0.q_proj", 0, 0.1),
        layer("model.layers.1.q_proj", 1, 0.3),
        layer("model.layers.1.up_proj", 1, 0.2, dictionary((172, 64), 47, 24)),
    ]
    first, second, queries, up = cells(tables.forms_table(layers))
    assert [" ".join(parts).strip() for parts in zip(first, second, strict=True)] == [
        "layers",
        "kind",
        "shape",
        "form",
        "each",
        "mean error",
        "worst error",
    ]
    assert queries == ["2", "q_proj", "64x32", "rank 5", "960 B", "0.2000", "0.3000"]
    assert up[:4] == ["1", "up_proj", "172x64", "k 47 s 24"]
    assert up[4] == "15.3 kB"  # 2 x 64 x 47 + 2 x 24 x 172 + 47 x 172 / 8 = 15,283


def test_forms_that_differ_within_a_kind_have_rows_of_their_own() -> None:
    ranks = (5, 7, 5)
    layers = [
        layer(f"model.layers.{i}.q_proj", i, 0.1 + i / 10, low_rank((64, 32), rank)) for i, rank in enumerate(ranks)
    ]
    _, _, five, seven = cells(tables.forms_table(layers))
    assert five == ["2", "q_proj", "64x32", "rank 5", "960 B", "0.2000", "0.3000"]
    assert seven == ["1", "q_proj", "64x32", "rank 7", "1.3 kB", "0.2000", "0.2000"]


def plan_of(units: list[Unit] | None, bytes_after: int) -> Plan:
    """A plan for three layers, with its allocation or still without."""
    targets = [Target(name, (64, 32), i, name, transposed=False, bias=False) for i, name in enumerate(NAMES)]
    allocation = None if units is None else Allocation(units=tuple(units))
    plan = SimpleNamespace(
        recipe=Recipe(model="[m]"),
        ratio=0.2,
        targets=targets,
        allocation=allocation,
        specs={} if allocation is None else allocation.specs,
        bytes_before=12_288,
        bytes_after=bytes_after,
        uncompressed_bytes=1_000,
    )
    return cast("Plan", plan)


NAMES = [f"model.layers.{i}.q_proj" for i in range(3)]


def test_the_plan_has_a_row_a_form_and_the_bytes_of_its_layers() -> None:
    units = [
        Unit(members=(name,), method=SvdConfig(), spec=GroupSpec(members=(low_rank((64, 32), rank),)))
        for name, rank in zip(NAMES, (5, 7, 5), strict=True)
    ]
    _, five, seven, everything, bits, rest, model = cells(tables.plan_table(plan_of(units, 3_264)))
    assert five == ["2", "q_proj", "64x32", "rank 5", "8.2 kB", "1.9 kB"]
    assert seven == ["1", "q_proj", "64x32", "rank 7", "4.1 kB", "1.3 kB"]
    assert everything == ["3", "all", "", "", "12.3 kB", "3.3 kB"]
    assert bits == ["", "bits a weight", "", "", "16.00", "4.25"]
    assert rest == ["", "rest", "", "bfloat16", "1.0 kB", "1.0 kB"]
    assert model == ["", "model", "", "", "13.3 kB", "4.3 kB"]


def test_the_plan_counts_what_layers_share_in_a_row_of_its_own() -> None:
    codec = Integer(bits=8, group=32)
    pair = tuple(sharing((64, 32), 20, 10, codec) for _ in range(2))
    shared = DenseSpec(rows=20, cols=32, codec=codec)
    units = [
        Unit(members=tuple(NAMES[:2]), method=CospadiConfig(), spec=GroupSpec(members=pair, shared=shared)),
        Unit(
            members=(NAMES[2],),
            method=CospadiConfig(),
            spec=GroupSpec(members=(dictionary((64, 32), 20, 10, codec=codec),)),
        ),
    ]
    _, two, one, dictionaries, everything, *_ = cells(tables.plan_table(plan_of(units, 3_560)))
    # 640 values in 20 groups with 3 bytes each, 64 x 20 / 8 bytes of masks.
    assert two == ["2", "q_proj", "64x32", "k 20 s 10 int8 shared", "8.2 kB", "1.7 kB"]
    assert one == ["1", "q_proj", "64x32", "k 20 s 10 int8 x int8", "4.1 kB", "1.6 kB"]
    assert dictionaries == ["1", "shared", "", "dictionaries", "", "700 B"]
    assert everything == ["3", "all", "", "", "12.3 kB", "3.6 kB"]


def test_a_plan_that_waits_for_the_grams_says_so() -> None:
    _, queries, everything, _, rest, _ = cells(tables.plan_table(plan_of(None, 9_830)))
    assert queries == ["3", "q_proj", "64x32", "by the Grams", "12.3 kB", ""]
    assert everything == ["3", "all", "", "", "12.3 kB", "9.8 kB"]
    assert rest == ["", "rest", "", "bfloat16", "1.0 kB", "1.0 kB"]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    ("spec", "figures"),
    [
        (dictionary((11008, 4096), 1234, 617, bits=14), ("k 1234 s 617", "11008x4096", "23.7 MB")),
        (
            dictionary((11008, 4096), 1234, 617, codec=Integer(bits=8)),
            ("k 1234 s 617", "int8 x int8", "11008x4096", "13.8 MB"),
        ),
    ],
    ids=["14 bits", "int8"],
)
def test_a_whole_llama_fits_the_terminal(spec: ProductSpec, figures: tuple[str, ...], width: int) -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layers = [layer(f"model.layers.{i}.x.{kind}", i, 0.1234, spec) for i in range(3) for kind in kinds]
    for table, lines in ((tables.forms_table(layers), 7), (tables.error_map(layers), 3)):
        drawn = shown(table, width).splitlines()
        assert max(map(len, drawn)) <= width
        assert sum("0.1234" in line for line in drawn) == lines
        assert "…" not in shown(table, width)
    forms = shown(tables.forms_table(layers), width)
    for figure in figures:
        assert forms.count(figure) == 7


def evaluation(label: str, **changes: Any) -> dict[str, Any]:
    figures = {
        "label": label,
        "text": "wiki.test.raw",
        "context": 1024,
        "stride": 1024,
        "windows": 20,
        "model_bytes": 98_362_432,
        "bits_per_weight": 7.998,
        "token_perplexity": 23.614,
        "word_perplexity": 61.27,
        "kl": None,
        "top1_agreement": None,
        "tokens": 20_460,
    }
    return {**figures, **changes}


def test_evaluations_side_by_side() -> None:
    (table,) = tables.evaluation_tables([evaluation("dense"), evaluation("small", kl=0.12345, top1_agreement=0.876)])
    rows = cells(table)[-2:]  # after a header of three lines
    assert rows[0] == ["dense", "98.4 MB", "8.00", "23.61", "61.3", "", "", "20,460"]
    assert rows[1] == ["small", "98.4 MB", "8.00", "23.61", "61.3", "0.1235", "87.6%", "20,460"]
    assert "wiki.test.raw, context 1024, 20 windows" in shown(table)


@pytest.mark.parametrize("change", [{"text": "other.txt"}, {"context": 512}, {"windows": 3}, {"stride": 100}])
def test_evaluations_that_cannot_be_compared_get_tables_of_their_own(change: dict[str, Any]) -> None:
    rows = [evaluation("a"), evaluation("b", **change), evaluation("c")]
    first, second = tables.evaluation_tables(rows)
    assert [row[0] for row in cells(first) if row[0] not in ("", "model")] == ["a", "c"]
    assert [row[0] for row in cells(second) if row[0] not in ("", "model")] == ["b"]
    assert str(next(iter(change.values()))) in str(second.title)


def test_labels_and_texts_are_not_markup() -> None:
    (table,) = tables.evaluation_tables([evaluation("[red]x[/red]", text="[b]")])
    assert cells(table)[-1][0] == "[red]x[/red]"
    assert "[b], context 1024" in shown(table)


def test_an_infinite_perplexity_is_the_same_from_a_file_and_at_once() -> None:
    """JSON has no number for it, so a file has null; what was not measured is no key at all."""
    for infinite in (None, math.inf):
        figures = evaluation("a", token_perplexity=infinite, word_perplexity=infinite)
        (table,) = tables.evaluation_tables([figures])
        assert cells(table)[-1][3:5] == [comparison.perplexity(infinite)] * 2 == ["inf", "inf"]


def test_missing_figures_leave_cells_empty() -> None:
    (table,) = tables.evaluation_tables([{"label": "a", "token_perplexity": 2.0}])
    assert cells(table)[-1] == ["a", "", "", "2.00", "", "", "", ""]
