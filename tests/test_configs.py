"""Launch configs: the GPU's own where there are some, else the default, which is said once."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jepa_fast.ops import _configs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The configs of an operator, tuned for a GPU that this machine then seems to have."""
    configs = tmp_path / "some_op/configs"
    configs.mkdir(parents=True)
    (configs / "default.json").write_text(
        json.dumps({"small": {"block": 1}, "large": {"block": 2}, "large-odd": {"block": 3}})
    )
    (configs / "NVIDIA_H200.json").write_text(json.dumps({"small": {"block": 8}}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    _configs._lookup.cache_clear()
    yield configs
    _configs._lookup.cache_clear()


def test_a_miss_falls_back_and_says_so_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    gpu = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING):
        assert _configs.lookup(folder, "small", gpu) == {"block": 8}
        assert not caplog.records
        assert _configs.lookup(folder, "large", gpu) == {"block": 2}
        assert _configs.lookup(folder, "large", gpu) == {"block": 2}
    (record,) = caplog.records
    assert "some_op has no launch config for large on NVIDIA H200" in record.getMessage()
    with pytest.raises(KeyError, match="huge"):
        _configs.lookup(folder, "huge", gpu)


def test_the_interpreter_takes_the_default_in_silence(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _configs.lookup(folder, "small", torch.device("cpu")) == {"block": 1}
    assert not caplog.records


def test_a_variant_may_have_a_config_of_its_own(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert _configs.lookup(folder, "large", cpu, ["odd"]) == {"block": 3}
    assert _configs.lookup(folder, "large", cpu, ["prime", "odd"]) == {"block": 3}
    assert _configs.lookup(folder, "large", cpu, ["even"]) == {"block": 2}
    assert _configs.lookup(folder, "small", gpu, ["odd"]) == {"block": 8}
    for variants in (["odd"], ["even"], []):
        _configs.lookup(folder, "large", gpu, variants)
    assert len(caplog.records) == 1  # of what is missing, not of every variant


def test_shipped_configs_are_listed_by_gpu(folder: Path) -> None:
    assert set(_configs.shipped(folder)) == {"NVIDIA_H200", "default"}
