"""Words as caches keep them: in half precision, and in float8 with a scale a word."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_tcjepa import MASKS, WORD_MASK, batch, build
from torch import Tensor

from jepa_fast import TIJepa
from jepa_fast.data import TextBatch
from jepa_fast.masks import BlockMasks
from jepa_fast.nn.text_conditioner import Captions
from jepa_fast.nn.words import dequantize_words, quantize_words

FP8 = torch.float8_e4m3fn

each_conditioning = pytest.mark.parametrize(
    "conditioning", ["words", "mean_words", "adaln", "feature", "append"]
)


def words_of_all_sizes() -> Tensor:
    """[2, 3, 7, 64]: numbers of a word down to 2^-30 of its largest, words of all magnitudes."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 7)
    normal = torch.randn(*shape, 64, generator=generator)
    fine = torch.rand(*shape, 64, generator=generator).mul(-30).exp2()
    coarse = torch.linspace(-100, 120, math.prod(shape)).exp2().view(*shape, 1)
    return normal.clamp(-3, 3) * fine * coarse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_number_is_near(dtype: torch.dtype) -> None:
    words = words_of_all_sizes().to(dtype)
    fp8, scale = quantize_words(words)
    assert fp8.dtype == FP8
    assert fp8.shape == words.shape
    assert scale.dtype == torch.float32
    assert scale.shape == words.shape[:-1]
    words = words.double()
    largest = words.abs().amax(-1, keepdim=True)
    error = (dequantize_words(fp8, scale, torch.float64) - words).abs()
    assert (error <= torch.maximum(words.abs() / 16, largest * 2**-17)).all()
    assert (error > words.abs() / 40).any()  # the bound is no looser than it has to be


def test_scales_are_the_lowest_powers_of_two_that_fit() -> None:
    words = torch.tensor([448.0, 448.1, 224.0, 224.1, 1.0, 2.0**-100, 3e38])[:, None]
    fp8, scale = quantize_words(words)
    assert scale.tolist() == [1.0, 2.0, 0.5, 1.0, 2.0**-8, 2.0**-108, 2.0**120]
    torch.testing.assert_close(dequantize_words(fp8, scale), words, rtol=1 / 16, atol=0.0)
    powers = torch.arange(-110, 119).double().exp2().float()[:, None]
    fp8, scale = quantize_words(powers)
    assert torch.equal(dequantize_words(fp8, scale), powers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_numbers_stay_finite(dtype: torch.dtype) -> None:
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    words = most * torch.tensor([[1.0, 0.0], [0.98, -0.97], [-1.0, 0.5], [0.96, -0.4]]).double()
    words = words.to(dtype)
    back = dequantize_words(*quantize_words(words), torch.float32 if most > 1e38 else dtype)
    assert ((back.double() - words.double()).abs() <= words.double().abs() / 16).all()


def test_no_dtype_rounds_what_is_dequantized() -> None:
    fp8, scale = quantize_words(torch.randn(5, 64))
    exact = dequantize_words(fp8, scale, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        got = dequantize_words(fp8, scale, dtype)
        assert got.dtype == dtype
        assert torch.equal(got.double(), exact)


def test_zeros_stay() -> None:
    fp8, scale = quantize_words(torch.zeros(2, 3, 8))
    assert torch.equal(scale, torch.ones(2, 3))
    assert torch.equal(dequantize_words(fp8, scale), torch.zeros(2, 3, 8))
    tiny = torch.full((1, 4), 1e-44)  # less than any float8 of the lowest scale
    fp8, scale = quantize_words(tiny)
    assert float(scale) == 2.0**-126
    assert torch.equal(dequantize_words(fp8, scale), torch.zeros(1, 4))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    words = torch.randn(2, 3, 8)
    words[1, 2, 5] = bad
    with pytest.raises(ValueError, match=r"words: expected finite numbers .* got inf or NaN"):
        quantize_words(words)
    with pytest.raises(ValueError, match="within float32's range"):
        quantize_words(torch.full((1, 2), 1e300, dtype=torch.float64))


def test_errors() -> None:
    fp8, scale = quantize_words(torch.randn(2, 3, 4, 5))
    for wrong in (fp8, torch.ones(2, 5, dtype=torch.int64)):
        with pytest.raises(TypeError, match="words: expected float16, bfloat16, float32"):
            quantize_words(wrong)
    for few in (torch.randn(2, 0), torch.tensor(1.0)):
        with pytest.raises(
            ValueError, match=r"words: expected \[\.\.\., Dt\] .* at least one number"
        ):
            quantize_words(few)
    with pytest.raises(TypeError, match="words: expected a tensor, got list"):
        quantize_words([1.0])
    with pytest.raises(TypeError, match=r"got TextBatch; pass its \.words"):
        quantize_words(TextBatch(*torch.zeros(3, 1)))
    with pytest.raises(TypeError, match="words: expected a tensor, got list"):
        dequantize_words([1.0], scale)
    for wrong in (0.5, None):
        with pytest.raises(TypeError, match=r"word_scale: expected a tensor of one a word, got"):
            dequantize_words(fp8, wrong)
    with pytest.raises(
        TypeError, match=r"words: expected torch.float8_e4m3fn .* got torch.float32"
    ):
        dequantize_words(fp8.float(), scale)
    with pytest.raises(TypeError, match=r"word_scale: expected a floating dtype, got torch.int64"):
        dequantize_words(fp8, scale.long())
    with pytest.raises(ValueError, match=r"one a word, \[2, 3, 4\], got \[2, 3\]"):
        dequantize_words(fp8, scale[..., 0])
    sizes = {"images": 2, "text_dim": 5}
    with pytest.raises(TypeError, match=r"words: expected a word_scale with torch.float8_e4m3fn"):
        Captions.of(fp8, **sizes)
    with pytest.raises(TypeError, match=r"words: expected torch.float8_e4m3fn with a scale"):
        Captions.of(fp8.float(), scale=scale, **sizes)
    with pytest.raises(TypeError, match=r"words: expected floating vectors, got torch.int64"):
        Captions.of(torch.ones(2, 3, 4, 5, dtype=torch.int64), **sizes)
    with pytest.raises(TypeError, match=r"words: expected a dense tensor, got torch\.sparse_coo"):
        Captions.of(torch.ones(2, 3, 4, 5).to_sparse(), **sizes)


@each_conditioning
@pytest.mark.parametrize("masked", [False, True])
def test_words_made_in_inference_mode(conditioning: str, masked: bool) -> None:
    """As frozen encoders are run."""
    model, given = build(conditioning=conditioning), batch()
    names = ("words", "word_mask", "caption_mask") if masked else ("words",)
    with torch.inference_mode():
        made = {name: given[name].clone() for name in names}
    losses = []
    for inputs in ({name: given[name] for name in names}, made):
        losses.append(model(given["images"], MASKS, **inputs).loss)
        losses[-1].backward()
    assert torch.equal(*losses)


@pytest.mark.parametrize("objective", ["masked_image", "cross_modal"])
@pytest.mark.parametrize("masked", [False, True])
def test_tijepa_reads_what_was_made_in_inference_mode(objective: str, masked: bool) -> None:
    context, targets = torch.tensor([[0, 1]] * 2), torch.tensor([[[2]]] * 2)
    model, masks = _tijepa(objective), BlockMasks(context, targets, None, (2, 2))
    with torch.inference_mode():
        words, features = torch.randn(2, 4, 5), torch.randn(2, 4, 8)
        word_mask = torch.ones(2, 4, dtype=torch.bool) if masked else None
    model(None, masks, words, word_mask, image_features=features).loss.backward()
    assert all(p.grad is not None for _, p in model.trainable_parameters())


@pytest.mark.parametrize("masked", ["word_mask", "caption_mask"])
def test_masks_on_another_device_are_refused_by_name(masked: str) -> None:
    for read in (_captions_of, _tijepa_of):
        masks = {masked: torch.ones(2, 3, 4, dtype=torch.bool, device="meta")}
        if masked == "caption_mask":
            masks[masked] = masks[masked][..., 0]
        with pytest.raises(
            ValueError, match=rf"{masked}: expected a tensor on cpu, .* on meta; use"
        ):
            read(torch.ones(2, 3, 4, 5), **masks)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_words_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.ones(3, 4, 5), torch.ones(2, 4, 5)])
    for read in (_captions_of, _tijepa_of):
        with pytest.raises(
            TypeError, match="words: expected a dense tensor, got a nested one; use"
        ):
            read(nested)


def _captions_of(words: Tensor, **masks: Tensor) -> None:
    Captions.of(words, **masks, images=2, text_dim=5)


def _tijepa(objective: str = "masked_image") -> TIJepa:
    return TIJepa(
        None, image_dim=8, grid=(2, 2), text_dim=5, width=8, depth=1, num_heads=1,
        predictor_dim=8, predictor_depth=1, predictor_heads=1, objective=objective,
    )  # fmt: skip


def _tijepa_of(words: Tensor, **masks: Tensor) -> None:
    _tijepa().encode(None, words, **masks, image_features=torch.ones(2, 4, 8))


@each_conditioning
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_float32_model_reads_words_of_any_dtype(conditioning: str, dtype: torch.dtype) -> None:
    model, given = build(conditioning=conditioning), batch()
    given["words"] = given["words"].to(dtype)
    out = model(masks=MASKS, **given)
    out.loss.backward()
    want = model(masks=MASKS, **{**given, "words": given["words"].float()})
    assert torch.equal(out.loss, want.loss)
    assert all(p.grad is not None for _, p in model.trainable_parameters())


@each_conditioning
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn]
)
def test_words_of_any_dtype_under_autocast(
    conditioning: str, dtype: torch.dtype, model_dtype: torch.dtype
) -> None:
    """Autocast casts to its dtype, and leaves float64 as it is, be it words or weights."""
    model, given = build(conditioning=conditioning).to(model_dtype), batch()
    given["images"] = given["images"].to(model_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(masks=MASKS, **given).loss
        if dtype == torch.float8_e4m3fn:
            given["words"], given["word_scale"] = quantize_words(given["words"])
        else:
            given["words"] = given["words"].to(dtype)
        out = model(masks=MASKS, **given)
    assert out.loss.dtype == model_dtype
    torch.testing.assert_close(out.loss, want, rtol=0.1, atol=0.0)
    out.loss.backward()


@each_conditioning
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_reads_words_in_float8(conditioning: str, autocast: bool) -> None:
    model, given = build(conditioning=conditioning), batch()
    fp8, scale = quantize_words(given["words"])
    exact = {**given, "words": dequantize_words(fp8, scale)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(masks=MASKS, **{**given, "words": fp8}, word_scale=scale)
        want = model(masks=MASKS, **exact)
    # Under autocast means are of bfloat16 words, where those of float32 ones are not.
    torch.testing.assert_close(out.loss, want.loss, rtol=0.02 if autocast else 0.0, atol=0.0)
    out.loss.backward()
    near = model(masks=MASKS, **given).loss
    torch.testing.assert_close(out.loss, near, rtol=0.1, atol=0.0)


def test_float32_words_are_not_copied() -> None:
    words = torch.randn(2, 3, 4, 5)
    captions = Captions.of(words, images=2, text_dim=5, dtype=torch.float32)
    assert captions.words is words
    with torch.autocast("cpu", torch.bfloat16):
        half = words.half()
        assert Captions.of(half, images=2, text_dim=5, dtype=torch.float32).words is half
        fp8, scale = quantize_words(words)
        read = Captions.of(fp8, images=2, text_dim=5, scale=scale, dtype=torch.float32).words
    assert read.dtype == torch.bfloat16


@each_conditioning
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("masked", ["words", "captions", "float8"])
def test_what_is_masked_enters_nothing(conditioning: str, bad: float, masked: str) -> None:
    model, given = build(conditioning=conditioning), batch()
    words, there = given["words"], given["word_mask"] & given["caption_mask"][..., None]
    if masked == "captions":
        there = given["caption_mask"][..., None].expand_as(there)
        del given["word_mask"]
    if masked == "float8":
        given["words"], scale = quantize_words(words)
        given["word_scale"] = scale.masked_fill(~there, bad)
        want = model(masks=MASKS, **{**given, "word_scale": scale.masked_fill(~there, 0.0)})
    else:
        given["words"] = words.masked_fill(~there[..., None], bad)
        want = model(masks=MASKS, **{**given, "words": words.masked_fill(~there[..., None], 0.0)})
    out = model(masks=MASKS, **given)
    assert torch.equal(out.loss, want.loss)
    trained = [p for _, p in model.trainable_parameters()]
    for got, expected in zip(
        torch.autograd.grad(out.loss, trained), torch.autograd.grad(want.loss, trained), strict=True
    ):
        assert torch.equal(got, expected)


def test_masked_words_have_no_gradient() -> None:
    words = batch()["words"].masked_fill(~WORD_MASK[..., None], math.inf).requires_grad_()
    read = Captions.of(words, WORD_MASK, images=3, text_dim=words.shape[-1]).words
    (grad,) = torch.autograd.grad(read.square().sum(), words)
    assert torch.equal(grad, 2 * words.detach().masked_fill(~WORD_MASK[..., None], 0.0))


def test_maps_take_float8_words() -> None:
    model, given = build(), batch()
    fp8, scale = quantize_words(given["words"])
    arguments: Any = (given["images"], None)
    got = model.similarity_map(*arguments, fp8, word_scale=scale)
    want = model.similarity_map(*arguments, dequantize_words(fp8, scale))
    assert torch.equal(got, want)


def test_compiles_with_float8_words() -> None:
    model, given = build(predictor_depth=1), batch()
    given["words"], given["word_scale"] = quantize_words(given["words"])
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **text: model(masks=MASKS, **text).loss, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(**given), model(masks=MASKS, **given).loss)
