"""`jepa-fast bench`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_fast.perf.commands.options import positive
from jepa_fast.perf.machine import DEVICES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jepa_fast.perf.suite import Outcome

DONE, FAILED, STOPPED = 0, 1, 130
_PACKAGE = Path(__file__).resolve().parents[2]
_IN_CHECKOUT, _PACKAGED = _PACKAGE.parent / "benchmarks", _PACKAGE / "_benchmarks"


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Races our operators against eager PyTorch, torch.compile and libraries: correct first, "
        "then all in turn for 30 rounds or more. Prints a table, and writes <machine>.json (with "
        "--quick, <machine>-quick.json), which says what produced each number, and a picture."
    )
    parser.add_argument("--op", nargs="+", metavar="OP", help="operators (default: all)")
    parser.add_argument("--quick", action="store_true", help="small cases alone, timed less often")
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="auto, the default: a GPU if there is one",
    )
    parser.add_argument(
        "--suite",
        type=Path,
        metavar="FOLDER",
        help="one's own benchmarks, bench_*.py (default: those of jepa_fast)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where results go (default: results in the suite's folder; of an installed package "
        "in the current one)",
    )
    parser.add_argument(
        "--budget",
        type=positive(float),
        metavar="S",
        help="seconds: cases that no longer fit are left out",
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="at least 30 (fewer with --quick); default: 30"
    )
    parser.add_argument(
        "--allow-dirty",
        action="store_true",
        help="measure uncommitted changes; results say so (new reports, as .md, .xml or .json "
        "that lie beside no code, are none)",
    )
    parser.add_argument(
        "--commit",
        metavar="ID",
        help="what is measured, for the record, where there is no git to tell",
    )
    parser.add_argument(
        "--check-floors",
        action="store_true",
        help="fail (exit code 1) where the suite's floors.json is not reached on this machine",
    )


def run(options: argparse.Namespace) -> int:
    """Measures, writes and prints; gives the exit code.

    Raises:
        PerfError: an operator is not known, packages are missing, the results there are another
            machine's, or sources have uncommitted changes: by kind, each with its exit code.
        OSError: a result cannot be written; earlier files stay whole.
    """
    started = time.monotonic()
    from jepa_fast.perf.errors import PerfError
    from jepa_fast.perf.files import check_writable
    from jepa_fast.perf.floors import read_floors
    from jepa_fast.perf.machine import choose_device, describe
    from jepa_fast.perf.race import find_benchmarks
    from jepa_fast.perf.results import gaps, numbers, read_results, results_file, table
    from jepa_fast.perf.suite import check_packages, run_suite

    check_packages()
    if options.quick and options.check_floors:
        raise PerfError("floors are means over all cases: leave out --quick or --check-floors")
    suite = (options.suite or _default_suite()).resolve()
    output = (options.output or _default_output(suite)).resolve()
    # All that can be refused is, before the minutes that measuring takes.
    floors = read_floors(suite) if options.check_floors else None
    sources = _sources(suite, output, options)
    device = choose_device(options.device)
    machine = describe(device)
    path = results_file(output, machine, options.quick)
    read_results(path, machine)
    check_writable(output)
    operators = options.op or []
    budget = None
    if options.budget is not None:
        budget = options.budget - (time.monotonic() - started)
    try:
        outcome = run_suite(
            suite, device, operators, quick=options.quick, rounds=options.rounds, budget=budget
        )
    except PerfError as error:
        own = Path("benchmarks")
        unknown = options.suite is None and str(error).startswith("unknown operator")
        if unknown and own.resolve() != suite and find_benchmarks(own):
            raise PerfError(f"{error}; for those in ./benchmarks: --suite benchmarks") from error
        raise
    for skipped in outcome.skipped:
        print(f"skipped {skipped['operator']} {skipped['case']}: {skipped['why']}")
    if outcome.records:
        records = outcome.records
        print(table(records), *gaps(records), *numbers(records), sep="\n")
        _write(path, outcome, {**sources, "options": _told(options, device)})
    else:
        print("nothing was measured, and nothing written")
    if outcome.stopped:
        return STOPPED
    ok = floors is None or _floors_hold(floors, machine["name"], outcome.records, operators)
    return DONE if ok and outcome.records and not outcome.failed else FAILED


def _default_suite() -> Path:
    """The benchmarks that belong to the package as it is imported."""
    return _PACKAGED if _PACKAGED.is_dir() else _IN_CHECKOUT


def _default_output(suite: Path) -> Path:
    return Path("results") if suite == _PACKAGED else suite / "results"


def _sources(suite: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The commit that is measured, and whether files differ from it.

    Outside a git checkout nobody can tell; of an installed package its version does.

    Raises:
        DirtyWorktree: files differ, and that is not allowed.
        BuildFailed: the native library was built from others.
    """
    from jepa_fast.ops import _build
    from jepa_fast.perf.errors import BuildFailed, DirtyWorktree
    from jepa_fast.perf.machine import SOURCES, commit, git, uncommitted

    record = _build.Record.read()
    if suite == _IN_CHECKOUT and record and record.is_older_than_sources():
        raise BuildFailed("the native library is older than its sources: run `jepa-fast build`")
    if suite == _PACKAGED or commit(suite) is None:
        return {"commit": options.commit, "dirty": None}
    root = Path(git(suite, "rev-parse", "--show-toplevel"))
    changed = uncommitted(root, SOURCES if suite == _IN_CHECKOUT else ["."])
    changed = [name for name in changed if not (root / name).is_relative_to(output)]
    if changed and not options.allow_dirty:
        raise DirtyWorktree(
            f"uncommitted changes in {root}: {', '.join(changed[:5])}"
            f"{', ...' if len(changed) > 5 else ''}; commit them, or measure them with "
            "--allow-dirty"
        )
    return {"commit": commit(root), "dirty": bool(changed)}


def _told(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """The options that a measurement depends on."""
    names = ("op", "quick", "rounds", "budget")
    return {**{name: getattr(options, name) for name in names}, "device": device}


def _write(path: Path, outcome: Outcome, more: Mapping[str, Any]) -> None:
    """Puts the run into the results file, and draws its picture."""
    from jepa_fast.perf.errors import PerfError
    from jepa_fast.perf.picture import draw
    from jepa_fast.perf.results import add_run, read_results, write_results

    found = outcome.run
    # Of the machine, what is the same in every run; the rest goes with this one.
    machine = {n: v for n, v in found["machine"].items() if n not in ("clocks", "threads")}
    run = {
        **{name: found[name] for name in ("id", "date")},
        **{name: more[name] for name in ("commit", "dirty")},
        "versions": found["versions"],
        "clocks": found["machine"]["clocks"],
        "threads": found["machine"]["threads"],
        "ceilings": found["ceilings"],
        "options": more["options"],
        "skipped": outcome.skipped,
    }
    # Read again: another run may have written while this one measured.
    before = read_results(path, machine)
    results = add_run(before, machine, run, outcome.records, outcome.known)
    write_results(path, results)
    print(f"wrote {path}")
    picture = path.with_suffix(".png")
    try:
        draw(results, picture)
    except PerfError as error:
        print(error, file=sys.stderr)
    else:
        print(f"wrote {picture}")


def _floors_hold(
    floors: dict[str, Any], machine: str, records: list[dict[str, Any]], operators: list[str]
) -> bool:
    from jepa_fast.perf.floors import check_floors

    if machine not in floors:
        print(f"no floors for {machine}; there are some for: {', '.join(sorted(floors)) or 'none'}")
        return True
    checks = check_floors(floors, machine, records, operators)
    for check in checks:
        print(f"{'ok' if check.ok else 'BELOW THE FLOOR'} {check.name}: {check.message}")
    return all(check.ok for check in checks)
