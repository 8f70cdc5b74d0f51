"""What an installation brings, with and without the native library, and what says so."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from jepa_fast.info import describe
from jepa_fast.ops import _build, _native

ROOT = Path(__file__).resolve().parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

pytestmark = pytest.mark.skipif(
    int(version("setuptools").partition(".")[0]) < 77,
    reason="needs setuptools 77 or later, as pyproject.toml says",
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources, so that building leaves nothing behind in the checkout."""
    copy = tmp_path / "tree"
    left_out = shutil.ignore_patterns("*.so", "_native_build.json", "__pycache__", "*.egg-info")
    for name in ("jepa_fast", "csrc", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=left_out)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def _wheel(tree: Path, *, torch: bool = True, **environment: str) -> Path:
    """Builds as pip does without isolation; `torch=False`: as in isolation, where there is none."""
    hide = "" if torch else "sys.modules['torch'] = None; "
    program = f"import sys; {hide}from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tree,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_pure_wheel_has_what_is_needed_to_add_the_library(tree: Path) -> None:
    wheel = _wheel(tree, torch=False)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = _names(wheel)
    data = ("csrc/**/*", "jepa_fast/**/*.json", "jepa_fast/**/*.yaml", "jepa_fast/**/*.html")
    suites = ("benchmarks/bench_*.py", "benchmarks/floors.json")
    expected = {
        re.sub("^(csrc|benchmarks)/", r"jepa_fast/_\1/", str(path.relative_to(tree)))
        for pattern in (*data, *suites)
        for path in tree.glob(pattern)
        if path.is_file() and "build" not in path.relative_to(tree).parts
    }
    for some in ("_benchmarks/bench_ema_update.py", "_benchmarks/floors.json"):
        assert f"jepa_fast/{some}" in expected
    scripts = ("heads", "learning", "power", "tables")
    assert not {f"jepa_fast/_benchmarks/{name}.py" for name in scripts} & names
    assert expected <= names
    assert "jepa_fast/py.typed" in names
    assert not {name for name in names if name.endswith(".so") or name.startswith("tests/")}


def test_a_source_archive_has_what_its_tests_and_readme_point_to(tree: Path) -> None:
    shutil.copytree(ROOT / "examples", tree / "examples")
    shutil.copy(ROOT / "MANIFEST.in", tree)
    program = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", program], cwd=tree, check=True, capture_output=True)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    expected = {
        str(path.relative_to(tree))
        for folder in ("benchmarks", "csrc", "examples")
        for path in (tree / folder).rglob("*")
    }
    assert expected - names == set()


@needs_compiler
def test_a_compiler_error_is_kept_and_the_rest_is_built(tree: Path, tmp_path: Path) -> None:
    """nvcc fails: the wheel has the CPU kernels alone, and its record says what nvcc said."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho compute_90; case $* in *-c*) echo broken >&2; exit 1;; esac\n")
    nvcc.chmod(0o755)
    for source in (tree / "csrc/cpu").glob("*.cpp"):
        if source.stem not in {"ema_update", "gather_patches"}:  # sooner, as without optimisation
            source.unlink()
    wheel = _wheel(tree, CUDA_HOME=str(tmp_path / "cuda"), JEPA_FAST_CXXFLAGS="-O0")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    record = _build.Record.read(tmp_path / "jepa_fast")
    assert record is not None
    assert record.parts == ["cpu"]
    assert "broken" in record.why_not["cuda"]
    assert "-gencode=arch=compute_90,code=sm_90" in record.why_not["cuda"]
    program = "import torch, sys; torch.ops.load_library(sys.argv[1])"
    library = str(tmp_path / "jepa_fast" / _build.LIBRARY)
    loaded = subprocess.run(
        [sys.executable, "-c", program, library], capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr


def test_no_compiler_still_installs_and_says_so(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = _wheel(tree, CXX="no-such-compiler")
    assert f"jepa_fast/{_build.LIBRARY}" not in _names(wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree / "site")
    record = _build.Record.read(tree / "site/jepa_fast")
    assert record is not None
    assert record.parts == []
    assert "no-such-compiler is not on the PATH" in record.why_not["cpu"]
    monkeypatch.setattr(_build, "PACKAGE", tree / "site/jepa_fast")
    _native._load.cache_clear()
    try:
        (reason,) = _native.missing()
        assert "no-such-compiler" in reason
        assert "`jepa-fast build` builds it" in reason
    finally:
        monkeypatch.undo()
        _native._load.cache_clear()


def test_wanted_parts_that_cannot_be_built_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / _build.LIBRARY).write_text("an earlier library")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(_build.BuildError, match="no-such-compiler is not on the PATH"):
        _build.build(tmp_path, "cpu")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("CUDA_HOME", "/no/such/folder")
    with pytest.raises(_build.BuildError, match=r"/no/such/folder/bin/nvcc not found"):
        _build.build(tmp_path, "cuda")
    assert (tmp_path / _build.LIBRARY).read_text() == "an earlier library"
    with pytest.raises(_build.BuildError, match="must be one of"):
        _build.build(tmp_path, "gpu")
    monkeypatch.setenv("JEPA_FAST_BUILD", "gpu")
    with pytest.raises(_build.BuildError, match="JEPA_FAST_BUILD must be one of"):
        _build.wanted()


@needs_compiler
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("MAX_JOBS", "all", "MAX_JOBS must be a positive number, got 'all'"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive number, got '0'"),
        ("JEPA_FAST_CXXFLAGS", "-DA='b", "JEPA_FAST_CXXFLAGS: No closing quotation in"),
    ],
)
def test_settings_that_say_nothing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(_build.BuildError, match=told):
        _build.build(tmp_path, "cpu")


def test_a_library_older_than_its_sources_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / _build.LIBRARY).write_text("not a library at all")
    _build.Record(parts=["cpu"], sources="other").write(tmp_path)
    monkeypatch.setattr(_build, "PACKAGE", tmp_path)
    monkeypatch.setattr(_build, "source_folder", lambda: ROOT / "csrc")
    _native._load.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="built from other sources.*run `jepa-fast build`"):
            (reason,) = _native.missing()
        assert "does not load" in reason
        assert "`jepa-fast build` builds it anew" in reason
    finally:
        monkeypatch.undo()
        _native._load.cache_clear()


@pytest.mark.parametrize("text", ["", '{"parts": ["cpu"], "why', "[]"])
def test_a_record_that_is_cut_short_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / _build.LIBRARY).write_text("a library")
    (tmp_path / _build.RECORD).write_text(text)
    monkeypatch.setenv("JEPA_FAST_NATIVE", str(tmp_path))
    _native._load.cache_clear()
    try:
        assert _native.missing() == [
            "the native library has no cpu kernels; `jepa-fast build` builds it"
        ]
        assert "native library: not built; `jepa-fast build` builds it" in describe()
    finally:
        monkeypatch.undo()
        _native._load.cache_clear()


def test_a_record_is_there_whole_or_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = _build.Record(parts=["cpu"])
    earlier.write(tmp_path)

    def full(path: Path, text: str) -> None:
        path.write_bytes(text[:9].encode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        _build.Record(parts=["cpu", "cuda"]).write(tmp_path)
    assert _build.Record.read(tmp_path) == earlier


@needs_compiler
def test_a_second_library_has_flags_and_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, folder, broken = (tmp_path / name for name in ("csrc", "second/library", "broken"))
    for made in (sources, broken):
        made.mkdir()
    (sources / "answer.cpp").write_text('extern "C" int answer() { return ANSWER; }')
    monkeypatch.setattr(_build, "source_folder", lambda: sources)
    usual, before = _build.library_folder(), _build.Record.read()
    monkeypatch.setenv("JEPA_FAST_NATIVE", str(folder))
    monkeypatch.setenv("JEPA_FAST_CXXFLAGS", "-DANSWER='40 + 2' -fvisibility=default")
    record = _build.build(choice="cpu")
    assert record.parts == ["cpu"]
    assert _build.Record.read() == record
    assert _build.Record.read(usual) == before != record
    assert ctypes.CDLL(str(folder / _build.LIBRARY)).answer() == 42

    (broken / _build.LIBRARY).write_text("not a library at all")
    record.write(broken)
    monkeypatch.setenv("JEPA_FAST_NATIVE", str(broken))
    _native._load.cache_clear()
    try:
        (reason,) = _native.missing()
        assert f"{broken / _build.LIBRARY} does not load" in reason
    finally:
        monkeypatch.undo()
        _native._load.cache_clear()


@needs_compiler
def test_the_library_is_there_where_a_compiler_is() -> None:
    """An installation that silently lacks its kernels would let every other test pass."""
    assert _native.missing() == []
