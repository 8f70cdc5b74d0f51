"""The flow head and its couplings."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import device_mesh

from jepa_fast.nn.heads import CouplingFlowHead
from jepa_fast.nn.heads.couplings import ActNorm


def make_head(target_dim: int = 5, **options: Any) -> CouplingFlowHead:
    torch.manual_seed(0)
    head = CouplingFlowHead(4, target_dim, hidden_dim=8, **options).double()
    with torch.no_grad():  # away from the identity, where it starts
        for parameter in head.parameters():
            parameter.uniform_(-0.3, 0.3)
    return head.eval()


@pytest.mark.parametrize("masks", ["alternate", "random"])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_logdet_and_inverse(masks: str, width: int) -> None:
    head = make_head(width, masks=masks)
    condition = torch.randn(3, 4, dtype=torch.float64)
    z = torch.randn(3, width, dtype=torch.float64)
    u, logdet = head.to_noise(z, condition)
    torch.testing.assert_close(head.from_noise(u, condition), z)
    for i in range(3):
        matrix = torch.autograd.functional.jacobian(
            lambda row, i=i: head.to_noise(row[None], condition[i : i + 1])[0][0], z[i]
        )
        torch.testing.assert_close(torch.linalg.slogdet(matrix).logabsdet, logdet[i])


def as_if_trained(**options: Any) -> CouplingFlowHead:
    """A head of the usual size whose scales and shifts vary by about 0.24, ten times as much as
    those after some hundred steps.
    """
    torch.manual_seed(0)
    head = CouplingFlowHead(384, 384, **options)
    with torch.no_grad():
        for coupling in head.couplings:
            nn.init.normal_(coupling.output.weight, std=2 * coupling.output.in_features**-0.5)
    head(torch.randn(64, 384), torch.randn(64, 384))  # sets the norms
    return head


@pytest.mark.parametrize("memory_free", [False, True])
def test_in_training_it_works_under_torch_func(memory_free: bool) -> None:
    head = make_head(memory_free=memory_free).train()
    condition, z = torch.randn(6, 4).double(), torch.randn(6, 5).double()
    head(condition, z)  # sets the norms
    leaf = condition.clone().requires_grad_()
    (want,) = torch.autograd.grad(head(leaf, z), leaf)
    torch.testing.assert_close(torch.func.grad(lambda c: head(c, z))(condition), want)
    assert head.overflows == 0


@pytest.mark.parametrize("masks", ["alternate", "random"])
def test_inverse_in_float32_of_a_stack_as_if_trained(masks: str) -> None:
    head = as_if_trained(masks=masks).eval()
    condition, z = torch.randn(64, 384), torch.randn(64, 384)
    with torch.no_grad():
        u, _ = head.to_noise(z, condition)
        back = head.from_noise(u, condition)
    assert (u - z).std() > 0.5  # the flow does something
    assert (back - z).abs().max() < 1e-5


@pytest.mark.parametrize("width", [5, 6])
def test_masks_are_halves_and_complements(width: int) -> None:
    alternate = CouplingFlowHead(4, width).couplings
    assert [c.mask.tolist() for c in alternate[:2]] == [
        [i % 2 == 0 for i in range(width)],
        [i % 2 == 1 for i in range(width)],
    ]
    first, second = (CouplingFlowHead(4, width, masks="random", seed=s) for s in (0, 1))
    assert len(first.couplings) == 6
    for i in range(0, 6, 2):
        a, b = first.couplings[i].mask, first.couplings[i + 1].mask
        assert torch.equal(a, ~b)
        assert abs(int(a.sum()) - int(b.sum())) <= 1
    masks = [torch.stack([c.mask for c in head.couplings]) for head in (first, second)]
    assert not torch.equal(*masks)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.couplings[0].mask, first.couplings[0].mask)
    nn.init.normal_(first.couplings[1].output.weight)
    second.load_state_dict(first.state_dict())
    z, condition = torch.randn(3, width), torch.randn(3, 4)
    for got, want in zip(
        second.eval().to_noise(z, condition), first.eval().to_noise(z, condition), strict=True
    ):
        assert torch.equal(got, want)


def test_networks_read_what_passes_and_write_what_changes() -> None:
    """The parameters are those of whole layers; what a mask leaves out of them has no effect."""
    head = make_head(5)
    names = {name for name, _ in head.couplings[0].named_parameters()}
    layers = ("from_target", "hidden", "output")
    assert names == {f"{n}.{p}" for n in layers for p in ("weight", "bias")} | {
        "from_condition.weight"
    }
    coupling = head.couplings[0]
    assert coupling.from_target.weight.shape == (8, 5)
    assert coupling.output.weight.shape == (10, 8)
    condition, z = torch.randn(2, 3, 5, dtype=torch.float64).split([1, 1])
    condition, z = condition[0, :, :4], z[0]
    head(condition, z).backward()
    mask, both = coupling.mask, torch.cat([coupling.mask, coupling.mask])
    assert coupling.from_target.weight.grad[:, mask].all()
    assert not coupling.from_target.weight.grad[:, ~mask].any()
    assert coupling.output.weight.grad[~both].all()
    assert not coupling.output.weight.grad[both].any()
    before = head.to_noise(z, condition)
    with torch.no_grad():
        coupling.from_target.weight[:, ~mask] = math.nan
        coupling.output.weight[both] = math.nan
        coupling.output.bias[both] = math.nan
    for got, want in zip(head.to_noise(z, condition), before, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("width", [1, 2])
def test_density_integrates_to_one_and_samples_follow_it(width: int) -> None:
    head = make_head(width)
    condition = torch.randn(1, 4, dtype=torch.float64)
    axis = torch.linspace(-12, 12, 2001 if width == 1 else 241, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * width).view(-1, width)
    density = head.distribution(condition.expand(len(points), 4)).log_prob(points).exp()
    density = density * (axis[1] - axis[0]) ** width
    assert density.sum().item() == pytest.approx(1.0, abs=1e-3)
    mean = density @ points
    samples = head.float().distribution(condition.float()).sample(40_000)[:, 0]
    torch.testing.assert_close(samples.mean(0).double(), mean, rtol=0, atol=0.05)
    variance = density @ (points - mean).square()
    torch.testing.assert_close(samples.var(0).double(), variance, rtol=0.1, atol=0)


def test_loss_is_the_likelihood_and_has_exact_gradients() -> None:
    head = make_head(3)
    condition = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    log_prob = head.distribution(condition).log_prob(target)
    torch.testing.assert_close(head(condition, target), -log_prob.mean() / 3)
    for head.memory_free in (False, True):
        assert torch.autograd.gradcheck(head, (condition, target))


# The backward pass through the inverse.


def gradients(head: CouplingFlowHead, *inputs: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Of the loss, for condition, target and all parameters."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(head(*leaves) * scale, [*leaves, *head.parameters()]))


@pytest.mark.parametrize("masks", ["alternate", "random"])
@pytest.mark.parametrize("width", [1, 2, 5, 6])
def test_memory_free_gradients_are_those_of_autograd(masks: str, width: int) -> None:
    head = make_head(width, masks=masks)
    condition = torch.randn(7, 4, dtype=torch.float64)
    target = torch.randn(7, width, dtype=torch.float64)
    want = gradients(head, condition, target, scale=3.0)
    head.memory_free = True
    got = gradients(head, condition, target, scale=3.0)
    assert sum(float(grad.abs().sum()) for grad in want) > 1
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("masks", ["alternate", "random"])
def test_memory_free_gradients_in_float32_are_off_by_the_inverses_rounding(masks: str) -> None:
    head = as_if_trained(masks=masks)
    inputs = torch.randn(64, 384), torch.randn(64, 384)
    exact = gradients(copy.deepcopy(head).double(), *(x.double() for x in inputs))
    plain = gradients(head, *inputs)
    head.memory_free = True
    for got, eager, want in zip(gradients(head, *inputs), plain, exact, strict=True):
        assert (got - want).norm() <= 2 * (eager - want).norm() + 1e-7 * want.norm()
    assert not all(torch.equal(a, b) for a, b in zip(gradients(head, *inputs), plain, strict=True))


def test_memory_free_saves_as_much_for_many_couplings_as_for_one() -> None:
    """Beside the parameters and what of them counts."""
    tokens, kept = 1000, {}

    def saved_rows(couplings: int, memory_free: bool) -> int:
        head = CouplingFlowHead(4, 6, couplings, hidden_dim=8, memory_free=memory_free)
        found: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if tokens in x.shape:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        condition = torch.randn(tokens, 4, requires_grad=True)
        target = torch.randn(tokens, 6)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            head(condition, target)
        return sum(found.values())

    for couplings in (1, 8):
        kept[couplings] = saved_rows(couplings, memory_free=True)
    assert kept[8] == kept[1]
    assert saved_rows(8, memory_free=False) > 5 * kept[8]


def test_memory_free_computes_again_what_the_forward_pass_computed_under_autocast() -> None:
    head = as_if_trained(memory_free=True)
    inputs = torch.randn(64, 384), torch.randn(64, 384)
    exact = gradients(copy.deepcopy(head).double(), *(x.double() for x in inputs))
    errors = []
    for head.memory_free in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            leaves = [x.requires_grad_() for x in inputs]
            loss = head(*leaves)
        grads = torch.autograd.grad(loss, [*leaves, *head.parameters()])
        errors.append([(g - e).norm() / e.norm() for g, e in zip(grads, exact, strict=True)])
        assert all(g.dtype == torch.float32 for g in grads)
    for plain, inverted in zip(*errors, strict=True):
        assert 1e-4 < inverted < 1.5 * plain


def test_memory_free_leaves_out_gradients_that_nobody_needs() -> None:
    head = make_head(5, memory_free=True)
    frozen = head.couplings[0].hidden.weight.requires_grad_(False)
    condition = torch.randn(3, 4, dtype=torch.float64)
    head(condition, torch.randn(3, 5, dtype=torch.float64)).backward()
    assert frozen.grad is None
    assert all(p.grad is not None for p in head.parameters() if p is not frozen)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_without_variance_leaves_the_norms_to_the_next(rows: int, compiled: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    head = CouplingFlowHead(4, 5, num_couplings=2, hidden_dim=8)
    step = torch.compile(head, fullgraph=True, backend="aot_eager") if compiled else head
    step(torch.randn(rows, 4), torch.randn(rows, 5))
    assert not any(bool(norm.initialised) or norm.is_set for norm in head.norms)
    target = 50 + 3 * torch.randn(20, 5)
    step(torch.randn(20, 4), target)
    assert all(bool(norm.initialised) and norm.is_set for norm in head.norms)
    torch.testing.assert_close(head.norms[0].loc.detach(), target.mean(0))


def test_memory_free_compiles_without_a_break_as_plain_autograd() -> None:
    torch._dynamo.reset()
    head = make_head(5, num_couplings=2, memory_free=True)
    inputs = (torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64))
    want = gradients(head, *inputs)
    leaves = [x.requires_grad_() for x in inputs]
    loss = torch.compile(head, fullgraph=True, backend="aot_eager")(*leaves)
    got = torch.autograd.grad(loss, [*leaves, *head.parameters()])
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("memory_free", [False, True])
def test_there_is_no_second_derivative(memory_free: bool) -> None:
    """What is said to serve instead is the same with and without: neither mode has one."""
    head = make_head(5, memory_free=memory_free)
    condition = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    loss = head(condition, torch.randn(3, 5, dtype=torch.float64))
    (grad,) = torch.autograd.grad(loss, condition, create_graph=True)
    with pytest.raises(RuntimeError, match=r"use the plain PyTorch of .*/affine_coupling/ref"):
        grad.sum().backward()


# Targets that are too far out.


def test_evaluation_names_the_first_token_without_a_density() -> None:
    head = make_head(5).float()
    condition, z = torch.randn(4, 4), torch.randn(4, 5)
    distribution = head.distribution(condition)
    z[2, 3] = 1e25
    with torch.no_grad():
        with pytest.raises(
            ValueError,
            match=r"finite density, 1 of 4 have none: z\[2\] lies too far out for torch\.float32, "
            r"its largest \|coordinate\| is 1e\+25",
        ):
            distribution.log_prob(z)
        assert distribution.log_prob(z[:2].repeat(2, 1)).isfinite().all()
        z[1, 0] = math.inf
        with pytest.raises(ValueError, match=r"2 of 4 have none: z\[1\] is not finite itself"):
            distribution.log_prob(z)


@pytest.mark.parametrize("memory_free", [False, True])
def test_training_counts_targets_without_a_density(memory_free: bool) -> None:
    """The loss says so, too, at which the trainer stops."""
    head = make_head(5, memory_free=memory_free).float().train()
    condition, target = torch.randn(4, 4), torch.randn(4, 5)
    assert head(condition, target).isfinite()
    assert head.overflows.item() == 0
    target[1:3] = 1e30
    for times in (1, 2):
        assert not head(condition, target).isfinite()
        assert head.overflows.item() == 2 * times
    assert "overflows" not in head.state_dict()
    with torch.no_grad():
        head.overflows.zero_()
    assert head(condition, target[:1].expand(4, 5)).isfinite()
    assert head.overflows.item() == 0


def test_actnorm_is_set_by_the_first_training_batch_only() -> None:
    torch.manual_seed(0)
    norm = ActNorm(3)
    x = torch.tensor([5.0, -1.0, 0.0]) + torch.tensor([2.0, 0.1, 30.0]) * torch.randn(64, 3)
    norm.eval()
    assert torch.equal(norm(x)[0], x)
    assert not norm.initialised
    norm.train()
    y, logdet = norm(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(3))
    torch.testing.assert_close(logdet, -x.std(0, correction=0).log().sum())
    assert norm.initialised
    before = copy.deepcopy(norm.state_dict())
    norm(torch.randn(8, 3))
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
    torch.testing.assert_close(norm(y, inverse=True)[0], x)


def test_actnorm_survives_a_constant_coordinate_and_batches_without_a_variance() -> None:
    norm = ActNorm(2)
    for few in (torch.zeros(0, 2), torch.ones(1, 2)):
        assert torch.equal(norm(few)[0], few)
        assert not norm.initialised
    y, logdet = norm(torch.full((4, 2), 3.0))
    assert y.abs().max() == 0
    assert logdet.isfinite()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e200])
def test_a_first_batch_that_is_not_finite_sets_nothing(wrong: float) -> None:
    head = CouplingFlowHead(4, 3, hidden_dim=8).double()
    condition, target = torch.randn(2, 6, 4).double()[0], torch.randn(6, 3).double()
    spoilt = target.clone()
    spoilt[2, 1] = wrong
    with pytest.raises(ValueError, match=r"first training batch.* must be finite"):
        head(condition, spoilt)
    assert not any(norm.is_set for norm in head.norms)
    assert head(condition, target).isfinite()


def test_samples_that_overflow_are_told() -> None:
    head = CouplingFlowHead(4, 3, hidden_dim=8).eval()
    for norm in head.norms:
        nn.init.constant_(norm.log_scale, 16.0)
    distribution = head.distribution(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="sample: every coordinate must be finite"):
        distribution.sample(3)
    with pytest.raises(ValueError, match="sample: every coordinate must be finite"):
        _ = distribution.mean


def test_a_head_is_normalised_by_training_and_resumes_without_doing_it_again() -> None:
    torch.manual_seed(0)
    head = CouplingFlowHead(4, 3, hidden_dim=8)
    condition, target = torch.randn(32, 4), 5 + 3 * torch.randn(32, 3)
    head(condition, target)
    assert all(norm.initialised for norm in head.norms)
    u, _ = head.to_noise(target, condition)
    torch.testing.assert_close(u.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    resumed = CouplingFlowHead(4, 3, hidden_dim=8)
    resumed.load_state_dict(head.state_dict())
    other = torch.randn(32, 3)
    torch.testing.assert_close(resumed(condition, other), head(condition, other))
    # And a state dict from before the first batch makes the head start afresh.
    resumed.load_state_dict(CouplingFlowHead(4, 3, hidden_dim=8).state_dict())
    resumed(condition, target)
    torch.testing.assert_close(resumed.norms[0].loc, target.mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_free", [False, True])
def test_half_precision_rounds_the_norms_parameters_alone(
    dtype: torch.dtype, memory_free: bool
) -> None:
    """What they do to a target is undone, and counted, as in float32."""
    torch.manual_seed(0)
    head = CouplingFlowHead(4, 64, memory_free=memory_free).to(dtype)
    condition, z = torch.randn(9, 4), 5 + 3 * torch.randn(9, 64)
    head(condition, z).backward()  # sets them; its couplings are the identity
    assert head.norms[0].loc.grad.dtype == dtype
    wide = copy.deepcopy(head).double()
    u, logdet = head.to_noise(z, condition)
    expected, expected_logdet = wide.to_noise(z.double(), condition.double())
    torch.testing.assert_close(u.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logdet.double(), expected_logdet, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(head.from_noise(u, condition), z, rtol=1e-5, atol=1e-5)
    norm = head.norms[0]
    y, change = norm(z)
    back, undone = norm(y, inverse=True)
    torch.testing.assert_close(back, z, rtol=1e-5, atol=1e-5)
    assert change.item() == -undone.item() == pytest.approx(-norm.log_scale.double().sum().item())


def test_questions_leave_the_norms_to_the_first_batch() -> None:
    """A model is in training mode from the start, and may be asked before it is trained."""
    torch.manual_seed(0)
    head = CouplingFlowHead(4, 3, hidden_dim=8, moment_samples=8)
    condition, target = torch.randn(32, 4), 5 + 3 * torch.randn(32, 3)
    distribution = head.distribution(condition)
    assert distribution.entropy.isfinite().all()
    with torch.no_grad():
        distribution.log_prob(torch.randn(32, 3))
    assert not any(norm.initialised for norm in head.norms)
    with torch.no_grad():
        head(condition, target)
    torch.testing.assert_close(head.norms[0].loc, target.mean(0))
    # A training loop of one's own.
    other = CouplingFlowHead(4, 3, hidden_dim=8)
    other.distribution(condition).log_prob(target)
    torch.testing.assert_close(other.norms[0].loc, target.mean(0))


def test_actnorm_over_two_processes_is_that_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(10, 3) * 4 + 1
    mine, theirs = x[:4].double(), x[4:].double()

    def add_the_other_process(sums: Tensor) -> None:
        count = torch.full((3,), 6.0, dtype=torch.float64)
        sums += torch.stack([count, theirs.sum(0), theirs.square().sum(0)])

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", add_the_other_process)
    norm = ActNorm(3)
    norm(mine.float())
    torch.testing.assert_close(norm.loc, x.mean(0))
    torch.testing.assert_close(norm.log_scale, x.std(0, correction=0).log())


def test_a_first_batch_does_not_set_what_fsdp_would_lose(one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = device_mesh.init_device_mesh("cpu", (1,))
    head, condition, target = CouplingFlowHead(4, 3), torch.randn(9, 4), 5 + 3 * torch.randn(9, 3)
    fully_shard(head, mesh=mesh)
    with pytest.raises(RuntimeError, match=r"first training batch.* before FSDP shards them"):
        head(condition, target)
    assert not any(norm.initialised for norm in head.norms)

    head = CouplingFlowHead(4, 3)
    expected = head(condition, target)
    fully_shard(head, mesh=mesh)
    for _ in range(2):
        loss = head(condition, target)
        loss.backward()
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": "checkerboard"}, "masks must be one of"),
        ({"num_couplings": 0}, "num_couplings must be at least 1"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"scale_bound": 0.0}, "scale_bound must be positive"),
    ],
)
def test_bad_coupling_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"CouplingFlowHead: {message}"):
        CouplingFlowHead(4, 3, **options)
