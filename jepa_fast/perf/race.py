"""What a benchmark is: a case, and a race between our way of doing it and the others.

A benchmark file is a list of cases and a function that sets a race up for one of them::

    @benchmark([Case("my_op", "small", {"tokens": 4096}, quick=True)])
    def bench_my_op(case: Case, device: str) -> Race:
        x = torch.randn(case["tokens"], device=device)
        return Race(
            ours=lambda: my_op(x),
            others={"eager": lambda: x.exp() + 1},
            check=lambda: torch.testing.assert_close(my_op(x), x.exp() + 1),
            cost=Cost(read=x.nbytes, written=x.nbytes),
        )

`jepa-fast bench` (pytest with `jepa_fast.perf.pytest_plugin`) runs it by the protocol and
`jepa-fast compare` checks `ours` of two versions and times them against each other. This file needs
the standard library alone.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

from jepa_fast.perf.errors import NotHere, PerfError

Provider = Callable[[], object]


@dataclass(frozen=True)
class Cost:
    """What a call has to do at the least.

    Args:
        read, written: bytes of main memory, every input read once and every output written once.
        flops: floating-point operations; a multiplication and an addition are two.
    """

    read: int = 0
    written: int = 0
    flops: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.read + other.read, self.written + other.written, self.flops + other.flops)


@dataclass(frozen=True)
class Case:
    """One size at which something is measured.

    Args:
        operator: what is measured; results and the gate go by it.
        name: which of the operator's cases; unique among them.
        sizes: by the names of the field (`B`, `N`, `D`, ...), `case["B"]` for short.
        dtype: of the floating-point inputs, `"float32"`.
        devices: where it runs; sizes meant for a GPU take minutes on a CPU.
        quick: small enough for `--quick` and for the gate: some milliseconds on a CPU.
    """

    operator: str
    name: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "float32"
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False

    def __getitem__(self, size: str) -> int:
        return self.sizes[size]

    def __str__(self) -> str:
        return f"{self.operator}/{self.name}"


@dataclass(frozen=True)
class Race:
    """Several ways to do the same work.

    Args:
        ours: does the work once, on inputs made before; what is timed, and what the gate watches.
        others: by name: what a user would do otherwise. `"eager"` is the plain PyTorch reference,
            `"compile"` the same under `torch.compile`; others go by their library's name.
        check: raises if a provider is wrong, ours at the least: the gate calls no others before
            it. It runs first, and if it raises there are no numbers.
        cost: what the work takes at the least.
        backend: which backend of ours runs, for the record.
        why_not: by the name of a provider that is missing here: why.
        variants: by name: ours in other ways, such as under `torch.compile`. They are timed beside
            it, and are nothing that ours is ahead of or behind.
        numbers: by the name of a provider, `"ours"` for ours: what else is to be known of it, by
            name, where providers do not do quite the same.
    """

    ours: Provider
    others: Mapping[str, Provider]
    check: Callable[[], None]
    cost: Cost
    backend: str = ""
    why_not: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, Provider] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


SetUp = Callable[[Case, str], Race]


@dataclass(frozen=True)
class Entry:
    """A benchmark as the gate sees it: cases, and the function that sets a race up for one."""

    cases: tuple[Case, ...]
    set_up: SetUp


def benchmark(cases: Iterable[Case]) -> Callable[[SetUp], Callable[..., None]]:
    """Makes a function that sets a race up into a benchmark of all `cases`.

    In a class it is a static method, as pytest would hand another its `self`. Marks of pytest's
    count below the decorator as above it.

    Args:
        cases: what `set_up(case, device)` is called with, one after the other.

    Raises:
        TypeError: it is a method with a `self`.
    """

    def decorate(set_up: SetUp) -> Callable[..., None]:
        if next(iter(inspect.signature(set_up).parameters), None) == "self":
            raise TypeError(
                f"{set_up.__qualname__}: expected a function of case and device, got a method; "
                "in a class put @staticmethod above @benchmark and leave self out"
            )

        def bench(case: Case, device: str, race: Callable[..., None]) -> None:
            race(case, device, set_up)

        bench.__name__ = bench.__qualname__ = set_up.__name__
        bench.__doc__ = set_up.__doc__
        bench.__module__ = set_up.__module__
        if marks := _marks(set_up):
            bench.pytestmark = marks  # type: ignore[attr-defined]
        bench.entry = Entry(tuple(cases), set_up)  # type: ignore[attr-defined]
        return staticmethod(bench) if isinstance(set_up, staticmethod) else bench

    return decorate


def find_benchmarks(folder: Path) -> list[Path]:
    """The files `bench_*.py` in a folder and below it, but for those of hidden folders, virtual
    environments and builds, where pytest does not look either.
    """
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_left_out(Path(root, name))]
        found += [Path(root, name) for name in files if fnmatch(name, "bench_*.py")]
    return sorted(found)


def _is_left_out(folder: Path) -> bool:
    patterns = (".*", "__pycache__", "build", "dist", "node_modules", "venv", "*.egg")
    if any(fnmatch(folder.name, pattern) for pattern in patterns):
        return True
    return (folder / "pyvenv.cfg").exists()


def suite_files(folder: Path) -> list[Path]:
    """The benchmark files of a suite.

    Raises:
        PerfError: there are none, or two of one name.
    """
    files = find_benchmarks(folder)
    if not files:
        raise PerfError(
            f"no benchmarks (bench_*.py) in {folder}: name the folder that holds them with --suite"
        )
    counts = Counter(path.name for path in files)
    if twice := [str(path.relative_to(folder)) for path in files if counts[path.name] > 1]:
        raise PerfError(
            f"benchmark files of one name: {', '.join(twice)}; they are imported by it, so rename "
            "all but one"
        )
    return files


def load_suite(folder: Path, failed: dict[str, Exception] | None = None) -> list[Entry]:
    """Imports every benchmark file of a suite, but those that skip themselves.

    Args:
        folder: the suite's.
        failed: gets, by name, what files raised that cannot be imported; without it they raise.

    Raises:
        PerfError: as `suite_files`, and for two benchmarks with a case of the same name: of one
            nothing would be told.
    """
    modules = []
    with _beside(folder):
        for path in suite_files(folder):
            try:
                with _beside(path.parent):
                    modules.append(_load(path))
            except Exception as error:
                if failed is None:
                    raise
                failed[str(path.relative_to(folder))] = error
            except BaseException as error:
                if not is_skip(error):
                    raise
    entries: dict[int, Entry] = {}
    for module in modules:
        for own, entry in _entries(module):
            entries.setdefault(id(own), entry)  # once, where a file imports another's
    found = list(entries.values())
    check_unique((case, each) for entry in found for case in entry.cases for each in case.devices)
    return found


def _entries(module: ModuleType) -> Iterator[tuple[Entry, Entry]]:
    """The benchmarks of a file and of classes that pytest collects there.

    Each as it was made, and as its marks leave it: one that they skip has a set-up that says so.
    """
    classes = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type) and name.startswith("Test")
    ]
    for holder in (module, *classes):
        for name in vars(holder):
            value = getattr(holder, name)
            if isinstance(entry := getattr(value, "entry", None), Entry):
                marks = [*_marks(value), *_marks(holder), *_marks(module)]
                why = next(filter(None, map(_why_skipped, marks)), "")
                yield entry, replace(entry, set_up=_skipped(why)) if why else entry


def _marks(value: object) -> list[Any]:
    """What pytest.mark left there."""
    marks = getattr(value, "pytestmark", [])
    return list(marks) if isinstance(marks, list | tuple) else [marks]


def _why_skipped(mark: Any) -> str:
    """What a mark of pytest's says, if it skips; conditions in words are for pytest alone."""
    mark = getattr(mark, "mark", mark)
    met = mark.name == "skipif" and any(each is True for each in mark.args)
    if not met and mark.name != "skip":
        return ""
    positional = "".join(map(str, mark.args)) if mark.name == "skip" else ""
    return f"it is marked {mark.name}: {mark.kwargs.get('reason') or positional}".removesuffix(": ")


def _skipped(why: str) -> SetUp:
    def set_up(case: Case, device: str) -> Race:
        raise NotHere(why)

    return set_up


def is_skip(error: BaseException) -> bool:
    """Whether it is what pytest.skip and pytest.importorskip raise; pytest need not be here."""
    return type(error).__name__ == "Skipped"


@contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Files of a suite import what lies beside them, `from cases import ...`.

    Other modules of the same names, such as another suite's, stand aside for the time and are back
    afterwards. Where there are none the suite's own stay: torch.compile looks them up by name.
    """
    names = {path.stem for path in folder.glob("*.py")} & sys.modules.keys()
    aside = {name: sys.modules.pop(name) for name in names if not _is_in(folder, sys.modules[name])}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(aside)


def _is_in(folder: Path, module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().parent == folder.resolve()


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise PerfError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def check_unique(runs: Iterable[tuple[Case, str]]) -> None:
    """Raises PerfError if two cases have the same name on a device: one would replace the other."""
    counts = Counter((str(case), device) for case, device in runs)
    if twice := sorted({name for (name, _), count in counts.items() if count > 1}):
        raise PerfError(f"cases that are there twice: {', '.join(twice)}")


def check_names(what: str, wanted: Sequence[str], known: Iterable[str]) -> None:
    """Raises PerfError if one of `wanted` is not among `known`, and lists these."""
    known = sorted(set(known))
    if unknown := [name for name in wanted if name not in known]:
        raise PerfError(
            f"unknown {what}: {', '.join(unknown)}; there are: {', '.join(known) or 'none'}"
        )


def quick_entries(entries: Sequence[Entry]) -> list[tuple[Case, Any]]:
    """(case, set_up) of every quick case."""
    return [(case, entry.set_up) for entry in entries for case in entry.cases if case.quick]
