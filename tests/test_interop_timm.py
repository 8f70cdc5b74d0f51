from __future__ import annotations

import pytest
import torch
from torch import nn

from jepa_fast.errors import CheckpointError
from jepa_fast.interop.timm import TimmEncoder, from_timm
from jepa_fast.nn.vit import Encoder

timm_vit = pytest.importorskip("timm.models.vision_transformer")
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
KEEP = torch.tensor([[1, 4, 9, 0, 0], [2, 3, 5, 7, 11]])
MASK = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])


def build(**options) -> nn.Module:
    return timm_vit.VisionTransformer(**{**SIZES, "num_classes": 5, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 2, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"block_fn": timm_vit.ParallelScalingBlock},
        {"block_fn": timm_vit.ParallelThingsBlock},
    ],
    ids=["class", "registers", "no class", "parallel", "parallel things"],
)
def test_whole_images_give_timms_tokens(options) -> None:
    model = build(**options)
    images = torch.randn(2, 3, 16, 16)
    expected = model.fc_norm(model.forward_features(images))[:, model.num_prefix_tokens :]
    encoder = TimmEncoder(model)
    assert isinstance(encoder, Encoder)
    assert (encoder.grid, encoder.embed_dim, encoder.num_heads) == ((4, 4), 32, 2)
    torch.testing.assert_close(encoder(images), expected)


def test_a_subset_depends_on_the_kept_patches_alone() -> None:
    encoder = TimmEncoder(build(reg_tokens=1))
    images = torch.randn(2, 3, 16, 16)
    tokens = encoder(images, KEEP[1:].expand(2, -1))
    assert tokens.shape == (2, 5, 32)
    changed = images.clone()
    changed[:, :, 12:, :4] += 1  # patch 12, not kept
    assert torch.equal(encoder(changed, KEEP[1:].expand(2, -1)), tokens)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(encoder(images, everything), encoder(images))


def test_padding_changes_nothing() -> None:
    encoder = TimmEncoder(build())
    images = torch.randn(2, 3, 16, 16)
    padded = encoder(images, KEEP, MASK)
    for b, count in enumerate((3, 5)):
        alone = encoder(images[b : b + 1], KEEP[b : b + 1, :count])
        torch.testing.assert_close(padded[b : b + 1, :count], alone)
    assert padded.isfinite().all()


def test_every_trained_parameter_gets_a_gradient() -> None:
    encoder = TimmEncoder(build(class_token=False, global_pool="avg"))
    encoder(torch.randn(1, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("model", [nn.Linear(2, 2), build(patch_drop_rate=0.5)])
def test_other_models_are_refused(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="model: expected a timm VisionTransformer"):
        TimmEncoder(model)


@pytest.mark.parametrize("global_pool", ["avg", ""])
def test_weights_move_into_our_encoder(global_pool: str) -> None:
    model = build(class_token=False, global_pool=global_pool)
    ours = from_timm(model)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), TimmEncoder(model)(images), rtol=0, atol=1e-5)
    with torch.no_grad():
        model.pos_embed.zero_()
    assert ours.pos_embed.abs().max() > 0  # copied, not shared


def test_other_architectures_do_not_move() -> None:
    with pytest.raises(CheckpointError, match=r"(?s)cls_token.*TimmEncoder\(model\) takes"):
        from_timm(build())
    with pytest.raises(CheckpointError, match=r"ls1\.gamma"):
        from_timm(build(class_token=False, global_pool="avg", init_values=0.1))
    with pytest.raises(CheckpointError, match="exact GELU"):
        from_timm(build(class_token=False, global_pool="avg", act_layer=nn.SiLU))
