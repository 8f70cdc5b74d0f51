"""The audit of all operators of jepa_fast: what `jepa-fast audit` prints and compares.

An operator joins by `compile_cases()` and `traffic_cases()` in its Triton file; its CUDA kernels
are those of the native library whose names begin with the operator's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jepa_fast import ops  # noqa: F401  (registers the operators)
from jepa_fast.ops import _build
from jepa_fast.ops._compile import all_cases
from jepa_fast.ops._registry import OPERATORS
from jepa_fast.perf import interpreted, machine_code
from jepa_fast.perf.audit_report import CompiledKernel, Report
from jepa_fast.perf.audit_rules import triton_release
from jepa_fast.perf.errors import BaselineMissing, BuildFailed
from jepa_fast.perf.kernel_audit import TARGETS, compile_all, described, versions
from jepa_fast.perf.race import check_names

CUDA = "CUDA kernels"
"""Their key in `Report.not_audited`."""


def audit_operators(
    operators: Sequence[str] | None = None,
    targets: Sequence[str] = TARGETS,
    *,
    compiled: bool = True,
    traffic: bool = True,
) -> Report:
    """Audits every GPU kernel of these operators, None: of all.

    Args:
        operators: names, keys of `OPERATORS`.
        targets: chips.
        compiled: compile the kernels and read their code.
        traffic: count in the interpreter.

    Raises:
        PerfError: an operator is not known.
        BuildFailed: a kernel does not compile, or does not run in the interpreter.
    """
    if operators is not None:
        check_names("operator", operators, OPERATORS)
    found, not_audited, read = None, dict[str, str](), versions()
    if compiled:
        cases = [case for case in all_cases() if _selected(operator_of(case.name), operators)]
        found = compile_all(cases, targets)
        try:
            found += _cuda_kernels(operators, targets)
            read["nvcc"] = _nvcc_release()
        except BuildFailed as error:
            not_audited[CUDA] = str(error)
    calls = interpreted.operators_traffic(operators) if traffic else None
    report = Report(read, found, calls, not_audited)
    return replace(report, not_audited=not_audited | _without_kernels(report, operators))


def restrict(report: Report, operators: Sequence[str] | None, targets: Sequence[str]) -> Report:
    """The part of a report that an audit of these operators and chips would hold."""
    kernels, calls = report.kernels, report.traffic
    return replace(
        report,
        kernels=kernels
        and [
            kernel
            for kernel in kernels
            if kernel.chip in targets and _selected(operator_of(kernel.name), operators)
        ],
        traffic=calls and [call for call in calls if _selected(operator_of(call.name), operators)],
    )


def operator_of(name: str) -> str:
    """Of a case or a CUDA kernel: `"ema_update_"` of `"ema_update_-default-..."` and of
    `"jepa_fast::ema_update_kernel<float>"`; empty where no operator's name fits.
    """
    if not name.startswith("jepa_fast::"):
        return name.partition("-")[0]
    function = name.removeprefix("jepa_fast::")
    fitting = [each for each in OPERATORS if function.startswith(each.rstrip("_") + "_")]
    return max(fitting, key=len, default="")


def _selected(operator: str, operators: Sequence[str] | None) -> bool:
    return operators is None or operator in operators


def _without_kernels(report: Report, operators: Sequence[str] | None) -> dict[str, str]:
    """Of the operators asked for by name, those of which there is nothing to audit."""
    rows = [each.name for part in (report.kernels, report.traffic) for each in part or ()]
    covered = {operator_of(name) for name in rows}
    return {
        name: "it has no kernels of its own for a GPU"
        for name in operators or ()
        if name not in covered
    }


def _cuda_kernels(operators: Sequence[str] | None, targets: Sequence[str]) -> list[CompiledKernel]:
    """Those in the native library. Raises BuildFailed if there are none, and says why."""
    record = _build.Record.read()
    if record is None or "cuda" not in record.parts:
        why = "it was not built" if record is None else record.why_not.get("cuda", "left out")
        raise BuildFailed(
            f"the native library has none: {' '.join(why.split())}; `jepa-fast build` adds them"
        )
    library = _build.library_folder() / _build.LIBRARY
    if not library.is_file():
        raise BuildFailed(f"the native library {library} is gone; `jepa-fast build` makes it")
    if record.is_older_than_sources():
        raise BuildFailed("the native library is older than its sources: run `jepa-fast build`")
    found = []
    for code in machine_code.read(library, launch_bounds=True):
        if "jepa_fast" not in code.symbol or code.chip not in targets:
            continue  # the CUDA runtime's own
        name = machine_code.readable(code.symbol)
        if _selected(operator_of(name), operators):
            kernel = re.sub(r"<.*", "", name).rpartition("::")[2]
            shared = code.resources.shared
            found.append(described(code, name, kernel, "nvcc", {}, code.threads, shared))
    return sorted(found, key=lambda kernel: (kernel.name, targets.index(kernel.chip)))


def _nvcc_release() -> str:
    """`"13.0"`: what decides about the CUDA kernels' machine code."""
    record = _build.Record.read()
    releases = [
        match[1]
        for text in (record.compilers if record else [])
        if (match := re.search(r"release (\d+\.\d+)", text))
    ]
    return releases[0] if releases else "?"


def baseline_file(path: Path, release: str) -> Path:
    """The baseline of this Triton: `path`, or the file in it where it is a folder.

    Args:
        path: a file, or a folder of files `triton-<major.minor>.json`.
        release: major.minor.

    Raises:
        BaselineMissing: there is no such file; says which there are.
    """
    file = path / baseline_name(release) if is_folder(path) else path
    if not file.is_file():
        there = ", ".join(sorted(each.name for each in path.glob("triton-*.json"))) or "none"
        others = f"; there are {there}" if is_folder(path) else ""
        raise BaselineMissing(f"no baseline {file}{others}: make it with --write {path}")
    return file


def newest_baseline(folder: Path) -> Path:
    """The baseline of the newest Triton in a folder. Raises BaselineMissing: there is none."""
    files = list(folder.glob("triton-*.json"))
    if not files:
        raise BaselineMissing(
            f"no baseline triton-*.json in {folder}: make one with --write {folder}"
        )
    return max(files, key=lambda file: [int(each) for each in re.findall(r"\d+", file.stem)])


def is_folder(path: Path) -> bool:
    """Whether a path, which need not exist, is meant as a folder."""
    return path.is_dir() or path.suffix != ".json"


def baseline_name(release: str) -> str:
    """Of the file in a folder of baselines."""
    return f"triton-{release}.json"


def installed_release() -> str:
    """Triton's, major.minor."""
    return triton_release(Report(versions(), None, None))
