"""draw_block_masks: every backend against the reference to the last bit, and what holds for all."""

from __future__ import annotations

import random
import sys
import threading
import time
from typing import Any

import pytest
import torch
from backends import backends, in_emulator, needs_native
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import Sample
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from jepa_fast import BackendError
from jepa_fast.masks import BlockMaskSampler, MaskCollator
from jepa_fast.ops import draw_block_masks
from jepa_fast.ops._registry import OPERATORS
from jepa_fast.ops.draw_block_masks import reference

each_backend = backends(OPERATORS["draw_block_masks"].backends)
each_kernel = backends(("cpu", "cuda"), emulated=False)

PAPER = {
    "seed": 1, "step": 2, "grid": (14, 14), "num_targets": 4, "target_size": (6, 5),
    "context_size": (13, 13), "min_context": 10,
}  # fmt: skip


def _ids(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randint(-(2**62), 2**62, (3,), generator=generator),)


SAMPLES = [
    Sample(
        name=name,
        function=draw_block_masks,
        operators=("draw_block_masks",),
        make=_ids,
        keywords=PAPER | keywords,
        differentiable=False,
    )
    for name, keywords in (
        ("paper", {}),
        ("capped", {"max_context": 20}),
        ("overlap", {"allow_overlap": True}),
    )
]


@st.composite
def _calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of any feasible call on grids from 3x3 to 128x128."""
    side = st.one_of(st.integers(3, 16), st.integers(3, 128), st.sampled_from([63, 64, 65, 128]))
    grid = (draw(side), draw(side))
    share = st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0])

    def size() -> tuple[int, int]:
        height, width = (draw(st.integers(1, max(1, int(n * draw(share))))) for n in grid)
        return height, width

    target, context, overlap = size(), size(), draw(st.booleans())
    most = reference.most_context(grid, target, context, overlap)
    if most == 0:
        overlap, most = True, context[0] * context[1]
    least = draw(st.one_of(st.integers(1, most), st.just(1), st.just(most)))
    # A hopeless search on a large grid takes the reference seconds.
    targets = draw(st.integers(1, 6 if grid[0] * grid[1] <= 400 else 2))
    return {
        "seed": draw(st.integers(0, 2**63 - 1)),
        "step": draw(st.one_of(st.integers(0, 9), st.integers(0, 2**63 - 1))),
        "grid": grid,
        "num_targets": targets,
        "target_size": target,
        "context_size": context,
        "min_context": least,
        "max_context": draw(st.one_of(st.none(), st.integers(least, most + 9))),
        "allow_overlap": overlap,
    }


def _assert_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b.cpu())


@each_kernel
@settings(
    max_examples=1500,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
@given(call=_calls(), ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
def test_kernels_equal_the_reference(
    backend: str, device: str, call: dict[str, Any], ids: list[int]
) -> None:
    sample_ids = torch.tensor(ids)
    expected = draw_block_masks(sample_ids, **call, backend="reference")
    _assert_equal(draw_block_masks(sample_ids.to(device), **call, backend=backend), expected)


@in_emulator
@settings(max_examples=100, deadline=None, derandomize=True)
@given(call=_calls(), ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
def test_the_emulated_kernel_equals_the_reference(
    backend: str, device: str, call: dict[str, Any], ids: list[int]
) -> None:
    sample_ids = torch.tensor(ids, device=device)
    expected = draw_block_masks(sample_ids, **call, backend="reference")
    _assert_equal(draw_block_masks(sample_ids, **call, backend=backend), expected)


@each_kernel
def test_thousands_of_tight_configurations_end(
    backend: str, device: str, backends_run: list[tuple[str, str]]
) -> None:
    """As much context as any layout can leave, which few do; one patch more is refused."""
    numbers = random.Random(0)
    for _ in range(4000):
        grid = (numbers.randint(3, 128), numbers.randint(3, 128))
        target, context = ([numbers.randint(1, n) for n in grid] for _ in range(2))
        most = reference.most_context(grid, target, context, False)
        call = {
            "seed": numbers.getrandbits(63), "step": numbers.getrandbits(40), "grid": grid,
            "num_targets": numbers.randint(1, 4), "target_size": target, "context_size": context,
        }  # fmt: skip
        ids = torch.tensor([numbers.getrandbits(62)], device=device)
        with pytest.raises(ValueError, match=f"min_context must be at most {most},"):
            draw_block_masks(ids, **call, min_context=most + 1, backend=backend)
        if not most:
            continue
        _, real, lengths, _ = draw_block_masks(ids, **call, min_context=most, backend=backend)
        assert lengths.tolist() == [most] == real.sum(1).tolist()
    assert set(backends_run) == {("draw_block_masks", backend)}


@pytest.mark.usefixtures("poisoned_memory")
@each_backend
def test_masks_belong_to_the_sample(backend: str, device: str) -> None:
    """Whatever the batch, its order and its strides."""
    ids = torch.tensor([5, -900, 17, 2**40, 33, 5], device=device)
    whole = draw_block_masks(ids, **PAPER, backend=backend)
    _assert_equal(whole, draw_block_masks(ids.cpu(), **PAPER, backend="reference"))
    for part in ([0], [5, 4, 3, 2, 1, 0], [1, 1, 2], []):
        expected = tuple(tensor[part] for tensor in whole)
        _assert_equal(draw_block_masks(ids[part], **PAPER, backend=backend), expected)
    for strided in (ids.repeat_interleave(3)[1::3], ids[:1].expand(6)):
        expected = draw_block_masks(strided.contiguous(), **PAPER, backend=backend)
        _assert_equal(draw_block_masks(strided, **PAPER, backend=backend), expected)


@needs_native
def test_threads_change_no_bit() -> None:
    ids = torch.arange(3000)  # some chunks of what a thread is worth
    before = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            drawn.append(draw_block_masks(ids, **PAPER, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    _assert_equal(drawn[1], drawn[0])
    _assert_equal(drawn[2], drawn[0])


@needs_native
def test_other_python_threads_run_meanwhile() -> None:
    turns, stop, started = 0, threading.Event(), threading.Event()

    def run() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1
            started.set()
            time.sleep(0)  # hands the interpreter back, which nothing else makes it do below

    # So tight, with so many targets, that every image takes 20 * 40 layouts.
    call = PAPER | {"num_targets": 40, "target_size": (9, 9), "context_size": (9, 9)}
    call["min_context"] = reference.most_context((14, 14), (9, 9), (9, 9), False)
    ids = torch.arange(4000)
    draw_block_masks(ids[:1], **call, backend="cpu")  # imports and loads
    interval = sys.getswitchinterval()
    other = threading.Thread(target=run)
    other.start()
    started.wait()
    try:
        # No thread is made to stop, so the other one runs only while this one has let go.
        sys.setswitchinterval(1000)
        before = turns
        draw_block_masks(ids, **call, backend="cpu")
        during = turns - before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        other.join()
    # The dispatcher lets go around the kernel and, for a moment, around the operator.
    assert during > 100


@each_backend
def test_borders_are_covered(backend: str, device: str) -> None:
    context, real, _, targets = draw_block_masks(
        torch.arange(2000, device=device), **PAPER, backend=backend
    )
    for patches in (context[real], targets.flatten()):
        rows, columns = patches // 14, patches % 14
        assert set(rows.tolist()) == set(columns.tolist()) == set(range(14))


def test_statistics_are_the_public_collators() -> None:
    """No block of the public collator touches the last row or column, so on a grid with one more of
    each it draws from the places that ours has here; and a batch of one image is not cut."""
    images, side = 3000, 14
    collator = MaskCollator(
        input_size=(side + 1) * 16,
        npred=4,
        enc_mask_scale=(0.6, 0.6),
        pred_mask_scale=(0.16, 0.16),
        aspect_ratio=(0.8, 0.8),
        min_keep=9,
    )
    generator = torch.Generator().manual_seed(0)
    target_size = collator._block_size(generator, (0.16, 0.16), (0.8, 0.8))
    context_size = collator._block_size(generator, (0.6, 0.6), (1.0, 1.0))
    torch.manual_seed(0)
    theirs = torch.zeros(2, side + 1, side + 1)
    lengths = []
    for _ in range(images):
        _, (context,), targets = collator([0])
        theirs[0].view(-1)[context[0]] += 1
        for target in targets:
            theirs[1].view(-1)[target[0]] += 1
        lengths.append(context.shape[1])
    context, real, length, targets = draw_block_masks(
        torch.arange(images), 0, 0, (side, side), 4, target_size, context_size, min_context=10
    )
    assert not theirs[:, -1].any()
    assert not theirs[:, :, -1].any()
    ours = torch.stack(
        [
            torch.bincount(patches, minlength=side * side).view(side, side)
            for patches in (context[real], targets.flatten())
        ]
    )
    # Of a count of independent images the standard deviation is below sqrt(count).
    difference = (ours - theirs[:, :-1, :-1]).abs()
    assert bool((difference <= 5 * (ours + theirs[:, :-1, :-1]).sqrt()).all())
    error = length.double().std() * (2 / images) ** 0.5
    assert abs(length.double().mean() - sum(lengths) / images) < 4 * error


@each_backend
def test_what_goes_beyond_the_context(backend: str, device: str) -> None:
    context, real, lengths, targets = draw_block_masks(
        torch.arange(9, device=device), **PAPER, backend=backend
    )
    most = 13 * 13 - 5 * 4
    assert context.shape == real.shape == (9, most)
    assert targets.shape == (9, 4, 30)
    assert torch.equal(real, torch.arange(most, device=device) < lengths[:, None])
    assert not context[~real].any()


def test_large_grids_go_to_the_reference(
    backends_run: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = PAPER | {"grid": (129, 14)}
    draw_block_masks(torch.arange(2), **call)
    assert backends_run == [("draw_block_masks", "reference")]
    with pytest.raises(BackendError, match="up to 128 patches a side, got 129x14"):
        draw_block_masks(torch.arange(2), **call, backend="cpu")
    for on in ("1", "true", "ON"):
        monkeypatch.setenv("JEPA_FAST_STRICT", on)
        with pytest.raises(BackendError, match="JEPA_FAST_STRICT=1"):
            draw_block_masks(torch.arange(2), **call)
    for off in ("", "0", "no"):
        monkeypatch.setenv("JEPA_FAST_STRICT", off)
        draw_block_masks(torch.arange(2), **call)
    monkeypatch.setenv("JEPA_FAST_STRICT", "2")
    with pytest.raises(ValueError, match=r"JEPA_FAST_STRICT: expected 1 or 0 .*, got '2'"):
        draw_block_masks(torch.arange(2), **call)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_ids": torch.zeros(1, 2, dtype=torch.int64)}, r"sample_ids must be \[B\], got"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*63\), got -1"),
        ({"step": -1}, r"step must be in \[0, 2\*\*63\), got -1"),
        ({"step": 2**63}, r"step must be in \[0, 2\*\*63\), got 9223372036854775808"),
        ({"grid": (14,)}, r"grid must be \(height, width\), got \(14,\)"),
        ({"grid": (0, 14)}, r"grid's sides must be in \[1, 2\*\*63\), got 0"),
        ({"num_targets": 0}, r"num_targets must be in \[1, "),
        ({"min_context": 0}, r"min_context must be in \[1, "),
        ({"max_context": 9}, r"max_context must be in \[10, .*got 9"),
        ({"target_size": (15, 1)}, "target_size must fit into the grid of 14x14, got 15x1"),
        ({"context_size": (1, 15)}, "context_size must fit into the grid of 14x14, got 1x15"),
        ({"min_context": 150}, "min_context must be at most 149, .* or set allow_overlap=True"),
        ({"min_context": 170, "allow_overlap": True}, "at most 169, .*, raise context_size$"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_block_masks(**({"sample_ids": torch.arange(2)} | PAPER | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_ids": [1, 2]}, "sample_ids must be a tensor, got list"),
        ({"sample_ids": torch.zeros(2)}, r"sample_ids must be int64, got torch.float32; use"),
        ({"grid": 14}, r"grid must be a tuple \(height, width\), got int"),
        ({"step": 0.5}, "step must be an int, got float"),
        ({"target_size": (6.0, 5)}, "target_size's sides must be an int, got float"),
        ({"allow_overlap": None}, "allow_overlap must be True or False, got None"),
    ],
)
def test_wrong_types(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        draw_block_masks(**({"sample_ids": torch.arange(2)} | PAPER | changes))


def test_compiled_once_for_all_steps() -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def draw(ids: Tensor, step: int, height: int) -> tuple[Tensor, ...]:
        call = PAPER | {"step": step, "target_size": (height, 5)}
        return draw_block_masks(ids, **call)

    compiled = torch.compile(draw, fullgraph=True, backend=graphs, dynamic=True)
    ids = torch.arange(5)
    for step, height in ((2, 6), (3, 6), (40, 7), (1000, 5)):
        _assert_equal(compiled(ids, step, height), draw(ids, step, height))
    assert graphs.frame_count == 1


@pytest.mark.tier3
def test_a_gpu_is_not_waited_for() -> None:
    sampler = BlockMaskSampler((14, 14))
    ids = torch.arange(64, device="cuda")
    expected = sampler(3, ids.cpu())
    sampler(3, ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = sampler(3, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert masks.context_mask is not None
    assert expected.context_mask is not None
    longest = expected.context.shape[1]
    assert not masks.context_mask[:, longest:].any()
    assert torch.equal(masks.context_mask[:, :longest].cpu(), expected.context_mask)
    assert torch.equal(masks.context[:, :longest].cpu(), expected.context)
    assert torch.equal(masks.targets.cpu(), expected.targets)


@pytest.mark.tier3
def test_a_cuda_graph_draws_for_other_ids() -> None:
    ids = torch.arange(64, device="cuda")
    draw_block_masks(ids, **PAPER, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = draw_block_masks(ids, **PAPER, backend="cuda")
    ids += 1000
    graph.replay()
    _assert_equal(drawn, draw_block_masks(ids.cpu(), **PAPER, backend="reference"))
