from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vit_oracle import predictor_oracle, vit_oracle

from jepa_fast import CheckpointError, IJepa, ProbIJepa, TCJepa, TIJepa
from jepa_fast.interop.checkpoints import (
    export_ijepa,
    load_ijepa,
    load_parts,
    read_checkpoint,
    save_checkpoint,
)
from jepa_fast.nn.vit import VisionTransformer

WIDTH, INSIDE, HEADS, PATCHES, SIDE = 32, 24, 2, 16, 4


def linear_shapes(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def block_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.norm1.weight": (width,),
        f"{name}.norm1.bias": (width,),
        **linear_shapes(f"{name}.attn.qkv", 3 * width, width),
        **linear_shapes(f"{name}.attn.proj", width, width),
        f"{name}.norm2.weight": (width,),
        f"{name}.norm2.bias": (width,),
        **linear_shapes(f"{name}.mlp.fc1", 4 * width, width),
        **linear_shapes(f"{name}.mlp.fc2", width, 4 * width),
    }


ENCODER = {
    "pos_embed": (1, PATCHES, WIDTH),
    "patch_embed.proj.weight": (WIDTH, 3, SIDE, SIDE),
    "patch_embed.proj.bias": (WIDTH,),
    **block_shapes("blocks.0", WIDTH),
    **block_shapes("blocks.1", WIDTH),
    "norm.weight": (WIDTH,),
    "norm.bias": (WIDTH,),
}
PREDICTOR = {
    "mask_token": (1, 1, INSIDE),
    "predictor_pos_embed": (1, PATCHES, INSIDE),
    **linear_shapes("predictor_embed", INSIDE, WIDTH),
    **block_shapes("predictor_blocks.0", INSIDE),
    "predictor_norm.weight": (INSIDE,),
    "predictor_norm.bias": (INSIDE,),
    **linear_shapes("predictor_proj", WIDTH, INSIDE),
}


def random_state(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def public_checkpoint(prefix: str = "module.") -> dict[str, object]:
    """What the public training script writes: three networks under DDP, and the run's state."""
    torch.manual_seed(3)
    return {
        "encoder": random_state(ENCODER, prefix),
        "predictor": random_state(PREDICTOR, prefix),
        "target_encoder": random_state(ENCODER, prefix),
        "opt": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-3}]},
        "scaler": None,
        "epoch": 300,
        "loss": 0.1,
        "batch_size": 128,
        "world_size": 16,
        "lr": 1e-3,
    }


def build() -> IJepa:
    encoder = VisionTransformer(16, SIDE, WIDTH, depth=2, num_heads=HEADS)
    return IJepa(encoder, predictor_dim=INSIDE, predictor_depth=1)


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_public_checkpoints_load_and_give_the_same_outputs(prefix: str, tmp_path: Path) -> None:
    checkpoint = public_checkpoint(prefix)
    torch.save(checkpoint, tmp_path / "jepa-latest.pth.tar")
    model = build()
    load_ijepa(model, tmp_path / "jepa-latest.pth.tar")

    images = torch.randn(2, 3, 16, 16)
    keep, targets = [0, 3, 5, 6], [[8, 9, 12], [10, 11, 15]]
    index = torch.tensor([keep, keep])
    context = model.encoder(images, index)
    prediction = model.predictor(context, index, torch.tensor([targets, targets]))
    teacher = model.encode(images)
    for b in range(2):
        encoder = without_prefix(checkpoint["encoder"])
        expected = vit_oracle(images[b], encoder, HEADS, keep)
        torch.testing.assert_close(context[b], expected, rtol=1e-5, atol=1e-5)
        predictor = without_prefix(checkpoint["predictor"])
        for m in range(2):
            tokens = predictor_oracle(expected, predictor, HEADS, keep, targets[m])
            torch.testing.assert_close(prediction[2 * m + b], tokens, rtol=1e-5, atol=1e-5)
        whole = vit_oracle(
            images[b], without_prefix(checkpoint["target_encoder"]), HEADS, list(range(PATCHES))
        )
        torch.testing.assert_close(teacher[b], whole, rtol=1e-5, atol=1e-5)


def test_a_partial_checkpoint_is_refused_with_the_whole_list_and_changes_nothing() -> None:
    checkpoint = public_checkpoint()
    del checkpoint["predictor"]
    del checkpoint["encoder"]["module.blocks.1.norm2.bias"]
    checkpoint["encoder"]["module.cls_token"] = torch.zeros(1, 1, WIDTH)
    checkpoint["target_encoder"]["module.pos_embed"] = torch.zeros(1, 4, WIDTH)
    checkpoint["target_encoder"]["module.norm.bias"] = "not a tensor"
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_ijepa(model, checkpoint)
    message = str(caught.value)
    for line in (
        "missing (2):",
        "  encoder.blocks.1.norm2.bias",
        "  predictor (the whole part)",
        "unexpected (1):",
        "  encoder.cls_token",
        "of another shape (2):",
        "  target_encoder.pos_embed: expected (1, 16, 32), got (1, 4, 32)",
        "  target_encoder.norm.bias: expected (32,), got str",
    ):
        assert line in message.splitlines()
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())


def test_single_parts_load_into_any_module() -> None:
    checkpoint = public_checkpoint()
    encoder = VisionTransformer(16, SIDE, WIDTH, depth=2, num_heads=HEADS)
    load_parts({"target_encoder": encoder}, checkpoint)
    state = without_prefix(checkpoint["target_encoder"])
    assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())


def test_compiled_and_wrapped_names_are_unwrapped() -> None:
    state = random_state(ENCODER, "module._orig_mod.")
    encoder = VisionTransformer(16, SIDE, WIDTH, depth=2, num_heads=HEADS)
    load_parts({"encoder": encoder}, {"encoder": state})
    assert torch.equal(encoder.norm.bias, state["module._orig_mod.norm.bias"])


def test_a_module_on_the_meta_device_takes_the_tensors() -> None:
    with torch.device("meta"):
        model = build()
    load_ijepa(model, public_checkpoint())
    assert model.encode(torch.randn(1, 3, 16, 16)).isfinite().all()


def test_low_precision_checkpoints_load_in_the_models_dtype() -> None:
    checkpoint = public_checkpoint()
    for part in ("encoder", "predictor", "target_encoder"):
        checkpoint[part] = {name: v.bfloat16() for name, v in checkpoint[part].items()}
    model = build()
    load_ijepa(model, checkpoint)
    assert model.encoder.norm.bias.dtype == torch.float32
    expected = checkpoint["encoder"]["module.norm.bias"].float()
    assert torch.equal(model.encoder.norm.bias, expected)


@pytest.mark.parametrize("name", ["model.pth.tar", "model.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_export_and_back(name: str, prefix: str, tmp_path: Path) -> None:
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    model, other = build(), build()
    load_ijepa(model, public_checkpoint())
    exported = export_ijepa(model, prefix)
    assert set(exported["encoder"]) == {prefix + parameter for parameter in ENCODER}
    assert set(exported["predictor"]) == {prefix + parameter for parameter in PREDICTOR}
    save_checkpoint(exported, tmp_path / name)
    load_ijepa(other, tmp_path / name)
    for parameter, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[parameter], value)


class Exploit:
    def __reduce__(self):
        return (print, ("this must never run",))


class Blocked:
    def __reduce__(self):
        return (os.system, ("this must never run",))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_files_that_would_run_code_are_refused(tmp_path: Path, capsys) -> None:
    torch.save({"encoder": Exploit()}, tmp_path / "zip.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"encoder": Exploit()}, protocol=2))
    torch.save({"encoder": Blocked()}, tmp_path / "blocked.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pth")
    for name in ("zip.pth", "bare.pth", "blocked.pth", "script.pth"):
        with pytest.raises(CheckpointError, match="expected tensors and plain values only"):
            read_checkpoint(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_files_of_another_form(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="expected a dictionary of parts, got Tensor"):
        read_checkpoint(tmp_path / "tensor.pth")
    for name in ("absent.pth", "absent.safetensors"):
        with pytest.raises(FileNotFoundError):
            read_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="got nothing"):
        load_ijepa(build(), {})


GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello there", b"<!DOCTYPE html>\n<html></html>", GIT_LFS],
    ids=["empty", "text", "html", "git lfs"],
)
def test_files_that_are_no_checkpoints(content: bytes, suffix: str, tmp_path: Path) -> None:
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated, empty or another format") as caught:
        load_ijepa(build(), path)
    assert f"{path}: expected a " in str(caught.value)
    assert f"got {len(content)} bytes that are not a readable checkpoint" in str(caught.value)
    assert "run code" not in str(caught.value)


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_truncated_files(form: str, tmp_path: Path) -> None:
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pth")
    if form == "safetensors":
        pytest.importorskip("safetensors")
        save_checkpoint({"encoder": {"a": torch.zeros(99)}}, path)
    else:
        torch.save({"encoder": torch.zeros(99)}, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for size in (1, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"got {size} bytes .* truncated, empty"):
            read_checkpoint(path)


def test_sources_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"source: expected the path .* got int; pass"):
        load_ijepa(build(), 3)


def test_a_mismatch_names_the_parts_only_where_they_differ() -> None:
    checkpoint = public_checkpoint()
    del checkpoint["encoder"]["module.norm.bias"]
    with pytest.raises(CheckpointError, match="does not fit; nothing was loaded"):
        load_ijepa(build(), checkpoint)
    del checkpoint["predictor"]
    with pytest.raises(CheckpointError, match="fit; expected the parts encoder, predictor"):
        load_ijepa(build(), checkpoint)


def test_models_that_are_no_ijepa_are_refused_with_what_loads_them() -> None:
    tijepa = TIJepa(None, image_dim=8, grid=(4, 4), width=16, depth=1, predictor_depth=1)
    with pytest.raises(TypeError, match=r'got TIJepa; .*{"target_encoder": model\.encoder}, path'):
        load_ijepa(tijepa, public_checkpoint())
    with pytest.raises(TypeError, match=r"got Linear; .*load_parts\("):
        load_ijepa(torch.nn.Linear(1, 1), public_checkpoint())


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize(("model_class", "rest"), [(ProbIJepa, "head"), (TCJepa, "conditioner")])
def test_what_a_checkpoint_does_not_hold_stays_and_is_logged(
    model_class: type[IJepa], rest: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = public_checkpoint(prefix)
    encoder = VisionTransformer(16, SIDE, WIDTH, depth=2, num_heads=HEADS)
    model = model_class(encoder, predictor_dim=INSIDE, predictor_depth=1)
    before = {name: value.clone() for name, value in model.get_submodule(rest).state_dict().items()}
    with caplog.at_level(logging.WARNING):
        load_ijepa(model, checkpoint)
    expected = f"holds no {rest}: that of the {model_class.__name__} stays as it was"
    assert expected in caplog.text
    for name, value in model.get_submodule(rest).state_dict().items():
        assert torch.equal(value, before[name])
    for part in ("encoder", "predictor", "target_encoder"):
        for name, value in model.get_submodule(part).state_dict().items():
            assert torch.equal(value, checkpoint[part][prefix + name])
    assert f"{prefix}predictor_proj.bias" in checkpoint["predictor"]
    checkpoint["predictor"][f"{prefix}predictor_other.bias"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"unexpected \(1\):\n  predictor.predictor_other"):
        load_ijepa(model, checkpoint)


def test_compiled_models_load(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    load_ijepa(torch.compile(model), public_checkpoint(""))
    assert torch.equal(model.encoder.norm.bias, public_checkpoint("")["encoder"]["norm.bias"])
    assert not caplog.records


def test_other_depths_are_said_before_the_list_of_names() -> None:
    encoder = VisionTransformer(16, SIDE, WIDTH, depth=1, num_heads=HEADS)
    model = IJepa(encoder, predictor_dim=INSIDE, predictor_depth=3)
    with pytest.raises(CheckpointError) as caught:
        load_ijepa(model, public_checkpoint())
    first = str(caught.value).splitlines()[0]
    for words in (
        "its encoder has depth 2, the model's 1: depth=2; ",
        "its predictor has depth 1, the model's 3: predictor_depth=1; ",
        "its target_encoder has depth 2",
    ):
        assert words in first


def test_old_torch_files_load(tmp_path: Path) -> None:
    torch.save(public_checkpoint(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_ijepa(build(), tmp_path / "old.pth")
