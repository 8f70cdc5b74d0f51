"""AdamW that also moves the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from jepa_fast import ops
from jepa_fast.ops import _random, _shards
from jepa_fast.ops._checks import check_choice, check_flag, check_floating
from jepa_fast.ops.ema_update import memory

Pairs = Mapping[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]

_STATE = {"step", "exp_avg", "exp_avg_sq"}


class AdamWEma(torch.optim.Optimizer):
    """`torch.optim.AdamW`, the EMA of what it updates, and low-precision copies, in one pass.

    A step does what `torch.optim.AdamW` and then `ops.ema_update_` do, to rounding, but reads and
    writes every parameter once::

        optimizer = AdamWEma(parameters, lr=1e-3, targets=teacher_parameters(model))
        loss.backward()
        optimizer.step(momentum=0.996)

    State and parameter groups have the form of `torch.optim.AdamW(fused=True)`, and load into it
    and from it. Schedulers, `GradScaler` and `clip_grad_norm_` work as with it. So do DTensors
    (FSDP2), every rank on its shards. Within `ZeroRedundancyOptimizer`, where the parameters of
    other ranks arrive after the step, give it no targets, and call `ops.ema_update_` then.

    Args:
        params: parameters or groups of them, as for `torch.optim.AdamW`.
        lr: a number, or a 0-dim tensor, which a CUDA graph follows.
        betas, eps, weight_decay, maximize: of AdamW, each by group.
        targets: pairs (parameter, teacher's tensor that follows it), or a mapping;
            `teacher_parameters(model)` gives them for the models here. A parameter that the step
            does not update, as it has no gradient or is in no group, still has its average taken.
            Of buffers that change, such as BatchNorm's, see `copy_teacher_buffers`.
        shadows: pairs (teacher's tensor, copy of it in another dtype): for all of them or none.
        momentum: of the EMA, where `step` is given none; a number or a 0-dim tensor. The attribute
            `momentum` may be changed at any time. Not part of `state_dict`, as schedules set it.
        amsgrad: False, as in calls of AdamW that name it; True is refused.
        rounding_seed: None, or a number: bfloat16 and float16 parameters, targets and shadows are
            rounded stochastically, at every step from other random bits. See `ops.ema_update_`.
        backend: of `ops.adamw_ema_`.

    Raises:
        TypeError: a complex parameter; targets or shadows that are no pairs of floating tensors; an
            option of the wrong type.
        ValueError: an unknown backend, options out of range, a target of another shape than its
            parameter or listed twice, pairs the wrong way round, shadows that are not of all
            targets, or `amsgrad`.
    """

    # A GradScaler leaves division and skipping to the step, which so need not wait for the device.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        targets: Pairs = (),
        shadows: Pairs | None = None,
        momentum: float | Tensor = 0.996,
        amsgrad: bool = False,
        maximize: bool = False,
        rounding_seed: int | None = None,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": True,
            "decoupled_weight_decay": True,
        }
        _check_number("momentum", momentum)
        if isinstance(momentum, Tensor):
            _check_momentum(momentum)
        elif not 0.0 <= momentum <= 1.0:
            raise ValueError(f"AdamWEma: momentum must be in [0, 1], got {momentum}")
        check_flag("AdamWEma", "maximize", maximize)
        if rounding_seed is not None and not isinstance(rounding_seed, Integral):
            raise TypeError(
                f"AdamWEma: rounding_seed must be None or an integer, got {rounding_seed!r}"
            )
        check_choice("AdamWEma", "backend", backend, ("auto", *ops.BACKENDS))
        self.momentum = momentum
        self.rounding_seed = None if rounding_seed is None else int(rounding_seed)
        self.backend = backend
        following = _pairs("targets", targets)
        # A list: torch.compile guards a dict's keys with the very tensors of their gradients, which
        # are others at every step.
        self._targets = list(following.items())
        self._shadows = _pairs("shadows", shadows or ())
        _check_targets(following, self._shadows)
        super().__init__(params, defaults)
        _check_order(following, self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`. Raises as the class."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._count_draws()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, momentum: float | Tensor | None = None
    ) -> Any:
        """Updates the parameters, then the teacher.

        But for a first step whose learning rates and gradients are all zero, and that is given no
        momentum: by such a step `torch.distributed.checkpoint` makes an optimizer's state, and the
        teacher stays where it is.

        Args:
            closure: computes the loss anew, as for `torch.optim.Optimizer`.
            momentum: of the EMA; None: the attribute `momentum`.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError: `closure` is no function, as a momentum that is not named.
            ValueError: a momentum outside [0, 1], where there are targets.
        """
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    f"AdamWEma: closure must be None or a function, got {closure!r}; name the "
                    "momentum: step(momentum=...)"
                )
            with torch.enable_grad():
                loss = closure()
        only_state = momentum is None and self._only_makes_state()
        left = {} if only_state else dict(self._targets)
        if momentum is None:
            momentum = self.momentum
        if left and isinstance(momentum, Tensor) and not torch.compiler.is_compiling():
            # Operators ask, too, but once the first groups have moved.
            _check_momentum(momentum)
        for number, group in enumerate(self.param_groups):
            self._step_group(number, group, momentum, left)
        if left:
            targets = list(left.values())
            ops.ema_update_(
                targets,
                list(left),
                momentum,
                [self._shadows[target] for target in targets] if self._shadows else None,
                rounding_seed=self._seed(self.param_groups[0], len(self.param_groups)),
                backend=self.backend,
            )
        if self.rounding_seed is not None and not only_state:
            for group in self.param_groups:
                group["draws"] += 1
        return loss

    def _only_makes_state(self) -> bool:
        """Whether this is the step by which `torch.distributed.checkpoint` has an optimizer make
        its state: the first, with learning rates and gradients of zero. AdamW changes nothing in
        it, and so no teacher is to move, which may be loaded already.
        """
        if self.state or not all(_is_zero_on_the_host(group["lr"]) for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.requires_grad]
        if any(grad is None for grad in grads):
            return False
        (local,), _ = _shards.to_local("AdamWEma", {"grads": grads})
        return not any(bool(grad.any()) for grad in local)

    def _step_group(
        self,
        number: int,
        group: dict[str, Any],
        momentum: float | Tensor,
        left: dict[Tensor, Tensor],
    ) -> None:
        """AdamW on a group's parameters that have a gradient; takes their targets out of `left`."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if p.grad.is_sparse:
                raise RuntimeError(
                    "AdamWEma does not support sparse gradients; use torch.optim.SparseAdam for "
                    "these parameters, or layers with sparse=False"
                )
        params.sort(key=lambda p: p not in left)  # those with a target come first
        states = [self._state_of(p) for p in params]
        targets = [left.pop(p) for p in params if p in left]
        ops.adamw_ema_(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            targets,
            [self._shadows[target] for target in targets] if self._shadows else (),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            momentum=momentum,
            maximize=group["maximize"],
            # A GradScaler sets these for the time of the call.
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            rounding_seed=self._seed(group, number),
            backend=self.backend,
        )

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def _seed(self, group: dict[str, Any], number: int) -> Tensor | None:
        """Of this step and this number; a resumed run draws what it would have drawn.

        On the parameters' device, so that a CUDA graph has it advance.
        """
        if self.rounding_seed is None:
            return None
        base = _random.fold(_random.fold(0, self.rounding_seed), number)
        return group["draws"] + _random.signed(base)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; a state of `amsgrad`, of `differentiable` or
        of another optimizer is refused, with ValueError, before anything is loaded.
        """
        for group in state_dict["param_groups"]:
            _check_supported(group)
        for state in state_dict["state"].values():
            if state and not _STATE <= state.keys():
                raise ValueError(
                    f"AdamWEma: expected the state of an AdamW, {sorted(_STATE)}, got "
                    f"{sorted(state)}; leave out the state of another optimizer"
                )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        own = ("momentum", "rounding_seed", "backend", "_targets", "_shadows")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            group.update(fused=True, foreach=None, decoupled_weight_decay=True)
            for key in ("betas", "eps"):  # of an AdamW that is not fused they may be tensors
                group[key] = _as_numbers(group[key])
            _check_group(group)
            for p in group["params"]:
                mine = self.state.get(p)
                if mine:  # an AdamW that is not fused keeps the steps on the CPU, or as numbers
                    step = torch.as_tensor(mine["step"], dtype=torch.float32)
                    mine["step"] = step.to(p.device)
        self._count_draws()

    def _count_draws(self) -> None:
        """Has every group count the steps that drew bits: more than those that updated parameters.

        Where a state says nothing of it, as AdamW's, these are counted instead.
        """
        if self.rounding_seed is None:
            return
        for group in self.param_groups:
            draws = group.get("draws")
            if draws is None:
                steps = [float(each["step"]) for each in self.state.values() if "step" in each]
                draws = torch.tensor(max(steps, default=0.0), device="cpu").long()
            # A group may be without parameters, to be filled later.
            group["draws"] = draws.to(next((p.device for p in group["params"]), draws.device))


def _pairs(name: str, pairs: Pairs) -> dict[Tensor, Tensor]:
    found: dict[Tensor, Tensor] = {}
    try:
        listed = [(a, b) for a, b in (pairs.items() if isinstance(pairs, Mapping) else pairs)]
    except (TypeError, ValueError):
        raise TypeError(
            f"AdamWEma: {name} must be pairs of tensors, or a dict of them, got "
            f"{type(pairs).__name__}"
        ) from None
    for key, value in listed:
        for tensor in (key, value):
            check_floating("AdamWEma", name, tensor)
        if key in found:
            raise ValueError(f"AdamWEma: {name}: a tensor is listed twice; it can have one only")
        if key.shape != value.shape:
            raise ValueError(
                f"AdamWEma: {name}: both of a pair must be of one shape, got {list(key.shape)} and "
                f"{list(value.shape)}"
            )
        found[key] = value
    return found


def _check_targets(targets: dict[Tensor, Tensor], shadows: dict[Tensor, Tensor]) -> None:
    if len({id(target) for target in targets.values()}) < len(targets):
        raise ValueError(
            "AdamWEma: targets: a target is listed twice; it can follow one tensor only"
        )
    if shadows and {id(x) for x in shadows} != {id(x) for x in targets.values()}:
        raise ValueError(
            f"AdamWEma: shadows must be of all targets and of nothing else, or none, got "
            f"{len(shadows)} of {len(targets)} targets"
        )


def _check_order(targets: dict[Tensor, Tensor], groups: list[dict[str, Any]]) -> None:
    """Refuses pairs the wrong way round, which would silently draw the student to its teacher."""
    trained = {id(p) for group in groups for p in group["params"] if p.requires_grad}
    if any(id(b) in trained and id(a) not in trained for a, b in targets.items()):
        raise ValueError(
            "AdamWEma: targets must be pairs (parameter, teacher's tensor that follows it), got "
            "one whose second is trained and whose first is not; swap them"
        )


def _check_group(group: dict[str, Any]) -> None:
    _check_supported(group)
    for name in ("lr", "eps", "weight_decay"):
        _check_number(name, group[name], tensor=name != "eps")
        if not 0.0 <= group[name]:
            raise ValueError(f"AdamWEma: {name} must be 0 or more, got {group[name]}")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"AdamWEma: betas must be a pair of numbers, got {betas!r}")
    for beta in betas:
        _check_number("betas", beta, tensor=False)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"AdamWEma: betas must be in [0, 1), got {betas}")
    for p in group["params"]:
        if p.is_complex():
            raise TypeError(
                f"AdamWEma takes real parameters, got {p.dtype}; torch.view_as_real gives one"
            )


def _check_supported(group: Mapping[str, Any]) -> None:
    for name in ("amsgrad", "differentiable"):
        if group.get(name):
            raise ValueError(f"AdamWEma: {name} is not supported; use torch.optim.AdamW for it")


def _check_number(name: str, value: object, tensor: bool = True) -> None:
    """Raises unless `value` is a number, which a floating tensor of one may be, too."""
    if not isinstance(value, (Real, Tensor) if tensor else Real):
        what = "a real number or a tensor" if tensor else "a real number"
        raise TypeError(f"AdamWEma: {name} must be {what}, got {type(value).__name__}")
    if isinstance(value, Tensor) and (value.numel() != 1 or not value.is_floating_point()):
        raise ValueError(
            f"AdamWEma: a {name} tensor must be one floating number, got {value.dtype} of shape "
            f"{list(value.shape)}"
        )


def _check_momentum(momentum: Tensor) -> None:
    if momentum.ndim != 0 or not momentum.is_floating_point():  # as ema_update_ wants it
        raise ValueError(
            f"AdamWEma: a momentum tensor must be floating and 0-dim, got {momentum.dtype} of "
            f"shape {list(momentum.shape)}"
        )
    memory.check_number("AdamWEma", "momentum", momentum, 1.0)


def _as_numbers(value: Any) -> Any:
    """Tensors, also those of a pair, as numbers."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_as_numbers, value))
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value


def _is_zero_on_the_host(number: float | Tensor) -> bool:
    """Of a number on a device nothing is known without waiting for it."""
    return (not isinstance(number, Tensor) or number.device.type == "cpu") and float(number) == 0
