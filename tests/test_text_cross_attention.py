"""text_cross_attention and attention_statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import backends, needs_native
from samples import Sample, normal
from tolerance import assert_as_accurate
from torch import Tensor

from jepa_fast import ops
from jepa_fast.errors import BackendError
from jepa_fast.ops._registry import OPERATORS as REGISTERED
from jepa_fast.ops.text_cross_attention import contract, reference
from jepa_fast.perf.audit_report import Report
from jepa_fast.perf.memory import peak_allocation

OPERATORS = ("text_cross_attention", "text_cross_attention_backward")
# In float32, which Triton takes in the interpreter alone.
each_backend = backends(REGISTERED["text_cross_attention"].backends, on_gpu=False)
# What computes in float32 whatever the inputs; Triton's products are the tensor cores'.
each_in_float32 = backends(["reference", "cpu"])
in_triton = backends(["triton"])
AUDITS = Path(__file__).parents[1] / "benchmarks/results/audit"


def _masks(batch: int, captions: int, words: int, rows: int, tokens: int) -> dict[str, Tensor]:
    """Image 0 has every caption, the last image none; caption 1 lost its words; ragged words."""
    word_mask = torch.ones(batch, captions, words, dtype=torch.bool)
    caption_mask = torch.ones(batch, captions, dtype=torch.bool)
    word_mask[:, 0, words - 1 :] = words == 1
    word_mask[1:, 1:2] = False
    caption_mask[batch - 1 :] = False
    token_mask = torch.arange(rows * tokens).view(rows, tokens) % 5 != 4
    return {"word_mask": word_mask, "caption_mask": caption_mask, "token_mask": token_mask}


def _sample(
    name: str,
    batch: int = 2,
    blocks: int = 2,
    tokens: int = 3,
    captions: int = 2,
    words: int = 3,
    width: int = 4,
    masked: bool = False,
    **keywords: Any,
) -> Sample:
    def make(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
        floating: Any = {"dtype": dtype, "generator": generator}
        rows = blocks * batch
        tensors = (
            normal(rows, tokens, width, **floating),
            normal(batch, captions, words, width, **floating),
            normal(batch, captions, words, width, **floating),
            normal(rows, tokens, width, **floating),
        )
        masks = _masks(batch, captions, words, rows, tokens) if masked else {}
        return *tensors, *masks.values()

    def function(*tensors: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        masks = dict(zip(("word_mask", "caption_mask", "token_mask"), tensors[4:], strict=False))
        return ops.text_cross_attention(*tensors[:4], **masks, **keywords)

    return Sample(name, function, OPERATORS, make, keywords)


SAMPLES = [
    _sample("max"),
    _sample("masks", batch=3, captions=3, masked=True),
    _sample("mean, heads", masked=True, pool="mean", num_heads=2, scale=1.0),
    _sample("every caption", masked=True, pool="none", captions=3, width=3),
    _sample("softplus", masked=True, similarity="softplus", tau=0.3, num_heads=2),
    _sample("one of everything", blocks=1, tokens=1, captions=1, words=1, width=1),
    _sample("batch 0", batch=0),
]


def _naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor,
    word_mask: Tensor,
    caption_mask: Tensor,
    token_mask: Tensor,
    num_heads: int = 1,
    scale: float | None = None,
    pool: str = "max",
    similarity: str = "relu",
    tau: float = 0.1,
) -> dict[str, Any]:
    """One token, caption, head and word at a time, in float64."""
    q, k, v, residual = (x.detach().double() for x in (q, k, v, residual))
    rows, tokens, width = q.shape
    batch, captions, words, _ = k.shape
    head_dim = width // num_heads
    scale = head_dim**-0.5 if scale is None else scale
    features, sparsities, positives, entropies = [], [], [], []
    for r in range(rows):
        b = r % batch
        for t in range(tokens):
            of_captions = []
            for n in range(captions):
                there = [w for w in range(words) if word_mask[b, n, w] and caption_mask[b, n]]
                if not there:
                    of_captions.append(None)
                    continue
                y = residual[r, t].clone()
                for h in range(num_heads):
                    e = slice(h * head_dim, (h + 1) * head_dim)
                    scores = [float(q[r, t, e] @ k[b, n, w, e]) for w in there]
                    largest = max(scores)
                    odds = [math.exp(scale * (s - largest)) for s in scores]
                    shares = [x / sum(odds) for x in odds]
                    for share, w in zip(shares, there, strict=True):
                        y[e] += share * v[b, n, w, e]
                    cosines = [
                        s / float(q[r, t, e].norm() * k[b, n, w, e].norm())
                        for s, w in zip(scores, there, strict=True)
                    ]
                    if not token_mask[r, t]:
                        continue
                    if similarity == "relu":
                        sparsities.append(sum(max(c, 0.0) for c in cosines))
                    else:
                        sparsities.append(sum(math.log1p(math.exp(c / tau)) for c in cosines))
                    positives += [c > 0 for c in cosines]
                    entropy = -sum(p * math.log(p) for p in shares)
                    entropies.append(entropy / math.log(len(there)) if len(there) > 1 else 1.0)
                of_captions.append(y)
            present = [y for y in of_captions if y is not None]
            if pool == "none":
                features.append(
                    torch.stack([residual[r, t] if y is None else y for y in of_captions])
                )
            elif not present:
                features.append(residual[r, t])
            elif pool == "max":
                features.append(torch.stack(present).amax(0))
            else:
                features.append(torch.stack(present).mean(0))
    shape = (rows, tokens, captions, width) if pool == "none" else (rows, tokens, width)
    stacked = torch.stack(features).view(shape)
    mean = lambda values: sum(values) / max(len(values), 1)  # noqa: E731
    return {
        "features": stacked.transpose(1, 2) if pool == "none" else stacked,
        "sparsity": mean(sparsities),
        "positive": mean(positives),
        "entropy": mean(entropies),
    }


def _inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    batch, blocks, tokens, captions, words, width = 3, 2, 5, 3, 4, 12
    floating: Any = {"dtype": dtype, "generator": generator, "grad": False}
    rows = blocks * batch
    inputs = {
        "q": normal(rows, tokens, width, **floating),
        "k": normal(batch, captions, words, width, **floating),
        "v": normal(batch, captions, words, width, **floating),
        "residual": normal(rows, tokens, width, **floating),
        **_masks(batch, captions, words, rows, tokens),
    }
    return {name: x.to(device) for name, x in inputs.items()}


@each_backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "mean", "scale": 1.0},
        {"pool": "none", "num_heads": 3},
        {"num_heads": 4, "similarity": "softplus", "tau": 0.5},
    ],
    ids=str,
)
def test_values(options: dict[str, Any], backend: str, device: str) -> None:
    inputs = _inputs(device=device)
    expected = _naive(**inputs, **options)
    features, sparsity = ops.text_cross_attention(**inputs, **options, backend=backend)
    got = features.double().cpu()
    torch.testing.assert_close(got, expected["features"], rtol=0, atol=2e-6)
    assert float(sparsity) == pytest.approx(expected["sparsity"], rel=1e-6)
    assert sparsity.dtype == torch.float32


def test_float64_is_kept_throughout() -> None:
    inputs = _inputs(torch.float64)
    expected = _naive(**inputs)
    features, sparsity = ops.text_cross_attention(**inputs)
    torch.testing.assert_close(features, expected["features"], rtol=0, atol=1e-14)
    assert float(sparsity) == pytest.approx(expected["sparsity"], rel=1e-13)


def test_statistics() -> None:
    inputs = _inputs()
    expected = _naive(**inputs, num_heads=2, scale=1.0)
    del inputs["v"], inputs["residual"]
    positive, entropy = ops.attention_statistics(**inputs, num_heads=2, scale=1.0)
    assert float(positive) == pytest.approx(expected["positive"], rel=1e-6)
    assert float(entropy) == pytest.approx(expected["entropy"], rel=1e-6)


@pytest.mark.parametrize("scores", [1, 100])
def test_statistics_look_at_some_tokens_after_the_other(
    scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs()
    del inputs["v"], inputs["residual"]
    whole = ops.attention_statistics(**inputs, num_heads=2)
    monkeypatch.setattr(reference, "_MOST_SCORES", scores)
    torch.testing.assert_close(ops.attention_statistics(**inputs, num_heads=2), whole)


def test_statistics_are_in_float32_under_autocast() -> None:
    inputs = _inputs()
    del inputs["v"], inputs["residual"]
    want = ops.attention_statistics(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention_statistics(**inputs) == want


def test_statistics_take_one_dtype() -> None:
    inputs = _inputs()
    with pytest.raises(TypeError, match="attention_statistics: q and k must have one dtype"):
        ops.attention_statistics(inputs["q"], inputs["k"].double())


@each_backend
def test_tokens_that_do_not_count_do_not_whatever_they_hold(backend: str, device: str) -> None:
    inputs = _inputs(device=device)
    inputs["token_mask"] = torch.ones(inputs["q"].shape[:2], dtype=torch.bool, device=device)
    inputs["token_mask"][0, 1] = False
    _, want = ops.text_cross_attention(**inputs, backend=backend)
    inputs["q"] = inputs["q"].detach().clone()
    inputs["q"][0, 1] = torch.nan
    _, got = ops.text_cross_attention(**inputs, backend=backend)
    assert torch.equal(got, want)
    del inputs["v"], inputs["residual"]
    assert all(number.isfinite() for number in ops.attention_statistics(**inputs))


def test_statistics_tell_dead_and_uniform_attention() -> None:
    q = torch.ones(2, 3, 4)
    positive, entropy = ops.attention_statistics(q, -torch.ones(2, 2, 5, 4))
    assert positive == 0
    assert float(entropy) == pytest.approx(1.0)
    none = torch.zeros(2, 2, dtype=torch.bool)
    positive, entropy = ops.attention_statistics(q, torch.ones(2, 2, 5, 4), caption_mask=none)
    assert positive == 0
    assert entropy == 0


@each_backend
@pytest.mark.parametrize("pool", ["max", "mean", "none"])
def test_padding_is_not_read(pool: str, backend: str, device: str) -> None:
    """Whatever stands at masked words and captions, even NaN: the same results and gradients."""
    results = []
    for filler in (0.0, 1e4, float("nan")):
        inputs = _inputs(device=device)
        missing = ~(inputs["word_mask"] & inputs["caption_mask"][..., None])
        for name in ("k", "v"):
            inputs[name][missing] = filler
        leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "residual")]
        features, sparsity = ops.text_cross_attention(**inputs, pool=pool, backend=backend)
        (features.square().sum() + sparsity).backward()
        assert not leaves[1].grad[missing].any()
        assert not leaves[2].grad[missing].any()
        results.append((features, sparsity, *(x.grad for x in leaves)))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


@each_backend
def test_image_without_captions_passes_the_residual(backend: str, device: str) -> None:
    inputs = _inputs(device=device)
    batch = inputs["k"].shape[0]
    features, sparsity = ops.text_cross_attention(**inputs, backend=backend)
    assert torch.equal(features[batch - 1 :: batch], inputs["residual"][batch - 1 :: batch])
    assert not torch.equal(features[0], inputs["residual"][0])
    # Nor does it count in the sparsity: that of the other images alone is the same.
    kept = [r for r in range(features.shape[0]) if r % batch != batch - 1]
    rows = {name: inputs[name][kept] for name in ("q", "residual", "token_mask")}
    images = {name: inputs[name][:-1] for name in ("k", "v", "word_mask", "caption_mask")}
    torch.testing.assert_close(
        ops.text_cross_attention(**rows, **images, backend=backend)[1], sparsity
    )


@each_backend
def test_no_captions_at_all(backend: str, device: str) -> None:
    inputs = _inputs(device=device)
    inputs["caption_mask"][:] = False
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "residual")]
    features, sparsity = ops.text_cross_attention(**inputs, backend=backend)
    assert torch.equal(features, inputs["residual"])
    assert sparsity == 0
    (features.sum() + sparsity).backward()
    assert not any(x.grad.any() for x in leaves[:3])
    assert bool((leaves[3].grad == 1).all())


@each_backend
def test_masked_captions_never_win(backend: str, device: str) -> None:
    """Every value of the real caption is far below zero, and it still wins over masked ones."""
    inputs = _inputs(device=device)
    inputs["v"] = inputs["v"] - 1e6
    inputs["caption_mask"][:] = torch.tensor([False, False, True], device=device)
    inputs["word_mask"][:] = True
    features, _ = ops.text_cross_attention(**inputs, backend=backend)
    assert bool((features < -9e5).all())


@each_backend
def test_caption_order_does_not_matter(backend: str, device: str) -> None:
    inputs = _inputs(device=device)
    order = torch.tensor([2, 0, 1], device=device)
    permuted = {
        name: x[:, order] if name in ("k", "v", "word_mask", "caption_mask") else x
        for name, x in inputs.items()
    }
    for pool in ("max", "mean"):
        for got, want in zip(
            ops.text_cross_attention(**permuted, pool=pool, backend=backend),
            ops.text_cross_attention(**inputs, pool=pool, backend=backend),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


@each_backend
def test_ties_go_to_the_lowest_caption(backend: str, device: str) -> None:
    inputs = _inputs(device=device)
    k, v = (inputs[name][:, :1].repeat(1, 3, 1, 1).requires_grad_() for name in ("k", "v"))
    features, _ = ops.text_cross_attention(inputs["q"], k, v, inputs["residual"], backend=backend)
    features.sum().backward()
    assert v.grad[:, 0].any()
    assert not v.grad[:, 1:].any()


@each_backend
def test_sequences_of_an_image_share_its_words(backend: str, device: str) -> None:
    """Row r reads image r % B: the rows of one image alone give the same."""
    inputs = _inputs(device=device)
    batch = inputs["k"].shape[0]
    features, _ = ops.text_cross_attention(**inputs, backend=backend)
    for b in range(batch):
        rows = {name: inputs[name][b::batch] for name in ("q", "residual", "token_mask")}
        words = {name: inputs[name][b, None] for name in ("k", "v", "word_mask", "caption_mask")}
        alone, _ = ops.text_cross_attention(**rows, **words, backend=backend)
        torch.testing.assert_close(features[b::batch], alone)


def _run(inputs: dict[str, Any], **keywords: Any) -> list[Tensor]:
    """Features, sparsity, and the gradients of q, k, v and residual."""
    inputs = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()
    }
    features, sparsity = ops.text_cross_attention(**inputs, **keywords)
    wide = torch.promote_types(features.dtype, torch.float32)
    generator = torch.Generator().manual_seed(9)
    upstream = torch.randn(features.shape, generator=generator, dtype=torch.float64)
    loss = (features * upstream.to(features.device, wide)).sum() + 30 * sparsity
    grads = torch.autograd.grad(loss, [x for x in inputs.values() if x.is_floating_point()])
    return [x.detach().cpu() for x in (features, sparsity, *grads)]


def _large(
    batch: int, blocks: int, tokens: int, captions: int, words: int, width: int, masked: bool
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(width)
    rows = blocks * batch
    inputs = {
        "q": torch.randn(rows, tokens, width, generator=generator),
        "k": torch.randn(batch, captions, words, width, generator=generator),
        "v": torch.randn(batch, captions, words, width, generator=generator),
        "residual": torch.randn(rows, tokens, width, generator=generator),
    }
    if masked:
        inputs |= {
            "word_mask": torch.rand(batch, captions, words, generator=generator) < 0.7,
            "caption_mask": torch.rand(batch, captions, generator=generator) < 0.7,
            "token_mask": torch.rand(rows, tokens, generator=generator) < 0.7,
        }
    return inputs


@each_in_float32
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "mean"},
        {"pool": "none", "similarity": "softplus"},
        {"similarity": "softplus", "tau": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("batch", "blocks", "tokens", "captions", "words", "width", "heads", "masked"),
    [
        (2, 2, 21, 3, 9, 384, 1, True),
        (1, 4, 17, 8, 31, 72, 3, True),  # heads of 24
        (3, 1, 33, 2, 40, 64, 2, True),  # of 32
        (2, 1, 40, 5, 20, 96, 1, False),
    ],
    ids=str,
)
def test_as_accurate_as_eager(
    batch: int,
    blocks: int,
    tokens: int,
    captions: int,
    words: int,
    width: int,
    heads: int,
    masked: bool,
    options: dict[str, Any],
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
    poisoned_memory: None,
) -> None:
    inputs = _large(batch, blocks, tokens, captions, words, width, masked)
    keywords = {"num_heads": heads, **options}
    got = _run({name: x.to(device) for name, x in inputs.items()}, backend=backend, **keywords)
    assert set(backends_run) == {(name, backend) for name in OPERATORS}
    eager = _run(inputs, backend="reference", **keywords)
    exact = _run(
        {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}, **keywords
    )
    for one, plain, right in zip(got, eager, exact, strict=True):
        assert_as_accurate(one, plain, right)


@each_in_float32
@pytest.mark.parametrize("pool", ["max", "mean", "none"])
@pytest.mark.parametrize(
    ("batch", "blocks", "tokens", "captions", "words", "width", "heads"),
    [
        (1, 2, 40, 5, 128, 80, 1),
        (2, 1, 70, 40, 2, 96, 1),
        (2, 3, 5, 1, 1, 63, 1),
        (5, 1, 1, 4, 5, 3, 1),
        (1, 1, 4, 256, 3, 8, 1),
        (1, 1, 130, 2, 3, 60, 20),
        (1, 2, 75, 16, 128, 48, 2),  # by chunks of 128 tokens in the C++ backward pass
    ],
    ids=str,
)
def test_sizes(
    batch: int,
    blocks: int,
    tokens: int,
    captions: int,
    words: int,
    width: int,
    heads: int,
    pool: str,
    backend: str,
    device: str,
    poisoned_memory: None,
) -> None:
    inputs = _large(batch, blocks, tokens, captions, words, width, masked=True)
    keywords = {"num_heads": heads, "pool": pool}
    got = _run({name: x.to(device) for name, x in inputs.items()}, backend=backend, **keywords)
    exact = _run(
        {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}, **keywords
    )
    for one, right in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=1e-5, atol=1e-5)


@each_in_float32
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_eager_in_low_precision(
    dtype: torch.dtype, residual: torch.dtype, backend: str, device: str, poisoned_memory: None
) -> None:
    inputs = _large(2, 2, 19, 3, 20, 40, True)
    inputs |= {name: inputs[name].to(dtype) for name in ("q", "k", "v")}
    inputs["residual"] = inputs["residual"].to(residual)
    got = _run({name: x.to(device) for name, x in inputs.items()}, backend=backend)
    eager = _run(inputs, backend="reference")
    exact = _run({n: x.double() if x.is_floating_point() else x for n, x in inputs.items()})
    for one, plain, right in zip(got, eager, exact, strict=True):
        assert_as_accurate(one, plain, right)


@each_backend
def test_scores_of_any_size(backend: str, device: str) -> None:
    """Softmax of scores beyond what exp can take, and of scores that are all far below zero.

    They are exact in whatever order they are summed; and neither factor is so large that it
    makes errors out of the roundings that a gradient of nearly zero has left.
    """
    inputs = _inputs(device=device)
    inputs["q"], inputs["k"] = (inputs["q"] * 32).round(), (inputs["k"] * 32).round()
    inputs["k"][:, 0] = -inputs["k"][:, 0].abs()
    got = _run(inputs, scale=0.5, backend=backend)
    double = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    exact = _run(double, scale=0.5)
    for one, right in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=1e-4, atol=1e-4)


@each_backend
def test_nan_is_seen(backend: str, device: str) -> None:
    """Of a token in its features and the sparsity, of a caption's value in all that reads it, of a
    key in all features of its image."""
    inputs = _inputs(device=device)
    inputs["q"][0, 1, 2] = math.nan
    features, sparsity = ops.text_cross_attention(**inputs, backend=backend)
    assert bool(features[0, 1].isnan().all())
    assert not features[0, 0].isnan().any()
    assert bool(sparsity.isnan())
    inputs = _inputs(device=device)
    inputs["v"][0, 1, 0, 3] = math.nan
    features, _ = ops.text_cross_attention(**inputs, backend=backend)
    assert bool(features[0, :, 3].isnan().all())
    assert int(features.isnan().sum()) == 2 * 5
    inputs = _inputs(device=device)
    inputs["k"][0, 1, 0, 3] = math.nan
    features, sparsity = ops.text_cross_attention(**inputs, backend=backend)
    assert bool(features[0].isnan().all())
    assert bool(sparsity.isnan())


@each_backend
@pytest.mark.parametrize("pool", ["max", "mean", "none"])
def test_strides(pool: str, backend: str, device: str) -> None:
    """Keys and values as views of one projection, other strides, and upstream ones of stride 0."""
    inputs = _inputs(device=device)
    plain = dict(inputs)
    projected = torch.stack([inputs["v"], inputs["k"], inputs["v"]], dim=3)  # [B, C, S, 3, d]
    inputs["k"], inputs["v"] = projected[..., 1, :], projected[..., 2, :]
    inputs["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["residual"] = torch.cat([inputs["residual"]] * 2, dim=1)[:, :5]
    inputs["word_mask"] = inputs["word_mask"].mT.contiguous().mT
    inputs["token_mask"] = inputs["token_mask"].t().contiguous().t()
    results = []
    for arguments in (plain, inputs):
        leaves = [arguments[n].detach().requires_grad_() for n in ("q", "k", "v", "residual")]
        options = {name: mask for name, mask in arguments.items() if name.endswith("mask")}
        features, sparsity = ops.text_cross_attention(
            *leaves, **options, pool=pool, backend=backend
        )
        one = torch.ones((), device=device)
        upstream = [one.expand(features.shape), one]
        grads = torch.autograd.grad([features, sparsity], leaves, upstream)
        results.append((features, sparsity, *grads))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.fixture
def any_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_native
def test_a_winner_that_is_no_caption_is_refused() -> None:
    """As its words would be read beyond the others."""
    q, k = torch.randn(1, 5, 8), torch.randn(1, 3, 4, 8)
    grads, winner = (q, torch.ones(())), torch.full(q.shape, 3, dtype=torch.uint8)
    options = (None, None, None, 1, None, "max", "relu", 0.1, "cpu")
    with pytest.raises((IndexError, RuntimeError), match="winner: expected captions below 3"):
        contract.BACKWARD.call(*grads, winner, q, k, k, *options)


@needs_native
@pytest.mark.parametrize("pool", ["max", "mean", "none"])
@pytest.mark.parametrize(
    ("batch", "heads", "captions", "words"), [(1, 1, 3, 11), (3, 1, 3, 11), (3, 2, 16, 128)]
)
def test_the_number_of_threads_changes_no_bit(
    batch: int, heads: int, captions: int, words: int, pool: str, any_threads: None
) -> None:
    inputs = _large(batch, 5, 30, captions, words, 48, masked=True)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(_run(inputs, num_heads=heads, pool=pool, backend="cpu"))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


@needs_native
@pytest.mark.parametrize("pool", ["max", "mean", "none"])
def test_no_scores_of_all_tokens_are_kept(pool: str, any_threads: None) -> None:
    """Working memory counts, as it is from torch's allocator. An image's scores would be 67 MB."""
    torch.set_num_threads(2)
    captions = 1 if pool == "none" else 4
    inputs = _large(2, 1, 8192, captions, 2048 // captions, 8, masked=False)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "residual")]

    def call() -> Any:
        features, sparsity = ops.text_cross_attention(*leaves, pool=pool, backend="cpu")
        return torch.autograd.grad((features.sum() + sparsity), leaves)

    call()
    inputs_and_outputs = 3 * sum(leaf.nbytes for leaf in leaves)
    assert 6 * 2**20 < peak_allocation(call) < inputs_and_outputs + 2 * 8 * 2**20


@backends(["cpu", "triton"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(
    ("rows", "tokens", "batch"), [(0, 5, 0), (0, 5, 2), (4, 0, 2)], ids=["B 0", "R 0", "T 0"]
)
@pytest.mark.parametrize("pool", ["max", "mean", "none"])
def test_nothing_to_do(
    rows: int,
    tokens: int,
    batch: int,
    masked: bool,
    pool: str,
    backend: str,
    device: str,
    poisoned_memory: None,
) -> None:
    like: Any = {"dtype": torch.float16, "device": device, "requires_grad": True}
    q = torch.zeros(rows, tokens, 8, **like)
    k, v = (torch.ones(batch, 3, 4, 8, **like) for _ in range(2))
    every = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    features, sparsity = ops.text_cross_attention(
        q, k, v, q, pool=pool, token_mask=every if masked else None, backend=backend
    )
    assert features.numel() == 0
    assert sparsity == 0
    (features.sum() + sparsity).backward()
    assert not k.grad.any()
    assert not v.grad.any()


@needs_native
def test_kernel_refuses_float64() -> None:
    with pytest.raises(BackendError, match=r"cpu: computes in float32, got torch\.float64 queries"):
        ops.text_cross_attention(**_inputs(torch.float64), backend="cpu")


def test_backward_by_hand_is_autograd_of_the_reference() -> None:
    for options in ({}, {"pool": "none", "similarity": "softplus"}, {"pool": "mean"}):
        keywords = {"pool": "max", "similarity": "relu", **options}
        grads = []
        for function in (ops.text_cross_attention, reference.text_cross_attention):
            inputs = _inputs(torch.float64)
            leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "residual")]
            features, sparsity = function(**inputs, num_heads=2, scale=0.7, tau=0.2, **keywords)[:2]
            (features.square().sum() + 3 * sparsity).backward()
            grads.append([x.grad for x in leaves])
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)


@each_in_float32
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_in_float32_inside(dtype: torch.dtype, backend: str, device: str) -> None:
    inputs = _inputs(dtype, device)
    inputs["residual"] = inputs["residual"].float()
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "residual")]
    features, sparsity = ops.text_cross_attention(**inputs, backend=backend)
    wide = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    assert features.dtype == sparsity.dtype == torch.float32
    for got, want in zip(
        (features, sparsity), ops.text_cross_attention(**wide, backend=backend), strict=True
    ):
        assert torch.equal(got, want)
    (features.sum() + sparsity).backward()
    assert [x.grad.dtype for x in leaves] == [dtype] * 3 + [torch.float32]


@each_backend
def test_autocast_changes_nothing_inside(backend: str, device: str) -> None:
    inputs = _inputs(device=device)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "residual")]
    results = []
    for enabled in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            features, sparsity = ops.text_cross_attention(**inputs, backend=backend)
        grads = torch.autograd.grad(features.square().sum() + sparsity, leaves)
        results.append((features, sparsity, *grads))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(5, 5, 12)}, ValueError, "q.shape.0. must be a multiple of the 3 images"),
        ({"q": torch.zeros(6, 5, 8)}, ValueError, "q.shape.2. and k.shape.3. must be equal"),
        ({"q": torch.zeros(6, 12)}, ValueError, "q must be .R, T, d., got shape .6, 12."),
        ({"k": torch.zeros(3, 0, 4, 12)}, ValueError, "at least one caption and one word"),
        ({"v": torch.zeros(3, 3, 4, 11)}, ValueError, "v must have the shape of k"),
        ({"residual": torch.zeros(6, 4, 12)}, ValueError, "residual must have the shape of q"),
        ({"v": torch.zeros(3, 3, 4, 12).double()}, TypeError, "q, k and v must have one dtype"),
        ({"k": torch.zeros(3, 3, 4, 12).long()}, TypeError, "k must be of a floating dtype"),
        ({"word_mask": torch.ones(3, 3, 4)}, TypeError, "word_mask must be bool.*use .bool"),
        ({"word_mask": torch.ones(3, 3, 5) > 0}, ValueError, r"must have shape \[3, 3, 4\]"),
        ({"caption_mask": torch.ones(3) > 0}, ValueError, r"caption_mask must have .*\[3, 3\]"),
        ({"token_mask": torch.ones(6, 4) > 0}, ValueError, r"token_mask must have .*\[6, 5\]"),
        ({"num_heads": 5}, ValueError, "num_heads must be a positive divisor of the width 12"),
        ({"pool": "median"}, ValueError, "pool must be one of .*got 'median'"),
        ({"similarity": "tanh"}, ValueError, "similarity must be one of"),
        ({"scale": -1.0}, ValueError, "scale must be positive and finite, got -1.0"),
        ({"scale": math.inf}, ValueError, "scale must be positive and finite, got inf"),
        ({"tau": 0.0}, ValueError, "tau must be positive and finite, got 0.0"),
        ({"tau": math.inf}, ValueError, "tau must be positive and finite, got inf"),
        (
            {"scale": torch.tensor(0.5, requires_grad=True)},
            TypeError,
            r"scale must be a number, got Tensor; .*float\(scale\), or multiply q by it",
        ),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        (
            {"tau": torch.nn.Parameter(torch.tensor(0.1))},
            TypeError,
            r"tau must be a number, got Parameter; it takes no gradient: pass float\(tau\)$",
        ),
        ({"tau": None}, TypeError, "tau must be a number, got NoneType"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an integer, got 2.0"),
        ({"num_heads": "2"}, TypeError, "num_heads must be an integer, got '2'"),
        (
            {name: _inputs()[name].to(torch.float8_e4m3fn) for name in ("q", "k", "v")},
            TypeError,
            r"q must be in .*float16, got torch.float8_e4m3fn; use \.float\(\), times its scale",
        ),
        (
            {"residual": _inputs()["residual"].to(torch.float8_e5m2)},
            TypeError,
            "residual must be in .* got torch.float8_e5m2",
        ),
        (
            {"q": _inputs()["q"].to_sparse()},
            TypeError,
            "q must be dense, got torch.sparse_coo; use",
        ),
        (
            {"q": torch.nested.nested_tensor([*_inputs()["q"]])},
            TypeError,
            r"q must be dense, got a nested one; use \.to_padded_tensor\(\)",
        ),
        (
            {"word_mask": _inputs()["word_mask"].to_sparse()},
            TypeError,
            "word_mask must be dense, got torch.sparse_coo",
        ),
        (
            {n: x[..., :0] for n, x in _inputs().items() if n in ("q", "k", "v", "residual")},
            ValueError,
            r"q must have a width of at least 1, got shape \[6, 5, 0\]",
        ),
        ({"word_mask": [[True]]}, TypeError, "word_mask must be a tensor, got list"),
        ({"v": None}, TypeError, "v must be a tensor, got NoneType"),
        ({"residual": None}, TypeError, "residual must be a tensor, got NoneType"),
        (
            {"residual": torch.zeros(6, 5, 12).long()},
            TypeError,
            "residual must be of a floating dtype, got torch.int64; use .float",
        ),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.text_cross_attention(**{**_inputs(), **changes})


@pytest.mark.parametrize("scale", [-1.0, math.inf])
def test_statistics_refuse_the_scales_that_the_attention_refuses(scale: float) -> None:
    with pytest.raises(ValueError, match="attention_statistics: scale must be positive and finite"):
        ops.attention_statistics(_inputs()["q"], _inputs()["k"], scale=scale)


def test_too_many_captions_for_a_byte() -> None:
    q, k = torch.zeros(1, 1, 2), torch.zeros(1, 257, 1, 2)
    with pytest.raises(ValueError, match="at most 256 captions, got 257"):
        ops.text_cross_attention(q, k, k, q)
    assert ops.text_cross_attention(q, k, k, q, pool="mean")[0].shape == (1, 1, 2)


# Triton against float64: as accurate as plain PyTorch in the same dtype.


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor,
    word_mask: Tensor,
    caption_mask: Tensor,
    token_mask: Tensor,
    num_heads: int,
    pool: str,
    similarity: str,
    winner: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Everything in the dtype of the inputs; a winner says which captions to take for "max"."""
    batch = k.shape[0]
    queries, before = (x.unflatten(0, (-1, batch)) for x in (q, residual))
    valid = word_mask & caption_mask[:, :, None]  # [B, C, S]
    captions = valid.any(2)
    queries, keys, values = (
        x.unflatten(-1, (num_heads, -1))
        for x in (queries, k.masked_fill(~valid[..., None], 0), v.masked_fill(~valid[..., None], 0))
    )
    there = valid[None, :, None, :, None]
    scores = torch.einsum("mbthe,bcshe->mbhcts", queries, keys) * keys.shape[-1] ** -0.5
    attention = scores.masked_fill(~there, torch.finfo(q.dtype).min / 2).softmax(-1)
    y = torch.einsum("mbhcts,bcshe->mbcthe", attention, values).flatten(-2)  # [M, B, C, T, d]
    if pool == "none":
        features = before[:, :, None] + y
    elif pool == "mean":
        features = before + y.sum(2) / captions.sum(1).clamp_min(1)[None, :, None, None]
    elif winner is None:
        highest = y.masked_fill(~captions[None, :, :, None, None], -torch.inf).amax(2)
        features = before + highest.masked_fill(~captions.any(1)[None, :, None, None], 0)
    else:
        features = (
            before + y.gather(2, winner.unflatten(0, (-1, batch))[:, :, None].long())[:, :, 0]
        )
    lengths = [x.norm(dim=-1, keepdim=True).clamp_min(1e-8 if x.dtype != torch.half else 1e-4)
               for x in (queries, keys)]  # fmt: skip
    cosine = torch.einsum("mbthe,bcshe->mbhcts", queries / lengths[0], keys / lengths[1])
    found = cosine.relu() if similarity == "relu" else F.softplus(cosine / 0.1)
    found = (found * there).sum(-1).to(torch.promote_types(q.dtype, torch.float32)).mean(2)
    pairs = captions[None, :, :, None] & token_mask.unflatten(0, (-1, batch))[:, :, None]
    return features.flatten(0, 1), (found * pairs).sum() / pairs.sum().clamp_min(1)


def _drawn(
    dtype: torch.dtype,
    device: str,
    tokens: int,
    captions: int,
    words: int,
    width: int,
    batch: int = 3,
) -> dict[str, Any]:
    """Ragged inputs with NaN at all padding."""
    floating: Any = {
        "dtype": torch.float32,
        "generator": torch.Generator().manual_seed(7),
        "grad": False,
    }
    rows = 2 * batch
    inputs = {
        "q": normal(rows, tokens, width, **floating),
        "k": normal(batch, captions, words, width, **floating),
        "v": normal(batch, captions, words, width, **floating),
        "residual": normal(rows, tokens, width, **floating),
        **_masks(batch, captions, words, rows, tokens),
    }
    missing = ~(inputs["word_mask"] & inputs["caption_mask"][..., None])
    for name in ("k", "v"):
        inputs[name][missing] = float("nan")
    return {
        name: (x.to(dtype) if x.is_floating_point() else x).to(device) for name, x in inputs.items()
    }


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"tokens": 21, "captions": 3, "words": 20, "width": 96}, (1, "max", "relu")),
        ({"tokens": 17, "captions": 2, "words": 64, "width": 48}, (2, "mean", "softplus")),
        ({"tokens": 9, "captions": 3, "words": 5, "width": 80}, (1, "none", "relu")),
        ({"tokens": 3, "captions": 2, "words": 100, "width": 64}, (2, "max", "softplus")),
        ({"tokens": 7, "captions": 2, "words": 33, "width": 384}, (1, "max", "relu")),
        ({"tokens": 40, "captions": 1, "words": 1, "width": 15}, (3, "max", "relu")),
        ({"tokens": 2, "captions": 2, "words": 3, "width": 500}, (1, "mean", "relu")),
        ({"tokens": 2, "captions": 16, "words": 2, "width": 32}, (1, "max", "relu")),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@in_triton
def test_triton_is_as_accurate_as_eager(
    dtype: torch.dtype,
    backend: str,
    device: str,
    sizes: dict[str, int],
    options: tuple[int, str, str],
    backends_run: list[tuple[str, str]],
    poisoned_memory: None,
) -> None:
    heads, pool, similarity = options
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("products of bfloat16 are wrong in Triton's interpreter")
    if dtype == torch.float32 and device == "cuda":
        pytest.skip("float32 is the reference's on a GPU")

    def check(got: Tensor, eager: Tensor, exact: Tensor) -> None:
        if dtype == torch.float32:  # of the interpreter: that every term is right
            torch.testing.assert_close(got, exact.float())
        else:
            assert_as_accurate(got, eager, exact)

    inputs = _drawn(dtype, device, **sizes)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    more = (heads, None, pool, similarity, 0.1)
    got = contract.FORWARD.call(*inputs.values(), *more, backend)
    eager, exact = (_eager(*x.values(), *options) for x in (inputs, wide))
    for each in zip(got, eager, exact, strict=False):
        check(*each)

    slope = torch.linspace(-1, 1, got[0].numel(), dtype=dtype, device=device)
    upstream = (slope.view(got[0].shape), torch.full((), 3.0, device=device))
    masks = tuple(inputs.values())[4:]
    grads = contract.BACKWARD.call(
        *upstream, got[2], *(inputs[n] for n in "qkv"), *masks, *more, backend
    )
    results = []
    for x in (inputs, wide):
        leaves = [x[n].requires_grad_() for n in "qkv"]
        outputs = _eager(*x.values(), *options, got[2] if pool == "max" else None)
        above = [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
        results.append(torch.autograd.grad(outputs, leaves, above))
    for each in zip(grads, *results, strict=True):
        check(*each)
    assert {name for _, name in backends_run} == {backend}


@in_triton
def test_triton_keeps_to_the_edges(backend: str, device: str) -> None:
    """Ties go to the lowest caption, missing captions do not win, none leave the residual."""
    inputs = _drawn(torch.float16, device, tokens=5, captions=3, words=4, width=12)
    inputs["v"] = inputs["v"] - 1000
    features, _ = ops.text_cross_attention(**inputs, backend=backend)
    real = torch.arange(len(features)) % 3 != 2  # the last image has no captions
    assert bool((features[real] < -900).all())
    assert torch.equal(features[~real], inputs["residual"][~real])

    for name in ("k", "v", "word_mask", "caption_mask"):
        inputs[name] = inputs[name][:, :1].expand_as(inputs[name])
    k, v = (inputs[name].contiguous().requires_grad_() for name in ("k", "v"))
    features, _ = ops.text_cross_attention(**{**inputs, "k": k, "v": v}, backend=backend)
    features.float().sum().backward()
    assert bool(v.grad[:2, 0].any())
    assert not v.grad[:, 1:].any()
    assert not v.grad[2].any()


@in_triton
def test_triton_takes_any_strides(backend: str, device: str) -> None:
    inputs = _drawn(torch.float16, device, tokens=5, captions=3, words=4, width=12)
    results = []
    for strided in (False, True):
        taken = {
            name: x.transpose(0, 1).contiguous().transpose(0, 1) if strided else x
            for name, x in inputs.items()
        }
        leaves = [taken[name].detach().requires_grad_() for name in ("q", "k", "v", "residual")]
        masks = [taken[name] for name in ("word_mask", "caption_mask", "token_mask")]
        named = dict(zip(("word_mask", "caption_mask", "token_mask"), masks, strict=True))
        features, sparsity = ops.text_cross_attention(*leaves, **named, backend=backend)
        (features.float().sum() + sparsity).backward()  # an upstream gradient of stride 0
        results.append((features, sparsity, *(x.grad for x in leaves)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.tier2
def test_products_are_the_tensor_cores_and_most_bytes_move_16_at_once() -> None:
    pytest.importorskip("triton", reason="needs triton to compile its kernels")
    from jepa_fast.ops.text_cross_attention import triton, triton_backward
    from jepa_fast.perf.kernel_audit import TARGETS, compile_all

    cases = [*triton.compile_cases(), *triton_backward.compile_cases()]
    products = [case for case in cases if "1x384-max" in case.name and "describe" not in case.name]
    kernels = compile_all(products, TARGETS)
    assert len(kernels) == 3 * len(TARGETS)
    for kernel in kernels:
        mix = kernel.instructions
        assert sum(mix.tensor_core.values()) > 0, kernel.name
        narrow = sum(width * number for width, number in mix.loads.items() if width < 16)
        assert 16 * mix.loads[16] > narrow, (kernel.name, kernel.chip, mix.loads)


def test_wide_heads_need_a_gpu_with_enough_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        """All that is asked of a tensor."""

        device, dtype = torch.device("cuda"), torch.bfloat16

        def __init__(self, *shape: int) -> None:
            self.shape = shape

    def why_not(width: int, words: int = 4) -> list[str]:
        q: Any = OnGpu(1, 1, width)
        k: Any = OnGpu(1, 1, words, width)
        unsupported = contract.FORWARD.backends["triton"].unsupported
        return unsupported(q, k, k, q, None, None, None, 1, None, "max", "relu", 0.1)

    monkeypatch.setattr(contract, "generation", lambda device: 8)
    monkeypatch.setattr(contract, "room", lambda device: 101_376)  # sm_86, sm_89
    assert [why_not(width) for width in (24, 128, 256, 384, 512)] == [[]] * 5
    assert why_not(512, words=128) == []
    monkeypatch.setattr(contract, "room", lambda device: 65_535)
    assert [why_not(width) for width in (24, 64, 128, 384)] == [[]] * 4
    assert why_not(64, words=128) == []
    assert why_not(65, words=128) != []
    (reason,) = why_not(512)
    assert reason.startswith("takes 65536 bytes of shared memory for heads of width 512, the GPU")
    monkeypatch.setattr(contract, "generation", lambda device: 7)
    (reason,) = why_not(64)
    assert reason.startswith("takes GPUs of compute capability 8.0 and more, got 7.x")


def test_wide_heads_load_ahead_where_there_is_room() -> None:
    triton = pytest.importorskip(
        "jepa_fast.ops.text_cross_attention.triton", reason="needs triton to have launches of it"
    )
    stages = {case.name: case.num_stages for case in triton.compile_cases() if "1x384" in case.name}
    assert stages["text_cross_attention-default-1x384-max-text_cross_attention_kernel"] == 2
    assert stages["text_cross_attention-default-1x384-tight-text_cross_attention_kernel"] == 1


@pytest.mark.parametrize("audit", sorted(AUDITS.glob("triton-*.json")), ids=lambda path: path.stem)
def test_no_kernel_takes_more_shared_memory_than_is_said(audit: Path) -> None:
    """On chips with wgmma some do, and there is room for it."""
    kernels = [
        kernel for kernel in Report.read(audit).kernels or () if "text_cross" in kernel.kernel
    ]
    assert {kernel.chip for kernel in kernels} == {"sm_80", "sm_90", "sm_100"}
    for kernel in kernels:
        words = 128 if "128-words" in kernel.name else 64
        ahead = "tight" not in kernel.name
        said = contract.shared_memory(kernel.config["HEAD"], words, loading_ahead=ahead)
        most = said if kernel.chip == "sm_80" else 232_448
        assert kernel.shared <= most, (kernel.name, kernel.chip)


@pytest.mark.tier1
def test_auto_leaves_bfloat16_out_of_the_interpreter(backends_run: list[tuple[str, str]]) -> None:
    """Whose products of bfloat16 are wrong."""
    inputs = _inputs(torch.bfloat16)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v")]
    features, sparsity = ops.text_cross_attention(**inputs)
    grads = torch.autograd.grad(features.float().sum() + sparsity, leaves)
    assert {name for name, _ in backends_run} == set(OPERATORS)
    assert "triton" not in {backend for _, backend in backends_run}
    wide = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    want = ops.text_cross_attention(**wide, backend="reference")[0]
    torch.testing.assert_close(features.float(), want, rtol=0.01, atol=0.01)
    assert all(grad.isfinite().all() for grad in grads)
    with pytest.raises(
        BackendError, match="products of bfloat16 are wrong in Triton's interpreter"
    ):
        ops.text_cross_attention(**inputs, backend="triton")


@in_triton
def test_what_triton_does_not_take(backend: str, device: str) -> None:
    for changes, reason in (
        ({"dtype": torch.float64}, "got torch.float64"),
        ({"words": 129}, "at most 128 words, got 129"),
        ({"width": 513}, "heads of width 512 or less, got 513"),
    ):
        sizes = {"dtype": torch.float16, "words": 2, "width": 3, **changes}
        q = torch.zeros(1, 1, sizes["width"], dtype=sizes["dtype"], device=device)
        k = torch.zeros(1, 1, sizes["words"], sizes["width"], dtype=q.dtype, device=device)
        with pytest.raises(BackendError, match=reason):
            ops.text_cross_attention(q, k, k, q, backend=backend)
