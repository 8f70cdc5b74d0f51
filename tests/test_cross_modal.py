"""TI-JEPA's cross-modal objective against its energy written out."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from tijepa_oracle import attend, mlp
from torch import Tensor, nn
from vit_oracle import block_oracle, layer_norm, linear

from jepa_fast import TIJepa
from jepa_fast.models.vicreg import VICREG_WEIGHTS
from jepa_fast.nn.cross_modal import pairwise_energy
from jepa_fast.nn.position import sincos_position_embedding

WORD_MASK = torch.tensor([[True, False, False], [True, True, True], [True, True, False]])


def build(trained: bool = True, **options) -> TIJepa:
    torch.manual_seed(0)
    model = TIJepa(
        None,
        objective="cross_modal",
        **{
            "image_dim": 10,
            "grid": (2, 3),
            "text_dim": 12,
            "width": 16,
            "depth": 1,
            "num_heads": 4,
            "predictor_dim": 12,
            "predictor_depth": 2,
            "predictor_heads": 2,
            **options,
        },
    )
    if trained:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 6, 10), torch.randn(3, 3, 12)


def encode_oracle(tokens: Tensor, model: nn.Module, name: str) -> Tensor:
    state = dict(model[name].state_dict())
    x = block_oracle(linear(tokens, state, "proj"), state, "blocks.0", 4)
    return layer_norm(x, state, "norm")


def predict_oracle(source: Tensor, model: TIJepa, way: str, positions: Tensor) -> Tensor:
    """Queries read the source tokens and nothing else."""
    state = dict(model.cross_modal.predictor[way].state_dict())
    source = linear(source, state, "predictor_embed")
    x = state["mask_token"][0] + positions
    for i in range(2):
        block = f"predictor_blocks.{i}"
        q, _, _ = linear(layer_norm(x, state, f"{block}.norm1"), state, f"{block}.attn.qkv").chunk(
            3, -1
        )
        read = linear(layer_norm(source, state, f"{block}.norm1"), state, f"{block}.attn.qkv")
        _, k, v = read.chunk(3, -1)
        x = x + linear(attend(q, k, v, 2), state, f"{block}.attn.proj")
        x = x + mlp(layer_norm(x, state, f"{block}.norm2"), state, f"{block}.mlp")
        source = block_oracle(source, state, block, 2)
    return linear(layer_norm(x, state, "predictor_norm"), state, "predictor_proj")


def energy_oracle(model: TIJepa, image: Tensor, text: Tensor, representation: str) -> Tensor:
    """Energies of one pair without padding: text to image, image to text."""
    energies = []
    for source, goal, way in (
        (("text", text), ("image", image), "text_to_image"),
        (("image", image), ("text", text), "image_to_text"),
    ):
        context = encode_oracle(source[1], model.cross_modal.context_encoder, source[0])
        target = encode_oracle(goal[1], model.cross_modal.target_encoder, goal[0])
        if representation == "pooled":
            context, target = context.mean(0, keepdim=True), target.mean(0, keepdim=True)
            positions = torch.zeros(1, 12)
        else:
            grid = (2, 3) if goal[0] == "image" else (1, len(text))
            positions = sincos_position_embedding(12, grid)
        centred = target - target.mean(-1, keepdim=True)
        target = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        residual = predict_oracle(context, model, way, positions) - target
        energies.append(residual.square().sum(-1))
    return energies


@pytest.mark.parametrize("representation", ["pooled", "token"])
def test_energy_and_loss_equal_the_oracle(representation: str) -> None:
    model = build(representation=representation)
    images, words = batch()
    pairs = [
        [energy_oracle(model, images[i], words[t][WORD_MASK[t]], representation) for t in range(3)]
        for i in range(3)
    ]
    expected = torch.stack(
        [torch.stack([(a.mean() + b.mean()) / 2 for a, b in row]) for row in pairs]
    )
    energy = model.energy(None, words, WORD_MASK, image_features=images)
    torch.testing.assert_close(energy, expected, rtol=1e-4, atol=1e-4)
    few = model.energy(None, words[:2], WORD_MASK[:2], image_features=images)
    torch.testing.assert_close(few, expected[:, :2], rtol=1e-4, atol=1e-4)

    out = model(None, None, words, WORD_MASK, image_features=images)
    ways = [torch.cat([pairs[b][b][way] for b in range(3)]).mean() / 16 for way in range(2)]
    torch.testing.assert_close(out.loss, sum(ways) / 2, rtol=1e-4, atol=1e-5)
    matched = expected.diagonal().mean()
    shuffled = (expected.sum() - expected.diagonal().sum()) / 6
    torch.testing.assert_close(out.metrics["energy_matched"], matched, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.metrics["energy_shuffled"], shuffled, rtol=1e-4, atol=1e-4)
    tokens = 1 if representation == "pooled" else 6
    assert out.prediction.shape == out.target.shape == (3, tokens, 16)


@pytest.mark.parametrize("representation", ["pooled", "token"])
def test_pairs_without_words_do_not_count(representation: str) -> None:
    model = build(representation=representation, vicreg=VICREG_WEIGHTS)
    images, words = batch()
    word_mask = WORD_MASK.clone()
    word_mask[1] = False
    out = model(None, None, words, word_mask, image_features=images)
    kept = [0, 2]
    expected = model(None, None, words[kept], word_mask[kept], image_features=images[kept])
    torch.testing.assert_close(out.loss, expected.loss)
    for name in ("energy_matched", "prediction_loss", "variance", "covariance"):
        torch.testing.assert_close(out.metrics[name], expected.metrics[name])
    assert all(value.isfinite() for value in out.metrics.values())
    out.loss.backward()
    assert all(p.grad.isfinite().all() for _, p in model.trainable_parameters())
    energy = model.energy(None, words, word_mask, image_features=images)
    assert energy[:, 1].isposinf().all()
    assert energy[:, kept].isfinite().all()


def test_gradients_and_ema() -> None:
    model = build(trained=False)
    images, words = batch()
    state = model.cross_modal
    for mine, theirs in zip(
        state.target_encoder.parameters(), state.context_encoder.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
        theirs.data += torch.randn_like(theirs)
    model(None, None, words, image_features=images).loss.backward()
    trained = dict(model.trainable_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert not any("target" in name for name in trained)
    before = copy.deepcopy(state.target_encoder)
    model.update_target(0.5)
    for mine, old, new in zip(
        state.target_encoder.parameters(),
        before.parameters(),
        state.context_encoder.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(mine, (old + new) / 2)
    assert not model.train().cross_modal.target_encoder.training
    assert model.encode(None, image_features=images).shape == (3, 6, 16)


def test_it_learns_to_tell_pairs_apart() -> None:
    model = build(trained=False, width=32, predictor_dim=32, predictor_heads=4)
    optimizer = torch.optim.AdamW((p for _, p in model.trainable_parameters()), lr=3e-3)
    kinds, texts = torch.randn(4, 1, 10), torch.randn(4, 1, 12)
    for _ in range(50):
        label = torch.randint(4, (16,))
        features = kinds[label] + 0.3 * torch.randn(16, 6, 10)
        out = model(None, None, texts[label], image_features=features)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update_target(0.99)
    energy = model.energy(None, texts, image_features=kinds.expand(-1, 6, -1))
    assert (energy.argmin(0) == torch.arange(4)).all()
    assert (energy.argmin(1) == torch.arange(4)).all()
    assert out.metrics["energy_spread"] > 0


def test_runs_under_autocast_with_energies_in_full_precision() -> None:
    model = build(representation="token", vicreg=VICREG_WEIGHTS)
    images, words = batch()
    expected = model(None, None, words, WORD_MASK, image_features=images)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(None, None, words, WORD_MASK, image_features=images)
        out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, rtol=0.05, atol=0)
    assert out.target.dtype == torch.float32
    prediction, target = torch.randn(2, 5, 64) + 30, torch.randn(3, 5, 64) + 30
    exact = (prediction[:, None].double() - target.double()).square().sum(-1).mean(-1)
    with torch.autocast("cpu", torch.bfloat16):
        energy = pairwise_energy(prediction, target, None)
    torch.testing.assert_close(energy, exact.float(), rtol=1e-6, atol=0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"representation: expected one of \('pooled', 'token'\)"):
        build(representation="mean")
    long = torch.randn(3, 513, 12)
    with pytest.raises(ValueError, match="words: expected at most 512 a text, got 513"):
        build(representation="token")(None, None, long, image_features=batch()[0])


@pytest.mark.parametrize("representation", ["pooled", "token"])
@pytest.mark.parametrize("assign", [False, True])
def test_built_on_the_meta_device_and_loaded(
    representation: str, assign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions, which are in no state dict, are there again, whatever the memory held."""
    image, text = batch()
    model = build(representation=representation)
    with torch.device("meta"):
        other = build(representation=representation)
    if not assign:
        monkeypatch.setattr(torch, "empty_like", partial(torch.full_like, fill_value=-1))
        other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=assign)
    losses = [each(None, None, text, image_features=image).loss for each in (model, other)]
    assert torch.equal(*losses)
