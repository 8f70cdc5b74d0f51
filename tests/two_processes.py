"""What test_distributed.py starts under torchrun: `two_processes.py FOLDER`."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from tiny_runs import tiny, trainer_of
from torch import nn

from jepa_fast import IJepa
from jepa_fast.masks import BlockMaskSampler, pack_masks
from jepa_fast.nn.vit import VisionTransformer
from jepa_fast.optim import AdamWEma
from jepa_fast.train.distributed import World, average_gradients, join_world, on_any_rank
from jepa_fast.train.run import pretrain

TIJEPA = ("model.method=tijepa", "model.width=16", "model.depth=1", "model.num_heads=2")
PROBABILISTIC = ("model.method=probijepa", "model.head_options.hidden_dim=8")
# Captions, words and contexts of different numbers: the ranks' halves of a batch weigh differently.
UNEVEN = ("data.uncaptioned=0.5",)

RUNS = {
    name: ("train.steps=4", "train.log_every=1", *overrides)
    for name, overrides in {
        "ijepa": (),
        "tcjepa": ("model.method=tcjepa", *UNEVEN),
        "per_caption": ("model.method=tcjepa", "model.per_caption=true", *UNEVEN),
        "tijepa": (*TIJEPA, *UNEVEN, "model.vicreg=[25,25,1]"),
        "cross_modal": (*TIJEPA, *UNEVEN, "model.objective=cross_modal"),
        "mixture": ("model.method=probijepa",),
        "autoregressive": (*PROBABILISTIC, "model.head=autoregressive"),
        # Its ActNorm initialises itself from the first batch, which differs between ranks, and so
        # that its gradients are zero but for rounding, which AdamW would blow up to whole steps.
        "flow": (*PROBABILISTIC, "model.head=flow", "train.eps=1e-4"),
    }.items()
}


def check_collectives(world: World) -> None:
    everywhere, on_one, nowhere = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    everywhere.grad = torch.full((3,), float(world.rank + 1))
    if world.rank == 1:
        on_one.grad = torch.full((3,), 4.0)
    average_gradients([everywhere, on_one, nowhere], world)
    assert torch.equal(everywhere.grad, torch.full((3,), 1.5))
    assert torch.equal(on_one.grad, torch.full((3,), 2.0))
    assert nowhere.grad is None
    assert on_any_rank(world.rank == 1, world)
    assert not on_any_rank(False, world)


def check_skips(world: World, folder: Path) -> None:
    """What one rank could not read is known to the first, which speaks for all."""
    trainer = trainer_of(tiny(folder / "skips"), world)
    trainer.loader.skips.add({f"of rank {world.rank}": "broken"})
    trainer.save()
    if world.is_main:
        assert list(trainer.loader.skips.reasons) == ["of rank 0", "of rank 1"]


def check_shards(world: World) -> None:
    """FSDP2's parameters train as whole ones do, and so does their teacher."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def trained(shard: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))  # odd shards
        teacher = copy.deepcopy(student)
        if shard:
            mesh = init_device_mesh("cpu", (world.size,))
            for network in (student, teacher):
                fully_shard(network, mesh=mesh)
        targets = list(zip(student.parameters(), teacher.parameters(), strict=True))
        optimizer = AdamWEma(student.parameters(), lr=0.01, targets=targets, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            student(torch.ones(4, 5)).square().sum().backward()
            optimizer.step()
        found = [p.detach() for pair in targets for p in pair]
        return [p.full_tensor() for p in found] if shard else found

    for got, want in zip(trained(shard=True), trained(shard=False), strict=True):
        torch.testing.assert_close(got, want)


def check_packs(world: World) -> None:
    """Processes with different numbers of packs make the gradients of one with all images."""
    sampler = BlockMaskSampler((6, 6), min_context=2)
    images = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(0))

    def model() -> IJepa:
        torch.manual_seed(0)
        encoder = VisionTransformer(24, 4, embed_dim=16, depth=1, num_heads=2)
        return IJepa(encoder, predictor_dim=8, predictor_depth=1, predictor_heads=2)

    alone, shared = model(), model()
    alone(images, sampler(0, 8)).loss.backward()
    parallel = nn.parallel.DistributedDataParallel(shared)
    mine = torch.arange(8).chunk(world.size)[world.rank]
    masks = sampler(0, mine)
    packs = pack_masks(masks, int(masks.filled().sum()) + (world.rank == 0))
    assert (len(packs) > 1) == (world.rank != 0)
    for number, pack in enumerate(packs, start=1):
        with parallel.no_sync() if number < len(packs) else nullcontext():
            (pack.share * parallel(images[mine], pack).loss).backward()
    for got, want in zip(shared.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def main(folder: Path) -> None:
    with join_world("cpu") as world:
        check_collectives(world)
        check_shards(world)
        check_packs(world)
        check_skips(world, folder)
        for name, overrides in RUNS.items():
            pretrain(tiny(folder / name, *overrides))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
