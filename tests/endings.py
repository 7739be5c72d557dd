"""Runs that end early on purpose: what stands for the end of a process, and progress that brings it about."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stop(Exception):  # noqa: N818 - it stands for whatever ends a process
    """A run's end."""


def fail() -> None:
    raise Stop


class StopAt:
    """Progress that calls `act` at the n-th step of all stages, or of one."""

    def __init__(self, at: int, act: Callable[[], None] = fail, *, of: str | None = None) -> None:
        self.left, self.act, self.of = at, act, of

    @contextmanager
    def stage(self, name: str, _total: int) -> Iterator[Callable[[], None]]:
        yield self.step if self.of in (None, name) else lambda: None

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()
