"""Steps on CUDA tensors that hold no values, as torch's tracing has them: no GPU is needed.

A tensor made on the wrong device is an error there, and so is whatever asks a tensor for its value,
which would have the host wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from jepa_fast import IJepa, ProbIJepa, TCJepa, ops
from jepa_fast.masks import BlockMasks, BlockMaskSampler, PackedMasks, pack_masks
from jepa_fast.nn.heads import HEADS
from jepa_fast.optim import AdamWEma, parameter_groups, teacher_parameters

IMAGES = 3
SAMPLER = BlockMaskSampler((4, 4), num_targets=2, min_context=2)
SIZES: dict[str, Any] = {"img_size": 16, "predictor_dim": 12, "predictor_heads": 2}
ENCODER = "vit_tiny_patch4"
# TIJepa asks how long the unions of target blocks are, of masks on a GPU, too.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ijepa": lambda: IJepa(ENCODER, **SIZES),
    "tcjepa": lambda: TCJepa(ENCODER, text_dim=8, **SIZES),
    "per_caption": lambda: TCJepa(ENCODER, text_dim=8, per_caption=True, **SIZES),
    **{f"prob-{name}": lambda name=name: ProbIJepa(ENCODER, name, **SIZES) for name in HEADS},
}
each_model = pytest.mark.parametrize("name", MODELS)


def like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def moved(module: nn.Module) -> nn.Module:
    for each in module.modules():
        for name, parameter in list(each.named_parameters(recurse=False)):
            setattr(each, name, nn.Parameter(like(parameter), parameter.requires_grad))
        for name, buffer in list(each.named_buffers(recurse=False)):
            each._buffers[name] = like(buffer)
    return module


def words() -> tuple[Tensor, Tensor]:
    shape = (IMAGES, 2, 4)
    mask = torch.ones(shape, dtype=torch.bool, device="cuda")
    return torch.randn(*shape, 8, device="cuda"), mask


@each_model
@pytest.mark.parametrize("masks_are", ["padded", "packed", "packed, with slots left over"])
def test_models_stay_on_the_gpu_and_wait_for_nothing(name: str, masks_are: str) -> None:
    model = MODELS[name]()
    masks: BlockMasks | PackedMasks = SAMPLER(0, IMAGES)
    if masks_are != "padded":
        block = masks.targets.shape[2] + 2 if "left over" in masks_are else None
        (masks,) = pack_masks(masks, 200, block)
        assert (masks.target_mask is None) == (block is None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved(model)
        text = words() if isinstance(model, TCJepa) else ()
        output = model(torch.randn(IMAGES, 3, 16, 16, device="cuda"), masks.to("cuda"), *text)
        for x in (output.loss, output.prediction, output.target, *output.metrics.values()):
            assert x.device.type == "cuda"


def test_what_asks_for_a_value_is_seen() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        float(torch.ones((), device="cuda"))


@pytest.mark.parametrize("device", [None, "cuda"])
def test_optimizer_and_teacher_wait_for_nothing(device: str | None) -> None:
    model = MODELS["ijepa"]()
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved(model)
        momentum = 0.99 if device is None else torch.tensor(0.99, device=device)
        groups, targets = parameter_groups(model, weight_decay=0.05), teacher_parameters(model)
        optimizer = AdamWEma(groups, lr=1e-3, targets=targets)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step(momentum=momentum)
        model.update_target(momentum)


@pytest.mark.parametrize("name", ["mixture", "diffusion", "flow_matching"])
def test_samples_wait_for_nothing(name: str) -> None:
    model = MODELS[f"prob-{name}"]().eval()
    masks = SAMPLER(0, IMAGES)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        moved(model)
        images = torch.randn(IMAGES, 3, 16, 16, device="cuda")
        samples = model.predict_distribution(images, masks.to("cuda")).sample(2)
        assert samples.device.type == "cuda"


def test_masks_are_drawn_where_the_ids_are() -> None:
    with FakeTensorMode():
        masks = SAMPLER(0, torch.zeros(4, dtype=torch.int64, device="cuda"))
        assert {masks.context.device.type, masks.targets.device.type} == {"cuda"}


def test_noise_is_drawn_where_its_seed_is() -> None:
    with FakeTensorMode():
        target, share = torch.ones(4, 8, device="cuda"), torch.ones(4, device="cuda")
        x = ops.q_sample(target, share, share, ops.noise_seed(target.device))
        assert x.device.type == "cuda"
