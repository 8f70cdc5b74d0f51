"""Checkpoints of the public TI-JEPA code, made here from their names and shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tijepa_oracle import crosser_oracle
from torch import Tensor
from vit_oracle import predictor_oracle, vit_oracle

from jepa_fast import CheckpointError, TIJepa
from jepa_fast.interop.checkpoints import (
    export_tijepa,
    load_parts,
    load_tijepa,
    read_checkpoint,
    save_checkpoint,
)
from jepa_fast.masks import BlockMasks
from jepa_fast.nn.vit import VisionTransformer

IMAGE, TEXT, WIDTH, INSIDE, PATCHES = 32, 16, 16, 24, 16


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def crosser_shapes(block: str) -> dict[str, tuple[int, ...]]:
    shapes = linear("vision_proj", WIDTH, IMAGE) | norm("vision_norm", WIDTH)
    for name in ("blocks.0", "blocks.1"):
        shapes |= linear(f"{name}.cross_attn.query", WIDTH, WIDTH)
        shapes |= linear(f"{name}.cross_attn.key", WIDTH, TEXT)
        shapes |= linear(f"{name}.cross_attn.value", WIDTH, TEXT)
        shapes |= linear(f"{name}.cross_attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{name}.mlp.fc1", 4 * WIDTH, WIDTH)
        shapes |= linear(f"{name}.mlp.fc2", WIDTH, 4 * WIDTH)
        if block == "cross":
            shapes |= norm(f"{name}.norm1", WIDTH) | norm(f"{name}.norm2", WIDTH)
        else:
            shapes |= linear(f"{name}.attn.qkv", 3 * WIDTH, WIDTH)
            shapes |= linear(f"{name}.attn.proj", WIDTH, WIDTH)
            shapes |= norm(f"{name}.norm_after_self_attn", WIDTH)
            shapes |= norm(f"{name}.norm_after_cross_attn", WIDTH)
            shapes |= norm(f"{name}.norm_after_mlp", WIDTH)
    return shapes


PREDICTOR = {
    "mask_token": (1, 1, INSIDE),
    "predictor_pos_embed": (1, PATCHES, INSIDE),
    **linear("predictor_embed", INSIDE, WIDTH),
    **norm("predictor_blocks.0.norm1", INSIDE),
    **linear("predictor_blocks.0.attn.qkv", 3 * INSIDE, INSIDE),
    **linear("predictor_blocks.0.attn.proj", INSIDE, INSIDE),
    **norm("predictor_blocks.0.norm2", INSIDE),
    **linear("predictor_blocks.0.mlp.fc1", 4 * INSIDE, INSIDE),
    **linear("predictor_blocks.0.mlp.fc2", INSIDE, 4 * INSIDE),
    **norm("predictor_norm", INSIDE),
    **linear("predictor_proj", WIDTH, INSIDE),
}


def random_state(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def public_checkpoint(block: str, prefix: str = "") -> dict[str, object]:
    """What the public training script writes."""
    torch.manual_seed(3)
    return {
        "context_crosser": random_state(crosser_shapes(block), prefix),
        "predictor": random_state(PREDICTOR, prefix),
        "target_crosser": random_state(crosser_shapes(block), prefix),
        "opt": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-3}]},
        "scaler": {"scale": 65536.0},
        "epoch": 80,
        "loss": [0.4, 0.3],
        "p_loss": [0.4, 0.3],
    }


def build(block: str = "self_cross", **options) -> TIJepa:
    torch.manual_seed(0)
    return TIJepa(
        VisionTransformer(16, 4, IMAGE, 1, 2),
        text_dim=TEXT,
        block=block,
        **{
            "width": WIDTH,
            "depth": 2,
            "num_heads": 4,
            "predictor_dim": INSIDE,
            "predictor_depth": 1,
            "predictor_heads": 2,
            **options,
        },
    )


@pytest.mark.parametrize("form", ["dictionary", "file"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("block", ["self_cross", "cross"])
def test_a_public_checkpoint_gives_the_same_outputs(
    block: str, prefix: str, form: str, tmp_path: Path
) -> None:
    checkpoint, source = public_checkpoint(block, prefix), tmp_path / "epoch-80.pt"
    torch.save(checkpoint, source)
    model = build(block)
    load_tijepa(model, source if form == "file" else checkpoint)

    state = {
        part: {name.removeprefix(prefix): v for name, v in checkpoint[part].items()}
        for part in ("context_crosser", "target_crosser", "predictor")
    }
    images, words = torch.randn(2, 3, 16, 16), torch.randn(2, 3, TEXT)
    keep, targets = [0, 1, 2, 4, 8], [6, 7, 10, 11]
    masks = BlockMasks(
        torch.tensor([keep] * 2), torch.tensor([[[6, 7], [10, 11]]] * 2), None, (4, 4)
    )
    out = model(images, masks, words)
    tokens = model.encode(images, words)
    encoder = dict(model.encoder.state_dict())
    for b in range(2):
        whole = vit_oracle(images[b], encoder, 2, list(range(PATCHES)))
        context = crosser_oracle(whole[keep], words[b], state["context_crosser"], 4)
        predicted = predictor_oracle(context, state["predictor"], 2, keep, targets)
        torch.testing.assert_close(out.prediction[b], predicted, rtol=0, atol=1e-5)
        expected = crosser_oracle(whole, words[b], state["target_crosser"], 4)
        torch.testing.assert_close(tokens[b], expected, rtol=0, atol=1e-5)


def test_the_target_crosser_alone(tmp_path: Path) -> None:
    checkpoint, model = public_checkpoint("self_cross"), build()
    torch.save({"target_crosser": checkpoint["target_crosser"]}, tmp_path / "tx-epoch-80.pt")
    load_parts({"target_crosser": model.target_crosser}, tmp_path / "tx-epoch-80.pt")
    for name, value in model.target_crosser.state_dict().items():
        assert torch.equal(value, checkpoint["target_crosser"][name])


def test_what_does_not_fit_is_refused_and_listed() -> None:
    checkpoint, model = public_checkpoint("self_cross"), build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del checkpoint["context_crosser"]["blocks.1.cross_attn.key.bias"]
    checkpoint["target_crosser"]["blocks.0.mlp.fc1.weight"] = torch.zeros(3, WIDTH)
    checkpoint["predictor"]["predictor_blocks.1.norm1.weight"] = torch.zeros(INSIDE)
    with pytest.raises(CheckpointError) as error:
        load_tijepa(model, checkpoint)
    for line in (
        "context_crosser.blocks.1.cross_attn.key.bias",
        "target_crosser.blocks.0.mlp.fc1.weight: expected (64, 16), got (3, 16)",
        "predictor.predictor_blocks.1.norm1.weight",
    ):
        assert line in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.weight"):
        load_tijepa(build("cross"), public_checkpoint("self_cross"))


@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
def test_export_and_load_again(file: str, tmp_path: Path) -> None:
    model = build()
    load_tijepa(model, public_checkpoint("self_cross"))
    save_checkpoint(export_tijepa(model, prefix="module."), tmp_path / file)
    parts = read_checkpoint(tmp_path / file)
    assert set(parts["context_crosser"]) == {
        f"module.{name}" for name in crosser_shapes("self_cross")
    }
    assert set(parts["predictor"]) == {f"module.{name}" for name in PREDICTOR}
    other = build()
    load_tijepa(other, tmp_path / file)
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_the_cross_modal_objective_has_no_public_form() -> None:
    model = build(objective="cross_modal")
    with pytest.raises(ValueError, match="expected objective='masked_image', got 'cross_modal'"):
        load_tijepa(model, public_checkpoint("self_cross"))
    with pytest.raises(ValueError, match="expected objective='masked_image'"):
        export_tijepa(model)
