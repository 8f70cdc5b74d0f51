"""Launch configs of Triton kernels: looked up, never searched for at run time.

`ops/<op>/configs/<GPU name>.json` maps a key that the operator chooses (dtypes, shape bucket) to a
config. Where the GPU has no file, or its file no such key, `default.json` is the heuristic; that is
said once.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

Config = dict[str, int]
_logger = logging.getLogger(__name__)


_pretended: str | None = None


@contextmanager
def pretend(gpu: str) -> Iterator[None]:
    """Has `lookup` give the configs of the file `gpu` (no more than these) whatever the device."""
    global _pretended
    _pretended = gpu
    try:
        yield
    finally:
        _pretended = None


def lookup(folder: Path, key: str, device: torch.device, variants: Sequence[str] = ()) -> Config:
    """The config for `key` on `device`, from the JSON files in `folder`.

    Args:
        variants: of the first that the file has as `key-variant`, that is the config.

    Raises:
        KeyError: neither the GPU's file nor `default.json` has the key.
    """
    configs = _lookup(folder, key, device) if _pretended is None else read(folder, _pretended)
    own = (f"{key}-{variant}" for variant in variants)
    return configs[next((name for name in own if name in configs), key)]


@functools.cache
def _lookup(folder: Path, key: str, device: torch.device) -> dict[str, Config]:
    """The configs of the GPU's file where it has the key, else those of `default.json`."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    tuned = read(folder, gpu.replace(" ", "_"))
    if key in tuned:
        return tuned
    if device.type == "cuda":
        _logger.warning(
            "%s has no launch config for %s on %s: the default is used; "
            "`jepa-fast bench --tune` finds a better one",
            folder.parent.name,
            key,
            gpu,
        )
    return read(folder, "default")


def read(folder: Path, name: str) -> dict[str, Config]:
    """All configs of one file; none where there is no such file."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def shipped(folder: Path) -> dict[str, dict[str, Config]]:
    """Every file's configs, by its name without `.json`."""
    return {path.stem: read(folder, path.stem) for path in sorted(folder.glob("*.json"))}
