"""Word vectors in a byte a number, for caches: float8 with a scale a word."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_fast.ops._autograd import may_be_saved

_SMALLEST_EXPONENT = -126  # of a normal float32


def quantize_words(words: Tensor) -> tuple[Tensor, Tensor]:
    """Words in ``torch.float8_e4m3fn``, each with a scale of its own: ``words = fp8 * scale``.

    Scales are powers of two, the lowest with which the word's largest number fits, so that
    multiplying by them rounds nothing. A number is off by at most 1/16 of itself, or by 2^-17 of
    the largest of its word if that is more (1e-35, of smaller words). What fits the words' dtype
    still does so afterwards. A word of zeros has scale 1.

    Meant for caches: whether all numbers are finite is read on the host.

    Args:
        words: ``[..., Dt]`` in float16, bfloat16, float32 or float64, such as ``[B, C, S, Dt]``.

    Returns:
        ``[..., Dt]`` float8_e4m3fn, and the scales ``[...]`` float32.

    Raises:
        TypeError: the words are no tensor, not floating, or in float8 already.
        ValueError: a number is infinite or NaN, or too large for float32; a word has none.
    """
    _check_tensor(words)
    if not words.dtype.is_floating_point or words.dtype.itemsize == 1:
        raise TypeError(f"words: expected float16, bfloat16, float32 or float64, got {words.dtype}")
    if words.ndim == 0 or words.shape[-1] == 0:
        raise ValueError(
            f"words: expected [..., Dt] with at least one number a word, got {list(words.shape)}"
        )
    wide = words.float()
    if not bool(wide.isfinite().all()):
        raise ValueError(
            "words: expected finite numbers within float32's range, got inf or NaN; look at what "
            "the text encoder gave (float16 overflows in T5: run it in bfloat16 or float32)"
        )
    largest = wide.abs().amax(-1)
    # largest = mantissa * 2^exponent with a mantissa in [0.5, 1), and 448 = 0.875 * 2^9.
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent - 9 + (mantissa > 0.875).to(exponent.dtype)
    exponent = exponent.clamp_min(_SMALLEST_EXPONENT)
    exponent = exponent.masked_fill(largest == 0, 0)
    scale = (exponent + 127 << 23).view(torch.float32)  # the bits of 2^exponent: ldexp may round
    # The largest numbers of a dtype are rounded down: 256 of the highest scale is beyond it.
    room = min(torch.finfo(words.dtype).max, torch.finfo(torch.float32).max) / scale
    most = torch.full_like(scale, 448.0).masked_fill(room < 256, 240.0)[..., None]
    return (wide / scale[..., None]).clamp(-most, most).to(torch.float8_e4m3fn), scale


def _check_tensor(words: object) -> None:
    if not isinstance(words, Tensor):
        raise TypeError(
            f"words: expected a tensor, got {type(words).__name__}; "
            f"{'pass its .words' if is_text_batch(words) else 'a text encoder makes it'}"
        )


def is_text_batch(value: object) -> bool:
    """Whether it has what a :class:`jepa_fast.data.TextBatch` has, be it another class or not."""
    return all(hasattr(value, name) for name in ("words", "word_mask", "caption_mask"))


def dequantize_words(words: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What :func:`quantize_words` made smaller: ``words * scale``.

    Args:
        words: ``[..., Dt]`` float8_e4m3fn.
        scale: ``[...]`` floating, one a word.
        dtype: of the result. Scales that are powers of two round in no dtype, within its range.

    Returns:
        ``[..., Dt]`` in ``dtype``.

    Raises:
        TypeError: the words are not in float8_e4m3fn, or the scale is no floating tensor.
        ValueError: there is not one scale a word.
    """
    _check_tensor(words)
    if words.dtype != torch.float8_e4m3fn:
        raise TypeError(
            f"words: expected torch.float8_e4m3fn with a scale, got {words.dtype}; others have "
            "none (FSDP's MixedPrecisionPolicy casts inputs but with cast_forward_inputs=False)"
        )
    if not isinstance(scale, Tensor):
        raise TypeError(
            f"word_scale: expected a tensor of one a word, got {type(scale).__name__}; "
            "quantize_words makes it"
        )
    if not scale.dtype.is_floating_point:
        raise TypeError(f"word_scale: expected a floating dtype, got {scale.dtype}")
    if scale.shape != words.shape[:-1]:
        raise ValueError(
            f"word_scale: expected one a word, {list(words.shape[:-1])}, got {list(scale.shape)}"
        )
    # In float16 a scale can be 0 where the product is not.
    return (words.float() * scale[..., None].float()).to(dtype)


def word_vectors(words: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Words as models read them.

    Args:
        words: ``[..., Dt]`` floating and dense; float8_e4m3fn with a scale.
        scale: ``[...]`` for float8 words, as in :func:`dequantize_words`; None for others.
        dtype: of the result; None: float32 for float8 words, that of the words for others.

    Returns:
        ``[..., Dt]``, the words themselves where they have the dtype.

    Raises:
        TypeError: the words are not floating, in float8 without a scale, or have a scale in another
            dtype.
        ValueError: there is not one scale a word.
    """
    if not words.dtype.is_floating_point:
        raise TypeError(
            f"words: expected floating vectors, got {words.dtype}; a text encoder makes them of "
            "token ids, see jepa_fast.interop"
        )
    if scale is not None:
        return dequantize_words(words, scale, dtype or torch.float32)
    if words.dtype.itemsize == 1:
        raise TypeError(
            f"words: expected a word_scale with {words.dtype}, got none; "
            "jepa_fast.nn.words.quantize_words makes both"
        )
    return words if dtype is None else words.to(dtype)


def check_dense_words(words: Tensor) -> None:
    """Raises TypeError for words that are sparse or nested, of which the latter have no shape."""
    if words.is_nested:
        raise TypeError(
            "words: expected a dense tensor, got a nested one; use .to_padded_tensor(0.0) and pass "
            "a word_mask"
        )
    if words.layout != torch.strided:
        raise TypeError(f"words: expected a dense tensor, got {words.layout}; use .to_dense()")


def outside_inference(x: Tensor) -> Tensor:
    """The tensor, or a copy of it where a frozen encoder made it in inference mode: autograd keeps
    no such tensors for a backward pass.
    """
    return x if may_be_saved(x) else x.clone()


def check_word_mask(
    name: str, mask: Tensor | None, shape: torch.Size, device: torch.device
) -> None:
    """Raises TypeError if a mask is not bool, ValueError if it has not this shape or is elsewhere;
    None is fine.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"{name}: expected a bool tensor, got {type(mask).__name__}; use torch.tensor"
        )
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, got {mask.dtype}; use .bool()")
    if mask.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(
            f"{name}: expected a tensor on {device}, where what it masks is, got one on "
            f"{mask.device}; use .to({str(device)!r})"
        )
