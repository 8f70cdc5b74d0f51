"""patch_word_consistency and patch_word_similarity."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import backends, needs_native
from samples import Sample, normal
from tolerance import assert_as_accurate
from torch import Tensor

from jepa_fast import ops
from jepa_fast.errors import BackendError
from jepa_fast.ops._registry import OPERATORS as REGISTERED
from jepa_fast.perf.memory import peak_allocation

OPERATORS = ("patch_word_consistency", "patch_word_consistency_backward")
each_backend = backends(REGISTERED["patch_word_consistency"].backends)


def _masks(batch: int, captions: int, words: int, rows: int, tokens: int) -> dict[str, Tensor]:
    """The last image has no caption, caption 1 no words except in image 0, one word is padding."""
    word_mask = torch.ones(batch, captions, words, dtype=torch.bool)
    caption_mask = torch.ones(batch, captions, dtype=torch.bool)
    word_mask[:, 0, words - 1 :] = False
    word_mask[1:, 1:2] = False
    caption_mask[batch - 1 :] = False
    token_mask = torch.arange(rows * tokens).view(rows, tokens) % 5 != 4
    return {"word_mask": word_mask, "caption_mask": caption_mask, "token_mask": token_mask}


def _sample(
    name: str,
    layers: int = 3,
    batch: int = 2,
    blocks: int = 2,
    tokens: int = 3,
    captions: int = 2,
    words: int = 3,
    width: int = 4,
    masked: bool = False,
    **keywords: Any,
) -> Sample:
    def make(dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        floating: Any = {"dtype": dtype, "generator": generator}
        rows = blocks * batch
        q = [normal(rows, tokens, width, **floating) for _ in range(layers)]
        k = [normal(batch, captions, words, width, **floating) for _ in range(layers)]
        masks = _masks(batch, captions, words, rows, tokens) if masked else {}
        return q, k, *masks.values()

    def function(q: list[Tensor], k: list[Tensor], *masks: Tensor, **keywords: Any) -> Tensor:
        named = dict(zip(("word_mask", "caption_mask", "token_mask"), masks, strict=False))
        return ops.patch_word_consistency(q, k, **named, **keywords)

    return Sample(name, function, OPERATORS, make, keywords)


SAMPLES = [
    _sample("three layers"),
    _sample("masks, heads", layers=2, batch=3, masked=True, num_heads=2),
    _sample("softplus", layers=2, masked=True, similarity="softplus", tau=0.3),
    _sample("one layer", layers=1, blocks=1, tokens=1, captions=1, words=1, width=1),
    _sample("batch 0", layers=2, batch=0),
]


def _inputs(layers: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    batch, blocks, tokens, captions, words, width = 3, 2, 5, 3, 4, 12
    floating: Any = {"dtype": dtype, "generator": generator, "grad": False}
    rows = blocks * batch
    return {
        "q_layers": [normal(rows, tokens, width, **floating) for _ in range(layers)],
        "k_layers": [normal(batch, captions, words, width, **floating) for _ in range(layers)],
        **_masks(batch, captions, words, rows, tokens),
    }


def _naive_similarity(
    inputs: dict[str, Any], num_heads: int, similarity: str, tau: float
) -> list[Tensor]:
    """O of every layer, [R, C, T, S] in float64, one cosine at a time; zero where no word is."""
    found = []
    for q, k in zip(inputs["q_layers"], inputs["k_layers"], strict=True):
        rows, tokens, width = q.shape
        batch, captions, words, _ = k.shape
        head_dim = width // num_heads
        O = torch.zeros(rows, captions, tokens, words, dtype=torch.float64)
        for r, n, t, w in torch.cartesian_prod(*map(torch.arange, O.shape)).tolist():
            b = r % batch
            if not (inputs["word_mask"][b, n, w] and inputs["caption_mask"][b, n]):
                continue
            for h in range(num_heads):
                e = slice(h * head_dim, (h + 1) * head_dim)
                x, y = q[r, t, e].double(), k[b, n, w, e].double()
                cosine = float(x @ y / (x.norm() * y.norm()))
                soft = math.log1p(math.exp(cosine / tau))
                O[r, n, t, w] += (max(cosine, 0) if similarity == "relu" else soft) / num_heads
        found.append(O)
    return found


OPTIONS = [
    {"num_heads": 1, "similarity": "relu", "tau": 0.1},
    {"num_heads": 3, "similarity": "relu", "tau": 0.1},
    {"num_heads": 2, "similarity": "softplus", "tau": 0.5},
]


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values(options: dict[str, Any], dtype: torch.dtype, rel: float) -> None:
    inputs = _inputs(dtype=dtype)
    layers = _naive_similarity(inputs, **options)
    mean = sum(layers) / len(layers)
    total, count = 0.0, 0
    batch = inputs["k_layers"][0].shape[0]
    for r, t in inputs["token_mask"].nonzero().tolist():
        for n in range(inputs["k_layers"][0].shape[1]):
            if inputs["caption_mask"][r % batch, n] and inputs["word_mask"][r % batch, n].any():
                count += len(layers)
                total += sum(float((O - mean)[r, n, t].abs().sum()) for O in layers)
    loss = ops.patch_word_consistency(**inputs, **options)
    assert float(loss) == pytest.approx(total / count, rel=rel)
    assert loss.dtype == dtype
    del inputs["token_mask"]
    torch.testing.assert_close(
        ops.patch_word_similarity(**inputs, **options).double(), mean, rtol=0, atol=1e-6
    )


@each_backend
def test_tokens_that_do_not_count_do_not_whatever_they_hold(backend: str, device: str) -> None:
    moved = {
        n: [y.to(device) for y in x] if "layers" in n else x.to(device)
        for n, x in _inputs().items()
    }
    inputs: dict[str, Any] = moved
    token = tuple((~inputs["token_mask"]).nonzero()[0].tolist())
    found = []
    for filler in (None, torch.nan, torch.inf):
        queries = [q.detach().clone() for q in inputs["q_layers"]]
        for q in queries:
            q[token] = q[token] if filler is None else filler
        leaves = [x.requires_grad_() for x in (*queries, *inputs["k_layers"])]
        loss = ops.patch_word_consistency(**{**inputs, "q_layers": queries}, backend=backend)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for got in found[1:]:
        assert all(torch.equal(one, want) for one, want in zip(got, found[0], strict=True))


def test_similarities_are_in_float32_under_autocast() -> None:
    inputs = _inputs()
    del inputs["token_mask"]
    want = ops.patch_word_similarity(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.patch_word_similarity(**inputs)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_layers_may_come_in_one_tensor() -> None:
    inputs = _inputs()
    stacked = {n: torch.stack(x) if "layers" in n else x for n, x in inputs.items()}
    want = ops.patch_word_consistency(**inputs)
    assert torch.equal(ops.patch_word_consistency(**stacked), want)


def test_equal_layers_are_consistent() -> None:
    inputs = _inputs(layers=1)
    inputs["q_layers"] = [inputs["q_layers"][0], 2 * inputs["q_layers"][0]]
    inputs["k_layers"] = [inputs["k_layers"][0]] * 2
    assert float(ops.patch_word_consistency(**inputs)) < 1e-7


# Sizes that no tile divides, masks, and keys that are views of one projection.
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "one wide head": ({"layers": 2, "tokens": 19, "words": 21, "width": 384}, {}),
    "heads of 24": ({"layers": 2, "words": 17, "width": 192}, {"num_heads": 8}),
    "heads of 80": ({"layers": 2, "width": 240}, {"num_heads": 3}),
    "a head of 96": ({"layers": 3, "tokens": 18, "words": 37, "width": 96}, {}),
    "many captions": ({"layers": 2, "captions": 16, "tokens": 1, "width": 96}, {}),
    "long captions": ({"layers": 2, "captions": 2, "words": 128, "tokens": 1, "width": 96}, {}),
    "24 layers": ({"layers": 24, "tokens": 2, "captions": 1, "words": 1, "width": 80}, {}),
    "one layer": ({"layers": 1}, {}),
    "softplus": ({"layers": 2}, {"similarity": "softplus", "tau": 0.3}),
    "softplus, heads": (
        {"layers": 2, "width": 96},
        {"num_heads": 3, "similarity": "softplus", "tau": 0.05},
    ),
}


def _layers(
    layers: int,
    batch: int = 2,
    blocks: int = 2,
    tokens: int = 5,
    captions: int = 3,
    words: int = 6,
    width: int = 128,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    rows = blocks * batch
    projected = torch.randn(batch, captions, words, 2 * layers, width, generator=generator)
    return {
        "q_layers": [torch.randn(rows, tokens, width, generator=generator) for _ in range(layers)],
        "k_layers": list(projected.unbind(3)[::2]),
        "word_mask": torch.rand(batch, captions, words, generator=generator) < 0.7,
        "caption_mask": torch.rand(batch, captions, generator=generator) < 0.8,
        "token_mask": torch.rand(rows, tokens, generator=generator) < 0.8,
    }


def _run(inputs: dict[str, Any], device: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Loss and gradients, on the CPU."""
    there = {n: x.to(device) for n, x in inputs.items() if isinstance(x, Tensor)}
    q, k = ([x.to(device, dtype) for x in inputs[n]] for n in ("q_layers", "k_layers"))
    leaves = [x.detach().requires_grad_() for x in (*q, *k)]
    loss = ops.patch_word_consistency(leaves[: len(q)], leaves[len(q) :], **there, **options)
    grads = torch.autograd.grad(3 * loss, leaves)
    return [x.detach().cpu() for x in (loss, *grads)]


@each_backend
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_eager(
    case: str,
    dtype: torch.dtype,
    masked: bool,
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
    poisoned_memory: None,
) -> None:
    if dtype == torch.bfloat16 and (backend, device) == ("triton", "cpu"):
        pytest.skip("products of bfloat16 are wrong in Triton's interpreter")
    sizes, options = CASES[case]
    inputs = _layers(**sizes)
    for name in ("q_layers", "k_layers"):
        inputs[name] = [x.to(dtype) for x in inputs[name]]
    if not masked:
        inputs = {n: x for n, x in inputs.items() if isinstance(x, list)}
    got = _run(inputs, device, dtype, backend=backend, **options)
    assert {run for run in backends_run if run[1] == backend} == {(n, backend) for n in OPERATORS}
    eager = _run(inputs, "cpu", dtype, backend="reference", **options)
    exact = _run(inputs, "cpu", torch.float64, backend="reference", **options)
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        assert_as_accurate(mine, theirs, truth)


@each_backend
def test_nan_is_not_hidden(backend: str, device: str) -> None:
    inputs = _layers(2)
    inputs["token_mask"][0, 0] = inputs["word_mask"][0, 0, 0] = inputs["caption_mask"][0, 0] = True
    inputs["q_layers"][1][0, 0, 0] = math.nan
    loss, *grads = _run(inputs, device, torch.float32, backend=backend)
    assert loss.isnan()
    assert grads[1][0, 0].isnan().all()


@each_backend
def test_runs_are_bit_identical(backend: str, device: str) -> None:
    first, second = (_run(_layers(3), device, torch.float32, backend=backend) for _ in range(2))
    assert all(map(torch.equal, first, second))


@each_backend
def test_layers_of_any_strides(backend: str, device: str) -> None:
    inputs = _layers(2, width=8)
    strided = dict(inputs)
    for name in ("q_layers", "k_layers"):
        # Each layer by other strides, and an address that no 16 bytes begin at.
        strided[name] = [
            x.transpose(0, 1).contiguous().transpose(0, 1)
            if i
            else torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
            for i, x in enumerate(inputs[name])
        ]
    results = []
    for each in (inputs, strided):
        leaves = [
            x.to(device).as_strided(x.shape, x.stride()) if x.is_contiguous() else x.to(device)
            for x in (*each["q_layers"], *each["k_layers"])
        ]
        leaves = [x.detach().requires_grad_() for x in leaves]
        masks = {n: x.to(device) for n, x in each.items() if isinstance(x, Tensor)}
        loss = ops.patch_word_consistency(leaves[:2], leaves[2:], backend=backend, **masks)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.tier1
def test_signs_are_found_for_some_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _layers(2)
    want = _run(inputs, "cpu", torch.float32, backend="triton")
    module = importlib.import_module("jepa_fast.ops.patch_word_consistency.triton")
    monkeypatch.setattr(module, "_SIGNS_AT_ONCE", 8 * 32 * 32)
    got = _run(inputs, "cpu", torch.float32, backend="triton")
    assert all(map(torch.equal, got, want))


def test_what_triton_does_not_take() -> None:
    def why_not(layers: int = 2, width: int = 4, dtype: torch.dtype = torch.float32) -> list[str]:
        q, k = torch.zeros(2, 3, width, dtype=dtype), torch.zeros(1, 1, 2, width, dtype=dtype)
        arguments = ([q] * layers, [k] * layers, None, None, None, 1, "relu", 0.1)
        of_backward = REGISTERED[OPERATORS[1]].backends["triton"].unsupported
        found = REGISTERED[OPERATORS[0]].backends["triton"].unsupported(*arguments)
        assert of_backward(torch.ones(()), *arguments) == found
        return found

    assert why_not() == why_not(layers=24) == why_not(width=512) == []
    assert why_not(layers=25) == ["takes at most 24 layers, got 25"]
    assert why_not(width=513) == ["takes heads of width 512 at most, got 513"]
    (reason,) = why_not(dtype=torch.float64)
    assert reason == "takes float32, bfloat16 and float16 layers, got torch.float64"


@pytest.mark.tier1
def test_auto_leaves_bfloat16_out_of_the_interpreter(backends_run: list[tuple[str, str]]) -> None:
    """Whose products of bfloat16 are wrong."""
    inputs = _inputs(dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (*inputs["q_layers"], *inputs["k_layers"])]
    loss = ops.patch_word_consistency(**inputs)
    torch.autograd.grad(loss, leaves)
    assert {name for name, _ in backends_run} == set(OPERATORS)
    assert "triton" not in {backend for _, backend in backends_run}
    torch.testing.assert_close(loss, ops.patch_word_consistency(**inputs, backend="reference"))
    with pytest.raises(
        BackendError, match="products of bfloat16 are wrong in Triton's interpreter"
    ):
        ops.patch_word_consistency(**inputs, backend="triton")


@each_backend
@pytest.mark.parametrize("filler", [1e4, float("nan")])
def test_padding_is_not_read(filler: float, backend: str, device: str) -> None:
    results = []
    for value in (0.0, filler):
        inputs = _inputs()
        missing = ~(inputs["word_mask"] & inputs["caption_mask"][..., None])
        for k in inputs["k_layers"]:
            k[missing] = value
        inputs = {
            n: x.to(device) if isinstance(x, Tensor) else [y.to(device) for y in x]
            for n, x in inputs.items()
        }
        leaves = [x.requires_grad_() for x in (*inputs["q_layers"], *inputs["k_layers"])]
        loss = ops.patch_word_consistency(**inputs, backend=backend)
        loss.backward()
        assert not any(k.grad[missing].any() for k in inputs["k_layers"])
        results.append((loss, *(x.grad for x in leaves)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@each_backend
@pytest.mark.parametrize("sizes", [{}, {"batch": 0}, {"tokens": 0}], ids=str)
def test_nothing_to_compare(
    sizes: dict[str, int], backend: str, device: str, poisoned_memory: None
) -> None:
    """No captions, no images, no tokens."""
    inputs = _layers(2, **sizes)
    inputs["caption_mask"][:] = False
    results = _run(inputs, device, torch.float32, backend=backend)
    assert not any(x.any() for x in results)


def test_bfloat16_in_float32_inside() -> None:
    inputs = _inputs(dtype=torch.bfloat16)
    wide = {n: [y.float() for y in x] if "layers" in n else x for n, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.patch_word_consistency(**inputs)
    assert torch.equal(loss, ops.patch_word_consistency(**wide))


# What the C++ kernel does by tiles of 32 tokens, blocks of words, and an image a thread.


def _assert_rows_agree(got: Tensor, exact: Tensor) -> None:
    """By each row's own length: the gradients of short vectors may be of any size."""
    error, size = (
        x.reshape(-1, x.shape[-1] if x.ndim else 1).norm(dim=1) for x in (got - exact, exact)
    )
    assert bool((error <= 3e-6 * size).all())


@needs_native
@pytest.mark.parametrize("similarity", ["relu", "softplus"])
@pytest.mark.parametrize(
    ("batch", "blocks", "tokens", "captions", "words", "width", "layers", "heads"),
    [
        (1, 4, 25, 8, 31, 96, 12, 1),
        (3, 2, 33, 3, 21, 63, 3, 1),
        (2, 3, 7, 40, 2, 80, 2, 4),
        (5, 1, 32, 1, 32, 32, 3, 1),
        (1, 1, 70, 2, 100, 40, 24, 2),
        (1, 1, 33, 2, 100, 40, 4, 20),
        (1, 2, 100, 8, 64, 48, 24, 2),  # by chunks of 160 tokens in the backward pass
    ],
    ids=str,
)
def test_tiles(
    batch: int,
    blocks: int,
    tokens: int,
    captions: int,
    words: int,
    width: int,
    layers: int,
    heads: int,
    similarity: str,
    poisoned_memory: None,
) -> None:
    inputs = _layers(layers, batch, blocks, tokens, captions, words, width)
    inputs["caption_mask"][batch - 1] = batch == 1
    options = {"num_heads": heads, "similarity": similarity, "tau": 0.2}
    got = _run(inputs, "cpu", torch.float32, backend="cpu", **options)
    exact = _run(inputs, "cpu", torch.float64, backend="reference", **options)
    for mine, truth in zip(got, exact, strict=True):
        _assert_rows_agree(mine, truth)


@needs_native
@pytest.mark.parametrize("similarity", ["relu", "softplus"])
def test_heads_of_one_number(similarity: str, poisoned_memory: None) -> None:
    """Every direction is 1 or -1: many deviations are 0, and no gradient is left."""
    inputs = _layers(4, tokens=40, words=50, width=7)
    options = {"num_heads": 7, "similarity": similarity, "tau": 0.2}
    got = _run(inputs, "cpu", torch.float32, backend="cpu", **options)
    exact = _run(inputs, "cpu", torch.float64, backend="reference", **options)
    for mine, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-6)


@needs_native
def test_every_image_without_captions_is_left_out(poisoned_memory: None) -> None:
    """Of the first as of the last: zeros for it, and for the others what they have alone."""
    inputs = _layers(3, batch=4, tokens=20)
    inputs["caption_mask"][0] = inputs["caption_mask"][3] = False
    inputs["caption_mask"][1:3] = True
    loss, *grads = _run(inputs, "cpu", torch.float32, backend="cpu")
    rows = [r for r in range(8) if r % 4 in (1, 2)]
    alone = {n: inputs[n][1:3] for n in ("word_mask", "caption_mask")}
    alone["token_mask"] = inputs["token_mask"][rows]
    alone["q_layers"] = [q[rows] for q in inputs["q_layers"]]
    alone["k_layers"] = [k[1:3] for k in inputs["k_layers"]]
    want, *want_grads = _run(alone, "cpu", torch.float32, backend="cpu")
    torch.testing.assert_close(loss, want)
    for i, (got, kept) in enumerate(zip(grads, want_grads, strict=True)):
        there = rows if i < 3 else [1, 2]
        torch.testing.assert_close(got[there], kept)
        absent = [r for r in range(len(got)) if r not in there]
        assert not got[absent].any()


@needs_native
@pytest.mark.parametrize("similarity", ["relu", "softplus"])
def test_rows_without_a_direction(similarity: str) -> None:
    """Zero, and shorter than what counts as a length: not divided by their own."""
    inputs = _layers(3, width=12)
    for x in (inputs["q_layers"][0], inputs["k_layers"][1]):
        flat = x.view(-1, 12) if x.is_contiguous() else x.flatten(0, 2)
        flat[::3] = 0
        flat[1::3] *= 1e-9
        x.copy_(flat.view(x.shape))
    got = _run(inputs, "cpu", torch.float32, backend="cpu", similarity=similarity)
    exact = _run(inputs, "cpu", torch.float64, backend="reference", similarity=similarity)
    for mine, truth in zip(got, exact, strict=True):
        _assert_rows_agree(mine, truth)


@needs_native
def test_rows_with_gaps_and_an_upstream_of_stride_0() -> None:
    inputs = _layers(2)
    want = _run(inputs, "cpu", torch.float32, backend="cpu")
    for name in ("q_layers", "k_layers"):
        inputs[name] = [torch.stack([x, x], -1)[..., 0] for x in inputs[name]]
    for name in ("word_mask", "token_mask"):
        inputs[name] = inputs[name].mT.contiguous().mT
    q, k = inputs.pop("q_layers"), inputs.pop("k_layers")
    leaves = [x.requires_grad_() for x in (*q, *k)]
    loss = ops.patch_word_consistency(q, k, **inputs, backend="cpu")
    grads = torch.autograd.grad(loss, leaves, torch.full((1,), 3.0).expand(2)[1])
    assert all(map(torch.equal, (loss, *grads), want))


@pytest.fixture
def any_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize(
    ("batch", "heads", "layers", "words"),
    [(1, 1, 4, 40), (3, 1, 4, 40), (2, 3, 4, 40), (3, 3, 24, 100)],
)
def test_the_number_of_threads_changes_no_bit(
    batch: int, heads: int, layers: int, words: int, any_threads: None
) -> None:
    inputs = _layers(layers, batch, blocks=4, tokens=30, captions=4, words=words, width=96)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(_run(inputs, "cpu", torch.float32, num_heads=heads, backend="cpu"))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@needs_native
def test_no_similarities_of_all_tokens_are_kept(any_threads: None) -> None:
    """Working memory counts, as it is from torch's allocator. Those of an image would be 201 MB."""
    torch.set_num_threads(2)
    inputs = _layers(12, 2, 1, 4096, 4, 256, 8)
    leaves = [x.requires_grad_() for x in (*inputs["q_layers"], *inputs["k_layers"])]

    def call() -> Any:
        loss = ops.patch_word_consistency(leaves[:12], leaves[12:], backend="cpu")
        return torch.autograd.grad(loss, leaves)

    call()
    gradients = sum(leaf.nbytes for leaf in leaves)
    assert 32 * 2**20 < peak_allocation(call) < 2 * gradients + 2 * 22 * 2**20


@needs_native
def test_cpu_kernel_refuses_float64() -> None:
    with pytest.raises(BackendError, match=r"cpu: computes in float32, got torch\.float64 layers"):
        ops.patch_word_consistency(**_inputs(dtype=torch.float64), backend="cpu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q_layers": []}, ValueError, "one tensor a layer, at least one, got 0 and 3"),
        ({"k_layers": [torch.zeros(3, 3, 4, 12)]}, ValueError, "at least one, got 3 and 1"),
        ({"k_layers": [torch.zeros(3, 3, 4, 8)] * 3}, ValueError, "must be equal"),
        (
            {"q_layers": [torch.zeros(6, 5, 12), *[torch.zeros(6, 4, 12)] * 2]},
            ValueError,
            r"q_layers\[1\] must have the shape of q_layers\[0\]",
        ),
        (
            {"k_layers": [torch.zeros(3, 3, 4, 12).double()] * 3},
            TypeError,
            r"k_layers\[0\] must have the dtype of q_layers\[0\]",
        ),
        ({"similarity": "tanh"}, ValueError, "similarity must be one of"),
        (
            {"q_layers": None},
            TypeError,
            "q_layers must be a list of tensors, one a layer, got None",
        ),
        ({"k_layers": 3}, TypeError, "k_layers must be a list of tensors, one a layer, got int"),
        (
            {"q_layers": torch.zeros(6, 5, 12), "k_layers": torch.zeros(3, 3, 4, 12)},
            ValueError,
            r"q_layers must be .*\[L, R, T, d\], got shape \[6, 5, 12\]; .* pass a list of it",
        ),
        (
            {"k_layers": torch.zeros(3, 3, 4, 12)},
            ValueError,
            r"k_layers must be .*\[L, B, C, S, d\], got shape \[3, 3, 4, 12\]",
        ),
        ({"num_heads": 1.5}, TypeError, "num_heads must be an integer, got 1.5"),
        (
            {"q_layers": [torch.zeros(6, 5, 12), *[torch.zeros(6, 5, 12).to_sparse()] * 2]},
            TypeError,
            r"q_layers\[1\] must be dense, got torch.sparse_coo",
        ),
        ({"tau": -1.0}, ValueError, "tau must be positive"),
        ({"tau": "0.1"}, TypeError, "tau must be a number, got str"),
        (
            {"tau": torch.tensor(0.1, requires_grad=True)},
            TypeError,
            r"tau must be a number, got Tensor; .* pass float\(tau\)",
        ),
        (
            {"q_layers": [torch.zeros(6, 5, 12), None, None]},
            TypeError,
            r"q_layers\[1\] must be a tensor, got NoneType",
        ),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.patch_word_consistency(**{**_inputs(), **changes})
