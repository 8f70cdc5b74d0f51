"""Solving dx/dt = v(x, t), and following a density along the solutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Velocity = Callable[[Tensor, int], Tensor]
"""v at x and at grid point k, row by row, so that dv_i/dx_j vanishes between rows i and j."""


@contextmanager
def recordable() -> Iterator[Callable[[Tensor], Tensor]]:
    """Without gradients, but where `integrate_with_divergence` can have its own: not in inference
    mode. What it gives has tensors from outside as autograd takes them.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield lambda tensor: tensor.clone() if tensor.is_inference() else tensor


def integrate(velocities: Iterable[Callable[[Tensor], Tensor]], x: Tensor, grid: Tensor) -> Tensor:
    """x carried from grid[0] to grid[-1] by Heun's method: two evaluations a step, second order.

    `velocities` has v at each point of the grid, in turn, in any dtype.
    """
    remaining = iter(velocities)
    here = next(remaining)
    for step, there in zip(grid.diff(), remaining, strict=True):
        first = here(x).to(x.dtype)
        x = x + 0.5 * step * (first + there(x + step * first).to(x.dtype))
        here = there
    return x


def integrate_with_divergence(
    velocity: Velocity, x: Tensor, grid: Tensor, probes: int | None
) -> tuple[Tensor, Tensor]:
    """x [T, D] carried along as by `integrate`, and the integral of div v over its path, [T].

    Along the path `d/dt log p(x) = -div v(x, t)` (arXiv 1806.07366). With `probes=None`, and where
    it costs no more, from D probes on, the divergence is exact, at the price of D backward passes
    an evaluation. Otherwise it is Hutchinson's estimate from that many vectors of random signs,
    drawn once for the whole path (arXiv 1810.01367): without bias, its variance falling as
    1 / probes, the same at every call.
    """
    if probes is None or probes >= x.shape[1]:
        share = 1.0
        directions = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).unsqueeze(1)
    else:
        share = 1 / probes
        generator = torch.Generator(x.device).manual_seed(0)
        shape = (probes, *x.shape)
        signs = torch.randint(0, 2, shape, device=x.device, generator=generator)
        directions = (2 * signs - 1).to(x.dtype)

    def both(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = velocity(x, k)
            total = torch.zeros_like(x[:, 0])
            for direction in directions:
                direction = direction.expand_as(x)
                (product,) = torch.autograd.grad(v, x, direction, retain_graph=True)
                total += (product * direction).sum(1)
        return v.detach(), share * total

    integral = torch.zeros_like(x[:, 0])
    for k in range(len(grid) - 1):
        step = grid[k + 1] - grid[k]
        first, first_divergence = both(x, k)
        second, second_divergence = both(x + step * first, k + 1)
        x = x + 0.5 * step * (first + second)
        integral = integral + 0.5 * step * (first_divergence + second_divergence)
    return x, integral
