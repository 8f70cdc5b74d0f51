"""AdamWEma: torch.optim.AdamW and then the EMA, in every way that training uses an optimizer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)

from jepa_fast.optim import (
    AdamWEma,
    copy_teacher_buffers,
    parameter_groups,
    teacher_parameters,
)

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.1}
pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For these few numbers; on a busy machine it takes long until others have come."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class _Student(nn.Module):
    """A network with a teacher, and a parameter that no teacher follows."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 6)).to(dtype)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.head = nn.Linear(6, 1).to(dtype)

    def teachers(self) -> Any:
        yield self.teacher, self.encoder

    def loss(self, step: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        weight = next(self.parameters())
        x = torch.randn(8, 6, generator=generator).to(weight.dtype)
        return scale * (self.head(self.encoder(x)) - x.sum(1, keepdim=True)).square().mean()

    def shadows(self, dtype: torch.dtype = torch.bfloat16) -> list[tuple[Tensor, Tensor]]:
        return [(p, torch.zeros_like(p, dtype=dtype)) for p in self.teacher.parameters()]


def _ours(model: _Student, **options: Any) -> AdamWEma:
    targets = teacher_parameters(model)
    return AdamWEma(parameter_groups(model, 0.1), **{**OPTIONS, **options}, targets=targets)


def _theirs(model: _Student, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, 0.1), **{**OPTIONS, "fused": True, **options})


def _ema(model: _Student, momentum: float) -> None:
    with torch.no_grad():
        for target, source in zip(
            model.teacher.parameters(), model.encoder.parameters(), strict=True
        ):
            wide = torch.promote_types(target.dtype, torch.float32)
            target.copy_(torch.lerp(target.to(wide), source.to(wide), 1 - momentum))


def _assert_same(one: nn.Module, other: nn.Module, rtol: float) -> None:
    for (name, got), want in zip(one.named_parameters(), other.parameters(), strict=True):
        scale = want.abs().max().item()
        torch.testing.assert_close(
            got, want, rtol=0, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("dtype", "fused", "rtol"),
    [
        (torch.float32, True, 2e-5),
        (torch.float32, None, 2e-5),
        (torch.float64, True, 1e-13),
        (torch.float64, None, 1e-13),
        (torch.bfloat16, True, 0.05),
        (torch.float16, True, 0.01),
    ],
    ids=str,
)
def test_200_steps_are_those_of_adamw_and_the_moving_average(
    dtype: torch.dtype, fused: bool | None, rtol: float
) -> None:
    """On the same gradients: training on its own would enlarge differences in the last bit."""
    one, other = _Student(dtype), _Student(dtype)
    ours, theirs = _ours(one, eps=1e-4), _theirs(other, fused=fused, eps=1e-4)
    for step in range(200):
        momentum = 0.9 + 0.1 * step / 200
        loss = other.loss(step)
        loss.backward()
        for mine, p in zip(one.parameters(), other.parameters(), strict=True):
            mine.grad = None if p.grad is None else p.grad.clone()
        ours.step(momentum=momentum)
        theirs.step()
        _ema(other, momentum)
        theirs.zero_grad()
    _assert_same(one, other, rtol)
    assert all(float(state["step"]) == 200 for state in ours.state.values())


def test_training_is_that_of_adamw() -> None:
    """Each on its own gradients, for fewer steps."""
    one, other = _Student(torch.float64), _Student(torch.float64)
    ours, theirs = _ours(one), _theirs(other)
    ours.momentum = 0.9
    losses = []
    for step in range(50):
        for model, optimizer in ((one, ours), (other, theirs)):
            loss = model.loss(step)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _ema(other, 0.9)
    _assert_same(one, other, 1e-9)
    assert losses[-1] < losses[0]


def test_shadows_are_the_targets_in_another_dtype() -> None:
    model = _Student()
    shadows = model.shadows()
    optimizer = _ours(model, shadows=shadows)
    model.loss(0).backward()
    optimizer.step(momentum=0.5)
    for target, shadow in shadows:
        assert torch.equal(shadow, target.bfloat16())


def test_a_parameter_without_a_gradient_still_has_its_average_taken() -> None:
    model = _Student()
    model.encoder[0].requires_grad_(False)  # in no group then
    model.encoder[2].weight.requires_grad_(True)
    shadows = model.shadows()
    optimizer = _ours(model, shadows=shadows)
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(1)
    before = [p.clone() for p in model.teacher.parameters()]
    optimizer.step(momentum=0.75)  # no gradient at all
    for (target, shadow), old, source in zip(
        shadows, before, model.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * source.detach())
        assert torch.equal(shadow, target.bfloat16())
    assert not optimizer.state


def test_groups_have_options_of_their_own() -> None:
    models = [_Student(torch.float64) for _ in range(2)]
    optimizers = []
    for model, kind in zip(models, (AdamWEma, torch.optim.AdamW), strict=True):
        groups = [
            {"params": list(model.encoder.parameters()), "lr": 0.1, "weight_decay": 0.5},
            {"params": list(model.head.parameters()), "betas": (0.5, 0.5), "maximize": True},
        ]
        optimizers.append(kind(groups, **OPTIONS))
        for _ in range(3):
            model.zero_grad()
            model.loss(0).backward()
            optimizers[-1].step()
    _assert_same(*models, 1e-12)


@pytest.mark.parametrize("fused", [True, None], ids=["fused", "default"])
def test_state_dicts_load_into_and_from_adamw(fused: bool | None, tmp_path: Path) -> None:
    def trained(model: _Student, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model.loss(step).backward()
            optimizer.step()

    straight = _Student(torch.float64)
    trained(straight, _theirs(straight, fused=fused), range(10))
    for first, second in ((_ours, _theirs), (_theirs, _ours)):
        model = _Student(torch.float64)
        before = first(model) if first is _ours else first(model, fused=fused)
        trained(model, before, range(5))
        torch.save(before.state_dict(), tmp_path / "state.pt")
        after = second(model) if second is _ours else second(model, fused=fused)
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        after.load_state_dict(state)
        trained(model, after, range(5, 10))
        for (name, p), want in zip(model.named_parameters(), straight.parameters(), strict=True):
            if not name.startswith("teacher"):
                torch.testing.assert_close(p, want, rtol=1e-9, atol=1e-12)
    one, other = _ours(_Student()), _theirs(_Student())
    assert one.param_groups[0].keys() == other.param_groups[0].keys()
    model = _Student()
    trained(model, optimizer := _ours(model), range(1))
    state = next(iter(optimizer.state.values()))
    assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
    assert (state["step"].dtype, state["step"].ndim) == (torch.float32, 0)


def test_a_state_with_betas_that_are_tensors_loads() -> None:
    """As torch takes them for implementations that are capturable, or go tensor by tensor."""
    betas = torch.tensor(0.5), torch.tensor(0.75)
    before, after = (nn.Parameter(torch.ones(3)) for _ in range(2))
    theirs = torch.optim.AdamW([before], betas=betas, foreach=False, capturable=False)
    before.grad = torch.ones(3)
    theirs.step()
    ours = AdamWEma([after])
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["betas"] == (0.5, 0.75)
    with torch.no_grad():
        after.copy_(before)
    before.grad = after.grad = torch.full((3,), 2.0)
    theirs.step()
    ours.step()
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("rounding_seed", [None, 1])
def test_groups_without_parameters(rounding_seed: int | None) -> None:
    """torch takes them, to be filled later."""
    p, teacher = (torch.ones(3, dtype=torch.bfloat16) for _ in range(2))
    p = nn.Parameter(p)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [p]}, {"params": []}]
    optimizer = AdamWEma(groups, lr=0.1, targets=[(p, teacher)], rounding_seed=rounding_seed)
    p.grad = torch.ones_like(p)
    optimizer.step(momentum=0.0)
    assert torch.equal(teacher, p.detach())
    assert p.lt(1).all()
    p.grad = None
    optimizer.step(momentum=0.0)
    fresh = AdamWEma(groups, targets=[(p, teacher)], rounding_seed=rounding_seed)
    fresh.load_state_dict(optimizer.state_dict())
    fresh.step(momentum=0.0)


def test_steps_are_on_the_parameters_device_whatever_the_default_is() -> None:
    """As of `torch.set_default_device("cuda")` with parameters on the CPU."""

    def moved() -> tuple[Tensor, Tensor]:
        p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device="cpu"))
        teacher = torch.zeros_like(p, requires_grad=False)
        optimizer = AdamWEma([p], lr=0.1, targets=[(p, teacher)], rounding_seed=1)
        p.grad = torch.ones_like(p)
        optimizer.step(momentum=0.5)
        p.grad = None
        optimizer.step(momentum=0.5)
        return p.detach(), teacher

    expected = moved()
    with torch.device("meta"):
        got = moved()
    assert all(map(torch.equal, got, expected))


def test_amsgrad_is_refused_wherever_it_is_named() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    assert not AdamWEma([parameter], amsgrad=False).param_groups[0]["amsgrad"]
    for group in ({"params": [parameter], "amsgrad": True}, {"params": [parameter]}):
        with pytest.raises(ValueError, match="AdamWEma: amsgrad is not supported"):
            AdamWEma([group], amsgrad="amsgrad" not in group)


def test_amsgrad_is_refused_from_a_state_too() -> None:
    state = _theirs(_Student(), amsgrad=True, lr=0.5).state_dict()
    optimizer = _ours(_Student())
    with pytest.raises(ValueError, match="amsgrad is not supported"):
        optimizer.load_state_dict(state)
    assert all(not group["amsgrad"] and group["lr"] == 1e-2 for group in optimizer.param_groups)


def test_the_state_of_another_optimizer_is_refused() -> None:
    student = _Student()
    sgd = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    sgd.step()
    optimizer = _ours(_Student())
    with pytest.raises(ValueError, match=r"expected the state of an AdamW.*momentum_buffer"):
        optimizer.load_state_dict(sgd.state_dict())
    assert not optimizer.state
    assert all(group["lr"] == 1e-2 for group in optimizer.param_groups)


@pytest.mark.parametrize("rounding_seed", [None, 1])
def test_distributed_checkpoints_leave_the_teacher_where_it_is(rounding_seed: int | None) -> None:
    """They have an optimizer without a state take a step with gradients and rates of zero."""
    model = _Student(torch.bfloat16)
    optimizer = _ours(model, momentum=0.5, rounding_seed=rounding_seed)
    for step in range(3):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    resumed = _Student(torch.bfloat16)
    resumed.load_state_dict(model.state_dict())
    fresh = _ours(resumed, momentum=0.5, rounding_seed=rounding_seed)
    get_optimizer_state_dict(resumed, fresh)
    fresh = _ours(resumed, momentum=0.5, rounding_seed=rounding_seed)
    set_optimizer_state_dict(resumed, fresh, saved[1])
    assert all(map(torch.equal, model.teacher.parameters(), resumed.teacher.parameters()))
    for one, each in ((model, optimizer), (resumed, fresh)):
        one.loss(3).backward()
        each.step()
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_a_rate_of_zero_still_moves_the_teacher() -> None:
    """As at the first step of a warm-up."""
    model = _Student()
    optimizer = _ours(model, lr=0.0, momentum=0.0)
    nn.init.ones_(model.teacher[0].weight)
    model.loss(0).backward()
    optimizer.step()
    assert torch.equal(model.teacher[0].weight, model.encoder[0].weight)


def test_copies_and_pickles_keep_their_teacher() -> None:
    model = _Student()
    model, optimizer = copy.deepcopy((model, _ours(model, momentum=0.5, shadows=model.shadows())))
    teacher = [p.clone() for p in model.teacher.parameters()]
    model.loss(0).backward()
    optimizer.step()
    assert not all(map(torch.equal, teacher, model.teacher.parameters()))
    assert pickle.loads(pickle.dumps(optimizer)).momentum == 0.5


def test_a_compiled_step_is_compiled_for_good() -> None:
    """Once to make the state and once with it, though gradients are others at every step."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    one, other = _Student(), _Student()
    # A rate that changes is a tensor, as with all of PyTorch's optimizers that are compiled.
    ours = [_ours(model, lr=torch.tensor(1e-2), shadows=model.shadows()) for model in (one, other)]
    steps = [torch.compile(ours[0].step, backend=graphs), ours[1].step]
    for i in range(5):
        for model, optimizer, step in zip((one, other), ours, steps, strict=True):
            optimizer.zero_grad()
            model.loss(i).backward()
            for group in optimizer.param_groups:
                group["lr"].fill_(1e-2 / (i + 1))
            step(momentum=0.9 + 0.01 * i)
    for got, want in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(got, want)
    assert graphs.frame_count <= 2


def test_schedulers_work() -> None:
    model = _Student()
    optimizer = _ours(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    seen = []
    for step in range(10):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step(momentum=0.9)
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen[-1] == pytest.approx(0.0, abs=1e-9)
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_grad_scaler_works(unscale_first: bool) -> None:
    """With an overflow on the way, and clipping of what was unscaled."""
    models = [_Student() for _ in range(2)]
    scales = []
    for model, make in zip(models, (_ours, _theirs), strict=True):
        optimizer = make(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for step in range(8):
            optimizer.zero_grad()
            scaler.scale(model.loss(step, float("inf") if step == 2 else 1.0)).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=True)
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
        assert all(float(state["step"]) == 7 for state in optimizer.state.values())
    for one, other in zip(
        models[0].encoder.parameters(), models[1].encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert scales[0] == scales[1]


def test_clipping_by_foreach_works() -> None:
    model = _Student()
    optimizer = _ours(model)
    model.loss(0).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True)
    assert norm > 0.1
    optimizer.step()


def test_a_closure_gives_the_loss_and_momentum_may_be_a_tensor() -> None:
    model = _Student()
    optimizer = _ours(model, momentum=torch.tensor(0.0))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(0)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss is not None
    assert loss.requires_grad
    for target, source in zip(model.teacher.parameters(), model.encoder.parameters(), strict=True):
        assert torch.equal(target, source)


def test_a_seed_draws_anew_every_step_and_again_after_resuming() -> None:
    def trained(model: _Student, optimizer: AdamWEma, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model.loss(step).backward()
            optimizer.step(momentum=0.9)

    brain = torch.bfloat16
    straight, broken, other = (_Student(brain) for _ in range(3))
    trained(straight, _ours(straight, rounding_seed=1), range(6))
    trained(other, _ours(other, rounding_seed=2), range(6))
    optimizer = _ours(broken, rounding_seed=1)
    trained(broken, optimizer, range(3))
    resumed = _ours(broken, rounding_seed=1)
    resumed.load_state_dict(optimizer.state_dict())
    trained(broken, resumed, range(3, 6))
    assert all(map(torch.equal, straight.parameters(), broken.parameters()))
    assert not torch.equal(straight.encoder[0].weight, other.encoder[0].weight)

    p = [nn.Parameter(torch.ones(1000, dtype=brain)) for _ in range(2)]
    optimizer = AdamWEma([{"params": p[:1]}, {"params": p[1:]}], lr=1e-4, rounding_seed=3)
    drawn = []
    for _ in range(2):
        for each in p:
            each.grad = torch.ones_like(each)
            each.data.fill_(1)
        optimizer.step()
        drawn += [each.detach().clone() for each in p]
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, two) for two in drawn[:i])


def test_every_bit_of_a_seed_counts() -> None:
    drawn = []
    for seed in (3, 3 + 2**24, 3 + 2**40, 3 - 2**24, 2**63 + 3):
        p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        AdamWEma([p], lr=1e-4, rounding_seed=seed).step()
        drawn.append(p.detach())
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, two) for two in drawn[:i])


@pytest.mark.parametrize("frozen", ["first", "all"])
def test_steps_draw_anew_without_updates(frozen: str) -> None:
    """A count of a parameter's updates would stand still, and the average with it."""
    params = [nn.Parameter(torch.full((1000,), 2.0)) for _ in range(2)]
    teachers = [torch.ones(1000, dtype=torch.bfloat16) for _ in params]
    optimizer = AdamWEma(
        params, lr=0.0, targets=zip(params, teachers, strict=True), momentum=0.999, rounding_seed=3
    )
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(momentum=1.0)
    for p in params if frozen == "all" else params[:1]:
        p.grad = None
    for _ in range(400):
        optimizer.step()
    for teacher in teachers:
        assert teacher.float().mean().item() == pytest.approx(2 - 0.999**400, abs=0.01)


def test_sparse_and_complex_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AdamWEma(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"takes real parameters, got torch\.complex64"):
        AdamWEma([torch.zeros(3, dtype=torch.complex64, requires_grad=True)])


P, Q, R = (torch.zeros(3) for _ in range(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"targets": [(P, torch.zeros(4))]}, r"targets: both of a pair must be of one shape"),
        ({"targets": [(P, Q), (P, R)]}, "targets: a tensor is listed twice"),
        ({"targets": [(P, R), (Q, R)]}, "targets: a target is listed twice"),
        ({"targets": [(P, Q)], "shadows": [(R, R)]}, "shadows must be of all targets"),
        ({"targets": {P: Q}, "shadows": {Q: torch.zeros(4)}}, "shadows: both of a pair"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AdamWEma: .*{message}"):
        AdamWEma([nn.Parameter(torch.zeros(3))], **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": [(P, Q.int())]}, TypeError, "targets must be of a floating dtype"),
        ({"momentum": 2.0}, ValueError, r"momentum must be in \[0, 1\], got 2.0"),
        ({"momentum": "high"}, TypeError, "momentum must be a real number or a tensor, got str"),
        ({"lr": "high"}, TypeError, "lr must be a real number or a tensor, got str"),
        ({"lr": torch.ones(2)}, ValueError, "a lr tensor must be one floating number, got .*2"),
        ({"lr": torch.tensor(1)}, ValueError, "a lr tensor must be one floating number, got .*int"),
        ({"weight_decay": torch.ones(0)}, ValueError, "a weight_decay tensor must be one"),
        ({"momentum": torch.ones(2)}, ValueError, "a momentum tensor must be one floating number"),
        ({"momentum": torch.ones(1)}, ValueError, "a momentum tensor must be floating and 0-dim"),
        ({"eps": torch.tensor(1e-8)}, TypeError, "eps must be a real number, got Tensor"),
        ({"betas": (torch.tensor(0.9), 0.9)}, TypeError, "betas must be a real number, got Tensor"),
        ({"betas": 0.9}, TypeError, "betas must be a pair of numbers, got 0.9"),
        ({"betas": (0.9, 0.9, 0.9)}, TypeError, "betas must be a pair of numbers"),
        ({"rounding_seed": 1.5}, TypeError, "rounding_seed must be None or an integer, got 1.5"),
        ({"momentum": torch.tensor(2.0)}, ValueError, r"momentum must be in \[0, 1\], got 2.0"),
        ({"targets": 3}, TypeError, "targets must be pairs of tensors, or a dict of them, got int"),
        ({"targets": [(P,)]}, TypeError, "targets must be pairs of tensors"),
        ({"targets": [(1, 2)]}, TypeError, "targets must be a tensor, got int"),
        ({"maximize": "yes"}, TypeError, "maximize must be True or False, got 'yes'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*'auto'.*, got 'gpu'"),
    ],
)
def test_options_are_refused_when_they_are_given(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"AdamWEma: {message}"):
        AdamWEma([nn.Parameter(torch.zeros(3))], **options)


def test_pairs_the_wrong_way_round_are_refused() -> None:
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"AdamWEma: targets must be pairs .*; swap them"):
        AdamWEma(student.parameters(), targets=pairs)
    both = [*student.parameters(), *teacher.requires_grad_(False).parameters()]
    AdamWEma(both, targets=[(mine, theirs) for theirs, mine in pairs])


def test_a_momentum_without_its_name_is_refused() -> None:
    optimizer: Any = AdamWEma([nn.Parameter(torch.zeros(3))])
    with pytest.raises(TypeError, match=r"closure must be .* got 0\.996; .*step\(momentum="):
        optimizer.step(0.996)


def test_a_momentum_out_of_range_is_refused_before_anything_moves() -> None:
    first, second, target = (nn.Parameter(torch.ones(3)) for _ in range(3))
    groups = [{"params": [first]}, {"params": [second]}]
    optimizer = AdamWEma(groups, targets=[(second, target.detach())])
    (first.sum() + second.sum()).backward()
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 1\.5"):
        optimizer.step(momentum=torch.tensor(1.5))
    with pytest.raises(ValueError, match="a momentum tensor must be floating and 0-dim"):
        optimizer.step(momentum=torch.tensor([0.5]))
    assert first.eq(1).all()
    assert not optimizer.state


def test_where_no_kernel_serves_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JEPA_FAST_BACKEND", "reference")
    one, other = _Student(torch.float64), _Student(torch.float64)
    for model, optimizer in ((one, _ours(one)), (other, _theirs(other))):
        model.loss(0).backward()
        optimizer.step()
    _ema(other, 0.996)
    _assert_same(one, other, 1e-12)


def test_every_pair_of_the_models_is_followed() -> None:
    from jepa_fast import IJepa

    model = IJepa("vit_tiny_patch16", img_size=32, predictor_dim=48, predictor_depth=1)
    pairs = teacher_parameters(model)
    assert [id(p) for p, _ in pairs] == [id(p) for p in model.encoder.parameters()]
    assert [id(t) for _, t in pairs] == [id(t) for t in model.target_encoder.parameters()]


def test_wrapped_models_have_the_teachers_of_what_they_wrap(one_process: None) -> None:
    model = _Student()
    model.encoder.register_buffer("count", torch.ones(1))
    model.teacher.register_buffer("count", torch.zeros(1))
    wrapped = nn.parallel.DistributedDataParallel(model)
    expected = [(id(p), id(t)) for p, t in teacher_parameters(model)]
    for each in (wrapped, torch.compile(model), torch.compile(wrapped)):
        assert [(id(p), id(t)) for p, t in teacher_parameters(each)] == expected
        model.teacher.count.zero_()
        copy_teacher_buffers(each)
        assert model.teacher.count == 1
    with pytest.raises(TypeError, match=r"model: expected one of jepa_fast, .* got Linear"):
        teacher_parameters(nn.Linear(1, 1))
