"""A small project with a git history, whose code says itself how long it takes."""

from __future__ import annotations

import subprocess
from pathlib import Path

LIBRARY = """
import os
import torch

MILLISECONDS = {"steady": 1.0, "slowed": 1.0, "eager": 1.0, "greedy": 1.0, "dying": 1.0}
EXTRA_BYTES = 0
BROKEN = ""
WRONG = ""

def work(name):
    if name == BROKEN:
        raise RuntimeError("no longer works")
    if name == "dying" and BROKEN == "all of it":
        os._exit(3)
    print("whatever a library prints")
    kept = torch.zeros(2**16 + (EXTRA_BYTES if name == "greedy" else 0), dtype=torch.int8)
    if name == WRONG:
        kept[0] = 7
    return MILLISECONDS[name], kept
"""
SUITE = """
import time
import library
from jepa_fast.perf import Case, Cost, Race, benchmark

CLOCK = [0.0]
time.perf_counter = lambda: CLOCK[0]

def set_up(case, device):
    def ours():
        milliseconds, kept = library.work(case.operator)
        CLOCK[0] += milliseconds / 1e3
        return kept
    def check():
        _, kept = library.work(case.operator)
        assert not kept.any(), f"{case.operator} gives {kept.max()}, not 0\\nin the first element"
    return Race(ours, {}, check, Cost())

bench = benchmark([Case(name, "small", quick=True) for name in library.MILLISECONDS])(set_up)
"""


def library(**changed: str) -> str:
    """Its source code, with other constants."""
    lines = []
    for line in LIBRARY.splitlines():
        name = line.partition(" = ")[0]
        lines.append(f"{name} = {changed[name]}" if name in changed else line)
    return "\n".join(lines)


def git(folder: Path, *arguments: str) -> str:
    """What git prints."""
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Repository:
    """A project with a library, its suite, and one commit."""

    def __init__(self, root: Path, files: dict[str, str]) -> None:
        self.root = root
        root.mkdir()
        git(root, "init", "-q", "-b", "main")
        self.write(files)
        self.commit()

    def write(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def commit(self) -> str:
        git(self.root, "add", "-A")
        git(self.root, "commit", "-q", "-m", "A commit")
        return git(self.root, "rev-parse", "HEAD")
