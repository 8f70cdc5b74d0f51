"""What a run leaves to read: `metrics.jsonl`, `metrics.csv` and TensorBoard events."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_JSONL, _CSV = "metrics.jsonl", "metrics.csv"

Row = dict[str, float | None]


def read_rows(folder: str | Path) -> list[Row]:
    """The logged rows of a run, oldest first; a value that was not finite is None.

    A damaged line is left out, with a warning unless it is the last, which a killed run leaves half
    written.
    """
    path = Path(folder) / _JSONL
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines()
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int) and _all_numbers(row):
            rows.append(row)
        elif number < len(lines):
            _log.warning("%s, line %d: no logged row, left out: %.80r", path, number, line)
    return rows


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """An OSError of writing, as on a full disk, does not say of which file it is."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class Logs:
    """Writes one row at a time to every log.

    Args:
        folder: the run's output folder; must exist.
        start: the step that the run starts from; a killed run's rows of later steps are removed.
        tensorboard: also write TensorBoard events.

    Raises:
        ImportError: TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, start: int, tensorboard: bool) -> None:
        self.folder = folder
        rows = [row for row in read_rows(folder) if (row["step"] or 0) <= start] if start else []
        self._columns = list(dict.fromkeys(key for row in rows for key in row))
        self._start_files(rows)
        self._events = _events(folder, start) if tensorboard else None

    def write(self, row: dict[str, float]) -> None:
        """Append `row`, which has the key `step`. A new key gives the CSV a new column."""
        new = [key for key in row if key not in self._columns]
        self._columns += new
        if new:
            self._start_files(read_rows(self.folder))
        self._write_files({key: _finite(value) for key, value in row.items()})
        if self._events is not None:
            for key, value in row.items():
                if key != "step":
                    self._events.add_scalar(key, value, int(row["step"]))

    def close(self) -> None:
        """Flush what is buffered."""
        if self._events is not None:
            self._events.close()

    def _start_files(self, rows: list[Row]) -> None:
        # Beside the old files, which a process that is killed here must not leave half empty.
        for name in (_JSONL, _CSV):
            (self.folder / f"{name}.tmp").write_text("")
        for row in rows:
            self._write_files(row, ".tmp")
        for name in (_JSONL, _CSV):
            os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def _write_files(self, row: Row, suffix: str = "") -> None:
        path = self.folder / f"{_JSONL}{suffix}"
        with naming_file(path), path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        path = self.folder / f"{_CSV}{suffix}"
        with naming_file(path), path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


def _all_numbers(row: dict[str, Any]) -> bool:
    return all(value is None or isinstance(value, (int, float)) for value in row.values())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _events(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'TensorBoard is not installed: pip install "jepa-fast[train]", or set tensorboard=false'
        ) from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
