"""SIGTERM as Ctrl-C: what was measured before either of them is still written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt, as SIGINT does."""
    if threading.current_thread() is not threading.main_thread():  # which may set no handlers
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
