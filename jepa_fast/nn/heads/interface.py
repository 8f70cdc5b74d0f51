"""What a probabilistic head is, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor, nn

from jepa_fast.nn.precision import widened


class LatentDistribution(ABC):
    """A distribution over the embedding of each of T target patches, [T, D].

    Subclasses give `_log_prob` and `sample`. Mean and variance default to those of `moment_samples`
    samples from a generator of their own, so that asking for them disturbs no other random number
    and asking twice gives the same answer; subclasses with a closed form override them.

    Args:
        tokens: T.
        width: D.
        device: of the samples.
        dtype: of the noise that sampling starts from.
    """

    moment_samples = 64

    def __init__(
        self, tokens: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.tokens = tokens
        self.width = width
        self.device = device
        self.dtype = dtype

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats of z [T, D] or [n, T, D]: [T] or [n, T], float32 or wider.

        Raises:
            ValueError: another shape.
        """
        if z.ndim not in (2, 3) or z.shape[-2:] != (self.tokens, self.width):
            raise ValueError(
                f"log_prob: z must be [T, D] or [n, T, D] with T = {self.tokens} and "
                f"D = {self.width}, got {list(z.shape)}"
            )
        z = widened(z)
        if z.ndim == 2:
            return self._log_prob(z)
        return torch.stack([self._log_prob(each) for each in z])

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

    @cached_property
    def _sampled_moments(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        samples = self.sample(self.moment_samples, generator)
        return samples.mean(0), samples.var(0)

    def _normal(self, n: int, generator: torch.Generator | None) -> Tensor:
        """[n, T, D] standard normal noise to start sampling from.

        Raises:
            ValueError: `n` below 1.
        """
        if n < 1:
            raise ValueError(f"sample: n must be at least 1, got {n}")
        shape = (n, self.tokens, self.width)
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)


class Head(nn.Module, ABC):
    """From the predictor's tokens to distributions over the teacher's.

    A head of one's own needs the two methods below, whether or not it inherits from this class.

    Args:
        condition_dim: d, width of the predictor's tokens.
        target_dim: D, width of the teacher's.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, condition_dim: int, target_dim: int) -> None:
        super().__init__()
        for name, value in (("condition_dim", condition_dim), ("target_dim", target_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.condition_dim = condition_dim
        self.target_dim = target_dim

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
        """Raises ValueError where the shapes of condition and target do not fit the head."""
        name = type(self).__name__
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


def check_positive(owner: str, **values: int) -> None:
    """Raises ValueError for a named value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{owner}: {name} must be at least 1, got {value}")
