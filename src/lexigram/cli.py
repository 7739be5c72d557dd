"""The command line: one command a stage, no logic. Every option ends in a field of a recipe or an argument of the API."""

import sys
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Annotated, get_args

import torch
import transformers
import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.markup import escape

from lexigram import report
from lexigram.calibration.text import read_texts
from lexigram.calibration.tokens import token_ids
from lexigram.devices import resolve_device
from lexigram.errors import LexigramError
from lexigram.evaluation import evaluate, greedy_sentence
from lexigram.jsonfiles import check_writable, read_json, write_json
from lexigram.methods import METHODS, PRESETS, CospadiConfig, QuantizeConfig
from lexigram.pipeline import compress as run_compress
from lexigram.planning import plan as make_plan
from lexigram.progress import drawing
from lexigram.recipe import KNAPSACK, UNIFORM, Recipe, explain, merge
from lexigram.records import RunRecord, versions
from lexigram.staging import RUN_FILE, check_target
from lexigram.transformers_io import export_dense, open_model

app = typer.Typer(
    name="lexigram",
    help="Make language models smaller after training, without retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)

MethodName = Enum("MethodName", {name: name for name in METHODS}, type=str)  # type: ignore[misc]
PresetName = Enum("PresetName", {name: name for name in PRESETS}, type=str)  # type: ignore[misc]


class Accounting(str, Enum):
    """How a ratio is counted."""

    bytes = "bytes"
    paper = "paper"


class DtypeName(str, Enum):
    """A dtype that a model may be opened in."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a hub id such as Qwen/Qwen3-0.6B, or `demo`.")
]
_BUDGET, _TEXT, _MACHINE = "What and how much", "Calibration", "Machine and output"
_FORM, _SOLVER = "Form", "Solver of cospadi"
_FAST, _RECIPE = PRESETS["fast"], Recipe.model_fields

Preset = Annotated[
    PresetName | None,
    typer.Option(
        metavar="|".join(PRESETS),
        help="`published` is the paper's own (hours on a real model). [default: fast]",
        rich_help_panel=_SOLVER,
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        "--ratio",
        "-r",
        help="Share of the compressed layers' stored bytes to remove. [default: 0.2]",
        rich_help_panel=_BUDGET,
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        "-c",
        metavar="TEXT",
        help="A .txt or .jsonl file (repeatable), `demo`, `hub:NAME`, or `self`: sampled from the model. [default: self]",
        rich_help_panel=_TEXT,
    ),
]
Device = Annotated[str, typer.Option(help="`cpu`, `cuda`, ...; `auto` takes a GPU where there is one.")]
Dtype = Annotated[
    DtypeName,
    typer.Option(
        metavar="DTYPE",
        help="Of what is not compressed: bfloat16, float16, float32, or `auto`, what the checkpoint has.",
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe", help="YAML with any of these settings, such as a result's recipe.yaml; options win over it."
    ),
]


def _choices(field: str, config: type[BaseModel] = CospadiConfig) -> str:
    """What a field of a config may be, as a metavar."""
    return "|".join(map(str, get_args(config.model_fields[field].annotation)))


def _examples(*lines: str) -> str:
    return "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in lines)


def _version(wanted: bool) -> None:
    if wanted:
        _say("lexigram {lexigram} (torch {torch}, transformers {transformers}, Python {python})".format(**versions()))
        raise typer.Exit


@app.callback(epilog="`lexigram COMMAND --help` shows a command's options, with examples.")
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the versions and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Make language models smaller after training, without retraining."""


@app.command(
    epilog=_examples(
        "lexigram compress demo --out smaller --calibration demo",
        "lexigram compress Qwen/Qwen3-0.6B --out smaller --ratio 0.3 --calibration c4.jsonl",
        "lexigram compress ./model --out low-rank --method svd --ratio 0.2 --calibration text.txt",
        "lexigram compress ./model --out four-bits --method quantize --value-bits 4 --calibration text.txt",
        "lexigram compress ./model --out spent --ratio 0.5 --allocation knapsack --cache kept --calibration text.txt",
    )
)
def compress(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it appears when it is complete.")],
    recipe: RecipeFile = None,
    method: Annotated[
        MethodName | None,
        typer.Option("--method", "-m", help="How layers are factored. [default: cospadi]", rich_help_panel=_BUDGET),
    ] = None,
    ratio: Ratio = None,
    accounting: Annotated[
        Accounting | None,
        typer.Option(help="Count bytes, or parameters as the paper does. [default: bytes]", rich_help_panel=_BUDGET),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Compress only layers that match, such as `q_proj` or `*.mlp.*` (repeatable).",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave out layers that match (repeatable).", rich_help_panel=_BUDGET),
    ] = None,
    plain: Annotated[
        bool | None,
        typer.Option(
            "--plain",
            help="Fit the weights themselves, not their outputs on the text (cospadi, svd).",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of the method's random choices; where given, of the calibration's too. [default: 42]",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            metavar=f"{UNIFORM}|{KNAPSACK}|FILE",
            help="How the bytes are spent over the layers; FILE is the allocation.json of an earlier result. "
            f"[default: {UNIFORM}]",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            metavar=_choices("measure", Recipe),
            help=f"What the knapsack counts as the cost of an error. [default: {_RECIPE['measure'].default}]",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    value_bits: Annotated[
        int | None,
        typer.Option(
            metavar=_choices("value_bits"),
            help="Stored bits of a value: of a coefficient, a low-rank factor or (8 and fewer, or 16) a quantised weight. "
            f"[default: {_FAST.value_bits} for cospadi, 16 for svd, as the ratio allows for quantize]",
            rich_help_panel=_FORM,
        ),
    ] = None,
    dictionary_bits: Annotated[
        int | None,
        typer.Option(
            metavar=_choices("dictionary_bits"),
            help=f"Stored bits of a dictionary's entry. [default: {_FAST.dictionary_bits}]",
            rich_help_panel=_FORM,
        ),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            metavar=_choices("share", Recipe),
            help="Which matrices share a dictionary: `consecutive` layers', `matched` pairs of any kinds, or those on one "
            "input `site` (q, k, v; gate, up). [default: none]",
            rich_help_panel=_FORM,
        ),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="How many consecutive layers share; implies `--share consecutive`. [default: 2]", rich_help_panel=_FORM
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar=_choices("metric"),
            help="Of a shared dictionary: every layer its own, or the mean, as published. [default: exact]",
            rich_help_panel=_FORM,
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            metavar=_choices("rounding", QuantizeConfig),
            help="How quantize rounds. [default: gptq]",
            rich_help_panel=_FORM,
        ),
    ] = None,
    calibration: Texts = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential",
            help="Calibrate every layer on inputs from the already compressed ones.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    correction: Annotated[
        float | None,
        typer.Option(
            help="How far sequential weights move to make up for the layers before: 0 to 1. "
            f"[default: {_RECIPE['correction'].default}]",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Keep what is measured on the text in this folder, for other runs on the same model and text.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="How many sequences of it. [default: 64]", rich_help_panel=_TEXT)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens a sequence. [default: 1024, or the model's context]", rich_help_panel=_TEXT),
    ] = None,
    calibration_seed: Annotated[
        int | None,
        typer.Option(help="Decides which sequences are drawn, in place of --seed. [default: 0]", rich_help_panel=_TEXT),
    ] = None,
    preset: Preset = None,
    rho: Annotated[
        float | None,
        typer.Option(help=f"k/s: atoms over non-zeros a column. [default: {_FAST.rho:g}]", rich_help_panel=_SOLVER),
    ] = None,
    coding: Annotated[
        str | None,
        typer.Option(
            metavar=_choices("coding"),
            help=f"How coefficients are found. [default: {_FAST.coding}]",
            rich_help_panel=_SOLVER,
        ),
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            metavar=_choices("update"),
            help=f"How the dictionary is updated. [default: {_FAST.update}]",
            rich_help_panel=_SOLVER,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar=_choices("start"), help=f"The first dictionary. [default: {_FAST.start}]", rich_help_panel=_SOLVER
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(help=f"Outer iterations at most. [default: {_FAST.iterations}]", rich_help_panel=_SOLVER),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help=f"Stop below this relative improvement. [default: {_FAST.tolerance:g}]", rich_help_panel=_SOLVER
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="`cpu`, `cuda`, ...; `auto` takes a GPU where there is one. [default: auto]", rich_help_panel=_MACHINE
        ),
    ] = None,
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="auto|float32|bfloat16",
            help="Of the calibration's forward pass; `auto` takes bfloat16 where the device has it. [default: auto]",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="bfloat16|float16|float32",
            help="What is not compressed is stored in this. [default: bfloat16]",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace OUT if it is an earlier result of ours.", rich_help_panel=_MACHINE),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop.", rich_help_panel=_MACHINE)
    ] = False,
) -> None:
    """Compress MODEL into the folder OUT.

    The result loads with plain `AutoModelForCausalLM.from_pretrained(OUT)` once lexigram is imported.
    """
    settings = merge(
        Recipe.read(recipe) if recipe else {},
        where=str(recipe or "the settings"),
        preset=preset.value if preset else None,
        method={
            "name": method.value if method else None,
            "rho": rho,
            "value_bits": value_bits,
            "dictionary_bits": dictionary_bits,
            "metric": metric,
            "rounding": rounding,
            "coding": coding,
            "update": update,
            "start": start,
            "iterations": iterations,
            "tolerance": tolerance,
            "plain": plain,
        },
        calibration={
            "text": calibration or None,
            "sequences": sequences,
            "length": length,
            "seed": calibration_seed,
        },
        settings={
            "model": model,
            "ratio": ratio,
            "accounting": accounting.value if accounting else None,
            "include": include or None,
            "exclude": exclude or None,
            "allocation": allocation,
            "measure": measure,
            "share": share,
            "group": group,
            "sequential": sequential,
            "correction": correction,
            "seed": seed,
            "device": device,
            "compute_dtype": compute_dtype,
            "dtype": dtype,
        },
    )
    if not dry_run:
        check_target(out, overwrite=overwrite)
    prepared = make_plan(settings, cache=cache)
    console.print(report.plan_table(prepared))
    _say(
        f"about {report.size(prepared.memory_bytes)} of memory, {report.size(prepared.disk_bytes)} on disk; "
        f"device {prepared.device}, forward pass in {str(prepared.compute_dtype).removeprefix('torch.')}"
    )
    if dry_run:
        return
    with drawing(errors) as bars:
        record = run_compress(settings, out, overwrite=overwrite, progress=bars, prepared=prepared)
    console.print(report.bytes_table(record))
    _say(
        f"{out}: {report.size(record.model_bytes_before)} -> {report.size(record.model_bytes_after)}, mean output error "
        f"{record.mean_relative_error:.4f}, {record.seconds:.0f} s, peak {report.size(record.peak_memory_bytes)}"
    )


@app.command(
    name="eval",
    epilog=_examples(
        "lexigram eval smaller --text wiki.test.txt --reference demo",
        "lexigram eval smaller --text demo --windows 20 --json smaller.json",
    ),
)
def eval_(
    model: Model,
    text: Annotated[
        list[str], typer.Option("--text", "-t", help="A .txt or .jsonl file (repeatable), `demo`, or `hub:NAME`.")
    ],
    context: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows. [default: the context, no overlap]")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="A MODEL to measure KL divergence and agreement against.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there; an infinite one is null.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Name of the row in reports. [default: MODEL]")] = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
) -> None:
    """Measure MODEL's perplexity on a text and, with --reference, its distance from another model."""
    if json_file:
        check_writable(json_file)
    content = read_texts(text, demo_part="evaluation")
    place = resolve_device(device)
    opened, tokenizer = open_model(model, device=place, dtype=dtype.value)
    other = None
    if reference:
        other, its_tokenizer = open_model(reference, device=place, dtype=dtype.value)
        if not torch.equal(token_ids(tokenizer, content), token_ids(its_tokenizer, content)):
            raise LexigramError(
                f"{model} and {reference} split the text into different tokens, so their predictions cannot be compared; name "
                "the model that was compressed as --reference"
            )
    with drawing(errors) as bars, bars.steps("evaluate") as update:
        result = evaluate(
            opened,
            tokenizer,
            content,
            context=context,
            stride=stride,
            windows=windows,
            reference=other,
            progress=update,
        )
    figures = {
        "label": label or model,
        "model": model,
        "reference": reference,
        "text": ", ".join(Path(name).name for name in text),
        "model_bytes": _model_bytes(opened),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "device": str(place),
        **result.model_dump(),
        "versions": versions(),
        "command": " ".join(sys.argv),
    }
    if json_file:
        write_json(json_file, figures)
    console.print(*report.evaluation_tables([figures]))


@app.command(name="report", epilog=_examples("lexigram report dense.json smaller.json"))
def report_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What `lexigram eval --json` wrote.")],
) -> None:
    """Print evaluations side by side."""
    rows = [read_json(file) for file in files]
    for file, row in zip(files, rows, strict=True):
        if not isinstance(row.get("token_perplexity", ""), (int, float, NoneType)):
            raise LexigramError(f"{file} holds no evaluation; name what `lexigram eval --json` wrote")
    console.print(*report.evaluation_tables(rows))


@app.command(epilog=_examples("lexigram inspect smaller", "lexigram inspect smaller --json"))
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `lexigram compress` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json instead.")] = False,
) -> None:
    """Show where the bytes are, and each layer's form and error."""
    content = read_json(folder / RUN_FILE)
    try:
        record = RunRecord.model_validate(content)
    except ValidationError as error:
        raise LexigramError(
            f"{folder / RUN_FILE} was not written by lexigram {versions()['lexigram']}: {explain(error)}"
        ) from error
    if as_json:
        print(record.model_dump_json(indent=1))
        return
    console.print(report.bytes_table(record))
    console.print(report.forms_table(record.layers))
    console.print(report.error_map(record.layers))


@app.command(epilog=_examples("lexigram export smaller --dense ordinary"))
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `lexigram compress` wrote.")],
    dense: Annotated[Path, typer.Option("--dense", metavar="OUT", help="Folder to write, with dense weights.")],
    dtype: Dtype = DtypeName.auto,
) -> None:
    """Write a compressed model as an ordinary checkpoint of the original size, for software that knows no lexigram."""
    export_dense(folder, dense, dtype=dtype.value)
    _say(f"{dense}: an ordinary checkpoint, {report.size(_folder_bytes(dense))}")


@app.command(epilog=_examples('lexigram generate smaller "The capital of France is"'))
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 32,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
) -> None:
    """Let MODEL go on from PROMPT, the likeliest token each time."""
    opened, tokenizer = open_model(model, device=resolve_device(device), dtype=dtype.value)
    _say(greedy_sentence(opened, tokenizer, prompt, tokens, chat=chat))


def _say(line: str) -> None:
    """Print as it stands: no markup in file names, no breaks that a script would have to undo."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _model_bytes(model: torch.nn.Module) -> int:
    """Of all stored tensors as the model holds them; a tied weight counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    """Run the command line.

    What the user can mend ends in one sentence and exit code 1, a wrong usage in 2, Ctrl-C in 130.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        app()
    except LexigramError as error:
        errors.print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:
            errors.print("interrupted; nothing was left half-written")
        raise
