"""What a comparison found, for people and for CI."""

from __future__ import annotations

from typing import Any

from jepa_fast.perf.gate.decision import Verdict, percent
from jepa_fast.perf.gate.gate import Comparison, Finding
from jepa_fast.perf.gate.sampling import Sample
from jepa_fast.perf.gate.snapshots import Snapshot
from jepa_fast.perf.summary import Check


def check(finding: Finding, tolerance: float) -> Check:
    """A finding as a check."""
    if finding.wrong:
        first, *rest = finding.wrong.splitlines()
        also = "; so is the base's" if finding.base_wrong else ""
        return Check(finding.name, False, f"WRONG RESULT: {first}{also}", tuple(rest))
    if finding.broken:
        return Check(finding.name, False, f"the working tree cannot run it: {finding.broken}")
    if finding.not_compared:
        return Check(finding.name, True, f"not compared: {finding.not_compared}", told=False)
    if finding.base_wrong:
        why = f"the base's result is wrong: {finding.base_wrong.splitlines()[0]}"
        return Check(finding.name, True, f"not compared: {why}", told=False)
    text = [_times(finding, tolerance), _memory(finding)]
    unsure = bool(finding.runs) and finding.runs[-1].verdict is Verdict.UNSURE
    told = not unsure and not _to_be_confirmed(finding)
    return Check(finding.name, finding.ok, "; ".join(filter(None, text)), told=told)


def _to_be_confirmed(finding: Finding) -> bool:
    """Whether only a second run will tell."""
    return len(finding.runs) == 1 and finding.suspect


def _times(finding: Finding, tolerance: float) -> str:
    if not finding.runs:
        return ""
    first, *second = finding.runs
    text = f"time {first.interval}, {_milliseconds(first)}, {first.interval.pairs} pairs"
    if finding.slower:
        return f"SLOWER: {text}; again {second[0].interval}"
    if second:
        return f"{text}; not confirmed by a second run: {second[0].interval}"
    if _to_be_confirmed(finding):
        return f"{text}; to be confirmed by a second run"
    if first.verdict is Verdict.UNSURE:
        return f"{text}; too noisy to tell whether it is beyond {percent(tolerance)}"
    return text


def _milliseconds(run: Sample) -> str:
    return f"fastest {1e3 * run.base_seconds:.3g} -> {1e3 * run.head_seconds:.3g} ms"


def _memory(finding: Finding) -> str:
    if finding.base_bytes is None or finding.base_bytes == finding.head_bytes:
        return ""
    more = "MORE MEMORY" if finding.memory_grew else "peak memory"
    return f"{more}: {finding.base_bytes:,} -> {finding.head_bytes:,} bytes"


def line(finding: Finding, tolerance: float) -> str:
    """A finding, as the command prints it."""
    return printed(check(finding, tolerance))


def printed(told: Check) -> str:
    """A check, as the command prints it."""
    label = "WORSE" if not told.ok else "ok" if told.told else "?"
    return f"{label:<5} {told.name}: {told.message}"


def title(found: Comparison) -> str:
    """Of a summary."""
    return f"{found.head.label} against {found.base.label}"


def checks(found: Comparison) -> list[Check]:
    """All findings, and floors."""
    return [*(check(each, found.limits.slow_down) for each in found.findings), *found.floors]


def to_json(found: Comparison, machine: dict[str, Any], versions: dict[str, str]) -> dict[str, Any]:
    """Everything, for a machine to read; times in seconds, slow-downs as fractions.

    Args:
        found: the comparison.
        machine: where.
        versions: with what.
    """
    return {
        "schema": 1,
        "ok": found.ok,
        "stopped": found.stopped,
        "base": _version(found.base),
        "head": _version(found.head),
        "machine": machine,
        "versions": versions,
        "device": found.setting.device,
        "threads": found.setting.threads,
        "limits": {
            "slow_down": found.limits.slow_down,
            "memory": found.limits.memory,
            "seconds": found.limits.seconds,
        },
        "cases": [
            {
                "operator": finding.operator,
                "case": finding.case,
                "ok": finding.ok,
                "slower": finding.slower,
                "memory_grew": finding.memory_grew,
                "wrong": finding.wrong,
                "base_wrong": finding.base_wrong,
                "broken": finding.broken,
                "not_compared": finding.not_compared,
                "base_bytes": finding.base_bytes,
                "head_bytes": finding.head_bytes,
                "runs": [_run(run) for run in finding.runs],
            }
            for finding in found.findings
        ],
        "floors": [
            {"name": floor.name, "ok": floor.ok, "message": floor.message} for floor in found.floors
        ],
    }


def _version(version: Snapshot) -> dict[str, Any]:
    return {
        "label": version.label,
        "commit": version.commit,
        "changed_files": list(version.changed),
    }


def _run(run: Sample) -> dict[str, Any]:
    return {
        "verdict": run.verdict.value,
        "slow_down": run.interval.estimate,
        "low": run.interval.low,
        "high": run.interval.high,
        "pairs": run.interval.pairs,
        "base_seconds": run.base_seconds,
        "head_seconds": run.head_seconds,
    }
