"""`jepa-fast bench`: the protocol by a clock that does as told, and the command on small suites.

No test depends on how long anything takes.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jepa_fast.cli import main
from jepa_fast.ops import _build
from jepa_fast.perf import Case, Cost, Race, ceilings, files, machine, memory, suite
from jepa_fast.perf.ceilings import Ceilings
from jepa_fast.perf.commands import bench
from jepa_fast.perf.errors import BaselineMissing, BaselineOfAnother, NotHere, PerfError
from jepa_fast.perf.floors import check_floors, read_floors
from jepa_fast.perf.picture import draw
from jepa_fast.perf.protocol import Contest, OverBudget, Settings, WallClock
from jepa_fast.perf.race import benchmark, load_suite
from jepa_fast.perf.results import add_run, gaps, numbers, read_results, table, write_results

pytest.importorskip("pytest_benchmark", reason='needs pytest-benchmark: "jepa-fast[bench]"')

ROOT = Path(__file__).resolve().parents[1]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

# The protocol


class FakeClock:
    """Calls a provider once for each measurement, writes it down, and says what it is told to.

    Args:
        seconds: of a call, by provider: the same always, or one after the other.
    """

    round_seconds = 10.0
    most_calls = 8

    def __init__(self, seconds: Mapping[str, float | Iterator[float]]) -> None:
        self.log: list[str] = []
        self.calls: dict[str, int] = {}
        self._seconds = seconds

    def provider(self, name: str) -> Callable[[], object]:
        def call() -> object:
            self.log.append(name)
            return None

        call.__name__ = name
        return call

    def seconds(self, provider: Any, calls: int) -> float:
        provider()
        self.calls[provider.__name__] = calls
        seconds = self._seconds[provider.__name__]
        return seconds if isinstance(seconds, float) else next(seconds)

    def wall_seconds(self, provider: Any) -> float:
        self.log.append("first")
        provider()
        return 0.5


def _contest(clock: FakeClock, others: Sequence[str], settings: Settings, **more: Any) -> Contest:
    race = Race(
        clock.provider("ours"),
        {name: more.pop(name, None) or clock.provider(name) for name in others},
        check=more.pop("check", lambda: clock.log.append("check")),
        cost=Cost(read=600, written=400, flops=500),
        variants={name: clock.provider(name) for name in more.pop("variants", ())},
        numbers=more.pop("numbers", {}),
    )
    return Contest(race, "cpu", settings, clock)


def test_first_calls_then_the_check_then_all_in_every_round_in_rotating_order() -> None:
    clock = FakeClock({"ours": 1.0, "a": 2.0, "b": 4.0})
    contest = _contest(clock, ["a", "b"], Settings())
    contest.prepare()
    assert clock.log[:7] == ["first", "ours", "first", "a", "first", "b", "check"]
    clock.log.clear()
    for _ in range(contest.settings.rounds):
        contest.round()
    rounds = [clock.log[i : i + 3] for i in range(0, len(clock.log), 3)]
    assert len(rounds) == 30
    assert rounds[:4] == [["ours", "a", "b"], ["a", "b", "ours"], ["b", "ours", "a"], rounds[0]]
    assert rounds[3:] == rounds[:-3]
    assert clock.calls == {"ours": 8, "a": 5, "b": 3}  # 10 s a round, and at most 8 calls
    assert {name: len(times.rounds) for name, times in contest.times.items()} == {
        "ours": 30,
        "a": 30,
        "b": 30,
    }


def test_what_fails_the_check_is_not_timed() -> None:
    clock = FakeClock({"ours": 1.0, "a": 1.0})

    def check() -> None:
        raise AssertionError("a is wrong")

    contest = _contest(clock, ["a"], Settings(), check=check)
    with pytest.raises(AssertionError, match="a is wrong"):
        contest.measure()
    assert clock.log == ["first", "ours", "first", "a"]
    assert [times.rounds for times in contest.times.values()] == [[], []]


def test_numbers_are_medians_spreads_and_ratios_of_calls_from_the_same_round() -> None:
    warm_up = [9.0] * 3
    ours, a = [1.0, 2.0, 4.0, 8.0, 4.0], [3.0, 2.0, 8.0, 32.0, 2.0]
    clock = FakeClock({"ours": iter(warm_up + ours), "a": iter(warm_up + a)})
    contest = _contest(clock, ["a"], Settings(rounds=5, quick=True))
    contest.measure()
    case = Case("op", "case", {"B": 2}, "float64")
    record = contest.record(case, "run", Ceilings(1000.0, {"float64": 125.0}))
    assert record["providers"]["ours"] == {
        "milliseconds": 4000.0,
        "spread": 0.5,
        "first_call_milliseconds": 500.0,
        "host_microseconds": None,
        "peak_bytes": 0,
        "ratio": None,
    }
    # Of the medians it would be 0.75.
    assert record["providers"]["a"]["ratio"] == 2.0
    assert record["headline"] == {"against": "a", "ratio": 2.0}
    assert (record["rounds"], record["quick"], record["sizes"]) == (5, True, {"B": 2})
    assert (record["share_of_ceiling"], record["bound"]) == (1.0, "compute")
    assert record["gigabytes_per_second"] == 2.5e-7
    assert record["teraflops"] == 1.25e-10
    json.dumps(record, allow_nan=False)


def test_the_headline_is_against_the_best_of_the_others() -> None:
    clock = FakeClock({"ours": 2.0, "slow": 8.0, "fast": 1.0})
    contest = _contest(clock, ["slow", "fast"], Settings())
    contest.measure()
    record = contest.record(Case("op", "case"), "run", Ceilings(1.0))
    assert record["headline"] == {"against": "fast", "ratio": 0.5}
    alone = _contest(FakeClock({"ours": 2.0}), [], Settings())
    alone.measure()
    assert alone.record(Case("op", "case"), "run", Ceilings(1.0))["headline"] is None


def test_variants_of_ours_are_timed_and_no_rivals() -> None:
    clock = FakeClock({"ours": 2.0, "eager": 3.0, "ours_compile": 1.0})
    contest = _contest(clock, ["eager"], Settings(), variants=["ours_compile"])
    contest.measure()
    record = contest.record(Case("op", "case"), "run", Ceilings(1.0))
    assert record["headline"] == {"against": "eager", "ratio": 1.5}
    assert record["variants"] == ["ours_compile"]
    assert record["providers"]["ours_compile"]["ratio"] == 0.5
    heads, row = table([record]).splitlines()
    assert "variants" in heads
    assert "eager 1.50x" in row
    assert "ours_compile 0.50x" in row


def test_numbers_of_providers_are_recorded_and_told() -> None:
    clock = FakeClock({"ours": 2.0, "cut": 1.0})
    found = {"ours": {"tokens": 88.0}, "cut": {"tokens": 62.123456, "flops": 1.5e9}}
    contest = _contest(clock, ["cut"], Settings(), numbers=found)
    contest.measure()
    record = contest.record(Case("op", "case"), "run", Ceilings(1.0))
    assert record["numbers"] == {
        "ours": {"tokens": 88.0},
        "cut": {"tokens": 62.123, "flops": 1.5e9},
    }
    assert numbers([record]) == [
        "op case, ours: tokens 88",
        "op case, cut: tokens 62.1, flops 1500000000",
    ]
    del record["numbers"]  # as in older files
    assert numbers([record]) == []


def test_no_garbage_is_collected_within_a_round() -> None:
    collecting = []

    def watch() -> None:
        collecting.append(gc.isenabled())

    watch.__name__ = "a"
    contest = _contest(FakeClock({"ours": 1.0, "a": 1.0}), ["a"], Settings(), a=watch)
    contest.prepare()
    contest.round()
    assert collecting[-1] is False
    assert gc.isenabled()
    broken = iter([1.0] * 3)  # and then StopIteration
    contest = _contest(FakeClock({"ours": broken}), [], Settings())
    contest.prepare()
    with pytest.raises(StopIteration):
        contest.round()
    assert gc.isenabled()


def test_at_least_30_rounds_except_in_a_quick_run() -> None:
    assert Settings().rounds == 30
    assert Settings(rounds=3, quick=True).rounds == 3
    for rounds, quick in ((29, False), (0, True)):
        with pytest.raises(PerfError, match=f"at least 30 rounds .*, got {rounds}"):
            Settings(rounds=rounds, quick=quick)


def _too_large() -> object:
    return torch.empty(2**50, dtype=torch.int8)


def _hungry() -> object:
    raise MemoryError


def test_one_without_enough_memory_is_noted_and_the_race_goes_on() -> None:
    clock = FakeClock({"ours": 1.0, "a": 2.0})
    contest = _contest(clock, ["a", "big", "hungry"], Settings(), big=_too_large, hungry=_hungry)
    contest.measure()
    record = contest.record(Case("op", "case"), "run", Ceilings(1.0))
    assert set(record["providers"]) == {"ours", "a"}
    assert len(contest.times["a"].rounds) == 30
    assert "can't allocate memory" in record["why_not"]["big"]
    assert record["why_not"]["hungry"] == "out of memory: MemoryError"
    assert clock.log.count("check") == 1


def test_without_enough_memory_for_ours_there_is_no_race() -> None:
    race = Race(_too_large, {}, lambda: None, Cost())
    with pytest.raises(PerfError, match=r"ours does not fit here: out of memory: .*allocate"):
        Contest(race, "cpu", Settings()).measure()


def test_other_errors_of_a_provider_are_not_swallowed() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        _contest(FakeClock({"ours": 1.0}), ["a"], Settings(), a=broken).measure()


def test_nothing_of_the_others_may_be_called_ours() -> None:
    with pytest.raises(PerfError, match="several providers called ours"):
        _contest(FakeClock({}), ["ours"], Settings())


def test_numbers_that_no_results_file_can_hold_are_refused() -> None:
    with pytest.raises(PerfError, match="numbers must be finite, got error nan of cut"):
        _contest(FakeClock({}), ["cut"], Settings(), numbers={"cut": {"error": float("nan")}})


def test_first_calls_stop_where_the_budget_is_used_up() -> None:
    clock = FakeClock({"ours": 1.0, "a": 1.0, "b": 1.0})
    left = iter([5.0, 1.0, -3.0])
    contest = _contest(clock, ["a", "b"], Settings(left=lambda: next(left)))
    with pytest.raises(OverBudget, match="before the first call of b"):
        contest.prepare()
    assert "check" not in clock.log


def test_calls_follow_from_what_is_left_and_rounds_do_not() -> None:
    seconds = {"ours": 1.0, "a": 3.0}
    clock = FakeClock(seconds)
    settings = Settings(left=lambda: 480.0, share=0.5)
    contest = _contest(clock, ["a"], settings)
    contest.measure()  # 240 s, 30 rounds, two providers: 4 s each
    assert clock.calls == {"ours": 4, "a": 2}
    assert len(contest.times["a"].rounds) == 30
    contest = _contest(FakeClock(seconds), ["a"], Settings(left=lambda: 127.0))
    with pytest.raises(OverBudget, match=r"needs 128\.0 s for 30 rounds, 127\.0 s are left"):
        contest.prepare()


def test_the_wall_clock_gives_the_mean_of_calls_in_a_row() -> None:
    called = []
    clock = WallClock(iter([10.0, 16.0, 20.0, 25.0]).__next__)
    assert clock.seconds(lambda: called.append(1), 4) == 1.5
    assert clock.wall_seconds(lambda: called.append(1)) == 5.0
    assert len(called) == 5


def test_peak_memory_is_exact() -> None:
    def call() -> torch.Tensor:
        held = torch.ones(1000)  # 4000 bytes
        torch.ones(500)  # 2000, and gone again
        return held + held  # 4000 more

    call()
    assert memory.peak_allocation(call) == 8000
    race = Race(call, {"eager": lambda: torch.ones(10)}, lambda: None, Cost())
    contest = Contest(race, "cpu", Settings(rounds=1, quick=True))
    contest.measure()
    assert {name: times.peak_bytes for name, times in contest.times.items()} == {
        "ours": 8000,
        "eager": 40,
    }


def test_what_an_earlier_call_left_is_not_subtracted() -> None:
    kept = []

    def call() -> None:
        kept.clear()
        kept.append(torch.ones(1000))

    # The last profile knows the block that is freed in this one.
    assert [memory.peak_allocation(call) for _ in range(3)] == [4000, 4000, 4000]


def test_nothing_is_collected_in_the_middle_of_a_call() -> None:
    enabled = []
    memory.peak_allocation(lambda: enabled.append(gc.isenabled()))
    assert enabled == [False]
    assert gc.isenabled()


def test_a_share_is_of_the_ceiling_that_takes_longer() -> None:
    here = Ceilings(100.0, {"float32": 1000.0})
    assert here.share(Cost(read=50, written=50, flops=500), "float32", 2.0) == (0.5, "memory")
    assert here.share(Cost(read=10, flops=1000), "float32", 4.0) == (0.25, "compute")
    assert here.share(Cost(read=100, flops=1000), "float16", 2.0) == (0.5, "memory")
    assert here.share(Cost(flops=1000), "float16", 2.0) == (None, None)
    assert here.share(Cost(), "float32", 2.0) == (None, None)


def test_ceilings_are_measured_for_what_can_be_multiplied(monkeypatch: Patch) -> None:
    monkeypatch.setitem(ceilings._COPIED_BYTES, "cpu", 2**12)
    monkeypatch.setitem(ceilings._GEMM_SIZE, "cpu", 8)
    monkeypatch.setattr(ceilings, "_ENOUGH_SECONDS", 0.0)
    found = ceilings.measure_ceilings("cpu", ["float32", "int64", "float32", "no such dtype"])
    assert found.bytes_per_second > 0
    assert list(found.flops_per_second) == ["float32"]
    assert set(found.to_json()) == {"gigabytes_per_second", "teraflops"}


# On a GPU


@pytest.mark.tier3
def test_a_gpu_measures_events_host_memory_and_a_graph() -> None:
    x = torch.ones(1024, device="cuda")
    sources = {
        "huge": lambda: torch.empty(2**46, dtype=torch.int8, device="cuda"),
        "eager": lambda: (x.cpu() * 2).cuda(),
    }
    race = Race(lambda: x * 2, sources, lambda: None, Cost(x.nbytes, x.nbytes, 1024))
    contest = Contest(race, "cuda", Settings(rounds=2, quick=True))
    contest.measure()
    record = contest.record(Case("op", "case"), "run", Ceilings(1e12, {"float32": 1e13}))
    ours = record["providers"]["ours"]
    assert ours["peak_bytes"] == 4096
    assert ours["milliseconds"] > 0
    assert ours["host_microseconds"] > 0
    assert ours["first_call_milliseconds"] > 0
    assert record["graph_milliseconds"] > 0
    assert "out of memory" in record["why_not"]["huge"]
    assert set(record["providers"]) == {"ours", "eager"}


@pytest.mark.tier3
def test_a_gpu_call_that_waits_has_no_graph_and_the_next_race_has_one() -> None:
    x = torch.ones(4, device="cuda")
    for call, captured in ((lambda: x.sum().item(), False), (lambda: x + 1, True)):
        contest = Contest(Race(call, {}, lambda: None, Cost()), "cuda", Settings(1, quick=True))
        contest.prepare()
        contest.round()
        contest._replay()
        assert (contest.graph_seconds is not None) is captured
        assert ("ours as a CUDA graph" in contest.why_not) is not captured
    torch.cuda.empty_cache()  # which fails within a capture


@pytest.mark.tier3
def test_a_gpu_is_described_and_has_ceilings() -> None:
    described = machine.describe("cuda")
    assert described["name"] == machine.slug(torch.cuda.get_device_name())
    found = ceilings.measure_ceilings("cuda", ["bfloat16"])
    assert found.bytes_per_second > 1e9
    assert found.flops_per_second["bfloat16"] > 1e9


# Results files


def _record(operator: str = "op", case: str = "case", run: str = "new", **more: Any) -> Any:
    """As of a GPU, where every field is there."""
    milliseconds = more.pop("milliseconds", 0.02)
    ratio = more.pop("ratio", 2.0)

    def times(each: float, ratio: float | None) -> dict[str, Any]:
        return {
            "milliseconds": each,
            "spread": 0.01,
            "first_call_milliseconds": 30.0,
            "host_microseconds": 25.0,
            "peak_bytes": 4096,
            "ratio": ratio,
        }

    return {
        "operator": operator,
        "case": case,
        "device": "cuda",
        "dtype": "float32",
        "sizes": {"B": 2},
        "run": run,
        "backend": "triton",
        "rounds": 30,
        "quick": False,
        "cost": {"read": 6000000, "written": 4000000, "flops": 5000000},
        "providers": {
            "ours": times(milliseconds, None),
            "eager": times(milliseconds * ratio, ratio),
            "compile": times(milliseconds * ratio * 2, 2 * ratio),
        },
        "variants": [],
        "why_not": {},
        "headline": {"against": "eager", "ratio": ratio},
        "gigabytes_per_second": 10 / milliseconds,
        "teraflops": 0.005 / milliseconds,
        "share_of_ceiling": 0.8,
        "bound": "memory",
        "graph_milliseconds": 0.01,
        **more,
    }


MACHINE = {"name": "nvidia-h200", "cpu": "a CPU", "cores": 16, "threads": 8, "gpu": "NVIDIA H200"}
RUN = {
    "id": "new",
    "date": "2026-01-01T00:00:00+00:00",
    "versions": {"torch": "2.14.0"},
    "ceilings": {
        "gigabytes_per_second": 4000.0,
        "teraflops": {"bfloat16": 790.0, "float32": 50.0},
    },
}


def _results(*records: Any, name: str = "nvidia-h200", run: str = "old") -> dict[str, Any]:
    return {
        "schema": 1,
        "machine": {**MACHINE, "name": name},
        "runs": [{**RUN, "id": run}],
        "records": list(records),
    }


def test_a_run_replaces_its_own_records_alone() -> None:
    before = _results(_record("a", "1", "old"), _record("a", "2", "old"), _record("b", "1", "old"))
    kept = json.loads(json.dumps(before))
    new = _record("a", "2", "new", milliseconds=1.0)
    after = add_run(before, MACHINE, RUN, [new], [("a", "1"), ("a", "2"), ("b", "1")])
    assert before == kept
    assert [(r["operator"], r["case"], r["run"]) for r in after["records"]] == [
        ("a", "1", "old"),
        ("a", "2", "new"),
        ("b", "1", "old"),
    ]
    assert after["records"][1] == new
    assert [run["id"] for run in after["runs"]] == ["old", "new"]
    # Another run that replaces all of the old ones leaves nothing of that run.
    records = [_record("a", "1", "newest"), _record("b", "1", "newest")]
    last = add_run(after, MACHINE, {**RUN, "id": "newest"}, records)
    assert [run["id"] for run in last["runs"]] == ["new", "newest"]


def test_cases_that_the_suite_has_no_more_are_dropped_and_other_operators_are_not() -> None:
    before = _results(_record("a", "gone", "old"), _record("other", "1", "old"))
    after = add_run(before, MACHINE, RUN, [_record("a", "1")], [("a", "1")])
    assert [(r["operator"], r["case"]) for r in after["records"]] == [("a", "1"), ("other", "1")]


def test_records_of_two_devices_are_two() -> None:
    before = _results(_record("a", "1", "old", device="cpu"))
    assert len(add_run(before, MACHINE, RUN, [_record("a", "1")], [("a", "1")])["records"]) == 2


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        ("{", PerfError, "is no results file"),
        ("[]", PerfError, "is no results file"),
        ('{"schema": 1}', PerfError, "is no results file"),
        (json.dumps({**_results(), "runs": None}), PerfError, "is no results file"),
        (json.dumps({**_results(), "records": [{}]}), PerfError, "is no results file"),
        (json.dumps({**_results(), "schema": 7}), BaselineOfAnother, "schema 7, this version wri"),
        (json.dumps(_results(name="other")), BaselineOfAnother, "of other, this machine is nvidia"),
    ],
)
def test_files_that_are_not_ours_are_refused(
    tmp_path: Path, content: str, error: type[PerfError], told: str
) -> None:
    path = tmp_path / "nvidia-h200.json"
    path.write_text(content)
    with pytest.raises(error, match=told) as raised:
        read_results(path, MACHINE)
    assert type(raised.value) is error
    assert "--output" in str(raised.value)


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/nvidia-h200.json"
    results = _results(_record(run="old"))
    write_results(path, results)
    assert read_results(path, MACHINE) == results
    assert os.listdir(path.parent) == [path.name]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    path = tmp_path / "nvidia-h200.json"
    write_results(path, _results())
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_results(path, _results(_record()))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(path, _results(_record(milliseconds=float("nan"))))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_the_table_has_everything_that_was_measured_and_no_empty_columns() -> None:
    (heads, row) = table([_record("my_op", "b2")]).splitlines()
    names = re.split(r"  +", heads)
    cells = dict(zip(names, re.split(r"  +", row), strict=True))
    assert cells == {
        "operator": "my_op",
        "case": "b2",
        "ours ms": "0.02",
        "+-": "1 %",
        "over the best": "2.00x eager",
        "others": "eager 2.00x, compile 4.00x",
        "GB/s": "500",
        "TFLOP/s": "0.25",
        "of the ceiling": "80 % memory",
        "peak MB": "0.0041",
        "first call ms": "30",
        "host us": "25",
        "as a graph ms": "0.01",
    }
    bare = _record(headline=None, teraflops=None, graph_milliseconds=None, share_of_ceiling=None)
    heads, _ = table([bare]).splitlines()
    assert not {"TFLOP/s", "as a graph ms", "over the best", "of the ceiling"} & set(
        re.split(r"  +", heads)
    )


def test_what_is_missing_is_told_once_for_all_cases() -> None:
    why = {"compile": "no g++"}
    records = [_record("a", "1", why_not=why), _record("a", "2", why_not=why), _record("b")]
    assert gaps(records) == ["a 1, 2: no compile: no g++"]


# The picture


@pytest.fixture
def figures(monkeypatch: Patch) -> list[Any]:
    """Every figure that is saved."""
    figure = pytest.importorskip("matplotlib.figure", reason='needs "jepa-fast[bench]"')
    saved: list[Any] = []
    save = figure.Figure.savefig

    def saving(self: Any, *args: Any, **more: Any) -> None:
        saved.append(self)
        save(self, *args, **more)

    monkeypatch.setattr(figure.Figure, "savefig", saving)
    return saved


def test_the_picture_has_both_panels_and_is_small(tmp_path: Path, figures: list[Any]) -> None:
    records = [
        _record(
            f"operator_{i:02}",
            f"case {j}",
            "old",
            milliseconds=0.01 * (i + 1) * 4**j,
            cost={"read": 10**5 * 4**j, "written": 10**5 * 4**j, "flops": (i % 3) * 10**6 * 9**j},
        )
        for i in range(14)
        for j in range(4)
    ]
    picture = tmp_path / "nvidia-h200.png"
    draw(_results(*records), picture)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert 10_000 < len(content) < 200_000
    (figure,) = figures
    times, roofline = figure.axes
    assert len(times.lines) == 2 * 14  # ours and the best of the others
    assert sum(len(points.get_offsets()) for points in roofline.collections) == len(records)
    assert len(roofline.lines) == 3  # the memory's ceiling, and one a dtype
    assert {"bfloat16", "float32"} <= {text.get_text() for text in roofline.texts}
    draw(_results(*records), picture)
    assert picture.read_bytes() == content


def test_the_points_of_the_roofline_are_where_they_have_to_be(
    tmp_path: Path, figures: list[Any]
) -> None:
    records = [
        _record("a", milliseconds=0.02),  # 500 GB/s, half an operation a byte
        _record("copy", cost={"read": 10**7, "written": 0, "flops": 0}, teraflops=None),
    ]
    draw(_results(*records), tmp_path / "a.png")
    points = [tuple(map(float, c.get_offsets()[0])) for c in figures[0].axes[1].collections]
    assert points[0] == pytest.approx((0.5, 0.25))
    edge = points[1][0]
    assert edge < 0.5
    assert points[1] == pytest.approx((edge, edge * 0.5))


def test_a_picture_of_little_is_drawn(tmp_path: Path, figures: list[Any]) -> None:
    bare = _record(cost=dict.fromkeys(("read", "written", "flops"), 0), headline=None)
    bare |= {"gigabytes_per_second": None, "teraflops": None}
    draw(_results(bare), tmp_path / "a.png")
    empty = {**_results(), "runs": []}
    draw(empty, tmp_path / "b.png")
    assert len(figures) == 2


def test_no_picture_without_matplotlib(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PerfError, match=r'pip install "jepa-fast\[bench\]"'):
        draw(_results(), tmp_path / "a.png")


# Floors


def _floors(folder: Path, mean: float = 1.5, cases: int = 2) -> Path:
    pinned = {"geometric_mean": mean, "cases": cases}
    (folder / "floors.json").write_text(json.dumps({"nvidia-h200": {"op": pinned}}))
    return folder


@pytest.mark.parametrize(
    ("ratios", "ok", "told"),
    [
        ((1.0, 4.0), True, "2.000x of the best alternatives over 2 cases, the floor is 1.5x"),
        ((0.5, 4.0), False, "1.414x of the best alternatives over 2 cases, the floor is 1.5x"),
        ((4.0,), False, "1 cases measured, the floor is one over 2"),
        ((4.0, 4.0, 4.0), False, "3 cases measured, the floor is one over 2"),
    ],
)
def test_floors(tmp_path: Path, ratios: Sequence[float], ok: bool, told: str) -> None:
    floors = read_floors(_floors(tmp_path))
    records = [_record("op", str(i), ratio=ratio) for i, ratio in enumerate(ratios)]
    (check,) = check_floors(floors, "nvidia-h200", [*records, _record("other", ratio=0.1)])
    assert (check.name, check.ok, check.message) == ("op", ok, told)
    assert check_floors(floors, "nvidia-h200", records, ["other"]) == []
    assert check_floors(floors, "another", records) == []


_NUMBERS = "expected a positive 'geometric_mean' and 'cases', got"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "Expecting property name"),
        ("[]", "the file: expected an object of machines, got []"),
        ('{"gpu": 1}', '"gpu": expected an object of operators, got 1'),
        (
            '{"gpu": {"op": 99}}',
            "\"gpu\", \"op\": expected an object of 'geometric_mean' and 'cases', got 99",
        ),
        (
            '{"gpu": {"op": {"geometric_mean": 1}}}',
            f'"gpu", "op": {_NUMBERS} {{"geometric_mean": 1}}',
        ),
        ('{"gpu": {"op": {"geometric_mean": 1, "cases": 0}}}', _NUMBERS),
        ('{"gpu": {"op": {"geometric_mean": NaN, "cases": 2}}}', _NUMBERS),
        ('{"gpu": {"op": {"geometric_mean": "1", "cases": 2}}}', _NUMBERS),
        ('{"gpu": {"op": {"geometric_mean": 1, "cases": true}}}', _NUMBERS),
    ],
)
def test_floors_of_another_form_are_refused(tmp_path: Path, content: str, told: str) -> None:
    """And named by the user's own file where a copy of it is read."""
    (tmp_path / "floors.json").write_text(content)
    form = '; floors have the form {"<machine>": {"<operator>": {"geometric_mean": 1.2, "cases"'
    with pytest.raises(PerfError, match=re.escape(told)) as refused:
        read_floors(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/floors.json: ")
    assert form in str(refused.value)
    with pytest.raises(PerfError, match=r"^/mine/floors\.json: "):
        read_floors(tmp_path, Path("/mine"))


def test_no_floors() -> None:
    with pytest.raises(BaselineMissing, match=r"has no floors\.json"):
        read_floors(ROOT / "tests")


def test_the_floors_pin_every_gpu_case_of_an_operator() -> None:
    """A case that vanishes from the suite would change what the mean is one of."""
    cases = [case for entry in load_suite(ROOT / "benchmarks") for case in entry.cases]
    floors = read_floors(ROOT / "benchmarks")
    assert set(floors) == {"nvidia-h100-80gb-hbm3", "nvidia-h200"}
    for operators in floors.values():
        assert operators
        for operator, floor in operators.items():
            mine = [c for c in cases if c.operator == operator and "cuda" in c.devices]
            assert len(mine) == floor["cases"]


# The plugin, in this process

SUITE = """
from __future__ import annotations

import torch

from jepa_fast.perf import Case, Cost, Race, benchmark


def _race(case: Case, device: str) -> Race:
    x = torch.ones(case["n"], device=device)

    def check() -> None:
        torch.testing.assert_close(x + x, FACTOR * x)

    return Race(
        ours=lambda: x + x,
        others={"eager": lambda: x.add(x), "huge": huge},
        check=check,
        cost=Cost(x.nbytes, x.nbytes, case["n"]),
        backend="torch",
    )


def huge() -> object:
    return torch.empty(2**50, dtype=torch.int8)


@benchmark([CASES])
def bench_op(case: Case, device: str) -> Race:
    return _race(case, device)
"""
CASES = (
    'Case("add", "small", {"n": 64}, quick=True), Case("add", "large", {"n": 1000}), '
    'Case("add", "on a gpu", {"n": 64}, devices=("cuda",))'
)


def _suite(folder: Path, **names: tuple[str, int]) -> Path:
    """A folder of benchmarks: by the name of its file, cases, and 2 where they are right."""
    folder.mkdir(exist_ok=True)
    for name, (cases, factor) in names.items():
        text = SUITE.replace("CASES", cases).replace("FACTOR", str(factor))
        (folder / f"bench_{name}.py").write_text(text)
    return folder


@pytest.fixture
def fast(monkeypatch: Patch) -> None:
    """Ceilings that take no time, and no other plugins, in pytests within this process."""
    found = Ceilings(1e10, {"float32": 1e11})
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device, dtypes: found)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def _pytest(folder: Path, *options: str, benchmark: bool = True) -> tuple[int, list[Any]]:
    """Runs a suite; gives the exit code and what is in the log, in order."""
    ini, log = folder / "pytest.ini", folder / "log.jsonl"
    ini.write_text("[pytest]\n")
    log.unlink(missing_ok=True)
    plugins = ["no:cacheprovider", "no:faulthandler", "jepa_fast.perf.pytest_plugin"]
    plugins += ["pytest_benchmark.plugin"] * benchmark
    code = _in_here(
        [
            *(f"-p{plugin}" for plugin in plugins),
            *("-q", "-c", str(ini), "--rootdir", str(folder), "--confcutdir", str(folder)),
            *("--race-log", str(log), *options, str(folder)),
        ]
    )
    lines = log.read_text().splitlines() if log.exists() else []
    return code, [json.loads(line) for line in lines]


def _in_here(arguments: list[str]) -> int:
    """pytest in this process, which forgets the suite's files afterwards."""
    path, modules, writes = list(sys.path), set(sys.modules), sys.dont_write_bytecode
    worker = os.environ.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark measures nothing there
    sys.dont_write_bytecode = True  # a file may be replaced within the resolution of its time
    try:
        return int(pytest.main(arguments))
    finally:
        sys.path[:], sys.dont_write_bytecode = path, writes
        if worker is not None:
            os.environ["PYTEST_XDIST_WORKER"] = worker
        for name in set(sys.modules) - modules:
            if name.startswith("bench_"):
                del sys.modules[name]


def _kinds(log: Sequence[Mapping[str, Any]]) -> list[str]:
    return [kind for line in log for kind in line]


@pytest.mark.usefixtures("fast")
def test_a_log_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: Capture) -> None:
    folder = _suite(tmp_path / "s", one=(CASES, 2))
    code, _ = _pytest(folder, f"--race-log={folder}/pytest.ini/log")
    assert code == pytest.ExitCode.USAGE_ERROR
    captured = capsys.readouterr()
    assert "--race-log: " in captured.err
    assert "pytest.ini/log cannot be written: " in captured.err
    assert "INTERNALERROR" not in captured.out + captured.err
    code, _ = _pytest(folder, f"--race-log={tmp_path}/new/folder/log", "--collect-only")
    assert (code, (tmp_path / "new/folder/log").exists()) == (0, True)


@pytest.mark.usefixtures("fast")
def test_the_plugin_races_every_case_of_the_device(tmp_path: Path) -> None:
    stored = tmp_path / "stored.json"
    folder = _suite(tmp_path / "s", one=(CASES, 2))
    code, log = _pytest(folder, "--race-device=cpu", f"--benchmark-json={stored}")
    assert code == 0
    assert _kinds(log) == ["known", "run", "record", "record"]
    known, run = log[0]["known"], log[1]["run"]
    assert known == [["add", "large"], ["add", "on a gpu"], ["add", "small"]]
    assert set(run) == {"id", "date", "machine", "versions", "ceilings"}
    records = [line["record"] for line in log[2:]]
    assert [record["case"] for record in records] == ["small", "large"]
    for record in records:
        assert (record["rounds"], record["run"], record["device"]) == (30, run["id"], "cpu")
        assert list(record["why_not"]) == ["huge"]
    # pytest-benchmark has the times of ours, of as many rounds.
    for each, record in zip(json.loads(stored.read_text())["benchmarks"], records, strict=True):
        assert each["stats"]["rounds"] == 30
        median = record["providers"]["ours"]["milliseconds"]
        assert 1e3 * each["stats"]["median"] == pytest.approx(median, rel=1e-3)
        assert each["extra_info"] == record


@pytest.mark.usefixtures("fast")
def test_the_plugin_refuses_what_is_not_there(tmp_path: Path, capfd: Capture) -> None:
    folder = _suite(tmp_path / "s", one=(CASES, 2))
    unknown = "unknown operator: mul; there are: add"
    for options, told in (
        (["--race-op", "mul"], unknown),
        (["--race-rounds", "29"], "expected at least 30 rounds"),
        *([(["--race-device", "cuda"], "no CUDA GPU")] * (not torch.cuda.is_available())),
    ):
        code, log = _pytest(folder, *options)
        assert code == pytest.ExitCode.USAGE_ERROR
        assert _kinds(log) == ["refused"]
        assert told in log[0]["refused"]
        assert told not in capfd.readouterr().err  # it is for the log's reader to say
    (folder / "bench_broken.py").write_text("import no_such_module\n")
    _, log = _pytest(folder, "--race-op", "mul")
    assert log[0]["refused"].startswith(f"{unknown}; cannot be imported: bench_broken.py (Module")
    _suite(folder, broken=('Case("add", "small")', 2))
    _, log = _pytest(folder)
    assert log == [{"refused": "cases that are there twice: add/small"}]


@pytest.mark.usefixtures("fast")
def test_the_plugin_leaves_out_what_is_not_asked_for(tmp_path: Path) -> None:
    folder = _suite(tmp_path / "s", one=(CASES, 2), two=('Case("sub", "x", {"n": 8})', 2))
    _, log = _pytest(folder, "--race-quick", "--race-rounds=2", "--race-device=cpu")
    assert [line["record"]["case"] for line in log[2:]] == ["small"]
    assert (log[2]["record"]["quick"], log[2]["record"]["rounds"]) == (True, 2)
    _, log = _pytest(folder, "--race-op=sub", "--race-device=cpu")
    assert [line["record"]["operator"] for line in log[2:]] == ["sub"]
    assert ["add", "small"] in log[0]["known"]


@pytest.mark.usefixtures("fast")
def test_the_plugin_skips_what_the_budget_does_not_suffice_for(
    tmp_path: Path, capfd: Capture
) -> None:
    folder = _suite(tmp_path / "s", one=(CASES, 2))
    code, log = _pytest(folder, "--race-budget=0", "--race-device=cpu", "-rs")
    assert code == 0
    assert _kinds(log) == ["known", "run", "skipped", "skipped"]
    why = {"operator": "add", "case": "small", "why": "the budget is used up"}
    assert log[2]["skipped"] == why
    assert "over budget: the budget is used up" in capfd.readouterr().out


@pytest.mark.parametrize("options", [(), ("--benchmark-disable",)], ids=["timed", "checked"])
@pytest.mark.usefixtures("fast")
def test_cases_that_lack_something_here_are_skipped(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    """And are known all the same: what was measured of them elsewhere stays."""
    folder = _suite(tmp_path / "suite", one=(CASES, 2))
    text = (folder / "bench_one.py").read_text()
    raises = 'raise NotHere("it needs a library")'
    text = text.replace("return _race(case, device)", raises).replace("Cost,", "Cost, NotHere,")
    (folder / "bench_one.py").write_text(text)
    code, log = _pytest(folder, "--race-device=cpu", *options)
    assert code == pytest.ExitCode.OK
    assert ["add", "small"] in log[0]["known"]
    assert "record" not in _kinds(log)
    if not options:
        skipped = [line["skipped"] for line in log if "skipped" in line]
        assert [(each["case"], each["why"]) for each in skipped] == [
            ("small", "it needs a library"),
            ("large", "it needs a library"),
        ]


@pytest.mark.parametrize("options", [(), ("--benchmark-disable",)], ids=["timed", "checked"])
@pytest.mark.usefixtures("fast")
def test_what_is_not_timed_is_no_reason_for_a_warning(
    tmp_path: Path, capfd: Capture, options: tuple[str, ...]
) -> None:
    folder = _suite(tmp_path / "s", one=('Case("wrong", "x", {"n": 8})', 3))
    (folder / "bench_other.py").write_text("def bench_other(benchmark): pass\n")
    code, _ = _pytest(folder, "--race-device=cpu", "--race-budget=600", *options)
    assert code == 1
    # Of other tests the warning is as it was.
    assert capfd.readouterr().out.count("Benchmark fixture was not used at all") == 1


@pytest.mark.usefixtures("fast")
def test_without_timing_the_checks_still_run(tmp_path: Path) -> None:
    folder = _suite(tmp_path / "s", one=(CASES, 2), two=('Case("sub", "x", {"n": 8})', 3))
    code, log = _pytest(folder, "--benchmark-disable", "--race-device=cpu")
    assert (code, _kinds(log)) == (1, ["known"])


@pytest.mark.usefixtures("fast")
def test_the_plugin_without_pytest_benchmark_says_what_to_install(
    tmp_path: Path, capfd: Capture
) -> None:
    folder = _suite(tmp_path / "s", one=(CASES, 2))
    code, log = _pytest(folder, "--race-device=cpu", benchmark=False)
    assert (code, _kinds(log)) == (1, ["known"])
    told = 'benchmarks need pytest-benchmark: pip install "jepa-fast[bench]"'
    assert told in capfd.readouterr().out


def test_the_plugin_leaves_other_tests_alone(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n")
    program = (
        "import sys, pytest; sys.modules['torch'] = None; "
        "sys.exit(pytest.main(['-q', '-p', 'jepa_fast.perf.pytest_plugin']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


# The command, in this process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _suite(tmp_path / "suite", one=(CASES, 2))


@pytest.fixture
def outcome(monkeypatch: Patch) -> suite.Outcome:
    """What measuring gives, without measuring, on what looks like a GPU."""
    found = suite.Outcome(
        run={**RUN, "machine": {**MACHINE, "clocks": {"clocks_sm_mhz": 1980.0}}},
        records=[_record("op", "1"), _record("op", "2")],
        known=[("op", "1"), ("op", "2")],
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clocks = {"clocks": {}}
    monkeypatch.setattr(machine, "describe", lambda device: {**MACHINE, **clocks})
    monkeypatch.setattr(suite, "run_suite", lambda *_, **__: found)
    # Drawing takes a second.
    stub = lambda results, path: files.write_text(path, "a picture")  # noqa: E731
    monkeypatch.setattr("jepa_fast.perf.picture.draw", stub)
    return found


@pytest.fixture
def nothing_runs(monkeypatch: Patch) -> None:
    def ran(*_: object, **__: object) -> None:
        raise AssertionError("it measures")

    monkeypatch.setattr(suite, "run_suite", ran)


def _bench(folder: Path, *options: str) -> int:
    return main(["bench", "--suite", str(folder), *options])


def _listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_run_is_written_with_what_produced_it(
    folder: Path, outcome: suite.Outcome, capsys: Capture
) -> None:
    outcome.skipped.append({"operator": "op", "case": "3", "why": "needs too much"})
    assert _bench(folder, "--commit", "abc", "--budget", "100") == 0
    assert _listed(folder / "results") == ["nvidia-h200.json", "nvidia-h200.png"]
    results = json.loads((folder / "results/nvidia-h200.json").read_text())
    assert results["machine"] == {n: v for n, v in MACHINE.items() if n != "threads"}
    (run,) = results["runs"]
    assert run == {
        **RUN,
        "commit": "abc",
        "dirty": None,
        "clocks": {"clocks_sm_mhz": 1980.0},
        "threads": 8,
        "options": {"op": None, "quick": False, "rounds": None, "budget": 100.0, "device": "cpu"},
        "skipped": outcome.skipped,
    }
    assert results["records"] == outcome.records
    printed = capsys.readouterr().out
    assert "skipped op 3: needs too much" in printed
    assert table(outcome.records) in printed


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (json.dumps(_results(name="another")), 4),
        (json.dumps({**_results(), "schema": 99}), 4),
        ("{", 2),
    ],
)
@pytest.mark.usefixtures("outcome", "nothing_runs")
def test_results_that_are_not_ours_are_left_alone(
    folder: Path, content: str, code: int, capsys: Capture
) -> None:
    path = folder / "results/nvidia-h200.json"
    path.parent.mkdir()
    path.write_text(content)
    assert _bench(folder) == code
    assert "--output" in capsys.readouterr().err
    assert path.read_text() == content
    assert _listed(path.parent) == [path.name]


@pytest.mark.usefixtures("outcome")
def test_where_nothing_can_be_written_nothing_is_measured(
    folder: Path, nothing_runs: None, capsys: Capture
) -> None:
    assert _bench(folder, "--output", str(folder / "bench_one.py/results")) == 7
    assert "bench_one.py is not a folder" in capsys.readouterr().err


def test_a_disk_that_is_full_leaves_earlier_results(
    folder: Path, outcome: suite.Outcome, monkeypatch: Patch, capsys: Capture
) -> None:
    assert _bench(folder) == 0
    before = {path: path.read_bytes() for path in (folder / "results").iterdir()}
    outcome.records[:] = [_record("op", "1", milliseconds=5.0)]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    assert _bench(folder) == 7
    assert "No space left on device" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (folder / "results").iterdir()} == before


def test_without_matplotlib_results_are_written_all_the_same(
    folder: Path, outcome: suite.Outcome, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr("jepa_fast.perf.picture.draw", draw)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert _bench(folder) == 0
    assert _listed(folder / "results") == ["nvidia-h200.json"]
    assert "no picture without matplotlib" in capsys.readouterr().err


def test_what_failed_fails_the_command_and_the_rest_is_written(
    folder: Path, outcome: suite.Outcome, capsys: Capture
) -> None:
    outcome.failed = True
    assert _bench(folder) == 1
    assert len(json.loads((folder / "results/nvidia-h200.json").read_text())["records"]) == 2
    shutil.rmtree(folder / "results")
    outcome.failed, outcome.records[:] = False, []
    capsys.readouterr()
    assert _bench(folder) == 1
    assert "nothing was measured, and nothing written" in capsys.readouterr().out
    assert _listed(folder / "results") == []


def test_floors_decide_the_exit_code(
    folder: Path, outcome: suite.Outcome, monkeypatch: Patch, capsys: Capture
) -> None:
    assert _bench(folder, "--check-floors") == 3
    assert "has no floors.json" in capsys.readouterr().err
    assert _bench(_floors(folder), "--check-floors") == 0
    assert "ok op: 2.000x" in capsys.readouterr().out
    assert _bench(_floors(folder, mean=2.5), "--check-floors") == 1
    assert "BELOW THE FLOOR op: 2.000x" in capsys.readouterr().out
    assert _bench(_floors(folder, cases=3), "--check-floors") == 1
    assert "BELOW THE FLOOR op: 2 cases measured" in capsys.readouterr().out
    assert _bench(folder) == 0
    other = {**MACHINE, "name": "a-cpu", "clocks": {}}
    monkeypatch.setattr(machine, "describe", lambda device: other)
    outcome.run["machine"] = other
    assert _bench(folder, "--check-floors") == 0
    assert "no floors for a-cpu; there are some for: nvidia-h200" in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_runs")
def test_missing_packages_are_named(folder: Path, monkeypatch: Patch, capsys: Capture) -> None:
    there = suite._is_there
    monkeypatch.setattr(suite, "_is_there", lambda name: name == "pytest" and there(name))
    assert _bench(folder) == 7
    told = capsys.readouterr().err
    assert 'benchmarks need pytest-benchmark: pip install "jepa-fast[bench]"' in told


def test_an_audit_without_triton_ends_as_all_that_lacks_a_package(
    monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["audit"]) == 7
    assert "the audit needs Triton: pip install triton" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
@pytest.mark.usefixtures("nothing_runs")
def test_a_gpu_that_is_not_there_is_refused(folder: Path, capsys: Capture) -> None:
    assert _bench(folder, "--device", "cuda") == 2
    assert "no CUDA GPU is visible to torch" in capsys.readouterr().err
    assert not (folder / "results").exists()


def test_a_version_s_own_code_runs(tmp_path: Path, monkeypatch: Patch) -> None:
    """Wherever it has it, and before what is imported here or lies in the current folder."""
    version = tmp_path / "version"
    (version / "src").mkdir(parents=True)
    folder = _suite(version / "benchmarks", one=(CASES, 2))
    text = (folder / "bench_one.py").read_text()
    text = text.replace("import torch\n", "import library\nimport torch\n")
    (folder / "bench_one.py").write_text(text.replace('"torch"', "library.NAME"))
    (version / "src/library.py").write_text('NAME = "its own"')
    (tmp_path / "library.py").write_text('NAME = "of the current folder"')
    monkeypatch.chdir(tmp_path)
    outcome = suite.run_suite(folder, "cpu", quick=True, version=version)
    assert [record["backend"] for record in outcome.records] == ["its own"]


@pytest.mark.usefixtures("fast")
def test_unknown_operators_and_folders_without_benchmarks_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    def here(command: list[str], **_: object) -> SimpleNamespace:
        code = _in_here([*command[3:], "-pno:faulthandler"])
        return SimpleNamespace(wait=lambda: code)

    monkeypatch.setattr(suite, "subprocess", SimpleNamespace(Popen=here))
    assert _bench(folder, "--op", "add", "mul", "--device", "cpu", "--commit", "x") == 2
    error = capfd.readouterr().err
    assert "jepa-fast: unknown operator: mul; there are: add" in error
    assert error.count("unknown operator") == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jepa_fast.perf.commands.bench._default_suite", lambda: folder)
    command = ["bench", "--op", "mul", "--device", "cpu", "--commit", "x"]
    assert main(command) == 2
    assert "--suite benchmarks" not in capfd.readouterr().err
    _suite(tmp_path / "benchmarks", two=(CASES, 2))
    assert main(command) == 2
    assert "; for those in ./benchmarks: --suite benchmarks" in capfd.readouterr().err
    (folder / "bench_one.py").write_text(SUITE.replace("CASES", 'Case("add", "x")'))
    assert _bench(folder, "--quick", "--device", "cpu") == 2
    assert f"nothing to run in {folder} on cpu with --quick" in capfd.readouterr().err
    assert not (folder / "results").exists()
    (tmp_path / "empty").mkdir()
    assert _bench(tmp_path / "empty") == 2
    assert "no benchmarks (bench_*.py) in" in capfd.readouterr().err


def _git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(folder: Path) -> Path:
    _git(folder, "init", "-q")
    _git(folder, "add", ".")
    _git(folder, "commit", "-q", "-m", "benchmarks")
    return folder


def test_uncommitted_changes_are_refused(
    repository: Path, outcome: suite.Outcome, monkeypatch: Patch, capsys: Capture
) -> None:
    assert _bench(repository) == 0
    path = repository / "results/nvidia-h200.json"
    head = _git(repository, "rev-parse", "HEAD")
    (run,) = json.loads(path.read_text())["runs"]
    assert (run["commit"], run["dirty"]) == (head, False)
    assert _bench(repository) == 0  # results do not count as changes
    (repository / "reports").mkdir()
    for name in ("found.md", "junit.xml", "of today.json", "reports/found.md"):  # nor do reports
        (repository / name).write_text("")
    assert _bench(repository) == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert run["dirty"] is False
    before = path.read_bytes()
    (repository / "bench_two.py").write_text("# new\n")
    assert _bench(repository) == 5
    told = capsys.readouterr().err
    assert f"uncommitted changes in {repository}: bench_two.py; commit them, or" in told
    assert "--allow-dirty" in told
    assert path.read_bytes() == before
    assert _bench(repository, "--allow-dirty") == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert (run["commit"], run["dirty"]) == (head, True)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")  # where there is no git
        assert _bench(repository, "--commit", "abc") == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert (run["commit"], run["dirty"]) == ("abc", None)


def test_what_code_may_read_build_or_run_counts_as_a_change(repository: Path) -> None:
    package = repository / "package/data"
    package.mkdir(parents=True)
    (repository / "package/__init__.py").write_text("")
    (repository / "notes.md").write_text("")
    _git(repository, "add", ".")
    _git(repository, "commit", "-q", "-m", "a package")
    assert machine.uncommitted(repository, ["."]) == []
    new = ["kernel.cu", "lib.so", "package/data/sizes of it.json", "setup.cfg", "the one.py"]
    for name in [*new, "notes.md", "found.json"]:
        (repository / name).write_text("changed")
    _git(repository, "mv", "bench_one.py", "bench_two.py")
    found = machine.uncommitted(repository, ["."])
    assert sorted(found) == sorted([*new, "notes.md", "bench_two.py"])


def test_full_runs_start_without_what_was_compiled_before(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    as_found, cold = suite._environment(None), suite._environment(tmp_path)
    assert as_found["TRITON_CACHE_DIR"] == "/elsewhere"
    assert cold["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert cold["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert "PYTEST_ADDOPTS" not in cold
    assert str(ROOT) in cold["PYTHONPATH"].split(os.pathsep)


# The command, in processes of its own


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A full run of a suite in which nearly everything goes wrong, one of a part, a quick one.

    The files run by name: one is right, one cannot be imported, one is wrong, the last one ends
    the process.
    """
    folder = _suite(tmp_path_factory.mktemp("ran") / "suite", a=(CASES, 2))
    _suite(folder, c=('Case("wrong", "x", {"n": 8}, quick=True)', 3))
    _suite(folder, d=('Case("right", "x", {"n": 1000})', 2))
    (folder / "bench_b.py").write_text("import no_such_module\n")
    crash = "\n\ndef _race(case: Case, device: str) -> Race:\n    import os\n    os._exit(9)\n"
    text = SUITE.replace("CASES", 'Case("crash", "x")') + crash
    (folder / "bench_e.py").write_text(text)
    first = _told(folder, "--device", "cpu")
    path = folder / f"results/{machine.describe('cpu')['name']}.json"
    found = {"folder": folder, "path": path, "first": first, "written": _listed(path.parent)}
    found["after first"] = json.loads(path.read_text())
    pinned = {"add": {"geometric_mean": 1e-6, "cases": 2}}
    (folder / "floors.json").write_text(json.dumps({path.stem: pinned}))
    (folder / "bench_b.py").unlink()
    options = ["--op", "add", "--device", "cpu"]
    found["second"] = _told(folder, *options, "--check-floors", "--budget", "600")
    found["after second"] = json.loads(path.read_text())
    found["quick"] = _told(folder, *options, "--quick", "--rounds", "3")
    found["after quick"] = json.loads(path.read_text())
    quick = path.with_name(f"{path.stem}-quick.json")
    found["of quick"] = json.loads(quick.read_text())
    return found


def _told(folder: Path, *options: str) -> tuple[int, str, str]:
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        return _bench(folder, *options), out.getvalue(), err.getvalue()


def test_a_wrong_benchmark_has_no_number_and_the_others_have_theirs(ran: dict[str, Any]) -> None:
    code, printed, told = ran["first"]
    assert code == 1
    assert told == "the benchmarks' process ended early, with 9\n"
    measured = [(r["operator"], r["case"]) for r in ran["after first"]["records"]]
    assert measured == [("add", "small"), ("add", "large"), ("right", "x")]
    assert "wrong" not in printed
    assert ran["written"] == [ran["path"].name, ran["path"].stem + ".png"]


def test_a_record_has_all_that_the_protocol_asks_for(ran: dict[str, Any]) -> None:
    (run,) = ran["after first"]["runs"]
    assert (run["commit"], run["dirty"], run["skipped"]) == (None, None, [])
    assert run["versions"]["torch"] == torch.__version__
    library = _build.Record.read()
    compilers = None if library is None else "; ".join(library.compilers)
    assert run["versions"].get("compilers") == compilers
    assert run["ceilings"]["gigabytes_per_second"] > 0
    assert run["ceilings"]["teraflops"]["float32"] > 0
    for record in ran["after first"]["records"]:
        assert (record["rounds"], record["quick"], record["run"]) == (30, False, run["id"])
        assert list(record["providers"]) == ["ours", "eager"]
        for times in record["providers"].values():
            assert times["milliseconds"] > 0
            assert times["first_call_milliseconds"] > 0
            assert times["peak_bytes"] == 4 * record["sizes"]["n"]
        assert record["headline"]["against"] == "eager"
        assert 0 < record["share_of_ceiling"]
        assert "can't allocate memory" in record["why_not"]["huge"]
    assert "add small, large: no huge: out of memory" in ran["first"][1]


def test_a_part_replaces_its_own_records(ran: dict[str, Any]) -> None:
    code, printed, told = ran["second"]
    assert (code, told) == (0, "")
    assert "ok add: " in printed
    before, after = ran["after first"], ran["after second"]
    small, large, right = after["records"]
    assert right == before["records"][2]
    assert (small["case"], small["rounds"], small["quick"]) == ("small", 30, False)
    old, new = after["runs"]
    assert old == before["runs"][0]
    assert small["run"] == large["run"] == new["id"] != old["id"]
    assert new["options"]["op"] == ["add"]
    assert new["options"]["budget"] == 600.0


def test_what_was_measured_before_a_signal_is_written(tmp_path: Path) -> None:
    folder = _suite(tmp_path / "suite", a=('Case("add", "small", {"n": 64})', 2))
    _suite(folder, b=('Case("stopped", "x", {"n": 8})', 2), c=('Case("late", "x", {"n": 8})', 2))
    text = (folder / "bench_b.py").read_text()
    stop = "import os, signal, time\n    os.kill(os.getppid(), signal.SIGTERM)\n    time.sleep(600)"
    (folder / "bench_b.py").write_text(text.replace("return _race(case, device)", stop))
    command = [sys.executable, "-m", "jepa_fast.cli", "bench", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--suite", str(folder)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130
    assert "stopped by a signal; what was measured before counts" in done.stderr
    (path,) = (folder / "results").glob("*.json")
    assert [record["operator"] for record in json.loads(path.read_text())["records"]] == ["add"]


def test_a_quick_run_replaces_nothing(ran: dict[str, Any]) -> None:
    assert ran["quick"][0] == 0
    assert ran["after quick"] == ran["after second"]
    (record,) = ran["of quick"]["records"]
    assert (record["case"], record["rounds"], record["quick"]) == ("small", 3, True)


@pytest.mark.usefixtures("nothing_runs")
def test_a_native_library_of_other_sources_is_refused(
    folder: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(bench, "_IN_CHECKOUT", folder.resolve())
    monkeypatch.setattr(_build.Record, "read", lambda *_: _build.Record(sources="then"))
    monkeypatch.setattr(_build, "source_digest", lambda: "now")
    assert _bench(folder, "--device", "cpu") == 6
    assert "older than its sources: run `jepa-fast build`" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("budget", ["0", "-1", "nan", "much"])
def test_a_budget_of_nothing_is_refused(folder: Path, capsys: Capture, budget: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        _bench(folder, f"--budget={budget}")
    assert stopped.value.code == 2
    assert "argument --budget: " in capsys.readouterr().err


def test_floors_are_not_checked_in_a_quick_run(folder: Path, capsys: Capture) -> None:
    assert _bench(folder, "--quick", "--check-floors") == 2
    assert "leave out --quick or --check-floors" in capsys.readouterr().err


def test_benchmarks_of_ones_own_run_under_pytest(tmp_path: Path) -> None:
    """As the README says: a line in the top conftest.py, and `pytest FOLDER`."""
    _suite(tmp_path / "speed", one=('Case("add", "small", {"n": 64}, quick=True)', 2))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["jepa_fast.perf.pytest_plugin"]\n')
    command = [sys.executable, "-m", "pytest", "speed", "-q", "--race-quick", "--race-rounds=2"]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(ROOT)
    # `-p` beside it, as with `jepa-fast bench` and such a conftest.py in the suite's own folder.
    done = subprocess.run(
        [*command, "-p", "jepa_fast.perf.pytest_plugin", "--race-device=cpu"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ours against the others, interleaved" in done.stdout
    assert "add small: no huge: out of memory" in done.stdout


def test_the_checkouts_own_benchmarks_run_under_pytest() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--race-budget=1", "--fixtures", "benchmarks/tables.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), done.stderr
    assert "race -- jepa_fast/perf/pytest_plugin.py" in done.stdout


# make gpu

FAKE_PYTHON = """#!/bin/sh
echo "${PYTORCH_NO_CUDA_MEMORY_CACHING:+uncached }$(basename "$0") $*" >>"$CALLS"
case "$*" in
  *"$FAILS"*) echo "it broke"; exit 3;;
esac
"""


def _make_gpu(
    tmp_path: Path, fails: str, sanitizer: bool = True
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """`make gpu` with a Python that does nothing, but fails where it is told."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python", *(["compute-sanitizer"] * sanitizer)):
        (tools / name).write_text(FAKE_PYTHON)
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin"
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={tools}/python", f"OUT={tmp_path}/out", "COMMIT=abc"],
        cwd=ROOT,
        env={"PATH": path, "CALLS": str(tmp_path / "calls"), "FAILS": fails},
        capture_output=True,
        text=True,
    )
    return done, (tmp_path / "calls").read_text().splitlines()


def test_make_gpu_runs_every_part_even_if_one_fails(tmp_path: Path) -> None:
    done, calls = _make_gpu(tmp_path, fails="-m tier3")
    assert done.returncode != 0
    _, *parts = calls  # the first asks for a GPU, in two lines
    text = "\n".join(parts)
    assert "jepa_fast.cli build" in text
    assert "-m pytest -q -n auto --maxprocesses 8 -m tier3 tests/test_" in text
    bench = next(line for line in parts if "jepa_fast.cli bench" in line)
    assert "--check-floors --allow-dirty --commit abc" in bench
    assert f"--output {tmp_path}/out" in bench
    assert "uncached compute-sanitizer --error-exitcode 1" in text
    assert "pip" not in text
    assert 0 < int(bench.partition("--budget ")[2].split()[0]) <= 420
    report = (tmp_path / "out/gpu.md").read_text()
    assert "commit abc" in report
    assert "| build | passed |" in report
    assert "| tests | **failed, exit status 3** |" in report
    assert "| bench | passed |" in report
    assert (tmp_path / "out/gpu-tests.txt").read_text() == "it broke\n"
    logs = [f"gpu-{part}.txt" for part in ("bench", "build", "sanitizer", "tests")]
    assert _listed(tmp_path / "out") == [*logs, "gpu.md"]


def test_make_gpu_passes_where_all_parts_do_and_needs_no_sanitizer(tmp_path: Path) -> None:
    done, _ = _make_gpu(tmp_path, fails="no such argument", sanitizer=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "out/gpu.md").read_text()
    assert "failed" not in report
    if shutil.which("compute-sanitizer", path="/usr/bin:/bin") is None:
        assert "| sanitizer | left out: there is no compute-sanitizer |" in report


def test_make_gpu_needs_no_xdist(tmp_path: Path) -> None:
    done, calls = _make_gpu(tmp_path, fails="import xdist", sanitizer=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any("-m pytest -q -m tier3 tests/test_" in call for call in calls)


def test_make_gpu_needs_a_gpu(tmp_path: Path) -> None:
    done, calls = _make_gpu(tmp_path, fails="make gpu needs a CUDA GPU")
    assert done.returncode != 0
    assert not any("jepa_fast.cli" in call for call in calls)
    assert not (tmp_path / "out").exists()


def test_the_suites_of_an_installation_come_before_a_folder_beside_it(monkeypatch: Patch) -> None:
    assert bench._default_suite() == ROOT / "benchmarks"
    assert bench._default_output(ROOT / "benchmarks") == ROOT / "benchmarks/results"
    monkeypatch.setattr(bench, "_PACKAGED", ROOT / "tests")
    assert bench._default_suite() == ROOT / "tests"
    assert bench._default_output(ROOT / "tests") == Path("results")


@pytest.mark.parametrize("fails", ["mkstemp", "write"])
def test_a_folder_is_written_to_before_anything_is_measured(
    tmp_path: Path, monkeypatch: Patch, fails: str
) -> None:
    """As permissions do not tell of everything."""
    files.check_writable(tmp_path / "not/there/yet")
    assert list(tmp_path.iterdir()) == []

    def over_quota(*_: object, **__: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    temporary = files.tempfile.NamedTemporaryFile
    if fails == "mkstemp":
        monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", over_quota)
    else:

        def opened(**options: Any) -> Any:
            file = temporary(**options)
            file.write = over_quota
            return file

        monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", opened)
    for check in (files.check_writable, files.check_target):
        with pytest.raises(OSError, match=f"to {re.escape(str(tmp_path))}: Disk quota exceeded"):
            check(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_proc_and_devices_are_what_they_are() -> None:
    with pytest.raises(OSError, match="nothing can be written to /proc: "):
        files.check_target(Path("/proc/found.json"))
    files.check_target(Path("/dev/full"))  # which no file is made for


def test_results_go_through_links_and_into_what_is_no_file(tmp_path: Path) -> None:
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    file.write_text("old")
    link.symlink_to(file)
    files.write_text(link, "new")
    assert (link.is_symlink(), file.read_text()) == (True, "new")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_file_that_skips_itself_is_left_out_of_a_suite(tmp_path: Path) -> None:
    (tmp_path / "bench_a.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    (tmp_path / "bench_b.py").write_text("1 / 0\n")
    failed: dict[str, Exception] = {}
    assert load_suite(tmp_path, failed) == []
    assert list(failed) == ["bench_b.py"]


MARKED = """
import pytest
from jepa_fast.perf import Case, benchmark

def set_up(case, device):
    return "a race"

class TestGroup:
    @staticmethod
    @benchmark([Case("inside", "below")])
    def bench_below(case, device):
        return "a race"

    @benchmark([Case("inside", "above")])
    @staticmethod
    def bench_above(case, device):
        return "a race"

    bench_skipped = staticmethod(
        pytest.mark.skip(reason="for now")(benchmark([Case("inside", "marked")])(set_up))
    )

class Other:
    bench = staticmethod(benchmark([Case("not", "collected")])(set_up))

@benchmark([Case("marked", "below")])
@pytest.mark.skipif(True, reason="not on Mondays")
def bench_marked(case, device):
    return "a race"

bench_unmet = pytest.mark.skipif(False, reason="never")(
    benchmark([Case("marked", "unmet")])(set_up)
)
"""


def test_a_suite_has_the_benchmarks_of_classes_and_minds_the_marks_that_skip(
    tmp_path: Path,
) -> None:
    (tmp_path / "bench_marked.py").write_text(MARKED)
    found = {}
    for entry in load_suite(tmp_path):
        (case,) = entry.cases
        try:
            found[str(case)] = str(entry.set_up(case, "cpu"))
        except NotHere as error:
            found[str(case)] = str(error)
    assert found == {
        "inside/below": "a race",
        "inside/above": "a race",
        "inside/marked": "it is marked skip: for now",
        "marked/below": "it is marked skipif: not on Mondays",
        "marked/unmet": "a race",
    }


def test_a_benchmark_that_wants_a_self_is_refused() -> None:
    message = "Group.bench_it: expected a function of case and device, got a method; .*staticmethod"
    with pytest.raises(TypeError, match=message):

        class Group:
            @benchmark([Case("op", "case")])  # type: ignore[arg-type]
            def bench_it(self, case: Case, device: str) -> Race:
                raise NotImplementedError


OWN = """
from cases import CASE
from jepa_fast.perf import benchmark

@benchmark([CASE])
def bench_own(case, device):
    raise NotImplementedError
"""


def test_a_suite_has_the_files_below_it_each_with_what_lies_beside_it(tmp_path: Path) -> None:
    for name, folder in (("first", tmp_path), ("second", tmp_path / "deep/er")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"bench_{name}.py").write_text(OWN)
        case = f"from jepa_fast.perf import Case\nCASE = Case('own', '{name}')\n"
        (folder / "cases.py").write_text(case)
    for left_out in (".hidden", "build/lib", "environment"):
        (tmp_path / left_out).mkdir(parents=True)
        (tmp_path / left_out / "bench_first.py").write_text("1 / 0\n")
    (tmp_path / "environment/pyvenv.cfg").touch()
    path = list(sys.path)
    cases = [case.name for entry in load_suite(tmp_path) for case in entry.cases]
    assert cases == ["first", "second"]
    assert sys.path == path

    (tmp_path / "deep/bench_first.py").write_text(OWN)
    message = r"of one name: bench_first.py, deep/bench_first.py; .* rename all but one"
    with pytest.raises(PerfError, match=message):
        load_suite(tmp_path)


def test_files_below_a_suite_that_cannot_be_imported_are_named_with_their_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/bench_broken.py").write_text("1 / 0\n")
    failed: dict[str, Exception] = {}
    assert load_suite(tmp_path, failed) == []
    assert list(failed) == ["deep/bench_broken.py"]
