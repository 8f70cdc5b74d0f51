"""Builds the native library `jepa_fast/_native.abi3.so`: the one description of it.

setup.py and `jepa-fast build` both come here; setup.py loads this file on its own, so it imports
the standard library alone. The library speaks to torch through its stable C interface and to Python
not at all, so one build serves every torch from 2.10 on and every Python.

`JEPA_FAST_BUILD` says which parts are wanted:
    auto   (default) what the compilers found here can build; what fails is recorded, not fatal
    none   nothing
    cpu    the CPU kernels; failing is an error
    cuda   the CPU and the CUDA kernels; failing is an error
`CXX` and `CUDA_HOME` choose the compilers, `MAX_JOBS` how many of them run at once.

For a second library beside the usual one (`make sanitize`):
    JEPA_FAST_NATIVE    the folder that it is built to and loaded from, instead of the package
    JEPA_FAST_CXXFLAGS  flags of the host compiler after those here, also where it links
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = "_native.abi3.so"
RECORD = "_native_build.json"
PARTS = ("cpu", "cuda")
CHOICES = ("auto", "none", *PARTS)

# The oldest torch whose interface is used; see torch/csrc/stable/version.h.
TORCH_TARGET_VERSION = "0x020a000000000000"
# A100, H100 and B200, as far as nvcc knows them; newer GPUs compile the PTX of the last one.
CUDA_ARCHITECTURES = (80, 90, 100)


class BuildError(RuntimeError):
    """A part of the native library cannot be built; the message says what is missing or failed."""


@dataclass
class Record:
    """What a build made. Lies beside the library as `_native_build.json`.

    Args:
        parts: those of `PARTS` in the library.
        why_not: for every other part, why it is not.
        compilers: the first line of each compiler's version.
        sources: digest of the sources, to notice a library older than they are.
    """

    parts: list[str] = field(default_factory=list)
    why_not: dict[str, str] = field(default_factory=dict)
    compilers: list[str] = field(default_factory=list)
    sources: str = ""

    def write(self, folder: Path) -> None:
        # In one step, as the library: other processes read it.
        partial = folder / f"{RECORD}.{os.getpid()}.partial"
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(partial, folder / RECORD)

    @classmethod
    def read(cls, folder: Path | None = None) -> Record | None:
        """The record in `folder`, by default the library's, or None where no build has run.

        Nor has one that was stopped while it wrote, as by a full disk.
        """
        path = (library_folder() if folder is None else folder) / RECORD
        try:
            return cls(**json.loads(path.read_text())) if path.is_file() else None
        except (TypeError, ValueError):
            return None

    def is_older_than_sources(self) -> bool:
        """Whether the sources here are others than those that were built; False without any."""
        return source_digest() not in ("", self.sources)


def library_folder() -> Path:
    """Where the library and its record lie: in the package, unless `JEPA_FAST_NATIVE` says."""
    return Path(os.environ.get("JEPA_FAST_NATIVE") or PACKAGE).absolute()


def source_folder() -> Path:
    """csrc: inside an installed package, beside the package in a checkout."""
    installed = PACKAGE / "_csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


def source_digest() -> str:
    """Digest of all sources; empty if they are not here."""
    folder = source_folder()
    digest = hashlib.sha256()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16] if files else ""


def wanted() -> str:
    """The value of `JEPA_FAST_BUILD`.

    Raises:
        BuildError: it is none of `CHOICES`.
    """
    choice = os.environ.get("JEPA_FAST_BUILD") or "auto"
    if choice not in CHOICES:
        raise BuildError(f"JEPA_FAST_BUILD must be one of {CHOICES}, got {choice!r}")
    return choice


def build(folder: Path | None = None, choice: str | None = None) -> Record:
    """Builds the library into `folder`, and says what is in it and what is not.

    Args:
        folder: where the library and its record go, by default `library_folder()`; it is made.
        choice: as `JEPA_FAST_BUILD`, which it overrides.

    Raises:
        BuildError: a part that was asked for by name cannot be built. An earlier library stays.
    """
    choice = wanted() if choice is None else choice
    if choice not in CHOICES:
        raise BuildError(f"choice must be one of {CHOICES}, got {choice!r}")
    folder = library_folder() if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(sources=source_digest())
    if choice == "none":
        record.why_not = dict.fromkeys(PARTS, "JEPA_FAST_BUILD=none skipped it")
    elif choice == "cpu":
        record.why_not = {"cuda": "JEPA_FAST_BUILD=cpu left it out"}
        _compile_and_link(folder, record, cuda=False)
    elif choice == "cuda":
        _compile_and_link(folder, record, cuda=True)
    else:
        try:
            _compile_and_link(folder, record, cuda=True)
        except BuildError as cuda_error:
            record.why_not = {"cuda": str(cuda_error)}
            try:
                _compile_and_link(folder, record, cuda=False)
            except BuildError as error:
                record.why_not["cpu"] = str(error)
    if not record.parts:
        # A library of other sources must not pass for the one that was not built.
        (folder / LIBRARY).unlink(missing_ok=True)
    record.write(folder)
    return record


def _compile_and_link(folder: Path, record: Record, *, cuda: bool) -> None:
    sources = source_folder()
    if not sources.is_dir():
        raise BuildError(f"the sources are not here: no folder {sources}")
    torch = _torch_folder()
    host = _host_compiler()
    compilers = {".cpp": [host, *_host_flags(torch)]}
    if cuda:
        nvcc = _nvcc()
        compilers[".cu"] = [nvcc, *_cuda_flags(nvcc, host, torch)]
    files = sorted(path for path in sources.rglob("*") if path.suffix in compilers)
    with tempfile.TemporaryDirectory(prefix="jepa_fast_build_") as scratch:
        objects = [str(Path(scratch, f"{i}_{path.stem}.o")) for i, path in enumerate(files)]
        commands = [
            [*compilers[path.suffix], "-c", str(path), "-o", output]
            for path, output in zip(files, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=_jobs()) as pool:
            list(pool.map(_run, commands))
        linked = Path(scratch, LIBRARY)
        _run(_link_command(host, compilers.get(".cu"), torch, objects, linked))
        # Replaced in one step: a process that has the old library open keeps it whole.
        partial = folder / f"{LIBRARY}.{os.getpid()}.partial"
        shutil.copyfile(linked, partial)
        os.replace(partial, folder / LIBRARY)
    record.parts = ["cpu", "cuda"] if cuda else ["cpu"]
    record.compilers = [_version(command[0]) for command in compilers.values()]


def _jobs() -> int:
    given = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not given.isdecimal() or int(given) == 0:
        raise BuildError(f"MAX_JOBS must be a positive number, got {given!r}")
    return int(given)


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "torch is not importable where the build runs: install it first, then use "
            "`pip install --no-build-isolation .` or `jepa-fast build`"
        )
    folder = Path(spec.origin).parent
    if not (folder / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"{folder} has no stable interface; jepa_fast needs torch 2.11 or later")
    return folder


def _host_compiler() -> str:
    choices = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for choice in choices:
        if found := shutil.which(choice):
            return found
    raise BuildError(f"no C++ compiler: {' or '.join(choices)} is not on the PATH; install g++")


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if found := shutil.which(place):
            return found
    raise BuildError(f"no CUDA compiler: {' or '.join(places)} not found; install it or CUDA_HOME")


def _includes(torch: Path) -> list[str]:
    return ["-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]


def _host_flags(torch: Path) -> list[str]:
    # Sums marked `omp simd` may be reordered; no OpenMP runtime, which is torch's alone. Nobody
    # reads floating-point exceptions, for the sake of which selects would stay branches.
    flags = ["-std=c++17", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
    flags += ["-fvisibility=hidden", "-Wall", "-Wextra"]
    return [*flags, *_includes(torch), *_more_flags()]


def _more_flags() -> list[str]:
    given = os.environ.get("JEPA_FAST_CXXFLAGS", "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise BuildError(f"JEPA_FAST_CXXFLAGS: {error} in {given!r}") from error


def _cuda_flags(nvcc: str, host: str, torch: Path) -> list[str]:
    known = _run([nvcc, "--list-gpu-arch"]).split()
    chosen = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in known]
    if not chosen:
        raise BuildError(f"{nvcc} compiles for none of sm_{CUDA_ARCHITECTURES}; it is too old")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    targets.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
    flags = ["-std=c++17", "-O3", "-ccbin", host, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return [*flags, *targets, *_includes(torch)]


def _link_command(
    host: str, cuda: list[str] | None, torch: Path, objects: list[str], output: Path
) -> list[str]:
    # nvcc knows where its own static runtime lies. libtorch.so itself holds nothing, but under a
    # CUDA build of torch it brings libtorch_cuda.so into reach; some linkers would drop it.
    driver = [cuda[0], "-ccbin", host, "-cudart=static"] if cuda else [host, *_more_flags()]
    keep = ["-Xlinker", "--no-as-needed"]
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"]
    return [*driver, "-shared", "-o", str(output), *objects, *keep, *libraries]


def _version(compiler: str) -> str:
    lines = [line for line in _run([compiler, "--version"]).splitlines() if line]
    # nvcc's first line is its name; its release stands in the last but one.
    return next((line for line in lines if "release" in line), lines[0]) if lines else compiler


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise BuildError(f"`{' '.join(command)}` failed:\n{tail}")
    return done.stdout
