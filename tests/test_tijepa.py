"""TI-JEPA with its masked-image objective, against the paper written out."""

from __future__ import annotations

import copy

import pytest
import torch
from tijepa_oracle import crosser_oracle
from torch import Tensor, nn
from vit_oracle import predictor_oracle, vit_oracle

from jepa_fast import TIJepa
from jepa_fast.data.text import HashedWords
from jepa_fast.masks import BlockMasks, BlockMaskSampler
from jepa_fast.models.vicreg import VICREG_WEIGHTS
from jepa_fast.nn.vit import VisionTransformer
from jepa_fast.nn.words import dequantize_words, quantize_words

CONTEXT = torch.tensor([[0, 2, 4, 0, 0], [3, 4, 5, 11, 15]])
CONTEXT_MASK = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
TARGETS = torch.tensor([[[7, 6], [10, 11], [6, 10]], [[0, 1], [8, 9], [13, 14]]])
UNIONS = ([6, 7, 10, 11], [0, 1, 8, 9, 13, 14])  # image 0's blocks overlap
MASKS = BlockMasks(CONTEXT, TARGETS, CONTEXT_MASK, (4, 4))
WORD_MASK = torch.tensor([[True, True, False], [True, True, True]])


def build(trained: bool = True, **options) -> TIJepa:
    """A small model; ``trained``: every parameter random, so that no two networks are equal."""
    torch.manual_seed(0)
    encoder = VisionTransformer(16, 4, embed_dim=32, depth=1, num_heads=2)
    small = {
        "text_dim": 12,
        "width": 16,
        "depth": 2,
        "num_heads": 4,
        "predictor_dim": 24,
        "predictor_depth": 1,
        "predictor_heads": 2,
    }
    model = TIJepa(encoder, **{**small, **options})
    if trained:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def batch(text_dim: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, 16, 16), torch.randn(2, 3, text_dim)


def oracle_residuals(
    model: TIJepa, images: Tensor, words: Tensor, *, alone: bool = False, normalize: bool = True
) -> list[Tensor]:
    """Prediction minus target ``[U, width]`` of every image, on its own and without any padding."""
    encoder, predictor, trained, ema = (
        dict(part.state_dict())
        for part in (model.encoder, model.predictor, model.context_crosser, model.target_crosser)
    )
    residuals = []
    for b, union in enumerate(UNIONS):
        keep, text = CONTEXT[b][CONTEXT_MASK[b]].tolist(), words[b][WORD_MASK[b]]
        whole = vit_oracle(images[b], encoder, 2, list(range(16)))
        seen = vit_oracle(images[b], encoder, 2, keep) if alone else whole[keep]
        context = crosser_oracle(seen, text, trained, 4)
        target = crosser_oracle(whole, text, ema, 4)
        if normalize:
            centred = target - target.mean(-1, keepdim=True)
            target = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        residuals.append(predictor_oracle(context, predictor, 2, keep, union) - target[union])
    return residuals


@pytest.mark.parametrize("block", ["self_cross", "cross"])
@pytest.mark.parametrize("kind", [None, "smooth_l1", "l2"])
def test_loss_equals_the_oracle(block: str, kind: str | None) -> None:
    text_dim = 16 if block == "cross" else 12
    model = build(block=block, loss=kind, text_dim=text_dim)
    images, words = batch(text_dim)
    out = model(images, MASKS, words, WORD_MASK)
    size = torch.cat(oracle_residuals(model, images, words)).abs()
    expected = {
        None: size,
        "smooth_l1": torch.where(size < 1, size**2 / 2, size - 0.5),
        "l2": size**2,
    }[kind].mean()
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.metrics["prediction_loss"], expected, rtol=1e-5, atol=1e-6)


def test_options_of_context_and_target() -> None:
    images, words = batch()
    for options in ({"alone": True}, {"normalize": False}):
        model = build(
            encode_masked_image="alone" in options, normalize_target="normalize" not in options
        )
        expected = torch.cat(oracle_residuals(model, images, words, **options)).abs().mean()
        loss = model(images, MASKS, words, WORD_MASK).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_prediction_and_target_are_of_the_union_of_blocks() -> None:
    model, (images, words) = build(), batch()
    out = model(images, MASKS, words, WORD_MASK)
    assert out.prediction.shape == out.target.shape == (2, 6, 16)
    assert not out.prediction.requires_grad
    assert not out.target.requires_grad
    residuals = out.prediction - out.target
    for b, expected in enumerate(oracle_residuals(model, images, words)):
        torch.testing.assert_close(residuals[b, : len(expected)], expected, rtol=1e-4, atol=1e-5)
    # The first image has four targets: the other two slots hold the first of them again.
    torch.testing.assert_close(out.prediction[0, 4:], out.prediction[0, :2])
    assert torch.equal(out.target[0, 4:], out.target[0, :2])


def test_the_collators_lists_are_accepted() -> None:
    model, (images, words) = build(), batch()
    contexts = torch.tensor([[0, 2, 4], [3, 4, 5]])
    lists = ([contexts], list(TARGETS.unbind(1)))
    expected = model(images, BlockMasks(contexts, TARGETS, None, (4, 4)), words)
    assert torch.equal(model(images, lists, words).loss, expected.loss)


def test_image_features_stand_for_images() -> None:
    model, (images, words) = build(), batch()
    features = model.encoder(images)
    expected = model(images, MASKS, words, WORD_MASK)
    without = TIJepa(
        None,
        image_dim=32,
        grid=(4, 4),
        text_dim=12,
        width=16,
        depth=2,
        num_heads=4,
        predictor_dim=24,
        predictor_depth=1,
        predictor_heads=2,
    )
    without.load_state_dict(model.state_dict())
    for cached in (model, without):
        out = cached(None, MASKS, words, WORD_MASK, image_features=features)
        assert torch.equal(out.loss, expected.loss)
    half = model(None, MASKS, words, WORD_MASK, image_features=features.bfloat16())
    torch.testing.assert_close(half.loss, expected.loss, rtol=0.02, atol=0)
    torch.testing.assert_close(
        without.encode(None, words, WORD_MASK, image_features=features),
        model.encode(images, words, WORD_MASK),
    )


def test_captions_of_an_image_are_one_text() -> None:
    model, (images, words) = build(), batch()
    out = model(images, MASKS, words, WORD_MASK)
    captions = torch.randn(2, 2, 3, 12)
    captions[0, 1], captions[1, 0] = words[0], words[1]
    word_mask = torch.ones(2, 2, 3, dtype=torch.bool)
    word_mask[0, 1] = WORD_MASK[0]
    caption_mask = torch.tensor([[False, True], [True, False]])
    same = model(images, MASKS, captions, word_mask, caption_mask)
    torch.testing.assert_close(same.loss, out.loss)


@pytest.mark.parametrize("objective", ["masked_image", "cross_modal"])
def test_what_is_masked_enters_nothing(objective: str) -> None:
    model, (images, words) = build(objective=objective), batch()
    masked = ~WORD_MASK[..., None]
    found = []
    for padding in (0.0, torch.nan, torch.inf):
        loss = model(images, MASKS, words.masked_fill(masked, padding), WORD_MASK).loss
        trained = [p for _, p in model.trainable_parameters()]
        found.append([loss, *torch.autograd.grad(loss, trained)])
    for want, *others in zip(*found, strict=True):
        for got in others:
            assert torch.equal(got, want)


def test_words_in_float8_come_with_a_scale() -> None:
    model, (images, words) = build(), batch()
    words = 1e-3 * words  # far from what float8 holds without a scale
    fp8, scale = quantize_words(words)
    exact = dequantize_words(fp8, scale)
    given = {"word_mask": WORD_MASK, "word_scale": scale}
    out = model(images, MASKS, fp8, **given)
    assert torch.equal(out.loss, model(images, MASKS, exact, WORD_MASK).loss)
    for method in (model.energy, model.encode):
        assert torch.equal(method(images, fp8, **given), method(images, exact, WORD_MASK))
    captions = model(images, MASKS, fp8[:, None], WORD_MASK[:, None], word_scale=scale[:, None])
    assert torch.equal(captions.loss, out.loss)
    with pytest.raises(TypeError, match=r"words: expected a word_scale with .*quantize_words"):
        model(images, MASKS, fp8, WORD_MASK)
    with pytest.raises(TypeError, match=r"words: expected torch.float8_e4m3fn with a scale"):
        model(images, MASKS, words, **given)
    with pytest.raises(ValueError, match=r"word_scale: expected one a word, \[2, 3\]"):
        model(images, MASKS, fp8, word_scale=scale[0])


def test_a_text_encoder_takes_captions() -> None:
    encoder = HashedWords(12, 5)
    model, (images, _) = build(text_encoder=encoder), batch()
    captions = [["a dog"], ["two cats", "on grass"]]
    text = encoder(captions)
    expected = model(images, MASKS, text.words, text.word_mask, text.caption_mask)
    assert torch.equal(model(images, MASKS, captions).loss, expected.loss)
    single = model(images, MASKS, ["a dog", "two cats"])
    assert torch.equal(single.loss, model(images, MASKS, [["a dog"], ["two cats"]]).loss)
    for name in ("word_mask", "caption_mask", "word_scale"):
        with pytest.raises(ValueError, match=f"{name}: expected None with captions"):
            model(images, MASKS, captions, **{name: text.word_mask})


def test_gradients_reach_crosser_and_predictor_only() -> None:
    for block, text_dim in (("self_cross", 12), ("cross", 16)):
        model = build(block=block, text_dim=text_dim)
        images, words = batch(text_dim)
        model(images, MASKS, words, WORD_MASK).loss.backward()
        trained = dict(model.trainable_parameters())
        assert {name.split(".")[0] for name in trained} == {"context_crosser", "predictor"}
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
        others = [p for name, p in model.named_parameters() if name not in trained]
        assert all(p.grad is None for p in others)


def test_the_target_starts_equal_and_follows_as_an_ema() -> None:
    model = build(trained=False)
    images, words = batch()
    features = model.encoder(images)
    torch.testing.assert_close(
        model.encode(images, words), model.context_crosser(features, words).detach()
    )
    for parameter in model.context_crosser.parameters():
        parameter.data += torch.randn_like(parameter)
    before = copy.deepcopy(model.target_crosser)
    model.update_target(0.75)
    for mine, old, new in zip(
        model.target_crosser.parameters(),
        before.parameters(),
        model.context_crosser.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(mine, 0.75 * old + 0.25 * new)


def test_what_is_frozen_stays_in_evaluation_mode() -> None:
    model = build(text_encoder=nn.Dropout()).train()
    assert model.context_crosser.training
    assert model.predictor.training
    for frozen in (model.encoder, model.text_encoder, model.target_crosser):
        assert not any(module.training for module in frozen.modules())


def test_the_state_dict_leaves_the_frozen_encoders_out_unless_wanted() -> None:
    model, (images, words) = build(), batch()
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {
        "context_crosser",
        "target_crosser",
        "predictor",
    }
    other = build(trained=False)
    frozen = copy.deepcopy(other.encoder.state_dict())
    assert other.load_state_dict(state).missing_keys == []
    assert all(torch.equal(v, frozen[k]) for k, v in other.encoder.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*predictor\.mask_token"):
        other.load_state_dict({k: v for k, v in state.items() if "mask_token" not in k})
    # Inside another module as well, and where the encoder is saved it is loaded.
    nested = nn.Sequential(build(trained=False))
    nested.load_state_dict(nn.Sequential(model).state_dict())
    whole = build(save_frozen=True)
    assert any(name.startswith("encoder.") for name in whole.state_dict())
    other.load_state_dict(whole.state_dict())
    expected = whole(images, MASKS, words).loss
    assert torch.equal(other(images, MASKS, words).loss, expected)
    assert torch.equal(copy.deepcopy(other)(images, MASKS, words).loss, expected)


def test_vicreg_terms_are_added() -> None:
    model, (images, words) = build(vicreg=VICREG_WEIGHTS), batch()
    out = model(images, MASKS, words, WORD_MASK)
    rows = torch.cat([out.prediction[0, :4], out.prediction[1]])
    covariance = torch.cov(rows.T)
    variance = torch.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()
    apart = (covariance - covariance.diagonal().diag()).square().sum() / 16
    residual = torch.cat(oracle_residuals(model, images, words))
    torch.testing.assert_close(out.metrics["variance"], variance)
    torch.testing.assert_close(out.metrics["covariance"], apart)
    expected = 25 * residual.abs().mean() + 25 * variance + apart
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert all(p.grad is not None for _, p in model.trainable_parameters())


def test_metrics_are_detached_scalars_and_tell_matched_from_shuffled() -> None:
    model, (images, words) = build(), batch()
    out = model(images, MASKS, words, WORD_MASK)
    for value in out.metrics.values():
        assert value.shape == ()
        assert value.isfinite()
        assert not value.requires_grad
    assert {"prediction_rank", "target_std_min"} <= set(out.metrics)
    energies = model.energy(images, words, WORD_MASK, masks=MASKS)
    matched, shuffled = energies.diagonal().mean(), energies.flip(1).diagonal().mean()
    torch.testing.assert_close(out.metrics["energy_matched"], matched)
    torch.testing.assert_close(out.metrics["energy_shuffled"], shuffled)
    torch.testing.assert_close(out.metrics["energy_spread"], shuffled - matched)
    assert "energy_spread" not in build(energy_pairs=0)(images, MASKS, words).metrics


def test_energy_is_a_matrix_of_images_and_texts() -> None:
    model, (images, words) = build(), batch()
    energies = model.energy(images, words, WORD_MASK, masks=MASKS)
    assert energies.shape == (2, 2)
    assert energies.dtype == torch.float32
    assert not energies.requires_grad
    for b, residual in enumerate(oracle_residuals(model, images, words)):
        torch.testing.assert_close(
            energies[b, b], residual.square().sum(-1).mean(), rtol=1e-4, atol=1e-5
        )


def test_energy_without_masks_depends_on_the_pair_alone() -> None:
    torch.manual_seed(0)
    features, words = torch.randn(3, 64, 8), torch.randn(4, 2, 12)
    small = {"num_heads": 2, "predictor_dim": 12, "predictor_depth": 1, "predictor_heads": 1}
    model = TIJepa(None, image_dim=8, grid=(8, 8), text_dim=12, width=8, depth=1, **small)
    energies = model.energy(None, words, image_features=features)
    assert energies.shape == (3, 4)
    alone = model.energy(images=None, texts=words[2:3], image_features=features[1:2])
    torch.testing.assert_close(energies[1:2, 2:3], alone)
    assert model.energy(None, words[:0], image_features=features).shape == (3, 0)


def test_it_learns() -> None:
    torch.manual_seed(0)
    small = {"num_heads": 4, "predictor_dim": 32, "predictor_depth": 1, "predictor_heads": 4}
    model = TIJepa(None, image_dim=16, grid=(8, 8), text_dim=8, width=32, depth=1, **small)
    optimizer = torch.optim.AdamW((p for _, p in model.trainable_parameters()), lr=3e-3)
    sampler = BlockMaskSampler((8, 8))
    kinds, texts = torch.randn(4, 1, 16), torch.randn(4, 1, 8)
    losses = []
    for step in range(40):
        label = torch.randint(4, (8,))
        features = kinds[label] + 0.3 * torch.randn(8, 64, 16)
        out = model(None, sampler(step, 8), texts[label], image_features=features)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update_target(0.99)
        losses.append(out.loss.item())
    assert losses[-1] < 0.85 * losses[0]
    assert out.metrics["target_rank"] > 2


def test_encode_with_and_without_a_text() -> None:
    model, (images, words) = build(), batch()
    tokens = model.encode(images, words, WORD_MASK)
    assert tokens.shape == (2, 16, 16)
    assert not tokens.requires_grad
    none = model.encode(images)
    assert not torch.allclose(tokens, none)
    torch.testing.assert_close(none, model.encode(images, words, torch.zeros_like(WORD_MASK)))


def test_runs_under_autocast() -> None:
    model, (images, words) = build(vicreg=VICREG_WEIGHTS), batch()
    expected = model(images, MASKS, words, WORD_MASK)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, MASKS, words, WORD_MASK)
        out.loss.backward()
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected.loss, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("size", "count", "width"), [("small", 38_792_448, 768), ("large", 131_492_864, 1024)]
)
def test_the_papers_sizes_take_a_step_without_storage(size: str, count: int, width: int) -> None:
    with torch.device("meta"):
        model = TIJepa(None, image_dim=1280, grid=(16, 16), size=size)
        features, words = torch.randn(2, 256, 1280), torch.randn(2, 20, 768)
    for crosser in (model.context_crosser, model.target_crosser):
        assert sum(p.numel() for p in crosser.parameters()) == count
    assert model.embed_dim == width
    assert model.predictor.predictor_dim == 384
    assert len(model.predictor.predictor_blocks) == 12
    masks = BlockMaskSampler((16, 16))(0, 2)
    out = model(None, masks, words, image_features=features)
    assert out.prediction.shape == (2, masks.target_union()[0].shape[1], width)
    out.loss.backward()
    model.update_target(0.996)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"objective": "both"}, r"objective: expected one of \('masked_image', 'cross_modal'\)"),
        ({"size": "tiny"}, r"size: expected one of \('small', 'medium', 'large'\), got 'tiny'"),
        ({"loss": "mse"}, r"loss: expected one of \('smooth_l1', .* got 'mse'"),
        ({"vicreg": (1.0,)}, "vicreg: expected 3 weights .* got 1"),
        ({"predictor_heads": 5}, "predictor_heads: expected .* of predictor_dim 24, got 5"),
        (
            {"predictor_heads": 5, "objective": "cross_modal"},
            "predictor_heads: expected .* of predictor_dim 24, got 5",
        ),
        ({"block": "cross"}, "text_dim: expected the crosser's width 16"),
        ({"block": "none"}, r"block: expected one of \('self_cross', 'cross'\), got 'none'"),
        ({"representation": "mean"}, r"representation: expected one of \('pooled', 'token'\)"),
        ({"vicreg": (1.0, float("nan"), 1.0)}, r"vicreg\[1\]: expected a number of 0 or more"),
        ({"vicreg": (1.0, 1.0, -1.0)}, r"vicreg\[2\]: expected a number of 0 or more"),
        ({"text_dim": 0}, "text_dim: expected at least 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"vicreg": 25.0}, r"vicreg: expected 3 weights .* got 25\.0"),
        ({"energy_pairs": 1.5}, r"energy_pairs: expected an int, got float 1\.5"),
        ({"text_encoder": 3}, "text_encoder: expected a callable, got int"),
        ({"normalize_target": "no"}, "normalize_target: expected True or False, got 'no'"),
        ({"encode_masked_image": None}, "encode_masked_image: expected True or False, got None"),
        ({"text_dim": None}, "text_dim: expected an integer, got None"),
        ({"width": 1.5}, r"width: expected an integer, got 1\.5"),
        ({"depth": "2"}, "depth: expected an integer, got '2'"),
        ({"predictor_depth": None}, "predictor_depth: expected an int, got NoneType"),
        ({"predictor_dim": 24.0}, r"predictor_dim: expected an int, got float 24\.0"),
    ],
)
def test_options_of_another_type(options: dict[str, object], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        build(**options)


def test_encode_wants_a_text_an_image() -> None:
    model, (images, words) = build(), batch()
    with pytest.raises(ValueError, match="words: expected 2 texts, as images, got 1"):
        model.encode(images, words[:1])
    with pytest.raises(ValueError, match="words: expected those of the masks or scales given"):
        model.encode(images, None, WORD_MASK)


@pytest.mark.parametrize("objective", ["masked_image", "cross_modal"])
def test_one_number_is_both_sides_of_the_grid(objective: str) -> None:
    sizes = {"width": 8, "depth": 1, "num_heads": 2, "predictor_dim": 16, "predictor_depth": 1}
    model = TIJepa(
        None, image_dim=8, grid=3, text_dim=12, predictor_heads=2, objective=objective, **sizes
    )
    assert model.grid == (3, 3)
    assert model.encode(None, image_features=torch.randn(2, 9, 8)).shape == (2, 9, 8)


@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (3, 3)])
def test_energy_without_masks_on_small_grids(grid: tuple[int, int]) -> None:
    sizes = {"width": 8, "depth": 1, "num_heads": 2, "predictor_dim": 12, "predictor_depth": 1}
    model = TIJepa(None, image_dim=8, grid=grid, text_dim=12, predictor_heads=2, **sizes)
    features = torch.randn(3, grid[0] * grid[1], 8)
    energy = model.energy(None, torch.randn(2, 4, 12), image_features=features)
    assert energy.shape == (3, 2)
    assert energy.isfinite().all()


class ImagesOnly(nn.Module):
    embed_dim, grid = 8, (4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(2).transpose(1, 2)


def test_a_frozen_encoder_may_take_whole_images_only() -> None:
    sizes = {"text_dim": 12, "width": 16, "depth": 1, "num_heads": 4, "predictor_dim": 24}
    sizes |= {"predictor_depth": 1, "predictor_heads": 2}
    images, words = batch()
    assert TIJepa(ImagesOnly(), **sizes)(images, MASKS, words).loss.isfinite()
    with pytest.raises(TypeError, match="ImagesOnly, which takes images only"):
        TIJepa(ImagesOnly(), encode_masked_image=True, **sizes)


def test_without_an_encoder_its_sizes_are_needed() -> None:
    with pytest.raises(ValueError, match="encoder: expected a name or a module, got None"):
        TIJepa(None, image_dim=32)


def test_bad_inputs() -> None:
    model, (images, words) = build(), batch()
    with pytest.raises(TypeError, match=r"words: expected a caption or .*, got NoneType; an image"):
        build(text_encoder=HashedWords(12, 5))(images, MASKS, None)
    text = HashedWords(12, 5)([["a dog"]] * 2)
    with pytest.raises(TypeError, match=r"words: expected .* got TextBatch; pass its \.words"):
        model(images, MASKS, text)
    for given, kind in ((text.words, "Tensor"), ((text.words, text.word_mask), "tuple")):
        wrong = build(text_encoder=lambda captions, given=given: given)
        with pytest.raises(TypeError, match=rf"text_encoder: expected a TextBatch .*, got {kind}"):
            wrong(images, MASKS, ["a dog", "a cat"])
    with pytest.raises(TypeError, match="build the model with text_encoder="):
        model(images, MASKS, ["a dog", "a cat"])
    for match, arguments, options in (
        ("images: expected images and an encoder", (None, MASKS, words), {}),
        ("masks: expected masks for objective", (images, None, words), {}),
        (r"words: expected \[B, S, 12\]", (images, MASKS, words[..., :5]), {}),
        ("words: expected 2 texts", (images, MASKS, words[:1]), {}),
        ("masks: expected 1 images, as given, got 2", (images[:1], MASKS, words[:1]), {}),
        (
            r"word_mask: expected \[2, 3\], got \[2, 2\]",
            (images, MASKS, words, WORD_MASK[:, :2]),
            {},
        ),
        ("caption_mask: expected", (images, MASKS, words, None, WORD_MASK), {}),
        (
            r"image_features: expected \[B, 16, 32\]",
            (None, MASKS, words),
            {"image_features": torch.zeros(2, 9, 32)},
        ),
    ):
        with pytest.raises(ValueError, match=match):
            model(*arguments, **options)
    tokens = torch.zeros(2, 16, 32)
    for match, arguments, options in (
        ("words: expected floating vectors, got torch.int64", (images, MASKS, words.long()), {}),
        (
            "image_features: expected floating tokens, got torch.int32",
            (None, MASKS, words),
            {"image_features": tokens.int()},
        ),
        (
            "image_features: expected a tensor, got list",
            (None, MASKS, words),
            {"image_features": [*tokens]},
        ),
        ("word_mask: expected bool, got .*float", (images, MASKS, words, WORD_MASK.float()), {}),
        ("word_mask: expected a bool tensor, got list", (images, MASKS, words, [[True]]), {}),
    ):
        with pytest.raises(TypeError, match=match):
            model(*arguments, **options)
    strict = build(encode_masked_image=True)
    with pytest.raises(ValueError, match="encode_masked_image=True"):
        strict(None, MASKS, words, image_features=torch.zeros(2, 16, 32))
