from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny
from torch import nn
from two_processes import RUNS

from jepa_fast.train import distributed
from jepa_fast.train.build import build_loader
from jepa_fast.train.checkpoint import load_checkpoint
from jepa_fast.train.distributed import World, average_gradients, join_world, resolve_device
from jepa_fast.train.errors import ConfigError
from jepa_fast.train.logs import read_rows
from jepa_fast.train.run import pretrain


def test_two_processes_give_the_loss_of_one(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [sys.executable, *launch, str(tests / "two_processes.py"), str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert finished.returncode == 0, finished.stderr
    for name, overrides in RUNS.items():
        pretrain(tiny(tmp_path / "one" / name, *overrides))
        one, two = (read_rows(tmp_path / n / name) for n in ("one", "two"))
        assert [row["step"] for row in two] == [1, 2, 3, 4]
        losses = [row["loss"] for row in one]
        assert [row["loss"] for row in two] == pytest.approx(losses, abs=1e-5), name
        first, second = (load_checkpoint(tmp_path / n / name) for n in ("one", "two"))
        for key, value in first["model"].items():
            assert torch.allclose(value, second["model"][key], atol=1e-5), (name, key)
    # Each rank saw its own half of every batch, and its random state is its own.
    ranks = load_checkpoint(tmp_path / "two" / "ijepa")["ranks"]
    assert len(ranks) == 2
    assert ranks[0]["loader"] == ranks[1]["loader"]
    assert not torch.equal(ranks[0]["rng"]["torch"], ranks[1]["rng"]["torch"])

    # One process goes on where two have stopped, as it does where it stopped itself.
    longer = (*RUNS["ijepa"], "train.steps=9")
    for n in ("one", "two"):
        pretrain(tiny(tmp_path / n / "ijepa", *longer), resume="")
    one, two = (read_rows(tmp_path / n / "ijepa") for n in ("one", "two"))
    assert [row["step"] for row in two] == list(range(1, 10))
    losses = [row["loss"] for row in one]
    assert [row["loss"] for row in two] == pytest.approx(losses, abs=1e-5)

    flow = load_checkpoint(tmp_path / "two" / "flow")["model"]
    assert any("log_scale" in key and value.abs().max() > 0 for key, value in flow.items())


def test_a_process_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_world("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        p = nn.Parameter(torch.zeros(2))
        p.grad = torch.ones(2)
        average_gradients([p], world)
        assert p.grad.tolist() == [1, 1]


def test_gradients_travel_in_buckets_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_BUCKET_ELEMENTS", 10)
    single = [torch.zeros(n) for n in (4, 6, 1, 30, 2)]
    mixed = [*single, torch.zeros(3, dtype=torch.float64)]
    sizes = [[t.numel() for t in bucket] for bucket in distributed._buckets(mixed)]
    assert sizes == [[4, 6], [1], [30], [2], [3]]


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="device: got 'cuda', but no CUDA device is visible"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match="device: expected auto, cpu or cuda, got 'tpu'"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(each) for each in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    with pytest.raises(ConfigError, match="device: expected cuda:0 to cuda:1, got 'cuda:2'"):
        resolve_device("cuda:2")


def test_variables_that_torchrun_did_not_set_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE: expected a number of processes, got 'two'"):
        join_world("cpu").__enter__()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, but .*RANK expected.*by torchrun"):
        join_world("cpu").__enter__()


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    world = World(torch.device("cpu"), rank=0, size=3)
    with pytest.raises(ConfigError, match=r"train\.batch_size: expected a multiple of the 3 proc"):
        build_loader(tiny(tmp_path), world)
