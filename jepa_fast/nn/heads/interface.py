"""What a probabilistic head is, and what it gives back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from jepa_fast import ops
from jepa_fast.nn.precision import widened
from jepa_fast.ops._checks import (
    check_finite,
    check_finite_target,
    check_integer,
    check_mask,
    check_vectors,
    may_be_read,
)

_KEPT_BYTES = 2**29
"""Of samples that a distribution keeps: drawing them solves an ODE for some heads."""

_Answer = TypeVar("_Answer")


def _to_keep(question: Callable[..., _Answer]) -> Callable[..., _Answer]:
    """Without gradients, but not in inference mode, whose tensors autograd would refuse later."""
    return torch.inference_mode(False)(torch.no_grad()(question))


class LatentDistribution(ABC):
    """A distribution over the embedding of each of T target patches, [T, D].

    Subclasses call `super().__init__(T, D, device, dtype)` and define two methods, as `Head` shows:
    `_log_prob(z)`, [T] from z [T, D], which `log_prob` calls after its checks, and
    `sample(n, generator)`, [n, T, D] without gradients.

    Mean, variance, entropy and `cdf` default to those of `moment_samples` samples from a generator
    of their own, so that asking for them disturbs no other random number and asking twice gives the
    same answer; subclasses with a closed form override them. The samples are drawn once and kept,
    up to 512 MiB of them, until `moment_samples` is set; more than that are drawn anew for moments,
    for entropy and for every `cdf`. Of 1024 samples the mean is off by 1/32 standard deviation, the
    variance of a normal by 4.4 % (RMS).

    Args:
        tokens: T.
        width: D.
        device: of the samples.
        dtype: of the noise that sampling starts from.
        moment_samples: how many samples mean, variance, entropy and `cdf` come from, at least 2;
            may be set later.

    Raises:
        TypeError: a number of samples that is no integer.
        ValueError: fewer than 2 samples.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        moment_samples: int = 1024,
    ) -> None:
        self.tokens = tokens
        self.width = width
        self.device = device
        self.dtype = dtype
        self.moment_samples = moment_samples

    @property
    def moment_samples(self) -> int:
        return self._moment_samples

    @moment_samples.setter
    def moment_samples(self, number: int) -> None:
        _check_moment_samples(number)
        self._moment_samples = number
        for found in ("_sampled_moments", "_sampled_entropy", "_kept_samples"):
            self.__dict__.pop(found, None)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats of z [T, D] or [n, T, D]: [T] or [n, T], float32 or wider.

        Raises:
            TypeError: z is not a dense floating tensor.
            ValueError: another shape; on a CPU, a z that is not finite.
        """
        check_vectors("log_prob", "z", z)
        if z.ndim not in (2, 3) or z.shape[-2:] != (self.tokens, self.width):
            raise ValueError(
                f"log_prob: z must be [T, D] or [n, T, D] with T = {self.tokens} and "
                f"D = {self.width}, got {list(z.shape)}"
            )
        z = widened(z)
        if z.ndim == 2:
            log_prob = self._log_prob(z)
        elif len(z) == 0:
            log_prob = z.new_empty(z.shape[:2])
        else:
            log_prob = torch.stack([self._log_prob(each) for each in z])
        if may_be_read(log_prob):
            check_finite_target("log_prob", z.flatten(0, -2), log_prob.detach().flatten())
        return log_prob

    @abstractmethod
    def _log_prob(self, z: Tensor) -> Tensor:
        """[T] from z [T, D], which is in float32 or wider."""

    @abstractmethod
    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """[n, T, D], without gradients; from the global generator where none is given."""

    @property
    def mean(self) -> Tensor:
        """[T, D]."""
        return self._sampled_moments[0]

    @property
    def variance(self) -> Tensor:
        """[T, D]: the variance of each coordinate."""
        return self._sampled_moments[1]

    @property
    def entropy(self) -> Tensor:
        """[T]: the differential entropy in nats, without gradients.

        Where it has no closed form, the mean of `-log_prob` over n = `moment_samples` samples. Its
        standard error is the standard deviation of `log_prob(sample)` over sqrt(n): that of a
        normal is sqrt(D / 2), so at D = 384 and 1024 samples the estimate is off by 0.43 nats
        (RMS), 0.001 a coordinate. It costs n evaluations of `log_prob`, which are slow for
        heads that solve an ODE.
        """
        return self._sampled_entropy

    def cdf(self, z: Tensor) -> Tensor:
        """The cumulative distribution function of every coordinate at z [T, D]: [T, D] in [0, 1].

        The coordinate's marginal, unless the subclass says otherwise. Of targets that the
        distribution describes, the values are uniform: their histogram is the PIT histogram, and
        the share of them within c / 2 of one half is the coverage of the central interval c.

        Where there is no closed form, `(rank + 1/2) / (n + 1)`, rank being how many of n =
        `moment_samples` samples lie below z (ties count half), which of n = 1024 is off by 0.016
        at the most (RMS).

        Raises:
            TypeError: z is not a dense floating tensor.
            ValueError: another shape, or a z that is not finite, which only a CPU tells (on a GPU
                with JEPA_FAST_DEBUG=1).
        """
        check_vectors("cdf", "z", z)
        if z.shape != (self.tokens, self.width):
            raise ValueError(
                f"cdf: z must be [T, D] = [{self.tokens}, {self.width}], got {list(z.shape)}"
            )
        check_finite("cdf", "z", z)
        return self._cdf(widened(z))

    @_to_keep
    def _cdf(self, z: Tensor) -> Tensor:
        """[T, D] from z [T, D], which is finite, in float32 or wider."""
        rank = torch.zeros_like(z)
        for samples in self._own_samples():
            rank += ((samples < z).to(z.dtype) + (samples <= z).to(z.dtype)).sum(0) / 2
        return (rank + 0.5) / (self.moment_samples + 1)

    @cached_property
    @_to_keep
    def _sampled_entropy(self) -> Tensor:
        total = torch.zeros(self.tokens, dtype=torch.float64, device=self.device)
        for samples in self._own_samples():
            log_prob = self.log_prob(samples)
            total -= log_prob.sum(0, dtype=torch.float64)
        return (total / self.moment_samples).to(log_prob.dtype)

    def _own_samples(self) -> Iterator[Tensor]:
        """The same `moment_samples` samples at every call, [n, T, D], at most 4096 tokens at a
        time, or one sample."""
        kept: list[Tensor] | None = self.__dict__.get("_kept_samples")
        if kept is not None:
            yield from kept
            return
        size = self.moment_samples * self.tokens * self.width * self.dtype.itemsize
        drawn: list[Tensor] | None = [] if size <= _KEPT_BYTES else None
        generator = torch.Generator(self.device).manual_seed(0)
        chunk = max(1, 4096 // max(1, self.tokens))
        for start in range(0, self.moment_samples, chunk):
            samples = self.sample(min(chunk, self.moment_samples - start), generator)
            if drawn is not None:
                drawn.append(samples)
            yield samples
        if drawn is not None:
            self.__dict__["_kept_samples"] = drawn

    @cached_property
    @_to_keep
    def _sampled_moments(self) -> tuple[Tensor, Tensor]:
        """(mean, variance).

        The variance is that between the means which the samples give, plus the mean of the
        variances. Sums are taken from the first sample on, lest a mean far from 0 swallow them.
        """
        n = self.moment_samples
        for i, samples in enumerate(self._own_samples()):
            means, variances = self._moments_given(samples)
            if i == 0:
                origin = means[0]
                total, squares, within = (torch.zeros_like(origin) for _ in range(3))
            total += (means - origin).sum(0)
            squares += (means - origin).square().sum(0)
            within += variances.sum(0)
        between = (squares - total.square() / n).clamp_min(0) / (n - 1)
        return origin + total / n, between + within / n

    def _moments_given(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """What each of samples [n, T, D] says of mean and variance, [n, T, D] each: itself and 0.

        A subclass that knows them in closed form given part of a sample is closer to the truth.
        """
        return samples, torch.zeros_like(samples)

    def _normal(self, n: int, generator: torch.Generator | None) -> Tensor:
        """[n, T, D] standard normal noise to start sampling from.

        Raises:
            TypeError: `n` is no integer.
            ValueError: `n` below 1.
        """
        check_positive("sample", n=n)
        shape = (int(n), self.tokens, self.width)
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)


class Head(nn.Module, ABC):
    """From the predictor's tokens to distributions over the teacher's.

    A head of one's own is made as `MyHead(condition_dim, target_dim, **head_options)` and has the
    two methods below, whether or not it inherits from this class; one that does calls
    `super().__init__(condition_dim, target_dim)`. What `distribution` returns has `log_prob` and
    `sample`, and mean, variance, entropy and `cdf` if it inherits from `LatentDistribution`.

    Example: a Laplace distribution about a linear prediction.

        class Laplace(LatentDistribution):
            def __init__(self, centre):  # [T, D]
                super().__init__(*centre.shape, centre.device, centre.dtype)
                self.centre = centre

            def _log_prob(self, z):  # [T, D] to [T]
                return -(z - self.centre).abs().sum(-1) - self.width * math.log(2)

            def sample(self, n=1, generator=None):
                noise = self.centre.new_empty(2, n, self.tokens, self.width)
                return self.centre.detach() + noise.exponential_(generator=generator).diff(dim=0)[0]

        class LaplaceHead(Head):
            def __init__(self, condition_dim, target_dim):
                super().__init__(condition_dim, target_dim)
                self.linear = nn.Linear(condition_dim, target_dim)

            def distribution(self, condition):  # [T, d]
                return Laplace(self.linear(condition).float())

            def forward(self, condition, target):  # [T, d] and [T, D] to a scalar
                return -self.distribution(condition).log_prob(target).mean() / self.target_dim

        model = jepa_fast.ProbIJepa("vit_small_patch16", LaplaceHead)

    Args:
        condition_dim: d, width of the predictor's tokens.
        target_dim: D, width of the teacher's.
        moment_samples: how many samples a distribution takes mean, variance, entropy and `cdf` from
            where it has no closed form, at least 2; may be set later.

    Attributes:
        takes_token_mask: of a class whose `forward` takes a third argument, `token_mask` [T] bool,
            and leaves out of the loss the tokens where it is False, whatever they hold. With packed
            masks some tokens do not count: heads that say so keep one shape over all steps where
            the model is compiled, and let the host go ahead of a GPU; others get the tokens that
            count. False unless a class sets it.

    Raises:
        TypeError: a width or a number of samples that is no integer.
        ValueError: a width below 1, or fewer than 2 samples.
    """

    takes_token_mask = False

    def __init__(self, condition_dim: int, target_dim: int, moment_samples: int = 1024) -> None:
        super().__init__()
        for name, value in (("condition_dim", condition_dim), ("target_dim", target_dim)):
            check_integer(type(self).__name__, name, value)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.condition_dim = condition_dim
        self.target_dim = target_dim
        _check_moment_samples(moment_samples)
        self.moment_samples = moment_samples

    @abstractmethod
    def forward(self, condition: Tensor, target: Tensor) -> Tensor:
        """The training loss of condition [T, d] and LayerNorm-ed target [T, D]: scalar float32.

        It is a mean over tokens and coordinates, so that heads and widths compare. Where the
        likelihood is the loss, it is `-distribution(condition).log_prob(target).mean() / D`: nats a
        coordinate.
        """

    @abstractmethod
    def distribution(self, condition: Tensor) -> LatentDistribution:
        """The distributions that condition [T, d] stands for."""

    def check(self, condition: Tensor, target: Tensor | None = None) -> None:
        """Raises TypeError where condition or target is not a dense floating tensor, and ValueError
        where their shapes do not fit the head."""
        name = type(self).__name__
        check_vectors(name, "condition", condition)
        if target is not None:
            check_vectors(name, "target", target)
        if condition.ndim != 2 or condition.shape[1] != self.condition_dim:
            raise ValueError(
                f"{name}: condition must be [T, {self.condition_dim}], got "
                f"{list(condition.shape)}; the width is the predictor's"
            )
        if target is not None and target.shape != (condition.shape[0], self.target_dim):
            raise ValueError(
                f"{name}: target must be [T, D] = [{condition.shape[0]}, {self.target_dim}], got "
                f"{list(target.shape)}"
            )

    def check_loss(self, loss: Tensor, target: Tensor) -> None:
        """Raises ValueError where a loss, of a batch or of each of its tokens, is not finite as
        target is not, on a CPU: a GPU is not waited for."""
        if may_be_read(loss):
            check_finite_target(type(self).__name__, target, loss.detach())


class MaskedHead(Head):
    """What the heads here have in common: their losses leave out tokens by a mask."""

    takes_token_mask = True

    @abstractmethod
    def forward(
        self, condition: Tensor, target: Tensor, token_mask: Tensor | None = None
    ) -> Tensor:
        """As `Head.forward`; over the tokens where token_mask [T] is True, None: over all."""

    def counted(
        self, condition: Tensor, target: Tensor, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both after checks, with 0 in the tokens that do not count, which hold whatever."""
        self.check(condition, target)
        if token_mask is None:
            return condition, target
        check_mask(type(self).__name__, "token_mask", token_mask, target.shape[:1])
        absent = ~token_mask[:, None]
        return condition.masked_fill(absent, 0), target.masked_fill(absent, 0)

    def loss_of_distribution(
        self, condition: Tensor, target: Tensor, token_mask: Tensor | None
    ) -> Tensor:
        """What `forward` gives of a head whose loss is the density that `distribution` has."""
        condition, target = self.counted(condition, target, token_mask)
        nll = -self.distribution(condition).log_prob(target)
        return mean_nll(nll, self.target_dim, token_mask)


def mean_nll(nll: Tensor, width: int, token_mask: Tensor | None) -> Tensor:
    """Nats a coordinate: the mean of nll [T] over the tokens that count, over D; 0 of none."""
    if token_mask is None:
        return nll.sum() / max(nll.numel() * width, 1)
    return nll.where(token_mask, 0).sum() / (token_mask.sum().clamp(min=1) * width)


def masked_denoising_loss(
    prediction: Tensor,
    seed: Tensor,
    token_mask: Tensor | None,
    target: Tensor | None = None,
) -> Tensor:
    """`ops.denoising_loss` of the tokens that count.

    Args:
        prediction: [n, T, D], in float32 or wider.
        seed: of the noise.
        token_mask: [T] bool; None: all count.
        target: [T, D], finite; of a velocity.
    """
    if token_mask is None:
        return ops.denoising_loss(prediction, seed, target)
    draws, tokens, _ = prediction.shape
    with torch.no_grad():  # what is to be predicted: there it has no error
        ones = prediction.new_ones(draws, tokens)
        if target is None:
            aim = ops.q_sample(torch.zeros_like(prediction[0]), 0 * ones, ones, seed)
        else:
            aim = ops.q_sample(target, ones, -ones, seed)
    prediction = torch.where(token_mask[:, None], prediction, aim)
    share = tokens / token_mask.sum().clamp(min=1)
    return ops.denoising_loss(prediction, seed, target) * share


def _check_moment_samples(number: int) -> None:
    check_integer("distribution", "moment_samples", number)
    if number < 2:
        raise ValueError(f"moment_samples must be at least 2, got {number}")


def check_positive(owner: str, **values: int) -> None:
    """Raises TypeError for a named value that is no integer, ValueError for one below 1."""
    for name, value in values.items():
        check_integer(owner, name, value)
        if value < 1:
            raise ValueError(f"{owner}: {name} must be at least 1, got {value}")


def standard_normal_log_prob(u: Tensor) -> Tensor:
    """[T] from u [T, D]."""
    return -0.5 * (u.square().sum(-1) + u.shape[-1] * math.log(2 * math.pi))
