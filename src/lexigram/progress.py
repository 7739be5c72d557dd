"""How far a run is, shown on a terminal as bars. Decides nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bars:
    """Stages as progress bars; what `lexigram.running.Stages` asks for."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar of `total` steps; what the context gives is called after every step."""
        task = self._bars.add_task(name, total=total)
        yield lambda: self._bars.advance(task)

    @contextmanager
    def steps(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A bar that is told (done, total)."""
        task = self._bars.add_task(name, total=None)
        yield lambda done, total: self._bars.update(task, completed=done, total=total)


@contextmanager
def drawing(console: Console) -> Iterator[Bars]:
    """Bars on `console` until the context ends; they stay only where it is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as bars:
        yield Bars(bars)
