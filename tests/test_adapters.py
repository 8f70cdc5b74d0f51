"""Adapters, weight norms and hooks on layers of which something here reads the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from jepa_fast import IJepa
from jepa_fast.nn import per_caption
from jepa_fast.nn.heads import AutoregressiveHead, CouplingFlowHead, MixtureHead
from jepa_fast.nn.text_conditioner import Captions, WordConditioner
from jepa_fast.nn.vit import VisionTransformer


class LowRank(nn.Module):
    """A frozen layer and a product of two thin matrices, as LoRA wraps one: with its weight."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base: Any = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Module:
        base = copy.deepcopy(self.base)
        base.weight.data += self.up.weight @ self.down.weight
        return base


def with_hook(layer: nn.Module) -> Callable[[], int]:
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    return calls.__len__


MASK = torch.tensor([True, True, False, True])


@pytest.mark.parametrize("event", ["joint", "coordinate"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
def test_a_mixture_head_calls_its_layer_with_an_adapter(event: str, mask: Tensor | None) -> None:
    torch.manual_seed(0)
    head = MixtureHead(6, 5, num_components=3, event=event)
    condition, target = torch.randn(4, 6), torch.randn(4, 5)
    head.projection = adapter = LowRank(head.projection)
    loss = head(condition, target, mask)
    loss.backward()
    assert adapter.up.weight.grad.abs().sum() > 0
    head.projection = adapter.merged()
    torch.testing.assert_close(head(condition, target, mask), loss)


def test_a_mixture_head_runs_hooks_of_its_layer() -> None:
    torch.manual_seed(0)
    head = MixtureHead(6, 5)
    condition, target = torch.randn(4, 6), torch.randn(4, 5)
    before = head(condition, target)
    calls = with_hook(head.projection)
    torch.testing.assert_close(head(condition, target), before)
    assert calls() == 1


def conditioned(mlp: str | None) -> tuple[WordConditioner, Callable[[], Tensor]]:
    torch.manual_seed(0)
    conditioner = WordConditioner(8, 1, 6, per_caption=True)
    layer: Any = conditioner.layers[0]
    if mlp == "adapter":
        layer.mlp.fc2 = LowRank(layer.mlp.fc2)
    text = Captions(torch.randn(2, 3, 4, 6), torch.ones(2, 3, 4, dtype=torch.bool))
    tokens = torch.randn(4, 5, 8)
    return conditioner, lambda: conditioner(text)(0, tokens)


def test_captions_call_an_mlp_with_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_caption, "AT_ONCE", 0)  # in chunks, if the weights say all
    conditioner, output = conditioned("adapter")
    layer: Any = conditioner.layers[0]
    found = output()
    found.square().sum().backward()
    assert layer.mlp.fc2.up.weight.grad.abs().sum() > 0
    layer.mlp.fc2 = layer.mlp.fc2.merged()
    torch.testing.assert_close(output(), found)


@pytest.mark.parametrize("name", ["mlp", "mlp.fc1", "mlp.fc2", "norm"])
def test_captions_run_hooks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_caption, "AT_ONCE", 0)
    conditioner, output = conditioned(None)
    before = output()
    calls = with_hook(conditioner.layers[0].get_submodule(name))
    torch.testing.assert_close(output(), before)
    assert calls() == 1


READ = {
    "from_target": CouplingFlowHead,
    "from_condition": CouplingFlowHead,
    "hidden": CouplingFlowHead,
    "output": CouplingFlowHead,
    "0": AutoregressiveHead,
    "1": AutoregressiveHead,
    "last": AutoregressiveHead,
}


def of_head(name: str) -> tuple[Any, Any, str]:
    """A head, the module that has the layer, and the layer's name there."""
    torch.manual_seed(0)
    head: Any = READ[name](6, 5, hidden_dim=8)
    if isinstance(head, CouplingFlowHead):
        return head, head.couplings[1], name
    return (head, head, "output") if name == "last" else (head, head.hidden, name)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("change", [LowRank, nn.utils.weight_norm], ids=["lora", "weight norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_what_would_go_unheard_is_refused(name: str, change: Callable[..., nn.Module]) -> None:
    head, owner, attribute = of_head(name)
    setattr(owner, attribute, change(getattr(owner, attribute)))
    for question in (
        lambda: head(torch.randn(4, 6), torch.randn(4, 5)),
        lambda: head.distribution(torch.randn(4, 6)).sample(),
    ):
        with pytest.raises(TypeError, match=rf"{attribute} is read and not called"):
            question()


@pytest.mark.parametrize("name", READ)
def test_parametrizations_are_read(name: str) -> None:
    head, owner, attribute = of_head(name)
    nn.init.normal_(getattr(owner, attribute).weight)  # zeros have no norm to be divided by
    parametrizations.weight_norm(getattr(owner, attribute))
    head(torch.randn(4, 6), torch.randn(4, 5)).backward()
    weight = getattr(owner, attribute).parametrizations.weight.original1
    assert weight.grad is not None


def test_only_a_linear_layer_is_what_its_weights_say() -> None:
    head = CouplingFlowHead(6, 5, hidden_dim=8)
    head.couplings[0].hidden = nn.Identity()
    message = "Coupling: hidden is read .* got Identity"
    with pytest.raises(TypeError, match=message):
        head(torch.randn(4, 6), torch.randn(4, 5))


def test_a_teacher_without_the_adapters_of_its_network_is_refused() -> None:
    model = IJepa(VisionTransformer(16, 4, embed_dim=32, depth=1, num_heads=2), predictor_dim=16)
    model.encoder.blocks[0].mlp.fc1 = LowRank(model.encoder.blocks[0].mlp.fc1)
    parameters = len(list(model.encoder.parameters()))
    message = f"expected {parameters} parameters, .*got {parameters - 2}; change encoders"
    with pytest.raises(ValueError, match=message):
        model.update_target(0.9)
