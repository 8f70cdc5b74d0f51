from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from vit_oracle import predictor_oracle, vit_oracle

from jepa_fast import IJepa, ops
from jepa_fast.masks import BlockMasks, BlockMaskSampler
from jepa_fast.models.ijepa import default_predictor_depth
from jepa_fast.nn.vit import VisionTransformer, create_encoder
from jepa_fast.optim.groups import parameter_groups

CONTEXT = torch.tensor([[0, 1, 2, 4, 8], [3, 4, 5, 11, 15]])
TARGETS = torch.tensor([[[6, 7], [10, 11], [6, 10]], [[0, 1], [8, 9], [13, 14]]])


def build(depth: int = 2, **options) -> IJepa:
    torch.manual_seed(0)
    encoder = VisionTransformer(16, 4, embed_dim=32, depth=depth, num_heads=2)
    model = IJepa(encoder, predictor_dim=24, predictor_depth=1, **options)
    for module in (model.encoder, model.predictor, model.target_encoder):
        for p in module.parameters():  # as if trained: the teacher differs from the encoder
            nn.init.normal_(p, std=0.2)
    return model


def oracle_loss(model: IJepa, images: Tensor, kind: str, normalize: bool) -> Tensor:
    encoder, predictor = dict(model.encoder.state_dict()), dict(model.predictor.state_dict())
    teacher = dict(model.target_encoder.state_dict())
    losses = []
    for b in range(len(images)):
        keep = CONTEXT[b].tolist()
        context = vit_oracle(images[b], encoder, 2, keep)
        whole = vit_oracle(images[b], teacher, 2, list(range(16)))
        if normalize:
            centred = whole - whole.mean(-1, keepdim=True)
            whole = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        for targets in TARGETS[b].tolist():
            residual = predictor_oracle(context, predictor, 2, keep, targets) - whole[targets]
            size = residual.abs()
            losses.append(
                {
                    "smooth_l1": torch.where(size < 1, size**2 / 2, size - 0.5).mean(),
                    "l1": size.mean(),
                    "l2": size.square().mean(),
                    "l2_norm": residual.square().sum(-1).sqrt().mean(),
                }[kind]
            )
    return torch.stack(losses).mean()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["smooth_l1", "l1", "l2", "l2_norm"])
def test_loss_equals_the_oracle(kind: str, normalize: bool) -> None:
    model = build(loss=kind, normalize_target=normalize)
    images = torch.randn(2, 3, 16, 16)
    out = model(images, BlockMasks(CONTEXT, TARGETS, None, (4, 4)))
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(
        out.loss, oracle_loss(model, images, kind, normalize), rtol=1e-5, atol=1e-6
    )
    assert out.prediction.shape == out.target.shape == (6, 2, 32)
    residual = (out.prediction - out.target).abs().mean()
    torch.testing.assert_close(oracle_loss(model, images, "l1", normalize), residual)


def test_the_collators_lists_are_accepted() -> None:
    model, images = build(), torch.randn(2, 3, 16, 16)
    lists = ([CONTEXT], list(TARGETS.unbind(1)))
    expected = model(images, BlockMasks(CONTEXT, TARGETS, None, (4, 4)))
    assert torch.equal(model(images, lists).loss, expected.loss)
    with pytest.raises(ValueError, match="4x4 grid, got 8x8"):
        model(images, BlockMasks(CONTEXT, TARGETS, None, (8, 8)))
    with pytest.raises(ValueError, match="expected 1 context block"):
        model(images, ([CONTEXT, CONTEXT], list(TARGETS.unbind(1))))


def test_images_of_another_size_are_not_matched_with_the_wrong_patches() -> None:
    encoder = VisionTransformer(16, 4, 32, 1, 2, interpolate_positions=True)
    model = IJepa(encoder, predictor_dim=24, predictor_depth=1)
    images = torch.randn(2, 3, 16, 32)
    assert model.encode(images).shape == (2, 32, 32)
    with pytest.raises(ValueError, match=r"images: expected 16 patches.*got 32"):
        model(images, BlockMasks(CONTEXT, TARGETS, None, (4, 4)))


def test_ragged_contexts_equal_one_image_at_a_time() -> None:
    model, images = build(), torch.randn(2, 3, 16, 16)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    ragged = CONTEXT * mask
    both = model(images, BlockMasks(ragged, TARGETS, mask, (4, 4)))
    alone = [
        model(images[b : b + 1], ([CONTEXT[b : b + 1, :count]], list(TARGETS[b : b + 1].unbind(1))))
        for b, count in enumerate((3, 5))
    ]
    torch.testing.assert_close(both.loss, torch.stack([out.loss for out in alone]).mean())


def test_gradients_reach_encoder_and_predictor_but_not_the_teacher() -> None:
    model = build()
    model(torch.randn(2, 3, 16, 16), BlockMasks(CONTEXT, TARGETS, None, (4, 4))).loss.backward()
    trained = dict(model.trainable_parameters())
    assert {name.split(".")[0] for name in trained} == {"encoder", "predictor"}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert all(p.grad is None for p in model.target_encoder.parameters())


def test_metrics_are_detached_scalars() -> None:
    out = build()(torch.randn(2, 3, 16, 16), BlockMasks(CONTEXT, TARGETS, None, (4, 4)))
    assert {"prediction_std_min", "prediction_rank", "target_std_mean"} <= set(out.metrics)
    for value in out.metrics.values():
        assert value.shape == ()
        assert not value.requires_grad
        assert value.isfinite()


def test_the_teacher_starts_equal_and_follows_as_an_ema() -> None:
    model = IJepa(VisionTransformer(16, 4, 32, 2, 2), predictor_dim=24, predictor_depth=1)
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(model.encode(images), model.encoder(images))
    for p in model.encoder.parameters():
        p.data.add_(torch.randn_like(p))
    before = copy.deepcopy(model.target_encoder)
    model.update_target(0.75)
    for mine, old, new in zip(
        model.target_encoder.parameters(),
        before.parameters(),
        model.encoder.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(mine, 0.75 * old + 0.25 * new)
    model.update_target(torch.tensor(0.0))
    for mine, new in zip(
        model.target_encoder.parameters(), model.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, new)


class ConvEncoder(nn.Module):
    """A user's encoder: no attention, dropout and batch statistics to watch the teacher by."""

    embed_dim, grid, num_heads = 8, (2, 2), 2

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, images, keep=None, keep_mask=None):
        tokens = self.drop(self.norm(self.conv(images))).flatten(2).transpose(1, 2)
        return tokens if keep is None else ops.gather_patches(tokens, keep)


def test_any_module_that_follows_the_protocol_is_an_encoder() -> None:
    model = IJepa(ConvEncoder(), predictor_dim=16, predictor_depth=1).train()
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(model.encode(images), model.encode(images))  # the teacher drops nothing
    masks = BlockMasks(torch.tensor([[0, 1]] * 3), torch.tensor([[[2, 3]]] * 3), None, (2, 2))
    model(images, masks).loss.backward()
    model.update_target(0.9)
    for name, buffer in model.target_encoder.named_buffers():
        assert torch.equal(buffer, model.encoder.get_buffer(name))
    assert model.encoder.norm.num_batches_tracked == 1
    with pytest.raises(TypeError, match="Linear without embed_dim, grid, num_heads"):
        IJepa(nn.Linear(2, 2))


class PlainEncoder(nn.Module):
    """Knows nothing of padding or of heads."""

    embed_dim, grid = 8, (2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, images, keep=None):
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        return tokens if keep is None else ops.gather_patches(tokens, keep)


class ImagesOnlyEncoder(PlainEncoder):
    def forward(self, images):
        return super().forward(images)


def test_encoders_need_no_more_than_what_is_used() -> None:
    sizes = {"predictor_dim": 16, "predictor_depth": 1}
    model = IJepa(PlainEncoder(), predictor_heads=2, **sizes)
    masks = BlockMasks(torch.tensor([[0, 1]] * 3), torch.tensor([[[2, 3]]] * 3), None, (2, 2))
    model(torch.randn(3, 3, 8, 8), masks).loss.backward()
    with pytest.raises(TypeError, match="embed_dim, grid and num_heads, got PlainEncoder without"):
        IJepa(PlainEncoder(), **sizes)
    with pytest.raises(TypeError, match="ImagesOnlyEncoder, which takes images only"):
        IJepa(ImagesOnlyEncoder(), predictor_heads=2, **sizes)


def test_an_encoder_without_keep_mask_is_told_so_at_the_first_ragged_contexts() -> None:
    model = IJepa(PlainEncoder(), predictor_dim=16, predictor_depth=1, predictor_heads=2)
    mask = torch.tensor([[True, True], [True, False]])
    masks = BlockMasks(torch.tensor([[0, 1], [2, 0]]), torch.tensor([[[3]]] * 2), mask, (2, 2))
    with pytest.raises(
        TypeError, match=r"PlainEncoder, which takes no keep_mask; .* max_context=min_context"
    ):
        model(torch.randn(2, 3, 8, 8), masks)


def test_masks_of_another_number_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="masks: expected 3 images, as given, got 2"):
        build()(torch.randn(3, 3, 16, 16), BlockMasks(CONTEXT, TARGETS, None, (4, 4)))


def test_options_are_checked_when_the_model_is_built() -> None:
    with pytest.raises(ValueError, match=r"loss: expected one of \('smooth_l1', .* got 'mse'"):
        build(loss="mse")
    narrow = {"predictor_dim": 16, "predictor_heads": 2}
    with pytest.raises(ValueError, match="predictor_depth: expected at least one block, got 0"):
        IJepa(PlainEncoder(), predictor_depth=0, **narrow)
    with pytest.raises(
        ValueError, match=r"predictor_heads: expected .* of predictor_dim 16, got 0"
    ):
        IJepa(PlainEncoder(), **{**narrow, "predictor_heads": 0})
    with pytest.raises(ValueError, match=r"of predictor_dim 64, got 3 \(by default the encoder's "):
        IJepa("vit_tiny_patch16", predictor_dim=64)


@pytest.mark.parametrize(
    ("name", "depth", "head_dim"),
    [
        ("vit_small_patch16", 6, 64),
        ("vit_base_patch16", 6, 32),
        ("vit_large_patch16", 12, 24),
        ("vit_huge_patch14", 12, 24),
        ("vit_giant_patch16", 16, 24),
    ],
)
def test_predictors_follow_the_encoders_size(name: str, depth: int, head_dim: int) -> None:
    with torch.device("meta"):
        width = create_encoder(name).embed_dim
        assert default_predictor_depth(width) == depth
        if width <= 1024:
            predictor = IJepa(name).predictor
            assert len(predictor.predictor_blocks) == depth
            assert predictor.predictor_dim // predictor.num_heads == head_dim


def test_models_by_name_and_their_initialisation() -> None:
    model = IJepa("vit_tiny_patch8", img_size=(16, 32), predictor_dim=48, init="rescaled")
    assert model.encoder.grid == model.predictor.grid == (2, 4)
    deep = model.predictor.predictor_blocks[-1].mlp.fc2.weight
    assert deep.std().item() == pytest.approx(0.02 / (2 * 6) ** 0.5, rel=0.05)
    assert model.predictor.mask_token.std() > 0
    with pytest.raises(ValueError, match="init: expected one of"):
        IJepa("vit_tiny_patch8", img_size=16, init="xavier")


def test_state_dict_round_trip() -> None:
    model, other = build(), build()
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(model.state_dict())
    images, masks = torch.randn(2, 3, 16, 16), BlockMasks(CONTEXT, TARGETS, None, (4, 4))
    assert torch.equal(model(images, masks).loss, other(images, masks).loss)


def test_autocast_bf16() -> None:
    model = build()
    images, masks = torch.randn(2, 3, 16, 16), BlockMasks(CONTEXT, TARGETS, None, (4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images, masks)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, model(images, masks).loss, rtol=0.05, atol=0.05)
    out.loss.backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    model = build(depth=1)
    sampler = BlockMaskSampler((4, 4), min_context=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    images = torch.randn(3, 3, 16, 16)
    masks = sampler(0, 3)
    expected = model(images, masks)
    out = compiled(images, masks)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.metrics, expected.metrics)


@pytest.mark.filterwarnings("ignore:std():UserWarning")
def test_empty_batch() -> None:
    out = build()(torch.randn(0, 3, 16, 16), BlockMasks(CONTEXT[:0], TARGETS[:0], None, (4, 4)))
    assert out.prediction.shape == (0, 2, 32)


def test_parameter_groups() -> None:
    model = build()
    decayed, rest = parameter_groups(model, 0.04)
    assert (decayed["weight_decay"], decayed["decayed"]) == (0.04, True)
    assert (rest["weight_decay"], rest["decayed"]) == (0.0, False)
    assert "predictor.mask_token" in decayed["names"]
    assert "encoder.patch_embed.proj.weight" in decayed["names"]
    assert "encoder.blocks.0.norm1.weight" in rest["names"]
    assert "encoder.blocks.0.attn.qkv.bias" in rest["names"]
    names = [name for name, _ in model.trainable_parameters()]
    assert sorted(decayed["names"] + rest["names"]) == sorted(names)
    assert len(decayed["params"]) == len(decayed["names"])
    torch.optim.AdamW([decayed, rest], lr=1e-3)


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
def test_gradients_are_averaged_by_distributed_data_parallel(
    one_process: None, options: dict[str, bool]
) -> None:
    """With some of its options it looks for the loss among the outputs."""
    model, images = build(), torch.randn(2, 3, 16, 16)
    masks = BlockMasks(CONTEXT, TARGETS, None, (4, 4))
    model(images, masks).loss.backward()
    alone = {name: p.grad.clone() for name, p in model.trainable_parameters()}
    wrapped = nn.parallel.DistributedDataParallel(model, **options)

    def average(state, bucket):  # which takes no annotations in quotes
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(3 * bucket.buffer())
        return done

    wrapped.register_comm_hook(None, average)
    for _ in range(2):
        model.zero_grad()
        wrapped(images, masks).loss.backward()
        for name, p in model.trainable_parameters():
            torch.testing.assert_close(p.grad, 3 * alone[name])
