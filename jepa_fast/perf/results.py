"""Results files: one a machine, `<machine>.json`, with what produced every number in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_fast.perf.errors import BaselineOfAnother, PerfError
from jepa_fast.perf.files import write_json
from jepa_fast.perf.race import check_names

SCHEMA = 1
"""Of the JSON. Other numbers are refused."""

Record = dict[str, Any]
Results = dict[str, Any]


def results_file(folder: Path, machine: Mapping[str, Any], quick: bool = False) -> Path:
    """Where the results of a machine, as `machine.describe` tells of it, lie in a folder.

    Those of quick runs lie apart: they are for trying things out, and replace no others.
    """
    return folder / f"{machine['name']}{'-quick' if quick else ''}.json"


def read_results(path: Path, machine: Mapping[str, Any] | None = None) -> Results:
    """The results in a file; of a file that is not there yet, none.

    Args:
        path: the file.
        machine: which machine's they have to be; None: any.

    Raises:
        BaselineOfAnother: they are another machine's, or of another schema.
        PerfError: the file is no results file.
    """
    if not path.exists():
        return {"schema": SCHEMA, "machine": dict(machine or {}), "runs": [], "records": []}
    try:
        results = json.loads(path.read_text())
        schema, name = results["schema"], results["machine"]["name"]
        if schema == SCHEMA:  # what a run is added to, here and not once it is measured
            add_run(results, {}, {"id": None}, [])
    except (AttributeError, KeyError, TypeError, ValueError, IsADirectoryError) as error:
        raise PerfError(
            f"{path} is no results file ({type(error).__name__}: {error}): move it, or write "
            "elsewhere with --output"
        ) from error
    if schema != SCHEMA:
        raise BaselineOfAnother(
            f"{path} has schema {schema}, this version writes {SCHEMA}: move it, or write "
            "elsewhere with --output"
        )
    if machine is not None and name != machine["name"]:
        raise BaselineOfAnother(
            f"{path} has results of {name}, this machine is {machine['name']}: write elsewhere "
            "with --output"
        )
    return results


def add_run(
    results: Results,
    machine: Mapping[str, Any],
    run: Mapping[str, Any],
    records: Sequence[Record],
    known: Iterable[tuple[str, str]] = (),
) -> Results:
    """Results with those of a new run, which replace only their own, case by case.

    Runs without a record left are dropped, and records of cases that the operators do not have any
    more.

    Args:
        results: the earlier ones; they stay as they are.
        machine: it, as it is now.
        run: what the new records come from; they name its `id`.
        records: the new ones.
        known: (operator, case) of everything in the suite.
    """
    cases = set(known)
    operators = {operator for operator, _ in cases}
    merged = {
        _key(record): record
        for record in results["records"]
        if record["operator"] not in operators or (record["operator"], record["case"]) in cases
    }
    merged.update((_key(record), record) for record in records)
    order = sorted(merged.values(), key=lambda record: (record["operator"], _size(record)))
    ids = {record["run"] for record in order}
    runs = [*(each for each in results["runs"] if each["id"] != run["id"]), dict(run)]
    return {
        "schema": SCHEMA,
        "machine": dict(machine),
        "runs": [each for each in runs if each["id"] in ids],
        "records": order,
    }


def write_results(path: Path, results: Results) -> None:
    """Writes all of it, or nothing. Raises OSError; an earlier file then stays as it was."""
    write_json(path, results)


def select(records: Sequence[Record], operators: Sequence[str]) -> list[Record]:
    """Those of some operators, or of all if none is named. Raises PerfError for unknown ones."""
    check_names("operator", operators, (record["operator"] for record in records))
    return [record for record in records if not operators or record["operator"] in operators]


def _key(record: Record) -> tuple[str, str, str]:
    return record["operator"], record["case"], record["device"]


def _size(record: Record) -> tuple[int, int, str]:
    cost = record["cost"]
    return cost["flops"], cost["read"] + cost["written"], record["case"]


_COLUMNS = (
    "operator",
    "case",
    "ours ms",
    "+-",
    "over the best",
    "others",
    "variants",
    "GB/s",
    "TFLOP/s",
    "of the ceiling",
    "peak MB",
    "first call ms",
    "host us",
    "as a graph ms",
)


_TEXT = ("operator", "case", "over the best", "others", "variants")


def table(records: Sequence[Record]) -> str:
    """The records as text, a line a case; columns without anything in them are left out."""
    lines = [list(_COLUMNS), *map(_row, records)]
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    padded = []
    for column in columns:
        width = max(map(len, column))
        is_text = column[0] in _TEXT
        padded.append([cell.ljust(width) if is_text else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def gaps(records: Sequence[Record]) -> list[str]:
    """What is missing in a table, and why: a line a provider and reason, with its cases."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        for name, why in record["why_not"].items():
            cases.setdefault((record["operator"], name, why), []).append(record["case"])
    return [
        f"{operator} {', '.join(names)}: no {name}: {why}"
        for (operator, name, why), names in cases.items()
    ]


def numbers(records: Sequence[Record]) -> list[str]:
    """What else is to be known of providers, which do not do quite the same: a line each."""
    return [
        f"{record['operator']} {record['case']}, {name}: "
        + ", ".join(f"{what} {_number(number)}" for what, number in found.items())
        for record in records
        for name, found in record.get("numbers", {}).items()  # older records have none
    ]


def _row(record: Record) -> list[str]:
    ours, headline = record["providers"]["ours"], record["headline"]
    share, peak = record["share_of_ceiling"], ours["peak_bytes"]
    ratios = {
        name: f"{name} {each['ratio']:.2f}x"
        for name, each in record["providers"].items()
        if each["ratio"] is not None
    }
    variants = [ratios.pop(name) for name in record["variants"]]
    return [
        record["operator"],
        record["case"],
        _number(ours["milliseconds"]),
        f"{100 * ours['spread']:.0f} %",
        f"{headline['ratio']:.2f}x {headline['against']}" if headline else "",
        ", ".join(ratios.values()),
        ", ".join(variants),
        _number(record["gigabytes_per_second"]),
        _number(record["teraflops"]),
        "" if share is None else f"{100 * share:.0f} % {record['bound']}",
        "" if peak is None else _number(peak / 1e6),
        _number(ours["first_call_milliseconds"]),
        _number(ours["host_microseconds"]),
        _number(record["graph_milliseconds"]),
    ]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
