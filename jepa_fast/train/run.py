"""A whole run: from a configuration to checkpoints."""

from __future__ import annotations

import logging
import math
import os
import statistics
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from jepa_fast.train.build import (
    Prepare,
    build_loader,
    build_model,
    build_text,
    check_data_paths,
)
from jepa_fast.train.checkpoint import RUN, find_last, load_checkpoint
from jepa_fast.train.config import Config, TrainConfig
from jepa_fast.train.distributed import join_world
from jepa_fast.train.errors import ConfigError
from jepa_fast.train.lock import FolderLock
from jepa_fast.train.logs import Row, naming_file, read_rows
from jepa_fast.train.saved import differences
from jepa_fast.train.trainer import Trainer

_log = logging.getLogger(__name__)
RESULTS, REPORT = "eval.json", "report.html"
"""What an evaluation leaves beside the checkpoints of a run."""


def pretrain(config: Config, *, resume: str | None = None, overwrite: bool = False) -> list[str]:
    """Train by a configuration, in this process or as one of torchrun's.

    Args:
        config: of the run.
        resume: checkpoint, or folder of a run, to continue from; "" for the output folder. Later
            checkpoints in the output folder are dropped, as the run then takes another course.
        overwrite: replace an earlier run in the output folder, and its evaluation, once the new one
            has read its first batch.

    Returns:
        Why the finished run counts as failed (`failures`); empty if it does not, and on all ranks
        but the first.

    Raises:
        ConfigError, CheckpointError: it cannot start.
        NonFiniteError, CheckpointError, Interrupted: it stopped on the way, see `Trainer.fit`.
    """
    folder = Path(config.output)
    with join_world(config.device) as world, FolderLock(folder) as lock:
        state = None
        if world.is_main:
            lock.take()  # where the folder is there already
        if resume is not None:
            state = load_checkpoint(resume or folder, parts=RUN)
            if world.is_main and _holds_another_run(folder, Path(resume or folder), state):
                raise ConfigError(
                    f"output: {folder} holds another run than {resume}, which would be mixed with "
                    "it; output=FOLDER goes on in another folder, --resume alone goes on with the "
                    "run that is there"
                )
            for key, before, now in differences(state["config"], config.as_dict()):
                _log.warning("%s is %s here, and was %s before", key, now, before)
        elif world.is_main and not overwrite and find_last(folder) is not None:
            raise ConfigError(
                f"output: {folder} holds a run already; --resume continues it, --overwrite "
                "replaces it, output=FOLDER starts another one"
            )
        if world.is_main:
            _check_output(folder)
        check_data_paths(config)
        torch.manual_seed(config.seed)
        model = build_model(config).to(world.device)
        # The ranks start from the same weights, and draw different noise.
        torch.manual_seed(config.seed + world.rank)
        text = build_text(config, world.device)
        trainer = Trainer(
            model=model,
            loader=build_loader(config, world),
            prepare=Prepare(config, model, text, world.device),
            config=config.train,
            folder=folder,
            world=world,
            described=config.as_dict(),
            tensorboard=config.tensorboard,
        )
        if state is not None:
            trainer.restore(state)
            _log.info("resumed at step %d of %d", trainer.step, trainer.total_steps)

        def begin() -> None:
            # Not earlier: a run that cannot start must leave the one before it as it was.
            if not world.is_main:
                return
            lock.take()
            if state is None:
                trainer.checkpoints.clear()
                for name in (RESULTS, REPORT):  # would pass for those of the run that begins
                    (folder / name).unlink(missing_ok=True)
            else:
                trainer.checkpoints.drop_unfinished()
                if _is_of(folder, Path(resume or folder)):
                    trainer.checkpoints.rewind(trainer.step)
            described = folder / "config.yaml"
            with naming_file(described):
                described.write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))

        trainer.fit(begin)
        if trainer.loader.skipped:
            _log.warning("%s", trainer.loader.skips.summary())
        rows = read_rows(folder) if world.is_main else []
        if not rows:  # another rank, or resumed at the end of the run and into a new folder
            return []
        _log.info("%s: %s", folder, summary(rows))
        return failures(rows, config.train)


def _check_output(folder: Path) -> None:
    """Find out early whether a run can write where it should. Nothing of it is left.

    Raises:
        ConfigError: it cannot.
    """
    missing = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "it is a file" if folder.is_file() else error.strerror
        raise ConfigError(
            f"output: expected a folder that can be written to, got {folder} ({why}); "
            "output=FOLDER names another one"
        ) from error
    finally:
        for each in missing:
            with suppress(OSError):
                each.rmdir()


def _is_of(folder: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint, or the folder of one, is that of a run's folder."""
    return (checkpoint if checkpoint.is_dir() else checkpoint.resolve().parent).samefile(folder)


def _holds_another_run(folder: Path, checkpoint: Path, state: dict[str, Any]) -> bool:
    """Whether a run's folder has checkpoints, and this one, from elsewhere, is no copy of them."""
    if find_last(folder) is None or _is_of(folder, checkpoint):
        return False
    return Path(state["config"]["output"]).resolve() != folder.resolve()


def summary(rows: list[Row]) -> str:
    """How a run went, in one line: where the loss, the rank of the targets and the speed were."""
    loss, rank = (_values(rows, name) for name in ("loss", "target_rank"))
    speed = statistics.median(_values(rows, "images_per_second"))
    steps = rows[-1]["step"]
    if len(rows) == 1:
        return (
            f"{steps} steps, loss {loss[0]:.4g}, effective rank of the targets {rank[0]:.3g}, "
            f"{speed:.0f} images/s (one logged row; a lower train.log_every shows the course)"
        )
    return (
        f"{steps} steps, loss {loss[0]:.4g} -> {loss[-1]:.4g}, effective rank of the "
        f"targets {rank[0]:.3g} -> {rank[-1]:.3g}, {speed:.0f} images/s"
    )


def _values(rows: list[Row], name: str) -> list[float]:
    """A logged value of every row; what was not finite, or is missing, as NaN."""
    found = (row.get(name) for row in rows)
    return [math.nan if value is None else value for value in found]


def failures(rows: list[Row], config: TrainConfig) -> list[str]:
    """Why a finished run is a failed one: collapsed, or nothing learned. Empty if neither.

    Args:
        rows: what was logged; the first row is the run's beginning, the last tenth its end.
        config: thresholds `collapse`, and `require_learning`.
    """
    end = rows[-max(1, len(rows) // 10) :]
    found = []
    for name, key, least in (
        ("effective rank", "target_rank", config.collapse.min_rank),
        ("mean standard deviation", "target_std_mean", config.collapse.min_std),
    ):
        value = statistics.fmean(_values(end, key))
        if least > 0 and not value >= least:  # NaN has collapsed, too
            found.append(
                f"collapsed: the {name} of the targets is {value:.4g}, expected {least:g} or more"
            )
    if config.require_learning:
        first, last = _values(rows, "loss")[0], statistics.fmean(_values(end, "loss"))
        if len(rows) < 2:
            found.append("one logged row cannot show that the loss fell; lower train.log_every")
        elif not last < first:
            found.append(f"the loss did not fall: {first:.4g} at first, {last:.4g} at the end")
    return found
