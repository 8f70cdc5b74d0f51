"""TC-JEPA against the paper written out, and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from vit_oracle import block_oracle, layer_norm, linear, predictor_oracle, vit_oracle

from jepa_fast import IJepa, TCJepa
from jepa_fast.data import TextBatch
from jepa_fast.masks import BlockMasks
from jepa_fast.nn import per_caption
from jepa_fast.nn.text_conditioner import CONDITIONERS
from jepa_fast.nn.vit import VisionTransformer

CONTEXT = torch.tensor([[0, 2, 4, 0, 0], [3, 4, 5, 11, 15], [1, 2, 3, 5, 0]])
CONTEXT_MASK = torch.arange(5) < torch.tensor([[3], [5], [4]])
TARGETS = torch.tensor(
    [[[6, 7], [10, 11], [6, 10]], [[0, 1], [8, 9], [13, 14]], [[8, 9], [9, 13], [12, 13]]]
)
MASKS = BlockMasks(CONTEXT, TARGETS, CONTEXT_MASK, (4, 4))
CAPTION_MASK = torch.tensor([[True, True], [True, False], [False, False]])
WORD_MASK = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[1, 1, 0], [1, 1, 1]], [[1, 1, 1]] * 2]) > 0
TEXT_DIM = 10


def build(trained: bool = True, **options: Any) -> TCJepa:
    """A small model; ``trained``: every parameter random, so that no two networks are equal."""
    torch.manual_seed(0)
    encoder = VisionTransformer(16, 4, embed_dim=32, depth=1, num_heads=2)
    small = {"text_dim": TEXT_DIM, "predictor_dim": 24, "predictor_depth": 2}
    model = TCJepa(encoder, **{**small, **options})
    if trained:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randn(3, 3, 16, 16, generator=generator),
        "words": torch.randn(3, 2, 3, TEXT_DIM, generator=generator),
        "word_mask": WORD_MASK,
        "caption_mask": CAPTION_MASK,
    }


def paper(model: TCJepa) -> dict[str, Tensor]:
    """The default model's losses, one sequence, caption and token at a time."""
    given = batch()
    encoder, teacher = dict(model.encoder.state_dict()), dict(model.target_encoder.state_dict())
    p, c = dict(model.predictor.state_dict()), dict(model.conditioner.state_dict())
    depth, width = len(model.predictor.predictor_blocks), model.predictor.predictor_dim
    weights = c["keys_values.weight"].split(width)
    norms, sparse, inconsistent = [], [], []
    for b in range(3):
        keep = CONTEXT[b][CONTEXT_MASK[b]].tolist()
        context = vit_oracle(given["images"][b], encoder, 2, keep)
        whole = vit_oracle(given["images"][b], teacher, 2, list(range(16)))
        centred = whole - whole.mean(-1, keepdim=True)
        whole = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        captions = [given["words"][b, n][WORD_MASK[b, n]] for n in range(2) if CAPTION_MASK[b, n]]
        for targets in TARGETS[b].tolist():
            positions = p["predictor_pos_embed"][0]
            x = torch.cat(
                [
                    linear(context, p, "predictor_embed") + positions[keep],
                    p["mask_token"][0] + positions[targets],
                ]
            )
            similarities = [[] for _ in captions]
            for layer in range(depth):
                x = block_oracle(x, p, f"predictor_blocks.{layer}", 2)
                name = f"layers.{layer}"
                q, y = x @ c[f"{name}.query.weight"].T, []
                for n, caption in enumerate(captions):
                    k, v = caption @ weights[2 * layer].T, caption @ weights[2 * layer + 1].T
                    y.append(x + (q @ k.T / width**0.5).softmax(-1) @ v)
                    cosine = torch.cosine_similarity(q[:, None], k[None], dim=-1)
                    similarities[n].append(cosine.clamp_min(0))
                x = torch.stack(y).amax(0) if y else x
                hidden = nn.functional.gelu(linear(x, c, f"{name}.mlp.fc1"))
                x = layer_norm(linear(hidden, c, f"{name}.mlp.fc2"), c, f"{name}.norm")
            prediction = linear(layer_norm(x, p, "predictor_norm"), p, "predictor_proj")
            norms.append((prediction[len(keep) :] - whole[targets]).norm(dim=-1))
            for of_layers in map(torch.stack, similarities):  # [L, T, S]
                sparse.append(of_layers.sum(-1).mean(0))
                inconsistent.append((of_layers - of_layers.mean(0)).abs().sum(-1).mean(0))
    return {
        "prediction_loss": torch.cat(norms).mean(),
        "sparsity": torch.cat(sparse).mean(),
        "consistency": torch.cat(inconsistent).mean(),
    }


def test_losses_equal_the_paper() -> None:
    model = build()
    out = model(masks=MASKS, **batch())
    expected = paper(model)
    for name, value in expected.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=1e-5, atol=1e-6)
    total = expected["prediction_loss"] + 0.1 * expected["sparsity"] + 0.5 * expected["consistency"]
    torch.testing.assert_close(out.loss, total, rtol=1e-5, atol=1e-6)
    assert out.loss.dtype == torch.float32
    assert out.prediction.shape == out.target.shape == (9, 2, 32)
    torch.testing.assert_close(
        (out.prediction - out.target).norm(dim=-1).mean(), expected["prediction_loss"]
    )


def test_weights_and_losses_are_options() -> None:
    model = build(sparsity_weight=0.0, consistency_weight=0.0, loss="smooth_l1")
    out = model(masks=MASKS, **batch())
    torch.testing.assert_close(out.loss, out.metrics["prediction_loss"])
    difference = (out.prediction - out.target).abs()
    expected = torch.where(difference < 1, difference**2 / 2, difference - 0.5).mean()
    torch.testing.assert_close(out.loss, expected)
    # Without a weight the consistency is still reported.
    assert out.metrics["consistency"] > 0
    model.sparsity_weight, model.consistency_weight = 3.0, 7.0
    out = model(masks=MASKS, **batch())
    m = out.metrics
    torch.testing.assert_close(
        out.loss, m["prediction_loss"] + 3 * m["sparsity"] + 7 * m["consistency"]
    )


def test_targets_without_layer_norm() -> None:
    model = build(normalize_target=False)
    teacher = model.encode(batch()["images"])
    out = model(masks=MASKS, **batch())
    torch.testing.assert_close(out.target[0], teacher[0, TARGETS[0, 0]])
    expected = (out.prediction - out.target).norm(dim=-1).mean()
    torch.testing.assert_close(out.metrics["prediction_loss"], expected)


EVERY_OPTION: list[dict[str, Any]] = [
    {},
    {"pool": "mean", "text_heads": 2, "text_scale": 1.0},
    {"pool": "attention", "similarity": "softplus", "tau": 0.5},
    {"per_caption": True, "text_mlp_residual": True},
    {"per_caption": True, "pool": "attention", "text_mlp_ratio": 1.0},
    {"text_layers": [1]},
    {"conditioning": "mean_words"},
    {"conditioning": "adaln"},
    {"conditioning": "feature"},
    {"conditioning": "append"},
]
each_option = pytest.mark.parametrize("options", EVERY_OPTION, ids=str)


@pytest.fixture(autouse=True)
def captions_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few tokens there are."""
    monkeypatch.setattr(per_caption, "AT_ONCE", 0)


@each_option
def test_gradients_reach_all_trained_parameters(options: dict[str, Any]) -> None:
    model = build(trained=False, **options)
    model(masks=MASKS, **batch()).loss.backward()
    trained = dict(model.trainable_parameters())
    assert {name.split(".")[0] for name in trained} == {"encoder", "predictor", "conditioner"}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in trained.values())
    assert all(p.grad is None for p in model.target_encoder.parameters())


@each_option
def test_one_image_at_a_time_is_the_same(options: dict[str, Any]) -> None:
    """Neither padding nor the other images of the batch change a prediction."""
    model, given = build(**options), batch()
    together = model(masks=MASKS, **given).prediction.unflatten(0, (3, 3))
    for b in range(3):
        keep = CONTEXT[b : b + 1, : CONTEXT_MASK[b].sum()]
        masks = BlockMasks(keep, TARGETS[b : b + 1], None, (4, 4))
        one = {name: x[b : b + 1] for name, x in given.items()}
        alone = model(masks=masks, **one).prediction
        torch.testing.assert_close(together[:, b], alone, rtol=1e-4, atol=1e-5)


@each_option
def test_the_text_is_used(options: dict[str, Any]) -> None:
    model, given = build(**options), batch()
    before = model(masks=MASKS, **given).prediction.unflatten(0, (3, 3))
    given["words"] = given["words"] + torch.randn(given["words"].shape)
    after = model(masks=MASKS, **given).prediction.unflatten(0, (3, 3))
    changed = (before != after).flatten(2).any(2)
    assert changed.tolist() == [[True, True, False]] * 3  # image 2 has no captions


@each_option
def test_autocast(options: dict[str, Any]) -> None:
    model, given = build(**options), batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(masks=MASKS, **given)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(value.isfinite() for value in out.metrics.values())
    exact = model(masks=MASKS, **given)
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.05, atol=0.0)


@each_option
def test_state_dict_round_trip(options: dict[str, Any]) -> None:
    model, other = build(**options), build(trained=False, **options)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(masks=MASKS, **batch()).loss, other(masks=MASKS, **batch()).loss)


def test_without_captions_in_the_batch() -> None:
    given = batch()
    given["caption_mask"] = torch.zeros(3, 2, dtype=torch.bool)
    out = build()(masks=MASKS, **given)
    out.loss.backward()
    assert torch.equal(out.loss, out.metrics["prediction_loss"])
    assert out.metrics["sparsity"] == out.metrics["consistency"] == 0


def test_appended_words_are_read_by_the_predictors_attention() -> None:
    """With the embedded words in hand the predictor's blocks run over a longer sequence."""
    model, given = build(conditioning="append"), batch()
    together = model(masks=MASKS, **given).prediction.unflatten(0, (3, 3))
    p = dict(model.predictor.state_dict())
    for b in range(3):
        keep = CONTEXT[b][CONTEXT_MASK[b]].tolist()
        context = vit_oracle(given["images"][b], dict(model.encoder.state_dict()), 2, keep)
        there = WORD_MASK[b] & CAPTION_MASK[b][:, None]
        words = linear(given["words"][b][there], dict(model.conditioner.state_dict()), "embed")
        for m, targets in enumerate(TARGETS[b].tolist()):
            positions = p["predictor_pos_embed"][0]
            context_tokens = linear(context, p, "predictor_embed") + positions[keep]
            x = torch.cat([context_tokens, p["mask_token"][0] + positions[targets], words])
            for layer in range(2):
                x = block_oracle(x, p, f"predictor_blocks.{layer}", 2)
            x = layer_norm(x, p, "predictor_norm")[len(keep) : len(keep) + len(targets)]
            torch.testing.assert_close(
                together[m, b], linear(x, p, "predictor_proj"), rtol=1e-4, atol=1e-5
            )
    # The last image has no captions: its predictions are I-JEPA's.
    expected = predictor_oracle(context, p, 2, keep, TARGETS[2, 0].tolist())
    torch.testing.assert_close(together[0, 2], expected, rtol=1e-4, atol=1e-5)


def test_metrics_are_detached_scalars_made_without_a_host_sync() -> None:
    out = build()(masks=MASKS, **batch())
    assert {
        "prediction_loss",
        "sparsity",
        "consistency",
        "positive_cosine_share",
        "attention_entropy",
        "prediction_rank",
        "prediction_std_min",
        "target_rank",
    } <= set(out.metrics)
    for value in out.metrics.values():
        assert value.shape == ()
        assert not value.requires_grad
        assert value.isfinite()
    # A tensor without values cannot be read, so that any read on the way would raise.
    with torch.device("meta"):
        model = build(trained=False)
        given = {name: torch.empty_like(x, device="meta") for name, x in batch().items()}
        masks = MASKS.to("meta")
    out = model(masks=masks, **given)
    out.loss.backward()
    assert all(value.device.type == "meta" for value in (out.loss, *out.metrics.values()))


def test_similarity_map_of_whole_images() -> None:
    model, given = build(), batch()
    got = model.similarity_map(given["images"], None, given["words"], WORD_MASK, CAPTION_MASK)
    assert got.shape == (3, 2, 16, 3)
    there = (WORD_MASK & CAPTION_MASK[..., None])[:, :, None].expand_as(got)
    assert not got[~there].any()
    # By hand for image 0: one sequence of all its patches, without any target.
    p, c = dict(model.predictor.state_dict()), dict(model.conditioner.state_dict())
    tokens = vit_oracle(given["images"][0], dict(model.encoder.state_dict()), 2, list(range(16)))
    x = linear(tokens, p, "predictor_embed") + p["predictor_pos_embed"][0]
    weights, total = c["keys_values.weight"].split(24), 0
    for layer in range(2):
        x = block_oracle(x, p, f"predictor_blocks.{layer}", 2)
        q = x @ c[f"layers.{layer}.query.weight"].T
        y = []
        for n in range(2):
            words = given["words"][0, n][WORD_MASK[0, n]]
            k, v = words @ weights[2 * layer].T, words @ weights[2 * layer + 1].T
            y.append(x + (q @ k.T / 24**0.5).softmax(-1) @ v)
            if n == 0:
                cosine = torch.cosine_similarity(q[:, None], k[None], dim=-1)
                total = total + cosine.clamp_min(0) / 2
        x = torch.stack(y).amax(0)
        hidden = nn.functional.gelu(linear(x, c, f"layers.{layer}.mlp.fc1"))
        x = layer_norm(linear(hidden, c, f"layers.{layer}.mlp.fc2"), c, f"layers.{layer}.norm")
    torch.testing.assert_close(got[0, 0], total, rtol=1e-4, atol=1e-5)


def test_similarity_maps_are_in_float32_under_autocast() -> None:
    model, given = build(), batch()
    arguments = (given["images"], None, given["words"], WORD_MASK, CAPTION_MASK)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.similarity_map(*arguments)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, model.similarity_map(*arguments), rtol=0.05, atol=0.02)


def test_similarity_map_of_masked_images_averages_over_sequences() -> None:
    model, given = build(), batch()
    text = (given["words"], WORD_MASK, CAPTION_MASK)
    got = model.similarity_map(given["images"], MASKS, *text)
    for b in range(3):
        one = [x[b : b + 1] for x in text]
        keep = CONTEXT[b : b + 1, : CONTEXT_MASK[b].sum()]
        blocks = [
            model.similarity_map(
                given["images"][b : b + 1], BlockMasks(keep, block[None, None], None, (4, 4)), *one
            )[0]
            for block in TARGETS[b]
        ]
        for patch in range(16):
            of = [m for m in range(3) if patch in keep[0] or patch in TARGETS[b, m]]
            expected = torch.stack([blocks[m][:, patch] for m in of]).mean(0) if of else 0.0
            torch.testing.assert_close(
                got[b, :, patch], torch.zeros(2, 3) + expected, rtol=1e-4, atol=1e-5
            )


def test_similarity_map_needs_words() -> None:
    given = batch()
    for conditioning in set(CONDITIONERS) - {"words"}:
        with pytest.raises(ValueError, match="conditioning='words'"):
            build(conditioning=conditioning).similarity_map(
                given["images"], None, given["words"], WORD_MASK
            )


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"conditioning: expected one of .*got 'clip'"):
        build(conditioning="clip")
    with pytest.raises(ValueError, match=r"text_heads: expected .* of predictor_dim 24, got 5"):
        build(text_heads=5)
    with pytest.raises(ValueError, match=r"text_layers: expected different blocks from 0 to 1"):
        build(text_layers=[2])
    for options in (
        {"text_scale": 0.0},
        {"text_mlp_ratio": 0},
        {"text_dim": 0},
        {"tau": -1},
        {"sparsity_weight": -1},
        {"consistency_weight": float("nan")},
    ):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"^{name}: expected .* got {value}"):
            build(**options)
    for options in (
        {"text_heads": "2"},
        {"text_scale": "1"},
        {"text_layers": 1},
        {"per_caption": "no"},
        {"text_mlp_residual": None},
        {"consistency_weight": "a"},
    ):
        ((name, _),) = options.items()
        with pytest.raises(TypeError, match=f"^{name}: expected .* got"):
            build(**options)
    model, given = build(), batch()
    for images in (None, [*given["images"]]):
        for method in (model, model.similarity_map):
            with pytest.raises(
                TypeError, match=r"images: expected a tensor .* got (NoneType|list)"
            ):
                method(masks=MASKS, **{**given, "images": images})
    given["images"] = given["images"][:2]
    for method in (model, model.similarity_map):
        with pytest.raises(ValueError, match="masks: expected 2 images, as given, got 3"):
            method(masks=MASKS, **given)
    given = batch()
    given["word_mask"] = WORD_MASK[:, :1]
    text = TextBatch(given["words"], given["word_mask"], given["caption_mask"])
    with pytest.raises(TypeError, match=r"got TextBatch; pass its \.words, \.word_mask and \.capt"):
        model(given["images"], MASKS, text)
    with pytest.raises(ValueError, match=r"word_mask: expected \[3, 2, 3\], got \[3, 1, 3\]"):
        model(masks=MASKS, **given)
    model.encoder.interpolate_positions = model.target_encoder.interpolate_positions = True
    with pytest.raises(ValueError, match="images: expected 16 patches"):
        model(masks=MASKS, **{**batch(), "images": torch.zeros(3, 3, 32, 32)})
    for name in ("sparsity_weight", "consistency_weight"):
        for value, error in ((-1.0, ValueError), (float("nan"), ValueError), ("a", TypeError)):
            model = build()
            setattr(model, name, value)
            with pytest.raises(error, match=f"^{name}: expected a number of 0 or more.*got "):
                model(masks=MASKS, **batch())
    given = {**batch(), "words": torch.zeros(3, 2, 3, 7)}
    model = build()
    with pytest.raises(ValueError, match=r"words: expected \[3, C, S, 10\].*got \[3, 2, 3, 7\]"):
        model(masks=MASKS, **given)


def test_defaults_follow_the_paper() -> None:
    with torch.device("meta"):
        for name, depth in (("vit_base_patch16", 6), ("vit_large_patch16", 12)):
            model = TCJepa(name)
            assert len(model.conditioner.layers) == len(model.predictor.predictor_blocks) == depth
            assert model.conditioner.layers[0].query.weight.shape == (384, 384)
            assert model.conditioner.keys_values.weight.shape == (depth * 2 * 384, 1024)
    assert model.loss == "l2_norm"
    assert model.normalize_target
    assert (model.sparsity_weight, model.consistency_weight) == (0.1, 0.5)
    assert isinstance(model, IJepa)


@pytest.mark.parametrize("options", [{}, {"per_caption": True}], ids=str)
@pytest.mark.parametrize("at_once", [0, 2**30])
def test_compiles_without_a_break(
    options: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_caption, "AT_ONCE", at_once)
    model, given = build(predictor_depth=1, **options), batch()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **text: model(masks=MASKS, **text).loss, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(**given), model(masks=MASKS, **given).loss)


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_while_the_weights_of_regularisers_change(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    model, given = build(predictor_depth=1), batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for weight in (0.5, 0.25, 0.0, 0.125):
        model.consistency_weight = weight
        compiled_loss = compiled(masks=MASKS, **given).loss
        torch.testing.assert_close(compiled_loss, model(masks=MASKS, **given).loss)


@pytest.mark.parametrize("options", [{}, {"per_caption": True}], ids=str)
@pytest.mark.parametrize("at_once", [0, 2**30])
def test_compiles_once_for_all_numbers_of_captions_and_words(
    options: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions that tie, too, whose gradients go to the lowest."""
    monkeypatch.setattr(per_caption, "AT_ONCE", at_once)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, given = build(predictor_depth=1, **options), batch()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    parameters = [p for _, p in model.trainable_parameters()]
    for captions, words in ((2, 3), (3, 4), (4, 5), (5, 7), (8, 9)):
        given["words"] = torch.randn(3, captions, words, 10)
        given["words"][:, 1] = given["words"][:, 0]
        given["word_mask"] = torch.rand(3, captions, words) < 0.7
        given["word_mask"][:, 1] = given["word_mask"][:, 0]
        given["caption_mask"] = torch.rand(3, captions) < 0.8
        losses = [made(masks=MASKS, **given).loss for made in (compiled, model)]
        got, want = (torch.autograd.grad(loss, parameters) for loss in losses)
        for one, other in zip([losses[0], *got], [losses[1], *want], strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count <= 2
