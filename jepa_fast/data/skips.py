"""Samples that cannot be read: skipped, counted and reported."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from jepa_fast.errors import DataError

_log = logging.getLogger("jepa_fast.data")
_TOLD_ONE_BY_ONE = 20


class CorruptSample(Exception):
    """A sample that cannot be read. `key` says which, `reason` why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


def describe(error: Exception) -> str:
    """Kind and text of an error, without the path in it, so that equal reasons count as one."""
    # webdataset adds the path to the arguments of an error, or " @ ..." to the first of them.
    first, *more = error.args or ("",)
    passed_on = more and isinstance(first, str) and not isinstance(error, UnicodeError)
    text = getattr(error, "strerror", None) or (first if passed_on else str(error))
    text = text.partition(" @ ")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class SkipLog:
    """Which samples were skipped and why; each is counted once and logged as a warning."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, found: Mapping[str, str]) -> None:
        """Takes in `{key: reason}`; what is known already is not counted again."""
        for key, reason in found.items():
            if key in self.reasons:
                continue
            self.reasons[key] = reason
            if len(self) <= _TOLD_ONE_BY_ONE:
                _log.warning("skipped %s: %s", key, reason)
            if len(self) == _TOLD_ONE_BY_ONE:
                _log.warning("further skipped samples appear in the summary only")

    def nothing_readable(self, source: object) -> DataError:
        """The error of a source that gave not one sample."""
        why = self.summary() if self.reasons else "it is empty"
        return DataError(f"no readable sample in {source}: {why}")

    def summary(self) -> str:
        """How many were skipped, by reason, with one example each."""
        if not self.reasons:
            return "no sample skipped"
        examples = {reason: key for key, reason in reversed(self.reasons.items())}
        parts = [
            f"{count} x {reason} (such as {examples[reason]})"
            for reason, count in Counter(self.reasons.values()).most_common(10)
        ]
        return f"{len(self)} samples skipped: " + "; ".join(parts)
