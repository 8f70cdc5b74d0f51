"""Runs kernels in Triton's interpreter and records their traffic, in a process of its own.

Of its own because TRITON_INTERPRET=1 changes what `@triton.jit` makes of a function, once, when the
function is defined; and because an address out of range kills the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from jepa_fast.perf.audit_report import CallTraffic, Moved
from jepa_fast.perf.errors import BuildFailed

ANEW = "__jepa_fast_audit__"
"""The name under which a script is imported again."""


def operators_traffic(operators: Sequence[str] | None) -> list[CallTraffic]:
    """What the traffic cases of these operators move, None: of all.

    Raises:
        BuildFailed: a case does not run in the interpreter; with its last words.
    """
    wanted = None if operators is None else list(operators)
    return _run_apart({"operators": wanted})


def kernel_traffic(
    kernel: Any, launches: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> list[CallTraffic]:
    """What launches of one kernel move.

    Args:
        kernel: a function under `@triton.jit`, at the top level of a module or script that is a
            file.
        launches: of each its `name`, `grid` and `constants`.
        arguments: CPU tensors and numbers by name; each launch gets them as they are here.

    Raises:
        ValueError: the kernel's file cannot be imported anew.
        BuildFailed: a launch does not run in the interpreter.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="jepa_fast_audit_") as scratch:
        saved = Path(scratch, "arguments.pt")
        torch.save(dict(arguments), saved)
        request = {
            **_whence(kernel),
            "arguments": str(saved),
            "launches": [dict(each) for each in launches],
        }
        return _run_apart(request)


def _whence(kernel: Any) -> dict[str, Any]:
    """Where another process finds the kernel: `function` in `module`, or in the script `file`."""
    function = kernel.fn
    name = function.__qualname__
    if "<locals>" in name:
        raise ValueError(
            f"audit: kernel must be at the top level of its module to be launched in another "
            f"process, got {name}: move it there, or leave launch out"
        )
    module = sys.modules.get(function.__module__)
    spec = getattr(module, "__spec__", None)  # None: a script, or a notebook
    file = spec.origin if spec is not None else getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        raise ValueError(
            f"audit: kernel must be in a file that another process can import, got "
            f"{function.__module__}.{name}, which has none: put it into a .py file"
        )
    return {"function": name, "module": spec.name if spec is not None else None, "file": file}


def _run_apart(request: Mapping[str, Any]) -> list[CallTraffic]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="jepa_fast_audit_") as scratch:
        asked, answered = Path(scratch, "request"), Path(scratch, "answer.json")
        asked.write_bytes(pickle.dumps(dict(request)))  # constants can be Triton's dtypes
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(asked), str(answered)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise BuildFailed(_last_words(done))
        return [
            CallTraffic(
                each["name"],
                {name: Moved(**moved) for name, moved in each["kernels"].items()},
                each["torch_operations"],
                each["minimum_read"],
                each["minimum_written"],
            )
            for each in json.loads(answered.read_text())
        ]


_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from jepa_fast.perf.interpreted import answer
answer(sys.argv[2], sys.argv[3])
"""


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return (
            f"Triton's interpreter died of {name} in the last of these: a kernel loads or stores "
            f"outside of its tensors' memory; look at its masks and sizes\n{_tail(done.stdout)}"
        )
    return f"a kernel does not run in Triton's interpreter:\n{_tail(done.stderr)}"


def _tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def answer(asked: str, answered: str) -> None:
    """The other process's part: runs what the file `asked` describes, writes what it moved."""
    request = pickle.loads(Path(asked).read_bytes())
    calls = _run_operators(request) if "operators" in request else _run_kernel(request)
    Path(answered).write_text(json.dumps([asdict(call) for call in calls]))


def _run_operators(request: Mapping[str, Any]) -> list[CallTraffic]:
    from jepa_fast import ops  # noqa: F401  (registers the operators)
    from jepa_fast.ops._traffic import all_traffic_cases
    from jepa_fast.perf.traffic import record_call

    found = []
    for case in all_traffic_cases():
        if request["operators"] is None or case.operator in request["operators"]:
            print(case.name, flush=True)  # the last one printed is the one that kills the process
            record = record_call(case.call)
            beside, least = dict(record.torch_operations), case.minimum
            found.append(CallTraffic(case.name, record.kernels, beside, least.read, least.written))
    return found


def _run_kernel(request: Mapping[str, Any]) -> list[CallTraffic]:
    import torch

    from jepa_fast.perf.traffic import recording

    function: Any = _import(request)
    for name in request["function"].split("."):
        function = getattr(function, name)
    while type(function).__name__ in ("Autotuner", "Heuristics"):  # `audit` got what is inside
        function = function.fn
    found = []
    for launch in request["launches"]:
        print(launch["name"], flush=True)
        arguments = torch.load(request["arguments"], weights_only=True)
        with recording(beside=False) as record:
            function[tuple(launch["grid"])](**arguments, **launch["constants"])
        found.append(CallTraffic(launch["name"], record.kernels))
    return found


def _import(request: Mapping[str, Any]) -> ModuleType:
    """The kernel's module: by its name where that leads to the same file, else by the file."""
    name, file = request["module"], request["file"]
    try:
        spec = name and importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of a package that is not there
        spec = None
    if spec and spec.origin == file:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(ANEW, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[ANEW] = module
    spec.loader.exec_module(module)
    return module
