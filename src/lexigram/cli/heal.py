"""`lexigram heal`: the stored values of a compressed model trained, in the same bytes."""

from typing import Annotated

from lexigram.cli.arguments import Against, Device, Folder, Out, Overwrite, Resume
from lexigram.cli.options import Option
from lexigram.cli.recipes import declared
from lexigram.cli.screen import errors, say, tell
from lexigram.healing import heal as run_heal
from lexigram.progress import drawing
from lexigram.runfolder import run_folder
from lexigram.training import HealingSettings

EXAMPLES = (
    "lexigram heal smaller --text text.txt --out healed",
    "lexigram heal smaller --text text.txt --out healed --against ./model --minutes 15",
    "lexigram heal smaller --text text.txt --out healed --objective tokens --steps 500 --rate 0.001",
)
_OWN = {key: Option("settings", key, {"healing": field}) for key, field in HealingSettings.model_fields.items()}


def heal(
    folder: Folder,
    out: Out,
    texts: Annotated[list[str], declared(_OWN["texts"], rich_help_panel=None)],
    against: Against = None,
    sequences: Annotated[int | None, declared(_OWN["sequences"])] = None,
    length: Annotated[int | None, declared(_OWN["length"])] = None,
    held_out: Annotated[int | None, declared(_OWN["held_out"])] = None,
    seed: Annotated[int | None, declared(_OWN["seed"])] = None,
    objective: Annotated[str | None, declared(_OWN["objective"])] = None,
    steps: Annotated[int | None, declared(_OWN["steps"])] = None,
    minutes: Annotated[float | None, declared(_OWN["minutes"])] = None,
    batch: Annotated[int | None, declared(_OWN["batch"])] = None,
    rate: Annotated[float | None, declared(_OWN["rate"])] = None,
    schedule: Annotated[str | None, declared(_OWN["schedule"])] = None,
    warmup: Annotated[int | None, declared(_OWN["warmup"])] = None,
    decay: Annotated[float | None, declared(_OWN["decay"])] = None,
    clip: Annotated[float | None, declared(_OWN["clip"])] = None,
    measure_every: Annotated[int | None, declared(_OWN["measure_every"])] = None,
    patience: Annotated[int | None, declared(_OWN["patience"])] = None,
    checkpointing: Annotated[bool, declared(_OWN["checkpointing"])] = False,
    save_every: Annotated[int | None, declared(_OWN["save_every"])] = None,
    compute_dtype: Annotated[str | None, declared(_OWN["compute_dtype"])] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Train the stored values of DIR on a text, against the original model; the places, forms and bytes stay as they are.

    What has the least loss on sequences that were held out is written into OUT. Without --against the original is the model
    that run.json names.
    """
    given = {
        "texts": texts,
        "sequences": sequences,
        "length": length,
        "held_out": held_out,
        "seed": seed,
        "objective": objective,
        "steps": steps,
        "minutes": minutes,
        "batch": batch,
        "rate": rate,
        "schedule": schedule,
        "warmup": warmup,
        "decay": decay,
        "clip": clip,
        "measure_every": measure_every,
        "patience": patience,
        "checkpointing": checkpointing,
        "save_every": save_every,
        "compute_dtype": compute_dtype,
    }
    settings = HealingSettings.parse({key: value for key, value in given.items() if value is not None})
    try:
        with drawing(errors) as bars:
            record = run_heal(
                folder,
                out,
                settings,
                against=against,
                device=device,
                overwrite=overwrite,
                resume=resume,
                progress=bars,
            )
    except KeyboardInterrupt:
        unfinished = run_folder(out)
        if unfinished.is_dir():
            tell(f"what is trained lies in {unfinished}; give the same command with --resume to go on")
        raise
    healing = record.healing[-1]
    say(
        f"{out}: {healing.settings['objective']} on held-out text {healing.before.objective:.4f} -> "
        f"{healing.after.objective:.4f}, next-token loss {healing.before.tokens:.4f} -> {healing.after.tokens:.4f}, after "
        f"{healing.best_step} of {healing.steps} steps (ended by {healing.stopped}), {healing.seconds:.0f} s"
    )
