"""The process that runs one version. Started as a file, with that version first on the path.

    python worker.py '{"root": ..., "suite": ..., "device": ..., "paths": [...], ...}'

`root` is the version, `suite` the folder of benchmarks, which both versions run, `paths` are those
below `root` that its code is imported from; `repository` and `other` are the working tree and the
other version, whose code it must not run. It answers one JSON object a line on stdout to each
command on stdin, until that closes:

    {"do": "list"}                              cases that can be compared, files that fail
    {"do": "open", "case": i}                   sets the case up, anew if it is set up already
    {"do": "check"}                             what the open case's check raised, or "", and why
                                                it skipped itself, or ""; lets go of the case
    {"do": "pin", "core": i}                    stays on that core
    {"do": "turn", "calls": n}                  seconds of each of n calls, after one that is not
    {"do": "memory"}                            peak allocation of a call, in bytes
    {"do": "close"}                             lets go of the case

`{"error": "..."}` answers what cannot be done, and `{"not its own": "..."}` what shows that the
version runs the code of another.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from jepa_fast.perf.race import Race

_PERF = Path(__file__).resolve().parents[1]


def main() -> None:
    """Answers until stdin closes."""
    version = json.loads(sys.argv[1])
    questions, answers = _own_stdin(), _own_stdout()
    _import_from(Path(version["root"]), version["paths"], Path(version["repository"]))
    worker = None
    for line in questions:
        command = json.loads(line)
        try:
            worker = worker or Worker(version)
            answer = worker.answer(command)
        except _NotItsOwn as error:
            answer = {"not its own": str(error)}
        except Exception as error:
            # Said to the parent, which decides: a version may be unable to run a case.
            answer = {"error": _told(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _own_stdin() -> TextIO:
    """The stream of commands; a process that a benchmark starts would read them, and reads none."""
    questions = os.fdopen(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return questions


def _own_stdout() -> TextIO:
    """The stream of answers; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _import_from(root: Path, paths: list[str], repository: Path) -> None:
    """A version's folders come first, and the working tree's, for which they stand, not at all."""
    own = [str(root / path) for path in paths if (root / path).is_dir()]
    instead_of = {(repository / path).resolve() for path in paths}
    instead_of.add(Path(__file__).resolve().parent)  # first on the path, but for PYTHONSAFEPATH
    sys.path[:] = [*own, *(each for each in sys.path if Path(each).resolve() not in instead_of)]
    sys.path.append(str(_PERF.parents[1]))  # for a repository that only uses jepa_fast


def _use_this_harness() -> None:
    """Both versions are measured by this one's `jepa_fast.perf`, also of a jepa_fast without it."""
    package = importlib.import_module("jepa_fast")
    name = "jepa_fast.perf"
    spec = importlib.util.spec_from_file_location(
        name, _PERF / "__init__.py", submodule_search_locations=[str(_PERF)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{_PERF} is not a package")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    package.perf = module  # type: ignore[attr-defined]


class _NotItsOwn(Exception):
    """The version runs code of another."""


class Worker:
    """What the process holds.

    Args:
        version: what the process was started with.

    Raises:
        _NotItsOwn: the benchmarks import code of another version.
    """

    def __init__(self, version: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        _use_this_harness()
        from jepa_fast.perf.gate.imports import Imports
        from jepa_fast.perf.race import load_suite, quick_entries

        root, suite, repository, other = (
            Path(version[name]) for name in ("root", "suite", "repository", "other")
        )
        device = version["device"]
        _seed()  # a file may draw as it is imported
        self._failed: dict[str, Exception] = {}
        self._cases = quick_entries(load_suite(suite, self._failed))
        self._imports = Imports(root, suite, version["paths"], repository, other)
        self._check_imports()
        self._device = device
        self._race: Race | None = None
        self._seconds = _event_seconds(torch) if device == "cuda" else _wall_seconds

    def answer(self, command: dict[str, Any]) -> Any:
        """What a command gives."""
        doing: dict[str, Callable[..., Any]] = {
            "list": self._list,
            "pin": self._pin,
            "open": self._open,
            "check": self._check,
            "turn": self._turn,
            "memory": self._memory,
            "close": self._close,
        }
        return doing[command.pop("do")](**command)

    def _list(self) -> dict[str, Any]:
        return {
            "cases": [
                {
                    "operator": case.operator,
                    "case": case.name,
                    "devices": list(case.devices),
                    "sizes": dict(case.sizes),
                    "dtype": case.dtype,
                }
                for case, _ in self._cases
            ],
            "failed": {name: _told(error) for name, error in self._failed.items()},
        }

    def _pin(self, core: int) -> dict[str, Any]:
        os.sched_setaffinity(0, {core})
        return {}

    def _open(self, case: int) -> dict[str, Any]:
        from jepa_fast.perf.errors import NotHere
        from jepa_fast.perf.race import is_skip

        self._race = None
        _seed()
        known, set_up = self._cases[case]
        try:
            self._race = set_up(known, self._device)
            self._race.ours()
        except BaseException as error:
            if not is_skip(error):
                raise
            raise NotHere(f"it skips itself: {error}") from error
        return {}

    def _check(self) -> tuple[str, str]:
        from jepa_fast.perf.race import is_skip

        # A check may leave behind what it likes: what is measured is set up anew.
        race, self._race = self._opened(), None
        wrong = skipped = ""
        try:
            race.check()
        except Exception as error:
            wrong = _told_in_full(error)
        except BaseException as error:
            if not is_skip(error):
                raise
            skipped = str(error) or "it does not say why"
        self._check_imports()  # once more: some is imported only where it is needed
        return wrong, skipped

    def _turn(self, calls: int) -> list[float]:
        call = self._opened().ours
        call()
        gc.disable()
        try:
            return [self._seconds(call) for _ in range(calls)]
        finally:
            gc.enable()

    def _memory(self) -> int:
        from jepa_fast.perf.memory import peak_allocation

        return peak_allocation(self._opened().ours, self._device)

    def _close(self) -> dict[str, Any]:
        self._race = None
        return {}

    def _check_imports(self) -> None:
        if why := self._imports.why_not_own():
            raise _NotItsOwn(why)

    def _opened(self) -> Race:
        if self._race is None:
            raise RuntimeError("no case is open")
        return self._race


def _seed() -> None:
    """The same inputs for both versions, whoever draws them.

    Other inputs are other work: of a mask that is drawn, say, time and memory go by what it keeps.
    """
    import torch

    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def _told(error: Exception) -> str:
    """In a line."""
    return _told_in_full(error).splitlines()[0].removesuffix(": ")


def _told_in_full(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _wall_seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _event_seconds(torch: Any) -> Callable[[Callable[[], object]], float]:
    """A clock for a GPU, with a cold L2; as in the benchmarks' protocol."""
    from jepa_fast.perf.protocol import EventClock

    clock = EventClock()
    return lambda call: clock.seconds(call, 1)


if __name__ == "__main__":
    main()
