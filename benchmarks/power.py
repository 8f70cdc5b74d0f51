"""How reliable the gate is: slow-downs of known size, and none, on a machine under load.

`python benchmarks/power.py` clones the commit that is checked out, makes calls of `ema_update_`
slower by a loop in the clone's C++ kernel, and lets `jepa-fast compare` judge, many times, beside a
background load. It writes benchmarks/results/power.json, from which the README has its table. A
trial takes about half a minute. What is found goes to a log as it comes, and the same command goes
on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # started as a script, in a checkout that is not installed
    sys.path.append(str(ROOT))

from jepa_fast.perf.errors import DirtyWorktree, PerfError  # noqa: E402
from jepa_fast.perf.files import write_json  # noqa: E402
from jepa_fast.perf.machine import commit, describe, uncommitted, versions  # noqa: E402

OPERATOR = "ema_update_"
SLOW_DOWNS = (0.03, 0.05, 0.10, 0.20)
TOLERANCE = 0.02
_SOURCE = "csrc/cpu/ema_update.cpp"
_LOAD = (
    "2 processes that by turns work and sleep for 0.3 s on average, exponentially distributed; "
    "half of the work copies 64 MiB, half computes"
)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40, help="for each slow-down")
    parser.add_argument("--unchanged", type=int, default=100, help="trials without a change")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "power", metavar="FOLDER")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "power.json"
    )
    parser.add_argument("--load", type=int, metavar="SEED", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load is not None:
        return _load(options.load)
    if changed := uncommitted(ROOT):
        raise DirtyWorktree(f"uncommitted changes: {', '.join(changed[:5])}: commit them first")
    log = options.scratch / f"{commit(ROOT)}.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    copies = {slow: _copy(options.scratch, slow) for slow in (0.0, *SLOW_DOWNS)}
    for slow, folder in copies.items():  # builds, which do not count
        print(f"building {slow:.0%}", flush=True)
        _trial(folder, options.scratch)
    with _background_load():
        for slow in _left(done, options.trials, options.unchanged):
            trial = {"slowdown": slow, **_trial(copies[slow], options.scratch)}
            done.append(trial)
            with log.open("a") as file:
                file.write(json.dumps(trial) + "\n")
            print(json.dumps(trial), flush=True)
    write_json(options.output, _result(done))


def _left(done: list[dict[str, Any]], trials: int, unchanged: int) -> list[float]:
    """What is still to be tried, in random order: the machine's moods hit all alike."""
    wanted = {0.0: unchanged, **dict.fromkeys(SLOW_DOWNS, trials)}
    left = [
        slow
        for slow, count in wanted.items()
        for _ in range(count - sum(trial["slowdown"] == slow for trial in done))
    ]
    random.Random(len(done)).shuffle(left)
    return left


def _copy(scratch: Path, slow: float) -> Path:
    """A clone of the commit, whose working tree has the slower kernel."""
    folder = scratch / f"slower-{slow:g}"
    if folder.exists():
        shutil.rmtree(folder)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    if slow:
        source = folder / _SOURCE
        source.write_text(slower(source.read_text(), slow))
    return folder


def slower(source: str, share: float) -> str:
    """The kernel's source code, with a loop that makes a call, Python's part included, that slower.

    A call is the time from the end of one to that of the next, and the shortest so far counts: what
    else runs does not make the loop longer. (The clock is one that costs some ns; the thread's own
    takes as long as 1 % of the call.)

    Args:
        source: the C++ code.
        share: 0.05 for calls that take 5 % longer.

    Raises:
        PerfError: the source code is not the one that this knows how to change.
    """
    region = "[&](int64_t begin, int64_t end) {"
    before, found, after = source.partition(region)
    body, closed, rest = after.partition("\n  });\n")
    if not found or not closed or "#include <algorithm>\n" not in before:
        raise PerfError(f"{_SOURCE} has no parallel region of the form expected here")
    before = before.replace("#include <algorithm>\n", "#include <algorithm>\n#include <chrono>\n")
    began = (
        "\n    using Clock = std::chrono::steady_clock;"
        "\n    using Seconds = std::chrono::duration<double>;"
        "\n    thread_local Clock::time_point ended;"
        "\n    thread_local Seconds call{1};"
    )
    spin = (
        "\n    const auto worked = Clock::now();"
        "\n    const bool first = ended == Clock::time_point();"
        "\n    if (!first) call = std::min<Seconds>(call, worked - ended);"
        f"\n    const Seconds more = call < Seconds(1) ? {share} * call : Seconds(0);"
        "\n    do {"
        "\n      ended = Clock::now();"
        "\n    } while (ended - worked < more);"
    )
    return before + region + began + body + spin + closed + rest


def _trial(folder: Path, scratch: Path) -> dict[str, Any]:
    """One verdict on a working tree: whether it is called slower, the estimate, the seconds."""
    found, cache = scratch / "found.json", scratch / "cache"
    command = [sys.executable, "-m", "jepa_fast.cli", "compare", "HEAD", "--op", OPERATOR]
    command += ["--tolerance", str(TOLERANCE), "--cache", str(cache), "--json", str(found)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    if done.returncode not in (0, 1):
        raise PerfError(f"{' '.join(command)} gave {done.returncode}: {done.stderr}")
    (case,) = json.loads(found.read_text())["cases"]
    found.unlink()
    return {
        "detected": done.returncode == 1,
        "estimates": [run["slow_down"] for run in case["runs"]],
        "pairs": [run["pairs"] for run in case["runs"]],
        "seconds": round(seconds, 1),
    }


def _result(trials: list[dict[str, Any]]) -> dict[str, Any]:
    machine = describe("cpu")
    return {
        "machine": machine["name"],
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "load": _LOAD,
        "commit": commit(ROOT),
        "versions": versions(),
        "operator": OPERATOR,
        "tolerance": TOLERANCE,
        "rows": [_row(slow, trials) for slow in (0.0, *SLOW_DOWNS)],
    }


def _row(slow: float, trials: list[dict[str, Any]]) -> dict[str, Any]:
    mine = [trial for trial in trials if trial["slowdown"] == slow]
    return {
        "slowdown": slow,
        "trials": len(mine),
        "detected": sum(trial["detected"] for trial in mine),
        "median_estimate": round(statistics.median(trial["estimates"][0] for trial in mine), 4),
        "median_seconds": statistics.median(trial["seconds"] for trial in mine),
    }


@contextmanager
def _background_load() -> Iterator[None]:
    command = [sys.executable, str(Path(__file__).resolve()), "--load"]
    processes = [subprocess.Popen([*command, str(seed)]) for seed in (1, 2)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _load(seed: int) -> None:
    """Works and sleeps by turns, as long as the process that started it is there."""
    generator = random.Random(seed)
    copied = bytearray(2**26)
    parent = os.getppid()
    while os.getppid() == parent:
        until = time.monotonic() + generator.expovariate(1 / 0.3)
        copies = generator.random() < 0.5
        while time.monotonic() < until:
            bytes(copied) if copies else sum(range(20_000))
        time.sleep(generator.expovariate(1 / 0.3))


if __name__ == "__main__":
    main()
