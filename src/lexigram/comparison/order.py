"""`compare`: several recipes on one calibration, row after row, into one table and one plot.

The order of a comparison, as `pipeline` has that of a run: evaluate the dense model, then compress and evaluate row by row.
What is done lies in the folder, where `planning` finds it, so that a comparison that was killed goes on at the next
row. What the rows come to as text is the business of `table`, the plot that of `plot`.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lexigram.calibration.tokens import TokenSequences
from lexigram.comparison.planning import (
    MODELS,
    ROWS,
    TABLE,
    ComparisonPlan,
    ComparisonSettings,
    Job,
    Reading,
    plan_comparison,
)
from lexigram.comparison.plot import draw, plot_files
from lexigram.comparison.table import DENSE, Row, markdown, summary
from lexigram.errors import LexigramError
from lexigram.evaluation import bits_per_weight, evaluate, stored_bytes
from lexigram.jsonfiles import read_json, write_json
from lexigram.pipeline import compress, sampled
from lexigram.planning import Plan
from lexigram.recipe import Recipe
from lexigram.records import machine, versions
from lexigram.running import Silent, Stages, counted
from lexigram.staging import RUN_FILE
from lexigram.transformers_io import open_model

TEXT = "table.md"
_EXCERPT = (
    "requested_ratio",
    "ratio",
    "parameter_ratio",
    "bytes_by_kind",
    "model_bytes_before",
    "model_bytes_after",
    "source_file_bytes",
    "weights_sha256",
    "calibration_source",
    "calibration_sha256",
    "calibration_tokens",
    "seconds",
    "peak_memory_bytes",
    "device_peak_memory_bytes",
    "stages",
    "machine",
)
"""What of `run.json` stands in a row besides the columns of the table; the layers stay with the model."""

Watch = Callable[[str], AbstractContextManager[Stages]]
"""Asked for somebody to tell the progress of a row, by its name."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to: the dense row first, then one a recipe, ratio and seed."""

    rows: list[Row]
    files: list[Path]

    @property
    def failed(self) -> list[Row]:
        """Those that have an error in place of figures."""
        return [row for row in self.rows if row.error is not None]


def compare(
    recipes: Mapping[str, Recipe],
    out: str | Path,
    settings: ComparisonSettings,
    *,
    overwrite: bool = False,
) -> Comparison:
    """Compress one model by several recipes on one calibration, and measure every result.

    See `plan_comparison` for the arguments and `run_comparison` for what lies in `out` in the end.

    Raises:
        LexigramError: as these do.
    """
    return run_comparison(plan_comparison(recipes, out, settings, overwrite=overwrite))


def run_comparison(
    prepared: ComparisonPlan,
    *,
    watch: Watch | None = None,
    tell: Callable[[Row], None] | None = None,
) -> Comparison:
    """Make the rows that are not there yet, and then the table and the plot.

    The folder has `rows/NAME.json` for every row that has figures, `models/NAME`, the calibration in `cache`, `table.md`,
    `table.json`, and where matplotlib is installed `plot.png` and `plot.svg`.

    Args:
        prepared: what to do.
        watch: see `Watch`.
        tell: is given every row that was made just now.

    Raises:
        LexigramError: where the dense model cannot be evaluated or the table not be written. What goes wrong with one recipe
            stands in its row.
    """
    watch = watch or (lambda _name: nullcontext(Silent()))
    out, rows = prepared.out, []
    samples: dict[int, TokenSequences] = {}

    def made(row: Row) -> Row:
        if tell:
            tell(row)
        return row

    with watch(DENSE) if prepared.dense is None else nullcontext(Silent()) as progress:
        rows.append(prepared.dense or made(_dense_row(prepared, progress)))
    for job in prepared.jobs:
        if job.done is not None:
            rows.append(job.done)
        elif job.plan is None:
            rows.append(job.failed(job.error or ""))
        else:
            try:
                with watch(job.name) as progress:
                    row = _row(prepared, job, job.plan, samples, progress)
            except LexigramError as error:
                row = job.failed(str(error))
            rows.append(made(row))
        folder = out / MODELS / job.name
        if prepared.drop_models and rows[-1].error is None and (folder / RUN_FILE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
    rows[0] = rows[0].model_copy(update={"bytes_after": _dense_layers(prepared.jobs, rows[0])})
    return Comparison(rows, _written(prepared, rows))


# ------------------------------------------------------------------------------------------------------------------- rows


def _dense_row(prepared: ComparisonPlan, progress: Stages) -> Row:
    model, tokenizer = open_model(prepared.model, device=prepared.reading.device, dtype=prepared.reading.dtype)
    figures = _evaluated(prepared.reading, model, tokenizer, None, progress)
    row = Row(
        label=DENSE,
        recipe=DENSE,
        model=prepared.model,
        made_from=dict(prepared.made_from),
        **figures,
    )
    return _kept(prepared.out, row)


def _dense_layers(jobs: Sequence[Job], dense: Row) -> int | None:
    """Bytes of the layers as the dense model has them; None where the recipes compress different ones."""
    weights = {sum(target.weight_count for target in job.plan.targets) for job in jobs if job.plan is not None}
    if len(weights) > 1 or dense.bits_per_weight is None:
        return None
    return round(weights.pop() * dense.bits_per_weight / 8)


def _row(
    prepared: ComparisonPlan, job: Job, planned: Plan, samples: dict[int, TokenSequences], progress: Stages
) -> Row:
    """Compress, evaluate, and leave the row in its file."""
    folder = prepared.out / MODELS / job.name
    if not job.kept:
        if planned.tokens is None:
            seed = job.recipe.calibration.seed
            if seed not in samples:
                samples[seed] = sampled(planned, planned.source.model(planned.device), progress)
            planned = replace(planned, tokens=samples[seed])
        compress(job.recipe, folder, overwrite=prepared.overwrite, progress=progress, prepared=planned, resume=True)
    run = read_json(folder / RUN_FILE)
    reading = prepared.reading
    model, tokenizer = open_model(str(folder), device=reading.device, dtype=reading.dtype)
    reference, _ = open_model(prepared.model, device=reading.device, dtype=reading.dtype)
    figures = _evaluated(reading, model, tokenizer, reference, progress)
    row = Row(
        label=job.name,
        model=str(folder),
        reference=prepared.model,
        **{key: run[key] for key in ("bytes_before", "bytes_after", "mean_relative_error")},
        seconds_fitting=sum(run["stages"].get(stage, {}).get("seconds", 0.0) for stage in ("allocate", "fit")),
        run={key: run[key] for key in _EXCERPT},
        made_from=dict(job.made_from),
        **job.who,
        **figures,
    )
    return _kept(prepared.out, row)


def _evaluated(
    reading: Reading, model: PreTrainedModel, tokenizer: Any, reference: PreTrainedModel | None, progress: Stages
) -> dict[str, Any]:
    """The figures of `lexigram eval`."""
    with progress.stage("evaluate", reading.steps) as step:
        result = evaluate(
            model,
            tokenizer,
            reading.content,
            context=reading.context,
            windows=reading.windows,
            reference=reference,
            progress=counted(step),
        )
    return {
        "text": ", ".join(Path(name).name for name in reading.texts),
        "model_bytes": stored_bytes(model),
        "bits_per_weight": bits_per_weight(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(reading.device),
        **result.model_dump(),
        "versions": versions(),
        "command": " ".join(sys.argv),
    }


def _kept(out: Path, row: Row) -> Row:
    """Write the row, and give it back as it stands there: with no number that JSON does not have."""
    file = out / ROWS / f"{row.label}.json"
    write_json(file, row.model_dump(mode="json"))
    return Row.model_validate(read_json(file))


# -------------------------------------------------------------------------------------------------------- table and plot


def _written(prepared: ComparisonPlan, rows: Sequence[Row]) -> list[Path]:
    """The files that show all rows together; a plot of other rows does not stay beside the table."""
    out, plotted = prepared.out, list(plot_files(prepared.out))
    out.mkdir(parents=True, exist_ok=True)
    count = len({job.recipe_name for job in prepared.jobs})
    title = f"{Path(prepared.model).name}: {count} recipe{'s' if count > 1 else ''}"
    command = " ".join(sys.argv)
    write_json(
        out / TABLE,
        {
            "model": prepared.model,
            "command": command,
            "versions": versions(),
            "machine": machine(prepared.reading.device),
            "recipes": {job.name: job.made_from["recipe"] for job in prepared.jobs},
            "table": summary(rows),
            "rows": [row.model_dump(mode="json") for row in rows],
        },
    )
    if prepared.plotless is None:
        draw(rows, title, plotted)
    else:
        _remove(plotted)
        plotted = []
    text = markdown(rows, title=title, plot=plotted[-1].name if plotted else None, command=command)
    try:
        (out / TEXT).write_text(text, encoding="utf-8")
    except OSError as error:
        raise LexigramError(f"{out / TEXT} cannot be written: {error.strerror or error}; free some space") from error
    return [out / TEXT, out / TABLE, *plotted]


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
