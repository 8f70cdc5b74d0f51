from __future__ import annotations

import pytest
import torch
from torch.distributed import device_mesh
from vit_oracle import predictor_oracle

from jepa_fast.nn.predictor import VisionTransformerPredictor

CONTEXT = torch.tensor([[0, 2, 5, 9], [1, 3, 4, 8]])
TARGETS = torch.tensor([[[6, 7], [10, 11], [6, 10]], [[0, 5], [5, 9], [10, 11]]])


@pytest.fixture
def predictor() -> VisionTransformerPredictor:
    torch.manual_seed(0)
    module = VisionTransformerPredictor(
        (3, 4), embed_dim=24, predictor_dim=32, depth=2, num_heads=2
    )
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def test_forward_equals_the_oracle_in_block_major_order(predictor) -> None:
    context = torch.randn(2, 4, 24)
    prediction = predictor(context, CONTEXT, TARGETS)
    assert prediction.shape == (6, 2, 24)
    state = dict(predictor.state_dict())
    for m in range(3):
        for b in range(2):
            expected = predictor_oracle(
                context[b], state, 2, CONTEXT[b].tolist(), TARGETS[b, m].tolist()
            )
            torch.testing.assert_close(prediction[m * 2 + b], expected, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(predictor) -> None:
    context = torch.randn(2, 4, 24)
    context_mask = torch.tensor([[True, True, True, False], [True] * 4])
    target_mask = torch.ones(2, 3, 2, dtype=torch.bool)
    target_mask[1, :, 1] = False
    both = predictor(context, CONTEXT, TARGETS, context_mask, target_mask).unflatten(0, (3, 2))
    alone = predictor(context[:1, :3], CONTEXT[:1, :3], TARGETS[:1])
    torch.testing.assert_close(both[:, 0], alone, rtol=1e-4, atol=1e-5)
    alone = predictor(context[1:], CONTEXT[1:], TARGETS[1:, :, :1])
    torch.testing.assert_close(both[:, 1, :1], alone, rtol=1e-4, atol=1e-5)
    assert both.isfinite().all()


def test_features_are_what_forward_projects(predictor) -> None:
    context = torch.randn(2, 4, 24)
    features = predictor.features(context, CONTEXT, TARGETS)
    assert features.shape == (6, 2, 32)
    torch.testing.assert_close(
        predictor.predictor_proj(features), predictor(context, CONTEXT, TARGETS)
    )


def test_after_block_sees_every_token_after_every_block(predictor) -> None:
    seen = []

    def after_block(layer: int, tokens: torch.Tensor) -> torch.Tensor:
        seen.append((layer, tuple(tokens.shape)))
        return tokens * 0 if layer == 1 else tokens

    features = predictor.features(torch.randn(2, 4, 24), CONTEXT, TARGETS, after_block=after_block)
    assert seen == [(0, (6, 6, 32)), (1, (6, 6, 32))]
    torch.testing.assert_close(features, predictor.predictor_norm.bias.expand(6, 2, 32))


def test_every_parameter_gets_a_gradient_under_autocast(predictor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = predictor(torch.randn(2, 4, 24), CONTEXT, TARGETS)
    prediction.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in predictor.parameters())


@pytest.mark.parametrize(("batch", "kept", "hidden"), [(0, 4, 2), (2, 0, 2), (2, 4, 0)])
def test_empty_inputs(predictor, batch: int, kept: int, hidden: int) -> None:
    prediction = predictor(
        torch.randn(batch, kept, 24), CONTEXT[:batch, :kept], TARGETS[:batch, :, :hidden]
    )
    assert prediction.shape == (3 * batch, hidden, 24)


def test_compiles_without_a_graph_break(predictor) -> None:
    compiled = torch.compile(predictor, fullgraph=True, backend="aot_eager")
    context, mask = torch.randn(2, 4, 24), torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(
        compiled(context, CONTEXT, TARGETS, mask), predictor(context, CONTEXT, TARGETS)
    )


def test_fsdp_may_narrow_the_weights_of_the_whole(predictor, one_process: None) -> None:
    """It casts weights and inputs, and leaves buffers, such as positions, as they are."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    context = torch.randn(2, 4, 24)
    expected = predictor(context, CONTEXT, TARGETS)
    fully_shard(
        predictor,
        mesh=device_mesh.init_device_mesh("cpu", (1,)),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    )
    prediction = predictor(context, CONTEXT, TARGETS)
    assert prediction.dtype == torch.bfloat16
    torch.testing.assert_close(prediction.float(), expected, rtol=0.1, atol=0.1)
    prediction.sum().backward()
