"""How far a run is: bars on a terminal, now and then a line in a file. Decides nothing."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

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

from lexigram.reporting.tables import duration
from lexigram.running import Progress as Update

SHORT = 10.0
"""Seconds: of a stage that has ended by then there is no line."""

PAUSE = 60.0
"""Seconds between two lines of a stage, at least."""

SHARE = 0.1
"""Of all steps of a stage, so much is done between two of its lines, at least."""

_AT_ONCE = 1.0  # seconds in which a stage counts what an earlier run has done, which tells nothing of its speed


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
    def steps(self, name: str) -> Iterator[Update]:
        """A bar that is told (done, total)."""
        task = self._task(name, None)
        yield lambda done, total: self._bars.update(task, completed=done, total=total)

    def _task(self, name: str, total: int | None) -> TaskID:
        self._bars.start()
        return self._bars.add_task(name, total=total)


class Lines:
    """Stages as lines, for logs: ``compress 42 of 210, 12 min, about 48 min left``.

    A stage has one after `SHORT` seconds, others as `PAUSE` and `SHARE` say, and one at its end; a short one has none. They
    come with its steps: nothing is said during a step.

    Args:
        say: is given every line.
        clock: seconds.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """See `Bars`."""
        done = 0
        with self.steps(name) as update:

            def step() -> None:
                nonlocal done
                done += 1
                update(done, total)

            yield step

    @contextmanager
    def steps(self, name: str) -> Iterator[Update]:
        """See `Bars`."""
        told = _Told(name, self._clock())

        def update(done: int, total: int) -> None:
            line = told.line(done, total, self._clock())
            if line is not None:
                self._say(line)

        yield update
        line = told.last_line(self._clock())
        if line is not None:
            self._say(line)


class _Told:
    """What was told of a stage that began at a time."""

    def __init__(self, name: str, began: float) -> None:
        self._name, self._began = name, began
        self._done, self._total = 0, 0
        self._timed = began, 0
        self._said: tuple[float, int] | None = None

    def line(self, done: int, total: int, now: float) -> str | None:
        """After a step; None where there is nothing to say yet."""
        self._done, self._total = done, total
        if now - self._began < _AT_ONCE:
            self._timed = now, done
        if done >= total or not self._due(now):  # at the end there is the last line
            return None
        self._said = now, done
        return self._so_far(now) + self._left(now)

    def last_line(self, now: float) -> str | None:
        """At the end; None where the stage was short, or had no step."""
        return self._so_far(now) if self._total and now - self._began >= SHORT else None

    def _due(self, now: float) -> bool:
        if self._said is None:
            return now - self._began >= SHORT
        then, done = self._said
        return now - then >= PAUSE and self._done - done >= SHARE * self._total

    def _so_far(self, now: float) -> str:
        return f"{self._name} {self._done} of {self._total}, {duration(now - self._began)}"

    def _left(self, now: float) -> str:
        since, before = self._timed
        if self._done == before:
            return ""
        return f", about {duration((now - since) / (self._done - before) * (self._total - self._done))} left"


@contextmanager
def drawing(console: Console) -> Iterator[Bars | Lines]:
    """Bars on `console` until the context ends, or `Lines` where nothing can be drawn; nothing before the first stage."""
    if not console.is_interactive:
        yield Lines(partial(console.print, markup=False, highlight=False, soft_wrap=True))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=console)
    try:
        yield Bars(bars)
    finally:
        if bars.live.is_started:  # an end without a beginning leaves an empty line
            bars.stop()
