"""assemble_predictor_tokens."""

from __future__ import annotations

import pytest
import torch
from backends import backends
from samples import Sample, indices, normal
from tolerance import assert_as_accurate
from torch import Tensor

from jepa_fast import ops
from jepa_fast.ops._registry import OPERATORS as REGISTERED

OPERATORS = ("assemble_predictor_tokens", "assemble_predictor_tokens_backward")
PATCHES, WIDTH = 6, 3
each_backend = backends(REGISTERED["assemble_predictor_tokens"].backends)


def _sample(
    name: str,
    batch: int = 2,
    seen: int = 3,
    blocks: int = 2,
    hidden: int = 2,
    grads: str = "cmp",
    index_dtype: torch.dtype = torch.int64,
) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator):
        return (
            normal(batch, seen, WIDTH, dtype=dtype, generator=g, grad="c" in grads),
            normal(WIDTH, dtype=dtype, generator=g, grad="m" in grads),
            normal(PATCHES, WIDTH, dtype=dtype, generator=g, grad="p" in grads),
            indices(PATCHES, batch, seen, generator=g, dtype=index_dtype),
            indices(PATCHES, batch, blocks, hidden, generator=g, dtype=index_dtype),
        )

    return Sample(name, ops.assemble_predictor_tokens, OPERATORS, make)


SAMPLES = [
    _sample("learned positions"),
    _sample("fixed positions", grads="cm"),
    _sample("only the mask token learns", grads="m", index_dtype=torch.int32),
    _sample("overlapping blocks", blocks=4, hidden=5),
    _sample("batch 0", batch=0),
    _sample("no context", seen=0),
    _sample("no targets", hidden=0),
    _sample("every patch", seen=PATCHES, blocks=1, hidden=PATCHES),
]


def test_values() -> None:
    context, mask_token, pos, context_index, target_index = _sample("").arguments()
    out = ops.assemble_predictor_tokens(context, mask_token, pos, context_index, target_index)
    assert out.shape == (4, 5, WIDTH)
    for m in range(2):
        for b in range(2):
            row = [context[b, k] + pos[context_index[b, k]] for k in range(3)]
            row += [mask_token + pos[target_index[b, m, k]] for k in range(2)]
            assert torch.equal(out[m * 2 + b], torch.stack(row))


@each_backend
@pytest.mark.parametrize("others", ["same", "float32", "mask_token float32"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("width", [1, 63, 384])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_as_accurate_as_eager(
    index_dtype: torch.dtype,
    width: int,
    dtype: torch.dtype,
    others: str,
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
    poisoned_memory: None,
) -> None:
    """Tokens, and gradients of all that can learn, from a sliced gradient."""
    g = torch.Generator().manual_seed(width)
    other = torch.float32 if others == "float32" else dtype
    of_mask = dtype if others == "same" else torch.float32
    batch, seen, blocks, hidden, patches = 3, 5, 4, 7, 11
    floating = [
        torch.randn(batch, 2 * seen, width, generator=g)[:, ::2].to(dtype),
        torch.randn(width, generator=g).to(of_mask),
        torch.randn(patches, width, generator=g).to(other),
    ]
    index = [
        torch.randint(patches - 1, shape, generator=g, dtype=index_dtype)
        for shape in ((batch, seen), (batch, blocks, hidden))
    ]
    upstream = torch.randn(blocks * batch, 2 * (seen + hidden), width, generator=g)[:, ::2]
    upstream = upstream.to(torch.promote_types(dtype, of_mask))

    def run(tensors: list[Tensor], backend: str, device: str) -> list[Tensor]:
        leaves = [tensor.to(device).requires_grad_() for tensor in tensors]
        out = ops.assemble_predictor_tokens(
            *leaves, *(each.to(device) for each in index), backend=backend
        )
        grads = torch.autograd.grad(out, leaves, upstream.to(device, out.dtype))
        return [out.detach().cpu(), *(grad.cpu() for grad in grads)]

    got = run(floating, backend, device)
    assert backends_run == [(name, backend) for name in OPERATORS]
    eager = run(floating, "reference", "cpu")
    exact = run([tensor.double() for tensor in floating], "reference", "cpu")
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        assert_as_accurate(mine, theirs, truth)


@each_backend
@pytest.mark.parametrize("empty", ["batch", "seen", "blocks", "hidden"])
def test_where_there_is_nothing(empty: str, backend: str, device: str) -> None:
    sizes = {"batch": 2, "seen": 3, "blocks": 2, "hidden": 4, empty: 0}

    def run(backend: str, device: str) -> list[Tensor]:
        arguments = [x.to(device).detach() for x in _sample("", **sizes).arguments(torch.float32)]
        leaves = [x.requires_grad_() for x in arguments[:3]]
        out = ops.assemble_predictor_tokens(*arguments, backend=backend)
        return [x.cpu() for x in (out, *torch.autograd.grad(out, leaves, torch.ones_like(out)))]

    for got, want in zip(run(backend, device), run("reference", "cpu"), strict=True):
        torch.testing.assert_close(got, want)


def test_parameters_shapes_and_a_single_block() -> None:
    context, mask_token, pos, context_index, target_index = _sample("").arguments()
    want = ops.assemble_predictor_tokens(context, mask_token, pos, context_index, target_index)
    as_parameters = (mask_token[None, None], pos[None])
    got = ops.assemble_predictor_tokens(context, *as_parameters, context_index, target_index)
    assert torch.equal(got, want)
    got = ops.assemble_predictor_tokens(context, mask_token, pos, context_index, target_index[:, 0])
    assert torch.equal(got, want[:2])


def test_dtypes_promote_and_gradients_return_in_their_own() -> None:
    context, mask_token, pos, *index = _sample("").arguments(torch.float32)
    context = context.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.assemble_predictor_tokens(context, mask_token, pos, *index)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert context.grad is not None
    assert context.grad.dtype == torch.bfloat16
    assert mask_token.grad.dtype == pos.grad.dtype == torch.float32
    lower = ops.assemble_predictor_tokens(context, mask_token.bfloat16(), pos.bfloat16(), *index)
    assert lower.dtype == torch.bfloat16


def test_bad_arguments() -> None:
    context, mask_token, pos, context_index, target_index = _sample("").arguments()
    call = ops.assemble_predictor_tokens
    with pytest.raises(
        ValueError, match=r"mask_token must be \[d\] or \[1, 1, d\], got .*\[1, 3\]"
    ):
        call(context, mask_token[None], pos, context_index, target_index)
    with pytest.raises(ValueError, match=r"mask_token must be .*, got shape \[2, 1, 3\]"):
        call(context, mask_token.expand(2, 1, 3), pos, context_index, target_index)
    with pytest.raises(
        ValueError, match=r"pos_embed must be \[N, d\] or \[1, N, d\], got .*\[2, 6"
    ):
        call(context, mask_token, pos.expand(2, 6, 3), context_index, target_index)
    with pytest.raises(ValueError, match=r"pos_embed.shape\[1\] and context.shape\[2\]"):
        call(context, mask_token, pos[:, 1:], context_index, target_index)
    with pytest.raises(ValueError, match=r"context_index.shape\[1\] and context.shape\[1\]"):
        call(context, mask_token, pos, context_index[:, 1:], target_index)
    with pytest.raises(ValueError, match=r"target_index.shape\[0\] and context.shape\[0\]"):
        call(context, mask_token, pos, context_index, target_index[1:])
    with pytest.raises(TypeError, match="mask_token must be of a floating dtype"):
        call(context, mask_token.int(), pos, context_index, target_index)
    with pytest.raises(TypeError, match=r"target_index must be int32 or int64, .*; use \.long"):
        call(context, mask_token, pos, context_index, target_index.float())
    with pytest.raises(ValueError, match=r"context_index must be in \[0, 6\), got 6"):
        call(context, mask_token, pos, torch.full_like(context_index, 6), target_index)
    with pytest.raises(ValueError, match=r"target_index must be in \[0, 6\), got -1"):
        call(context, mask_token, pos, context_index, torch.full_like(target_index, -1))
