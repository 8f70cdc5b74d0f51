"""The files under examples/ that are there to be copied: their commands, run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from gate_project import LIBRARY, SUITE, Repository, git, library

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SLOWER = library(MILLISECONDS='{"steady": 1.0, "slowed": 1.2}')


# No longer known to be aligned: narrower accesses.
WORSE = (EXAMPLES / "audit_kernel.py").read_text().replace(":16", "")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A user's repository with its own benchmarks and kernel, cloned, so that it has an origin."""
    folder = tmp_path_factory.mktemp("examples")
    files = {
        "library.py": LIBRARY,
        "benchmarks/bench_library.py": SUITE,
        "audit_kernel.py": (EXAMPLES / "audit_kernel.py").read_text(),
        ".gitignore": "__pycache__\ncompare.*\n",
    }
    origin = Repository(folder / "origin", files)
    clone = folder / "clone"
    git(folder, "clone", "-q", str(origin.root), str(clone))
    mine = Repository.__new__(Repository)
    mine.root = clone
    return mine


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With the commands of this Python first, and no cache of anybody else's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cache = str(tmp_path_factory.mktemp("cache"))
    # The versions tell the time themselves, which CUDA events do not ask for.
    return {**os.environ, "PATH": path, "XDG_CACHE_HOME": cache, "CUDA_VISIBLE_DEVICES": ""}


def _job() -> dict[str, Any]:
    workflow = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
    return workflow["jobs"]["performance"]


def _steps() -> list[dict[str, Any]]:
    return _job()["steps"]


def _hooks() -> dict[str, dict[str, Any]]:
    (repository,) = yaml.safe_load((EXAMPLES / "pre-commit-config.yaml").read_text())["repos"]
    return {hook["id"]: hook for hook in repository["hooks"]}


def test_the_workflow_fails_where_something_got_worse_and_says_so_in_its_summary(
    project: Repository, environment: dict[str, str], tmp_path: Path
) -> None:
    summary = tmp_path / "summary.md"
    variables = {"BASE": "origin/main", "GITHUB_STEP_SUMMARY": str(summary)}
    command = [sys.executable, "audit_kernel.py", "--write", "baseline.json"]
    subprocess.run(command, cwd=project.root, env=environment, check=True)
    project.write({"library.py": SLOWER, "audit_kernel.py": WORSE})
    codes = {}
    # All but the installation, which is what runs this test.
    for step in (step for step in _steps() if "run" in step and step["name"] != "Install"):
        done = subprocess.run(
            ["bash", "-e", "-c", step["run"]],
            cwd=project.root,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        codes[step["name"]] = done.returncode
    assert codes == {"Audit, without a GPU": 1, "Compare times and memory": 1, "Summary": 0}
    assert "| **worse** | slowed/small | SLOWER: time +20.0 %" in summary.read_text()
    assert 'failures="1"' in (project.root / "compare.xml").read_text()


def test_the_workflow_fetches_the_base_and_installs_what_it_uses() -> None:
    steps = {step.get("name", step.get("uses")): step for step in _steps()}
    assert steps["actions/checkout@v4"]["with"]["fetch-depth"] == 0
    # No index has it; until a place is set, nobody else's is installed, as .invalid is no domain.
    assert '"jepa-fast[bench] @ $JEPA_FAST"' in steps["Install"]["run"]
    source = _job()["env"]["JEPA_FAST"]
    assert re.fullmatch(r"git\+https://[\w-]+\.invalid/.*@COMMIT", source)


@pytest.mark.parametrize(("changed", "code"), [(LIBRARY, 0), (SLOWER, 1)])
def test_the_hook_before_a_push_compares_with_main(
    project: Repository, environment: dict[str, str], changed: str, code: int
) -> None:
    project.write({"library.py": changed})
    hook = _hooks()["compare"]
    done = subprocess.run(
        shlex.split(hook["entry"]), cwd=project.root, env=environment, check=False
    )
    assert done.returncode == code


def test_the_hook_at_a_commit_audits_the_kernels(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    shutil.copy(EXAMPLES / "audit_kernel.py", tmp_path)
    command = shlex.split(_hooks()["audit"]["entry"])

    def code(*more: str) -> int:
        return subprocess.run([*command, *more], cwd=tmp_path, env=environment).returncode

    assert code() == 3  # a gate without a baseline is none
    assert code("--write") == 0
    assert code() == 0
    assert WORSE != (tmp_path / "audit_kernel.py").read_text()
    (tmp_path / "audit_kernel.py").write_text(WORSE)
    assert code() == 1


def test_hooks_run_where_they_belong() -> None:
    hooks = _hooks()
    assert hooks["audit"]["stages"] == ["pre-commit"]
    assert hooks["compare"]["stages"] == ["pre-push"]
    assert all(hook["pass_filenames"] is False for hook in hooks.values())
