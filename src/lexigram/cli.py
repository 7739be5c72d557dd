"""The command line: one command a stage, no logic. Every option ends in a field of a recipe or an argument of the API."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import click
import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lexigram import report
from lexigram.calibration.text import read_texts
from lexigram.devices import resolve_device
from lexigram.errors import LexigramError
from lexigram.evaluation import evaluate, greedy_sentence
from lexigram.methods import METHODS, PRESETS
from lexigram.pipeline import compress as run_compress
from lexigram.planning import plan as make_plan
from lexigram.recipe import Recipe
from lexigram.records import RunRecord, versions
from lexigram.staging import RUN_FILE
from lexigram.transformers_io import export_dense, open_model

app = typer.Typer(
    name="lexigram",
    help="Make language models smaller after training, without retraining.",
    no_args_is_help=True,
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


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a hub id such as Qwen/Qwen3-0.6B, or `demo`.")
]
Method = Annotated[MethodName, typer.Option("--method", "-m", help="How layers are factored.")]
Preset = Annotated[
    PresetName | None,
    typer.Option(help="Solver of cospadi: `fast` (default) or `published`, the paper's own (hours on a real model)."),
]
Ratio = Annotated[
    float | None,
    typer.Option("--ratio", "-r", help="Share of the compressed layers' stored bytes to remove. [default: 0.2]"),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        "-c",
        metavar="TEXT",
        help="A .txt or .jsonl file (repeatable), `demo`, `hub:NAME`, or `self`: sampled from the model. [default: self]",
    ),
]
Device = Annotated[str, typer.Option(help="`cpu`, `cuda`, ...; `auto` takes a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="Of the weights that are not compressed: auto, bfloat16, float16 or float32.")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML with any of these settings; options win over it.")
]


def _examples(*lines: str) -> str:
    return "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in lines)


def _recipe(
    model: str, file: Path | None, preset: Any, method: dict[str, Any], calibration: dict[str, Any], **top: Any
) -> Recipe:
    """Options over recipe file over preset over defaults."""
    content = Recipe.read(file) if file else {}
    given = {key: value for key, value in method.items() if value is not None}
    base = PRESETS[preset.value].model_dump() if preset else {}
    old = content.get("method") or {}
    if given.get("name", old.get("name")) != old.get("name"):
        old = {}  # options of another method do not carry over
    content["method"] = {"name": "cospadi", **base, **old, **given}
    content["calibration"] = {
        **(content.get("calibration") or {}),
        **{key: value for key, value in calibration.items() if value is not None},
    }
    content |= {"model": model, **{key: value for key, value in top.items() if value is not None}}
    return Recipe.parse(content, str(file) if file else "the settings")


@app.command(
    epilog=_examples(
        "lexigram compress demo --out smaller --calibration demo",
        "lexigram compress Qwen/Qwen3-0.6B --out smaller --ratio 0.3 --calibration c4.jsonl",
        "lexigram compress ./model --out low-rank --method svd --ratio 0.2 --calibration text.txt",
    )
)
def compress(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it appears when it is complete.")],
    recipe: RecipeFile = None,
    method: Annotated[
        MethodName | None, typer.Option("--method", "-m", help="How layers are factored. [default: cospadi]")
    ] = None,
    preset: Preset = None,
    ratio: Ratio = None,
    accounting: Annotated[
        Accounting | None, typer.Option(help="Count bytes, or parameters as the paper does. [default: bytes]")
    ] = None,
    calibration: Texts = None,
    sequences: Annotated[int | None, typer.Option(help="Calibration sequences. [default: 64]")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens a sequence. [default: 1024, or the model's context]")
    ] = None,
    calibration_seed: Annotated[int | None, typer.Option(help="Which sequences are drawn. [default: 0]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the method. [default: 42]")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only layers matching this pattern, such as `q_proj` or `*.mlp.*`.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not layers matching this pattern.")] = None,
    rho: Annotated[float | None, typer.Option(help="cospadi: atoms over non-zeros a column, k/s.")] = None,
    coefficient_bits: Annotated[int | None, typer.Option(help="cospadi: 16 (bfloat16) or 14.")] = None,
    coding: Annotated[str | None, typer.Option(help="cospadi: `htp` or `omp`.")] = None,
    update: Annotated[str | None, typer.Option(help="cospadi: `mod`, `ksvd` or `ksvd-exact`.")] = None,
    start: Annotated[str | None, typer.Option(help="cospadi: `svd` or `columns`.")] = None,
    iterations: Annotated[int | None, typer.Option(help="cospadi: outer iterations at most.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="cospadi: stop below this relative improvement.")] = None,
    plain: Annotated[
        bool | None, typer.Option("--plain", help="Ignore the calibration: fit the weights themselves.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="`cpu`, `cuda`, ... [default: auto]")] = None,
    compute_dtype: Annotated[
        str | None, typer.Option(help="Of the calibration's forward pass. [default: auto]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of what is not compressed. [default: bfloat16]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of lexigram's.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Compress MODEL into the folder OUT.

    The result loads with plain `AutoModelForCausalLM.from_pretrained(OUT)` once lexigram is imported.
    """
    settings = _recipe(
        model,
        recipe,
        preset,
        {
            "name": method.value if method else None,
            "rho": rho,
            "coefficient_bits": coefficient_bits,
            "coding": coding,
            "update": update,
            "start": start,
            "iterations": iterations,
            "tolerance": tolerance,
            "plain": plain,
        },
        {"text": calibration or None, "sequences": sequences, "length": length, "seed": calibration_seed},
        ratio=ratio,
        accounting=accounting.value if accounting else None,
        include=include or None,
        exclude=exclude or None,
        seed=seed,
        device=device,
        compute_dtype=compute_dtype,
        dtype=dtype,
    )
    prepared = make_plan(settings)
    console.print(report.plan_table(prepared))
    console.print(
        f"about {report.size(prepared.memory_bytes)} of memory, {report.size(prepared.disk_bytes)} on disk; "
        f"device {prepared.device}, forward pass in {str(prepared.compute_dtype).removeprefix('torch.')}"
    )
    if dry_run:
        return
    with _bars() as bars:
        record = run_compress(settings, out, overwrite=overwrite, progress=bars, prepared=prepared)
    console.print(report.bytes_table(record))
    console.print(
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
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    label: Annotated[str | None, typer.Option(help="Name of the row in reports. [default: MODEL]")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure MODEL's perplexity on a text and, with --reference, its distance from another model."""
    content = read_texts(text, demo_part="evaluation")
    place = resolve_device(device)
    opened, tokenizer = open_model(model, device=place, dtype=dtype)
    other = open_model(reference, device=place, dtype=dtype)[0] if reference else None
    with _bars() as bars, bars.steps("evaluate") as update:
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
        _write(json_file, json.dumps(figures, indent=1) + "\n")
    console.print(report.evaluation_table([figures]))


@app.command(name="report", epilog=_examples("lexigram report dense.json smaller.json"))
def report_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What `lexigram eval --json` wrote.")],
) -> None:
    """Print evaluations side by side."""
    console.print(report.evaluation_table([_read_json(file) for file in files]))


@app.command(epilog=_examples("lexigram inspect smaller", "lexigram inspect smaller --json"))
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `lexigram compress` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json instead.")] = False,
) -> None:
    """Show where the bytes are, and each layer's form and error."""
    content = _read_json(folder / RUN_FILE)
    try:
        record = RunRecord.model_validate(content)
    except ValueError as error:
        raise LexigramError(f"{folder / RUN_FILE} was not written by this version of lexigram: {error}") from error
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
    dtype: Dtype = "auto",
) -> None:
    """Write a compressed model as an ordinary checkpoint of the original size, for software that knows no lexigram."""
    export_dense(folder, dense, dtype=dtype)
    console.print(f"{dense}: an ordinary checkpoint, {report.size(_folder_bytes(dense))}")


@app.command(epilog=_examples('lexigram generate smaller "The capital of France is"'))
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 32,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Let MODEL go on from PROMPT, the likeliest token each time."""
    opened, tokenizer = open_model(model, device=resolve_device(device), dtype=dtype)
    console.print(greedy_sentence(opened, tokenizer, prompt, tokens, chat=chat), markup=False, highlight=False)


class _Bars:
    """Stages as progress bars."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """See `lexigram.pipeline.Progress`."""
        task = self._bars.add_task(name, total=total)
        yield lambda: self._bars.advance(task)

    @contextmanager
    def steps(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A bar that is told (done, total)."""
        task = self._bars.add_task(name, total=None)
        yield lambda done, total: self._bars.update(task, completed=done, total=total)


@contextmanager
def _bars() -> Iterator[_Bars]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=not errors.is_terminal) as bars:
        yield _Bars(bars)


def _write(file: Path, content: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(content, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise LexigramError(f"{file} cannot be written: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LexigramError(f"{file} cannot be read: {error}; name what lexigram wrote") from error
    if not isinstance(content, dict):
        raise LexigramError(f"{file} holds no JSON object; name what lexigram wrote")
    return content


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
        code = app(standalone_mode=False)
    except LexigramError as error:
        errors.print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        code = 1
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        errors.print("interrupted; nothing was left half-written")
        code = 130
    sys.exit(code)
