"""The training loop. It knows no model and no data set, and may be stopped anywhere."""

from __future__ import annotations

import itertools
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jepa_fast.data import counter
from jepa_fast.data.batch import Batch
from jepa_fast.data.extras import require
from jepa_fast.data.images import CocoCaptions
from jepa_fast.data.loader import Loader
from jepa_fast.errors import CheckpointError, DataError
from jepa_fast.host_memory import kept_host_memory
from jepa_fast.masks import BlockMasks
from jepa_fast.optim import (
    AdamWEma,
    copy_teacher_buffers,
    parameter_groups,
    teacher_parameters,
)
from jepa_fast.ranges import phase
from jepa_fast.train.checkpoint import (
    CheckpointFolder,
    frozen_digest,
    load_weights,
    rng_state,
    set_rng_state,
)
from jepa_fast.train.config import TrainConfig
from jepa_fast.train.distributed import (
    World,
    average,
    average_gradients,
    broadcast_state,
    gather_objects,
    on_any_rank,
    resolve_precision,
    wait_for_all,
)
from jepa_fast.train.errors import ConfigError, Interrupted, NonFiniteError
from jepa_fast.train.logs import Logs
from jepa_fast.train.saved import differences
from jepa_fast.train.schedules import warmup_cosine

_log = logging.getLogger(__name__)

_KEYS = {
    "seed": "seed",
    "batch_size": "train.batch_size",
    "world_size": "processes",
    "samples": "data.train",
    "streamed": "data.in_memory",
    "num_workers": "data.workers",
    "shuffle_buffer": "data.shuffle_buffer",
}
"""What the user calls the loader's settings."""
_SET_BACK = (
    "a run cannot be resumed with another value: set it back, or start a new run, with "
    "output=FOLDER and without --resume"
)

Inputs = tuple[Tensor, BlockMasks, dict[str, Tensor]]


@dataclass
class Trainer:
    """Trains a model from `step` to `total_steps`.

    What is random in a step is a function of (seed, step, sample id) or comes from the global
    generators; a checkpoint holds their state, the loader's, the model's, the optimizer's and the
    sums of the row to be logged next, so a resumed run is the uninterrupted one, bit for bit (one
    process, float32, same machine).

    Args:
        model: on `world.device`; `model(images, masks, **text)` gives a `JepaOutput`, and
            `model.teachers()` pairs of a teacher and the network that it follows.
        loader: training batches, this rank's share of each.
        prepare: `prepare(batch, step)` gives images, masks and text on `world.device`.
        config: the `train` section.
        folder: where logs and checkpoints go.
        world: this process among those of the run.
        described: kept in every checkpoint under `config`, so that it can be used on its own.
        tensorboard: also write TensorBoard events.
    """

    model: nn.Module
    loader: Loader
    prepare: Callable[[Batch, int], Inputs]
    config: TrainConfig
    folder: Path
    world: World
    described: dict[str, Any] = field(default_factory=dict)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        steps_per_epoch = len(self.loader)
        self.step = 0  # updates done
        self.total_steps = self.config.steps or self.config.epochs * steps_per_epoch
        warmup = self.config.lr.warmup_epochs
        self.warmup_steps = self.total_steps / 10 if warmup is None else warmup * steps_per_epoch
        self.checkpoint_every = self.config.checkpoint_every or steps_per_epoch
        self.optimizer = AdamWEma(
            parameter_groups(self.model, self.config.weight_decay.start),
            lr=self.config.lr.start,
            betas=self.config.betas,
            eps=self.config.eps,
            targets=teacher_parameters(self.model),
        )
        self.precision = resolve_precision(self.config.precision, self.world.device)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.checkpoints = CheckpointFolder(self.folder, self.config.keep_checkpoints)
        self._frozen = frozen_digest(self.model)
        self._sums = _DeviceSums()
        self._bad_step = torch.tensor(-1, device=self.world.device)
        self._signal: int | None = None
        self._window_start = time.perf_counter()
        self._window_seconds = 0.0  # that the window took before this process
        warning = self.config.warmup_warning(self.total_steps / steps_per_epoch)
        if warning is not None and self.world.is_main:
            _log.warning("%s", warning)

    def fit(self, begin: Callable[[], None] = lambda: None) -> None:
        """Train to the end of the schedule.

        Args:
            begin: called when the first batch is there, before anything is written.

        Raises:
            ConfigError: no sample of the data can be read.
            NonFiniteError: the loss or a weight is no longer finite.
            CheckpointError: a checkpoint could not be written.
            Interrupted: SIGTERM or SIGINT came; a checkpoint has been saved.
        """
        broadcast_state(self.model, self.world)
        self.model.train()
        batches = self._batches()
        if self.step < self.total_steps:
            batches = itertools.chain([self._first(batches)], batches)
        wait_for_all(self.world)  # a rank without data must not find the earlier run gone
        begin()
        on_cpu = self.world.device.type == "cpu"
        with (
            kept_host_memory() if on_cpu else nullcontext(),
            self._stop_signals(),
            self._progress() as progress,
            self._logs() as logs,
        ):
            while self.step < self.total_steps:
                with phase("step", self.step):
                    with phase("data"):
                        batch = next(batches)
                    schedule = self._update(batch)
                self.step += 1
                if self.step == 1:
                    # ActNorm initialises itself from its first batch, another one on each rank.
                    broadcast_state(self.model, self.world)
                progress.update(len(batch) * self.world.size)

                at_end = self.step == self.total_steps
                stop = on_any_rank(self._signal is not None, self.world)
                if self.step % self.config.log_every == 0 or at_end:
                    self._check_finite()
                    row = self._row(schedule)
                    progress.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                    if logs is not None:
                        logs.write(row)
                if self.step % self.checkpoint_every == 0 or at_end or stop:
                    self.save()
                if stop:
                    number = self._signal or signal.SIGTERM  # another rank's signal
                    raise Interrupted(number, self.checkpoints.path / "last.pt")

    def _update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step; gives what the schedules said."""
        config = self.config
        # As in the public I-JEPA code: learning rate and weight decay advance before the update.
        done, total = self.step + 1, self.total_steps
        lr = warmup_cosine(
            done,
            total=total,
            warmup=self.warmup_steps,
            start=config.lr.start,
            peak=config.lr.peak,
            final=config.lr.final,
        )
        weight_decay = config.weight_decay.at(done, total)
        momentum = config.momentum.at(self.step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0

        images, masks, text = self.prepare(batch, self.step)
        halved = self.precision == "bfloat16"
        autocast = torch.autocast(self.world.device.type, torch.bfloat16, enabled=halved)
        with phase("forward"), autocast:
            output = self.model(images, masks, **text)
        with phase("backward"):
            output.loss.backward()
        with phase("gradient averaging"):
            average_gradients(self.parameters, self.world)
        metrics = {"loss": output.loss.detach(), **output.metrics}
        if config.clip_grad is not None:
            with phase("clipping"):
                metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters, config.clip_grad)
        with phase("optimizer and EMA of the target"):
            self.optimizer.step(momentum=momentum)
            self.optimizer.zero_grad()
            copy_teacher_buffers(self.model)

        if self._sums.are_of_others(metrics):
            # Resumed with options that log something else, such as clipping: the row is of the
            # steps since then.
            self._sums = _DeviceSums()
            self._window_start += self._window_seconds
        self._sums.add(metrics)
        is_first_bad = (self._bad_step < 0) & ~metrics["loss"].isfinite()
        self._bad_step = torch.where(is_first_bad, self.step, self._bad_step)
        return {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}

    def save(self) -> None:
        """Write a checkpoint of the present state, unless that is not finite.

        Raises:
            NonFiniteError: instead of writing it.
            CheckpointError: it could not be written; the one before still is there.
        """
        self._check_finite()
        mine = {
            "loader": self.loader.state_dict(),
            "rng": rng_state(),
            "window": {
                "seconds": time.perf_counter() - self._window_start,
                **self._sums.state_dict(),
            },
        }
        ranks = gather_objects(mine, self.world)
        for rank in ranks:  # the main process speaks for all
            self.loader.skips.add(rank["loader"]["skipped"])
        if self.world.is_main:
            self.checkpoints.save(
                {
                    "config": self.described,
                    "model": self.model.state_dict(),
                    "frozen": self._frozen,
                    "optimizer": self.optimizer.state_dict(),
                    "ranks": ranks,
                },
                self.step,
            )
        # torchrun kills all ranks once one has failed or stopped: not before the file is there.
        wait_for_all(self.world)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, as `load_checkpoint` gives it.

        It may be of another number of processes, but for streamed data, whose order depends on it:
        images and masks are what they would have been, random states begin anew.

        Raises:
            CheckpointError: it is of another model.
            ConfigError: it is past the end of this run, or settings differ that must not.
        """
        if state["step"] > self.total_steps:
            length = "steps" if self.config.steps else "epochs"
            raise ConfigError(
                f"train.{length}: expected at least the {state['step']} steps that the checkpoint "
                f"has behind it, got {self.total_steps} steps ({length}: "
                f"{getattr(self.config, length)}); make the run longer, or start another one with "
                "output=FOLDER and without --resume"
            )
        ranks = state["ranks"]
        mine = ranks[self.world.rank % len(ranks)]
        self._check_loader(mine["loader"])
        self._load_weights(state)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.loader.load_state_dict(mine["loader"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit this run: {error}") from error
        for group in self.optimizer.param_groups:  # the checkpoint has them, too
            group["betas"], group["eps"] = self.config.betas, self.config.eps
        window = mine["window"]
        if len(ranks) == self.world.size:
            set_rng_state(mine["rng"])
        else:
            # No two ranks may draw the same, nor what has been drawn before.
            seed = counter.bits(self.loader.seed, state["step"], self.world.rank)
            torch.manual_seed(int(seed) >> 1)
            if window["sum"] is not None:
                every = torch.stack([rank["window"]["sum"] for rank in ranks])
                window = {**window, "sum": every.mean(0)}
        self._window_seconds = window["seconds"]
        self._sums.load_state_dict(window, self.world.device)
        self.step = state["step"]

    def _check_loader(self, saved: dict[str, Any]) -> None:
        """Raises ConfigError where the batches would not be those of the run."""
        problems = []
        for name, (its, here) in self.loader.differences(saved).items():
            if name == "streamed":  # what is in memory is not
                its, here = not its, not here
            what = f"{its} images" if name == "samples" else f"{its}"
            problems.append(f"{_KEYS[name]}: expected {what}, as the run has, got {here}")
        if problems:
            raise ConfigError(f"{'; '.join(problems)}; {_SET_BACK}")

    def _load_weights(self, state: dict[str, Any]) -> None:
        """Raises ConfigError where the checkpoint is of a model with other settings."""
        try:
            load_weights(self.model, state)
        except CheckpointError as error:
            changed = [
                f"{key}: expected {before}, as the run has, got {now}"
                for key, before, now in differences(state["config"], self.described)
                if key.startswith("model.") or key == "text.dim"
            ]
            if not changed:
                raise
            raise ConfigError(f"{'; '.join(changed)}; {_SET_BACK}") from error

    def _first(self, batches: Iterator[Batch]) -> Batch:
        """Raises ConfigError where the data give no batch at all."""
        try:
            return next(batches)
        except DataError as error:
            is_coco = isinstance(self.loader.source, CocoCaptions)
            key = "data.train_images" if is_coco else "data.train"
            raise ConfigError(f"{key}: {error}") from error

    def _batches(self) -> Iterator[Batch]:
        while True:
            yield from self.loader  # the rest of an epoch

    def _row(self, schedule: dict[str, float]) -> dict[str, float]:
        """What to log of the steps since the last row: means over steps and ranks."""
        count, means = self._sums.means(self.world)
        images = count * self.loader.batch_size * self.world.size
        now = time.perf_counter()
        seconds, self._window_start = now - self._window_start, now
        return {
            "step": self.step,
            "epoch": self.step / len(self.loader),
            "images_per_second": images / seconds,
            **schedule,
            **means,
        }

    def _check_finite(self) -> None:
        bad = self._bad_step >= 0
        for p in self.parameters:
            bad = bad | ~p.detach().isfinite().all()
        if not on_any_rank(bool(bad), self.world):
            return
        at = int(self._bad_step)
        what = f"the loss was not finite at step {at}" if at >= 0 else "a weight is not finite"
        last = self.checkpoints.last
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise NonFiniteError(
            f"{what} (noticed after step {self.step}); {kept}. Try a lower train.lr.peak, a longer "
            "warm-up, train.clip_grad=1 or train.precision=float32"
        )

    @contextmanager
    def _logs(self) -> Iterator[Logs | None]:
        self._window_start = time.perf_counter() - self._window_seconds
        if not self.world.is_main:
            yield None
            return
        logs = Logs(self.folder, self.step, self.tensorboard)
        try:
            yield logs
        finally:
            logs.close()

    def _progress(self) -> Any:
        batch = self.loader.batch_size * self.world.size
        return require("tqdm", "The progress bar").tqdm(
            total=self.total_steps * batch,
            initial=self.step * batch,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file keeps every update
            disable=not self.world.is_main,
        )

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT are noted; a second Ctrl-C acts as it would elsewhere.

        A second SIGTERM does not: `timeout`, and a scheduler together with torchrun, send two.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, frame: Any) -> None:
            self._signal = number
            if number == signal.SIGINT:
                signal.signal(number, before[signal.SIGINT])

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _DeviceSums:
    """Sums of metrics over steps, kept on the device so that a step does not wait for it."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._count = 0

    def are_of_others(self, metrics: dict[str, Tensor]) -> bool:
        """Whether there are sums already, and of other metrics."""
        return self._sum is not None and self._names != list(metrics)

    def add(self, metrics: dict[str, Tensor]) -> None:
        self._names = list(metrics)
        values = torch.stack([value.float() for value in metrics.values()])
        self._sum = values if self._sum is None else self._sum + values
        self._count += 1

    def means(self, world: World) -> tuple[int, dict[str, float]]:
        """Number of steps, and the metrics' means over them and the ranks; starts anew."""
        if self._sum is None:
            return 0, {}
        means = average(self._sum / self._count, world).tolist()
        count, self._sum, self._count = self._count, None, 0
        return count, dict(zip(self._names, means, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": self._names,
            "sum": None if self._sum is None else self._sum.cpu(),
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._names, self._count = list(state["names"]), state["count"]
        self._sum = None if state["sum"] is None else state["sum"].to(device)
