"""When an audit is worse than another, and what a reader is told.

What fails:

- `vanished`: a kernel or call of the baseline is not there any more.
- `spill`: more loads or stores of local memory, or more bytes of stack or local memory.
- `tensor core`: fewer matrix instructions of a kind, and not more of a later generation (mma.sync,
  wgmma, tcgen05), which does the work of many in one.
- `narrower access`: the widest global load (or store) moves fewer bytes than before, or a larger
  share of them, and more of them, is below 16 bytes. Shares, so that unrolling a loop, which
  multiplies all, is no finding; counts, so that unrolling less, which leaves the few scalar loads
  before the loop a larger share, is none either.
- `does not fit`: no block of the kernel fits on the chip.
- `traffic`: a call reads or writes more bytes, in all or distinct ones.
- `launches`: a call launches more kernels, or has PyTorch compute or copy more often beside them.

What is only noted: registers, shared memory and bulk copies that changed, a lower occupancy (fewer
blocks that keep more in registers are often the faster ones, and the benchmarks tell), new kernels,
and what could not be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jepa_fast.perf.audit_report import CallTraffic, CompiledKernel, Report
from jepa_fast.perf.errors import BaselineOfAnother
from jepa_fast.perf.machine_code import Widths

_FULL_WIDTH = 16

_Number = tuple[str, str, int | str, int | str]
"""Rule, what is counted, before, after."""
_Worse = Callable[[CompiledKernel, CompiledKernel], list["Finding"]]


@dataclass(frozen=True)
class Finding:
    """One number that got worse.

    Args:
        rule: of those above.
        kernel: the function's name; of a call, those whose number rose.
        name: of the configuration, or of the call.
        chip: `"sm_90"`; of a call `"any chip"`.
        number: what is counted.
        before, after: the values.
    """

    rule: str
    kernel: str
    name: str
    chip: str
    number: str
    before: int | str
    after: int | str

    def __str__(self) -> str:
        return (
            f"{self.rule}: {self.kernel} [{self.name}] on {self.chip}: "
            f"{self.number} {self.before} -> {self.after}"
        )


@dataclass
class Comparison:
    """What got worse, and what changed, is new, or was not compared."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(now: Report, before: Report) -> Comparison:
    """`now` against `before`, both compiled by the same Triton.

    CUDA kernels are compared where both were compiled by the same release of nvcc, and noted as not
    compared elsewhere.

    Raises:
        BaselineOfAnother: both hold kernels of Triton's, of different versions (major.minor).
    """
    check_triton(now, before)
    return _compare(now, before, _compiled_worse)


def compare_across_tritons(now: Report, before: Report) -> Comparison:
    """`now` against `before`, whose Triton may be another and so count its instructions otherwise.

    Launches and traffic as in `compare`. Of compiled code, what no version may do: spill at all,
    lose the tensor cores altogether, or move memory by narrower accesses.
    """
    return _compare(now, before, _compiled_worse_across_tritons)


def triton_release(report: Report) -> str:
    """`"3.8"`: what decides about Triton's machine code."""
    return ".".join(report.versions.get("triton", "?").split(".")[:2])


def check_triton(now: Report, before: Report) -> None:
    """Raises BaselineOfAnother if compiled code of the two cannot be compared."""
    if now.kernels is None or before.kernels is None:
        return
    ours, theirs = triton_release(now), triton_release(before)
    if ours != theirs:
        raise BaselineOfAnother(
            f"the baseline's kernels were compiled by Triton {before.versions.get('triton', '?')}, "
            f"these by {now.versions.get('triton', '?')}, and versions differ in machine code: "
            f"install triton=={theirs}.*, make a baseline for {ours} with --write, or compare what "
            f"does not depend on it with --traffic-only"
        )


def check_chips(targets: Sequence[str], before: Report) -> None:
    """Raises BaselineOfAnother if no kernel of the baseline was compiled for one of these chips."""
    chips = {kernel.chip for kernel in before.kernels or ()}
    if chips and chips.isdisjoint(targets):
        raise BaselineOfAnother(
            f"the baseline's kernels are of {', '.join(sorted(chips))}, and none of "
            f"{', '.join(targets)}: choose chips with --target, or make a baseline with --write"
        )


def _compare(now: Report, before: Report, worse: _Worse) -> Comparison:
    result = Comparison()
    parts = (
        ("compiled kernels", now.kernels, before.kernels),
        ("traffic", now.traffic, before.traffic),
    )
    for what, found, expected in parts:
        if found is not None and expected is None:
            result.notes.append(f"not compared: {what}, as the baseline holds none")
        if found is None and expected is not None:
            result.notes.append(f"not compared: {what}, which this audit left out")
    if now.kernels is not None and before.kernels is not None:
        _compare_compiled(now, before, worse, result)
    if now.traffic is not None and before.traffic is not None:
        _compare_calls(now.traffic, before.traffic, result)
    return result


def _compare_compiled(now: Report, before: Report, worse: _Worse, result: Comparison) -> None:
    skipped = _why_not_cuda(now, before)
    if skipped:
        result.notes.append(f"not compared: CUDA kernels: {skipped}")
    kept = [
        {each.key: each for each in kernels or () if not skipped or each.compiler != "nvcc"}
        for kernels in (now.kernels, before.kernels)
    ]
    after_by_key, before_by_key = kept
    for key, old in before_by_key.items():
        new = after_by_key.get(key)
        if new is None:
            result.findings.append(
                Finding("vanished", old.kernel, old.name, old.chip, "kernel", "there", "gone")
            )
        else:
            result.findings += worse(new, old)
            result.notes += _changes(new, old)
    result.notes += [
        f"new: {new.kernel} [{new.name}] on {new.chip}"
        for key, new in after_by_key.items()
        if key not in before_by_key
    ]


def _why_not_cuda(now: Report, before: Report) -> str:
    ours, theirs = now.versions.get("nvcc"), before.versions.get("nvcc")
    if ours == theirs:
        return ""
    if theirs is None:
        return "the baseline holds none"
    if ours is None:
        return now.not_audited.get("CUDA kernels", "none were audited")
    return f"nvcc {ours} compiled these, {theirs} those of the baseline"


def _compiled_worse(new: CompiledKernel, old: CompiledKernel) -> list[Finding]:
    numbers: list[_Number] = [
        ("spill", what, before, after)
        for (what, before), after in zip(_spills(old).items(), _spills(new).values(), strict=True)
        if after > before
    ]
    cores, earlier = new.instructions.tensor_core, old.instructions.tensor_core
    numbers += [
        ("tensor core", f"{opcode} instructions", count, cores.get(opcode, 0))
        for opcode, count in earlier.items()
        if cores.get(opcode, 0) < count and not _more_of_later(cores, earlier, opcode)
    ]
    numbers += _narrower_and_unfit(new, old)
    return _findings(new, numbers)


def _more_of_later(cores: Mapping[str, int], earlier: Mapping[str, int], opcode: str) -> bool:
    return any(
        count > earlier.get(other, 0) and _generation(other) > _generation(opcode)
        for other, count in cores.items()
    )


def _generation(opcode: str) -> int:
    """0 for those of mma.sync (HMMA), 1 for wgmma's (HGMMA), 2 for tcgen05's (UTCHMMA)."""
    return 2 if opcode.startswith("UTC") else int("GMMA" in opcode)


def _compiled_worse_across_tritons(new: CompiledKernel, old: CompiledKernel) -> list[Finding]:
    numbers: list[_Number] = [
        ("spill", what, "none allowed", count) for what, count in _spills(new).items() if count
    ]
    if old.instructions.tensor_core and not new.instructions.tensor_core:
        count = sum(old.instructions.tensor_core.values())
        numbers.append(("tensor core", "matrix instructions", count, 0))
    numbers += _narrower_and_unfit(new, old)
    return _findings(new, numbers)


def _findings(kernel: CompiledKernel, numbers: Sequence[_Number]) -> list[Finding]:
    return [
        Finding(rule, kernel.kernel, kernel.name, kernel.chip, what, before, after)
        for rule, what, before, after in numbers
    ]


def _spills(kernel: CompiledKernel) -> dict[str, int]:
    return {
        "local loads": kernel.instructions.local_loads,
        "local stores": kernel.instructions.local_stores,
        "bytes of stack": kernel.stack,
        "bytes of local memory": kernel.local,
    }


def _narrower_and_unfit(new: CompiledKernel, old: CompiledKernel) -> Iterator[_Number]:
    for what in ("loads", "stores"):
        widths = getattr(new.instructions, what), getattr(old.instructions, what)
        if worse := _narrower(what, *widths):
            yield ("narrower access", *worse)
    if new.occupancy == 0 and old.occupancy != 0:
        yield "does not fit", "occupancy", f"{old.occupancy}", "0"


def _narrower(what: str, new: Widths, old: Widths) -> tuple[str, int | str, int | str] | None:
    """What is worse about the widths of loads or stores, if anything."""
    all_new, all_old = sum(new.values()), sum(old.values())
    if not all_new or not all_old:
        return None  # by other means now, such as TMA, or not at all: the traffic tells
    if max(new) < max(old):
        return f"bytes of the widest global {what}", max(old), max(new)
    for width in sorted(width for width in new if width < _FULL_WIDTH):
        narrow_new, narrow_old = (
            sum(count for each, count in widths.items() if each <= width) for widths in (new, old)
        )
        if narrow_new > narrow_old and narrow_new * all_old > narrow_old * all_new:
            number = f"global {what} of at most {width} bytes"
            return number, f"{narrow_old} of {all_old}", f"{narrow_new} of {all_new}"
    return None


def _changes(new: CompiledKernel, old: CompiledKernel) -> list[str]:
    pairs = {
        "registers": (old.registers, new.registers),
        "bytes of shared memory": (old.shared, new.shared),
        "occupancy": (old.occupancy, new.occupancy),
        "bulk copies": (_text(old.instructions.tma), _text(new.instructions.tma)),
    }
    changed = [f"{what} {a} -> {b}" for what, (a, b) in pairs.items() if a != b]
    if not changed:
        return []
    return [f"changed: {new.kernel} [{new.name}] on {new.chip}: {', '.join(changed)}"]


def _text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{what} x{count}" for what, count in counts.items()) or "none"


def _compare_calls(
    now: Sequence[CallTraffic], before: Sequence[CallTraffic], result: Comparison
) -> None:
    calls = {call.name: call for call in now}
    for old in before:
        new = calls.pop(old.name, None)
        if new is None:
            kernels = ", ".join(old.kernels)
            result.findings.append(
                Finding("vanished", kernels, old.name, "any chip", "call", "there", "gone")
            )
        else:
            result.findings += _call_worse(new, old)
    result.notes += [f"new: call [{name}]" for name in calls]


_MOVED = {
    "read": "bytes read",
    "read_unique": "distinct bytes read",
    "written": "bytes written",
    "written_unique": "distinct bytes written",
}


def _call_worse(new: CallTraffic, old: CallTraffic) -> Iterator[Finding]:
    for number, what in {"launches": "launches", **_MOVED}.items():
        before, after = old.total(number), new.total(number)
        if after > before:
            rule = "launches" if number == "launches" else "traffic"
            kernels = ", ".join(_risen(new, old, number))
            yield Finding(rule, kernels, new.name, "any chip", what, before, after)
    before, after = (sum(call.torch_operations.values()) for call in (old, new))
    if after > before:
        risen = [
            name
            for name, count in new.torch_operations.items()
            if count > old.torch_operations.get(name, 0)
        ]
        what = f"PyTorch's own operations ({', '.join(risen)} more often)"
        kernels = ", ".join(new.kernels)
        yield Finding("launches", kernels, new.name, "any chip", what, before, after)


def _risen(new: CallTraffic, old: CallTraffic, number: str) -> list[str]:
    """The kernels of whose launches a number is higher than before."""
    return [
        name
        for name, moved in new.kernels.items()
        if name not in old.kernels or getattr(moved, number) > getattr(old.kernels[name], number)
    ]
