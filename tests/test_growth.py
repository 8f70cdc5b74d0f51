"""The growth of text attention: which sizes are measured, and the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import growth
import tables


def test_one_size_doubles_up_to_the_whole_layers() -> None:
    shapes = growth.sizes_of("C")
    assert list(shapes) == [1, 2, 4, 8]
    for size, shape in shapes.items():
        assert shape == {**growth.WHOLE, "C": size}
    assert list(growth.sizes_of("T")) == [15, 29, 58, 116]


def test_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"B": 1, "M": 2, "T": 16, "C": 8, "S": 16, "d": 32}
    monkeypatch.setattr(growth, "WHOLE", small)
    output = tmp_path / "growth.json"
    monkeypatch.setattr(sys, "argv", ["growth.py", "--rounds", "1", "--output", str(output)])
    growth.main()
    found = json.loads(output.read_text())["grows"]
    assert list(found) == list(growth.GROWS)
    for providers in found.values():
        for sizes in providers.values():
            assert len(sizes) == 4
            assert all(each["seconds"] > 0 and each["bytes"] > 0 for each in sizes.values())
    eager, ours = (
        {int(size): each["bytes"] for size, each in found["captions"][name].items()}
        for name in ("eager", "ours")
    )
    assert eager[8] > 4 * eager[1]
    assert all(ours[size] < eager[size] for size in eager)

    for provider in found["captions"].values():
        for size, each in provider.items():
            each |= {"seconds": int(size) * 0.25, "bytes": 2**20}
    output.write_text(json.dumps({"grows": found}))
    lines = tables.growth(tables.Results(tmp_path))
    assert lines[2] == (
        "| captions | 1 / 2 / 4 / 8 | 1.0 / 2.0 / 4.0 / 8.0 | 1.0 / 1.0 / 1.0 / 1.0 MiB "
        "| 1.0 / 2.0 / 4.0 / 8.0 | 1.0 / 1.0 / 1.0 / 1.0 MiB |"
    )
    assert len(lines) == 2 + len(growth.GROWS)
