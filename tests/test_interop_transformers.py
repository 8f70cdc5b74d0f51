from __future__ import annotations

import pytest
import torch
from torch import nn

from jepa_fast.errors import CheckpointError
from jepa_fast.interop.transformers import (
    TransformersEncoder,
    from_transformers,
    load_transformers_state,
    to_transformers,
)
from jepa_fast.nn.vit import Encoder, VisionTransformer

transformers = pytest.importorskip("transformers")
SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 80,
}
KEEP = torch.tensor([[1, 4, 9, 0, 0], [2, 3, 5, 7, 11]])
MASK = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])


def build(family: str, **options) -> nn.Module:
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **options})
    return transformers.AutoModel.from_config(config).eval()


def version_4_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the files on the hub, written out by hand for two layers."""
    old = {}
    for name, value in state.items():
        for layer in ("0", "1"):
            here, there = f"layers.{layer}.", f"encoder.layer.{layer}."
            for new_part, old_part in (
                ("layernorm_before.", "layernorm_before."),
                ("layernorm_after.", "layernorm_after."),
                ("attention.q_proj.", "attention.attention.query."),
                ("attention.k_proj.", "attention.attention.key."),
                ("attention.v_proj.", "attention.attention.value."),
                ("attention.o_proj.", "attention.output.dense."),
                ("mlp.fc1.", "intermediate.dense."),
                ("mlp.fc2.", "output.dense."),
            ):
                if name.startswith(here + new_part):
                    name = there + old_part + name.removeprefix(here + new_part)
        old[name] = value
    return old


def test_ijepa_weights_move_both_ways() -> None:
    theirs = build("ijepa", layer_norm_eps=1e-3)
    ours = from_transformers(theirs)
    images = torch.randn(2, 3, 16, 16)
    expected = theirs(images).last_hidden_state
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5)

    other = build("ijepa", layer_norm_eps=1e-3)
    assert not torch.equal(other(images).last_hidden_state, expected)
    to_transformers(ours, other)
    assert torch.equal(other(images).last_hidden_state, expected)


def test_our_weights_move_into_a_model_and_back() -> None:
    ours = VisionTransformer(16, 4, 32, 2, 2, mlp_ratio=2.5, eps=1e-3)
    images = torch.randn(2, 3, 16, 16)
    theirs = build("ijepa")
    assert theirs.config.layer_norm_eps != 1e-3
    to_transformers(ours, theirs)
    torch.testing.assert_close(theirs(images).last_hidden_state, ours(images), rtol=0, atol=1e-5)
    assert torch.equal(from_transformers(theirs)(images), ours(images))


@pytest.mark.parametrize("options", [{"num_attention_heads": 4}, {"hidden_act": "relu"}])
def test_models_that_compute_something_else_are_refused(options) -> None:
    theirs = build("ijepa", **options)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    (option,) = [f"{name}={value!r}" for name, value in options.items()]
    with pytest.raises(CheckpointError, match=f"got .*{option}.*build the model with"):
        to_transformers(VisionTransformer(16, 4, 32, 2, 2, mlp_ratio=2.5), theirs)
    assert all(torch.equal(before[n], value) for n, value in theirs.state_dict().items())


def test_classifiers_and_poolers_are_left_behind() -> None:
    images = torch.randn(2, 3, 16, 16)
    config = transformers.IJepaConfig(**SIZES)
    with_pooler = transformers.IJepaModel(config, add_pooling_layer=True).eval()
    expected = with_pooler(images).last_hidden_state
    ours = from_transformers(with_pooler)
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5)

    classifier = transformers.IJepaForImageClassification(config).eval()
    load_transformers_state(ours, classifier.state_dict())
    expected = classifier.ijepa(images).last_hidden_state
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "ijepa."])
def test_names_of_the_files_on_the_hub(prefix: str) -> None:
    theirs = build("ijepa")
    state = {prefix + n: value for n, value in version_4_names(theirs.state_dict()).items()}
    assert prefix + "encoder.layer.1.attention.attention.query.weight" in state
    ours = from_transformers(build("ijepa"))
    load_transformers_state(ours, state)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images).last_hidden_state, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_listed() -> None:
    state = build("ijepa").state_dict()
    del state["layers.1.attention.k_proj.bias"]
    state["extra"] = torch.zeros(1)
    encoder = VisionTransformer(16, 4, 32, 2, 2, mlp_ratio=2)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_transformers_state(encoder, state)
    for entry in (
        "encoder.blocks.1.attn.qkv.bias",
        "encoder.extra",
        "encoder.blocks.0.mlp.fc1.weight: expected (64, 32), got (80, 32)",
    ):
        assert entry in str(caught.value)
    assert all(torch.equal(before[n], value) for n, value in encoder.state_dict().items())
    with pytest.raises(CheckpointError, match="hidden_act='gelu_new'"):
        from_transformers(build("ijepa", hidden_act="gelu_new"))


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("ijepa", 0), ("vit", 1), ("deit", 2), ("dinov2", 1), ("dinov2_with_registers", 5)],
)
def test_vision_models_as_encoders(family: str, prefix: int) -> None:
    model = build(family)
    encoder = TransformersEncoder(model)
    assert isinstance(encoder, Encoder)
    assert (encoder.grid, encoder.embed_dim, encoder.num_heads) == ((4, 4), 32, 2)
    images = torch.randn(2, 3, 16, 16)
    whole = encoder(images)
    assert torch.equal(whole, model(images).last_hidden_state[:, prefix:])
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(encoder(images, everything), whole)

    changed = images.clone()
    changed[:, :, 12:, :4] += 1  # patch 12, not kept
    assert torch.equal(encoder(changed, KEEP), encoder(images, KEEP))

    padded = encoder(images, KEEP, MASK)
    for b, count in enumerate((3, 5)):
        alone = encoder(images[b : b + 1], KEEP[b : b + 1, :count])
        torch.testing.assert_close(padded[b : b + 1, :count], alone)
    assert padded.isfinite().all()


@pytest.mark.parametrize("family", ["ijepa", "vit", "deit", "dinov2"])
def test_every_trained_parameter_gets_a_gradient(family: str) -> None:
    encoder = TransformersEncoder(build(family)).train()
    encoder(torch.randn(2, 3, 16, 16), KEEP, MASK)[MASK].square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


def test_subsets_are_refused_where_positions_depend_on_the_whole_grid() -> None:
    encoder = TransformersEncoder(build("dinov3_vit"))
    assert encoder(torch.randn(1, 3, 16, 16)).shape == (1, 16, 32)
    with pytest.raises(ValueError, match=r"expected a model of a family .* got 'dinov3_vit'"):
        encoder(torch.randn(1, 3, 16, 16), KEEP[:1])


@pytest.mark.parametrize("family", ["dinov2", "dinov3_vit"])  # which take images of any size
def test_images_of_another_size_are_refused(family: str) -> None:
    encoder = TransformersEncoder(build(family))
    for arguments in ((), (KEEP[:1],)):
        with pytest.raises(ValueError, match=r"expected \(16, 16\) pixels .* got \(24, 24\)"):
            encoder(torch.randn(1, 3, 24, 24), *arguments)
    model = build(family)
    model.config.image_size = 24
    encoder = TransformersEncoder(model)
    images = torch.randn(1, 3, 24, 24)
    assert encoder.grid == (6, 6)
    assert torch.equal(encoder(images), model(images).last_hidden_state[:, -36:])


def test_a_model_of_fewer_tokens_than_patches_is_refused() -> None:
    encoder = TransformersEncoder(build("vit_mae"))
    with pytest.raises(ValueError, match=r"a token for each of \(4, 4\) patches, got 5 from"):
        encoder(torch.randn(1, 3, 16, 16))


def test_models_that_are_no_vision_transformers_are_refused() -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"
    )
    with pytest.raises(TypeError, match="ResNetModel whose configuration lacks hidden_size"):
        TransformersEncoder(transformers.ResNetModel(config))


def test_models_with_a_head_or_a_class_token_are_told_what_to_pass() -> None:
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES))
    with pytest.raises(TypeError, match=r"got ViTForImageClassification; .*inside, model\.vit$"):
        TransformersEncoder(classifier)
    assert TransformersEncoder(classifier.vit).grid == (4, 4)
    with pytest.raises(CheckpointError, match=r"(?s)cls_token.*TransformersEncoder\(model\) takes"):
        from_transformers(classifier.vit)
