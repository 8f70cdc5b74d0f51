"""One process or several (torchrun): the same code, the same numbers.

Every rank takes an equal slice of the global batch, so the mean over ranks of a mean over a slice
is the mean over the batch, and gradients are averaged after the backward pass. (Where a loss counts
words or ragged blocks, `nn/ranks.py` weighs the slices. Heads that train on random noise draw their
own on every rank, and agree with one process in expectation.)
(`DistributedDataParallel` would overlap the two, but it stops at a parameter that got no gradient
on one rank only, as a text conditioner's does where no image of that rank has a caption.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_fast.train.errors import ConfigError

_BUCKET_ELEMENTS = 16 * 2**20
_BY_TORCHRUN = (
    "start several processes by torchrun --nproc-per-node N -m jepa_fast.cli pretrain ..., or "
    "unset WORLD_SIZE for a single one"
)


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


def resolve_device(device: str) -> str:
    """`device`, or for "auto": CUDA where there is a GPU.

    Raises:
        ConfigError: CUDA was asked for and there is none, or there is no such kind of device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: got {device!r}, but no CUDA device is visible; use cpu")
    number = device.removeprefix("cuda").removeprefix(":")
    if number.isdecimal() and int(number) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: expected cuda:0 to cuda:{torch.cuda.device_count() - 1}, got {device!r}"
        )
    return device


def resolve_precision(precision: str, device: torch.device) -> str:
    """`precision`, or for "auto" what multiplies matrices faster on this device."""
    if precision != "auto":
        return precision
    # Without AMX a CPU takes about twice as long in bfloat16 as in float32; with it a tenth.
    has_units = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_units else "float32"


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """The processes that torchrun started, or this one alone; nests.

    Args:
        device: as `resolve_device` takes it. Under torchrun every process has its own GPU.

    Raises:
        ConfigError: as `resolve_device`; `WORLD_SIZE` and its like are not as torchrun sets them.
    """
    device = resolve_device(device)
    size = _world_size()
    if size == 1:
        yield World(torch.device(device))
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    inside = dist.is_initialized()
    if not inside:
        # gloo serves the CPU tensors that decide when to stop, NCCL the gradients.
        backends = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        try:
            dist.init_process_group(backends)
        except ValueError as error:  # of a variable that is missing; a scheduler may set some
            raise ConfigError(f"WORLD_SIZE is {size}, but {error}; {_BY_TORCHRUN}") from error
    try:
        yield World(torch.device(device), dist.get_rank(), size)
        dist.barrier()  # nobody leaves while another one still writes
    finally:
        if not inside:
            dist.destroy_process_group()


def _world_size() -> int:
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"WORLD_SIZE: expected a number of processes, got {given!r}")
    return int(given)


def broadcast_state(model: nn.Module, world: World) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if world.size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace every gradient by its mean over the ranks; one that is missing here counts as zero.

    A parameter without a gradient on any rank gets none.
    """
    if world.size == 1:
        return
    parameters = list(parameters)
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    used = [p for p, anywhere in zip(parameters, present.tolist(), strict=True) if anywhere]
    for p in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in used if p.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= world.size
        pieces = flat.split([gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def average(values: Tensor, world: World) -> Tensor:
    """Mean of `values` over the ranks."""
    if world.size > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world.size
    return values


def on_any_rank(flag: bool, world: World) -> bool:
    """Whether `flag` is set on some rank; every rank gets the same answer."""
    if world.size == 1:
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def wait_for_all(world: World) -> None:
    """Return when every rank has come here."""
    if world.size > 1:
        dist.barrier()


def gather_objects(value: Any, world: World) -> list[Any]:
    """`value` of every rank, in the order of the ranks."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one dtype, together at most a bucket where one alone is not more."""
    bucket: list[Tensor] = []
    elements = 0
    for gradient in gradients:
        full = elements + gradient.numel() > _BUCKET_ELEMENTS
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, elements = [], 0
        bucket.append(gradient)
        elements += gradient.numel()
    if bucket:
        yield bucket
