"""`compare`: several recipes on one calibration, row after row, into one table and one plot.

The order of a comparison, as `pipeline` has that of a run: sample the calibration where the model itself writes it, evaluate
the dense model, then compress and evaluate row by row, and heal and evaluate again where that is asked for. What is done lies
in the folder, where `planning` finds it, so that a comparison that was killed goes on at the next row. What the rows come to as
text is the business of `table`, the plot that of `plot`.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexigram.calibration.tokens import TokenSequences
from lexigram.comparison.earlier import HASHED, MODELS, ROWS, origin_file
from lexigram.comparison.planning import (
    TABLE,
    ComparisonPlan,
    ComparisonSettings,
    Job,
    plan_comparison,
    planned,
    unmade,
)
from lexigram.comparison.plot import draw, plot_files
from lexigram.comparison.table import DENSE, Row, markdown, summary
from lexigram.errors import LexigramError
from lexigram.evaluation.records import evaluated
from lexigram.healing import heal
from lexigram.jsonfiles import read_json, write_json, write_text
from lexigram.memory import memory_told
from lexigram.pipeline import compress, sampled
from lexigram.planning import Plan
from lexigram.recipe import Recipe
from lexigram.records import machine, read_run, versions
from lexigram.runfolder import recover
from lexigram.running import Silent, Stages, counted
from lexigram.staging import RUN_FILE
from lexigram.training import HealingSettings

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
    "healing",
)
"""What of `run.json` stands in a row besides the columns of the table; the layers stay with the model."""

CALIBRATION = "calibration"
"""The name by which its progress is told, where it is made before all rows."""

Watch = Callable[[str], AbstractContextManager[Stages]]
"""Asked for somebody to tell the progress of a row, by its name, or of the calibration."""

_LESS_MEMORY = "free some, or take fewer --workers, a smaller --max-ram or --context"


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to: the dense row first, then one a recipe, ratio and seed, each with its healed one behind it."""

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
    workers: int | None = None,
    max_ram: int | None = None,
) -> Comparison:
    """Compress one model by several recipes on one calibration, and measure every result.

    See `plan_comparison` for the arguments and `run_comparison` for what lies in `out` in the end.

    Raises:
        LexigramError: as these do.
    """
    return run_comparison(
        plan_comparison(recipes, out, settings, overwrite=overwrite, workers=workers, max_ram=max_ram)
    )


def run_comparison(
    prepared: ComparisonPlan,
    *,
    watch: Watch | None = None,
    tell: Callable[[Row], None] | None = None,
) -> Comparison:
    """Make the rows that are not there yet, and then the table and the plot.

    The folder has `rows/NAME.json` for every row that has figures, `models/NAME`, in `origins/NAME.json` what that was made
    from, the calibration in `cache`, the hash of the weights in `weights.json`, `table.md`, `table.json`, and where matplotlib
    is installed `plot.png` and `plot.svg`.

    Args:
        prepared: what to do.
        watch: see `Watch`.
        tell: is given every row that was made just now.

    Raises:
        LexigramError: where the dense model cannot be evaluated or the table not be written. What goes wrong with one recipe
            stands in its row, memory that does not suffice too.
    """
    watch, tell = watch or (lambda _name: nullcontext(Silent())), tell or (lambda _row: None)
    out, jobs = prepared.out, _calibrated(prepared, watch)
    dense = prepared.dense
    if dense is None:
        with watch(DENSE) as progress, memory_told(_LESS_MEMORY):
            dense = _dense_row(prepared, progress)
        tell(dense)
    if prepared.hashed is not None:
        write_json(out / HASHED, prepared.hashed.model_dump(mode="json"))
    rows = [dense.model_copy(update={"bytes_after": _dense_layers(prepared.jobs, dense)})]
    for before, job in zip(prepared.jobs, jobs, strict=True):
        of_job: list[Row] = []
        for each in job.family:
            of_job.append(
                each.done or _row(prepared, job, each, [row for row in of_job if row.error is not None], watch)
            )
            if each.done is None and before.error is None:  # what cannot be made is told by the plan
                tell(of_job[-1])
        if prepared.drop_models and all(row.error is None for row in of_job):
            for each in job.family:
                if each.compresses:  # what was there before may have been kept on purpose
                    _drop(out, each.name)
        rows += of_job
    return Comparison(rows, _written(prepared, rows))


# ------------------------------------------------------------------------------------------------------- calibration, rows


def _calibrated(prepared: ComparisonPlan, watch: Watch) -> list[Job]:
    """The jobs with their tokens: what the model itself writes is sampled now, once a seed, and plans are made that know it.

    It is done before anything else has taken memory, which a limit would count.
    """
    samples: dict[int, TokenSequences] = {}

    def known(job: Job) -> Job:
        if not job.compresses or job.plan is None or job.plan.tokens is not None:
            return job
        try:
            if job.seed not in samples:
                with watch(CALIBRATION) as progress, memory_told(_LESS_MEMORY):
                    samples[job.seed] = sampled(job.plan, job.plan.source.model(job.plan.device), progress)
            return planned(job, prepared.planner(job.recipe, tokens=samples[job.seed]))
        except LexigramError as error:
            return unmade(job, str(error))

    return [known(job) for job in prepared.jobs]


def _dense_row(prepared: ComparisonPlan, progress: Stages) -> Row:
    figures = _evaluated(prepared, prepared.model, None, progress)
    return _kept(prepared.out, Row(label=DENSE, recipe=DENSE, made_from=dict(prepared.made_from), **figures))


def _dense_layers(jobs: Sequence[Job], dense: Row) -> int | None:
    """Bytes of the layers as the dense model has them; None where the recipes compress different ones."""
    weights = {sum(target.weight_count for target in job.plan.targets) for job in jobs if job.plan is not None}
    if len(weights) > 1 or dense.bits_per_weight is None:
        return None
    return round(weights.pop() * dense.bits_per_weight / 8)


def _row(prepared: ComparisonPlan, job: Job, of: Job, failed: Sequence[Row], watch: Watch) -> Row:
    """The row of a job or of its healed model: make the model where it is not there, evaluate, and leave the row in its file.

    Args:
        prepared: the comparison.
        job: that compresses.
        of: it, or its healed one.
        failed: rows of the job that have failed, without whose models there is nothing to do.
        watch: see `Watch`.
    """
    if of.plan is None:
        return of.failed(of.error or "")
    if failed and not of.kept:
        return of.failed(f"{failed[0].label} failed: {failed[0].error}")
    try:
        with watch(of.name) as progress, memory_told(_LESS_MEMORY):
            if not of.kept and of.heals is None:
                _compress(prepared, job, of.plan, progress)
            elif not of.kept and of.heals is not None:
                _heal(prepared, job, of, of.heals, progress)
            return _measured(prepared, of, progress)
    except LexigramError as error:
        return of.failed(str(error))


def _compress(prepared: ComparisonPlan, job: Job, plan: Plan, progress: Stages) -> None:
    folder = prepared.out / MODELS / job.name
    with _noted(prepared.out, job):
        compress(job.recipe, folder, overwrite=prepared.overwrite, progress=progress, prepared=plan, resume=True)


def _heal(prepared: ComparisonPlan, job: Job, healed: Job, settings: HealingSettings, progress: Stages) -> None:
    """The healed model of a job, whose own is made once more where it was dropped after its row."""
    if job.done is not None and not job.kept and job.plan is not None:
        _compress(prepared, job, job.plan, progress)
    with _noted(prepared.out, healed):
        heal(
            prepared.out / MODELS / job.name,
            prepared.out / MODELS / healed.name,
            settings,
            against=prepared.model if settings.imitates else None,
            device=prepared.reading.device,
            overwrite=prepared.overwrite,
            resume=True,
            progress=progress,
        )


@contextmanager
def _noted(out: Path, job: Job) -> Iterator[None]:
    """Leave beside the model of a job what it is made from.

    Before it is made, so that a model without a row is known; where another one is replaced, only once that is gone.
    """
    folder, file = out / MODELS / job.name, origin_file(out, job.name)
    recover(folder)
    replaces = (folder / RUN_FILE).is_file()
    if replaces:
        file.unlink(missing_ok=True)
    else:
        write_json(file, dict(job.origin))
    yield
    write_json(file, dict(job.origin))


def _measured(prepared: ComparisonPlan, job: Job, progress: Stages) -> Row:
    """The row of a model that is there, in its file too."""
    folder = prepared.out / MODELS / job.name
    run = read_json(folder / RUN_FILE, remedy=f"delete {folder} and run again")
    figures = _evaluated(prepared, str(folder), prepared.model, progress)
    fitting = [run["stages"].get(stage, {}).get("seconds", 0.0) for stage in ("allocate", "fit")]
    row = Row(
        label=job.name,
        **{key: run[key] for key in ("bytes_before", "bytes_after")},
        mean_relative_error=None if run["healing"] else run["mean_relative_error"],
        seconds_fitting=sum([*fitting, *(healing["seconds"] for healing in run["healing"])]),
        run={key: run[key] for key in _EXCERPT},
        made_from=dict(job.made_from),
        **job.who,
        **figures,
    )
    return _kept(prepared.out, row)


def _evaluated(prepared: ComparisonPlan, model: str, reference: str | None, progress: Stages) -> dict[str, Any]:
    reading = prepared.reading
    with progress.stage("evaluate", reading.steps) as step:
        return evaluated(
            model,
            reading.texts,
            reading.content,
            reference=reference,
            context=reading.context,
            windows=reading.windows,
            bos=reading.bos,
            device=reading.device,
            dtype=reading.dtype,
            progress=counted(step),
        )


def _drop(out: Path, name: str) -> None:
    """Remove a model of ours: the files that its record lists, and the folder where nothing else lies in it."""
    folder = out / MODELS / name
    with suppress(LexigramError, OSError):  # its row is there: what cannot be removed is no reason to end
        files = [folder / file for file in read_run(folder).files]
        origin_file(out, name).unlink(missing_ok=True)
        for file in sorted(files, key=lambda file: file.name == RUN_FILE):  # last: it tells that the others are ours
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)
        inside = {parent for file in files for parent in file.parents if folder in parent.parents}
        for each in (*sorted(inside, reverse=True), folder):
            each.rmdir()


def _kept(out: Path, row: Row) -> Row:
    """Write the row, and give it back as it stands there: with no number that JSON does not have."""
    file = out / ROWS / f"{row.label}.json"
    write_json(file, row.model_dump(mode="json"))
    return Row.model_validate(read_json(file, remedy="run again"))


# -------------------------------------------------------------------------------------------------------- table and plot


def _written(prepared: ComparisonPlan, rows: Sequence[Row]) -> list[Path]:
    """The files that show all rows together; a plot of other rows does not stay beside the table."""
    out, plotted = prepared.out, list(plot_files(prepared.out))
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
            "recipes": {each.name: each.made_from["recipe"] for job in prepared.jobs for each in job.family},
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
    write_text(out / TEXT, text)
    return [out / TEXT, out / TABLE, *plotted]


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
