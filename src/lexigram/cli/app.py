"""The program: its commands in the order of its help, and how it ends."""

import sys
from collections.abc import Callable
from typing import Annotated

import transformers
import typer
from rich.markup import escape
from typer.core import TyperCommand

from lexigram.cli import compare, compress, evaluate, export, generate, heal, merge, plan, show, verify
from lexigram.cli.screen import errors, say
from lexigram.errors import LexigramError
from lexigram.records import versions

app = typer.Typer(
    name="lexigram",
    help="Make language models smaller after training, without retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        say("lexigram {lexigram} (torch {torch}, transformers {transformers}, Python {python})".format(**versions()))
        raise typer.Exit


@app.callback(epilog="`lexigram COMMAND --help` shows a command's options, with examples.")
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", help="Print the versions and stop.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Make language models smaller after training, without retraining."""


def _add(
    name: str, command: Callable[..., None], examples: tuple[str, ...], cls: type[TyperCommand] = TyperCommand
) -> None:
    epilog = "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in examples)
    app.command(name, cls=cls, epilog=epilog)(command)


_add("compress", compress.compress, compress.EXAMPLES)
_add("plan", plan.plan, plan.EXAMPLES)
_add("heal", heal.heal, heal.EXAMPLES)
_add("merge", merge.merge, merge.EXAMPLES)
_add("eval", evaluate.eval_, evaluate.EXAMPLES)
_add("compare", compare.compare, compare.EXAMPLES, compare.TakesSeveral)
_add("report", show.report_, show.REPORT_EXAMPLES)
_add("inspect", show.inspect, show.INSPECT_EXAMPLES)
_add("verify", verify.verify, verify.EXAMPLES)
_add("export", export.export, export.EXAMPLES)
_add("generate", generate.generate, generate.EXAMPLES)


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
