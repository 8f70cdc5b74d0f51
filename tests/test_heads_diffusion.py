"""The diffusion head."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from jepa_fast import ops
from jepa_fast.nn.heads import DiffusionHead, adaln
from jepa_fast.nn.heads.diffusion import alpha_bar


def test_linear_schedule() -> None:
    remaining = alpha_bar("linear", 1000)
    expected = 1.0
    for t in range(1000):
        expected *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert remaining[t].item() == pytest.approx(expected, rel=1e-9)
    # Fewer steps end at about the same noise.
    assert alpha_bar("linear", 250)[-1].item() == pytest.approx(expected, rel=0.25)


def test_cosine_schedule() -> None:
    remaining = alpha_bar("cosine", 1000)

    def level(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 500, 990):
        assert remaining[t].item() == pytest.approx(level(t + 1) / level(0), rel=1e-6)
    assert 0 < remaining[-1] < 1e-5


class ExactNoise(nn.Module):
    """The noise a perfect network sees where the targets are normal with this mean and std."""

    def __init__(self, head: DiffusionHead, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.signal, self.noise = head.signal, head.noise
        self.mean, self.std = mean, std

    def condition(self, condition: Tensor) -> Tensor:
        return condition

    def at(self, times: Tensor, condition: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        for time in times:
            yield functools.partial(self.forward, time=time, condition=condition)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        signal, noise = self.signal[time].unsqueeze(-1), self.noise[time].unsqueeze(-1)
        variance = (signal * self.std).square() + noise.square()
        return noise * (x - signal * self.mean) / variance


def exact_head(**options) -> tuple[DiffusionHead, torch.distributions.Normal]:
    mean, std = torch.tensor([1.0, -0.5, 0.0]), torch.tensor([0.5, 0.8, 0.2])
    head = DiffusionHead(4, 3, hidden_dim=8, clip=math.inf, **options)
    head.network = ExactNoise(head, mean, std)
    return head, torch.distributions.Normal(mean, std)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_approach_the_data_with_more_steps(schedule: str, sampler: str) -> None:
    head, truth = exact_head(schedule=schedule, sampler=sampler)
    distribution = head.distribution(torch.zeros(2, 4))
    errors = []
    for head.steps in (25, 500):
        samples = distribution.sample(4000, torch.Generator().manual_seed(0))
        assert samples.shape == (4000, 2, 3)
        assert ((samples.mean((0, 1)) - truth.mean) / truth.stddev).abs().max() < 0.05
        errors.append((samples.std((0, 1)) / truth.stddev - 1).abs().max().item())
    assert errors[1] < 0.04 < errors[0]


def test_ddpm_visiting_every_timestep_is_the_papers_ancestral_sampling() -> None:
    """Mean and variance carried through equations 6 and 7 of arXiv 2006.11239."""
    head, truth = exact_head(sampler="ddpm", timesteps=20, steps=20)
    remaining = alpha_bar("linear", 20)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for t in reversed(range(20)):
        before = remaining[t - 1] if t else torch.tensor(1.0)
        alpha = remaining[t] / before
        on_target = before.sqrt() * (1 - alpha) / (1 - remaining[t])
        on_x = alpha.sqrt() * (1 - before) / (1 - remaining[t])
        # The exact network's target is linear in x: posterior mean of a normal.
        gain = remaining[t].sqrt() * truth.variance
        gain = gain / (remaining[t] * truth.variance + 1 - remaining[t])
        target_mean = truth.mean + gain * (mean - remaining[t].sqrt() * truth.mean)
        mean = on_target * target_mean + on_x * mean
        fresh = (1 - before) / (1 - remaining[t]) * (1 - alpha)
        variance = (on_target * gain + on_x).square() * variance + fresh
    samples = head.distribution(torch.zeros(1, 4)).sample(40_000).double()[:, 0]
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(samples.var(0), variance, rtol=0.04, atol=0)


def test_few_steps_narrow_a_standard_normal_by_what_the_head_documents() -> None:
    """Exactly: its network tells noise[t] * x, so that variances follow a recursion."""
    described = re.findall(r"(?<![\d.])0\.[89]\d(?!\d)", DiffusionHead.__doc__ or "")
    found = []
    for sampler, steps in itertools.product(["ddim", "ddpm"], [50, 200]):
        head = DiffusionHead(4, 3, hidden_dim=8, sampler=sampler, steps=steps)
        remaining = alpha_bar("linear", 1000)
        levels = [*remaining[head.visited()], torch.ones((), dtype=torch.float64)]
        variance = 1.0
        for now, later in itertools.pairwise(levels):
            kept = torch.zeros(()) if sampler == "ddim" else 1 - now / later
            fresh = (1 - later) / (1 - now) * kept
            gain = (now * later).sqrt() + ((1 - now) * (1 - later - fresh).clamp(min=0)).sqrt()
            variance = gain**2 * variance + fresh
        found.append(f"{variance:.2f}")
    assert described == found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_weights_and_no_tables(dtype: torch.dtype) -> None:
    """Also not the frequencies of time: up to 1000 radians, rounded they are off by whole ones."""
    head = DiffusionHead(4, 3, hidden_dim=8)
    half = copy.deepcopy(head).to(dtype)
    assert half.network.input.weight.dtype == dtype
    for name in ("signal", "noise", "network.signal", "network.noise", "network.time.frequencies"):
        assert torch.equal(half.get_buffer(name), head.get_buffer(name))
        assert copy.deepcopy(half).to("meta").get_buffer(name).is_meta
        assert copy.deepcopy(head).double().get_buffer(name).dtype == torch.float64
    time = torch.linspace(0, 1, 100)
    expected = head.network.time(time)
    error = half.network.time(time).float() - expected
    assert error.abs().max() < 0.03 * expected.abs().max()


def test_frequencies_are_the_same_under_any_default_dtype() -> None:
    expected = adaln.TimeEmbedding(8).frequencies
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = adaln.TimeEmbedding(8).frequencies
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_samples_of_ddpm_in_bfloat16_are_as_wide_as_in_float32() -> None:
    """Its steps are small: two signals of one bfloat16 would leave no room for fresh noise."""
    head = DiffusionHead(4, 3, hidden_dim=8, depth=1, sampler="ddpm", steps=1000).bfloat16()
    condition = torch.zeros(100, 4, dtype=torch.bfloat16)
    samples = head.distribution(condition).sample(50, torch.Generator().manual_seed(0))
    assert samples.var().item() == pytest.approx(0.985, abs=0.05)  # 0.86 of rounded signals


def test_ddim_is_a_function_of_its_starting_noise_and_ddpm_is_not() -> None:
    head, _ = exact_head(steps=20)

    def correlation() -> float:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(500, 1, 3, generator=generator)
        again = torch.Generator().manual_seed(0)
        samples = head.distribution(torch.zeros(1, 4)).sample(500, again)
        return torch.corrcoef(torch.stack([start[..., 0].flatten(), samples[..., 0].flatten()]))[
            0, 1
        ].item()

    assert correlation() > 0.999
    head.sampler = "ddpm"
    assert abs(correlation()) < 0.3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_samples_of_any_number_of_steps_have_the_moments_of_their_recursion(
    steps: int, sampler: str, schedule: str
) -> None:
    """One step, a number that 20 is no multiple of, and all: normal throughout, since the exact
    network is linear in x; its mean and variance are carried along in float64.
    """
    head, truth = exact_head(sampler=sampler, timesteps=20, steps=steps, schedule=schedule)
    remaining = alpha_bar(schedule, 20).clamp(min=4e-5)
    levels = [remaining[t] for t in head.visited()] + [torch.tensor(1.0, dtype=torch.float64)]
    target_mean, target_variance = truth.mean.double(), truth.variance.double()
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for now, later in itertools.pairwise(levels):
        # What the target is expected to be, offset + gain x, and the noise left, (x - ...) / noise.
        gain = now.sqrt() * target_variance / (now * target_variance + 1 - now)
        offset = target_mean * (1 - gain * now.sqrt())
        if sampler == "ddim":
            on_e, fresh = (1 - later).sqrt(), torch.zeros(())
        else:
            # What q(x_later | x_now, target) has: equation 7 of arXiv 2006.11239, for jumps.
            fresh = (1 - later) / (1 - now) * (1 - now / later)
            on_e = (1 - later - fresh).clamp(min=0).sqrt()
        on_x = on_e / (1 - now).sqrt()
        on_target = later.sqrt() - on_x * now.sqrt()
        mean = on_target * (offset + gain * mean) + on_x * mean
        variance = (on_target * gain + on_x).square() * variance + fresh
    generator = torch.Generator().manual_seed(0)
    samples = head.distribution(torch.zeros(1, 4)).sample(20_000, generator).double()[:, 0]
    spread = variance.sqrt() / math.sqrt(len(samples))
    assert ((samples.mean(0) - mean).abs() < 5 * spread).all()
    assert ((samples.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / len(samples))).all()


@pytest.mark.parametrize("together", [1, 3, 100])
def test_steps_computed_ahead_are_those_computed_one_at_a_time(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = DiffusionHead(4, 3, hidden_dim=8, depth=2).network
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    condition, z, times = torch.randn(5, 8), torch.randn(2, 5, 3), torch.randint(1000, (7,))
    monkeypatch.setattr(adaln, "_MODULATIONS", together * 5 * 8 * 8)
    found = [predict(z) for predict in network.at(times, condition)]
    for time, got in zip(times, found, strict=True):
        torch.testing.assert_close(got, network(z, time, condition))


def test_visited_timesteps() -> None:
    head = DiffusionHead(4, 3, hidden_dim=8, timesteps=10, steps=10)
    assert head.visited() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    for steps in range(2, 10):
        head.steps = steps
        visited = head.visited()
        assert len(set(visited)) == steps
        assert visited == sorted(visited, reverse=True)
        assert (visited[0], visited[-1]) == (9, 0)
    head.steps = 1
    assert head.visited() == [9]
    assert head.distribution(torch.zeros(2, 4)).sample(3).shape == (3, 2, 3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("probes", [None, 2])
def test_likelihood(schedule: str, probes: int | None) -> None:
    """Against the exact density, which the first timestep's noise hardly widens."""
    head, truth = exact_head(schedule=schedule, steps=200, probes=probes)
    z = truth.sample((6,))
    log_prob = head.distribution(torch.zeros(6, 4)).log_prob(z)
    torch.testing.assert_close(log_prob, truth.log_prob(z).sum(1), rtol=0, atol=0.03)


def test_likelihood_of_a_sampler_of_one_step() -> None:
    """It spans all timesteps, too: a standard normal stays where it is, so that no step errs."""
    head, _ = exact_head(steps=1)
    head.network = ExactNoise(head, torch.zeros(3), torch.ones(3))
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    log_prob = head.distribution(torch.zeros(6, 4)).log_prob(z)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-3)


def test_fewer_timesteps_than_the_samplers_default() -> None:
    assert DiffusionHead(4, 3, timesteps=10).visited() == list(range(9, -1, -1))
    assert len(DiffusionHead(4, 3).visited()) == 50


class BentNoise(ExactNoise):
    """No longer that of a normal distribution: the coordinates move each other."""

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        bend = 0.3 * self.signal[time] * torch.sin(2 * x.roll(1, -1))
        return super().forward(x, time, condition) + bend


@pytest.mark.parametrize("width", [1, 2])
def test_density_integrates_to_one(width: int) -> None:
    head = DiffusionHead(4, width, hidden_dim=8)
    head.network = BentNoise(head, torch.full((width,), 2.0), torch.full((width,), 0.7))
    axis = torch.linspace(-5, 9, 401 if width == 1 else 101)
    points = torch.cartesian_prod(*[axis] * width).view(-1, width)
    log_prob = head.distribution(torch.ones(len(points), 4)).log_prob(points)
    total = log_prob.double().exp().sum() * (axis[1] - axis[0]) ** width
    assert total.item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("width", [1, 2])
def test_a_trained_head_has_the_datas_density_and_samples(width: int, schedule: str) -> None:
    """Targets off centre, and beyond sqrt(D), which bounds LayerNorm-ed ones only."""
    torch.manual_seed(0)
    truth = Normal(torch.full((width,), 2.0), 0.5)
    head = DiffusionHead(2, width, hidden_dim=32, depth=1, schedule=schedule)
    optimizer = torch.optim.Adam(head.parameters(), 5e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 400)
    for _ in range(400):
        optimizer.zero_grad()
        head(torch.ones(256, 2), truth.sample((256,))).backward()
        optimizer.step()
        decay.step()
    axis = torch.linspace(-4, 8, 241 if width == 1 else 61)
    points = torch.cartesian_prod(*[axis] * width).view(-1, width)
    log_prob = head.distribution(torch.ones(len(points), 2)).log_prob(points)
    density = log_prob.double().exp() * (axis[1] - axis[0]) ** width
    assert density.sum().item() == pytest.approx(1.0, abs=0.01)
    mean = density @ points.double()
    torch.testing.assert_close(mean, truth.mean.double(), rtol=0, atol=0.1)
    samples = head.distribution(torch.ones(1, 2)).sample(4000, torch.Generator().manual_seed(0))
    share = torch.tensor([0.1, 0.5, 0.9])
    expected = truth.icdf(share[:, None])
    torch.testing.assert_close(samples[:, 0].quantile(share, 0), expected, rtol=0, atol=0.15)


def test_clip_bounds_the_samples_and_leaves_the_likelihood_alone() -> None:
    head, truth = exact_head()
    distribution = head.distribution(torch.zeros(6, 4))
    z = truth.sample((6,))
    expected = distribution.log_prob(z)
    head.clip = 0.3
    assert torch.equal(distribution.log_prob(z), expected)
    assert distribution.sample(8).abs().max() <= 0.3


@pytest.mark.parametrize(("width", "bound"), [(9, 10.0), (144, 12.0)])
def test_predicted_targets_stay_within_what_layer_norm_allows(width: int, bound: float) -> None:
    torch.manual_seed(0)
    head = DiffusionHead(4, width, hidden_dim=8)
    assert head.clip == bound
    nn.init.constant_(head.network.output.bias, 1e3)  # a network gone astray
    samples = head.distribution(torch.zeros(4, 4)).sample(8)
    assert samples.abs().max() == bound


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_untrained_head_describes_a_standard_normal(schedule: str) -> None:
    """What LayerNorm makes of embeddings, to the first order. Many steps: of few, samples lie too
    close together."""
    torch.manual_seed(0)
    head = DiffusionHead(4, 3, hidden_dim=8, schedule=schedule, steps=500)
    distribution = head.distribution(torch.zeros(2000, 4))
    samples = distribution.sample(1)[0]
    assert samples.mean(0).abs().max() < 4 / math.sqrt(2000)
    assert (samples.var(0) - 1).abs().max() < 4 * math.sqrt(2 / 2000)
    z = torch.randn(2000, 3)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(distribution.log_prob(z), expected, rtol=0, atol=1e-3)


def test_weights_that_were_asked_for_the_noise_are_refused() -> None:
    head = DiffusionHead(4, 3, hidden_dim=8)
    state = head.state_dict()
    head.load_state_dict(state)
    del state["network.tells_v"]
    with pytest.raises(RuntimeError, match=r"network\.tells_v"):
        head.load_state_dict(state)


def test_the_network_tells_noise_by_what_the_layers_tell_of_v() -> None:
    """v = signal e - noise target (arXiv 2202.00512): of the true one, the true noise."""
    head = DiffusionHead(4, 3, hidden_dim=8, timesteps=20)
    target, e, t = torch.randn(6, 3), torch.randn(6, 3), torch.arange(0, 18, 3)
    signal, noise = head.signal[t, None], head.noise[t, None]
    v = signal * e - noise * target
    network = head.network
    found = network._noise_in(signal * target + noise * e, v, t)
    torch.testing.assert_close(found, e)


def test_loss_is_that_of_the_noise() -> None:
    """An untrained head says noise * x, so its loss is signal^2 times that of v, 1 on average."""
    torch.manual_seed(0)
    head = DiffusionHead(4, 3, hidden_dim=8)
    loss = head(torch.randn(5000, 4), torch.randn(5000, 3))
    assert loss.item() == pytest.approx(head.signal.square().mean().item(), abs=0.02)
    loss.backward()
    assert all(p.grad is not None for p in head.parameters())
    exact, truth = exact_head()
    perfect = exact(torch.zeros(5000, 4), truth.sample((5000,)))
    variance = (exact.signal[:, None] * truth.stddev) ** 2 + exact.noise[:, None] ** 2
    floor = 1 - (exact.noise[:, None] ** 2 / variance).mean()
    assert perfect.item() == pytest.approx(floor.item(), abs=0.02)


def test_several_draws_are_a_mean_over_them_and_project_the_condition_once() -> None:
    torch.manual_seed(0)
    head = DiffusionHead(4, 3, hidden_dim=8)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    condition, target = torch.randn(6, 4), torch.randn(6, 3)
    calls = []
    head.network.condition.register_forward_hook(lambda _, __, out: calls.append(out.shape))
    head.draws = 3
    torch.manual_seed(1)
    loss = head(condition, target)
    assert calls == [(6, 8)]
    # By hand, with the same t and the same numbers, one draw at a time.
    torch.manual_seed(1)
    t, seed = torch.randint(1000, (3, 6)), ops.noise_seed("cpu")
    zeros, ones = torch.zeros(3, 6), torch.ones(3, 6)
    losses = []
    for at, e in zip(t, ops.q_sample(target, zeros, ones, seed), strict=True):
        x = head.signal[at, None] * target + head.noise[at, None] * e
        predicted = head.predict_noise(x, at, head.network.condition(condition))
        losses.append((predicted - e).square().mean())
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


def test_the_global_generator_governs_the_loss() -> None:
    head = DiffusionHead(4, 3, hidden_dim=8)
    condition, target = torch.randn(6, 4), torch.randn(6, 3)
    torch.manual_seed(1)
    first, second = head(condition, target), head(condition, target)
    assert first != second
    torch.manual_seed(1)
    assert head(condition, target) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sigmoid"}, "schedule must be one of"),
        ({"sampler": "euler"}, "sampler must be one of"),
        ({"steps": 0}, "steps must be between 1 and timesteps = 1000, got 0"),
        ({"steps": 11, "timesteps": 10}, "steps must be between 1 and timesteps = 10, got 11"),
        ({"timesteps": 0}, "timesteps must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"probes": 0}, "probes must be at least 1"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"DiffusionHead: {message}"):
        DiffusionHead(4, 3, **options)
