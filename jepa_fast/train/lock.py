"""One run a folder: a second one would drop the checkpoints of the first and mix its logs."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from jepa_fast.train.errors import ConfigError

_held: set[int] = set()
"""Descriptors of this process's locks."""


class FolderLock:
    """Keeps other runs out of an output folder, of this machine and as a rule of others.

    The system releases it when the process ends, however that is; nothing of it is in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def take(self) -> None:
        """Lock the folder if it is there, and not locked already.

        Raises:
            ConfigError: another process has.
        """
        if self._descriptor is not None or not self.folder.is_dir():
            return
        try:
            descriptor = os.open(self.folder, os.O_RDONLY)
        except OSError:  # what is wrong with the folder is said elsewhere
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(
                f"output: {self.folder} is that of a run that another process is at; wait for it, "
                "or stop it; output=FOLDER starts one in another folder"
            ) from None
        except OSError:  # a file system without locks
            os.close(descriptor)
            return
        self._descriptor = descriptor
        _held.add(descriptor)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor is not None:
            _held.discard(self._descriptor)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # also that of a fork just made
            os.close(self._descriptor)
            self._descriptor = None


def _let_go() -> None:
    """A lock lasts as long as any process has its descriptor, and workers outlive a killed run."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
