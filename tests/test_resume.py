"""20 steps straight = 10 + a kill + 10 resumed, bit for bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny, trainer_of
from torch import Tensor

from jepa_fast import CheckpointError
from jepa_fast.train.checkpoint import load_checkpoint
from jepa_fast.train.errors import ConfigError
from jepa_fast.train.lock import FolderLock
from jepa_fast.train.logs import read_rows
from jepa_fast.train.run import pretrain
from jepa_fast.train.trainer import Trainer

METHODS = {
    "ijepa": ("model.method=ijepa",),
    "tcjepa": ("model.method=tcjepa", "model.text_heads=2"),
    "tijepa": ("model.method=tijepa", "model.width=16", "model.depth=1", "model.num_heads=2"),
    # Initialises itself from its first batch.
    "flow": ("model.method=probijepa", "model.head=flow", "model.head_options.hidden_dim=8"),
    # Draws its noise from the global generator.
    "diffusion": (
        "model.method=probijepa",
        "model.head=diffusion",
        "model.head_options.hidden_dim=8",
    ),
}


class Killed(Exception):
    """Nothing is saved on the way out of a process that is killed."""


def fit_until_killed(trainer: Trainer, at: int) -> None:
    prepare = trainer.prepare

    def killed(batch: Any, step: int) -> Any:
        if step == at:
            raise Killed
        return prepare(batch, step)

    trainer.prepare = killed
    with pytest.raises(Killed):
        trainer.fit()


def folders_open() -> list[str]:
    """Where this process's descriptors lead."""
    folder = Path("/proc/self/fd")
    return [os.readlink(folder / each) for each in os.listdir(folder) if (folder / each).exists()]


def tensors(state: Any) -> list[Tensor]:
    """Every tensor of a nested state, in a fixed order."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return [t for key in sorted(state, key=str) for t in tensors(state[key])]
    return [t for each in state for t in tensors(each)] if isinstance(state, list) else []


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, method: str) -> None:
    straight = tiny(tmp_path / "straight", *METHODS[method])
    pretrain(straight)

    broken = trainer_of(tiny(tmp_path / "killed", *METHODS[method]))
    fit_until_killed(broken, 13)
    assert load_checkpoint(tmp_path / "killed")["step"] == 10
    torch.manual_seed(999)  # another process has another random state
    resumed = tiny(tmp_path / "killed", *METHODS[method])
    pretrain(resumed, resume="")

    one, two = (load_checkpoint(tmp_path / name) for name in ("straight", "killed"))
    assert one["step"] == two["step"] == 20
    for part in ("model", "optimizer", "ranks"):
        expected, found = tensors(one[part]), tensors(two[part])
        assert len(expected) == len(found) > 0
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), part
    losses = [[row["loss"] for row in read_rows(tmp_path / n)] for n in ("straight", "killed")]
    assert losses[0] == losses[1]


def test_resuming_may_start_from_an_older_checkpoint_and_tells_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretrain(tiny(tmp_path))
    longer = tiny(tmp_path, "train.steps=22", "train.log_every=11")
    with caplog.at_level("INFO"):
        pretrain(longer, resume=str(tmp_path / "step-000000010.pt"))
    assert "train.steps is 22 here, and was 20 before" in caplog.text
    assert "resumed at step 10 of 22" in caplog.text
    assert [row["step"] for row in read_rows(tmp_path)] == [5, 10, 11, 22]


def test_a_run_is_not_resumed_into_the_folder_of_another(tmp_path: Path) -> None:
    for name in ("one", "two"):
        pretrain(tiny(tmp_path / name, "train.steps=10"))
    kept = shutil.copy(tmp_path / "one" / "last.pt", tmp_path / "kept.pt")
    before = (tmp_path / "two" / "metrics.jsonl").read_text()
    for elsewhere in (tmp_path / "one", Path(kept)):
        with pytest.raises(ConfigError, match=r"two holds another run than .*, which would"):
            pretrain(tiny(tmp_path / "two"), resume=str(elsewhere))
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == before
    pretrain(tiny(tmp_path / "one", "train.steps=12"), resume=kept)  # a copy of its own
    assert [row["step"] for row in read_rows(tmp_path / "one")] == [5, 10, 12]


def test_a_folder_is_that_of_one_run_at_a_time(tmp_path: Path) -> None:
    pretrain(tiny(tmp_path, "train.steps=10"))
    before = sorted(path.name for path in tmp_path.iterdir())
    with FolderLock(tmp_path) as other:
        other.take()
        for options in ({"resume": ""}, {"overwrite": True}):
            with pytest.raises(ConfigError, match="a run that another process is at"):
                pretrain(tiny(tmp_path, "train.steps=12"), **options)
        worker = os.fork()  # as of a loader; it lives on where the run itself is killed
        if worker == 0:
            os._exit(folders_open().count(str(tmp_path)))
        assert os.waitpid(worker, 0)[1] == 0
        assert folders_open().count(str(tmp_path)) == 1
    pretrain(tiny(tmp_path, "train.steps=10"), resume="")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_rows_that_span_a_checkpoint_are_those_of_the_straight_run(tmp_path: Path) -> None:
    odd = ("train.checkpoint_every=7", "train.log_every=10")
    pretrain(tiny(tmp_path / "straight", *odd))
    fit_until_killed(trainer_of(tiny(tmp_path / "killed", *odd)), 9)
    resumed = tiny(tmp_path / "killed", *odd)
    window = load_checkpoint(tmp_path / "killed")["ranks"][0]["window"]
    assert window["count"] == 7
    assert window["seconds"] > 0
    pretrain(resumed, resume="")

    straight, killed = (read_rows(tmp_path / name) for name in ("straight", "killed"))
    for row in (*straight, *killed):
        del row["images_per_second"]  # the clock's
    assert [row["step"] for row in straight] == [10, 20]
    assert killed == straight


@pytest.mark.parametrize(("before", "now"), [("null", "1"), ("1", "null")])
def test_a_run_resumed_within_a_row_may_log_something_else(
    tmp_path: Path, before: str, now: str
) -> None:
    odd = ("train.checkpoint_every=7", "train.log_every=10", "train.steps=10")
    fit_until_killed(trainer_of(tiny(tmp_path, *odd, f"train.clip_grad={before}")), 8)
    pretrain(tiny(tmp_path, *odd, f"train.clip_grad={now}"), resume="")
    (row,) = read_rows(tmp_path)
    assert ("grad_norm" in row) == (now == "1")


def test_a_run_killed_after_going_back_stays_on_its_new_course(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed_at_once(trainer: Trainer, begin: Callable[[], None]) -> None:
        begin()
        raise Killed

    pretrain(tiny(tmp_path))
    monkeypatch.setattr(Trainer, "fit", killed_at_once)
    with pytest.raises(Killed):
        pretrain(tiny(tmp_path), resume=str(tmp_path / "step-000000010.pt"))
    monkeypatch.undo()
    with caplog.at_level("INFO"):
        pretrain(tiny(tmp_path), resume="")
    assert "resumed at step 10 of 20" in caplog.text


def test_a_resumed_run_drops_half_a_checkpoint_of_the_killed_one(tmp_path: Path) -> None:
    pretrain(tiny(tmp_path, "train.steps=1"))
    for name in ("step-000000003.tmp", "step-mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    pretrain(tiny(tmp_path, "train.steps=2"), resume="")
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["step-mine.tmp"]


def test_a_resumed_run_leaves_out_a_damaged_row(tmp_path: Path) -> None:
    pretrain(tiny(tmp_path))
    log = tmp_path / "metrics.jsonl"
    first, _, *rest = log.read_text().splitlines()
    log.write_text("\n".join([first, '{"step": 1', *rest, ""]))
    pretrain(tiny(tmp_path, "train.steps=25"), resume="")
    assert [row["step"] for row in read_rows(tmp_path)] == [5, 15, 20, 25]


def test_the_optimizer_of_a_resumed_run_has_its_present_options(tmp_path: Path) -> None:
    pretrain(tiny(tmp_path, "train.steps=1"))
    trainer = trainer_of(tiny(tmp_path, "train.betas=[0.8, 0.9]", "train.eps=1e-6"))
    trainer.restore(load_checkpoint(tmp_path))
    for group in trainer.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        pretrain(tiny(tmp_path), resume="")
    pretrain(tiny(tmp_path, "train.steps=1"))
    for override, problem in (
        ("model.predictor_depth=2", "model.predictor_depth: expected 1, as the run has, got 2"),
        ("train.batch_size=4", "train.batch_size: expected 8, as the run has, got 4"),
        ("seed=5", "seed: expected 0, as the run has, got 5"),
        ("data.train_length=40", "data.train: expected 48 images, as the run has, got 40"),
    ):
        with pytest.raises(ConfigError, match=f"^{problem}; .*set it back, or start a new run"):
            pretrain(tiny(tmp_path, override), resume="")
    state = load_checkpoint(tmp_path)
    odd = {**state, "model": {"odd": torch.zeros(1)}}  # no setting explains it
    with pytest.raises(CheckpointError, match=r"(?s)another model.*predictor_blocks\.0"):
        trainer_of(tiny(tmp_path)).restore(odd)
    (rank,) = state["ranks"]
    others = {**rank, "loader": {**rank["loader"], "world_size": 2}}  # 16 images a step
    with pytest.raises(
        ConfigError, match=r"^train\.batch_size: expected 16, as the run has, got 8"
    ):
        trainer_of(tiny(tmp_path)).restore({**state, "ranks": [others] * 2})
    streams = {**rank, "loader": {**rank["loader"], "num_workers": 0, "shuffle_buffer": 8}}
    with pytest.raises(
        ConfigError, match=r"^data\.in_memory: expected False, as the run has, got True; "
    ):
        trainer_of(tiny(tmp_path)).restore({**state, "ranks": [streams]})


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    pretrain(tiny(tmp_path, "train.steps=5"))
    before = (tmp_path / "metrics.jsonl").read_text()
    assert pretrain(tiny(tmp_path, "train.steps=5"), resume="") == []
    assert (tmp_path / "metrics.jsonl").read_text() == before
    elsewhere = tiny(tmp_path / "elsewhere", "train.steps=5")
    assert pretrain(elsewhere, resume=str(tmp_path)) == []
