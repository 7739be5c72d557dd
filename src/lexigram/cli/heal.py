"""`lexigram heal`: the stored values of a compressed model trained, in the same bytes."""

from lexigram.cli.arguments import Against, Device, Folder, Out, Overwrite, Resume
from lexigram.cli.parameters import takes_settings
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


@takes_settings
def heal(
    folder: Folder,
    out: Out,
    settings: HealingSettings,
    against: Against = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Train the stored values of DIR on a text, against the original model; the places, forms and bytes stay as they are.

    What has the least loss on sequences that were held out is written into OUT. Without --against the original is the model
    that run.json names.
    """
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
    for remark in healing.remarks:
        tell(remark)
