"""Configurations that come out of checkpoints: what holds of them, and what is refused."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_fast.train.checkpoint import load_checkpoint
from jepa_fast.train.config import Config, parse_config
from jepa_fast.train.errors import ConfigError

_log = logging.getLogger(__name__)
# `::` joins URLs, and may hide a pipe behind braces.
_RUNS_A_COMMAND = re.compile(r"pipe:|::", re.IGNORECASE)
_IDENTITY = (("model", "method"), ("data", "kind"))
"""What tells runs apart: the recipe of another run is no way to resume this one."""


def resumed_config(
    checkpoint: str | Path, given: Config, overrides: Sequence[str] = (), *, recipe: str
) -> Config:
    """The configuration that a run goes on with: its own, with the overrides given now.

    What the recipe has otherwise is logged, a line each, and does not hold.

    Args:
        checkpoint: file, or the output folder of a run.
        given: the recipe with the overrides, which says where the output goes.
        overrides: `key=value`, those that `given` has.
        recipe: its name, for messages.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ConfigError: overrides that do not fit the run's configuration, a recipe of another method
            or kind of data, or code that the checkpoint would run and `given` does not ask for.
    """
    saved = load_checkpoint(checkpoint, only_config=True, parts=("config",))["config"]
    config = parse_config(
        {**saved, "output": given.output}, overrides, source=f"{checkpoint}, with the overrides"
    )
    own, now = given.as_dict(), config.as_dict()
    for section, key in _IDENTITY:
        mine, its = own[section][key], now[section][key]
        if mine != its:
            raise ConfigError(
                f"{section}.{key}: expected {its}, as the run in {checkpoint} has, got {mine} from "
                f"{recipe}; name the recipe that the run was started with, or, if that is this "
                f"one, repeat {section}.{key}={its}"
            )
    refuse_foreign_code(config, own)
    for name, mine, its in differences(own, now):
        _log.warning(
            "%s: %s has %s, the run goes on with its own %s; %s=... changes it",
            *(name, recipe, _text(mine), _text(its), name),
        )
    return config


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value in `one`, value in `other`) wherever two configurations differ."""
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def refuse_foreign_code(config: Config, own: Mapping[str, Any]) -> None:
    """A checkpoint may come from anywhere; only what the user repeats may run code.

    Args:
        config: of a checkpoint.
        own: plain values that the user has given.

    Raises:
        ConfigError: a `pipe:` URL or `trust_remote_code` that is not in `own`.
    """
    data: Any = config.data
    found: dict[tuple[str, str], Any] = {}
    if data.kind == "shards":
        urls = {("data", name): getattr(data, name) or "" for name in ("train", "val")}
        found |= {key: url for key, url in urls.items() if _RUNS_A_COMMAND.search(url)}
    if config.text.trust_remote_code:
        found["text", "trust_remote_code"] = True
    for (section, name), value in found.items():
        if own.get(section, {}).get(name) != value:
            key, text = f"{section}.{name}", json.dumps(value)
            raise ConfigError(
                f"{key}: the checkpoint's configuration has {text}, which runs code on this "
                f"machine; if you trust it, repeat it as an override, {key}={text}, otherwise give "
                "another value"
            )


def _text(value: Any) -> str:
    return json.dumps(value, default=str)
