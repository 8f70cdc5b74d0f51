"""text_cross_attention and attention_statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import backends
from samples import Sample, normal
from tolerance import assert_as_accurate
from torch import Tensor

from jepa_fast import BackendError, ops
from jepa_fast.ops._registry import OPERATORS as REGISTERED
from jepa_fast.ops.text_cross_attention import contract, reference

OPERATORS = ("text_cross_attention", "text_cross_attention_backward")


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


def _inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    batch, blocks, tokens, captions, words, width = 3, 2, 5, 3, 4, 12
    floating: Any = {"dtype": dtype, "generator": generator, "grad": False}
    rows = blocks * batch
    return {
        "q": normal(rows, tokens, width, **floating),
        "k": normal(batch, captions, words, width, **floating),
        "v": normal(batch, captions, words, width, **floating),
        "residual": normal(rows, tokens, width, **floating),
        **_masks(batch, captions, words, rows, tokens),
    }


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
def test_values(options: dict[str, Any]) -> None:
    inputs = _inputs()
    expected = _naive(**inputs, **options)
    features, sparsity = ops.text_cross_attention(**inputs, **options)
    torch.testing.assert_close(features.double(), expected["features"], rtol=0, atol=2e-6)
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


def test_statistics_tell_dead_and_uniform_attention() -> None:
    q = torch.ones(2, 3, 4)
    positive, entropy = ops.attention_statistics(q, -torch.ones(2, 2, 5, 4))
    assert positive == 0
    assert float(entropy) == pytest.approx(1.0)
    none = torch.zeros(2, 2, dtype=torch.bool)
    positive, entropy = ops.attention_statistics(q, torch.ones(2, 2, 5, 4), caption_mask=none)
    assert positive == 0
    assert entropy == 0


@pytest.mark.parametrize("pool", ["max", "mean", "none"])
def test_padding_is_not_read(pool: str) -> None:
    """Whatever stands at masked words and captions, even NaN: the same results and gradients."""
    results = []
    for filler in (0.0, 1e4, float("nan")):
        inputs = _inputs()
        missing = ~(inputs["word_mask"] & inputs["caption_mask"][..., None])
        for name in ("k", "v"):
            inputs[name][missing] = filler
        leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "residual")]
        features, sparsity = ops.text_cross_attention(**inputs, pool=pool)
        (features.square().sum() + sparsity).backward()
        assert not leaves[1].grad[missing].any()
        assert not leaves[2].grad[missing].any()
        results.append((features, sparsity, *(x.grad for x in leaves)))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


def test_image_without_captions_passes_the_residual() -> None:
    inputs = _inputs()
    batch = inputs["k"].shape[0]
    features, sparsity = ops.text_cross_attention(**inputs)
    assert torch.equal(features[batch - 1 :: batch], inputs["residual"][batch - 1 :: batch])
    assert not torch.equal(features[0], inputs["residual"][0])
    # Nor does it count in the sparsity: that of the other images alone is the same.
    kept = [r for r in range(features.shape[0]) if r % batch != batch - 1]
    rows = {name: inputs[name][kept] for name in ("q", "residual", "token_mask")}
    images = {name: inputs[name][:-1] for name in ("k", "v", "word_mask", "caption_mask")}
    torch.testing.assert_close(ops.text_cross_attention(**rows, **images)[1], sparsity)


def test_no_captions_at_all() -> None:
    inputs = _inputs()
    inputs["caption_mask"][:] = False
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "residual")]
    features, sparsity = ops.text_cross_attention(**inputs)
    assert torch.equal(features, inputs["residual"])
    assert sparsity == 0
    (features.sum() + sparsity).backward()
    assert not any(x.grad.any() for x in leaves[:3])
    assert bool((leaves[3].grad == 1).all())


def test_masked_captions_never_win() -> None:
    """Every value of the real caption is far below zero, and it still wins over masked ones."""
    inputs = _inputs()
    inputs["v"] = inputs["v"] - 1e6
    inputs["caption_mask"][:] = torch.tensor([False, False, True])
    inputs["word_mask"][:] = True
    features, _ = ops.text_cross_attention(**inputs)
    assert bool((features < -9e5).all())


def test_caption_order_does_not_matter() -> None:
    inputs = _inputs()
    order = torch.tensor([2, 0, 1])
    permuted = {
        name: x[:, order] if name in ("k", "v", "word_mask", "caption_mask") else x
        for name, x in inputs.items()
    }
    for pool in ("max", "mean"):
        for got, want in zip(
            ops.text_cross_attention(**permuted, pool=pool),
            ops.text_cross_attention(**inputs, pool=pool),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


def test_ties_go_to_the_lowest_caption() -> None:
    inputs = _inputs()
    k, v = (inputs[name][:, :1].repeat(1, 3, 1, 1).requires_grad_() for name in ("k", "v"))
    features, _ = ops.text_cross_attention(inputs["q"], k, v, inputs["residual"])
    features.sum().backward()
    assert v.grad[:, 0].any()
    assert not v.grad[:, 1:].any()


def test_sequences_of_an_image_share_its_words() -> None:
    """Row r reads image r % B: the rows of one image alone give the same."""
    inputs = _inputs()
    batch = inputs["k"].shape[0]
    features, _ = ops.text_cross_attention(**inputs)
    for b in range(batch):
        rows = {name: inputs[name][b::batch] for name in ("q", "residual", "token_mask")}
        words = {name: inputs[name][b, None] for name in ("k", "v", "word_mask", "caption_mask")}
        alone, _ = ops.text_cross_attention(**rows, **words)
        torch.testing.assert_close(features[b::batch], alone)


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


# Kernels against float64, as accurate as plain PyTorch in the same dtype.

each_kernel = backends(name for name in REGISTERED[OPERATORS[0]].backends if name != "reference")


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


def _kernel_dtypes(device: str) -> list[torch.dtype]:
    """bfloat16 products come out wrong in Triton's interpreter; float32 is the reference's."""
    if device == "cpu":
        return [torch.float32, torch.float16]
    return [torch.float16, torch.bfloat16]


def _assert_accurate(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    if got.dtype == torch.float32 and got.ndim:
        # Not served on a GPU: the interpreter's check that every term is right.
        torch.testing.assert_close(got, exact.float())
    else:
        assert_as_accurate(got, eager, exact)


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
        ({"tokens": 3, "captions": 5, "words": 100, "width": 64}, (2, "max", "softplus")),
        ({"tokens": 7, "captions": 2, "words": 33, "width": 384}, (1, "max", "relu")),
        ({"tokens": 40, "captions": 1, "words": 1, "width": 15}, (3, "max", "relu")),
        ({"tokens": 2, "captions": 2, "words": 3, "width": 500}, (1, "mean", "relu")),
        ({"tokens": 2, "captions": 16, "words": 2, "width": 32}, (1, "max", "relu")),
    ],
    ids=str,
)
@each_kernel
def test_kernels_are_as_accurate_as_eager(
    backend: str,
    device: str,
    sizes: dict[str, int],
    options: tuple[int, str, str],
    backends_run: list[tuple[str, str]],
    poisoned_memory: None,
) -> None:
    heads, pool, similarity = options
    for dtype in _kernel_dtypes(device):
        inputs = _drawn(dtype, device, **sizes)
        wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
        more = (heads, None, pool, similarity, 0.1)
        got = contract.FORWARD.call(*inputs.values(), *more, backend)
        eager, exact = (_eager(*x.values(), *options) for x in (inputs, wide))
        for each in zip(got, eager, exact, strict=False):
            _assert_accurate(*each)

        upstream = (torch.linspace(-1, 1, got[0].numel(), dtype=dtype, device=device), 3.0)
        upstream = (upstream[0].view(got[0].shape), torch.full((), 3.0, device=device))
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
            _assert_accurate(*each)
    assert {name for _, name in backends_run} == {backend}


@each_kernel
def test_kernels_keep_to_the_edges(backend: str, device: str) -> None:
    """Ties go to the lowest caption, missing captions do not win, none leave the residual."""
    dtype = _kernel_dtypes(device)[0]
    inputs = _drawn(dtype, device, tokens=5, captions=3, words=4, width=12)
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


@each_kernel
def test_kernels_take_any_strides_and_an_empty_batch(backend: str, device: str) -> None:
    dtype = _kernel_dtypes(device)[0]
    inputs = _drawn(dtype, device, tokens=5, captions=3, words=4, width=12)
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

    q = torch.zeros(0, 5, 12, dtype=dtype, device=device, requires_grad=True)
    k = torch.zeros(0, 3, 4, 12, dtype=dtype, device=device, requires_grad=True)
    features, sparsity = ops.text_cross_attention(q, k, k, q, backend=backend)
    assert features.shape == q.shape
    assert sparsity == 0
    (features.sum() + sparsity).backward()
    assert k.grad.shape == k.shape


@pytest.mark.tier2
def test_products_are_the_tensor_cores_and_most_bytes_move_16_at_once() -> None:
    pytest.importorskip("triton", reason="needs triton to compile its kernels")
    from jepa_fast.ops.text_cross_attention import triton, triton_backward
    from jepa_fast.perf.kernel_audit import TARGETS, compile_all

    cases = [*triton.compile_cases(), *triton_backward.compile_cases()]
    products = [case for case in cases if "1x384-max" in case.name and "describe" not in case.name]
    kernels = compile_all(products, TARGETS)
    assert len(kernels) == 3 * len(TARGETS)  # each chip has its own configs or the default
    for kernel in kernels:
        mix = kernel.instructions
        assert sum(mix.tensor_core.values()) > 0, kernel.name
        narrow = sum(width * number for width, number in mix.loads.items() if width < 16)
        assert 16 * mix.loads[16] > narrow, (kernel.name, kernel.chip, mix.loads)


@each_kernel
def test_kernels_say_what_they_do_not_take(backend: str, device: str) -> None:
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_in_float32_inside(dtype: torch.dtype) -> None:
    inputs = _inputs(dtype)
    inputs["residual"] = inputs["residual"].float()
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "residual")]
    features, sparsity = ops.text_cross_attention(**inputs)
    wide = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    assert features.dtype == sparsity.dtype == torch.float32
    for got, want in zip((features, sparsity), ops.text_cross_attention(**wide), strict=True):
        assert torch.equal(got, want)
    (features.sum() + sparsity).backward()
    assert [x.grad.dtype for x in leaves] == [dtype] * 3 + [torch.float32]


def test_autocast_changes_nothing_inside() -> None:
    inputs = _inputs()
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "residual")]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features, sparsity = ops.text_cross_attention(**inputs)
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
