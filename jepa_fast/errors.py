"""Errors that are jepa_fast's own. Bad arguments raise the built-in TypeError and ValueError."""

from __future__ import annotations


class BackendError(RuntimeError):
    """No backend, or not the requested one, can serve a call; says why, backend by backend."""


class CheckpointError(RuntimeError):
    """A checkpoint does not fit; lists what is missing, unexpected or of another shape."""


class DataError(ValueError):
    """A source of data of which no sample can be read, or what reads it was killed; says why."""
