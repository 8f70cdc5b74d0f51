"""ProbIJepa, and what all heads have in common."""

from __future__ import annotations

import inspect
import math
import textwrap
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _device

import jepa_fast
from jepa_fast import ProbIJepa
from jepa_fast.masks import BlockMaskSampler
from jepa_fast.nn.heads import HEADS, Head, LatentDistribution, create_head
from jepa_fast.nn.vit import create_encoder

OPTIONS: dict[str, dict[str, Any]] = {
    "mixture": {},
    "autoregressive": {"hidden_dim": 16},
    "flow": {"hidden_dim": 16, "num_couplings": 2},
    "flow_matching": {"hidden_dim": 16, "steps": 3},
    "diffusion": {"hidden_dim": 16, "steps": 3},
}
OWN_SAMPLES = {name: {"moment_samples": 15} for name in HEADS if name != "mixture"}
"""Of heads without closed forms: few samples, and so few solutions of an ODE."""
each_head = pytest.mark.parametrize("name", HEADS)


def make_encoder() -> nn.Module:
    return create_encoder("vit_tiny_patch4", img_size=16, embed_dim=16, depth=1, num_heads=2)


def make_model(head: Any = "mixture", **options: Any) -> ProbIJepa:
    torch.manual_seed(0)
    return ProbIJepa(
        make_encoder(), head, head_options=options, predictor_dim=12, predictor_depth=1,
        predictor_heads=1,
    )  # fmt: skip


def make_batch() -> tuple[Tensor, Any]:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return images, BlockMaskSampler((4, 4), num_targets=2, min_context=2)(0, 3)


@each_head
def test_a_training_step(name: str) -> None:
    model = make_model(name, **OPTIONS[name])
    images, masks = make_batch()
    out = model(images, masks)
    blocks, patches = masks.targets.shape[1:]
    assert out.loss.shape == ()
    assert out.loss.dtype == torch.float32
    assert out.prediction.shape == (blocks * 3, patches, 12)
    assert out.target.shape == (blocks * 3, patches, 16)
    assert not out.prediction.requires_grad
    torch.testing.assert_close(out.target.mean(-1), torch.zeros(blocks * 3, patches))
    out.loss.backward()
    missing = {n for n, p in model.trainable_parameters() if p.grad is None}
    assert not missing
    assert {n.partition(".")[0] for n, _ in model.trainable_parameters()} == {
        "encoder",
        "predictor",
        "head",
    }
    assert all(not value.requires_grad for value in out.metrics.values())
    assert "prediction_rank" in out.metrics


@each_head
def test_predict_distribution(name: str) -> None:
    model = make_model(name, **OPTIONS[name]).eval()
    images, masks = make_batch()
    tokens = masks.targets.numel()
    with torch.no_grad():
        distribution = model.predict_distribution(images, masks)
    targets = model.targets(images, masks)
    assert targets.shape == (tokens, 16)
    log_prob = distribution.log_prob(targets)
    assert log_prob.shape == (tokens,)
    assert log_prob.isfinite().all()
    samples = distribution.sample(2, torch.Generator().manual_seed(0))
    assert samples.shape == (2, tokens, 16)
    assert torch.equal(samples, distribution.sample(2, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(distribution.log_prob(samples)[1], distribution.log_prob(samples[1]))
    assert distribution.mean.shape == distribution.variance.shape == (tokens, 16)
    assert (distribution.variance >= 0).all()
    with pytest.raises(ValueError, match=rf"z must be \[T, D\] .* T = {tokens} and D = 16"):
        distribution.log_prob(targets[:, :-1])


@pytest.mark.parametrize("name", ["mixture", "autoregressive", "flow"])
def test_the_loss_is_the_likelihood_of_the_targets(name: str) -> None:
    model = make_model(name, **OPTIONS[name])
    images, masks = make_batch()
    loss = model(images, masks).loss
    log_prob = model.predict_distribution(images, masks).log_prob(model.targets(images, masks))
    torch.testing.assert_close(loss, -log_prob.mean() / 16)


@each_head
def test_asking_for_moments_disturbs_no_random_number(name: str) -> None:
    distribution = create_head(name, 4, 3, OPTIONS[name]).distribution(torch.randn(2, 4))
    state = torch.get_rng_state()
    assert torch.equal(distribution.mean, distribution.mean)
    assert distribution.variance.shape == (2, 3)
    assert torch.equal(torch.get_rng_state(), state)


@each_head
def test_a_number_of_samples_that_is_none_is_refused(name: str) -> None:
    distribution = create_head(name, 4, 3, OPTIONS[name]).distribution(torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"sample: n must be an integer, got 1\.5"):
        distribution.sample(1.5)
    with pytest.raises(ValueError, match="sample: n must be at least 1, got -1"):
        distribution.sample(-1)
    assert distribution.sample(numpy.int64(2)).shape == (2, 2, 3)


def test_names_of_heads_are_strings() -> None:
    with pytest.raises(TypeError, match=r"head must be one of \('mixture', .*got \['mixture'\]"):
        create_head(["mixture"], 4, 3)


@each_head
def test_options_that_count_are_integers(name: str) -> None:
    counts = {n: v for n, v in OPTIONS[name].items() if isinstance(v, int)}
    for option, value in (counts or {"num_components": 2}).items():
        with pytest.raises(TypeError, match=rf"{option} must be an integer, got {value}\.5"):
            create_head(name, 4, 3, {**OPTIONS[name], option: value + 0.5})


@each_head
def test_widths_and_numbers_of_samples_are_integers(name: str) -> None:
    with pytest.raises(TypeError, match=r"moment_samples must be an integer, got 15\.5"):
        create_head(name, 4, 3, {**OPTIONS[name], "moment_samples": 15.5})
    with pytest.raises(TypeError, match=r"Head: target_dim must be an integer, got 3\.5"):
        create_head(name, 4, 3.5, OPTIONS[name])


@each_head
def test_points_of_another_type_have_no_cdf(name: str) -> None:
    distribution = create_head(name, 4, 3, OPTIONS[name]).distribution(torch.randn(2, 4))
    with pytest.raises(TypeError, match="cdf: z must be a tensor, got list"):
        distribution.cdf([0.0])
    with pytest.raises(TypeError, match=r"cdf: z must be of a floating dtype, got torch\.int64"):
        distribution.cdf(torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flow", {"scale_bound": "2"}, "CouplingFlowHead: scale_bound must be a number, got str"),
        ("flow", {"scale_bound": torch.tensor(2.0)}, "scale_bound must be a number, got Tensor"),
        ("flow", {"seed": 0.5}, r"CouplingFlowHead: seed: expected an int, got float 0\.5"),
        ("autoregressive", {"seed": "a"}, "AutoregressiveHead: seed: expected an int, got str"),
        ("diffusion", {"clip": "2"}, "DiffusionHead: clip must be a number, got str"),
    ],
)
def test_options_that_are_no_numbers(name: str, options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        create_head(name, 4, 3, options)


@each_head
def test_entropy_and_cdf(name: str) -> None:
    """Repeatable, in the right shapes and dtype, and from nobody else's random numbers."""
    torch.manual_seed(0)
    head = create_head(name, 4, 3, {**OPTIONS[name], **OWN_SAMPLES.get(name, {})})
    distribution = head.distribution(torch.randn(2, 4))
    z = torch.tensor([[-1e3, 0.0, 1e3], [0.0, -1e3, 1e3]])
    state = torch.get_rng_state()
    entropy, cdf = distribution.entropy, distribution.cdf(z)
    assert entropy.shape == (2,)
    assert entropy.dtype == cdf.dtype == torch.float32
    assert not entropy.requires_grad
    assert torch.equal(entropy, distribution.entropy)
    assert torch.equal(cdf, distribution.cdf(z))
    assert torch.equal(torch.get_rng_state(), state)
    assert cdf.shape == (2, 3)
    assert ((cdf >= 0) & (cdf <= 1)).all()
    assert cdf[z == -1e3].max() < 0.05
    assert cdf[z == 1e3].min() > 0.95
    with pytest.raises(ValueError, match=r"cdf: z must be \[T, D\] = \[2, 3\], got \[1, 2, 3\]"):
        distribution.cdf(z[None])
    z[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"cdf: z must be finite, got nan at \[1, 2\]"):
        distribution.cdf(z)


@each_head
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_targets_that_are_not_finite(name: str, wrong: float) -> None:
    torch.manual_seed(0)
    head = create_head(name, 4, 3, OPTIONS[name])
    condition, target = torch.randn(5, 4), torch.randn(5, 3)
    head(condition, target)  # the flow is normalised
    distribution = head.distribution(condition)
    target[2, 1] = wrong
    with pytest.raises(ValueError, match=r"target must be finite, .* for 1 of 5 .* token 2"):
        head(condition, target)
    for z in (target, target[None]):
        with pytest.raises(ValueError, match=r"must (have a|be) finite"):
            distribution.log_prob(z)
        with torch.no_grad(), pytest.raises(ValueError, match=r"must (have a|be) finite"):
            distribution.log_prob(z)


@each_head
def test_arguments_that_are_not_of_floating_dtypes(name: str) -> None:
    head = create_head(name, 4, 3, OPTIONS[name])
    condition, target = torch.randn(5, 4), torch.randn(5, 3)
    for wrong in ((condition.long(), target), (condition, target.long()), (condition, [1.0])):
        with pytest.raises(TypeError, match=r"(condition|target) must be"):
            head(*wrong)
    with pytest.raises(TypeError, match="z must be"):
        head.distribution(condition).log_prob(target.long())


@each_head
def test_no_sample_has_no_density(name: str) -> None:
    distribution = create_head(name, 4, 3, OPTIONS[name]).distribution(torch.randn(5, 4))
    assert distribution.log_prob(torch.zeros(0, 5, 3)).shape == (0, 5)


@each_head
def test_densities_in_inference_mode_are_those_outside(name: str) -> None:
    torch.manual_seed(0)
    head = create_head(name, 4, 3, OPTIONS[name])
    head(torch.randn(5, 4), torch.randn(5, 3))
    condition, z = torch.randn(5, 4), torch.randn(5, 3)
    expected = head.distribution(condition).log_prob(z).detach()
    with torch.inference_mode():
        got = head.distribution(condition + 0).log_prob(z + 0)
    assert torch.equal(got, expected)


@each_head
def test_moments_found_in_inference_mode_serve_training(name: str) -> None:
    torch.manual_seed(0)
    head = create_head(name, 4, 3, OPTIONS[name] | {"moment_samples": 8}).eval()
    condition, z = torch.randn(5, 4), torch.randn(5, 3)
    distribution, expected = head.distribution(condition), head.distribution(condition)
    with torch.inference_mode():
        given = head.distribution(condition + 0)
        assert torch.equal(given.mean, expected.mean)
        assert torch.equal(given.cdf(z + 0), expected.cdf(z))
        for ask in (lambda: distribution.mean, lambda: distribution.variance):
            assert ask().isfinite().all()
    factor = torch.ones(5, 3, requires_grad=True)
    (factor * distribution.mean * distribution.variance).sum().backward()
    torch.testing.assert_close(factor.grad, (expected.mean * expected.variance).detach())


@pytest.mark.parametrize("name", OWN_SAMPLES)
def test_moments_come_from_as_many_samples_as_the_head_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = create_head(name, 4, 3, {**OPTIONS[name], "moment_samples": 7})
    drawn = 0

    def count(self: LatentDistribution, n: int, generator: torch.Generator) -> Tensor:
        nonlocal drawn
        drawn += n
        return torch.randn(n, 2, 3, generator=generator)

    monkeypatch.setattr(type(head.distribution(torch.randn(2, 4))), "sample", count)
    distribution = head.distribution(torch.randn(2, 4))
    assert distribution.mean.shape == distribution.variance.shape == (2, 3)
    assert drawn == 7
    head.moment_samples, drawn = 9, 0
    assert head.distribution(torch.randn(2, 4)).mean.isfinite().all()
    assert drawn == 9
    with pytest.raises(ValueError, match="moment_samples must be at least 2, got 1"):
        create_head(name, 4, 3, {"moment_samples": 1})


@each_head
def test_under_autocast_and_round_trip(name: str) -> None:
    model = make_model(name, **OPTIONS[name])
    images, masks = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, masks)
        samples = model.predict_distribution(images, masks).sample()
    out.loss.backward()
    assert out.loss.isfinite()
    assert out.loss.dtype == out.target.dtype == samples.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for _, p in model.trainable_parameters())
    other = make_model(name, **OPTIONS[name])
    nn.init.normal_(next(other.head.parameters()))
    other.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    expected = model(images, masks).loss
    torch.manual_seed(1)
    assert torch.equal(other(images, masks).loss, expected)


@each_head
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_whole_models_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """Networks run in their own dtype; targets, densities and samples in float32 or wider."""
    model = make_model(name, **OPTIONS[name]).to(dtype)
    images, masks = make_batch()
    images = images.to(dtype)
    out = model(images, masks)
    out.loss.backward()
    distribution = model.predict_distribution(images, masks)
    given = (
        distribution.log_prob(out.target.flatten(0, 1).to(dtype)),
        distribution.sample(2),
        distribution.mean,
        distribution.variance,
        out.target,
        out.loss,
    )
    wide = torch.promote_types(dtype, torch.float32)
    assert all(x.dtype == wide and x.isfinite().all() for x in given)
    assert all(p.grad.dtype == dtype for _, p in model.trainable_parameters())


@each_head
def test_a_distribution_outlives_autocast(name: str) -> None:
    model = make_model(name, **OPTIONS[name]).eval()
    images, masks = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        distribution = model.predict_distribution(images, masks)
    assert distribution.log_prob(model.targets(images, masks)).dtype == torch.float32
    assert distribution.sample(2).dtype == distribution.mean.dtype == torch.float32


def test_images_of_another_size_are_not_matched_with_the_wrong_patches() -> None:
    encoder = create_encoder(
        "vit_tiny_patch4", 16, embed_dim=16, depth=1, num_heads=2, interpolate_positions=True
    )
    model = ProbIJepa(encoder, predictor_dim=12, predictor_depth=1, predictor_heads=1)
    _, masks = make_batch()
    for method in (model, model.targets):
        with pytest.raises(ValueError, match=r"images: expected 16 patches.*got 32"):
            method(torch.randn(3, 3, 16, 32), masks)


def test_masks_of_another_number_of_images_are_refused() -> None:
    model, (images, masks) = make_model(), make_batch()
    for method in (model, model.targets, model.predict_distribution):
        with pytest.raises(ValueError, match="masks: expected 2 images, as given, got 3"):
            method(images[:2], masks)


@each_head
@pytest.mark.parametrize("hidden", [set(), {torch.linspace}], ids=["", "after_transformers"])
def test_on_the_meta_device(name: str, hidden: set[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where transformers has hidden `linspace` from the first device context."""
    constructors = _device._device_constructors() - hidden
    monkeypatch.setattr(_device, "_device_constructors", lambda: constructors)
    images, masks = make_batch()
    with torch.device("meta"):
        model = make_model(name, **OPTIONS[name])
    assert all(t.is_meta for t in model.state_dict().values())
    assert all(b.is_meta for b in model.buffers())
    out = model(images.to("meta"), masks.to("meta"))
    assert out.loss.is_meta
    out.loss.backward()


@each_head
@pytest.mark.parametrize("assign", [False, True])
def test_built_on_the_meta_device_and_loaded(
    name: str, assign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in no state dict is there again, whatever the memory held."""
    torch.manual_seed(0)
    images, masks = make_batch()
    model = make_model(name, **OPTIONS[name]).eval()
    with torch.device("meta"):
        other = make_model(name, **OPTIONS[name]).eval()
    for p in model.head.parameters():
        nn.init.normal_(p, std=0.1)
    if not assign:
        monkeypatch.setattr(torch, "empty_like", partial(torch.full_like, fill_value=-1))
        other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=assign)
    losses, likelihoods = [], []
    for each in (model, other):
        torch.manual_seed(1)
        losses.append(each(images, masks).loss)
        with torch.no_grad():
            distribution = each.predict_distribution(images, masks)
            likelihoods.append(distribution.log_prob(each.targets(images, masks)))
    assert torch.equal(*losses)
    assert torch.equal(*likelihoods)


@each_head
def test_heads_compile_without_a_break(name: str) -> None:
    """From the first batch on, which sets the flow's ActNorm."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    head, same = (create_head(name, 4, 3, OPTIONS[name]) for _ in range(2))
    same.load_state_dict(head.state_dict())
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    condition, target = torch.randn(5, 4), 3 + torch.randn(5, 3)
    for _ in range(2):
        losses = []
        for step in (compiled, same):
            torch.manual_seed(1)
            losses.append(step(condition, target))
            losses[-1].backward()
        torch.testing.assert_close(*losses)
    for ours, theirs in zip(head.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@each_head
def test_a_loss_of_some_tokens(name: str) -> None:
    """Those of complements sum to the whole; what the others hold is not read."""
    torch.manual_seed(0)
    head = create_head(name, 4, 3, OPTIONS[name])
    mask = torch.tensor([True, False, True, True, False, True])
    inputs = torch.randn(6, 4), torch.randn(6, 3)
    head(*inputs)  # sets the flow's ActNorms

    def run(mask: Tensor | None, *inputs: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        torch.manual_seed(1)
        loss = head(*leaves) if mask is None else head(*leaves, mask)
        return [loss.detach(), *torch.autograd.grad(loss, [*leaves, *head.parameters()])]

    some, others, whole = (run(each, *inputs) for each in (mask, ~mask, None))
    for mine, theirs, of_all in zip(some, others, whole, strict=True):
        torch.testing.assert_close((4 * mine + 2 * theirs) / 6, of_all, rtol=1e-4, atol=1e-6)
    assert float((some[0] - whole[0]).abs()) > 1e-3
    for of_rows in some[1:3]:
        assert torch.equal(of_rows[~mask], torch.zeros_like(of_rows[~mask]))
    poisoned = [x.clone() for x in inputs]
    poisoned[0][~mask], poisoned[1][~mask] = torch.nan, torch.inf
    for got, want in zip(run(mask, *poisoned), some, strict=True):
        assert torch.equal(got, want)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in run(mask & ~mask, *inputs))
    with pytest.raises(ValueError, match=r"token_mask must have shape \[6\], got \[5\]"):
        head(*inputs, mask[1:])


def test_only_tokens_that_count_set_the_flow() -> None:
    torch.manual_seed(0)
    head, same, other = (create_head("flow", 4, 3, OPTIONS["flow"]) for _ in range(3))
    for each in (same, other):
        each.load_state_dict(head.state_dict())
    mask, condition, target = torch.arange(40) % 3 > 0, torch.randn(40, 4), 3 + torch.randn(40, 3)
    head(condition, target, mask)
    same(condition[mask], target[mask])
    torch.testing.assert_close(head.state_dict(), same.state_dict())
    for count in (0, 1):  # too few
        other(condition, target, torch.arange(40) < count)
        assert not any(norm.is_set for norm in other.norms)


@each_head
def test_no_token_no_loss(name: str) -> None:
    head = create_head(name, 4, 3, OPTIONS[name])
    loss = head(torch.zeros(0, 4), torch.zeros(0, 3))
    assert loss.item() == 0.0
    loss.backward()
    assert head.distribution(torch.zeros(0, 4)).mean.shape == (0, 3)


def test_teacher_follows() -> None:
    model = make_model()
    for parameter in model.encoder.parameters():
        nn.init.normal_(parameter)
    model.update_target(0.0)
    for ours, theirs in zip(
        model.target_encoder.parameters(), model.encoder.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


class UnitNormal(LatentDistribution):
    def __init__(self, loc: Tensor) -> None:
        super().__init__(*loc.shape, loc.device)
        self.loc = loc

    def _log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * ((z - self.loc) ** 2 + math.log(2 * math.pi)).sum(-1)

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        return self.loc + self._normal(n, generator)


class OwnHead(nn.Module):
    """One class, two methods, and nothing of ours to inherit."""

    def __init__(self, condition_dim: int, target_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(condition_dim, target_dim, bias)

    def forward(self, condition: Tensor, target: Tensor) -> Tensor:
        return (self.linear(condition) - target).square().mean()

    def distribution(self, condition: Tensor) -> UnitNormal:
        return UnitNormal(self.linear(condition))


class NoLoss(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()

    def distribution(self, condition: Tensor) -> UnitNormal:
        return UnitNormal(condition)


@pytest.mark.parametrize("tokens", [3, 1500, 5000])
def test_moments_are_those_of_all_samples_though_drawn_in_chunks(tokens: int) -> None:
    """Far from 0, where a difference of squares would have no digit left."""
    chunks = []

    class Recorded(UnitNormal):
        def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
            chunks.append(super().sample(n, generator))
            return chunks[-1]

    distribution = Recorded(torch.full((tokens, 2), 1e4, requires_grad=True))
    moments = distribution.mean, distribution.variance
    assert not any(moment.requires_grad for moment in moments)
    samples = torch.cat(chunks).double()
    assert len(samples) == 1024
    assert all(len(chunk) == 1 or len(chunk) * tokens <= 4096 for chunk in chunks)
    torch.testing.assert_close(moments[0].double(), samples.mean(0), rtol=1e-7, atol=0)
    # A sum of 1024 terms in float32 is off by 1024 roundings at the most.
    torch.testing.assert_close(moments[1].double(), samples.var(0), rtol=1024 * 2**-24, atol=0)


def test_entropy_and_cdf_from_samples() -> None:
    """Of independent normals, whose entropy and CDF are known."""
    distribution = UnitNormal(torch.tensor([[0.0, 3.0], [-5.0, 1e3]]))
    n = distribution.moment_samples
    exact = 1 + math.log(2 * math.pi)  # D / 2 log(2 pi e), D = 2
    # The standard error that the documentation tells, sqrt(D / 2 / n).
    assert (distribution.entropy - exact).abs().max() < 4 * math.sqrt(1 / n)
    offset = torch.tensor([[-2.0, -0.5], [0.0, 1.0]])
    cdf = distribution.cdf(distribution.loc + offset)
    share = torch.special.ndtr(offset)
    assert ((cdf - share).abs() < 4 * (share * (1 - share) / n).sqrt() + 1 / n).all()
    of_many = distribution.mean, distribution.entropy
    distribution.moment_samples = 3
    assert not torch.equal(distribution.mean, of_many[0])
    assert not torch.equal(distribution.entropy, of_many[1])
    ranks = distribution.cdf(torch.full((2, 2), 1e6)) * 4
    assert torch.equal(ranks, torch.full((2, 2), 3.5))


def test_samples_that_equal_the_point_count_half() -> None:
    class Point(UnitNormal):
        def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
            return self.loc.expand(n, *self.loc.shape)

    loc = torch.zeros(1, 3)
    cdf = Point(loc).cdf(torch.tensor([[-1.0, 0.0, 1.0]]))
    torch.testing.assert_close(cdf, torch.tensor([[0.5, 512.5, 1024.5]]) / 1025)


def test_samples_are_drawn_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    class Recorded(UnitNormal):
        def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
            drawn.append(n)
            return super().sample(n, generator)

    def answers(distribution: Recorded) -> list[Tensor]:
        z = torch.zeros(5, 2)
        return [distribution.mean, distribution.variance, distribution.cdf(z), distribution.entropy]

    loc = torch.randn(5, 2)
    kept = answers(distribution := Recorded(loc))
    distribution.cdf(torch.ones(5, 2))
    assert sum(drawn) == 1024
    distribution.moment_samples = 7
    _ = distribution.mean
    distribution.cdf(torch.ones(5, 2))
    assert sum(drawn) == 1024 + 7
    drawn.clear()
    monkeypatch.setattr("jepa_fast.nn.heads.interface._KEPT_BYTES", 1024 * 5 * 2 * 4 - 1)
    anew = answers(Recorded(loc))
    assert sum(drawn) == 3 * 1024
    assert all(torch.equal(a, b) for a, b in zip(kept, anew, strict=True))


def test_the_example_of_a_head_runs() -> None:
    example = (inspect.getdoc(Head) or "").partition("prediction.\n\n")[2].partition("\nArgs:")[0]
    code = textwrap.dedent(example).replace('"vit_small_patch16"', "make_encoder()")
    names: dict[str, Any] = {**globals(), "jepa_fast": jepa_fast, "nn": nn, "math": math}
    exec(compile(code, "docstring of Head", "exec"), names)
    model = names["model"]
    images, masks = make_batch()
    model(images, masks).loss.backward()
    assert model.head.linear.weight.grad.abs().sum() > 0
    with torch.no_grad():
        distribution = model.predict_distribution(images, masks)
    assert (distribution.mean - distribution.centre).abs().max() < 6 * math.sqrt(2 / 1024)
    exact = 16 * (1 + math.log(2))
    assert (distribution.entropy - exact).abs().max() < 6 * math.sqrt(16 / 1024)
    assert torch.equal(distribution.cdf(distribution.centre), distribution.cdf(distribution.centre))


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    class PerToken(OwnHead):
        def forward(self, condition: Tensor, target: Tensor) -> Tensor:
            return (self.linear(condition) - target).square().mean(-1)

    images, masks = make_batch()
    with pytest.raises(ValueError, match=r"head: expected PerToken\.forward.*scalar, got \[\d+\];"):
        make_model(PerToken)(images, masks)


@pytest.mark.parametrize("how", ["class", "module"])
def test_a_head_of_ones_own(how: str) -> None:
    model = make_model(OwnHead, bias=False) if how == "class" else make_model(OwnHead(12, 16))
    images, masks = make_batch()
    model(images, masks).loss.backward()
    distribution = model.predict_distribution(images, masks)
    distribution.moment_samples = 4000
    assert (distribution.mean - distribution.loc).abs().max() < 0.1
    assert (distribution.variance - 1).abs().max() < 0.15
    assert distribution.entropy.shape == distribution.loc.shape[:1]
    assert (distribution.cdf(distribution.loc.detach()) - 0.5).abs().max() < 0.05
    with pytest.raises(ValueError, match="sample: n must be at least 1"):
        distribution.sample(0)


@pytest.mark.parametrize(
    ("head", "options", "error", "message"),
    [
        ("gan", {}, ValueError, "head must be one of .*'mixture'.* got 'gan'"),
        ("mixture", {"components": 3}, ValueError, "head 'mixture' has no option components; it"),
        ("mixture", {"num_components": 0}, ValueError, "num_components must be at least 1"),
        (3, {}, TypeError, "head must be a name, a class or a module, got int"),
        (nn.Linear(12, 16), {}, TypeError, "module with forward.*and distribution.*got Linear"),
        (nn.Linear, {}, TypeError, "got Linear"),
        (NoLoss, {}, TypeError, "module with forward.*and distribution.*got NoLoss"),
        (NoLoss(), {}, TypeError, "module with forward.*and distribution.*got NoLoss"),
        (OwnHead, {"gain": 2}, TypeError, r"OwnHead\(condition_dim, target_dim.*'gain'"),
        (lambda width: OwnHead(width, width), {}, TypeError, "too many positional arguments"),
        (OwnHead(12, 16), {"bias": True}, ValueError, r"finished head, got \['bias'\]"),
        (create_head("mixture", 16, 16), {}, ValueError, "condition_dim must be 12.*predictor"),
        (create_head("mixture", 12, 12), {}, ValueError, "target_dim must be 16.*encoder"),
    ],
)
def test_bad_heads(head: Any, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_model(head, **options)


@pytest.mark.parametrize("head", ["mixture", OwnHead, OwnHead(12, 16)])
@pytest.mark.parametrize("options", [3, [("num_components", 3)], {1: 2}])
def test_options_are_a_mapping_of_names(head: Any, options: Any) -> None:
    got = {int: "int", list: "list", dict: "the key 1"}[type(options)]
    message = f"options of head ('mixture'|OwnHead) must be a mapping of names to values, got {got}"
    with pytest.raises(TypeError, match=message):
        ProbIJepa(make_encoder(), head, head_options=options)


@each_head
def test_mismatched_widths(name: str) -> None:
    head = create_head(name, 4, 3, OPTIONS[name])
    assert isinstance(head, Head)
    with pytest.raises(ValueError, match=r"condition must be \[T, 4\], got \[2, 5\]"):
        head(torch.zeros(2, 5), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"condition must be \[T, 4\]"):
        head.distribution(torch.zeros(2, 2, 4))
    with pytest.raises(ValueError, match=r"target must be \[T, D\] = \[2, 3\], got \[2, 4\]"):
        head(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="n must be at least 1"):
        head.distribution(torch.zeros(2, 4)).sample(0)
