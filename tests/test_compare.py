"""The gate: verdicts from numbers, versions side by side, and the command end to end.

No test here depends on how fast anything is: the versions under test tell the time themselves.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from gate_project import LIBRARY, SUITE, Repository, git, library

from jepa_fast.cli import main
from jepa_fast.perf.errors import BuildFailed, PerfError
from jepa_fast.perf.gate import imports as imports_module
from jepa_fast.perf.gate import report
from jepa_fast.perf.gate.decision import LOOKS, Interval, Verdict, decide, slow_down
from jepa_fast.perf.gate.gate import Finding
from jepa_fast.perf.gate.imports import Imports
from jepa_fast.perf.gate.sampling import sample
from jepa_fast.perf.gate.sides import Side
from jepa_fast.perf.gate.snapshots import Snapshots
from jepa_fast.perf.machine import describe
from jepa_fast.perf.suite import Outcome

# What numbers prove


def test_a_slow_down_is_the_middle_of_the_ratios_within_its_bounds() -> None:
    found = slow_down([1.04, 1.05, 1.06] * 30)
    assert found.estimate == pytest.approx(0.05, abs=1e-3)
    assert found.early_low <= found.low < found.estimate < found.high <= found.early_high
    assert found.pairs == 90
    assert found == slow_down([1.04, 1.05, 1.06] * 30)  # the same numbers, the same verdict


def test_equal_times_are_no_slow_down() -> None:
    found = slow_down([1.0] * 32)
    assert (found.estimate, found.early_low, found.early_high) == (0, 0, 0)


def test_pairs_that_something_disturbed_do_not_count() -> None:
    ratios = [1.0] * 28 + [9.0] * 4
    assert slow_down(ratios).estimate == 0


def test_bounds_hold_as_often_as_they_say() -> None:
    """In 120 seeded repetitions the true value may be below the 99 % bound once or twice."""
    generator = random.Random(1)
    below = 0
    for repetition in range(120):
        ratios = [1.02 * generator.lognormvariate(0, 0.05) for _ in range(LOOKS[1])]
        below += slow_down(ratios, seed=repetition).low > 0.02
    assert below <= 5  # of 6 and more, where 1.2 are expected, the probability is 1 in 600


def test_one_ratio_proves_nothing() -> None:
    with pytest.raises(ValueError, match="at least two ratios, got 1"):
        slow_down([1.0])


@pytest.mark.parametrize(
    ("low", "high", "early_low", "early_high", "last", "verdict"),
    [
        (0.03, 0.06, 0.025, 0.07, False, Verdict.SLOWER),
        (0.03, 0.06, 0.015, 0.07, False, Verdict.UNSURE),  # not yet sure enough
        (0.03, 0.06, 0.015, 0.07, True, Verdict.SLOWER),
        (-0.01, 0.01, -0.02, 0.015, False, Verdict.OK),
        (-0.01, 0.01, -0.02, 0.03, False, Verdict.UNSURE),
        (-0.01, 0.01, -0.02, 0.03, True, Verdict.OK),
        (0.01, 0.03, 0.0, 0.04, True, Verdict.UNSURE),
    ],
)
def test_verdicts(
    low: float, high: float, early_low: float, early_high: float, last: bool, verdict: Verdict
) -> None:
    found = Interval((low + high) / 2, low, high, early_low, early_high, 32)
    assert decide(found, 0.02, last) is verdict


class _Side:
    """A process whose calls take as long as it says."""

    def __init__(self, name: str, log: list[str], seconds: float, noise: float, seed: int) -> None:
        self._name, self._log, self._seconds, self._noise = name, log, seconds, noise
        self._generator = random.Random(seed)

    def ask(self, do: str, **arguments: Any) -> Any:
        self._log.append(f"{do} {self._name}")
        if do == "turn":
            assert arguments["calls"] >= 1
            return [
                self._seconds * self._generator.lognormvariate(0, self._noise)
                for _ in range(arguments["calls"])
            ]
        return {}


def _sampled(ratio: float, noise: float = 0.02, seconds: float = 1e9) -> tuple[Any, list[str]]:
    log: list[str] = []
    base = cast(Side, _Side("base", log, 1e-3, noise, 1))
    head = cast(Side, _Side("head", log, 1e-3 * ratio, noise, 2))
    ticks = iter(range(10**6))
    return sample(base, head, (0, 0), 0.02, seconds, now=lambda: next(ticks)), log


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.0, Verdict.OK), (0.8, Verdict.OK), (1.2, Verdict.SLOWER)]
)
def test_what_is_plain_is_decided_at_the_first_look(ratio: float, verdict: Verdict) -> None:
    found, _ = _sampled(ratio)
    assert found.verdict is verdict
    assert found.interval.pairs == LOOKS[0]
    assert found.interval.estimate == pytest.approx(ratio - 1, abs=0.02)


def test_what_is_close_is_looked_at_longer() -> None:
    found, _ = _sampled(1.02, noise=0.1)
    assert found.interval.pairs == LOOKS[-1]
    assert found.verdict is Verdict.UNSURE


def test_when_the_time_is_up_what_is_there_decides() -> None:
    found, _ = _sampled(1.02, noise=0.1, seconds=40)
    assert LOOKS[0] <= found.interval.pairs < LOOKS[1]


def test_versions_take_turns_and_begin_in_turn() -> None:
    _, log = _sampled(1.0, noise=0.0)
    log = log[1:]  # the turn that finds how long a call takes
    first, second = log[:6], log[6:12]
    assert first == [f"open {s}" for s in ("head", "base")] + [
        f"turn {s}" for s in ("head", "base", "base", "head")
    ]
    other = {"head": "base", "base": "head"}
    assert second == [f"{do} {other[side]}" for do, side in (each.split() for each in first)]


# Two versions side by side


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions tell the time themselves, which CUDA events do not ask for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def _nobody_else_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def plain(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "plain", {"a.txt": "1", ".gitignore": "ignored.txt\n"})


def _snapshots(repository: Repository, build: str | None = None) -> Snapshots:
    return Snapshots(repository.root, repository.root.parent / "snapshots", build)


def test_the_base_is_the_commit_and_the_head_the_working_tree(plain: Repository) -> None:
    plain.write({"a.txt": "2", "new.txt": "3", "ignored.txt": "4"})
    snapshots = _snapshots(plain)
    base, head = snapshots.base("main"), snapshots.head()
    assert (base.root / "a.txt").read_text() == "1"
    assert not (base.root / "new.txt").exists()
    assert (head.root / "a.txt").read_text() == "2"
    assert (head.root / "new.txt").read_text() == "3"
    assert not (head.root / "ignored.txt").exists()
    assert set(head.changed) == {"a.txt", "new.txt"}
    assert base.label == f"main ({base.commit[:8]})"
    assert "2 changed files)" in head.label
    assert git(plain.root, "status", "--porcelain").split() == ["M", "a.txt", "??", "new.txt"]


def test_a_deleted_file_is_not_in_the_working_tree(plain: Repository) -> None:
    (plain.root / "a.txt").unlink()
    head = _snapshots(plain).head()
    assert not (head.root / "a.txt").exists()
    assert head.label.endswith(" and 1 changed file)")


def test_a_link_to_a_folder_is_in_the_working_tree(plain: Repository) -> None:
    plain.write({"library/b.txt": "2"})
    (plain.root / "linked").symlink_to("library")
    (plain.root / "lost").symlink_to("nowhere")
    plain.commit()
    snapshots = _snapshots(plain)
    first = snapshots.head()
    for version in (snapshots.base("HEAD"), first):
        assert (version.root / "linked").readlink() == Path("library")
        assert (version.root / "linked/b.txt").read_text() == "2"
        assert (version.root / "lost").readlink() == Path("nowhere")
    (plain.root / "linked").unlink()
    (plain.root / "linked").symlink_to(".")
    assert snapshots.head().root != first.root


def test_file_names_may_be_any_bytes(plain: Repository) -> None:
    names = (os.fsdecode(b"caf\xe9.txt"), "with a space.txt")
    for name in names:
        (plain.root / name).write_text("2")
    git(plain.root, "mv", "a.txt", "b.txt")
    head = _snapshots(plain).head()
    assert [(head.root / name).read_text() for name in names] == ["2", "2"]
    assert sorted(head.changed) == sorted([*names, "a.txt", "b.txt"])


def test_versions_are_built_once(plain: Repository) -> None:
    log = plain.root.parent / "log"
    build = f"pwd >> {log}"
    base, head = _snapshots(plain, build).base("HEAD"), _snapshots(plain, build).head()
    assert (base, head) == (_snapshots(plain, build).base("HEAD"), _snapshots(plain, build).head())
    assert [Path(line) for line in log.read_text().splitlines()] == [base.root, head.root]
    plain.write({"a.txt": "2"})
    assert _snapshots(plain, build).head().root != head.root
    assert len(log.read_text().splitlines()) == 3


def test_a_build_that_failed_is_tried_again(plain: Repository) -> None:
    flag = plain.root.parent / "flag"
    build = f"echo no luck; test -f {flag}"
    with pytest.raises(BuildFailed, match=r"(?s)main \(\w+\) cannot be built: .*no luck"):
        _snapshots(plain, build).base("main")
    flag.touch()
    assert (_snapshots(plain, build).base("main").root / "a.txt").exists()


def test_old_snapshots_are_forgotten(plain: Repository) -> None:
    roots = []
    for number in range(10):
        plain.write({"a.txt": str(number)})
        roots.append(_snapshots(plain).head().root)
    assert [root.exists() for root in roots] == [False] * 2 + [True] * 8


def test_a_cache_that_was_deleted_is_made_anew(plain: Repository) -> None:
    base = _snapshots(plain).base("HEAD")
    subprocess.run(["rm", "-r", str(base.root)], check=True)
    assert (_snapshots(plain).base("HEAD").root / "a.txt").read_text() == "1"


def test_a_version_that_git_was_killed_over_is_made_anew(plain: Repository) -> None:
    base = _snapshots(plain).base("main")
    git(plain.root, "worktree", "lock", str(base.root))  # as git does until all is there
    shutil.rmtree(base.root)
    assert (_snapshots(plain).base("main").root / "a.txt").is_file()


def test_a_commit_s_hook_leaves_the_commit_as_it_is(
    plain: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.write({"a.txt": "2"})
    git(plain.root, "add", "a.txt")
    with monkeypatch.context() as hook:
        hook.setenv("GIT_DIR", str(plain.root / ".git"))
        hook.setenv("GIT_INDEX_FILE", str(plain.root / ".git/index"))
        base = _snapshots(plain, 'git ls-files > found; test -z "$GIT_INDEX_FILE"').base("main")
    assert (base.root / "a.txt").read_text() == "1"
    assert (base.root / "found").read_text().split() == [".gitignore", "a.txt"]
    assert git(plain.root, "status", "--porcelain").split() == ["M", "a.txt"]
    assert git(plain.root, "diff", "--cached", "--name-only") == "a.txt"


def test_a_cache_in_the_working_tree_is_no_part_of_it(plain: Repository) -> None:
    heads = []
    for _ in range(2):
        snapshots = Snapshots(plain.root, plain.root / ".cache")
        snapshots.base("HEAD")
        heads.append(snapshots.head())
    assert heads[0] == heads[1]
    assert heads[0].changed == ()
    assert not (heads[0].root / ".cache").exists()
    assert git(plain.root, "status", "--porcelain") == ""


def test_an_unknown_ref_is_refused(plain: Repository) -> None:
    with pytest.raises(PerfError, match=r"no commit 'nowhere' in .*fetch-depth: 0"):
        _snapshots(plain).base("nowhere")


# End to end


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    root = tmp_path_factory.mktemp("origin") / "project"
    return Repository(root, {"library.py": LIBRARY, "benchmarks/bench_library.py": SUITE})


@pytest.fixture
def project(
    origin: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Repository]:
    """The project as it was committed, and the current folder."""
    monkeypatch.chdir(origin.root)
    commit = git(origin.root, "rev-parse", "HEAD")
    yield origin
    git(origin.root, "reset", "-q", "--hard", commit)
    git(origin.root, "clean", "-fdq")


def _told(output: str, name: str) -> str:
    """The last that was said of a case."""
    return [line for line in output.splitlines() if f" {name}/small" in line][-1]


def test_what_got_worse_is_named_and_nothing_else(
    project: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = (
        '{"steady": 1.01, "slowed": 1.05, "eager": 0.5, "greedy": 1.0, "dying": 1.0, "new": 1.0}'
    )
    project.write(
        {"library.py": library(MILLISECONDS=times, EXTRA_BYTES="4096", BROKEN='"all of it"')}
    )
    files = {kind: tmp_path / "out" / f"found.{kind}" for kind in ("markdown", "junit", "json")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert main(["compare", "main", *options]) == 1
    output = capsys.readouterr().out

    assert "ok    steady/small: time +1.0 %" in _told(output, "steady")
    assert "ok    eager/small: time -50.0 %" in _told(output, "eager")
    slowed = _told(output, "slowed")
    assert slowed.startswith(
        "WORSE slowed/small: SLOWER: time +5.0 % (+5.0 % to +5.0 %), fastest 1 -> 1.05"
    )
    assert slowed.endswith("again +5.0 % (+5.0 % to +5.0 %)")
    at_first = next(line for line in output.splitlines() if " slowed/small" in line)
    assert at_first.startswith("?     slowed/small: time +5.0 %")
    assert at_first.endswith("to be confirmed by a second run")
    assert "WORSE" in _told(output, "greedy")
    assert "MORE MEMORY: 65,536 -> 69,632 bytes" in _told(output, "greedy")
    assert "its process ended with 3" in "\n".join(output.splitlines())
    assert "not compared: the base cannot run it" in _told(output, "new")
    assert output.splitlines()[-1] == "3 of 6 got worse, 1 could not be told"

    found = json.loads(files["json"].read_text())
    cases = {case["operator"]: case for case in found["cases"]}
    assert [name for name, case in cases.items() if not case["ok"]] == ["slowed", "greedy", "dying"]
    assert [run["verdict"] for run in cases["slowed"]["runs"]] == ["slower", "slower"]
    assert [run["verdict"] for run in cases["steady"]["runs"]] == ["ok"]
    assert cases["slowed"]["runs"][0]["slow_down"] == pytest.approx(0.05)
    assert found["head"]["changed_files"] == ["library.py"]
    assert found["base"]["commit"] == git(project.root, "rev-parse", "main")
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["torch"]

    suite = ElementTree.parse(files["junit"]).getroot()[0]
    assert (suite.attrib["failures"], suite.attrib["skipped"]) == ("3", "1")
    (unknown,) = (case.attrib["name"] for case in suite if case.find("skipped") is not None)
    assert unknown == "new/small"
    failed = [case.attrib["name"] for case in suite if case.find("failure") is not None]
    assert failed == ["slowed/small", "greedy/small", "dying/small"]
    markdown = files["markdown"].read_text()
    assert "**3 of 6 got worse, 1 could not be told**" in markdown
    assert "| ? | new/small | not compared" in markdown
    assert "| **worse** | slowed/small | SLOWER: time +5.0 %" in markdown
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "found.json",
        "found.junit",
        "found.markdown",
    ]


def test_what_is_faster_and_wrong_fails_and_has_no_numbers(
    project: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And, as everything else that is found, does so in all outputs."""
    project.write({"library.py": library(MILLISECONDS='{"eager": 0.5}', WRONG='"eager"')})
    files = {kind: tmp_path / f"found.{kind}" for kind in ("markdown", "junit", "json")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert main(["compare", "main", *options]) == 1
    output = capsys.readouterr().out.splitlines()
    wrong = "WRONG RESULT: AssertionError: eager gives 7, not 0"
    assert output[1:] == [f"WORSE eager/small: {wrong}", "1 of 1 got worse"]
    (case,) = json.loads(files["json"].read_text())["cases"]
    assert (case["ok"], case["runs"], case["head_bytes"]) == (False, [], None)
    assert case["wrong"].splitlines()[1:] == ["in the first element"]
    (failure,) = ElementTree.parse(files["junit"]).getroot().iter("failure")
    assert (failure.attrib["message"], failure.text) == (wrong, "in the first element")
    assert f"| **worse** | eager/small | {wrong}<br>in the first" in files["markdown"].read_text()


def test_both_versions_running_the_same_code_is_an_error_and_not_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with a package that is neither at the root nor in src, and installed with `pip -e`."""
    files = {"python/library.py": LIBRARY, "benchmarks/deep/bench_library.py": SUITE}
    repository = Repository(tmp_path / "project", files)
    greedy = library(MILLISECONDS='{"greedy": 1.0}', EXTRA_BYTES="4096")
    repository.write({"python/library.py": greedy})
    monkeypatch.chdir(repository.root)
    monkeypatch.setenv("PYTHONPATH", str(repository.root / "python"), prepend=os.pathsep)
    assert main(["compare", "main"]) == 6
    error = capsys.readouterr().err
    assert f"library is imported from {repository.root / 'python/library.py'}, which is" in error
    assert "the same code; name the folder that it is imported from: --path python\n" in error
    assert main(["compare", "main", "--path", "python"]) == 1
    assert "MORE MEMORY: 65,536 -> 69,632 bytes" in _told(capsys.readouterr().out, "greedy")


@pytest.mark.parametrize(
    ("name", "file", "told"),
    [
        ("mine", "base/mine.py", ""),
        ("mine", "base/.venv/mine.py", ""),
        ("bench_mine", "head/benchmarks/bench_mine.py", ""),
        ("beside", "head/benchmarks/beside/__init__.py", ""),
        ("mine", "head/mine.py", "must not put it on sys.path: name its folder with --path"),
        ("installed", "tree/.venv/lib/python3.12/site-packages/installed.py", ""),
        ("compiled", "tree/caches/inductor/ab/compiled.py", ""),
        ("elsewhere", "elsewhere.py", ""),
        ("mine", "tree/python/mine.py", "from: --path python"),
        ("mine.inner", "tree/a/b/mine/inner/__init__.py", "from: --path a/b"),
        ("mine", "tree/src/mine/__init__.py", "base/src has no such module"),
        ("mine", "link.py", "from: --path python"),
    ],
)
def test_whose_code_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, told: str
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "tree/caches/inductor"))
    (tmp_path / "link.py").symlink_to(tmp_path / "tree/python/mine.py")
    base, head, tree = (tmp_path / each for each in ("base", "head", "tree"))
    imports = Imports(base, head / "benchmarks", ["src", "."], tree, head)
    assert imports.why_not_own() == ""
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(__file__=str(tmp_path / file)))
    found = imports.why_not_own()
    assert (name in found, told in found) == (bool(told), True)
    assert imports.why_not_own() == ""  # once is enough


def test_benchmarks_among_what_they_measure_bring_the_other_version_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their folder comes first on the path, with all that is in it."""
    base, head, tree = (tmp_path / each for each in ("base", "head", "tree"))
    imports = Imports(base, head, ["src", "."], tree, head)
    for name in ("bench_mine", "mine"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__file__=str(head / f"{name}.py")))
    found = imports.why_not_own()
    assert found.startswith("mine is")
    assert found.endswith("keep the benchmarks in a folder of their own, without what they measure")


@pytest.mark.parametrize("versioned", [False, True])
def test_a_jepa_fast_in_the_working_tree_measures_both_and_is_measured_only_in_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versioned: bool
) -> None:
    base, head, tree = (tmp_path / each for each in ("base", "head", "tree"))
    harness = tree / "lent/jepa_fast"
    monkeypatch.setattr(imports_module, "_HARNESS", harness)
    if versioned:
        (head / "lent/jepa_fast").mkdir(parents=True)
    imports = Imports(base, head / "benchmarks", ["src", "."], tree, head)
    perf = SimpleNamespace(__file__=str(harness / "perf/race.py"))
    monkeypatch.setitem(sys.modules, "jepa_fast.perf.race", perf)
    assert imports.why_not_own() == ""
    monkeypatch.setitem(
        sys.modules, "jepa_fast.lent", SimpleNamespace(__file__=str(harness / "lent.py"))
    )
    assert ("--path lent" in imports.why_not_own()) == versioned


def test_a_wrong_base_fails_nothing_and_a_wrong_new_case_fails(
    project: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write({"library.py": library(MILLISECONDS='{"eager": 1.0}', WRONG='"eager"')})
    git(project.root, "commit", "-qam", "wrong")
    out = tmp_path / "found.json"
    project.write({"library.py": library(MILLISECONDS='{"eager": 1.0}')})
    assert main(["compare", "HEAD", "--json", str(out)]) == 0
    told = "not compared: the base's result is wrong: AssertionError: eager gives 7, not 0"
    output = capsys.readouterr().out.splitlines()
    assert output[1:] == [f"?     eager/small: {told}", "nothing got worse, 1 could not be told"]
    (case,) = json.loads(out.read_text())["cases"]
    assert case["base_wrong"].startswith("AssertionError")
    assert (case["wrong"], case["runs"]) == ("", [])

    times = '{"eager": 1.0, "new": 1.0}'
    project.write({"library.py": library(MILLISECONDS=times, WRONG='"new"')})
    assert main(["compare", "HEAD", "--op", "new"]) == 1
    assert "WRONG RESULT: AssertionError: new gives 7" in _told(capsys.readouterr().out, "new")


def test_what_is_wrong_in_both_versions_fails() -> None:
    both = Finding("op", "small", wrong="AssertionError: off", base_wrong="AssertionError: off")
    told = "WORSE op/small: WRONG RESULT: AssertionError: off; so is the base's"
    assert report.line(both, 0.02) == told


def test_no_change_passes(project: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "HEAD", "--op", "steady", "greedy"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in output[1:-1]] == [
        "ok    steady/small",
        "ok    greedy/small",
    ]
    assert output[-1] == "nothing got worse"


def test_a_slow_down_within_a_tolerance_of_one_s_own_passes(project: Repository) -> None:
    times = '{"steady": 1.05}'
    project.write({"library.py": library(MILLISECONDS=times)})
    assert main(["compare", "main", "--tolerance", "0.06"]) == 0


@pytest.mark.parametrize(("ratio", "code"), [(1.6, 0), (1.4, 1)])
def test_floors_of_this_machine_are_checked_in_the_working_tree(
    project: Repository,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ratio: float,
    code: int,
) -> None:
    floor = {"geometric_mean": 1.5, "cases": 1}
    floors = {
        describe("cpu")["name"]: {"steady": floor, "eager": floor},
        "another": {"greedy": floor},
    }
    project.write({"benchmarks/floors.json": json.dumps(floors)})
    raced: list[Any] = []

    def run_suite(
        folder: Path, device: str, operators: list[str], *, version: Path, paths: Sequence[str]
    ) -> Outcome:
        raced.append((folder.relative_to(version), device, operators))
        assert paths == ("src", ".")
        assert (version / "benchmarks/floors.json").exists()
        return Outcome(records=[{"operator": "steady", "headline": {"ratio": ratio}}])

    monkeypatch.setattr("jepa_fast.perf.suite.run_suite", run_suite)
    out = tmp_path / "found.json"
    options = ["--device", "cpu", "--json", str(out)]
    assert main(["compare", "main", "--op", "steady", "greedy", *options]) == code
    assert raced == [(Path("benchmarks"), "cpu", ["steady"])]
    line = f"{'WORSE' if code else 'ok   '} steady/floor: {ratio:.3f}x of the best alternatives"
    assert line in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [(each["name"], each["ok"]) for each in found["floors"]] == [("steady/floor", not code)]
    assert found["ok"] == (not code)


def test_a_version_that_brings_its_own_jepa_fast_is_measured_with_this_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when jepa_fast is compared with one of its versions that had no such harness."""
    suite = SUITE.replace("import library", "import jepa_fast as library")
    repository = Repository(
        tmp_path / "project", {"jepa_fast/__init__.py": LIBRARY, "suite/bench_it.py": suite}
    )
    repository.write({"jepa_fast/__init__.py": library(BROKEN='"eager"')})
    monkeypatch.chdir(repository.root)
    assert main(["compare", "main", "--suite", "suite", "--op", "steady", "eager"]) == 1
    output = capsys.readouterr().out
    assert "ok    steady" in _told(output, "steady")
    assert "RuntimeError: no longer works" in _told(output, "eager")


@pytest.mark.parametrize(
    ("arguments", "files", "code", "message"),
    [
        (["nowhere"], {}, 2, "there is no commit 'nowhere'"),
        (["main", "--suite", "no_suite"], {}, 2, r"no benchmarks \(bench_\*.py\) in .*no_suite"),
        (["main", "--suite", "/"], {}, 2, "has to be in the repository"),
        (
            ["main"],
            {"benchmarks/floors.json": json.dumps({describe("cpu")["name"]: {"steady": 99}})},
            2,
            r"jepa-fast: \S*/project/benchmarks/floors\.json: .*\"steady\": expected an object",
        ),
        (["main", "--path", "/"], {}, 2, "--path: expected a folder of .*project, relative to it"),
        (["main", "--op", "unknown"], {}, 2, "unknown operator: unknown; there are: dying, eager"),
        (
            ["main", "--suite", "slow"],
            {"slow/bench_all.py": SUITE.replace("quick=True", "quick=False")},
            2,
            r"no benchmark in slow \(bench_all.py\) has a case with quick=True for cpu, and only",
        ),
        (["main", "--build", "test -f new.txt"], {"new.txt": ""}, 6, r"main \(.* cannot be built"),
        (
            ["main", "--build", "! test -f new.txt"],
            {"new.txt": ""},
            6,
            r"the working tree \(.* cannot be built",
        ),
        (
            ["main"],
            {"benchmarks/bench_library.py": "import not_there"},
            6,
            r"cannot run its benchmarks: bench_library.py: ModuleNotFoundError.*from src, \.: name "
            "another folder of it with --path",
        ),
        (
            ["main", "--suite", "hidden"],
            {"hidden/bench_library.py": SUITE, ".gitignore": "hidden/"},
            2,
            "git ignores the benchmarks in .*/project/hidden, and a version has what git knows",
        ),
        (
            ["main"],
            {"benchmarks/bench_more.py": SUITE},
            6,
            r"main \(.*cases that are there twice: dying/small, eager/small",
        ),
        (
            ["main", "--suite", "fresh"],
            {
                "fresh/bench_fresh.py": SUITE.replace("import library", "import fresh as library"),
                "fresh.py": LIBRARY,
            },
            3,
            "nothing to compare with: the base cannot run it: .*No module named 'fresh'",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_with_a_code_of_its_own(
    project: Repository,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    files: dict[str, str],
    code: int,
    message: str,
) -> None:
    project.write(files)
    out = tmp_path / "found.json"
    assert main(["compare", *arguments, "--json", str(out)]) == code
    error = capsys.readouterr().err
    assert error.startswith("jepa-fast: ")
    assert re.search(message, error), error
    assert not out.exists()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH is new in Python 3.11")
def test_python_s_safe_path_costs_no_folder_of_its_path(
    project: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "helper.py").write_text("")
    project.write({"benchmarks/bench_library.py": f"import helper\n{SUITE}"})
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert main(["compare", "main", "--op", "steady"]) == 0


def test_a_relative_cache_is_of_the_current_folder(project: Repository) -> None:
    assert main(["compare", "main", "--op", "steady", "--cache", "snapshots"]) == 0
    assert list((project.root / "snapshots").glob("project-*/head-*/library.py"))


def test_a_base_that_fails_is_not_the_working_tree_s_fault(
    project: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write({"library.py": library(BROKEN='"all of it"')})
    git(project.root, "commit", "-qam", "dies")
    project.write({"library.py": LIBRARY})
    assert main(["compare", "HEAD", "--op", "steady", "dying"]) == 0
    output = capsys.readouterr().out
    assert "?     dying/small: not compared: the base cannot run it" in output
    assert output.splitlines()[-1] == "nothing got worse, 1 could not be told"


DRAWN = """
import random, subprocess
import numpy, pytest, torch
from jepa_fast.perf import Case, Cost, Race, benchmark

SHARE = random.random()

@benchmark([Case("drawn", "small", quick=True)])
def bench_drawn(case, device):
    subprocess.run(["cat"], check=True)  # reads all that there is to read
    kept = torch.from_numpy(numpy.random.rand(4096) < SHARE * random.random())
    x = torch.zeros(4096)
    return Race(lambda: x[kept], {}, lambda: None, Cost())

@benchmark([Case("skipped", "small", quick=True)])
def bench_skipped(case, device):
    pytest.skip("no such thing here")

@benchmark([Case("unchecked", "small", quick=True)])
def bench_unchecked(case, device):
    return Race(lambda: None, {}, lambda: pytest.importorskip("no_such_module"), Cost())
"""


def test_versions_draw_the_same_inputs_and_what_skips_itself_is_not_compared(
    project: Repository, tmp_path: Path
) -> None:
    project.write({"drawing/bench_drawn.py": DRAWN})
    out = tmp_path / "found.json"
    # Whatever the times are, they do not count.
    limits = ["--tolerance", "1", "--seconds", "0.01"]
    main(["compare", "main", "--suite", "drawing", "--json", str(out), *limits])
    cases = {case["operator"]: case for case in json.loads(out.read_text())["cases"]}
    assert cases["drawn"]["runs"]
    assert cases["drawn"]["base_bytes"] == cases["drawn"]["head_bytes"] > 0
    why = cases["skipped"]["not_compared"]
    assert why.endswith("NotHere: it skips itself: no such thing here")
    why = cases["unchecked"]["not_compared"]
    assert why.startswith("its check skips itself: could not import 'no_such_module'")
    assert cases["unchecked"]["ok"]
    assert not cases["unchecked"]["runs"]


def test_where_nothing_can_be_written_nothing_is_measured(
    project: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "main", "--json", "library.py/found.json"]) == 7
    captured = capsys.readouterr()
    assert "library.py is not a folder" in captured.err
    assert "against" not in captured.out


def test_a_result_that_would_be_a_folder_is_refused_first(
    project: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "main", "--markdown", str(tmp_path)]) == 7
    captured = capsys.readouterr()
    assert f"{tmp_path} is a folder, expected a file" in captured.err
    assert "against" not in captured.out


def test_one_file_that_cannot_be_written_costs_neither_the_verdict_nor_the_others(
    project: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    arguments = ["--op", "steady", "--markdown", "/dev/full", "--json", str(out)]
    assert main(["compare", "main", *arguments]) == 7
    assert "nothing got worse" in capsys.readouterr().out
    assert json.loads(out.read_text())["ok"]
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_what_was_compared_before_a_signal_is_written(
    project: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = "import signal; os.kill(os.getppid(), signal.SIGTERM); import time; time.sleep(600)"
    library_text = LIBRARY.replace("os._exit(3)", stop)
    project.write({"library.py": library_text.replace('BROKEN = ""', 'BROKEN = "all of it"')})
    out = tmp_path / "found.json"
    assert main(["compare", "main", "--json", str(out)]) == 130
    found = json.loads(out.read_text())
    assert found["stopped"]
    # In the order of the library; the one whose turn it was is not there.
    names = [case["operator"] for case in found["cases"]]
    assert names == ["steady", "slowed", "eager", "greedy"]
    assert "stopped by a signal" in capsys.readouterr().err


def test_the_suite_is_found_from_a_subfolder(
    project: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root / "benchmarks")
    assert main(["compare", "main", "--op", "steady"]) == 0


def test_outside_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "main"]) == 2
    assert "not a git repository" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        "--tolerance=0",
        "--tolerance=2",
        "--tolerance=5%",
        "--memory-tolerance=1.5",
        "--threads=-1",
        "--seconds=nan",
        "--device=tpu",
    ],
)
def test_wrong_options_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "main", option])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert option.partition("=")[0] in error
    assert ("expected a share, at most 1, got 2; 2 % is 0.02" in error) is (
        option[2:] == "tolerance=2"
    )
    assert ("expected a share such as 0.05, which is 5 %, got 5%" in error) is ("%" in option)
