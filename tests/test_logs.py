from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from jepa_fast.train.logs import Logs, read_rows


def rows(*steps: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": 1.0 / step} for step in steps]


def write(folder: Path, start: int, *steps: int) -> None:
    logs = Logs(folder, start, tensorboard=False)
    for row in rows(*steps):
        logs.write(row)
    logs.close()


def test_rows_come_back(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == []
    write(tmp_path, 0, 2, 4)
    assert read_rows(tmp_path) == rows(2, 4)
    with (tmp_path / "metrics.csv").open() as file:
        assert list(csv.reader(file)) == [["step", "loss"], ["2", "0.5"], ["4", "0.25"]]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    logs = Logs(tmp_path, 0, tensorboard=False)
    logs.write(*rows(2))
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.csv"):
        logs.write(*rows(4))


def test_a_resumed_run_replaces_the_rows_after_its_start(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, 4, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": "1"}\n')
        file.write('{"step": 8, "lo')  # killed while writing
    write(tmp_path, 4, 6, 8)
    assert read_rows(tmp_path) == rows(2, 4, 6, 8)
    with (tmp_path / "metrics.csv").open() as file:
        assert [line[0] for line in csv.reader(file)] == ["step", "2", "4", "6", "8"]


def test_a_run_killed_as_it_resumes_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Logs, row: object, *more: object) -> None:
        if row == {"step": 4, "loss": 0.25}:
            raise KeyboardInterrupt
        write_files(self, row, *more)

    write(tmp_path, 0, 2, 4, 6)
    before = [(tmp_path / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv")]
    write_files = Logs._write_files
    monkeypatch.setattr(Logs, "_write_files", killed)
    with pytest.raises(KeyboardInterrupt):
        Logs(tmp_path, 4, tensorboard=False)
    monkeypatch.undo()
    assert before == [(tmp_path / n).read_bytes() for n in ("metrics.jsonl", "metrics.csv")]
    write(tmp_path, 4, 7)
    assert read_rows(tmp_path) == rows(2, 4, 7)


def test_a_new_run_starts_new_files(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, 4)
    write(tmp_path, 0, 3)
    assert read_rows(tmp_path) == rows(3)


def test_a_new_metric_is_a_new_column(tmp_path: Path) -> None:
    def lines() -> list[list[str]]:
        with (tmp_path / "metrics.csv").open() as file:
            return list(csv.reader(file))

    write(tmp_path, 0, 2)
    logs = Logs(tmp_path, 2, tensorboard=False)
    logs.write({"step": 4, "knn": 0.5, "loss": 0.25})
    logs.write({"step": 6, "loss": 0.2})
    expected = [["step", "loss", "knn"], ["2", "0.5", ""], ["4", "0.25", "0.5"], ["6", "0.2", ""]]
    assert lines() == expected
    Logs(tmp_path, 6, tensorboard=False)
    assert lines() == expected
    assert read_rows(tmp_path)[1:] == [
        {"step": 4, "knn": 0.5, "loss": 0.25},
        {"step": 6, "loss": 0.2},
    ]


def test_what_is_not_finite_is_valid_json(tmp_path: Path) -> None:
    logs = Logs(tmp_path, 0, tensorboard=False)
    logs.write({"step": 1, "loss": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}


@pytest.mark.parametrize("damage", [b'{"st', b"3", b'{"loss": 1.0}', b"\0\0\xff", b"[]"])
def test_a_damaged_line_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    assert read_rows(tmp_path) == [{"step": 1}, {"step": 3}]
    (message,) = caplog.messages
    assert "metrics.jsonl, line 2: no logged row, left out" in message
    write(tmp_path, 3, 4)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 3, 4]


def test_tensorboard_events(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    logs = Logs(tmp_path, 0, tensorboard=True)
    for row in rows(1, 2):
        logs.write(row)
    logs.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
