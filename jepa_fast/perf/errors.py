"""What can go wrong with a measurement, each with an exit code of its own for scripts and CI."""

from __future__ import annotations


class PerfError(RuntimeError):
    """A measurement that cannot be made or compared; says why and what to do.

    Exit code 2: the command asks for something that does not exist (an operator, a case, a ref).
    """

    exit_code = 2


class NotHere(PerfError):
    """A case lacks something on this machine: its set-up raises this, and the case is skipped."""


class BaselineMissing(PerfError):
    """There is nothing to compare with (exit code 3)."""

    exit_code = 3


class BaselineOfAnother(PerfError):
    """The baseline was made with another version or on another machine (exit code 4)."""

    exit_code = 4


class DirtyWorktree(PerfError):
    """Results would name a commit that did not produce them (exit code 5)."""

    exit_code = 5


class BuildFailed(PerfError):
    """A kernel, or one of the versions to be compared, cannot be built or run (exit code 6)."""

    exit_code = 6


class PackageMissing(PerfError):
    """What measures needs a package that is not installed (exit code 7)."""

    exit_code = 7
