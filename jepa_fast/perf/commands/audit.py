"""`jepa-fast audit`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jepa_fast.perf.audit_report import Report
    from jepa_fast.perf.audit_rules import Comparison
    from jepa_fast.perf.summary import Check

DONE, WORSE, STOPPED = 0, 1, 130


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Compiles every Triton kernel in every shipped config for GPUs that are not here, reads "
        "that machine code and the native library's, and counts in Triton's interpreter what calls "
        "of the operators move. Deterministic."
    )
    parser.add_argument("--op", nargs="+", metavar="OP", help="operators (default: all)")
    parser.add_argument(
        "--target", nargs="+", metavar="SM", help="chips (default: sm_80 sm_90 sm_100)"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--no-traffic", action="store_true", help="compiled code alone")
    part.add_argument(
        "--traffic-only", action="store_true", help="traffic and launches alone: any Triton's agree"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="BASELINE",
        help="fail (exit code 1) where something is worse than in this file, or in the folder's "
        "file triton-<major.minor>.json",
    )
    parser.add_argument(
        "--write", type=Path, metavar="PATH", help="write the report: a .json file, or a folder"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="for a CI job's summary")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="for CI that shows tests")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(options: argparse.Namespace) -> int:
    """Audits, writes and compares; gives the exit code.

    Raises:
        PerfError: an operator or chip is not known, there is no baseline or one of another
            version, a kernel does not compile, Triton is missing: by kind, each with its exit code.
        OSError: a result cannot be written; an earlier file stays whole.
    """
    from jepa_fast.perf.errors import PackageMissing

    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise PackageMissing("the audit needs Triton: pip install triton") from error
    from jepa_fast.ops._registry import OPERATORS
    from jepa_fast.perf.audit_rules import compare
    from jepa_fast.perf.files import check_target
    from jepa_fast.perf.kernel_audit import TARGETS
    from jepa_fast.perf.occupancy import LIMITS
    from jepa_fast.perf.operator_audit import audit_operators, restrict
    from jepa_fast.perf.race import check_names
    from jepa_fast.perf.signals import interruptible

    check_names("operator", options.op or (), OPERATORS)
    check_names("chip", options.target or (), LIMITS)
    targets = options.target or TARGETS
    # Before the minutes that an audit takes.
    for file in filter(None, (options.markdown, options.junit)):
        check_target(file)
    before = _baseline(options.compare, options.traffic_only, targets) if options.compare else None
    try:
        with interruptible():
            report = audit_operators(
                options.op,
                targets,
                compiled=not options.traffic_only,
                traffic=not options.no_traffic,
            )
    except KeyboardInterrupt:
        print("stopped by a signal; nothing is written", file=sys.stderr)
        return STOPPED
    comparison = compare(report, restrict(before, options.op, targets)) if before else None
    checks = _checks(report, comparison)
    if options.write:
        _write(options.write, report)
    _summarise(options, report, checks)
    _print(options.json, report, comparison, options.compare)
    return WORSE if comparison and comparison.findings else DONE


def _baseline(path: Path, traffic_only: bool, targets: Sequence[str]) -> Report:
    """The baseline to compare with: of this Triton, or of any where its version does not matter.

    Raises:
        PerfError: it is missing or cannot be read, or it is of another Triton or of other chips.
    """
    from dataclasses import replace

    from jepa_fast.perf.audit_report import Report
    from jepa_fast.perf.audit_rules import check_chips, check_triton
    from jepa_fast.perf.kernel_audit import versions
    from jepa_fast.perf.operator_audit import (
        baseline_file,
        installed_release,
        is_folder,
        newest_baseline,
    )

    if traffic_only and is_folder(path):
        return replace(Report.read(newest_baseline(path)), kernels=None)
    report = Report.read(baseline_file(path, installed_release()))
    if traffic_only:
        return replace(report, kernels=None)
    check_triton(Report(versions(), [], None), report)
    check_chips(targets, report)
    return report


def _checks(report: Report, comparison: Comparison | None) -> list[Check]:
    """One for every kernel on every chip and for every call, and for what has vanished."""
    from jepa_fast.perf.summary import Check

    found = defaultdict(list)
    for finding in comparison.findings if comparison else ():
        found[f"{finding.name} on {finding.chip}"].append(finding)
    names = [f"{kernel.name} on {kernel.chip}" for kernel in report.kernels or ()]
    names += [f"{call.name} on any chip" for call in report.traffic or ()]
    return [
        Check(
            name,
            name not in found,
            "; ".join(f"{each.rule}: {each.number}" for each in found[name]),
            tuple(map(str, found[name])),
        )
        for name in [*names, *(each for each in list(found) if each not in names)]
    ]


def _write(path: Path, report: Report) -> None:
    from jepa_fast.perf.audit_rules import triton_release
    from jepa_fast.perf.files import write_text
    from jepa_fast.perf.operator_audit import baseline_name, is_folder

    file = path / baseline_name(triton_release(report)) if is_folder(path) else path
    write_text(file, report.to_text())


def _summarise(options: argparse.Namespace, report: Report, checks: Sequence[Check]) -> None:
    from jepa_fast.perf.files import write_text
    from jepa_fast.perf.summary import junit, markdown

    if options.markdown:
        headline = None if options.compare else "compared with nothing"
        write_text(options.markdown, markdown("jepa-fast audit", checks, str(report), headline))
    if options.junit:
        write_text(options.junit, junit("jepa-fast audit", checks))


def _print(
    as_json: bool, report: Report, comparison: Comparison | None, baseline: Path | None
) -> None:
    if as_json:
        value = report.to_json()
        if comparison is not None:
            value["findings"] = [vars(each) for each in comparison.findings]
            value["notes"] = comparison.notes
        print(json.dumps(value, indent=2))
        return
    print(report)
    if comparison is None:
        return
    print()
    for note in comparison.notes:
        print(note)
    for finding in comparison.findings:
        print(f"WORSE {finding}")
    count = len(comparison.findings)
    verdict = "nothing is worse" if not count else f"{count} numbers are worse"
    print(f"compared with {baseline}: {verdict}")
