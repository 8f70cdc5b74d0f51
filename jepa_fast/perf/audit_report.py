"""What an audit finds: a report that prints as tables, and goes to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from jepa_fast.perf.errors import BaselineMissing, BaselineOfAnother, PerfError
from jepa_fast.perf.machine_code import Instructions

if TYPE_CHECKING:
    from jepa_fast.perf.audit_rules import Finding

T = TypeVar("T")

FORMAT = 1
"""Of the JSON. Other numbers are refused."""

COMPILERS = ("triton", "nvcc")


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel in one configuration, as compiled for one chip.

    Args:
        name: of the configuration, unique among those of its compiler for the chip.
        kernel: the function's name.
        chip: `"sm_90"`.
        compiler: of `COMPILERS`.
        config: constants and options, as far as JSON can say them.
        threads: of a block; None where the code does not tell (CUDA without launch bounds).
        registers: a thread.
        stack, local: bytes a thread, of memory behind registers that did not suffice.
        shared: bytes a block; of a CUDA kernel those known at compile time.
        occupancy: resident warps of those that a multiprocessor can hold, 0 to 1; 0: it cannot be
            launched. None with `threads`, and on chips whose limits are not known here.
        instructions: how many of which kinds.
    """

    name: str
    kernel: str
    chip: str
    compiler: str
    config: Mapping[str, Any]
    threads: int | None
    registers: int
    stack: int
    local: int
    shared: int
    occupancy: float | None
    instructions: Instructions

    @property
    def key(self) -> tuple[str, str, str]:
        return self.compiler, self.name, self.chip


@dataclass
class Moved:
    """What the launches of one kernel move, in bytes.

    Args:
        launches: how many.
        read, written: as asked for: a byte asked for twice counts twice.
        read_unique, written_unique: every byte once a launch.
    """

    launches: int = 0
    read: int = 0
    read_unique: int = 0
    written: int = 0
    written_unique: int = 0


@dataclass(frozen=True)
class CallTraffic:
    """What one call moves.

    Args:
        name: of the case.
        kernels: by the kernels' names, in the order of their first launches.
        torch_operations: how often PyTorch computes or copies beside them, by operation; on a GPU
            each is a launch.
        minimum_read, minimum_written: bytes, by the byte model; None: not told.
    """

    name: str
    kernels: Mapping[str, Moved]
    torch_operations: Mapping[str, int] = field(default_factory=dict)
    minimum_read: int | None = None
    minimum_written: int | None = None

    def total(self, number: str) -> int:
        """Over all kernels; `number` is a field of `Moved`."""
        return sum(getattr(moved, number) for moved in self.kernels.values())


@dataclass(frozen=True)
class Report:
    """Everything that an audit found.

    Args:
        versions: of what compiled and read the kernels.
        kernels: compiled code; None where that part was left out.
        traffic: counted in the interpreter; None where that part was left out.
        not_audited: what could not be, and why.
    """

    versions: Mapping[str, str]
    kernels: Sequence[CompiledKernel] | None
    traffic: Sequence[CallTraffic] | None
    not_audited: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As `json.dumps` takes it; `Report.from_json` reads it back."""
        return {"format": FORMAT, "kind": "audit", **asdict(self)}

    def to_text(self) -> str:
        """`to_json` as text, a line a kernel or call, as versions of a file compare well by."""
        value = self.to_json()
        rows = {name: value.pop(name) for name in ("kernels", "traffic")}
        parts = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in value.items()]
        for name, part in rows.items():
            lines = "null" if part is None else ",\n".join(json.dumps(row) for row in part)
            parts.append(f'"{name}": ' + (lines if part is None else f"[\n{lines}\n]"))
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @classmethod
    def from_json(cls, value: Any, source: str = "the report") -> Report:
        """The report that `to_json` gave.

        Raises:
            PerfError: `value` is no audit's report; `source` is named as where it came from.
            BaselineOfAnother: it is one of another format.
        """
        if not isinstance(value, dict) or value.get("kind") != "audit":
            raise PerfError(f"{source} is not the report of an audit; write one with --write")
        if value.get("format") != FORMAT:
            raise BaselineOfAnother(
                f"{source} has format {value.get('format')}, this version reads {FORMAT}: "
                f"write it anew with --write"
            )
        try:
            kernels, traffic = value["kernels"], value["traffic"]
            return _made(
                cls,
                {
                    "versions": value["versions"],
                    "kernels": None if kernels is None else [_kernel(each) for each in kernels],
                    "traffic": None if traffic is None else [_traffic(each) for each in traffic],
                    "not_audited": value["not_audited"],
                },
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PerfError(
                f"{source} is damaged: {type(error).__name__}: {error}; write it anew with --write"
            ) from error

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report in a file. Raises as `from_json`, and BaselineMissing where there is none."""
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise BaselineMissing(f"no baseline {path}: make it with --write {path}") from error
        except (ValueError, IsADirectoryError) as error:
            raise PerfError(f"{path} is not JSON: {error}") from error
        return cls.from_json(value, str(path))

    def compare(self, baseline: Report | Path | str) -> list[Finding]:
        """What got worse since `baseline`, another report or the file of one; empty: nothing did.

        Raises:
            BaselineMissing: there is no such file.
            BaselineOfAnother: it was made with another Triton (major.minor), which compiles to
                other code, or is of another format. Where one of the two holds no compiled code,
                Triton's version does not matter.
            PerfError: the file is no audit's report.
        """
        from jepa_fast.perf.audit_rules import compare

        return compare(self, _report(baseline)).findings

    def notes(self, baseline: Report | Path | str) -> list[str]:
        """What changed or is new without being worse, and what was not compared. As `compare`."""
        from jepa_fast.perf.audit_rules import compare

        return compare(self, _report(baseline)).notes

    def __str__(self) -> str:
        parts = []
        if self.kernels:
            parts.append(_table(_KERNEL_COLUMNS, map(_kernel_row, self.kernels)))
        if self.traffic:
            parts.append(_table(_TRAFFIC_COLUMNS, map(_traffic_row, self.traffic)))
        parts += [f"not audited: {what}: {why}" for what, why in self.not_audited.items()]
        return "\n\n".join(parts) or "nothing to audit"


def _report(baseline: Report | Path | str) -> Report:
    return baseline if isinstance(baseline, Report) else Report.read(Path(baseline))


def _kernel(value: dict[str, Any]) -> CompiledKernel:
    mix = value["instructions"]
    widths = {
        name: {int(width): count for width, count in mix[name].items()}
        for name in ("loads", "stores")
    }
    return _made(CompiledKernel, {**value, "instructions": _made(Instructions, {**mix, **widths})})


def _traffic(value: dict[str, Any]) -> CallTraffic:
    kernels = {name: _made(Moved, moved) for name, moved in value["kernels"].items()}
    return _made(CallTraffic, {**value, "kernels": kernels})


def _made(kind: type[T], fields: dict[str, Any]) -> T:
    """A dataclass of fields that were read. Raises TypeError for one of another type."""
    hints = get_type_hints(kind)
    for name, value in fields.items():
        if name in hints and not _is(value, hints[name]):
            raise TypeError(f"{name} cannot be {value!r:.60}")
    return kind(**fields)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value that came from JSON is of a field's type."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is UnionType:
        return any(_is(value, each) for each in inside)
    if origin is Mapping:
        return isinstance(value, dict) and all(
            _is(each, kind)
            for item in value.items()
            for each, kind in zip(item, inside, strict=True)
        )
    if origin is Sequence:
        return isinstance(value, list) and all(_is(each, inside[0]) for each in value)
    if hint in (int, float):  # True is none
        return type(value) in (int, hint)
    return isinstance(value, hint)


_KERNEL_COLUMNS = (
    "compiled kernel",
    "chip",
    "registers",
    "spills",
    "shared",
    "occupancy",
    "tensor core",
    "global loads",
    "global stores",
    "TMA",
)
_TRAFFIC_COLUMNS = (
    "call",
    "launches",
    "torch ops",
    "read",
    "distinct",
    "minimum",
    "written",
    "distinct",
    "minimum",
)


def _kernel_row(kernel: CompiledKernel) -> list[str]:
    mix = kernel.instructions
    spilled, memory = mix.local_loads + mix.local_stores, kernel.stack + kernel.local
    return [
        kernel.name,
        kernel.chip,
        str(kernel.registers),
        f"{spilled} ({memory} B)" if spilled or memory else "0",
        str(kernel.shared),
        "?" if kernel.occupancy is None else f"{100 * kernel.occupancy:.0f} %",
        _counts(mix.tensor_core),
        _counts({f"{width} B": mix.loads[width] for width in sorted(mix.loads, reverse=True)}),
        _counts({f"{width} B": mix.stores[width] for width in sorted(mix.stores, reverse=True)}),
        _counts(mix.tma),
    ]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{what} x{count}" for what, count in counts.items()) or "-"


def _traffic_row(call: CallTraffic) -> list[str]:
    least = [call.minimum_read, call.minimum_written]
    read, written = (["?" if each is None else f"{each:,}"] for each in least)
    return [
        call.name,
        str(call.total("launches")),
        str(sum(call.torch_operations.values())),
        f"{call.total('read'):,}",
        f"{call.total('read_unique'):,}",
        *read,
        f"{call.total('written'):,}",
        f"{call.total('written_unique'):,}",
        *written,
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if cell[:1].isdigit() or cell == "?" else cell.ljust(width)
            for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
