"""patch_word_consistency and patch_word_similarity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from samples import Sample, normal
from torch import Tensor

from jepa_fast import ops

OPERATORS = ("patch_word_consistency", "patch_word_consistency_backward")


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


@pytest.mark.parametrize("filler", [1e4, float("nan")])
def test_padding_is_not_read(filler: float) -> None:
    results = []
    for value in (0.0, filler):
        inputs = _inputs()
        missing = ~(inputs["word_mask"] & inputs["caption_mask"][..., None])
        for k in inputs["k_layers"]:
            k[missing] = value
        leaves = [x.requires_grad_() for x in (*inputs["q_layers"], *inputs["k_layers"])]
        loss = ops.patch_word_consistency(**inputs)
        loss.backward()
        assert not any(k.grad[missing].any() for k in inputs["k_layers"])
        results.append((loss, *(x.grad for x in leaves)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_no_captions_at_all() -> None:
    inputs = _inputs()
    inputs["caption_mask"][:] = False
    leaves = [x.requires_grad_() for x in (*inputs["q_layers"], *inputs["k_layers"])]
    loss = ops.patch_word_consistency(**inputs)
    loss.backward()
    assert loss == 0
    assert not any(x.grad.any() for x in leaves)


def test_bfloat16_in_float32_inside() -> None:
    inputs = _inputs(dtype=torch.bfloat16)
    wide = {n: [y.float() for y in x] if "layers" in n else x for n, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.patch_word_consistency(**inputs)
    assert torch.equal(loss, ops.patch_word_consistency(**wide))


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
        ({"tau": -1.0}, ValueError, "tau must be positive"),
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
