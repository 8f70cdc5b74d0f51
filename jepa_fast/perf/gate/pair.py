"""Both versions' processes, one of which runs at a time."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

from jepa_fast.perf.gate.sides import Setting, Side, SideFailed
from jepa_fast.perf.gate.snapshots import Snapshot

CaseName = tuple[str, str]
"""Operator and case."""


class Pair:
    """A process of the base and one of the working tree; a context manager, which ends them.

    Args:
        base, head: the versions, built.
        setting: how they are run.

    Raises:
        SideFailed: a process cannot even start.
        NotItsOwn: one runs code of another version.
    """

    def __init__(self, base: Snapshot, head: Snapshot, setting: Setting) -> None:
        self._versions = (base, head)
        self._setting = setting
        self._sides: list[Side] = []
        self._listed: list[dict[str, Any]] = []
        self._start()

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def base(self) -> Side:
        return self._sides[0]

    @property
    def head(self) -> Side:
        return self._sides[1]

    @property
    def cases(self) -> tuple[dict[CaseName, int], dict[CaseName, int]]:
        """The number of each case on this device, for base and working tree."""
        base, head = (
            {
                (case["operator"], case["case"]): number
                for number, case in enumerate(listed["cases"])
                if self._setting.device in case["devices"]
            }
            for listed in self._listed
        )
        return base, head

    @property
    def failed(self) -> tuple[dict[str, str], dict[str, str]]:
        """The benchmark files that base and working tree cannot import, and why."""
        return self._listed[0]["failed"], self._listed[1]["failed"]

    def open(self, case: CaseName) -> tuple[str, str]:
        """Sets a case up on both; gives why either cannot, or nothing."""
        if not all(side.alive for side in self._sides):  # the case before ended one
            self._end()
            self._start()
        why = ["", ""]
        for i, (side, numbers) in enumerate(zip(self._sides, self.cases, strict=True)):
            if case not in numbers:
                told = "; ".join(f"{name}: {each}" for name, each in self.failed[i].items())
                why[i] = f"it has no such case{f' ({told})' if told else ''}"
                continue
            try:
                side.ask("open", case=numbers[case])
            except SideFailed as error:
                why[i] = str(error)
        return why[0], why[1]

    def close(self) -> None:
        """Lets go of the case."""
        for side in self._sides:
            if side.alive:
                side.ask("close")

    def _start(self) -> None:
        try:
            others = reversed(self._versions)
            for version, other in zip(self._versions, others, strict=True):
                self._sides.append(Side(version.root, version.label, self._setting, other.root))
            for side in self._sides:  # before any answer: they start at the same time
                side.send("list")
            self._listed = [side.receive() for side in self._sides]
            if self._setting.device == "cpu" and self._setting.threads == 1:
                # On one core, so that what else runs there and its clock are the same for both.
                for side in self._sides:
                    side.ask("pin", core=max(os.sched_getaffinity(0)))
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        for side in self._sides:
            side.close()
        self._sides.clear()
