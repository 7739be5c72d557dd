"""How far a run is, shown on a terminal as bars. Decides nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bars:
    """Stages as progress bars, drawn from the first one on; what `lexigram.running.Stages` asks for."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar of `total` steps; what the context gives is called after every step."""
        task = self._task(name, total)
        yield lambda: self._bars.advance(task)

    @contextmanager
    def steps(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A bar that is told (done, total)."""
        task = self._task(name, None)
        yield lambda done, total: self._bars.update(task, completed=done, total=total)

    def _task(self, name: str, total: int | None) -> TaskID:
        self._bars.start()
        return self._bars.add_task(name, total=total)


@contextmanager
def drawing(console: Console) -> Iterator[Bars]:
    """Bars on `console` until the context ends; none where it is no terminal, and none before the first stage."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=console, disable=not console.is_terminal)
    try:
        yield Bars(bars)
    finally:
        if bars.live.is_started:  # an end without a beginning leaves an empty line
            bars.stop()
