"""One version's process, seen from the one that asks."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from jepa_fast.perf.errors import BuildFailed, PerfError

SOURCES = ("src", ".")
"""Below a version's root, where its code is imported from, whatever else is."""
_PATIENCE_SECONDS = 600.0
"""For one answer; a case that takes longer hangs."""
_SAME = {"PYTHONHASHSEED": "0"}
"""Of both. The allocator is left as it is: told to keep memory, it gives every set-up of a case the
same pages, and which these are shifts all times of a process by per cents."""


class SideFailed(PerfError):
    """A version cannot do what it was asked for; says what it raised.

    Args:
        side: the version's process.
        why: what it cannot do.
    """

    def __init__(self, side: Side, why: str) -> None:
        super().__init__(f"{side.label}: {why}")
        self.side = side


class NotItsOwn(BuildFailed):
    """A version runs code of another: with the same code on both sides none would be slower."""


@dataclass(frozen=True)
class Setting:
    """How versions are run.

    Args:
        suite: folder of the benchmarks, the same for both.
        repository: the working tree that they are versions of.
        device: `"cpu"` or `"cuda"`.
        threads: of torch.
        paths: below a version's root, where its code is imported from.
    """

    suite: Path
    repository: Path
    device: str = "cpu"
    threads: int = 1
    paths: tuple[str, ...] = SOURCES


class Side:
    """A version's process.

    Args:
        root: the version's files.
        label: it, for messages.
        setting: how it is run.
        other: the root of the other version.
    """

    def __init__(self, root: Path, label: str, setting: Setting, other: Path) -> None:
        self.label = label
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        threads = str(setting.threads)
        environment = {**os.environ, **_SAME, "OMP_NUM_THREADS": threads}
        worker = Path(__file__).with_name("worker.py")
        version = {
            "root": str(root),
            "suite": str(setting.suite),
            "device": setting.device,
            "paths": setting.paths,
            "repository": str(setting.repository),
            "other": str(other),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(worker), json.dumps(version)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            cwd=root,
        )
        self._questions = cast(IO[bytes], self._process.stdin)
        self._answers = cast(IO[bytes], self._process.stdout)

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    def send(self, do: str, **arguments: Any) -> None:
        """Asks, without waiting for the answer."""
        line = json.dumps({"do": do, **arguments}) + "\n"
        with suppress(BrokenPipeError):  # the answer that does not come says why
            os.write(self._questions.fileno(), line.encode())

    def receive(self) -> Any:
        """The next answer.

        Raises:
            SideFailed: it is an error, or the process ended, or does not answer.
            NotItsOwn: it runs code of another version, so that nothing would be compared.
        """
        if not select.select([self._answers], [], [], _PATIENCE_SECONDS)[0]:
            self.close()
            raise SideFailed(self, f"no answer for {_PATIENCE_SECONDS:.0f} s")
        line = self._answers.readline()
        if not line:
            self.close()
            ended = f"its process ended with {self._process.returncode}"
            raise SideFailed(self, f"{ended}\n{self._said()}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "not its own" in answer:
            raise NotItsOwn(f"{self.label}: {answer['not its own']}")
        if isinstance(answer, dict) and "error" in answer:
            raise SideFailed(self, answer["error"])
        return answer

    def ask(self, do: str, **arguments: Any) -> Any:
        """Asks and waits. Raises as `receive`."""
        self.send(do, **arguments)
        return self.receive()

    def close(self) -> None:
        """Ends the process."""
        self._questions.close()
        self._answers.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _said(self) -> str:
        """The end of what it printed."""
        self._errors.seek(0)
        return "\n".join(self._errors.read().decode(errors="replace").splitlines()[-20:])
