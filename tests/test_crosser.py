"""TI-JEPA's crosser against its equations, and the paper's sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tijepa_oracle import crosser_oracle

from jepa_fast.nn.crosser import CROSSER_SIZES, Crosser

BLOCKS = ("self_cross", "cross")


def crosser(block: str, text_dim: int = 16, seed: int = 0) -> Crosser:
    """A small one in float64, every parameter moved away from its initial value."""
    torch.manual_seed(seed)
    made = Crosser(12, text_dim, 16, 2, 4, block).double()
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("block", BLOCKS)
def test_the_crosser_is_its_equations(block: str) -> None:
    model = crosser(block, 16 if block == "cross" else 10)
    tokens, words = torch.randn(3, 5, 12).double(), torch.randn(3, 4, 16).double()
    words = words[..., : 16 if block == "cross" else 10]
    lengths = [4, 2, 0]
    word_mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    out = model(tokens, words, word_mask)
    assert out.shape == (3, 5, 16)
    for b, length in enumerate(lengths):
        expected = crosser_oracle(tokens[b], words[b, :length], model.state_dict(), 4)
        torch.testing.assert_close(out[b], expected)


@pytest.mark.parametrize("block", BLOCKS)
def test_padding_tokens_change_nothing(block: str) -> None:
    model = crosser(block)
    tokens, words = torch.randn(2, 6, 12).double(), torch.randn(2, 3, 16).double()
    mask = torch.arange(6) < torch.tensor([6, 4])[:, None]
    out = model(tokens, words, token_mask=mask)
    torch.testing.assert_close(out[1, :4], model(tokens[1:, :4], words[1:])[0])
    assert out.isfinite().all()


@pytest.mark.parametrize("block", BLOCKS)
def test_without_words_there_is_no_cross_attention(block: str) -> None:
    model = crosser(block)
    tokens = torch.randn(2, 5, 12).double()
    expected = crosser_oracle(tokens[0], torch.zeros(0, 16).double(), model.state_dict(), 4)
    none = model(tokens, None)
    torch.testing.assert_close(none[0], expected)
    assert torch.equal(none, model(tokens, torch.zeros(2, 0, 16).double()))


@pytest.mark.parametrize("block", BLOCKS)
def test_padding_words_get_no_gradient_and_spoil_none(block: str) -> None:
    model = crosser(block)
    words = torch.randn(2, 3, 16).double().requires_grad_()
    word_mask = torch.tensor([[True, True, False], [False, False, False]])
    tokens = torch.randn(2, 5, 12).double()
    model(tokens, words, word_mask)[..., ::2].square().sum().backward()
    assert words.grad is not None
    assert torch.equal(words.grad.abs().sum(-1) > 0, word_mask)
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_every_trainable_parameter_gets_a_gradient() -> None:
    for block in BLOCKS:
        model = crosser(block)
        model(torch.randn(2, 5, 12).double(), torch.randn(2, 3, 16).double())[
            ..., 0
        ].sum().backward()
        without = {name for name, p in model.named_parameters() if p.grad is None}
        assert without == {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("block", "size", "text_dim", "count"),
    [
        ("self_cross", "small", 768, 38_792_448),
        ("self_cross", "medium", 768, 57_696_000),
        ("self_cross", "large", 768, 131_492_864),
        ("cross", "small", 768, 29_336_832),
        ("cross", "large", 1024, 102_083_584),
    ],
)
def test_parameter_counts(block: str, size: str, text_dim: int, count: int) -> None:
    width, depth = CROSSER_SIZES[size]
    with torch.device("meta"):
        model = Crosser(1280, text_dim, width, depth, block=block)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_rescaled_initialisation_shrinks_the_output_projections() -> None:
    torch.manual_seed(0)
    model = Crosser(12, 64, 64, 4, 4, init="rescaled")
    for i, block in enumerate(model.blocks, start=1):
        for projection in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
            assert abs(projection.weight.std() * (2 * i) ** 0.5 - 0.02) < 0.002
        assert abs(block.cross_attn.key.weight.std() - 0.02) < 0.002


def test_compiles_whole_and_runs_under_autocast() -> None:
    model = crosser("self_cross").float()
    args = (torch.randn(2, 5, 12), torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool))
    expected = model(*args)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(*args)
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"block": "both"}, r"block: expected one of \('self_cross', 'cross'\), got 'both'"),
        ({"block": "cross"}, r"text_dim: expected the crosser's width 16 .*, got 10"),
        ({"num_heads": 3}, "num_heads: expected a positive divisor of the width 16, got 3"),
        ({"init": "other"}, "init: expected one of"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Crosser(12, 10, **{"width": 16, "depth": 1, "num_heads": 4, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"tokens": None}, TypeError, r"tokens: expected \[B, T, 12\], got NoneType"),
        ({"tokens": torch.ones(5, 12)}, ValueError, r"tokens: expected .*, got \[5, 12\]"),
        ({"tokens": torch.ones(2, 5, 11)}, ValueError, r"tokens: .* got \[2, 5, 11\]"),
        ({"tokens": torch.ones(2, 5, 12).int()}, TypeError, r"tokens: .* got torch\.int32"),
        ({"words": [1, 2]}, TypeError, r"words: expected \[B, S, 16\] of 2 texts.*, got list"),
        ({"words": torch.ones(2, 3, 10)}, ValueError, r"words: .* got \[2, 3, 10\]"),
        ({"words": torch.ones(1, 3, 16)}, ValueError, r"words: .* got \[1, 3, 16\]"),
        ({"words": torch.ones(2, 3, 16).long()}, TypeError, r"words: .* got torch\.int64"),
    ],
)
def test_bad_inputs(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {"tokens": torch.ones(2, 5, 12), "words": torch.ones(2, 3, 16), **arguments}
    with pytest.raises(error, match=text):
        crosser("self_cross").float()(**given)
