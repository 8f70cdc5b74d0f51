"""The audit: what it reads from machine code, what it counts, and that each of its rules fires.

Regressions are seeded into scratch copies of kernels, compiled and interpreted like any other.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from jepa_fast.cli import main
from jepa_fast.perf import Cost, Launch, Report, audit, machine_code
from jepa_fast.perf.audit_report import CallTraffic, CompiledKernel, Moved
from jepa_fast.perf.audit_rules import compare, compare_across_tritons
from jepa_fast.perf.errors import BaselineMissing, BaselineOfAnother, BuildFailed, PerfError
from jepa_fast.perf.machine_code import Instructions
from jepa_fast.perf.occupancy import LIMITS, blocks_at_once, occupancy
from jepa_fast.perf.summary import Check, junit, markdown

triton = pytest.importorskip("triton", reason="needs triton, whose kernels are audited")

ROOT = Path(__file__).resolve().parents[1]
BASELINES = ROOT / "benchmarks/results/audit"
Capture = pytest.CaptureFixture[str]

SCRATCH = """
import triton
import triton.language as tl


@triton.jit
def add(x, y, out, step, n, BLOCK: tl.constexpr):
    start = tl.program_id(0) * step
    start = tl.multiple_of(start, 16)
    i = start + tl.arange(0, BLOCK)
    inside = i < n
    total = tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside)
    tl.store(out + i, total, mask=inside)


@triton.jit
def multiply(a, b, out, DEPTH: tl.constexpr, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE), tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, DEPTH, 16):
        k = start + tl.arange(0, 16)
        left = tl.load(a + row[:, None] * DEPTH + k[None, :])
        right = tl.load(b + k[:, None] * SIZE + column[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + row[:, None] * SIZE + column[None, :], total)
"""
AUTOTUNED = (
    "@triton.jit",
    '@triton.autotune([triton.Config({"BLOCK": 64})], key=["n"])\n@triton.jit',
)
ADD = {"x": "*fp32:16", "y": "*fp32:16", "out": "*fp32:16", "step": "i32", "n": "i32:16"}
MULTIPLY = {"a": "*fp16:16", "b": "*fp16:16", "out": "*fp32:16"}
N = 5008


def _module(folder: Path, name: str, text: str = SCRATCH) -> ModuleType:
    file = folder / f"{name}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _launch(n: int = N) -> Launch:
    tensors = {name: torch.ones(N) for name in ("x", "y", "out")}
    return Launch(
        grid=lambda config: (triton.cdiv(N, config["BLOCK"]),),
        arguments={**tensors, "step": 1024, "n": n},
        minimum=Cost(read=8 * N, written=4 * N),
    )


def _audit(module: ModuleType, kernel: str, launched: bool = False) -> Report:
    if kernel == "add":
        configs = [{"BLOCK": 1024, "num_warps": 4}]
        launch = _launch() if launched else None
        return audit(module.add, ADD, configs, targets=["sm_90"], launch=launch)
    configs = [{"DEPTH": 64, "SIZE": 32, "num_warps": 1}]
    return audit(module.multiply, MULTIPLY, configs, targets=["sm_80"])


# Rules: one seeded regression each.

REGRESSIONS = [
    pytest.param(
        "add",
        "    start = tl.multiple_of(start, 16)\n",
        "",
        {"narrower access"},
        "add [add BLOCK=1024 num_warps=4] on sm_90: bytes of the widest global loads 16 -> 4",
        id="alignment lost",
    ),
    pytest.param(
        "multiply",
        "total = tl.dot(left, right, total)",
        "total += tl.sum(left[:, :, None].to(tl.float32) * right[None, :, :], axis=1)",
        {"tensor core"},
        "multiply [multiply DEPTH=64 SIZE=32 num_warps=1] on sm_80: HMMA instructions 32 -> 0",
        id="tensor cores lost",
    ),
    pytest.param(
        "multiply",
        "row, column = tl.arange(0, SIZE), tl.arange(0, SIZE)\n"
        "    total = tl.zeros((SIZE, SIZE), tl.float32)",
        "row, column = tl.arange(0, 8 * SIZE), tl.arange(0, SIZE)\n"
        "    total = tl.zeros((8 * SIZE, SIZE), tl.float32)",
        {"spill"},
        "multiply [multiply DEPTH=64 SIZE=32 num_warps=1] on sm_80: local loads 0 -> ",
        id="a tile too large",
    ),
]


@pytest.mark.tier2
@pytest.mark.parametrize(("kernel", "good", "bad", "rules", "told"), REGRESSIONS)
def test_a_regression_in_compiled_code_is_found(
    kernel: str, good: str, bad: str, rules: set[str], told: str, tmp_path: Path
) -> None:
    assert SCRATCH.count(good) == 1
    before = _audit(_module(tmp_path, "scratch_before"), kernel)
    again = _audit(_module(tmp_path, "scratch_again"), kernel)
    after = _audit(_module(tmp_path, "scratch_after", SCRATCH.replace(good, bad)), kernel)
    assert again == before
    assert (again.compare(before), again.notes(before)) == ([], [])
    findings = after.compare(before)
    assert rules <= {finding.rule for finding in findings}
    assert any(told in str(finding) for finding in findings), "\n".join(map(str, findings))


@pytest.mark.tier2
def test_a_second_read_is_found_and_the_rest_of_the_traffic_is_exact(tmp_path: Path) -> None:
    before = _audit(_module(tmp_path, "scratch_once"), "add", launched=True)
    (call,) = before.traffic or ()
    assert call.kernels == {"add": Moved(1, 8 * N, 8 * N, 4 * N, 4 * N)}
    assert (call.minimum_read, call.minimum_written) == (8 * N, 4 * N)
    twice = SCRATCH.replace(
        "    tl.store(out + i, total",
        "    total += tl.load(x + i, mask=inside)\n    tl.store(out + i, total",
        1,
    )
    module = _module(tmp_path, "scratch_twice", twice.replace(*AUTOTUNED, 1))
    module.add = module.add.fn
    after = _audit(module, "add", launched=True)
    (finding,) = [each for each in after.compare(before) if each.rule == "traffic"]
    assert str(finding) == (
        f"traffic: add [add BLOCK=1024 num_warps=4] on any chip: bytes read {8 * N} -> {12 * N}"
    )
    assert Report.from_json(json.loads(after.to_text())) == after
    assert "60,096    40,064   40,064" in str(after)


def test_one_more_launch_of_an_operator_is_found_in_a_copy_of_the_package(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "jepa_fast", tmp_path / "jepa_fast", ignore=left_out)
    file = tmp_path / "jepa_fast/ops/ema_update/triton.py"
    text = file.read_text()
    (line,) = [line for line in text.splitlines() if line.strip() == "if len(table):"]
    worse = line.replace("if len(table):", "for _ in range(2 if len(table) else 0):")
    text = text.replace(line, worse)
    copy = "    flat = _memory.Flat.of(targets, sources, shadows)\n"
    assert text.count(copy) == 1
    file.write_text(text.replace(copy, copy + "    momentum = momentum.clone()\n"))
    arguments = ["audit", "--op", "ema_update_", "--traffic-only", "--compare", str(BASELINES)]
    done = subprocess.run(
        [sys.executable, "-m", "jepa_fast.cli", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    where = "ema_update_kernel [ema_update_-float32] on any chip"
    assert f"WORSE launches: {where}: launches 1 -> 2" in done.stdout
    assert f"WORSE traffic: {where}: bytes read 320256 -> 640512" in done.stdout
    beside = "PyTorch's own operations (aten.clone more often) 1 -> 2"
    assert f"WORSE launches: {where}: {beside}" in done.stdout


def _kernel(**changes: Any) -> CompiledKernel:
    mix = {name: changes.pop(name) for name in list(changes) if name in _MIX}
    kernel = CompiledKernel(
        "k A=1", "k", "sm_90", "triton", {}, 128, 32, 0, 0, 0, 1.0, Instructions(**mix)
    )
    return dataclasses.replace(kernel, **changes)


_MIX = {field.name for field in dataclasses.fields(Instructions)}


def _report(*kernels: CompiledKernel, triton: str = "3.8.0", **more: Any) -> Report:
    return Report({"triton": triton, **more.pop("versions", {})}, list(kernels), None, **more)


SAME = [
    ("unrolled twice", {"loads": {16: 4, 4: 2}}, {"loads": {16: 8, 4: 4}}),
    ("unrolled less, scalars before the loop", {"loads": {16: 8, 4: 3}}, {"loads": {16: 4, 4: 3}}),
    ("wider", {"stores": {4: 8}}, {"stores": {16: 2}}),
    ("by bulk copies now", {"loads": {16: 8}}, {"tma": {"UTMALDG": 2}}),
    ("more registers, lower occupancy", {}, {"registers": 64, "occupancy": 0.5}),
    ("fewer spills", {"local_loads": 4, "stack": 8}, {"local_loads": 2, "stack": 8}),
    ("more matrix instructions", {"tensor_core": {"HMMA": 4}}, {"tensor_core": {"HMMA": 8}}),
    ("by wgmma now", {"tensor_core": {"HMMA": 32}}, {"tensor_core": {"HGMMA": 6}}),
    ("by tcgen05 now", {"tensor_core": {"HGMMA": 8}}, {"tensor_core": {"UTCHMMA": 2}}),
]


@pytest.mark.parametrize(("before", "after"), [row[1:] for row in SAME], ids=[r[0] for r in SAME])
def test_what_is_no_regression(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert compare(_report(_kernel(**after)), _report(_kernel(**before))).findings == []


WORSE = [
    ("local stores 0 -> 3", {}, {"local_stores": 3}),
    ("bytes of stack 8 -> 16", {"stack": 8}, {"stack": 16}),
    ("bytes of local memory 0 -> 4", {}, {"local": 4}),
    ("HMMA instructions 8 -> 4", {"tensor_core": {"HMMA": 8}}, {"tensor_core": {"HMMA": 4}}),
    (
        "HMMA instructions 8 -> 4",
        {"tensor_core": {"HGMMA": 2, "HMMA": 8}},
        {"tensor_core": {"HGMMA": 2, "HMMA": 4}},
    ),
    ("HGMMA instructions 2 -> 0", {"tensor_core": {"HGMMA": 2}}, {"tensor_core": {"HMMA": 64}}),
    ("widest global stores 16 -> 8", {"stores": {16: 4}}, {"stores": {8: 8}}),
    (
        "global loads of at most 4 bytes 1 of 5 -> 5 of 8",
        {"loads": {16: 4, 4: 1}},
        {"loads": {16: 3, 4: 5}},
    ),
    ("occupancy 0.5 -> 0", {"occupancy": 0.5}, {"occupancy": 0.0}),
]


@pytest.mark.parametrize(
    ("told", "before", "after"), WORSE, ids=[row[0].partition(" ->")[0] for row in WORSE]
)
def test_what_is_one(told: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    (finding,) = compare(_report(_kernel(**after)), _report(_kernel(**before))).findings
    assert str(finding).endswith(f" k [k A=1] on sm_90: {told}") or told in str(finding)
    assert "k [k A=1] on sm_90" in str(finding)


def test_what_vanishes_is_found_and_what_is_new_is_noted() -> None:
    one, other = _kernel(), _kernel(chip="sm_80")
    result = compare(_report(one), _report(one, other))
    assert list(map(str, result.findings)) == ["vanished: k [k A=1] on sm_80: kernel there -> gone"]
    result = compare(_report(one, other), _report(one))
    assert (result.findings, result.notes) == ([], ["new: k [k A=1] on sm_80"])
    call = CallTraffic("c", {"k": Moved(1)})
    (finding,) = compare(Report({}, None, []), Report({}, None, [call])).findings
    assert str(finding) == "vanished: k [c] on any chip: call there -> gone"


def test_what_changed_otherwise_is_noted() -> None:
    result = compare(_report(_kernel(registers=40, occupancy=0.75)), _report(_kernel()))
    (note,) = result.notes
    assert note == "changed: k [k A=1] on sm_90: registers 32 -> 40, occupancy 1.0 -> 0.75"


def test_traffic_moved_from_one_kernel_to_another_is_no_more_traffic() -> None:
    before = Report({}, None, [CallTraffic("c", {"a": Moved(1, 8, 8, 4, 4), "b": Moved(1, 4, 4)})])
    fused = Report({}, None, [CallTraffic("c", {"ab": Moved(1, 8, 8, 4, 4)})])
    assert compare(fused, before).findings == []
    risen = Report({}, None, [CallTraffic("c", {"a": Moved(1, 8, 8, 4, 4), "b": Moved(1, 5, 4)})])
    (finding,) = compare(risen, before).findings
    assert str(finding) == "traffic: b [c] on any chip: bytes read 12 -> 13"


def test_compiled_code_of_another_triton_is_not_compared() -> None:
    ours, theirs = _report(_kernel(), triton="3.8.0"), _report(_kernel(), triton="3.7.1")
    with pytest.raises(BaselineOfAnother, match=r"Triton 3\.7\.1, these by 3\.8\.0.*traffic-only"):
        ours.compare(theirs)
    assert _report(_kernel(), triton="3.8.1").compare(ours) == []
    assert compare_across_tritons(ours, theirs).findings == []


@pytest.mark.parametrize(
    ("told", "before", "after"),
    [
        ("local loads none allowed -> 1", {"local_loads": 2}, {"local_loads": 1}),
        ("matrix instructions 6 -> 0", {"tensor_core": {"HGMMA": 2, "HMMA": 4}}, {}),
        ("widest global loads 16 -> 4", {"loads": {16: 1}}, {"loads": {4: 4}}),
    ],
)
def test_rules_for_any_triton(told: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    now, then = _report(_kernel(**after), triton="4.0"), _report(_kernel(**before))
    (finding,) = compare_across_tritons(now, then).findings
    assert told in str(finding)


def test_cuda_kernels_of_another_nvcc_are_noted_as_not_compared() -> None:
    cuda = _kernel(compiler="nvcc", local_loads=0)
    worse = _kernel(compiler="nvcc", local_loads=9)
    before = _report(cuda, versions={"nvcc": "13.0"})
    assert len(compare(_report(worse, versions={"nvcc": "13.0"}), before).findings) == 1
    result = compare(_report(worse, versions={"nvcc": "12.8"}), before)
    assert result.findings == []
    assert result.notes == [
        "not compared: CUDA kernels: nvcc 12.8 compiled these, 13.0 those of the baseline"
    ]
    result = compare(_report(not_audited={"CUDA kernels": "no nvcc"}), before)
    assert (result.findings, result.notes) == ([], ["not compared: CUDA kernels: no nvcc"])


def test_parts_that_the_baseline_lacks_are_noted() -> None:
    now = Report({"triton": "3.8"}, [_kernel()], [CallTraffic("c", {})])
    notes = now.notes(Report({}, None, None))
    assert [note.partition(",")[0] for note in notes] == [
        "not compared: compiled kernels",
        "not compared: traffic",
    ]


# What is read from machine code.

SASS = """
Fatbin elf code:
================
arch = sm_90
	code for sm_90a
		Function : first
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000e300000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR8][R2.64] ;  /* 0x0 */
        /*0020*/                   LDG.E.64.CONSTANT R4, [R4.64] ;
        /*0030*/              @P1  LDG.E.U8 R4, [R4.64] ;
        /*0040*/                   LDG.E R12, [R2.64+0x18] ;
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64] ;
        /*0060*/                   LD.E.U16 R5, desc[UR6][R2.64] ;
        /*0070*/             @!UPT STG.E.64 desc[UR8][R2.64], R16 ;
        /*0080*/                   ST.E.128 desc[UR8][R2.64], R16 ;
        /*0090*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24 ;
        /*00a0*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*00b0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*00c0*/                   LDL.LU R4, [R1+0x8] ;
        /*00d0*/                   STL.64 [R1], R4 ;
        /*10e0*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*10f0*/                   LDS.128 R4, [R1] ;
		..........
		Function : second
        /*0000*/                   EXIT ;
"""


def test_instructions_are_counted_by_kind_and_width() -> None:
    found = machine_code.read_instructions(SASS)
    assert found == {
        ("sm_90", "first"): Instructions(
            total=16,
            tensor_core={"HGMMA": 1, "HMMA": 1},
            loads={1: 1, 2: 1, 4: 1, 8: 1, 16: 2},
            stores={8: 1, 16: 1},
            tma={"UTMALDG": 1},
            local_loads=1,
            local_stores=1,
            atomics=1,
        ),
        ("sm_90", "second"): Instructions(total=1),
    }


def test_resources_and_launch_bounds_are_read() -> None:
    text = """
arch = sm_80
 Function _Z1av:
  REG:48 STACK:16 SHARED:2048 LOCAL:4 CONSTANT[2]:8 TEXTURE:0
arch = sm_90
 Function _Z1av:
  REG:50 STACK:0 SHARED:1024 LOCAL:0
"""
    found = machine_code.read_resources(text)
    assert found["sm_80", "_Z1av"] == machine_code.Resources(48, 16, 2048, 4)
    assert found["sm_90", "_Z1av"] == machine_code.Resources(50, 0, 1024, 0)
    text = """
arch = sm_80
.nv.info
	Attribute:	EIATTR_REGCOUNT
	Value:	function: _Z1av(0x9)	register count: 31
.nv.info._Z1av
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x10 0x8 0x2
	Attribute:	EIATTR_PARAM_CBANK
	Value:	0x1 0x9
.nv.info._Z1bv
	Attribute:	EIATTR_PARAM_CBANK
	Value:	0x1 0x9
"""
    assert machine_code.read_threads(text) == {("sm_80", "_Z1av"): 256}


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (
            "_ZN9jepa_fast51_GLOBAL__N__9367f447_13_ema_update_cu_1ef7cfff_205817ema_update_kernel"
            "IN3c104HalfEdEEvNS0_5TableENS2_10ScalarTypeENS0_8MomentumE",
            "jepa_fast::ema_update_kernel<c10::Half, double>",
        ),
        ("_ZN9jepa_fast12_GLOBAL__N_14rowsILi3EEEvPFviE", "jepa_fast::rows<3>"),
        ("ema_update_kernel", "ema_update_kernel"),
    ],
)
def test_names_are_readable_and_the_same_from_build_to_build(symbol: str, name: str) -> None:
    assert machine_code.readable(symbol) == name


def test_a_file_that_is_no_cubin_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "not.cubin"
    file.write_text("hello")
    with pytest.raises(BuildFailed, match=r"no cuobjdump here can read .*not\.cubin"):
        machine_code.read(file)


def test_a_missing_cuobjdump_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "tools", list)
    with pytest.raises(BuildFailed, match="install NVIDIA's CUDA toolkit"):
        machine_code.read(tmp_path / "any.cubin")


@pytest.mark.parametrize(
    ("chip", "threads", "registers", "shared", "expected"),
    [
        ("sm_80", 256, 32, 0, 1.0),
        ("sm_80", 256, 40, 0, 0.75),  # 6 blocks of 8 warps, of 64
        ("sm_90", 256, 255, 0, 0.125),
        ("sm_80", 128, 64, 48 * 1024, 12 / 64),  # 3 blocks of 49 KiB in 164
        ("sm_90", 128, 64, 48 * 1024, 16 / 64),  # 4 in 228
        ("sm_90", 32, 16, 0, 0.5),  # 32 blocks at the most
        ("sm_86", 128, 32, 0, 1.0),
        ("sm_80", 256, 32, 164 * 1024, 0.0),
        ("sm_90", 512, 168, 0, 0.0),  # 16 warps of 5376 registers are more than 65536
    ],
)
def test_occupancy(chip: str, threads: int, registers: int, shared: int, expected: float) -> None:
    assert occupancy(chip, threads, registers, shared) == expected


OCCUPANCY = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int major, minor, warps, shared, opt_in, threads, registers, used;
  while (std::scanf("%d %d %d %d %d %d %d %d", &major, &minor, &warps, &shared, &opt_in, &threads,
                    &registers, &used) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = major; device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024; device.maxThreadsPerMultiprocessor = warps * 32;
    device.regsPerBlock = 65536; device.regsPerMultiprocessor = 65536; device.warpSize = 32;
    device.sharedMemPerBlock = 49152; device.sharedMemPerMultiprocessor = shared;
    device.numSms = 1; device.sharedMemPerBlockOptin = opt_in;
    device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = 1024; function.numRegs = registers; function.sharedSizeBytes = 0;
    function.partitionedGCConfig = PARTITIONED_GC_OFF;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; function.maxDynamicSharedSizeBytes = opt_in;
    function.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(
        &result, &device, &function, &state, threads, used);
    std::printf("%d\\n", error ? -1 : result.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_occupancy_is_what_nvidias_header_computes(tmp_path: Path) -> None:
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    if not (include / "cuda_occupancy.h").is_file():
        pytest.skip("this Triton does not bring cuda_occupancy.h")
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY)
    program = tmp_path / "occupancy"
    subprocess.run(
        ["g++", "-O0", "-I", str(include), str(program) + ".cpp", "-o", str(program)], check=True
    )
    cases = [
        (chip, threads, registers, shared)
        for chip in LIMITS
        if chip != "sm_120"  # not known to the headers of older Tritons
        for threads in (32, 96, 128, 160, 256, 512, 1024)
        for registers in (16, 31, 32, 40, 64, 65, 96, 128, 168, 255)
        for shared in (0, 1, 8192, 49152, 65536, 101376, 101377, 166912, 232448, 232449)
    ]
    lines = [
        f"{int(chip[3:]) // 10} {int(chip[3:]) % 10} {LIMITS[chip].warps} {LIMITS[chip].shared} "
        f"{LIMITS[chip].shared_block} {threads} {registers} {shared}"
        for chip, threads, registers, shared in cases
    ]
    done = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    expected = list(map(int, done.stdout.split()))
    assert len(expected) == len(cases)
    assert (min(expected), max(expected)) == (0, 32)
    assert [blocks_at_once(*case) for case in cases] == expected


# What is counted in the interpreter.

COUNTED = """
import json, sys
from dataclasses import asdict
import torch, triton, triton.language as tl
from jepa_fast.perf.traffic import record_call, recording

@triton.jit
def windows(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + i, mask=i < n) + tl.load(x + i + 1, mask=i < n)
    tl.store(out + i, total, mask=i < n)

@triton.jit
def count(x, total, BLOCK: tl.constexpr):
    values = tl.load(x + tl.arange(0, BLOCK))
    tl.atomic_add(total, tl.sum(values))
    tl.atomic_cas(total, 0, 1)

@triton.jit
def tile(x, out, rows, columns, SIZE: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [rows, columns], [columns, 1], [SIZE, SIZE])
    target = tl.make_tensor_descriptor(out, [rows, columns], [columns, 1], [SIZE, SIZE])
    row = tl.program_id(0) * SIZE
    target.store([row, 0], source.load([row, 0]))

@triton.jit
def rows(x, out, count, width, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    mask = (d < width) & (row < count)
    tl.store(out + row * width + d, tl.load(x + row * width + d, mask=mask), mask=mask)

x, out = torch.ones(101, dtype=torch.float16), torch.empty(100, dtype=torch.float16)
numbers, total = torch.ones(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
matrix, copy = torch.ones(20, 16), torch.empty(20, 16)

def call():
    windows[(4,)](x, out, 100, BLOCK=32)
    count[(2,)](numbers, total, BLOCK=64)
    count[(1,)](numbers, total, BLOCK=64)
    tile[(2,)](matrix, copy, 20, 16, SIZE=16)
    rows[(9,)](matrix, copy, 7, 5, BLOCK=8)
    out.view(10, 10).add_(1)
    torch.empty(3)
    torch.promote_types(out.dtype, x.dtype)

record = record_call(call)
print(json.dumps([{name: asdict(each) for name, each in record.kernels.items()},
                  record.torch_operations]))
with recording() as nothing:
    pass
windows[(4,)](x, out, 100, BLOCK=32)
assert not nothing.kernels
"""


def test_every_way_to_memory_is_counted(tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text(COUNTED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "counted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels, operations = json.loads(done.stdout)
    # Masked lanes move nothing; neighbours overlap in all bytes but the last two.
    assert Moved(**kernels["windows"]) == Moved(1, 400, 202, 200, 200)
    # Three programs in two launches; an atomic operation reads and writes its 4 bytes.
    assert Moved(**kernels["count"]) == Moved(2, 3 * 264, 2 * 260, 3 * 8, 2 * 4)
    # Descriptors leave out what is beyond the matrix: 20 rows, not 32.
    assert Moved(**kernels["tile"]) == Moved(1, 1280, 1280, 1280, 1280)
    # A mask that is a single number in part: 7 rows of 5.
    assert Moved(**kernels["rows"]) == Moved(1, 140, 140, 140, 140)
    assert operations == {"aten.add_": 1}


def test_ema_update_moves_what_its_byte_model_says_and_its_table() -> None:
    # Per element 8 bytes read and 4 written; per chunk 3 numbers of its row, and the momentum.
    report = Report.read(max(BASELINES.glob("triton-*.json")))
    (call,) = [call for call in report.traffic or () if call.name == "ema_update_-float32"]
    elements, chunks = 40_000 + 16, 3 + 1
    assert call.kernels == {
        "ema_update_kernel": Moved(
            launches=1,
            read=8 * elements + chunks * (3 * 8 + 8),
            read_unique=8 * elements + chunks * 3 * 8 + 8,
            written=4 * elements,
            written_unique=4 * elements,
        )
    }
    assert (call.minimum_read, call.minimum_written) == (8 * elements, 4 * elements)


def test_baselines_agree_about_traffic_which_no_version_of_triton_changes() -> None:
    reports = [Report.read(file) for file in sorted(BASELINES.glob("triton-*.json"))]
    assert len(reports) >= 2
    assert all(report.traffic == reports[0].traffic for report in reports)


# The public function.


def _reject(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    module = _module(tmp_path, "scratch_rejected")
    arguments = {
        "kernel": module.add,
        "signature": dict(ADD),
        "configs": [{"BLOCK": 1024}],
        "targets": ["sm_90"],
        "launch": _launch(),
    }
    change(arguments)
    audit(**arguments)


WRONG: list[tuple[type[Exception], str, Callable[[dict[str, Any]], object]]] = [
    (
        TypeError,
        'interpreted.*put that below `if __name__ == "__main__":`',
        lambda a: a.update(kernel=InterpretedFunction()),
    ),
    (TypeError, "function under @triton.jit, got function", lambda a: a.update(kernel=print_it)),
    (ValueError, "unknown: z", lambda a: a["signature"].update(z="i32")),
    (ValueError, "missing: y", lambda a: a["signature"].pop("y")),
    (ValueError, "given in both: BLOCK", lambda a: a["signature"].update(BLOCK="i32")),
    (ValueError, r"signature\['n'\] must be a type", lambda a: a["signature"].update(n="int")),
    (ValueError, "at least one config", lambda a: a.update(configs=[])),
    (ValueError, "must differ", lambda a: a.update(configs=[{"BLOCK": 64}, {"BLOCK": 64}])),
    (ValueError, "some of sm_80, .*got .*sm_70", lambda a: a.update(targets=["sm_70"])),
    (TypeError, "must be a Launch, got dict", lambda a: a.update(launch={})),
    (
        ValueError,
        "launch.arguments must be those of the signature",
        lambda a: a.update(launch=Launch((1,), {"x": 1})),
    ),
    (
        ValueError,
        r"launch.grid must be one to three positive integers.*\(0,\)",
        lambda a: a.update(launch=dataclasses.replace(a["launch"], grid=(0,))),
    ),
]


class InterpretedFunction:
    """What `@triton.jit` makes under TRITON_INTERPRET=1, by its name."""


def print_it() -> None:
    """No kernel."""


@pytest.mark.parametrize(("error", "told", "change"), WRONG, ids=[row[1] for row in WRONG])
def test_wrong_arguments_are_named(
    error: type[Exception], told: str, change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    with pytest.raises(error, match=told):
        _reject(change, tmp_path)


def test_a_kernel_without_a_file_cannot_be_launched_elsewhere() -> None:
    names: dict[str, Any] = {"__name__": "nowhere"}
    exec("def kernel(x):\n    pass", names)
    kernel = dataclasses.make_dataclass("Kernel", ["fn"])(names["kernel"])
    from jepa_fast.perf.interpreted import kernel_traffic

    with pytest.raises(ValueError, match=r"must be in a file .* got nowhere\.kernel"):
        kernel_traffic(kernel, [], {})


@pytest.mark.tier2
def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path) -> None:
    module = _module(tmp_path, "scratch_wrong", SCRATCH.replace("tl.load(x + i", "tl.load(n + i"))
    with pytest.raises(BuildFailed, match=r"add BLOCK=64 does not compile for sm_90: "):
        audit(module.add, ADD, [{"BLOCK": 64}], ["sm_90"])


def test_an_address_out_of_range_is_explained(tmp_path: Path) -> None:
    module = _module(
        tmp_path, "scratch_outside", SCRATCH.replace("tl.load(x + i", "tl.load(x + i * 65536 * n")
    )
    with pytest.raises(
        BuildFailed, match=r"died of SIG\w+ in the last of these(?s:.*)add BLOCK=64"
    ):
        audit(module.add, ADD, [{"BLOCK": 64}], ["sm_90"], _launch())


@pytest.mark.tier2
def test_the_example_runs_as_a_script_and_writes_a_baseline(tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/audit_kernel.py"), "--write", str(baseline)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "40,000    40,000   40,000   20,000    20,000   20,000" in done.stdout
    assert len(Report.read(baseline).kernels or ()) == 3


# The command.

MINE = ["audit", "--op", "ema_update_", "--traffic-only"]


def _said(arguments: Sequence[str], code: int, capsys: Capture) -> str:
    assert main(arguments) == code
    captured = capsys.readouterr()
    return captured.err if code > 1 else captured.out


def test_unknown_operators_and_chips_are_listed(capsys: Capture) -> None:
    told = _said(["audit", "--op", "ema", "latent_loss"], 2, capsys)
    assert "unknown operator: ema; there are: " in told
    assert "ema_update_" in told
    told = _said(["audit", "--target", "sm_70"], 2, capsys)
    assert "unknown chip: sm_70; there are: sm_100, sm_120, sm_80" in told


def test_a_missing_baseline_is_named_with_those_there_are(tmp_path: Path, capsys: Capture) -> None:
    told = _said([*MINE, "--compare", str(tmp_path / "no.json")], 3, capsys)
    assert "no.json: make it with --write" in told
    (tmp_path / "triton-2.0.json").write_text("{}")
    told = _said(["audit", "--compare", str(tmp_path)], 3, capsys)
    assert "there are triton-2.0.json" in told
    with pytest.raises(BaselineMissing):
        Report({}, None, None).compare(tmp_path / "no.json")


def test_a_baseline_of_another_version_or_kind_is_refused(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "b.json"
    file.write_text(Report({"triton": "2.0.1"}, [], []).to_text())
    told = _said(["audit", "--compare", str(file)], 4, capsys)
    assert "compiled by Triton 2.0.1, these by " in told
    assert "triton==2.0.*" in told
    file.write_text(json.dumps({**Report({}, [], []).to_json(), "format": 0}))
    assert "has format 0, this version reads 1" in _said([*MINE, "--compare", str(file)], 4, capsys)
    file.write_text('{"rounds": []}')
    assert "not the report of an audit" in _said([*MINE, "--compare", str(file)], 2, capsys)
    file.write_text('{"format": 1, "kind": "audit", "kernels": [{"name": "k"}], "traffic": null}')
    assert "is damaged: " in _said([*MINE, "--compare", str(file)], 2, capsys)
    file.write_text('{"half')
    assert "is not JSON" in _said([*MINE, "--compare", str(file)], 2, capsys)
    with pytest.raises(PerfError):
        Report({}, None, None).compare(file)


def test_a_baseline_of_other_chips_alone_is_refused(
    instant: Report, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "b.json"
    file.write_text(instant.to_text())
    told = _said(["audit", "--target", "sm_80", "sm_100", "--compare", str(file)], 4, capsys)
    assert "kernels are of sm_90, and none of sm_80, sm_100" in told
    assert "--target" in told
    assert main(["audit", "--target", "sm_80", "sm_90", "--compare", str(file)]) == 0
    traffic = ["audit", "--target", "sm_80", "--traffic-only", "--compare", str(file)]
    assert main(traffic) == 0


def test_parts_exclude_each_other(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["audit", "--no-traffic", "--traffic-only"])
    assert stopped.value.code == 2


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> Report:
    """An audit without the work."""
    here = {"triton": "3.8.0"}
    report = Report(here, [_kernel()], [CallTraffic("c", {"k": Moved(1, 4, 4)})])
    monkeypatch.setattr("jepa_fast.perf.kernel_audit.versions", lambda: here)
    monkeypatch.setattr("jepa_fast.perf.operator_audit.versions", lambda: here)
    monkeypatch.setattr(
        "jepa_fast.perf.operator_audit.audit_operators", lambda *args, **named: report
    )
    return report


def test_results_and_summaries_of_a_regression(
    instant: Report, tmp_path: Path, capsys: Capture
) -> None:
    better = dataclasses.replace(instant, traffic=[CallTraffic("c", {"k": Moved(1, 3, 3)})])
    baseline, written = tmp_path / "better.json", tmp_path / "new" / "now.json"
    baseline.write_text(better.to_text())
    summary, tests = tmp_path / "summary.md", tmp_path / "tests.xml"
    files = ["--markdown", str(summary), "--junit", str(tests), "--write", str(written)]
    told = _said(["audit", "--compare", str(baseline), *files], 1, capsys)
    lines = [
        "traffic: k [c] on any chip: bytes read 3 -> 4",
        "traffic: k [c] on any chip: distinct bytes read 3 -> 4",
    ]
    worse = "".join(f"WORSE {line}\n" for line in lines)
    assert told.endswith(f"{worse}compared with {baseline}: 2 numbers are worse\n")
    assert all(line in summary.read_text() for line in lines)
    assert "**1 of 2 got worse**" in summary.read_text()
    suite = ElementTree.parse(tests).getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert [case.get("name") for case in suite if len(case)] == ["c on any chip"]
    assert Report.read(written) == instant
    assert main(["audit", "--markdown", str(summary)]) == 0
    assert "**compared with nothing**" in summary.read_text()


def test_a_write_that_fails_leaves_the_earlier_file_whole(
    instant: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    file = tmp_path / "baseline.json"
    assert main(["audit", "--write", str(file)]) == 0
    earlier = file.read_text()
    assert Report.read(file) == instant

    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jepa_fast.perf.files.os.replace", full)
    assert main(["audit", "--write", str(file)]) == 7
    assert "No space left on device" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["baseline.json"]
    assert file.read_text() == earlier


def test_a_folder_holds_a_baseline_a_triton(
    instant: Report, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "baselines"
    assert main(["audit", "--write", str(folder)]) == 0
    assert [each.name for each in folder.iterdir()] == ["triton-3.8.json"]
    capsys.readouterr()
    assert main(["audit", "--compare", str(folder), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["findings"], value["notes"]) == ([], [])
    assert Report.from_json(value) == instant


def test_a_library_without_cuda_is_said_not_to_be_audited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jepa_fast.ops import _build
    from jepa_fast.perf.operator_audit import CUDA, audit_operators

    record = _build.Record(["cpu"], {"cuda": "no CUDA compiler:\n nvcc not found"})
    monkeypatch.setattr(_build.Record, "read", classmethod(lambda *args: record))
    monkeypatch.setattr("jepa_fast.perf.operator_audit.all_cases", list)  # as if Triton had none
    report = audit_operators(["masked_linear"], traffic=False)
    assert "no CUDA compiler: nvcc not found" in report.not_audited[CUDA]
    assert "no kernels of its own for a GPU" in report.not_audited["masked_linear"]
    assert "nvcc" not in report.versions
    record.parts.append("cuda")
    record.sources = "of another day"
    report = audit_operators(["masked_linear"], traffic=False)
    assert "older than its sources" in report.not_audited[CUDA]


def test_summaries() -> None:
    checks = [Check("a|b", True), Check("<c>", False, "worse", ("1 -> 2",))]
    text = markdown("Title", checks, "numbers")
    assert text.index("| **worse** | <c> | worse<br>1 -> 2 |") < text.index("| ok | a\\|b |  |")
    assert "```text\nnumbers\n```" in text
    suite = ElementTree.fromstring(junit("suite", checks).encode())[0]
    assert [case.get("name") for case in suite] == ["a|b", "<c>"]
    (failure,) = suite[1]
    assert (failure.get("message"), failure.text) == ("worse", "1 -> 2")


def test_summaries_hold_whatever_an_error_says() -> None:
    said = "\x1b[31mE  assert\x1b[0m \x00 \udce4 \uffff é"
    checks = [Check("c", False, said, (said,)), Check(said, True, said, told=False)]
    suite = ElementTree.fromstring(junit("suite", checks).encode())[0]
    plain = r"E  assert \x00 \udce4 \uffff é"
    (failure,), (skipped,) = suite
    assert (failure.get("message"), failure.text) == (plain, plain)
    assert (suite[1].get("name"), skipped.get("message")) == (plain, plain)
    assert f"| **worse** | c | {plain}<br>{plain} |" in markdown(said, checks, said)
    assert markdown(said, checks, said).encode()


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("kernels", "registers", "many"),
        ("kernels", "occupancy", [1]),
        ("kernels", "config", 7),
        ("kernels", "chip", None),
        ("traffic", "minimum_read", "7"),
        ("traffic", "torch_operations", {"aten::add": "x"}),
    ],
)
def test_a_baseline_of_numbers_that_are_none_is_refused(part: str, name: str, value: Any) -> None:
    file = sorted((ROOT / "benchmarks/results/audit").glob("*.json"))[-1]
    report = json.loads(file.read_text())
    report[part][0][name] = value
    with pytest.raises(PerfError, match=f"baseline is damaged: TypeError: {name} cannot be"):
        Report.from_json(report, "baseline")
    report = json.loads(file.read_text())
    report["kernels"][0]["instructions"]["loads"] = {"16": "x"}
    with pytest.raises(PerfError, match="baseline is damaged: TypeError: loads cannot be"):
        Report.from_json(report, "baseline")


def test_what_only_one_of_two_reports_holds_is_said() -> None:
    compiled, counted = Report({}, [], None), Report({}, None, [])
    assert compiled.compare(counted) == []
    assert compiled.notes(counted) == [
        "not compared: compiled kernels, as the baseline holds none",
        "not compared: traffic, which this audit left out",
    ]
    assert compiled.notes(compiled) == []
