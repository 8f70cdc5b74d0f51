"""Floors: how much faster than the best alternative an operator has to be on a GPU."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jepa_fast.perf.errors import BaselineMissing, PerfError
from jepa_fast.perf.results import Record
from jepa_fast.perf.summary import Check

FILE = "floors.json"


def read_floors(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What is pinned in a suite's `floors.json`: by machine, by operator, mean and cases.

    Raises:
        BaselineMissing: the suite has none.
        PerfError: it is not of the form
            `{machine: {operator: {"geometric_mean": number, "cases": number}}}`.
    """
    path = folder / FILE
    try:
        floors = json.loads(path.read_text())
        for operators in floors.values():
            for floor in operators.values():
                if set(floor) != {"geometric_mean", "cases"} or min(floor.values()) <= 0:
                    raise ValueError(
                        "expected a positive 'geometric_mean' and 'cases' for every operator, got "
                        f"{floor}"
                    )
    except FileNotFoundError as error:
        raise BaselineMissing(f"{folder} has no {FILE}, so there is no floor to check") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise PerfError(f"{path}: {error}") from error
    return floors


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
