"""A suite of benchmarks, run in a process of its own.

Of its own, so that what ends a process (a fault on a GPU, a lack of memory) does not take along
what was measured before it, and so that neither the options and plugins of the user's own pytest
nor what this process has imported have a say.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jepa_fast.perf.errors import PackageMissing, PerfError
from jepa_fast.perf.race import suite_files
from jepa_fast.perf.signals import interruptible

_OK, _FAILED, _NO_TESTS = 0, 1, 5
_PATIENCE_SECONDS = 3.0
"""For a process that was told to end: whoever stops this one may not wait for long."""
_OF_ANOTHER_PYTEST = ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")


@dataclass
class Outcome:
    """What came of a suite.

    Args:
        run: what is known of the run: `id`, `date`, `machine`, `versions`, `ceilings`.
        records: one a case.
        known: (operator, case) of the whole suite.
        skipped: cases for which the budget did not suffice: operator, case, why.
        failed: whether a benchmark failed, or the process ended early.
        stopped: by a signal (Ctrl-C, SIGTERM); what was measured before is there.
    """

    run: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    known: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    failed: bool = False
    stopped: bool = False


def run_suite(
    folder: Path,
    device: str,
    operators: Sequence[str] = (),
    *,
    quick: bool = False,
    rounds: int | None = None,
    budget: float | None = None,
    version: Path | None = None,
    paths: Sequence[str] = ("src", "."),
) -> Outcome:
    """Runs the benchmark files of a folder under pytest, whose output is printed as it comes.

    Args:
        folder: with `bench_*.py`.
        device: `"cpu"` or `"cuda"`.
        operators: which; none: all.
        quick: quick cases alone, fewer calls, and what was compiled before is used again, whereas
            a full run starts without it: its first calls are what they are on a new machine.
        rounds: how often all take turns; the protocol's if None.
        budget: seconds for all.
        version: the root of the checkout whose code runs; whatever is imported here if None.
        paths: below `version`, where its code is imported from.

    Raises:
        PackageMissing: pytest or pytest-benchmark is not installed.
        PerfError: the folder has no benchmarks, an operator is not known, or nothing is left to
            run.
    """
    check_packages()
    files = [str(path) for path in suite_files(folder)]
    # Processes that compile may still be writing there.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        log, ini = Path(scratch, "log.jsonl"), Path(scratch, "pytest.ini")
        ini.write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", *files, "-q", "--no-header", "--tb=short"]
        command += ["-c", str(ini), "--rootdir", str(folder), "--confcutdir", str(folder)]
        command += ["-p", "pytest_benchmark.plugin", "-p", "jepa_fast.perf.pytest_plugin"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += ["--benchmark-quiet", "--race-log", str(log), "--race-device", device]
        command += [argument for name in operators for argument in ("--race-op", name)]
        command += ["--race-quick"] if quick else []
        command += [] if rounds is None else ["--race-rounds", str(rounds)]
        command += [] if budget is None else ["--race-budget", str(budget)]
        own = [] if version is None else [version / path for path in paths]
        environment = _environment(None if quick else Path(scratch), own)
        # `python -m` looks in the current folder first.
        process = subprocess.Popen(command, env=environment, cwd=version)
        code = _wait(process)
        outcome = _read(log)
    if code == _NO_TESTS:
        raise PerfError(f"nothing to run in {folder} on {device}" + " with --quick" * quick)
    if code is None:
        print("stopped by a signal; what was measured before counts", file=sys.stderr)
    elif code not in (_OK, _FAILED):
        print(f"the benchmarks' process ended early, with {code}", file=sys.stderr)
    outcome.failed, outcome.stopped = code != _OK, code is None
    return outcome


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status; None where a signal to this process ended both."""

    try:
        with interruptible():
            return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        try:
            process.wait(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None


def check_packages() -> None:
    """Raises PackageMissing, which says what to install, if what runs benchmarks is missing."""
    missing = [name for name in ("pytest", "pytest_benchmark") if not _is_there(name)]
    if missing:
        raise PackageMissing(
            f"benchmarks need {' and '.join(missing).replace('_', '-')}: "
            'pip install "jepa-fast[bench]"'
        )


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _environment(caches: Path | None, first: Sequence[Path] = ()) -> dict[str, str]:
    """This process's, with its imports, and without what would change pytest's behaviour.

    Args:
        caches: where Triton and torch.compile keep what they compile; None: where they always do.
        first: folders that come before this process's imports.
    """
    own = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_PYTEST}
    path = os.pathsep.join([*map(str, first), *filter(None, sys.path)])
    own |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": path}
    if caches is not None:
        own["TRITON_CACHE_DIR"] = str(caches / "triton")
        own["TORCHINDUCTOR_CACHE_DIR"] = str(caches / "inductor")
    return own


def _read(log: Path) -> Outcome:
    outcome = Outcome()
    for line in log.read_text().splitlines() if log.exists() else ():
        ((kind, value),) = json.loads(line).items()
        if kind == "refused":
            raise PerfError(value)
        if kind == "known":
            outcome.known = [(operator, case) for operator, case in value]
        elif kind == "run":
            outcome.run = value
        elif kind == "record":
            outcome.records.append(value)
        elif kind == "skipped":
            outcome.skipped.append(value)
    return outcome
