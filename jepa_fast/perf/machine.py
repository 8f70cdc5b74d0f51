"""Which machine, which versions, which commit: what a result has to say of where it comes from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jepa_fast
from jepa_fast.perf.errors import PerfError

SOURCES = ("jepa_fast", "csrc", "benchmarks", "setup.py", "pyproject.toml")
"""What decides a measurement in a checkout of jepa_fast; results and texts do not."""

_REPORTS = frozenset({".csv", ".html", ".json", ".log", ".md", ".xml"})
"""How files end that tell of measurements."""

DEVICES = ("auto", "cpu", "cuda")

_OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_PREFIX")
"""By which git tells its hooks what it is at work on."""


def choose_device(wanted: str) -> str:
    """`"cpu"` or `"cuda"`, which `"auto"` is where there is a GPU.

    Raises:
        PerfError: `"cuda"` is wanted, and there is none.
    """
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise PerfError("no CUDA GPU is visible to torch: leave the device out, or name cpu")
    if wanted == "auto":
        return "cuda" if there else "cpu"
    return wanted


def describe(device: str) -> dict[str, Any]:
    """The machine that measures on `device`, `"cpu"` or `"cuda"`.

    `name` is its short name, which results are filed under: the GPU's, or the CPU's with its cores.
    """
    import torch  # here, as git and names are wanted without its second

    cores = len(os.sched_getaffinity(0))
    cpu = _cpu_name()
    found: dict[str, Any] = {"cpu": cpu, "cores": cores, "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
        return {"name": slug(properties.name), **found, "clocks": _gpu_clocks()}
    return {"name": slug(f"{cpu} {cores} cores"), **found, "clocks": _cpu_clocks()}


def versions() -> dict[str, str]:
    """Of everything that turns source code into what is measured."""
    import torch  # here, as above

    from jepa_fast.ops import _build

    found = {
        "jepa_fast": jepa_fast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for package in ("triton", "transformers"):
        found[package] = version_of(package)
    record = _build.Record.read()
    if record is not None and record.compilers:
        found["compilers"] = "; ".join(record.compilers)
    if torch.cuda.is_available():
        found["driver"] = ", ".join(_nvidia_smi("driver_version")) or "not known"
    return found


def version_of(package: str) -> str:
    """Its installed version, or `"not installed"`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def slug(text: str) -> str:
    """A file name: lower case, words joined by `-`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def git(folder: Path, *arguments: str) -> str:
    """What `git -C folder ...` prints, of the repository that the folder is in.

    Raises:
        PerfError: git is not installed, or refuses; with its own words.
    """
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env=outside_hooks(),
            capture_output=True,
            encoding=sys.getfilesystemencoding(),
            errors="surrogateescape",  # file names may be any bytes
            check=False,
        )
    except FileNotFoundError as error:
        raise PerfError("git is not installed, and a commit was asked for") from error
    if done.returncode != 0:
        raise PerfError(f"`git {' '.join(arguments)}` in {folder}: {done.stderr.strip()}")
    return done.stdout.rstrip("\n")


def outside_hooks() -> dict[str, str]:
    """This process's environment, without what a git hook's would have another git work on.

    Of a commit it is the index: a worktree that is added would be read into it, and committed.
    """
    return {name: value for name, value in os.environ.items() if name not in _OF_A_HOOK}


def commit(folder: Path) -> str | None:
    """The commit checked out in `folder`; None outside a git checkout."""
    try:
        return git(folder, "rev-parse", "HEAD")
    except PerfError:
        return None


def uncommitted(folder: Path, paths: Sequence[str] = SOURCES) -> list[str]:
    """Files below `paths` that differ from the commit, new ones included; results left out.

    Reports that git does not know, such as `compare --json` has just written, are left out, too: at
    the root of the repository, or in a folder that holds no Python file, nor is in one that does.
    Elsewhere code may read them, and everything else, tracked or not, may be built or run.

    Args:
        folder: the root of a git repository.
        paths: in it.
    """
    there = [path for path in paths if (folder / path).exists()]
    if commit(folder) is None or not there:
        return []
    options = ("--porcelain", "-z", "--untracked-files=all")
    entries = iter(git(folder, "status", *options, "--", *there).split("\0"))
    found = []
    for entry in filter(None, entries):
        state, name = entry[:2], entry[3:]
        if state[0] in "RC":
            next(entries)  # its old name
        if "benchmarks/results/" in name or (state == "??" and _is_report(folder, name)):
            continue
        found.append(name)
    return found


def _is_report(root: Path, name: str) -> bool:
    *folders, _ = Path(name).parents  # all but the root
    beside_code = any(any((root / folder).glob("*.py")) for folder in folders)
    return Path(name).suffix in _REPORTS and not beside_code


def _cpu_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_clocks() -> dict[str, float]:
    """MHz, where readable."""
    found = [float(x.partition(":")[2]) for x in _lines("/proc/cpuinfo") if x.startswith("cpu MHz")]
    return {"cpu_mhz": max(found)} if found else {}


def _gpu_clocks() -> dict[str, float]:
    """MHz now and at most, where nvidia-smi tells."""
    keys = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
    return {
        f"{key.replace('.', '_')}_mhz": float(value)
        for key, value in zip(keys, _nvidia_smi(*keys), strict=False)
        if value.isdigit()
    }


def _nvidia_smi(*keys: str) -> list[str]:
    """What it tells of the first GPU; nothing where it is not there or does not answer."""
    query = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0 or not done.stdout:
        return []
    return [value.strip() for value in done.stdout.splitlines()[0].split(",")]


def _lines(path: str) -> Iterable[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
