"""What the commands print on: results to standard output, errors and progress to the other."""

from rich.console import Console

console = Console()
errors = Console(stderr=True)


def say(line: str) -> None:
    """Print as it stands: no markup in file names, no breaks that a script would have to undo."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def tell(line: str) -> None:
    """The same beside the errors: what a script that reads results does not want."""
    errors.print(line, markup=False, highlight=False, soft_wrap=True)
