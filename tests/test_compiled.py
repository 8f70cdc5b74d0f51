"""Tier 2: every GPU kernel compiled for GPUs that are not here, and what the machine code says.

Triton kernels join through `compile_cases()` in their `triton.py`, CUDA kernels through csrc/cuda.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_fast import ops  # noqa: F401  (registers the operators)
from jepa_fast.ops import _build, _configs, _launch
from jepa_fast.ops._compile import ARCHITECTURES, CompileCase, all_cases
from jepa_fast.ops._traffic import all_traffic_cases
from jepa_fast.perf.audit_report import CompiledKernel, Report
from jepa_fast.perf.audit_rules import compare, compare_across_tritons
from jepa_fast.perf.errors import BaselineMissing

triton = pytest.importorskip("triton", reason="needs triton to compile its kernels")
import triton.language as tl  # noqa: E402

from jepa_fast.ops.affine_coupling import triton as coupling  # noqa: E402
from jepa_fast.ops.assemble_predictor_tokens import triton as assembly  # noqa: E402
from jepa_fast.ops.gather_patches import triton as gather  # noqa: E402
from jepa_fast.ops.latent_loss import triton as latent  # noqa: E402
from jepa_fast.ops.masked_linear import triton as masked  # noqa: E402
from jepa_fast.ops.mixture_nll import triton as mixture  # noqa: E402
from jepa_fast.ops.patch_word_consistency import triton as consistency  # noqa: E402
from jepa_fast.ops.q_sample import triton as noised  # noqa: E402
from jepa_fast.ops.text_cross_attention import triton as attention  # noqa: E402
from jepa_fast.ops.text_cross_attention import triton_backward as attention_backward  # noqa: E402
from jepa_fast.perf.kernel_audit import compile_all  # noqa: E402
from jepa_fast.perf.operator_audit import (  # noqa: E402
    CUDA,
    audit_operators,
    baseline_file,
    installed_release,
    newest_baseline,
)

pytestmark = pytest.mark.tier2

CASES = all_cases()
BASELINES = Path(__file__).resolve().parents[1] / "benchmarks/results/audit"

# CUDA kernels that move no rows: 16 bytes at once are for those that do.
WITHOUT_ROWS = {
    "draw_block_masks_kernel": "reads one id an image; each lane writes an index where a bit is set"
}

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@functools.cache
def _compiled(case_index: int, architecture: int) -> Any:
    return CASES[case_index].compile(architecture)


def _narrow_products(ttir: str) -> list[str]:
    """Products in 32 bits of values unknown at compile time that an address is made from.

    Such a product overflows silently from 2^31 elements on. A range times a constant is fine.
    """
    definitions = dict(re.findall(r"^\s*(%[\w#]+)(?::\d+)? = (.*)$", ttir, re.MULTILINE))

    def operands(definition: str) -> list[str]:
        return re.findall(r"%[\w#]+", definition.partition(" loc(")[0])

    def bounded(name: str) -> bool:
        definition = definitions.get(name)  # arguments and loop variables have none
        if definition is None:
            return False
        if re.match(r"arith\.constant|tt\.make_range", definition):
            return True
        passes = r"tt\.(splat|expand_dims|broadcast)|arith\.(addi|subi|muli|extsi|remsi|remui)"
        return bool(re.match(passes, definition)) and all(map(bounded, operands(definition)))

    def narrow_product(name: str) -> str | None:
        definition = definitions.get(name, "")
        if re.match(r"arith\.muli", definition):
            narrow = re.search(r": (?:tensor<[\dx]*x)?i32", definition)
            if narrow and not all(map(bounded, operands(definition))):
                return f"{name} = {definition}"
        passes = r"tt\.(splat|expand_dims|broadcast)|arith\.(addi|subi|muli|ext[su]i)"
        if re.match(passes, definition):
            return next(filter(None, map(narrow_product, operands(definition))), None)
        return None

    offsets = [
        operands(definition)[1]
        for definition in definitions.values()
        if definition.startswith("tt.addptr")
    ]
    return sorted({found for offset in offsets if (found := narrow_product(offset))})


def test_shipped_kernels_keep_to_the_rules_and_to_the_baseline() -> None:
    # One test, so that all is compiled and read once.
    report = audit_operators()
    _check_cuda_is_there(report)
    kernels = report.kernels or []
    for compiler, architectures in (("triton", ARCHITECTURES), ("nvcc", _build.CUDA_ARCHITECTURES)):
        chips = {kernel.chip for kernel in kernels if kernel.compiler == compiler}
        if compiler == "triton" or CUDA not in report.not_audited:
            assert chips == {f"sm_{architecture}" for architecture in architectures}
    complaints = [each for kernel in kernels for each in _broken_rules(kernel)]
    complaints += _worse_than_the_baseline(report)
    assert not complaints, "\n".join(complaints)


def _check_cuda_is_there(report: Report) -> None:
    why = report.not_audited.get(CUDA)
    if why and shutil.which("nvcc") is not None and "left it out" not in why:
        pytest.fail(f"nvcc is here, but the native library has no CUDA kernels: {why}")


def _broken_rules(kernel: CompiledKernel) -> list[str]:
    where, mix = f"{kernel.name} on {kernel.chip}", kernel.instructions
    rules = {
        "spills registers": kernel.stack + kernel.local + mix.local_loads + mix.local_stores == 0,
        "cannot be launched: no block fits": kernel.occupancy != 0,
        # Such as a product that a Triton takes wrongly, and with it all that follows.
        "stores nothing: the compiler has dropped it": sum(mix.stores.values()) > 0,
    }
    if kernel.compiler == "nvcc":
        if not any(name in kernel.name for name in WITHOUT_ROWS):
            rules["has no 16-byte load"] = mix.loads.get(16, 0) > 0
            rules["has no 16-byte store"] = mix.stores.get(16, 0) > 0
    else:
        allowed = _narrow_accesses_allowed(kernel.name)
        widths = [*mix.loads.items(), *mix.stores.items()]
        narrow = sum(count for width, count in widths if width < 16)
        rules[f"has {narrow} accesses below 16 bytes, {allowed} are scalars'"] = narrow <= allowed
    return [f"{where} {broken}" for broken, kept in rules.items() if not kept]


def _narrow_accesses_allowed(name: str) -> float:
    """Those of single numbers and of masks, of which Triton's own code tells; any, where the case
    is narrow.
    """
    (index,) = (i for i, case in enumerate(CASES) if case.name == name)
    if not CASES[index].wide:
        return float("inf")
    code = _compiled(index, ARCHITECTURES[0]).asm["ttir"]
    return len(re.findall(r"tt\.(?:load|store) .*: (?:!tt\.ptr|tensor<\d+x!tt\.ptr<i8>>)", code))


def _worse_than_the_baseline(report: Report) -> list[str]:
    """Of this Triton; where there is none, what does not depend on it, of the newest."""
    try:
        baseline = Report.read(baseline_file(BASELINES, installed_release()))
    except BaselineMissing:
        newest = Report.read(newest_baseline(BASELINES))
        return list(map(str, compare_across_tritons(report, newest).findings))
    return list(map(str, compare(report, baseline).findings))


@each_case
def test_addresses_are_not_multiplied_in_32_bits(case: CompileCase) -> None:
    compiled = _compiled(CASES.index(case), ARCHITECTURES[0])
    assert _narrow_products(compiled.asm["ttir"]) == []


@triton.jit
def _overflowing(x, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * stride
    fine = tl.arange(0, BLOCK) * 4
    tl.store(x + row + fine, tl.load(x + fine))


def test_the_address_rule_fires() -> None:
    case = CompileCase(
        name="overflowing",
        kernel=_overflowing,
        signature={"x": "*fp32", "stride": "i32", "BLOCK": "constexpr"},
        constants={"BLOCK": 256},
    )
    compiled = case.compile(90)
    (product,) = _narrow_products(compiled.asm["ttir"])
    assert "i32" in product


def test_the_rules_about_shipped_kernels_fire() -> None:
    # One load and one store of 4 bytes a thread, as nothing says that `x` is aligned.
    case = CompileCase(
        name=CASES[0].name,  # a wide one
        kernel=_overflowing,
        signature={"x": "*fp32", "stride": "i32", "BLOCK": "constexpr"},
        constants={"BLOCK": 4096},
    )
    (kernel,) = compile_all([case], ["sm_90"])
    (broken,) = _broken_rules(kernel)
    assert re.search(r"on sm_90 has \d+ accesses below 16 bytes", broken)


def test_every_triton_operator_has_cases() -> None:
    from jepa_fast.ops._registry import OPERATORS

    with_triton = {name for name, operator in OPERATORS.items() if "triton" in operator.backends}
    assert {case.name.partition("-")[0] for case in CASES} >= with_triton
    assert len({case.name for case in CASES}) == len(CASES)
    calls = all_traffic_cases()
    assert {call.operator for call in calls} >= with_triton
    assert len({call.name for call in calls}) == len(calls)


def test_an_address_has_64_bits_wherever_it_lies() -> None:
    """On a CPU some lie low, by chance, and a case would be another from process to process."""
    addresses = {f"a{i}": 4096 for i in range(24)}
    arguments = {"table": torch.empty(24, dtype=torch.int64), **addresses}
    case = _launch._case(consistency.addresses_kernel, arguments, {"COUNT": 24}, 1)
    assert {case.signature[name] for name in addresses} == {"i64"}


def _calls_of_ones() -> dict[str, Callable[[], object]]:
    """Launchers where every size, and with it every stride, is 1."""
    brain, index = torch.bfloat16, torch.zeros(1, 1, 1, dtype=torch.int64)
    row, rows, scalar = torch.empty(1, 1), torch.empty(1, 1, 1), torch.empty(())
    half, halves, words = row.to(brain), rows.to(brain), torch.empty(1, 1, 1, 1, dtype=brain)
    degree, mask, seed = index[0, 0], torch.zeros(1, dtype=torch.bool), index[0, 0]
    coupled = (row, row, row, mask, 2.0, False)
    density = (row, rows, rows, rows, "gaussian", "coordinate", 1e-3, "exp")
    wide = (None, None, None, 1, None, "max", "relu", 0.1)
    narrow = (None, None, None, 1, "relu", 0.1)
    winner = torch.zeros(halves.shape, dtype=torch.uint8)
    return {
        "coupling": partial(coupling.affine_coupling, *coupled),
        "coupling-backward": partial(
            coupling.affine_coupling_backward, row, row[0], *coupled, (True,) * 3
        ),
        "assembly": partial(assembly.assemble_predictor_tokens, rows, row[0], row, index[0], index),
        "assembly-backward": partial(
            assembly.assemble_predictor_tokens_backward,
            torch.empty(1, 2, 1),
            index[0],
            index,
            1,
            (True,) * 3,
        ),
        "gather": partial(gather.gather_patches, rows, index[0]),
        "gather-backward": partial(gather.gather_patches_backward, rows, index[0], 1),
        "latent": partial(
            latent.latent_loss, rows, rows, index, None, "smooth_l1", True, 1.0, 1e-5, True
        ),
        "masked": partial(masked.masked_linear, half, half, half[0], degree, degree, False),
        "masked-backward": partial(
            masked.masked_linear_backward,
            *(half, half, half, half[0], degree, degree, False),
            (True,) * 3,
        ),
        "mixture": partial(mixture.nll_and_posterior, *density),
        "mixture-backward": partial(
            mixture.mixture_nll_backward, row[0], *density[:4], row, *density[4:], (True,) * 4
        ),
        "consistency": partial(consistency.patch_word_consistency, [halves], [words], *narrow),
        "consistency-backward": partial(
            consistency.patch_word_consistency_backward, scalar, [halves], [words], *narrow
        ),
        "noised": partial(noised.q_sample, row, row, row, seed, 1),
        "denoised": partial(noised.denoising_loss, rows, row, seed, 1, True),
        "attention": partial(attention.text_cross_attention, halves, words, words, halves, *wide),
        "attention-backward": partial(
            attention_backward.text_cross_attention_backward,
            *(halves, scalar, winner, halves, words, words),
            *wide,
        ),
    }


@pytest.mark.parametrize("name", _calls_of_ones())
def test_sizes_of_one_compile(name: str) -> None:
    """Triton makes constants of them, which have no methods; its interpreter does not."""
    with _configs.pretend("default"), _launch._recording() as cases:
        _calls_of_ones()[name]()
    assert cases
    for case in cases:
        case.compile(90)
