"""What stops a run. The command line prints their messages without a traceback."""

from __future__ import annotations

import signal
from pathlib import Path


class ConfigError(ValueError):
    """A setting that cannot be used; names its key, what was expected, and what came."""


class NonFiniteError(RuntimeError):
    """The loss or a weight became infinite or NaN; the last checkpoint is from before."""


class Interrupted(Exception):
    """SIGTERM or SIGINT came, and a checkpoint has been saved.

    Attributes:
        signal_number: which of them.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name}, saved {checkpoint}; go on with --resume")
        self.signal_number = signal_number
