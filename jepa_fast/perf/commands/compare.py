"""`jepa-fast compare`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_fast.perf.commands.options import positive, share
from jepa_fast.perf.machine import DEVICES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jepa_fast.perf.gate.gate import Comparison
    from jepa_fast.perf.gate.sides import Setting
    from jepa_fast.perf.summary import Check

DONE, WORSE, STOPPED = 0, 1, 130


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Builds BASE and the working tree side by side, lets both take turns at the suite's quick "
        "cases, and fails (exit code 1) where the working tree is really slower: where the 99 % "
        "lower bound of the slow-down is above the tolerance, and again in a second run with new "
        "processes. Fails, too, where the check of a case says that the working tree's result is "
        "wrong (the case then has no numbers; nor has one that is wrong in BASE, which fails "
        "nothing), where a call's peak memory grew, which is deterministic, and where the suite's "
        "floors.json names this machine and the working tree is below a floor of it."
    )
    parser.add_argument("base", metavar="BASE", help="a git ref: origin/main, a tag, a commit")
    parser.add_argument("--op", nargs="+", metavar="OP", help="operators (default: all)")
    parser.add_argument(
        "--suite",
        type=Path,
        default=Path("benchmarks"),
        metavar="FOLDER",
        help="of benchmarks, bench_*.py, below the repository's root; both versions run those of "
        "the working tree (default: benchmarks)",
    )
    parser.add_argument(
        "--path",
        action="append",
        default=[],
        metavar="FOLDER",
        help="of the repository, relative to its root, that its packages are imported from in "
        "either version, such as python; may be given more than once (always: src and the root)",
    )
    parser.add_argument(
        "--build",
        metavar="COMMAND",
        help="builds a version, in its root, once (default: nothing; the native library in a "
        "checkout of jepa_fast)",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="auto, the default: a GPU if there is one",
    )
    parser.add_argument(
        "--threads", type=positive(int), default=1, metavar="N", help="of torch (default: 1)"
    )
    parser.add_argument(
        "--tolerance",
        type=share,
        default=0.02,
        metavar="SHARE",
        help="slow-down that is allowed (default: 0.02, 2 %%)",
    )
    parser.add_argument(
        "--memory-tolerance",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="growth of peak memory that is allowed (default: 0.01)",
    )
    parser.add_argument(
        "--seconds",
        type=positive(float),
        default=20.0,
        metavar="S",
        help="for timing a case, at the most, in each of two runs (default: 20)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="of built versions (~/.cache/jepa_fast)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="for a CI job's summary")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="for CI that shows tests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")


def run(options: argparse.Namespace) -> int:
    """Builds, compares, prints and writes; gives the exit code.

    Raises:
        PerfError: a ref, a folder or an operator is not known, there is nothing to compare with, a
            version cannot be built or run: by kind, each with its exit code.
        OSError: a result cannot be written; an earlier file stays whole.
    """
    from jepa_fast.perf.errors import PerfError
    from jepa_fast.perf.files import check_target
    from jepa_fast.perf.gate import report
    from jepa_fast.perf.gate.gate import Limits, compare
    from jepa_fast.perf.gate.sides import Setting
    from jepa_fast.perf.gate.snapshots import Snapshots, default_cache
    from jepa_fast.perf.machine import choose_device
    from jepa_fast.perf.race import find_benchmarks, suite_files
    from jepa_fast.perf.summary import verdict

    device = choose_device(options.device)
    for file in filter(None, (options.markdown, options.junit, options.json)):
        check_target(file)
    # Nothing that is measured on a CPU needs the minutes of nvcc.
    environment = {"JEPA_FAST_BUILD": os.environ.get("JEPA_FAST_BUILD") or "cpu"}
    snapshots = Snapshots(
        Path.cwd(),
        options.cache or default_cache(),
        options.build,
        environment if device == "cpu" else None,
    )
    suite = _suite(options.suite, snapshots.root)
    if not suite.is_relative_to(snapshots.root):
        raise PerfError(f"the suite has to be in the repository {snapshots.root}, got {suite}")
    suite_files(suite)
    paths = _paths(options.path, snapshots.root)
    base = snapshots.base(options.base)
    head = snapshots.head()
    inside = suite.relative_to(snapshots.root)
    if not find_benchmarks(head.root / inside):
        raise PerfError(f"git ignores the benchmarks in {suite}, and a version has what git knows")
    setting = Setting(
        head.root / inside,
        snapshots.root,
        device,
        options.threads,
        paths,
    )
    limits = Limits(options.tolerance, options.memory_tolerance, options.seconds)
    print(f"{head.label} against {base.label}", flush=True)
    pinned = _pinned(setting, suite, options.op or ())
    found = compare(
        base,
        head,
        setting,
        limits,
        options.op or (),
        lambda finding: print(report.line(finding, limits.slow_down), flush=True),
    )
    if not found.stopped:
        found.floors.extend(_floors(head.root, setting, pinned))
    for floor in found.floors:
        print(report.printed(floor), flush=True)
    checks = report.checks(found)
    print(verdict(checks), flush=True)
    _write(options, found)
    if found.stopped:
        print("stopped by a signal; what was compared before counts", file=sys.stderr)
        return STOPPED
    return DONE if all(check.ok for check in checks) else WORSE


def _suite(folder: Path, root: Path) -> Path:
    """A relative folder is looked for here, and then from the repository's root."""
    return (folder if folder.is_dir() else root / folder).resolve()


def _paths(given: Sequence[str], root: Path) -> tuple[str, ...]:
    """Where either version's code is imported from, relative to its root.

    Raises:
        PerfError: one is no folder of the repository.
    """
    from jepa_fast.perf.errors import PerfError
    from jepa_fast.perf.gate.sides import SOURCES

    found = []
    for each in given:
        folder = (root / each).resolve()
        if not folder.is_dir() or not folder.is_relative_to(root):
            raise PerfError(f"--path: expected a folder of {root}, relative to it, got {each}")
        found.append(str(folder.relative_to(root)))
    return tuple(dict.fromkeys([*found, *SOURCES]))


def _pinned(setting: Setting, suite: Path, operators: Sequence[str]) -> dict[str, Any]:
    """The floors that the suite has for this machine, by operator.

    Args:
        setting: how the versions are run.
        suite: the suite's folder as the user knows it.
        operators: which; none: all that have a floor.

    Raises:
        PerfError: the suite's floors are none, or what runs their races is not installed.
    """
    from jepa_fast.perf.floors import FILE, read_floors
    from jepa_fast.perf.machine import describe
    from jepa_fast.perf.suite import check_packages

    if not (setting.suite / FILE).is_file():
        return {}
    floors = read_floors(setting.suite, suite).get(describe(setting.device)["name"], {})
    pinned = {name: each for name, each in floors.items() if not operators or name in operators}
    if pinned:
        check_packages()
    return pinned


def _floors(root: Path, setting: Setting, pinned: dict[str, Any]) -> list[Check]:
    """Whether the working tree, whose snapshot is `root`, reaches what is pinned."""
    from jepa_fast.perf.floors import check_floors
    from jepa_fast.perf.suite import run_suite
    from jepa_fast.perf.summary import Check

    if not pinned:
        return []
    raced = run_suite(
        setting.suite, setting.device, list(pinned), version=root, paths=setting.paths
    )
    return [
        Check(f"{check.name}/floor", check.ok, check.message)
        for check in check_floors({"here": pinned}, "here", raced.records)
    ]


def _write(options: argparse.Namespace, found: Comparison) -> None:
    """The files that are asked for.

    Raises:
        OSError: of the first that cannot be written; the others are.
    """
    from jepa_fast.perf.files import write_json, write_text
    from jepa_fast.perf.gate import report
    from jepa_fast.perf.machine import describe, versions
    from jepa_fast.perf.summary import junit, markdown

    checks = report.checks(found)
    failed: list[OSError] = []

    def attempt(file: Path | None, write: Callable[[Path], None]) -> None:
        if file is None:
            return
        try:
            write(file)
        except OSError as error:
            failed.append(error)

    attempt(options.markdown, lambda to: write_text(to, markdown(report.title(found), checks)))
    attempt(options.junit, lambda to: write_text(to, junit("jepa-fast compare", checks)))
    machine = describe(found.setting.device)
    attempt(options.json, lambda to: write_json(to, report.to_json(found, machine, versions())))
    if failed:
        raise failed[0]
