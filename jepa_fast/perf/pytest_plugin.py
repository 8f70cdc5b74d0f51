"""Benchmarks under pytest: the fixture `race`, which measures by the protocol.

In the conftest.py beside one's pytest.ini or pyproject.toml::

    pytest_plugins = ["jepa_fast.perf.pytest_plugin"]

and `pytest FOLDER` runs the functions named `bench_*` of files named `bench_*.py` that
`jepa_fast.perf.benchmark` made, once for each of their cases. The numbers are in pytest-benchmark's
table, in its JSON (`extra_info`), and in a table of their own. `jepa-fast bench` runs this, too.

No entry point registers it: that would make pytest collect `bench_*.py` in every project on a
machine where jepa_fast is installed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from jepa_fast.perf.errors import NotHere, PerfError
from jepa_fast.perf.machine import DEVICES, choose_device
from jepa_fast.perf.race import Case, Entry, SetUp, check_names, check_unique

if TYPE_CHECKING:
    from jepa_fast.perf.ceilings import Ceilings
    from jepa_fast.perf.protocol import Settings

_ROUNDS = 30
_UNUSED = "Benchmark fixture was not used at all"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("race", "races between kernels (jepa_fast)")
    group.addoption("--race-quick", action="store_true", help="quick cases alone, timed less often")
    group.addoption(
        "--race-device", choices=DEVICES, default="auto", help="auto: a GPU if there is one"
    )
    group.addoption(
        "--race-rounds",
        type=int,
        default=_ROUNDS,
        metavar="N",
        help=f"how often all take turns; fewer than {_ROUNDS} with --race-quick only",
    )
    group.addoption(
        "--race-budget",
        type=float,
        metavar="SECONDS",
        help="for the whole run: cases that no longer fit are skipped",
    )
    group.addoption(
        "--race-op", action="append", default=[], metavar="OPERATOR", help="of these cases alone"
    )
    group.addoption(
        "--race-log", type=Path, metavar="FILE", help="append what is found, a JSON object a line"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    _check_log(config.getoption("race_log", default=None))
    config.pluginmanager.register(Races(config), "jepa_fast races")


def _check_log(log: Path | None) -> None:
    """Raises UsageError if the log cannot be written, before anything is measured."""
    if log is None:
        return
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open("a").close()
    except OSError as error:
        raise pytest.UsageError(f"--race-log: {log} cannot be written: {error}") from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    entry = getattr(metafunc.function, "entry", None)
    if not isinstance(entry, Entry):
        return
    pairs = [(case, device) for case in entry.cases for device in case.devices]
    metafunc.parametrize(
        ("case", "device"), pairs, ids=[f"{device}-{case.name}" for case, device in pairs]
    )


@pytest.fixture
def race(request: pytest.FixtureRequest) -> Callable[[Case, str, SetUp], None]:
    """`race(case, device, set_up)`: measures what `set_up(case, device)` gives, by the protocol.

    Raises:
        PerfError: pytest-benchmark is not installed, or there is not enough memory for ours.
    """
    try:
        benchmark = request.getfixturevalue("benchmark")
    except pytest.FixtureLookupError as error:
        raise PerfError(
            'benchmarks need pytest-benchmark: pip install "jepa-fast[bench]"'
        ) from error
    races = cast(Races, request.config.pluginmanager.get_plugin("jepa_fast races"))

    def measure(case: Case, device: str, set_up: SetUp) -> None:
        races.measure(case, device, set_up, benchmark)

    return measure


class Races:
    """All races of one run of pytest."""

    def __init__(self, config: pytest.Config) -> None:
        self.records: list[dict[str, Any]] = []
        self._config = config
        self._log: Path | None = config.getoption("race_log", default=None)
        budget = config.getoption("race_budget", default=None)
        self._deadline = None if budget is None else time.monotonic() + budget
        self._date = datetime.now(timezone.utc)
        self._id = self._date.strftime("%Y%m%dT%H%M%S.%fZ")
        self._dtypes: set[str] = set()
        self._to_come = 0
        self._broken: list[str] = []
        """Files that cannot be imported, and why."""
        self._ceilings: Ceilings | None = None
        self._ours = 0.0
        """Seconds that calls of ours took: the clock that pytest-benchmark reads."""

    def elapsed(self) -> float:
        """Seconds of ours so far; the others and what is around them do not count."""
        return self._ours

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            *_, why = report.longreprtext.splitlines() or [""]
            self._broken.append(f"{report.nodeid} ({why.removeprefix('E').strip()})")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        races = [item for item in items if _case(item) is not None]
        operators: Sequence[str] = config.getoption("race_op", default=[])
        try:
            self._check_operators(operators, [_case_of(item).operator for item in races])
            check_unique((_case_of(item), _device_of(item)) for item in races)
            if not races:
                return
            device = choose_device(config.getoption("race_device", default="auto"))
            self._settings()
        except PerfError as error:
            self._write({"refused": str(error)})
            # Whoever reads the log says it.
            told = () if self._log is not None else (str(error),)
            raise pytest.UsageError(*told) from error
        self._write({"known": sorted({(c.operator, c.name) for c in map(_case_of, races)})})
        quick = config.getoption("race_quick", default=False)
        dropped = [
            item
            for item in races
            if _device_of(item) != device
            or (quick and not _case_of(item).quick)
            or (operators and _case_of(item).operator not in operators)
        ]
        if dropped:
            left_out = set(dropped)
            items[:] = [item for item in items if item not in left_out]
            config.hook.pytest_deselected(items=dropped)
        for item in items:
            if (case := _case(item)) is not None:
                item.add_marker(pytest.mark.benchmark(timer=self.elapsed, group=case.operator))
                # Of one that is skipped, or wrong, pytest-benchmark warns that it measures nothing.
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{_UNUSED}"))
                self._dtypes.add(case.dtype)
                self._to_come += 1

    def _check_operators(self, operators: Sequence[str], known: Sequence[str]) -> None:
        try:
            check_names("operator", operators, known)
        except PerfError as error:
            if not self._broken:
                raise
            raise PerfError(f"{error}; cannot be imported: {', '.join(self._broken)}") from error

    def measure(self, case: Case, device: str, set_up: SetUp, benchmark: Any) -> None:
        """One race, from setting it up to its record."""
        from jepa_fast.perf.protocol import Contest, OverBudget

        if benchmark.disabled:  # by --benchmark-disable, or by pytest-xdist
            try:
                found = set_up(case, device)
            except NotHere as error:
                pytest.skip(str(error))
            Contest(found, device, self._settings()).check()
            benchmark.pedantic(lambda: None)
            return
        ceilings = self._measured_ceilings(device)
        settings = self._settings()
        self._to_come -= 1
        if "torch._dynamo" in sys.modules:
            # What was compiled for another case would count against torch.compile's limit on
            # compilations of one function, beyond which it runs eagerly, and make sizes dynamic.
            sys.modules["torch"].compiler.reset()
        try:
            if settings.left is not None and settings.left() <= 0:
                raise OverBudget("the budget is used up")
            contest = Contest(set_up(case, device), device, settings)
            contest.prepare()
        except (NotHere, OverBudget) as error:
            why = {"operator": case.operator, "case": case.name, "why": str(error)}
            self._write({"skipped": why})
            pytest.skip(f"over budget: {error}" if isinstance(error, OverBudget) else str(error))

        def one_round() -> None:
            self._ours += contest.round()

        benchmark.pedantic(one_round, rounds=settings.rounds)
        contest.finish()
        record = contest.record(case, self._id, ceilings)
        benchmark.extra_info.update(record)
        self.records.append(record)
        self._write({"record": record})

    def _measured_ceilings(self, device: str) -> Ceilings:
        """Of the machine, measured at the first race."""
        from jepa_fast.perf.ceilings import measure_ceilings
        from jepa_fast.perf.machine import describe, versions

        if self._ceilings is None:
            self._ceilings = measure_ceilings(device, self._dtypes)
            run = {
                "id": self._id,
                "date": self._date.isoformat(timespec="seconds"),
                "machine": describe(device),  # after work, so that the clocks are those of work
                "versions": versions(),
                "ceilings": self._ceilings.to_json(),
            }
            self._write({"run": run})
        return self._ceilings

    def _settings(self) -> Settings:
        """For the next race, by the options and what is left of the budget."""
        from jepa_fast.perf.protocol import Settings

        return Settings(
            rounds=self._config.getoption("race_rounds", default=_ROUNDS),
            quick=self._config.getoption("race_quick", default=False),
            left=None if self._deadline is None else self._seconds_left,
            share=1 / max(1, self._to_come),
        )

    def _seconds_left(self) -> float:
        return cast(float, self._deadline) - time.monotonic()

    def _write(self, found: dict[str, Any]) -> None:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(json.dumps(found) + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The ratios, which pytest-benchmark's own table does not show."""
        if self.records and self._log is None:
            from jepa_fast.perf.results import gaps, numbers, table

            terminalreporter.section("ours against the others, interleaved")
            records = self.records
            for line in (table(records), *gaps(records), *numbers(records)):
                terminalreporter.write_line(line)


def _case(item: pytest.Item) -> Case | None:
    """The case that a benchmark's item runs; None for other items."""
    if not isinstance(getattr(getattr(item, "function", None), "entry", None), Entry):
        return None
    return cast(Any, item).callspec.params["case"]


def _case_of(item: pytest.Item) -> Case:
    return cast(Case, _case(item))


def _device_of(item: pytest.Item) -> str:
    return cast(Any, item).callspec.params["device"]
