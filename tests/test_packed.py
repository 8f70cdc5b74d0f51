"""Packed tokens: nothing padded, nothing cut, one shape, and the numbers of padded tokens."""

from __future__ import annotations

import itertools
import sys
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from jepa_fast import BackendError, IJepa, ProbIJepa, TCJepa, TIJepa
from jepa_fast.masks import (
    BlockMasks,
    BlockMaskSampler,
    MaskCollator,
    PackedMasks,
    pack_masks,
    packing_budget,
)
from jepa_fast.nn import packed
from jepa_fast.nn.attention import attend
from jepa_fast.nn.heads import HEADS
from jepa_fast.nn.packed import (
    BACKENDS,
    Sequences,
    attend_packed,
    choose_backend,
    unsupported,
)
from jepa_fast.nn.vit import VisionTransformer

GRID, PATCHES = (6, 6), 36
SMALL: dict[str, Any] = {"predictor_dim": 16, "predictor_depth": 2, "predictor_heads": 2}


def _sampler(**options: Any) -> BlockMaskSampler:
    return BlockMaskSampler(GRID, min_context=2, **options)


def _encoder() -> VisionTransformer:
    return VisionTransformer(24, 4, embed_dim=32, depth=2, num_heads=4)


def _images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def _contexts(pack: PackedMasks) -> list[list[int]]:
    """Each image's patches, from the packed rows."""
    offsets = pack.context_offsets.tolist()
    found = []
    for image, (begin, end) in enumerate(itertools.pairwise(offsets[:-1])):
        rows = pack.context[begin:end]
        assert torch.equal(rows // PATCHES, torch.full_like(rows, image))
        found.append((rows % PATCHES).tolist())
    return found


# What a pack holds


@pytest.mark.parametrize("step", range(6))
def test_a_pack_holds_every_context_patch_and_target(step: int) -> None:
    masks = _sampler()(step, 7)
    tokens, block, longest = packing_budget(_sampler(), 7)
    (pack,) = pack_masks(masks, tokens, block, longest)
    assert masks.context_mask is not None
    expected = [
        row[real].tolist() for row, real in zip(masks.context, masks.context_mask, strict=True)
    ]
    assert _contexts(pack) == expected
    assert pack.share == 1.0
    patches = masks.targets.shape[2]
    assert torch.equal(pack.targets[:, :, :patches], masks.targets)
    if pack.target_mask is not None:
        assert torch.equal(pack.target_mask.sum(2), torch.full((7, 4), patches))
    # Sequence m * B + b: the context, then the block's mask tokens, which predict the targets.
    offsets = pack.predictor_offsets.tolist()
    first = pack.context_offsets.tolist()
    for m in range(4):
        for b in range(7):
            rows = pack.predictor[offsets[m * 7 + b] : offsets[m * 7 + b + 1]].tolist()
            hidden = [tokens + (b * 4 + m) * block + k for k in range(patches)]
            assert rows == [*range(first[b], first[b + 1]), *hidden]
            found = pack.predictor[pack.prediction[m * 7 + b]] - tokens
            assert torch.equal(pack.targets.flatten()[found], pack.targets[b, m])
    padded = pack.padded()
    assert padded.context_mask is not None
    again = [
        row[real].tolist() for row, real in zip(padded.context, padded.context_mask, strict=True)
    ]
    assert again == expected


def test_what_does_not_fit_is_split_and_never_cut() -> None:
    masks = _sampler()(0, 9)
    assert masks.context_mask is not None
    whole = [
        row[real].tolist() for row, real in zip(masks.context, masks.context_mask, strict=True)
    ]
    packs = pack_masks(masks, tokens=1 + masks.context.shape[1] * 2)
    assert len(packs) > 2
    assert sum(pack.share for pack in packs) == pytest.approx(1)
    contexts = [_contexts(pack) for pack in packs]
    for image, expected in enumerate(whole):
        (found,) = [each[image] for each in contexts if each[image]]
        assert found == expected
    assert len({pack.context.shape for pack in packs}) == 1
    counted = torch.stack([p.target_mask for p in packs if p.target_mask is not None])
    assert torch.equal(counted.sum(0), torch.ones_like(masks.targets))


def test_a_budget_takes_the_longest_context_there_can_be() -> None:
    """Some steps of a small batch need not have met it."""
    sampler = BlockMaskSampler(24)
    budget = packing_budget(sampler, 1, steps=1)
    _, _, longest = budget
    context = torch.arange(longest)[None]
    (pack,) = pack_masks(BlockMasks(context, context[:, None, :1], None, sampler.grid), *budget)
    assert torch.equal(pack.context[:longest], context[0])
    for batch in (1, 2, 7):
        tokens, _, _ = packing_budget(sampler, batch, steps=4, multiple=1)
        fullest = max(int(sampler(step, batch).filled().sum()) for step in range(4))
        assert tokens == max(fullest, longest) + 1


def test_contexts_of_one_length_and_no_images() -> None:
    masks = _sampler(max_context=2)(0, 3)
    assert masks.context_mask is None
    (pack,) = pack_masks(masks, tokens=8)
    assert _contexts(pack) == masks.context.tolist()
    (empty,) = pack_masks(_sampler()(0, 0), tokens=4)
    assert empty.context.shape == (4,)


def test_bad_budgets() -> None:
    masks = _sampler()(0, 3)
    most = masks.context.shape[1]
    with pytest.raises(ValueError, match=f"tokens: expected more than {most}"):
        pack_masks(masks, tokens=most)
    with pytest.raises(ValueError, match=f"longest: expected at least {most}"):
        pack_masks(masks, tokens=1000, longest=most - 1)
    with pytest.raises(ValueError, match="block: expected at least"):
        pack_masks(masks, tokens=1000, block=1)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        packing_budget(_sampler(), 0)
    with pytest.raises(ValueError, match="expected all images of the batch in one pack"):
        pack_masks(masks, tokens=most + 1)[0].padded()


def test_sizes_that_are_no_integers() -> None:
    masks = _sampler()(0, 3)
    block, longest = masks.targets.shape[2], masks.context.shape[1]
    of_numpy = pack_masks(masks, np.int64(200), np.int64(block), np.int64(longest))[0]
    assert type(of_numpy.longest) is int
    assert of_numpy.context.shape == (200,)
    for name, value in (("tokens", 200.0), ("block", 50.0), ("longest", 36.0)):
        sizes = {"tokens": 200, name: value}
        with pytest.raises(TypeError, match=f"{name}: expected an int, got float {value}"):
            pack_masks(masks, **sizes)  # type: ignore[arg-type]
    for name in ("batch", "steps", "multiple"):
        options = {"batch": 2, name: 2.0}
        with pytest.raises(TypeError, match=f"{name}: expected an int, got float 2.0"):
            packing_budget(_sampler(), **options)  # type: ignore[arg-type]


def test_what_is_not_block_masks_is_not_packed() -> None:
    masks = _sampler()(0, 3)
    (pack,) = pack_masks(masks, 200)
    with pytest.raises(TypeError, match=r"expected BlockMasks, got PackedMasks; .* packed already"):
        pack_masks(pack, 200)  # type: ignore[arg-type]
    pair: Any = MaskCollator(24, 4, npred=1, min_keep=0)([0, 1])[1:]
    with pytest.raises(TypeError, match=r"expected BlockMasks, got tuple; .*BlockMasks.from_lists"):
        pack_masks(pair, 200)
    assert len(pack_masks(BlockMasks.from_lists(*pair, GRID), 200)) == 1
    with pytest.raises(TypeError, match="sampler: expected a BlockMaskSampler, got MaskCollator"):
        packing_budget(MaskCollator(24, 4), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["ijepa", "probijepa", "tcjepa", "tijepa"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_packs_are_forward_passes_of_their_own(method: str, count: int) -> None:
    model, text = _model(method)
    packs = pack_masks(_sampler()(0, 5), 500) * count
    message = rf"masks: .* got a list of {count}; .* for pack in packs"
    with pytest.raises(TypeError, match=message):
        model(_images(), packs, *text)


@pytest.mark.parametrize("wrong", [-1, 36])
@pytest.mark.parametrize("place", ["context", "targets"])
def test_a_patch_that_no_image_has_is_refused_and_not_taken_of_the_next(
    place: str, wrong: int
) -> None:
    masks = _sampler()(0, 3)
    index = getattr(masks, place).clone()
    bad = replace(masks, **{place: index})
    if place == "context":  # what is in slots that do not count does not matter
        empty = ~masks.filled()
        assert empty.any()
        index[empty] = wrong
        (pack,) = pack_masks(bad, 500)
        assert torch.equal(pack.context, pack_masks(masks, 500)[0].context)
    index.view(3, -1)[1, 0] = wrong
    with pytest.raises(ValueError, match=rf"masks.{place} must be in \[0, 36\), got {wrong}"):
        pack_masks(bad, 500)


# Attention


def _packed_sequences(lengths: list[int], slack: int, backend: str = "auto") -> Sequences:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(ends[-1]) + slack
    longest = max(lengths, default=0)
    return Sequences(torch.cat([ends, torch.tensor([tokens])]).int(), tokens, longest, backend)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [4, 4], [1]])
@pytest.mark.parametrize("slack", [3, 0])
def test_packed_attention_is_attention_by_sequence(
    lengths: list[int], slack: int, backend: str
) -> None:
    g = torch.Generator().manual_seed(0)
    sequences = _packed_sequences(lengths, slack, backend)
    device = "cuda" if torch.cuda.is_available() and backend != "auto" else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(sequences.tokens, 2, 8, generator=g).to(device, dtype).requires_grad_()
        for _ in range(3)
    )
    if unsupported(backend if backend != "auto" else "sdpa", q):
        with pytest.raises(BackendError, match=f"packed attention by '{backend}' cannot run"):
            attend_packed(q, k, v, sequences)
        return
    sequences = Sequences(
        sequences.offsets.to(device), sequences.tokens, sequences.longest, backend
    )
    out = attend_packed(q, k, v, sequences)
    used = sum(lengths)
    upstream = torch.randn(used, 2, 8, generator=g).to(device, dtype)
    got = torch.autograd.grad(out[:used], (q, k, v), upstream)
    expected = []
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        one = attend(*(x[part].transpose(0, 1)[None] for x in (q, k, v)))
        expected.append(one[0].transpose(0, 1))
        start += length
    want = torch.cat(expected)
    tolerance = {"rtol": 0.02, "atol": 0.02} if device == "cuda" else {}
    torch.testing.assert_close(out[:used], want, **tolerance)
    for mine, theirs in zip(got, torch.autograd.grad(want, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
        assert not mine[used:].any()  # slack has no gradient
    assert out.isfinite().all()


def test_slack_that_is_read_changes_no_gradient_of_others() -> None:
    sequences = _packed_sequences([3, 1], 2, "sdpa")
    q, k, v = torch.randn(3, 6, 2, 8).requires_grad_().unbind(0)
    out = attend_packed(q, k, v, sequences)
    alone = torch.autograd.grad(out[:4].sum(), (q, k, v), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v)), alone)


def test_slack_alone() -> None:
    q, k, v = torch.randn(3, 4, 2, 8).unbind(0)
    out = attend_packed(q, k, v, _packed_sequences([], 4, "sdpa"))
    assert out.shape == q.shape
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("lengths", "slack"), [([3, 0, 5, 1], 3), ([4, 4], 23), ([1], 1), ([0, 0], 2), ([], 4)]
)
def test_bounded_offsets_cut_the_slack_alone(lengths: list[int], slack: int) -> None:
    sequences = _packed_sequences(lengths, slack)
    offsets, most = sequences.bounded_offsets()
    assert (offsets.dtype, most) == (torch.int32, max([*lengths, 1]))
    found = offsets.diff().tolist()
    assert found[: len(lengths)] == lengths
    assert all(0 <= length <= most for length in found)
    assert (int(offsets[0]), int(offsets[-1])) == (0, sequences.tokens)
    # Their number is that of the shapes, not of the lengths.
    others = _packed_sequences([most, *[0] * (len(lengths) - 1)] if lengths else [], 0).offsets
    others[-1] = sequences.tokens
    again, _ = Sequences(others, sequences.tokens, most).bounded_offsets()
    assert again.shape == offsets.shape


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3, 9, 12], "longest: expected at least 6, the tokens of sequence 1, got 5"),
        ([0, 3, 2, 12], "offsets: expected .* ascending from 0 to tokens=12"),
        ([1, 3, 6, 12], "offsets: expected .* ascending from 0 to tokens=12"),
        ([0, 3, 6, 11], "offsets: expected .* ascending from 0 to tokens=12"),
    ],
)
def test_sequences_that_would_be_mixed_up(offsets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sequences(torch.tensor(offsets, dtype=torch.int32), 12, longest=5)
    Sequences(torch.tensor([0, 3, 8, 12], dtype=torch.int32), 12, longest=5)


@pytest.mark.parametrize("offsets", [torch.tensor([0, 3, 4]), [0, 3, 4]])
def test_offsets_are_an_int32_tensor(offsets: Any) -> None:
    with pytest.raises(TypeError, match=r"offsets: expected an int32 tensor .*use .int\(\)"):
        Sequences(offsets, 4, 3)


def test_sequences_known_from_inference_mode_train() -> None:
    sequences = _packed_sequences([3, 1], 2)
    x = torch.randn(6, 2, 8)
    with torch.inference_mode():
        attend_packed(x, x, x, sequences)
        sequences.bounded_offsets()
    attend_packed(x.requires_grad_(), x, x, sequences).sum().backward()
    assert x.grad is not None
    assert not sequences.bounded_offsets()[0].is_inference()


def test_bounded_offsets_wait_for_nothing_and_compile() -> None:
    sequences = _packed_sequences([3, 0, 5, 1], 3)
    values = sequences.offsets, sequences.tokens, sequences.longest

    def bounded(offsets: Tensor) -> Tensor:
        return Sequences(offsets, *values[1:]).bounded_offsets()[0]

    want = bounded(values[0])
    # A meta tensor has no values that a host could ask for.
    assert bounded(values[0].to("meta")).shape == want.shape
    compiled = torch.compile(bounded, fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(compiled(values[0]), want)


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, most: int) -> Tensor:
    """What the libraries' kernels do, which may look at no more than ``most`` tokens each."""
    parts = []
    assert offsets.dtype == torch.int32
    for begin, end in itertools.pairwise(offsets.tolist()):
        assert end - begin <= most
        heads = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        parts.append(attend(*heads)[0].transpose(0, 1))
    return torch.cat(parts)


def _fake_library(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a library of GPU kernels: its function, with its arguments, for a CPU."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, *most: int) -> Tensor:
        assert of_q is of_k
        assert most[0] == most[1]
        return _by_sequence(q, k, v, of_q, most[0])

    def memory_efficient(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
        assert q.shape[0] == 1
        info = attn_bias.q_seqinfo
        assert info is attn_bias.k_seqinfo
        return _by_sequence(q[0], k[0], v[0], info.seqstart, info.max_seqlen)[None]

    def put(name: str, **members: Any) -> None:
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    if backend == "varlen":
        put("torch.nn.attention.varlen", varlen_attn=varlen)
    elif backend == "flash_attn":
        put("flash_attn", flash_attn_varlen_func=varlen)
    else:
        put("xformers")
        put("xformers.ops", memory_efficient_attention=memory_efficient)
        put("xformers.ops.fmha")
        record = types.SimpleNamespace
        put("xformers.ops.fmha.attn_bias", BlockDiagonalMask=record, _SeqLenInfo=record)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [4, 4], [1]])
def test_what_libraries_are_given_is_attention_by_sequence(
    backend: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arguments; the kernels themselves run on a GPU alone, in the test above."""
    _fake_library(backend, monkeypatch)
    g = torch.Generator().manual_seed(0)
    sequences = _packed_sequences(lengths, 7)
    inputs = [torch.randn(sequences.tokens, 2, 8, generator=g).requires_grad_() for _ in range(3)]
    used = sum(lengths)
    upstream = torch.randn(used, 2, 8, generator=g)
    found = []
    for name in (backend, "sdpa"):
        out = packed._FUNCTIONS[name](*inputs, sequences)
        assert out.isfinite().all()
        found.append((out[:used], *torch.autograd.grad(out[:used], inputs, upstream)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [4, 4], [1]])
def test_xformers_takes_the_mask(lengths: list[int]) -> None:
    """The library's own classes: the mask is the one of host lengths, and its checks pass."""
    masks = pytest.importorskip("xformers.ops.fmha.attn_bias")
    fmha = pytest.importorskip("xformers.ops.fmha")
    sequences = _packed_sequences(lengths, 7)
    mask = packed._xformers_mask(sequences)
    offsets, most = sequences.bounded_offsets()
    want = masks.BlockDiagonalMask.from_seqlens(offsets.diff().tolist(), device=offsets.device)
    for mine, theirs in ((mask.q_seqinfo, want.q_seqinfo), (mask.k_seqinfo, want.k_seqinfo)):
        assert torch.equal(mine.seqstart, theirs.seqstart)
        assert mine.seqstart.dtype == theirs.seqstart.dtype
        assert mine.min_seqlen <= theirs.min_seqlen
        assert theirs.max_seqlen <= mine.max_seqlen == most
    q = torch.zeros(1, sequences.tokens, 2, 32, dtype=torch.float16)
    inputs = fmha.Inputs(q, q, q, mask)
    inputs.validate_inputs()
    for operator in (fmha.flash.FwOp, fmha.flash.BwOp):
        reasons = operator.not_supported_reasons(inputs)
        assert [reason for reason in reasons if not reason.startswith("device=cpu")] == []
    with pytest.raises(IndexError):  # instead of a mask of other sequences
        mask.materialize((sequences.tokens, sequences.tokens))


class _OnGpu:
    """What is read of a query to choose a backend."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, size: int = 64, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = (16, 2, size), dtype


def test_the_order_of_backends_and_why_not_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch.nn.attention.varlen", "flash_attn", "xformers"}
    monkeypatch.setattr(packed, "_is_there", lambda module: module in installed)
    order = []
    query: Any = _OnGpu()
    while True:
        order.append(choose_backend(query))
        if order[-1] == "sdpa":
            break
        installed.remove(packed._MODULES[order[-1]][0])
    assert order == ["varlen", "flash_attn", "xformers", "sdpa"]
    assert unsupported("xformers", query) == [
        'xformers is not there: pip install "jepa-fast[xformers]"'
    ]
    installed.add("xformers")
    assert unsupported("xformers", query) == []
    assert unsupported("xformers", torch.zeros(4, 1, 8)) == ["needs cuda tensors, got cpu"]
    installed |= {"torch.nn.attention.varlen", "flash_attn"}
    odd: Any = _OnGpu(size=12)
    assert choose_backend(odd) == "flash_attn"  # which pads; torch's varlen does not
    large: Any = _OnGpu(size=264)
    assert choose_backend(large) == "sdpa"
    assert unsupported("flash_attn", large) == ["takes heads up to 256, got 264"]
    installed -= {"torch.nn.attention.varlen", "flash_attn"}
    for bad, reason in (
        (_OnGpu(dtype=torch.float32), "takes bfloat16 and float16, got torch.float32"),
        (_OnGpu(size=12), "takes heads of a multiple of 8 up to 256, got 12"),
        (_OnGpu(size=264), "takes heads of a multiple of 8 up to 256, got 264"),
    ):
        other: Any = bad
        assert choose_backend(other) == "sdpa"
        assert unsupported("xformers", other) == [reason]
        with pytest.raises(BackendError, match=f"by 'xformers' cannot run: {reason}"):
            choose_backend(other, "xformers")


def test_an_unknown_backend() -> None:
    x = torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        attend_packed(x, x, x, _packed_sequences([2], 2, "fastest"))


# Models


def _model(method: str) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(1)
    words = torch.randn(5, 2, 3, 10), torch.rand(5, 2, 3) < 0.8
    if method.startswith("tcjepa"):
        options = {"conditioning": method.split()[1]} if " " in method else {}
        weights = {"sparsity_weight": 1.0, "consistency_weight": 1.0}
        return TCJepa(_encoder(), text_dim=10, **weights, **options, **SMALL), words
    if method == "tijepa":
        sizes = {"text_dim": 10, "width": 16, "depth": 1, "num_heads": 4, "predictor_heads": 2}
        sizes |= {"predictor_dim": 16, "predictor_depth": 1}
        return TIJepa(_encoder(), **sizes), words
    if method == "probijepa":
        return ProbIJepa(_encoder(), "mixture", **SMALL), ()
    return IJepa(_encoder(), **SMALL), ()


def _outcome(model: nn.Module, masks: Any, text: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    packs = masks if isinstance(masks, list) else [masks]
    total = torch.zeros(())
    for pack in packs:
        share = pack.share if isinstance(pack, PackedMasks) else 1.0
        loss = share * model(_images(), pack, *text).loss
        loss.backward()
        total += loss.detach()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "method", ["ijepa", "probijepa", "tcjepa", "tcjepa mean_words", "tcjepa append", "tijepa"]
)
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("more", [0, 7])
def test_packed_equals_padded(method: str, step: int, more: int) -> None:
    """Also where blocks leave slots over, more of them than any step of the sampler has."""
    model, text = _model(method)
    masks = _sampler()(step, 5)
    tokens, block, longest = packing_budget(_sampler(), 5)
    budget = (tokens, block + more, longest)
    loss, grads = _outcome(model, pack_masks(masks, *budget), text)
    want_loss, want_grads = _outcome(model, masks, text)
    torch.testing.assert_close(loss, want_loss)
    assert len(grads) == len(want_grads)
    for got, want in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method", ["ijepa", "probijepa", "tcjepa", "tcjepa mean_words", "tcjepa append", "tijepa"]
)
def test_split_packs_sum_to_the_whole(method: str) -> None:
    model, text = _model(method)
    if text:  # captions of different numbers, and an image without
        text = (*text, torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1], [1, 0]]) > 0)
    masks = _sampler()(1, 5)
    packs = pack_masks(masks, 1 + 2 * masks.context.shape[1])
    assert len(packs) > 1
    loss, grads = _outcome(model, packs, text)
    want_loss, want_grads = _outcome(model, masks, text)
    torch.testing.assert_close(loss, want_loss)
    for got, want in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["ijepa", "probijepa", "tcjepa", "tijepa"])
@pytest.mark.parametrize("none_of", ["images", "blocks", "patches"])
def test_nothing_to_predict_packed_or_padded(method: str, none_of: str) -> None:
    model, text = _model(method)
    masks, images = _sampler()(0, 5), _images()
    if none_of == "images":
        masks, images, text = _sampler()(0, 0), images[:0], tuple(x[:0] for x in text)
    elif none_of == "blocks":
        masks = replace(masks, targets=masks.targets[:, :0])
    else:
        masks = replace(masks, targets=masks.targets[:, :, :0])
    budgets: list[tuple[int, ...]] = [(500,)]
    if none_of != "patches":
        budgets.append((500, 20, 36))
    if none_of == "blocks":
        budgets.append((37, 20, 36))
    want = model(images, masks, *text).loss
    for budget in budgets:
        packs = pack_masks(masks, *budget)
        assert sum(pack.share for pack in packs) == pytest.approx(1)
        for pack in packs:
            loss = model(images, pack, *text).loss
            loss.backward()
            torch.testing.assert_close(loss, want)
    if none_of == "patches":
        with pytest.raises(ValueError, match=r"block: expected 0, since .* got 20"):
            pack_masks(masks, 500, 20)


@pytest.mark.parametrize("method", ["ijepa", "probijepa", "tcjepa", "tijepa"])
def test_metrics_are_those_of_padded_masks(method: str) -> None:
    model, text = _model(method)
    masks = _sampler()(2, 5)
    (pack,) = pack_masks(masks, 500, masks.targets.shape[2] + 3, 36)
    got, want = (model(_images(), each, *text).metrics for each in (pack, masks))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("method", ["ijepa", "probijepa", "tcjepa", "tijepa"])
def test_metrics_of_a_pack_are_of_its_images(method: str) -> None:
    model, text = _model(method)
    masks = _sampler()(2, 5)
    packs = pack_masks(masks, 1 + 2 * masks.context.shape[1], 20)
    assert len(packs) > 1
    for pack in packs:
        assert pack.target_mask is not None
        mine = pack.target_mask.any(2).any(1)
        some = BlockMasks(masks.context[mine], masks.targets[mine], masks.filled()[mine], GRID)
        got = model(_images(), pack, *text).metrics
        want = model(_images()[mine], some, *(each[mine] for each in text)).metrics
        # Shuffled texts are the batch's; of one image there are none.
        want = {n: x for n, x in want.items() if n not in ("energy_shuffled", "energy_spread")}
        got = {name: got[name] for name in want}
        torch.testing.assert_close(got, want)


def test_distributions_of_packs_are_of_the_targets_that_count() -> None:
    model: Any = _model("probijepa")[0]
    masks = _sampler()(2, 5)
    want = model.predict_distribution(_images(), masks).log_prob(model.targets(_images(), masks))
    want = want.unflatten(0, (4, 5, -1))
    packs = pack_masks(masks, 1 + 2 * masks.context.shape[1], 20)
    assert len(packs) > 1
    for pack in packs:
        assert pack.target_mask is not None
        mine = pack.target_mask.any(2).any(1)
        distribution = model.predict_distribution(_images(), pack)
        got = distribution.log_prob(model.targets(_images(), pack))
        torch.testing.assert_close(got, want[:, mine].flatten())


def test_compiled_metrics_do_not_count_the_slots_that_unions_leave() -> None:
    model, text = _model("tijepa")
    (pack,) = pack_masks(_sampler()(2, 5), 500, 20, 36)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    got, want = compiled(_images(), pack, *text), model(_images(), pack, *text)
    assert got.prediction.shape[1] > want.prediction.shape[1]
    torch.testing.assert_close(got.metrics, want.metrics)


def test_predictions_and_targets_are_those_of_padded_masks() -> None:
    model, _ = _model("ijepa")
    masks = _sampler()(2, 5)
    (pack,) = pack_masks(masks, *packing_budget(_sampler(), 5))
    padded, packed = model(_images(), masks), model(_images(), pack)
    patches = masks.targets.shape[2]
    torch.testing.assert_close(packed.prediction[:, :patches], padded.prediction)
    torch.testing.assert_close(packed.target[:, :patches], padded.target)


@pytest.mark.parametrize("method", ["ijepa", "probijepa", "tcjepa", "tijepa"])
def test_one_graph_over_100_steps(method: str) -> None:
    """Contexts of all lengths, blocks of all sizes, some steps in several packs: one shape."""
    torch._dynamo.reset()
    model, text = _model(method)
    sampler = _sampler()
    tokens, block, longest = packing_budget(sampler, 5, steps=100)
    tokens = max(longest + 1, tokens * 2 // 3)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    sizes, split = set(), set()
    for step in range(100):
        masks = sampler(step, 5)
        packs = pack_masks(masks, tokens, block, longest)
        sizes.add(masks.targets.shape[2])
        split.add(len(packs) > 1)
        for pack in packs:
            loss = compiled(_images(), pack, *text).loss
            if step == 0:
                loss.backward()
                torch.testing.assert_close(loss, model(_images(), pack, *text).loss)
    assert len(sizes) > 1
    assert split == {False, True}
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_packs_have_one_graph(name: str) -> None:
    """Also without fullgraph, whatever number of tokens counts."""
    torch._dynamo.reset()
    options = {} if name == "mixture" else {"hidden_dim": 16}
    torch.manual_seed(1)
    model = ProbIJepa(_encoder(), name, head_options=options, **SMALL)
    sampler = _sampler()
    tokens, block, longest = packing_budget(sampler, 5, steps=100)
    tokens = max(longest + 1, tokens * 2 // 3)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, dynamic=False, backend=counter)
    counted = set()
    for step in range(8):
        for pack in pack_masks(sampler(step, 5), tokens, block, longest):
            if step == 0:
                model(_images(), pack)  # sets the flow's ActNorms
            assert pack.target_mask is not None
            counted.add(int(pack.target_mask.sum()))
            compiled(_images(), pack).loss.backward()
    assert len(counted) > 2
    assert counter.frame_count == 1


class _MeanOfErrors(nn.Module):
    """A head of one's own, which takes no mask, or does."""

    def __init__(self, condition_dim: int, target_dim: int, takes_token_mask: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(condition_dim, target_dim)
        self.takes_token_mask = takes_token_mask
        self.asked: list[tuple[torch.Size, bool]] = []

    def forward(self, condition: Tensor, target: Tensor, *token_mask: Tensor) -> Tensor:
        self.asked.append((condition.shape, bool(token_mask)))
        errors = (self.linear(condition) - target).square().mean(1)
        if not token_mask:
            return errors.mean()
        return errors.where(token_mask[0], 0).sum() / token_mask[0].sum()

    def distribution(self, condition: Tensor) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("takes_token_mask", [False, True])
def test_a_head_of_ones_own_takes_a_mask_if_it_says_so(takes_token_mask: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    options = {"takes_token_mask": takes_token_mask}
    model = ProbIJepa(_encoder(), _MeanOfErrors, head_options=options, **SMALL)
    masks = _sampler()(2, 5)
    (pack,) = pack_masks(masks, 500, masks.targets.shape[2] + 1)
    want = model(_images(), pack).loss
    got = torch.compile(model, backend="eager")(_images(), pack).loss
    torch.testing.assert_close(got, want)
    (of_eager, with_mask), (of_compiled, masked) = model.head.asked
    assert of_eager[0] == masks.targets.numel()
    assert not with_mask
    assert masked == takes_token_mask
    assert of_compiled[0] == of_eager[0] + takes_token_mask * 5 * masks.targets.shape[1]


@pytest.mark.parametrize("method", ["tcjepa", "tcjepa append"])
def test_contexts_are_encoded_once(method: str) -> None:
    model, text = _model(method)
    calls: list[Any] = []
    model.encoder.register_forward_hook(lambda *call: calls.append(call))
    (pack,) = pack_masks(_sampler()(0, 5), 500)
    model(_images(), pack, *text)
    assert len(calls) == 1


def test_what_cannot_take_packed_masks_says_so() -> None:
    class PlainEncoder(nn.Module):
        embed_dim, grid, num_heads = 32, GRID, 4

        def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
            tokens = images.flatten(2).mT[:, :PATCHES, :1].expand(-1, -1, 32)
            return tokens

    masks: BlockMasks = _sampler()(0, 5)
    (pack,) = pack_masks(masks, 500)
    with pytest.raises(TypeError, match="takes no sequences"):
        IJepa(PlainEncoder(), **SMALL)(_images(), pack)
    model, text = _model("tcjepa")
    with pytest.raises(TypeError, match="expected padded masks for a map"):
        model.similarity_map(_images(), pack, *text)
    with pytest.raises(ValueError, match="masks: expected masks of a"):
        IJepa(VisionTransformer(20, 4, embed_dim=32, depth=1, num_heads=4), **SMALL)(
            torch.zeros(5, 3, 20, 20), pack
        )


@pytest.mark.parametrize("method", ["ijepa", "probijepa", "tcjepa", "tcjepa append", "tijepa"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_parts_that_fsdp_shards(method: str, packed: bool, one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    masks: Any = _sampler()(0, 5)
    if packed:
        (masks,) = pack_masks(masks, 500, 20, 36)
    model, text = _model(method)
    want, want_grads = _outcome(model, masks, text)
    sharded, _ = _model(method)
    for name in ("encoder", "predictor"):  # they gather their parameters when they are called
        fully_shard(sharded.get_submodule(name))
    fully_shard(sharded)
    got, grads = _outcome(sharded, masks, text)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(grads, want_grads, strict=True):
        whole: Any = mine
        torch.testing.assert_close(whole.full_tensor(), theirs)
