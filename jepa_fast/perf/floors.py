"""Floors: how much faster than the best alternative an operator has to be on a GPU."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jepa_fast.perf.errors import BaselineMissing, PerfError
from jepa_fast.perf.results import Record
from jepa_fast.perf.summary import Check

FILE = "floors.json"
FORM = '{"<machine>": {"<operator>": {"geometric_mean": 1.2, "cases": 4}}}'
"""For people; the machine's name is that of its results file."""


def read_floors(folder: Path, told: Path | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """What is pinned in a suite's `floors.json`: by machine, by operator, mean and cases.

    Args:
        folder: the suite's.
        told: the suite's folder in messages, where `folder` is a copy that nobody knows.

    Raises:
        BaselineMissing: the suite has none.
        PerfError: it is not of the form
            `{machine: {operator: {"geometric_mean": number, "cases": number}}}`.
    """
    told = told or folder
    try:
        floors = json.loads((folder / FILE).read_text())
        _check_form(floors)
    except FileNotFoundError as error:
        raise BaselineMissing(f"{told} has no {FILE}, so there is no floor to check") from error
    except ValueError as error:  # of json's, or of ours
        raise PerfError(f"{told / FILE}: {error}; floors have the form {FORM}") from error
    return floors


def _check_form(floors: Any) -> None:
    """Raises ValueError, which names what is not as `FORM` has it."""
    for machine, operators in _items("the file", floors, "machines"):
        for operator, floor in _items(json.dumps(machine), operators, "operators"):
            name = f"{json.dumps(machine)}, {json.dumps(operator)}"
            numbers = dict(_items(name, floor, "'geometric_mean' and 'cases'"))
            if set(numbers) != {"geometric_mean", "cases"} or not all(
                type(number) in (int, float) and 0 < number < math.inf
                for number in numbers.values()
            ):
                raise ValueError(
                    f"{name}: expected a positive 'geometric_mean' and 'cases', got "
                    f"{json.dumps(floor)}"
                )


def _items(name: str, value: Any, of: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object of {of}, got {json.dumps(value)}")
    return value.items()


def check_floors(
    floors: dict[str, dict[str, dict[str, float]]],
    machine: str,
    records: Sequence[Record],
    operators: Sequence[str] = (),
) -> list[Check]:
    """One check a pinned operator: the geometric mean of its headlines reaches the floor.

    Every pinned case has to be there: a mean over others would be another number.

    Args:
        floors: as `read_floors` gives them.
        machine: its name; without floors of its own there is nothing to check.
        records: of the run.
        operators: which the run was restricted to; none: not at all.
    """
    checks = []
    for operator, floor in sorted(floors.get(machine, {}).items()):
        if operators and operator not in operators:
            continue
        ratios = _headlines(records, operator)
        expected = floor["cases"]
        if len(ratios) != expected:
            message = f"{len(ratios)} cases measured, the floor is one over {expected}"
            checks.append(Check(operator, False, message))
            continue
        mean = statistics.geometric_mean(ratios)
        message = (
            f"{mean:.3f}x of the best alternatives over {expected} cases, "
            f"the floor is {floor['geometric_mean']:g}x"
        )
        checks.append(Check(operator, mean >= floor["geometric_mean"], message))
    return checks


def _headlines(records: Sequence[Record], operator: str) -> list[float]:
    mine: list[dict[str, Any]] = [each for each in records if each["operator"] == operator]
    return [record["headline"]["ratio"] for record in mine if record["headline"]]
