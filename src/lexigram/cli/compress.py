"""`lexigram compress`: a model into a folder."""

from enum import Enum
from typing import Annotated, get_args

import typer

from lexigram.cli.arguments import Cache, Count, DryRun, MaxRam, Out, Overwrite, Resume
from lexigram.cli.plan import planned, show_plan
from lexigram.cli.recipes import takes_recipe
from lexigram.cli.screen import console, errors, say, tell
from lexigram.estimation import estimated_seconds
from lexigram.pipeline import compress as run_compress
from lexigram.progress import drawing
from lexigram.recipe import Recipe
from lexigram.reporting import tables
from lexigram.runfolder import recover, run_folder
from lexigram.shown import MACHINE
from lexigram.staging import check_target
from lexigram.workers import Backend, Workers

BackendName = Enum("BackendName", {name: name for name in get_args(Backend)}, type=str)  # type: ignore[misc]
_HERE = BackendName("loky")
_ON_A_CLUSTER = 2
"""Workers, where nobody says how many: how large it is is not known here."""

EXAMPLES = (
    "lexigram compress demo --out smaller --calibration demo",
    "lexigram compress Qwen/Qwen3-0.6B --out smaller --ratio 0.3 --calibration c4.jsonl",
    "lexigram compress ./model --out low-rank --method svd --ratio 0.2 --calibration text.txt",
    "lexigram compress ./model --out four-bits --method quantize --value-bits 4 --calibration text.txt",
    "lexigram compress ./model --out fitting --size 4GB --method lowrank-sparse --calibration text.txt",
    "lexigram compress ./model --out spent --ratio 0.5 --allocation knapsack --cache kept --calibration text.txt",
)


@takes_recipe
def compress(
    out: Out,
    recipe: Recipe,
    cache: Cache = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    workers: Count = None,
    backend: Annotated[
        BackendName,
        typer.Option(
            metavar="|".join(BackendName),
            help="Where the workers are: on this machine, or on a running Ray or Dask cluster.",
            rich_help_panel=MACHINE,
        ),
    ] = _HERE,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Of the cluster; else that in RAY_ADDRESS or DASK_SCHEDULER_ADDRESS.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    max_ram: MaxRam = None,
    dry_run: DryRun = False,
) -> None:
    """Compress MODEL into the folder OUT.

    The result loads with plain `AutoModelForCausalLM.from_pretrained(OUT)` once lexigram is imported.
    """
    if not dry_run:
        recover(out)
        check_target(out, overwrite=overwrite)
    here = backend is _HERE
    prepared = planned(recipe, cache, workers if here else 1, max_ram)
    if dry_run:
        show_plan(prepared, {})
        return
    show_plan(prepared, estimated_seconds(prepared) if prepared.takes_long else {})
    pool = Workers(prepared.way.workers if here else workers or _ON_A_CLUSTER, backend.value, address)
    try:
        with drawing(errors) as bars:
            record = run_compress(
                recipe, out, overwrite=overwrite, progress=bars, prepared=prepared, resume=resume, workers=pool
            )
    except KeyboardInterrupt:
        folder = run_folder(out)
        if folder.is_dir():
            tell(f"what is finished lies in {folder}; give the same command with --resume to go on")
        raise
    console.print(tables.bytes_table(record))
    say(
        f"{out}: {tables.size(record.model_bytes_before)} -> {tables.size(record.model_bytes_after)}, mean output error "
        f"{record.mean_relative_error:.4f}, {record.seconds:.0f} s, peak {tables.size(record.peak_memory_bytes)}"
    )
