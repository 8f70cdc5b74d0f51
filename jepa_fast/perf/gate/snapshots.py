"""Two versions of a repository side by side, each built once and kept for the next time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jepa_fast.perf.errors import BuildFailed, PerfError
from jepa_fast.perf.files import write_text
from jepa_fast.perf.machine import git, outside_hooks, version_of

_KEPT = 8
"""Snapshots of one repository; older ones are deleted."""
_DONE = ".jepa-fast-built"
"""The file that says that a snapshot is whole and built."""


@dataclass(frozen=True)
class Snapshot:
    """One version, ready to run.

    Args:
        root: its files.
        label: for people: `origin/main (1a2b3c4d)`.
        commit: what is checked out, or what the working tree stands on.
        changed: files that differ from the commit.
    """

    root: Path
    label: str
    commit: str
    changed: tuple[str, ...] = ()


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/jepa_fast/compare`, as a rule `~/.cache/jepa_fast/compare`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "jepa_fast", "compare")


class Snapshots:
    """The snapshots of one repository.

    Args:
        repository: a folder in its working tree.
        cache: where snapshots are kept.
        build: the shell command that builds a version, run in its root; None: whatever a checkout
            of jepa_fast needs, and nothing elsewhere.
        environment: of the command, beside this process's.

    Raises:
        PerfError: there is no git repository.
    """

    def __init__(
        self,
        repository: Path,
        cache: Path,
        build: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.root = Path(git(repository, "rev-parse", "--show-toplevel"))
        self._build = build
        self._environment = environment or {}
        digest = hashlib.sha256(str(self.root).encode()).hexdigest()[:8]
        self._folder = cache.resolve() / f"{self.root.name}-{digest}"
        # A library that was built with one torch is not the one for the next.
        told = [build or "", sys.version, version_of("torch"), *map(str, self._environment.items())]
        self._toolchain = hashlib.sha256("\0".join(told).encode()).hexdigest()[:8]

    def base(self, ref: str) -> Snapshot:
        """The version that a git ref names, as a worktree of the repository.

        Raises:
            PerfError: there is no such commit here.
            BuildFailed: it cannot be built.
        """
        try:
            commit = git(self.root, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        except PerfError as error:
            raise PerfError(
                f"there is no commit {ref!r} in {self.root}: fetch it (in CI: a checkout with its "
                "history, as with `fetch-depth: 0`)"
            ) from error
        target = self._folder / f"base-{commit[:16]}-{self._toolchain}"
        label = f"{ref} ({commit[:8]})" if not commit.startswith(ref) else commit[:8]
        with self._only_one(target):
            if not (target / _DONE).exists():
                self._remove(target)
                # Forced twice: git, killed while it adds one, leaves it locked.
                force = ("--force", "--force")
                git(self.root, "worktree", "add", "--detach", *force, str(target), commit)
                self._make(target, label)
        return Snapshot(target, label, commit)

    def head(self) -> Snapshot:
        """The working tree as it is now, with uncommitted and new files, without ignored ones.

        Raises:
            PerfError: git refuses.
            BuildFailed: it cannot be built.
        """
        commit = git(self.root, "rev-parse", "HEAD")
        listed = git(
            self.root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"
        ).split("\0")
        names = sorted({name for name in listed if name and _is_there(self.root / name)})
        status = git(
            self.root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all"
        )
        changed = tuple(entry[3:] for entry in status.split("\0") if entry)
        digest = hashlib.sha256()
        for name in names:
            digest.update(os.fsencode(name) + b"\0" + _content_digest(self.root / name))
        target = self._folder / f"head-{digest.hexdigest()[:16]}-{self._toolchain}"
        label = f"the working tree ({commit[:8]}"
        label += f" and {len(changed)} changed file{'s' * (len(changed) > 1)}" if changed else ""
        label += ")"
        with self._only_one(target):
            if not (target / _DONE).exists():
                self._remove(target)
                for name in names:
                    copy = target / name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    file = self.root / name
                    # A link to a file may lead out of the repository; one to a folder stays one.
                    shutil.copy2(file, copy, follow_symlinks=file.is_file())
                self._make(target, label)
        return Snapshot(target, label, commit, changed)

    def _make(self, root: Path, label: str) -> None:
        """Builds, says so in the snapshot, and forgets snapshots of long ago.

        Raises:
            BuildFailed: with the end of what the command printed.
        """
        command = self._build
        if command is None and (root / "jepa_fast/ops/_build.py").is_file():
            command = f'"{sys.executable}" -m jepa_fast.cli build'
        if command:
            environment = {**outside_hooks(), **self._environment}
            done = subprocess.run(
                command,
                shell=True,
                cwd=root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
            if done.returncode != 0:
                end = "\n".join(done.stdout.splitlines()[-20:])
                raise BuildFailed(
                    f"{label} cannot be built: `{command}` gave {done.returncode} in {root}\n{end}"
                )
        write_text(root / _DONE, "")
        kept = sorted(self._folder.glob("*-*/" + _DONE), key=lambda file: -file.stat().st_mtime)
        for old in kept[_KEPT:]:
            self._remove(old.parent)

    def _remove(self, target: Path) -> None:
        if target.exists():
            shutil.rmtree(target)
        git(self.root, "worktree", "prune")

    @contextmanager
    def _only_one(self, target: Path) -> Iterator[None]:
        """Others who want the same snapshot wait until it is there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        # No part of the working tree where the cache lies in it: each would hold all before it.
        write_text(target.with_name(".gitignore"), "*\n")
        with open(target.with_name(f".{target.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
            if (target / _DONE).exists():
                os.utime(target / _DONE)  # used now: not among the oldest


def _is_there(path: Path) -> bool:
    """Whether it is a file or a link, which git knows without what is in the folder behind it."""
    return path.is_file() or path.is_symlink()


def _content_digest(path: Path) -> bytes:
    if not path.is_file():
        return hashlib.sha256(os.fsencode(path.readlink())).digest()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.digest()
