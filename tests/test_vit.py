from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import device_mesh
from vit_oracle import vit_oracle

from jepa_fast.nn.attention import attend
from jepa_fast.nn.initialisation import init_transformer
from jepa_fast.nn.position import interpolate_position_embedding, sincos_position_embedding
from jepa_fast.nn.vit import Encoder, VisionTransformer, check_encoder, create_encoder

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def randomise(module: nn.Module) -> nn.Module:
    """Weights large enough that no part of the network is negligible."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data.normal_(std=0.3, generator=generator)
    return module


@pytest.mark.parametrize(
    ("size", "patch", "millions"),
    [
        ("tiny", 16, 5.49),
        ("small", 16, 21.59),
        ("base", 16, 85.65),
        ("large", 16, 303.10),
        ("huge", 14, 630.43),
        ("giant", 16, 1011.09),
    ],
)
def test_named_sizes_have_the_published_parameter_counts(
    size: str, patch: int, millions: float
) -> None:
    with torch.device("meta"):
        encoder = create_encoder(f"vit_{size}_patch{patch}")
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == millions
    head_dim = encoder.embed_dim // encoder.num_heads
    assert head_dim == {"huge": 80, "giant": 88}.get(size, 64)


def test_sincos_position_is_the_documented_formula() -> None:
    dim, (height, width) = 16, (3, 5)
    embedding = sincos_position_embedding(dim, (height, width))
    for row in range(height):
        for column in range(width):
            expected = [
                function(position / 10000 ** (i / (dim // 4)))
                for position in (column, row)
                for function in (math.sin, math.cos)
                for i in range(dim // 4)
            ]
            torch.testing.assert_close(
                embedding[row * width + column], torch.tensor(expected), rtol=0, atol=1e-7
            )


def test_sincos_position_refuses_odd_widths() -> None:
    with pytest.raises(ValueError, match=r"dim: expected a positive multiple of 4.*got 30"):
        sincos_position_embedding(30, (2, 2))


@pytest.mark.parametrize("patch", [4, (2, 8)])
@pytest.mark.parametrize("size", [16, (8, 24)])
def test_forward_equals_the_oracle(size, patch) -> None:
    encoder = randomise(VisionTransformer(**{**TINY, "img_size": size, "patch_size": patch}))
    images = torch.randn(2, 3, *encoder.img_size)
    count = encoder.grid[0] * encoder.grid[1]
    state = dict(encoder.state_dict())
    whole = encoder(images)
    keep = torch.stack([torch.randperm(count)[:5] for _ in range(2)])
    part = encoder(images, keep)
    for b in range(2):
        expected = vit_oracle(images[b], state, encoder.num_heads, list(range(count)))
        torch.testing.assert_close(whole[b], expected, rtol=1e-4, atol=1e-5)
        expected = vit_oracle(images[b], state, encoder.num_heads, keep[b].tolist())
        torch.testing.assert_close(part[b], expected, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing() -> None:
    encoder = randomise(VisionTransformer(**TINY))
    images = torch.randn(2, 3, 16, 16)
    keep = torch.tensor([[1, 4, 9, 0, 0], [2, 3, 5, 7, 11]])
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    padded = encoder(images, keep, mask)
    for b, count in enumerate((3, 5)):
        alone = encoder(images[b : b + 1], keep[b : b + 1, :count])
        torch.testing.assert_close(padded[b : b + 1, :count], alone, rtol=1e-4, atol=1e-5)
    assert padded.isfinite().all()


def test_other_image_sizes_only_if_asked() -> None:
    strict = VisionTransformer(**TINY)
    images = torch.randn(1, 3, 24, 8)
    with pytest.raises(
        ValueError, match=r"expected \(16, 16\).*For encode\(\) alone.*interpolate_pos"
    ):
        strict(images)
    free = VisionTransformer(**TINY, interpolate_positions=True)
    assert free(images).shape == (1, 12, 32)
    with pytest.raises(ValueError, match="image size: expected a multiple of the patch size"):
        free(torch.randn(1, 3, 22, 8))


def test_interpolated_positions_follow_the_picture() -> None:
    ramp = torch.arange(4.0).repeat(4, 1).flatten()[None, :, None]  # value = column
    wide = interpolate_position_embedding(ramp, (4, 4), (4, 8)).view(4, 8)
    assert (wide.diff(dim=1) > 0).all()
    torch.testing.assert_close(wide, wide[:1].expand(4, 8))
    assert interpolate_position_embedding(ramp, (4, 4), (4, 4)) is ramp


def test_released_and_rescaled_initialisation() -> None:
    torch.manual_seed(0)
    released = VisionTransformer(**{**TINY, "embed_dim": 128, "depth": 3})
    torch.manual_seed(0)
    rescaled = VisionTransformer(**{**TINY, "embed_dim": 128, "depth": 3}, init="rescaled")
    for name, weight in released.named_parameters():
        other = rescaled.get_parameter(name)
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            depth = int(name.split(".")[1]) + 1
            torch.testing.assert_close(other, weight / math.sqrt(2 * depth))
        else:
            assert torch.equal(other, weight)
        if weight.ndim > 1:
            assert abs(weight.std().item() - 0.02) < 1e-3
        elif "norm" in name and name.endswith("weight"):
            assert (weight == 1).all()
        else:
            assert (weight == 0).all()
    with pytest.raises(ValueError, match=r"init: expected one of .*got 'xavier'"):
        init_transformer(released, released.blocks, "xavier")


def test_fan_in_initialisation_keeps_the_variance() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(**{**TINY, "embed_dim": 128, "depth": 2}, init="fan_in")
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            assert abs(weight.std().item() * weight[0].numel() ** 0.5 - 1) < 0.03, name


@pytest.mark.parametrize("name", ["vit_base", "vit_giga_patch16", "resnet50", "vit_base_patch0"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="encoder name: expected vit_<size>_patch<side>"):
        create_encoder(name)


def test_names_of_timm_are_referred_to_its_wrapper() -> None:
    with pytest.raises(ValueError, match=r"interop\.TimmEncoder\(timm\.create_model\(name\)\)"):
        create_encoder("vit_base_patch16_224")


def test_images_of_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"images: expected a floating dtype, got torch\.uint8"):
        VisionTransformer(**TINY)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"images: expected a tensor \[B, 3, H, W\], got list"):
        VisionTransformer(**TINY)([torch.zeros(3, 16, 16)])


def test_images_of_another_dtype_or_other_channels_are_refused() -> None:
    encoder = VisionTransformer(**TINY)
    images = torch.randn(1, 3, 16, 16)
    with pytest.raises(
        TypeError, match=r"expected torch\.float32, .* got torch\.bfloat16; convert"
    ):
        encoder(images.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(images.bfloat16()).isfinite().all()
    assert encoder.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"expected 3 channels, .*got shape \(1, 1, 16, 16\); rep"):
        encoder(images[:, :1])


def test_overrides_win_over_the_name() -> None:
    encoder = create_encoder("vit_tiny_patch4", 32, depth=1, num_heads=2)
    assert (len(encoder.blocks), encoder.num_heads, encoder.grid) == (1, 2, (8, 8))


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads: expected a positive divisor of the width 32"):
        VisionTransformer(**{**TINY, "num_heads": 3})
    with pytest.raises(ValueError, match="multiple of the patch size"):
        VisionTransformer(**{**TINY, "img_size": 18})
    with pytest.raises(ValueError, match="img_size: expected one or two positive integers"):
        VisionTransformer(**{**TINY, "img_size": (16, 16, 3)})
    encoder = VisionTransformer(**TINY)
    with pytest.raises(ValueError, match="keep_mask: expected None without keep"):
        encoder(torch.randn(1, 3, 16, 16), None, torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("img_size", 16.0, TypeError),
        ("img_size", None, TypeError),
        ("patch_size", torch.tensor(4), TypeError),
        ("embed_dim", 0, ValueError),
        ("depth", 1.5, TypeError),
        ("depth", -1, ValueError),
        ("mlp_ratio", 0, ValueError),
        ("mlp_ratio", "4", TypeError),
        ("eps", -1e-6, ValueError),
        ("in_channels", None, TypeError),
        ("interpolate_positions", 1, TypeError),
    ],
)
def test_options_are_refused_by_name(option: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"{option}: expected .*, got "):
        VisionTransformer(**{**TINY, option: value})


def test_sizes_may_be_numpys() -> None:
    assert VisionTransformer(**{**TINY, "img_size": numpy.int64(16)}).grid == (4, 4)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 3, 16, 16)])
def test_images_of_other_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images: expected \[B, C, H, W\], got shape \("):
        VisionTransformer(**TINY)(torch.zeros(shape))


def test_protocol() -> None:
    encoder = VisionTransformer(**TINY)
    assert isinstance(encoder, Encoder)
    check_encoder(encoder)
    with pytest.raises(TypeError, match="Linear without embed_dim, grid, num_heads"):
        check_encoder(nn.Linear(2, 2))
    for name, value, expected in (
        ("grid", 8, "two positive integers"),
        ("grid", (8, 8, 8), "two positive integers"),
        ("grid", (8, 0), "two positive integers"),
        ("embed_dim", "32", "a positive integer"),
        ("num_heads", None, "a positive integer"),
    ):
        wrong = VisionTransformer(**TINY)
        setattr(wrong, name, value)
        with pytest.raises(TypeError, match=rf"VisionTransformer\.{name} to be {expected}.*, got "):
            check_encoder(wrong)
    wrong.grid = [4, 4]
    check_encoder(wrong, num_heads=False)


def test_autocast_and_gradients() -> None:
    encoder = VisionTransformer(**TINY)
    keep = torch.tensor([[0, 3, 5]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = encoder(torch.randn(1, 3, 16, 16), keep, torch.ones(1, 3, dtype=torch.bool))
    tokens.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_compiles_without_a_graph_break() -> None:
    encoder = VisionTransformer(**TINY)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    images, keep = torch.randn(2, 3, 16, 16), torch.tensor([[0, 3, 5], [1, 2, 4]])
    torch.testing.assert_close(compiled(images, keep), encoder(images, keep))
    torch.testing.assert_close(compiled(images), encoder(images))


def test_empty_batch() -> None:
    encoder = VisionTransformer(**TINY)
    assert encoder(torch.randn(0, 3, 16, 16)).shape == (0, 16, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_attention_is_as_right_with_gradients_as_without(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([True, True, False, True, True])[None, None, None]
    want = F.scaled_dot_product_attention(q, k, v, mask)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    with torch.autocast("cpu", dtype):
        got = attend(q.requires_grad_(), k, v, mask)
        with torch.no_grad():
            frozen = attend(q, k, v, mask)
    assert got.dtype == frozen.dtype == dtype
    for result in (got, frozen):
        torch.testing.assert_close(result.double(), want, rtol=0.02, atol=0.02)
    got.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == dtype


def test_fsdp_may_narrow_the_weights_of_the_whole(one_process: None) -> None:
    """It casts weights and inputs, and leaves buffers, such as positions, as they are."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    encoder = randomise(VisionTransformer(**TINY))
    images = torch.randn(2, 3, 16, 16)
    expected = encoder(images)
    fully_shard(
        encoder,
        mesh=device_mesh.init_device_mesh("cpu", (1,)),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    )
    tokens = encoder(images)
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), expected, rtol=0.1, atol=0.1)
    tokens.sum().backward()
