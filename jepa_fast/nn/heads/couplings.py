"""The layers of the coupling flow: ActNorm, affine couplings, and a stack of both.

A stack keeps coordinates split into those that the next coupling passes and those that it changes,
and may keep none of its layers' inputs for the backward pass: `ThroughInverse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast import ops
from jepa_fast.nn.linear import check_is_what_its_weights_say, linear
from jepa_fast.nn.precision import widened
from jepa_fast.ops._autograd import OperatorFunction, differentiable_once, spread
from jepa_fast.ops._checks import may_be_read


class ActNorm(nn.Module):
    """A scale and a shift a coordinate that make the first training batch mean 0, variance 1.

    The first forward pass in training mode sets them from its data (over all processes where
    `torch.distributed` is initialised); from then on they are parameters like any other. The flag
    `initialised` is in the state dict, so a resumed run does not set them again. Of fewer than 2
    rows in all there is no variance: the next batch sets them. (Compiled code cannot count rows
    that a mask leaves, nor those of other processes: there such a batch sets them, to a scale of 1
    and the mean of what rows there are.)

    FSDP's parameters in a forward pass are copies, and what would be written there is lost: they
    are set by a first batch before the model is sharded.

    Raises:
        ValueError: in `forward`, the data that are to set them are not finite.
        RuntimeError: in `forward`, data are to set parameters that FSDP has sharded.

    Source: Glow, arXiv 1807.03039, section 3.1.
    """

    initialised: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.zeros(width))
        self.register_buffer("initialised", torch.tensor(False))
        # The buffer's value, known to the host: asking the device every step would wait for it.
        self.is_set = False
        self.register_load_state_dict_post_hook(_read_flag)

    def forward(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """(y [T, D], log |det dy/dx|, the same for every row)."""
        if self.training and not inverse:
            self.initialise(x)
        loc, log_scale = widened(self.loc), widened(self.log_scale)
        if inverse:
            return x * torch.exp(log_scale) + loc, log_scale.sum()
        return (x - loc) * torch.exp(-log_scale), -log_scale.sum()

    @torch.no_grad()
    def initialise(self, x: Tensor, row_mask: Tensor | None = None) -> None:
        """Sets scale and shift, unless they are, from the rows of x [T, D] where row_mask [T] is
        True; None: from all."""
        if self.is_set:
            return
        if getattr(self, "_is_fsdp_managed_module", False):  # torch's mark, for torch.compile
            raise RuntimeError(
                "ActNorm: the first training batch, which sets scales and shifts, must come before "
                "FSDP shards them, got sharded ones; run the model on a batch in training mode, or "
                "load a state dict of a trained one, and call fully_shard then"
            )
        together = dist.is_available() and dist.is_initialized()
        if not together and len(x) < 2:  # known without a look at values, so compiled, too
            return
        wide = x.double()
        count = wide.new_full(wide.shape[1:], len(x))
        if row_mask is not None:
            wide = wide.where(row_mask[:, None], 0)
            count = row_mask.sum().to(wide.dtype).expand(wide.shape[1:])
        sums = torch.stack([count, wide.sum(0), wide.square().sum(0)])
        if together:
            dist.all_reduce(sums)
        # Once a run, a GPU may be waited for.
        if may_be_read(sums):
            if bool((sums[0] < 2).any()):
                return
            if not bool(sums.isfinite().all()):
                raise ValueError(
                    "ActNorm: the first training batch, which sets scales and shifts, must be "
                    "finite, got NaN or infinity; check the targets and the weights"
                )
        mean, square = sums[1:] / sums[0].clamp_min(1)
        std = (square - mean.square()).clamp_min(1e-6).sqrt()
        std = std.where(sums[0] > 1, 1)  # of rows that nobody could count
        self.loc.copy_(mean)
        self.log_scale.copy_(std.log())
        self.initialised.fill_(True)
        self.is_set = True


def _read_flag(module: nn.Module, _: Any) -> None:
    if isinstance(module, ActNorm) and not module.initialised.is_meta:
        module.is_set = bool(module.initialised)


class _Selected(OperatorFunction):
    """`x.index_select(dim, index)` of an index without repetitions: its gradient need not add."""

    @staticmethod
    def forward(x: Tensor, dim: int, index: Tensor) -> Tensor:
        return x.index_select(dim, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, Tensor], output: Tensor) -> None:
        x, ctx.dim, index = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(ctx.dim, index, grad), None, None


def _selected(x: Tensor, dim: int, index: Tensor) -> Tensor:
    selected: Tensor = _Selected.apply(x, dim, index)
    return selected


class Step(NamedTuple):
    """What an ActNorm and its coupling do to the P coordinates that pass and the F that change.

    Of the coupling's network only what counts: the weights of the coordinates that pass, and those
    that scale and shift of the others come from. What belongs to the ActNorm is in float32 at
    least: `exp(s)` and `exp(-s)` rounded to bfloat16 would not undo each other.
    """

    kept_loc: Tensor  # [P]
    kept_log_scale: Tensor  # [P]
    free_loc: Tensor  # [F]
    free_log_scale: Tensor  # [F]
    from_target: Tensor  # [H, P]
    from_target_bias: Tensor  # [H]
    from_condition: Tensor  # [H, d]
    hidden: Tensor  # [H, H]
    hidden_bias: Tensor  # [H]
    output: Tensor  # [2 F, H]
    output_bias: Tensor  # [2 F]

    def normalised(self, kept: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        return (
            (kept - self.kept_loc) * torch.exp(-self.kept_log_scale),
            (free - self.free_loc) * torch.exp(-self.free_log_scale),
        )

    def denormalised(self, kept: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        return (
            kept * torch.exp(self.kept_log_scale) + self.kept_loc,
            free * torch.exp(self.free_log_scale) + self.free_loc,
        )

    def scale_and_shift(self, kept: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """[T, F] each, from what passes, normalised, and the condition [T, d]."""
        # What autocast does, where the module itself is in half precision.
        dtype = self.hidden.dtype
        seen = linear(kept.to(dtype), self.from_target, self.from_target_bias)
        h = F.silu(torch.addmm(seen, condition.to(dtype), self.from_condition.t()))
        h = F.silu(linear(h, self.hidden, self.hidden_bias))
        raw_scale, shift = linear(h, self.output, self.output_bias).chunk(2, -1)
        return raw_scale, shift


class Coupling(nn.Module):
    """An affine coupling whose scale and shift come from what passes unchanged and the condition.

    Starts as the identity.

    Args:
        condition_dim: d.
        mask: D of them, True where a coordinate passes unchanged.
        hidden_dim: width of the network.
        scale_bound: largest |log-scale|.
    """

    mask: Tensor
    kept: Tensor
    free: Tensor
    none_passes: Tensor

    def __init__(
        self, condition_dim: int, mask: list[bool], hidden_dim: int, scale_bound: float
    ) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor(mask))
        self._note(mask)
        self.scale_bound = scale_bound
        self.from_target = nn.Linear(len(mask), hidden_dim)
        self.from_condition = nn.Linear(condition_dim, hidden_dim, bias=False)
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, 2 * len(mask))
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.register_load_state_dict_post_hook(_read_mask)

    def _note(self, mask: list[bool]) -> None:
        """Keeps what the mask says where asking for it does not wait for the device."""
        device = self.mask.device
        self.passes = bytes(mask)
        self.changes = bytes(not passes for passes in mask)
        for name, which in (("kept", self.passes), ("free", self.changes)):
            index = [i for i, belongs in enumerate(which) if belongs]
            self.register_buffer(
                name, torch.tensor(index, dtype=torch.int64, device=device), persistent=False
            )
        none = torch.zeros(sum(self.changes), dtype=torch.bool, device=device)
        self.register_buffer("none_passes", none, persistent=False)

    def step(self, norm: ActNorm) -> Step:
        """This coupling after `norm`.

        Raises:
            TypeError: the network has a layer with an adapter, which would go unheard.
        """
        for name in ("from_target", "from_condition", "hidden", "output"):
            check_is_what_its_weights_say("Coupling", name, getattr(self, name))
        loc, log_scale = widened(norm.loc), widened(norm.log_scale)
        return Step(
            _selected(loc, 0, self.kept),
            _selected(log_scale, 0, self.kept),
            _selected(loc, 0, self.free),
            _selected(log_scale, 0, self.free),
            _selected(self.from_target.weight, 1, self.kept),
            self.from_target.bias,
            self.from_condition.weight,
            self.hidden.weight,
            self.hidden.bias,
            _selected(self.output.weight, 0, self._both),
            _selected(self.output.bias, 0, self._both),
        )

    @property
    def _both(self) -> Tensor:
        """The network's outputs that are about coordinates which change: scales, then shifts."""
        return torch.cat([self.free, self.free + len(self.passes)])

    def forward(
        self, free: Tensor, raw_scale: Tensor, shift: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The coordinates that change, [T, F], changed, and logdet [T]."""
        return ops.affine_coupling(
            free, raw_scale, shift, self.none_passes, self.scale_bound, inverse
        )

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The coordinates of z [T, D] that pass, [T, P], and those that change, [T, F]."""
        return _selected(z, 1, self.kept), _selected(z, 1, self.free)

    def merge(self, kept: Tensor, free: Tensor) -> Tensor:
        """The inverse of `split`."""
        both = torch.cat([kept, free], 1)
        return torch.empty_like(both).index_copy_(1, torch.cat([self.kept, self.free]), both)

    def take_over(self, kept: Tensor, free: Tensor, other: Coupling) -> tuple[Tensor, Tensor]:
        """Split as for this coupling what is split as for the other."""
        if self.passes == other.passes:
            return kept, free
        if self.passes == other.changes:
            return free, kept
        return self.split(other.merge(kept, free))


def _read_mask(module: nn.Module, _: Any) -> None:
    if isinstance(module, Coupling) and not module.mask.is_meta:
        module._note(module.mask.tolist())


def _before_norm(
    y: Tensor, grad: Tensor, loc: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of `y = (x - loc) * exp(-log_scale)`: x, and the gradients of x, loc and log_scale."""
    grad_x = grad * torch.exp(-log_scale)
    x = y * torch.exp(log_scale) + loc
    return x, grad_x, -grad_x.sum(0), -(grad * y).sum(0)


_OF_NORM = 4  # the first fields of a `Step`


def _steps_of(flat: Sequence[Any]) -> list[Step]:
    size = len(Step._fields)
    return [Step(*flat[i : i + size]) for i in range(0, len(flat), size)]


def run_couplings(
    couplings: Sequence[Coupling],
    steps: Sequence[Step],
    kept: Tensor,
    free: Tensor,
    condition: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """From coordinates split as for the first coupling to those split as for the last one, and the
    couplings' logdet.
    """
    logdet = free.new_zeros(free.shape[0])
    for i, (coupling, step) in enumerate(zip(couplings, steps, strict=True)):
        if i > 0:
            kept, free = coupling.take_over(kept, free, couplings[i - 1])
        kept, free = step.normalised(kept, free)
        free, change = coupling(free, *step.scale_and_shift(kept, condition))
        logdet = logdet + change
    return kept, free, logdet


class ThroughInverse(OperatorFunction):
    """A stack of couplings that keeps its output alone: each layer's input is found from that.

    From the coordinates as the first coupling splits them to those as the last one does, and the
    couplings' logdet.
    """

    @staticmethod
    def forward(
        couplings: list[Coupling], kept: Tensor, free: Tensor, condition: Tensor, *flat: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return run_couplings(couplings, _steps_of(flat), kept, free, condition)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.couplings, _, _, condition, *flat = inputs
        kept, free, _ = output
        device = condition.device.type
        ctx.autocast = nullcontext
        if torch.amp.is_autocast_available(device):
            dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
            ctx.autocast = partial(torch.autocast, device, dtype, enabled)
        ctx.save_for_backward(kept, free, condition, *flat)

    @staticmethod
    @differentiable_once(
        "CouplingFlowHead", "use the plain PyTorch of jepa_fast/ops/affine_coupling/reference.py"
    )
    def backward(
        ctx: Any, saved: Any, grad_kept: Tensor, grad_free: Tensor, grad_logdet: Tensor
    ) -> tuple[Tensor | None, ...]:
        kept, free, condition, *flat = saved
        needs_condition, *needs = ctx.needs_input_grad[3:]
        size = len(Step._fields)
        grad_condition: Tensor | None = None
        grad_steps: list[Tensor | None] = []
        for i, step in reversed(list(enumerate(_steps_of(flat)))):
            coupling = ctx.couplings[i]
            if grad_steps:
                after = ctx.couplings[i + 1]
                kept, free = coupling.take_over(kept, free, after)
                grad_kept, grad_free = coupling.take_over(grad_kept, grad_free, after)
            with torch.enable_grad(), ctx.autocast():
                # A graph of this layer alone.
                seen = [kept.detach().requires_grad_(), condition.detach()]
                seen[1].requires_grad_(needs_condition)
                needed = needs[i * size : (i + 1) * size]
                leaves = Step(
                    *(x.detach().requires_grad_(n) for x, n in zip(step, needed, strict=True))
                )
                raw_scale, shift = leaves.scale_and_shift(*seen)
            free, _ = coupling(free, raw_scale.detach(), shift.detach(), inverse=True)
            with torch.enable_grad():
                free.requires_grad_()
                outputs = coupling(free, raw_scale, shift)
            inputs = [free, *seen, *leaves[_OF_NORM:]]
            grad_free, through_network, *grads = torch.autograd.grad(
                outputs, [x for x in inputs if x.requires_grad], (grad_free, grad_logdet)
            )
            of_condition, *of_network = spread(grads, [x.requires_grad for x in inputs[2:]])
            if of_condition is not None:
                grad_condition = (
                    of_condition if grad_condition is None else grad_condition + of_condition
                )
            grad_kept = grad_kept + through_network
            kept, grad_kept, *of_kept = _before_norm(
                kept, grad_kept, step.kept_loc, step.kept_log_scale
            )
            free, grad_free, *of_free = _before_norm(
                free, grad_free, step.free_loc, step.free_log_scale
            )
            grad_steps = [*of_kept, *of_free, *of_network, *grad_steps]
        return None, grad_kept, grad_free, grad_condition, *grad_steps
