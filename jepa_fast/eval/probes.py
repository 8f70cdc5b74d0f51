"""All probes of a frozen encoder, and the same beside untrained ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from jepa_fast.eval.features import Encode, Labelled, extract
from jepa_fast.eval.knn import knn_accuracy
from jepa_fast.eval.linear import fit_linear_probe
from jepa_fast.eval.patches import patch_accuracy


def probe_all(
    encode: Encode,
    train: Iterable[Labelled],
    val: Iterable[Labelled],
    *,
    device: torch.device | str = "cpu",
    k: int = 20,
    patches_per_image: int = 8,
) -> dict[str, float]:
    """Accuracies of an encoder's frozen features.

    encode: images [B, 3, H, W] to tokens [B, N, D].
    train, val: batches, such as a `Loader(..., train=False)`, or any `DataLoader` of (images,
        labels); images without a label (-1) do not count.
    k, patches_per_image: see `knn_accuracy` and `extract`.

    Returns "knn" and "linear" if there are labels, "patch" if there are patch labels.
    """
    known = extract(encode, train, device=device, patches_per_image=patches_per_image)
    asked = extract(encode, val, device=device, patches_per_image=patches_per_image)
    result = {}
    x, y = known.pooled[known.labels >= 0], known.labels[known.labels >= 0]
    x_val, y_val = asked.pooled[asked.labels >= 0], asked.labels[asked.labels >= 0]
    if len(x) and len(x_val):
        result["knn"] = knn_accuracy(x, y, x_val, y_val, k=k)
        result["linear"] = fit_linear_probe(x, y).accuracy(x_val, y_val)
    if known.patches is not None and asked.patches is not None:
        result["patch"] = patch_accuracy(known, asked)
    return result


@dataclass(frozen=True)
class ProbeComparison:
    """One probe of the trained encoder beside the same probe of untrained ones."""

    name: str
    trained: float
    untrained: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.untrained)

    @property
    def std(self) -> float:
        """Sample standard deviation over the untrained seeds; 0 for a single one."""
        return statistics.stdev(self.untrained) if len(self.untrained) > 1 else 0.0

    @property
    def low(self) -> float:
        return min(self.untrained)

    @property
    def high(self) -> float:
        return max(self.untrained)

    @property
    def gain(self) -> float:
        """Of the trained encoder over the mean of the untrained ones."""
        return self.trained - self.mean

    @property
    def beyond_spread(self) -> bool:
        """Whether the trained encoder is better than every untrained one."""
        return self.trained > self.high

    def __str__(self) -> str:
        return (
            f"{self.name}: trained {self.trained:.1%}, untrained {self.mean:.1%} "
            f"(std {self.std:.1%}, {self.low:.1%} to {self.high:.1%}, "
            f"{len(self.untrained)} seeds), gain {100 * self.gain:+.1f} points"
        )


def compare_with_untrained(
    encode: Encode,
    make_untrained: Callable[[], Encode],
    train: Iterable[Labelled],
    val: Iterable[Labelled],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    device: torch.device | str = "cpu",
    k: int = 20,
    patches_per_image: int = 8,
) -> list[ProbeComparison]:
    """Probes the trained encoder and, of every seed, an untrained one.

    encode: the trained encoder.
    make_untrained: makes the same encoder without training, from the global random state, which is
        seeded for it and given back as it was.
    train, val: as in `probe_all`; they are iterated once for each encoder.

    Raises ValueError if `seeds` is empty.
    """
    if not seeds:
        raise ValueError("seeds must be at least one, got none")

    def probes(of: Encode) -> dict[str, float]:
        return probe_all(of, train, val, device=device, k=k, patches_per_image=patches_per_image)

    trained = probes(encode)
    untrained = []
    for seed in seeds:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = make_untrained()
        untrained.append(probes(fresh))
    return [
        ProbeComparison(name, value, tuple(each[name] for each in untrained))
        for name, value in trained.items()
    ]
