"""Base against the working tree, case by case: the run as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jepa_fast.perf.errors import BaselineMissing, BuildFailed, PerfError
from jepa_fast.perf.gate.decision import Verdict
from jepa_fast.perf.gate.pair import CaseName, Pair
from jepa_fast.perf.gate.sampling import Sample, sample
from jepa_fast.perf.gate.sides import Setting, SideFailed
from jepa_fast.perf.gate.snapshots import Snapshot
from jepa_fast.perf.race import check_names, suite_files
from jepa_fast.perf.signals import interruptible
from jepa_fast.perf.summary import Check

MEMORY_SLACK_BYTES = 1024
"""Growth up to here is none: a scalar here or there."""


@dataclass(frozen=True)
class Limits:
    """What is allowed.

    Args:
        slow_down: as a fraction.
        memory: growth of the peak allocation, as a fraction.
        seconds: that the timing of a case may take, in each of two runs.
    """

    slow_down: float = 0.02
    memory: float = 0.01
    seconds: float = 20.0


@dataclass
class Finding:
    """What came of one case.

    Args:
        operator, case: which one.
        runs: one sample, and a second one where the first says slower.
        base_bytes, head_bytes: peak allocation of a call.
        memory_grew: beyond the limit.
        wrong: what its check raised in the working tree; it then has no numbers.
        base_wrong: what its check raised in the base: as little.
        broken: why the working tree cannot run it, which the base can.
        not_compared: why there is nothing to compare.
    """

    operator: str
    case: str
    runs: list[Sample] = field(default_factory=list)
    base_bytes: int | None = None
    head_bytes: int | None = None
    memory_grew: bool = False
    wrong: str = ""
    base_wrong: str = ""
    broken: str = ""
    not_compared: str = ""

    @property
    def name(self) -> str:
        return f"{self.operator}/{self.case}"

    @property
    def suspect(self) -> bool:
        """Slower in the last run that there was."""
        return bool(self.runs) and self.runs[-1].verdict is Verdict.SLOWER

    @property
    def slower(self) -> bool:
        """In both runs."""
        return len(self.runs) == 2 and all(run.verdict is Verdict.SLOWER for run in self.runs)

    @property
    def ok(self) -> bool:
        return not (self.slower or self.memory_grew or self.wrong or self.broken)


@dataclass(frozen=True)
class Comparison:
    """All findings, and of what.

    Args:
        base, head: the versions.
        setting: how they were run.
        limits: what was allowed.
        findings: a case each.
        floors: what this machine's floors say of the working tree.
        stopped: by a signal (Ctrl-C, SIGTERM); the findings are those made before.
    """

    base: Snapshot
    head: Snapshot
    setting: Setting
    limits: Limits
    findings: list[Finding]
    floors: list[Check] = field(default_factory=list)
    stopped: bool = False

    @property
    def ok(self) -> bool:
        findings = all(finding.ok for finding in self.findings)
        return findings and all(floor.ok for floor in self.floors)


def compare(
    base: Snapshot,
    head: Snapshot,
    setting: Setting,
    limits: Limits,
    operators: Sequence[str] = (),
    tell: Callable[[Finding], None] = lambda finding: None,
) -> Comparison:
    """Measures the suite's quick cases on both versions, and what looks slower once more.

    What is wrong by its own check, in either version, is not measured. A signal ends it early, with
    what was found before.

    The second run has processes of its own: where a process happens to have its code and data
    shifts its times for as long as it lives.

    Args:
        base, head: the versions, built.
        setting: how they are run.
        limits: what is allowed.
        operators: which; none: all.
        tell: gets each finding as it is made, or changed by the second run.

    Raises:
        PerfError: an operator is not known, or there is no quick case.
        BaselineMissing: the base can run none of the cases.
        BuildFailed: a version does not start, or runs code that is not its own, or the working tree
            cannot run its benchmarks.
    """
    findings: list[Finding] = []
    try:
        with interruptible():
            _find(findings, base, head, setting, limits, operators, tell)
    except KeyboardInterrupt:
        return Comparison(base, head, setting, limits, findings, stopped=True)
    return Comparison(base, head, setting, limits, findings)


def _find(
    findings: list[Finding],
    base: Snapshot,
    head: Snapshot,
    setting: Setting,
    limits: Limits,
    operators: Sequence[str],
    tell: Callable[[Finding], None],
) -> None:
    """Adds the findings one by one. Raises as `compare`."""
    with _started(base, head, setting) as pair:
        for case in _cases(pair, head, setting, operators):
            findings.append(_first(pair, case, limits))
            tell(findings[-1])
    if all(finding.not_compared and finding.ok for finding in findings):
        reasons = "; ".join(sorted({finding.not_compared for finding in findings}))
        raise BaselineMissing(f"there is nothing to compare with: {reasons}")
    if suspects := [finding for finding in findings if finding.suspect]:
        with _started(base, head, setting) as pair:
            for finding in suspects:
                _second(pair, finding, limits)
                tell(finding)


def _started(base: Snapshot, head: Snapshot, setting: Setting) -> Pair:
    try:
        return Pair(base, head, setting)
    except SideFailed as error:
        raise BuildFailed(str(error)) from error


def _cases(
    pair: Pair, head: Snapshot, setting: Setting, operators: Sequence[str]
) -> list[CaseName]:
    """What is to be compared: the cases of the working tree's suite."""
    if broken := "; ".join(f"{name}: {why}" for name, why in pair.failed[1].items()):
        hint = ""
        if ModuleNotFoundError.__name__ in broken:
            folders = ", ".join(setting.paths)
            hint = f" (code is imported from {folders}: name another folder of it with --path)"
        raise BuildFailed(f"{head.label} cannot run its benchmarks: {broken}{hint}")
    known = list(pair.cases[1])
    if not known:
        # Versions run from copies; the user knows the suite by its place in the repository.
        inside = setting.suite.is_relative_to(head.root)
        suite = setting.suite.relative_to(head.root) if inside else setting.suite
        files = ", ".join(
            str(file.relative_to(setting.suite)) for file in suite_files(setting.suite)
        )
        raise PerfError(
            f"no benchmark in {suite} ({files}) has a case with quick=True for {setting.device}, "
            "and only those are compared: Case(..., quick=True)"
        )
    check_names("operator", operators, [operator for operator, _ in known])
    return [case for case in known if not operators or case[0] in operators]


def _first(pair: Pair, case: CaseName, limits: Limits) -> Finding:
    """A case for the first time: whether both can run it, and are right, memory, then times."""
    finding = Finding(*case)
    in_base, in_head = pair.open(case)
    if in_base:
        finding.not_compared = f"the base cannot run it: {in_base}"
        if in_head:
            finding.not_compared = f"neither version can run it: {in_head}"
    elif in_head:
        finding.broken = in_head
    skipped = ["", ""]
    try:
        if not in_head:
            finding.wrong, skipped[1] = pair.head.ask("check")
        if not in_base:
            finding.base_wrong, skipped[0] = pair.base.ask("check")
        if any(skipped) and not finding.not_compared:
            finding.not_compared = f"its check skips itself: {skipped[1] or skipped[0]}"
        if not (in_head or finding.not_compared or finding.wrong or finding.base_wrong):
            _measure(pair, finding, limits)
    except SideFailed as error:
        _blame(pair, finding, error)
    pair.close()
    return finding


def _measure(pair: Pair, finding: Finding, limits: Limits) -> None:
    """Memory and times of a case that both can run. Raises SideFailed if one cannot, after all."""
    case = (finding.operator, finding.case)
    for side, number in zip((pair.base, pair.head), _numbers(pair, case), strict=True):
        side.ask("open", case=number)
    finding.base_bytes = pair.base.ask("memory")
    finding.head_bytes = pair.head.ask("memory")
    most = finding.base_bytes * (1 + limits.memory) + MEMORY_SLACK_BYTES
    finding.memory_grew = finding.head_bytes > most
    finding.runs.append(_sample(pair, case, limits))


def _blame(pair: Pair, finding: Finding, error: SideFailed) -> None:
    """Notes what one of the versions could not do: of the base it is no fault of the other's."""
    if error.side is pair.base:
        finding.not_compared = f"the base cannot run it: {error}"
    else:
        finding.broken = str(error)


def _second(pair: Pair, finding: Finding, limits: Limits) -> None:
    """A case once more."""
    case = (finding.operator, finding.case)
    in_base, finding.broken = pair.open(case)
    if in_base:
        finding.not_compared = f"the base cannot run it: {in_base}"
    elif not finding.broken:
        try:
            finding.runs.append(_sample(pair, case, limits))
        except SideFailed as error:
            _blame(pair, finding, error)
    pair.close()


def _sample(pair: Pair, case: CaseName, limits: Limits) -> Sample:
    numbers = _numbers(pair, case)
    return sample(pair.base, pair.head, numbers, limits.slow_down, limits.seconds)


def _numbers(pair: Pair, case: CaseName) -> tuple[int, int]:
    of_base, of_head = pair.cases
    return of_base[case], of_head[case]
