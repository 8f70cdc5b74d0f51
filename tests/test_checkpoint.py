from __future__ import annotations

import os
import random
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from tiny_runs import tiny, trainer_of

from jepa_fast import CheckpointError
from jepa_fast.train.build import build_model
from jepa_fast.train.checkpoint import (
    RUN,
    CheckpointFolder,
    load_checkpoint,
    rng_state,
    set_rng_state,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_last_points_to_the_newest_and_older_ones_are_dropped(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run", keep=1)
    assert folder.last is None
    for step in (5, 10, 15):
        folder.save({"model": {"w": torch.full((2,), float(step))}}, step)
    assert names(tmp_path / "run") == ["last.pt", "step-000000010.pt", "step-000000015.pt"]
    state = load_checkpoint(tmp_path / "run")
    assert state["step"] == 15
    assert torch.equal(state["model"]["w"], torch.full((2,), 15.0))
    assert load_checkpoint(tmp_path / "run" / "step-000000010.pt")["step"] == 10


def test_the_checkpoint_just_written_is_never_the_one_dropped(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    folder.save({}, 30)
    folder.save({}, 20)  # a run resumed from an older checkpoint
    assert names(tmp_path) == ["last.pt", "step-000000020.pt"]
    assert load_checkpoint(tmp_path)["step"] == 20


def test_a_crash_while_writing_leaves_the_last_good_one(tmp_path: Path, monkeypatch) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save({}, 1)

    def full_disk(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"step-000000002\.pt .*No space.*last\.pt still"):
        folder.save({"model": torch.zeros(100)}, 2)
    assert names(tmp_path) == ["last.pt", "step-000000001.pt"]
    assert load_checkpoint(tmp_path)["step"] == 1


@pytest.mark.parametrize(
    ("cause", "match"),
    [(OSError(27, "File too large"), "OSError: .*File too large"), (None, "unexpected pos 64")],
)
def test_what_torch_says_of_a_full_disk_leaves_no_half_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: OSError | None, match: str
) -> None:
    def full_disk(state: object, file: BinaryIO) -> None:
        file.write(bytes(100))
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"
        ) from cause

    monkeypatch.setattr(torch, "save", full_disk)
    folder = CheckpointFolder(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match=f"{match}.*; there is none before it"):
        folder.save({}, 1)
    assert names(tmp_path) == []


def test_other_errors_of_writing_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match=r"Can't (pickle|get) local object"):
        CheckpointFolder(tmp_path, keep=1).save({"model": lambda: None}, 1)
    assert names(tmp_path) == []


def test_clear_removes_checkpoints_and_leaves_other_files(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    folder.save({}, 1)
    (tmp_path / "step-000000002.tmp").touch()
    (tmp_path / "last.tmp").touch()
    mine = ["last.json", "notes.txt", "step-2-notes.txt", "step-best.pt"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    folder.clear()
    assert names(tmp_path) == mine


def test_a_folder_without_the_link_has_its_highest_step_as_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (5, 10):
        folder.save({}, step)
    os.utime(tmp_path / "step-000000010.pt", (1, 1))  # copied first
    (tmp_path / "last.pt").unlink()
    assert folder.last == tmp_path / "step-000000010.pt"
    assert load_checkpoint(tmp_path)["step"] == 10
    assert not caplog.messages
    (tmp_path / "last.pt").symlink_to("gone.pt")
    assert load_checkpoint(tmp_path)["step"] == 10
    link, taken = tmp_path / "last.pt", tmp_path / "step-000000010.pt"
    assert caplog.messages == [f"{link} leads to gone.pt, which is gone: taking {taken}"]


def test_a_frozen_encoder_comes_from_a_folder_without_the_link(tmp_path: Path) -> None:
    teacher = trainer_of(tiny(tmp_path))
    teacher.save()
    (tmp_path / "last.pt").unlink()
    crosser = ("model.method=tijepa", "model.width=16", "model.depth=1", "model.num_heads=2")
    model = build_model(tiny(tmp_path, *crosser, f"model.encoder_weights={tmp_path}", "seed=1"))
    for name, p in teacher.model.target_encoder.named_parameters():
        assert torch.equal(p, model.encoder.get_parameter(name)), name


def test_going_on_from_an_older_checkpoint_drops_the_later_ones(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (5, 10, 15):
        folder.save({}, step)
    folder.rewind(7)  # there is none, as where a run goes on from another folder
    assert load_checkpoint(tmp_path)["step"] == 15
    folder.rewind(5)
    assert names(tmp_path) == ["last.pt", "step-000000005.pt"]
    assert load_checkpoint(tmp_path)["step"] == 5


def test_missing_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere\.pt"):
        load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*last\.pt"):
        load_checkpoint(tmp_path)
    whole = CheckpointFolder(tmp_path, keep=0).save({"model": torch.zeros(1000)}, 1)
    whole.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(whole)
    for content, problem in ((b"", "it is empty"), (b"no torch.save", r"\w+Error")):
        whole.write_bytes(content)
        for only_config in (False, True):
            with pytest.raises(CheckpointError, match=rf"cannot be read \({problem}") as refused:
                load_checkpoint(whole, only_config=only_config)
            assert "mmap" not in str(refused.value)
    torch.save({"encoder": {}}, tmp_path / "public.pt")
    with pytest.raises(CheckpointError, match=r"another kind of file.*jepa_fast\.interop"):
        load_checkpoint(tmp_path / "public.pt")


def test_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path, keep=0).save({"config": {}, "model": {}}, 1)
    assert load_checkpoint(path, parts=("config", "model"))["step"] == 1
    with pytest.raises(CheckpointError, match="got one without frozen, optimizer, ranks; take"):
        load_checkpoint(path, parts=RUN)


def test_damage_that_torch_does_not_see_is_refused(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path, keep=0).save({"model": torch.full((1000,), 7.0)}, 1)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((9,), 7.0).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["model"][1] != 7
    with pytest.raises(CheckpointError, match=r"cannot be read \(the checksum of .*data/0 .*older"):
        load_checkpoint(path)
    assert load_checkpoint(path, only_config=True)["step"] == 1
    with pytest.raises(CheckpointError, match="the checksum of"):  # as a frozen encoder
        build_model(tiny(tmp_path, "model.method=tijepa", f"model.encoder_weights={tmp_path}"))


def test_a_process_that_wants_no_checksums_gets_them_all_the_same(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        CheckpointFolder(tmp_path, keep=0).save({}, 1)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(tmp_path)["step"] == 1


def test_files_without_checksums_are_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"format": 1, "step": 3}, path, _use_new_zipfile_serialization=False)
    assert load_checkpoint(path)["step"] == 3


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"format": 1, "model": Runs()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="cannot be read") as refused:
        load_checkpoint(tmp_path / "evil.pt")
    assert "Re-running" not in str(refused.value)  # torch's advice to read it all the same
    assert not (tmp_path / "ran").exists()


def test_random_state_survives_the_file(tmp_path: Path) -> None:
    CheckpointFolder(tmp_path, keep=0).save({"rng": rng_state()}, 1)
    first = (torch.rand(3), random.random(), torch.randn(3), np.random.standard_normal(3).tolist())
    set_rng_state(load_checkpoint(tmp_path)["rng"])
    again = (torch.rand(3), random.random(), torch.randn(3), np.random.standard_normal(3).tolist())
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert torch.equal(first[2], again[2])
    assert first[3] == again[3]
