"""Ctrl-C that waits: what is being made is finished first, and kept. A second one does not wait."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """While open, the first Ctrl-C only makes the function that the context gives say yes; the next one acts as usual.

    Outside of the main thread, where Python delivers no signals, and where somebody else handles them, nothing changes.
    """
    requested = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield requested.is_set
        return

    def note(_number: int, _frame: Any) -> None:
        requested.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGINT, before)
