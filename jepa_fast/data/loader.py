"""Batches of a source, epoch by epoch, resumable bit for bit.

What a loader hands out is a function of (seed, epoch, position): the order of the samples, their
crops and flips. So `state_dict()` is a few integers and a resumed run sees what the uninterrupted
one would have seen.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import random
import signal
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from jepa_fast._arguments import integer
from jepa_fast.data import counter
from jepa_fast.data.batch import Batch, Sample, collate
from jepa_fast.data.skips import CorruptSample, SkipLog
from jepa_fast.data.sources import BatchSource, IndexedSource, Source, StreamedSource
from jepa_fast.data.transforms import Transform
from jepa_fast.errors import DataError

_log = logging.getLogger("jepa_fast.data")
_ORDER, _SUBSTITUTE, _BUFFER = range(3)
SHORT = "as where memory, or that of /dev/shm, is short; try fewer workers, or smaller images"
_with_workers: weakref.WeakSet[Any] = weakref.WeakSet()
"""What has workers that still may read."""


class Loader:
    """Iterating gives the rest of the current epoch as `Batch`es, then moves on to the next epoch.

    source: where samples come from, see `jepa_fast.data.sources`.
    batch_size: images a batch of this process.
    train: True shuffles, gives every process the same number of full batches, and fills the place
        of a corrupt sample with another sample; False gives every readable sample once, in order
        (several workers take turns in a streamed source), the last batch being shorter.
    transform: from uint8 images to float32 ones; None leaves them as they are.
    seed: of the order. The transform has its own.
    num_workers: processes that read and decode; a source without a disk needs and uses none.
    rank, world_size: this process among those that share an epoch. Of indexed and batch sources
        they see together exactly what one process with batches `world_size` times larger sees.
    shuffle_buffer: undecoded samples that a streamed source draws from while training.
    pin_memory: page-locked batches, for faster copies to a GPU.

    Corrupt samples are counted in `skipped` and reported in the log.

    Raises TypeError or ValueError naming the argument if a value is no integer or out of range,
    and, on iteration, DataError if no sample of the source can be read or a worker is killed.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        train: bool,
        transform: Transform | None = None,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 2048,
        pin_memory: bool = False,
    ) -> None:
        batch_size = integer("batch_size", batch_size)
        num_workers = integer("num_workers", num_workers)
        shuffle_buffer = integer("shuffle_buffer", shuffle_buffer)
        seed, rank = integer("seed", seed), integer("rank", rank)
        world_size = integer("world_size", world_size)
        if batch_size < 1 or num_workers < 0 or shuffle_buffer < 1:
            raise ValueError(
                "batch_size and shuffle_buffer must be at least 1 and num_workers at least 0, got "
                f"{batch_size}, {shuffle_buffer} and {num_workers}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if train and len(source) < batch_size * world_size:
            raise ValueError(
                f"batch_size x world_size must be at most the {len(source)} samples of the source, "
                f"got {batch_size} x {world_size}"
            )
        if len(source) == 0:
            raise ValueError(f"source must have at least one sample, got {source!r} with none")
        self.source, self.batch_size, self.train = source, batch_size, train
        self.transform, self.seed = transform, seed
        self.num_workers = 0 if isinstance(source, BatchSource) else num_workers
        self.rank, self.world_size = rank, world_size
        self.shuffle_buffer, self.pin_memory = shuffle_buffer, pin_memory
        self.skips = SkipLog()
        self.skips.reasons.update(getattr(source, "skipped", {}))
        self.epoch = 0
        self._rewind()

    @property
    def skipped(self) -> int:
        """Number of different samples skipped so far because they could not be read."""
        return len(self.skips)

    def __len__(self) -> int:
        """Batches an epoch (for a streamed source that is not trained on: at most, about)."""
        if self.train:
            return len(self.source) // (self.batch_size * self.world_size)
        stride = self.batch_size * self.world_size
        return len(range(self.rank * self.batch_size, len(self.source), stride))

    def __iter__(self) -> Iterator[Batch]:
        before, readable = self.skipped, self.position > 0
        source = self.source
        reading = (
            self._streamed(source) if isinstance(source, StreamedSource) else self._indexed(source)
        )
        for batch in reading:
            readable = True
            yield batch
        # Of a small set that is not trained on, the last ranks may have no share.
        if not readable and (self.world_size == 1 or self.train or self.skips):
            raise self.skips.nothing_readable(self.source)
        if self.skipped > before:
            _log.warning("epoch %d: %s", self.epoch, self.skips.summary())
        self.epoch += 1
        self._rewind()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, after the batch handed out last. Plain numbers and strings.

        Of a streamed source the state is this process's own.
        """
        ended = self.train and self.position >= len(self)
        return {
            "epoch": self.epoch + int(ended),
            "position": 0 if ended else self.position,
            "turn": 0 if ended else self._turn,
            "consumed": [0 if ended else count for count in self._consumed],
            "skipped": dict(self.skips.reasons),
            **self._setting(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the batch that `state` was taken at.

        Raises ValueError naming the settings in which the saved loader differs.
        """
        if different := self.differences(state):
            listed = ", ".join(f"{name}: saved {a}, here {b}" for name, (a, b) in different.items())
            raise ValueError(f"state must be of a loader with the same settings, got {listed}")
        self.epoch, self.position = state["epoch"], state["position"]
        self._turn, self._consumed = state["turn"], list(state["consumed"])
        self.skips.reasons.update(state["skipped"])

    def differences(self, state: dict[str, Any]) -> dict[str, tuple[Any, int]]:
        """Settings in which the loader that `state` was taken of differs: {name: (its, mine)};
        `streamed` alone, a bool, where one of the two sources is a stream.

        `batch_size` counts the images of all processes; how many these are matters to the order of
        streamed sources alone.
        """
        its, mine = dict(state), self._setting()
        streams = "shuffle_buffer" in its
        if streams != ("shuffle_buffer" in mine):
            return {"streamed": (streams, not streams)}
        for setting in (its, mine):
            setting["batch_size"] = setting.get("batch_size", 0) * setting.get("world_size", 1)
        if not isinstance(self.source, StreamedSource):
            del mine["world_size"]
        return {n: (its.get(n), value) for n, value in mine.items() if its.get(n) != value}

    def _setting(self) -> dict[str, int]:
        """Everything that the order of the batches depends on."""
        setting = {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "samples": len(self.source),
        }
        if isinstance(self.source, StreamedSource):
            setting |= {"num_workers": self.num_workers, "shuffle_buffer": self.shuffle_buffer}
        return setting

    def _rewind(self) -> None:
        """To the start of the epoch."""
        self.position = 0
        # Of a streamed source: whose turn it is, and the records that went into the batches handed
        # out so far, a worker.
        self._turn = 0
        self._consumed = [0] * max(self.num_workers, 1)

    def _workers(self, dataset: Dataset[Any], sampler: Any = None) -> Iterator[Any]:
        """What worker processes make of `dataset`, without touching the global random state.

        Raises DataError if one of them is killed, as the system does where memory is short.
        """
        reading: Any = iter(
            DataLoader(
                dataset,
                batch_size=None,
                sampler=sampler,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                generator=torch.Generator(),
                worker_init_fn=_leave_signals_to_the_main_process,
            )
        )
        if self.num_workers == 0:
            yield from reading
            return
        _with_workers.add(reading)
        while True:
            try:
                found = next(reading)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # what torch says, or a pipe
                # A pipe may tell before the system does, at whose signal torch raises.
                with suppress(RuntimeError):
                    ended = wait([worker.sentinel for worker in reading._workers], 1)
                    for worker in reading._workers:
                        if worker.sentinel in ended:
                            worker.join(1)
                codes = {worker.exitcode for worker in reading._workers} - {None, 0}
                if not codes:
                    raise
                told = ", ".join(signal.Signals(-c).name if c < 0 else str(c) for c in codes)
                raise DataError(f"a worker that reads data was ended ({told}), {SHORT}") from error
            yield found

    def _indexed(self, source: BatchSource | IndexedSource) -> Iterator[Batch]:
        n, size = len(source), self.batch_size
        order = (
            counter.permutation(n, self.seed, _ORDER, self.epoch) if self.train else np.arange(n)
        )
        starts = range(self.rank * size, n, size * self.world_size)[self.position : len(self)]
        chunks = [order[start : start + size] for start in starts]
        reader = _Reader(source, self.transform, self.train, self.seed, self.epoch)
        for batch, skipped in self._workers(reader, chunks):
            self.skips.add(skipped)
            self.position += 1
            if batch is not None:
                yield batch
            elif self.train:
                raise self.skips.nothing_readable(self.source)

    def _streamed(self, source: StreamedSource) -> Iterator[Batch]:
        workers, idle = len(self._consumed), 0
        stream = _Stream(
            source=source,
            transform=self.transform,
            train=self.train,
            batch_size=self.batch_size,
            shuffle_buffer=self.shuffle_buffer,
            seed=self.seed,
            epoch=self.epoch,
            rank=self.rank,
            world_size=self.world_size,
            consumed=tuple(self._consumed),
            turn=self._turn,
        )
        reading = self._workers(stream)
        while not self.train or self.position < len(self):
            found = next(reading, None)
            if found is None:
                return
            batch, skipped, worker, consumed = found
            self.skips.add(skipped)
            self._consumed[worker], self._turn = consumed, (self._turn + 1) % workers
            idle = 0 if batch is not None else idle + 1
            if idle > workers:
                raise self.skips.nothing_readable(self.source)
            if batch is not None:
                self.position += 1
                yield batch


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Keeps a worker alive until the main process, told to stop as well, has ended its step.

    Ctrl-C, torchrun and `timeout` signal a whole process group, so a worker leaves it. Schedulers
    signal every process, so the first SIGTERM passes; a second one, as from a main process that has
    waited in vain for the worker to end, kills.
    """

    def pass_once(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)

    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, pass_once)


def _end_workers() -> None:
    """What torch does for an iterator that is deleted, here one that an error keeps until the end.

    There Python sends a worker one SIGTERM, which passes, and waits for it for ever.
    """
    for reading in list(_with_workers):
        reading._shutdown_workers()
        for worker in reading._workers:
            if worker.is_alive():  # it hangs in reading a file
                worker.kill()


atexit.register(_end_workers)  # comes before multiprocessing's, which was registered before it


@dataclass
class _Reader(Dataset[tuple[Batch | None, dict[str, str]]]):
    """Reads a batch, given its samples' numbers; also returns what had to be skipped."""

    source: BatchSource | IndexedSource
    transform: Transform | None
    train: bool
    seed: int
    epoch: int

    def __getitem__(self, chunk: NDArray[np.int64]) -> tuple[Batch | None, dict[str, str]]:
        skipped: dict[str, str] = {}
        if isinstance(self.source, BatchSource):
            batch = self.source.batch(torch.from_numpy(chunk))
            if self.transform is not None:
                if batch.patch_labels is not None and not self.transform.keeps_layout(batch.images):
                    raise ValueError(
                        "transform must not crop or flip images that have patch labels, which "
                        "would be wrong then; make it plain, or the source without patch labels"
                    )
                batch = replace(batch, images=self.transform(batch.images, batch.ids, self.epoch))
            return batch, skipped
        samples: list[Sample] = []
        for number in chunk.tolist():
            sample = self._read(self.source, number, skipped)
            if sample is not None:
                samples.append(sample)
            elif self.train:  # none of all can be read
                return None, skipped
        return _assemble(samples, self.transform, self.epoch), skipped

    def _read(self, source: IndexedSource, number: int, skipped: dict[str, str]) -> Sample | None:
        """Sample `number`; if that is corrupt and we train, the next good one at a random place."""
        places: Iterable[int] = [number]
        if self.train:
            n = len(source)
            start = int(counter.integers(n, self.seed, _SUBSTITUTE, self.epoch, number))
            places = itertools.chain(places, (i % n for i in range(start, start + n)))
        for place in places:
            try:
                return source[place]
            except CorruptSample as corrupt:
                skipped[corrupt.key] = corrupt.reason
        return None


@dataclass
class _Stream(IterableDataset[tuple[Batch | None, dict[str, str], int, int]]):
    """Batches from a streamed source, as one of the loader's worker processes reads them.

    Gives (batch, what was skipped, number of the worker, records it has consumed so far).
    """

    source: StreamedSource
    transform: Transform | None
    train: bool
    batch_size: int
    shuffle_buffer: int
    seed: int
    epoch: int
    rank: int
    world_size: int
    consumed: tuple[int, ...]
    turn: int

    def __iter__(self) -> Iterator[tuple[Batch | None, dict[str, str], int, int]]:
        info = get_worker_info()
        workers, process = (1, 0) if info is None else (info.num_workers, info.id)
        worker = (process + self.turn) % workers  # process 0 is asked first, so it takes the turn
        part, parts = self.rank * workers + worker, self.world_size * workers
        patience = len(self.source) // parts + 1
        samples: list[Sample] = []
        skipped: dict[str, str] = {}
        consumed = failed = 0
        for consumed, record in enumerate(self._records(part, parts), 1):
            if consumed <= self.consumed[worker]:
                continue
            try:
                if isinstance(record, CorruptSample):
                    raise record
                samples.append(self.source.decode(record))
                failed = 0
            except CorruptSample as corrupt:
                skipped[corrupt.key] = corrupt.reason
                failed += 1
            # A turn without a batch: perhaps nothing in this part can be read.
            if len(samples) == self.batch_size or (not samples and failed >= patience):
                yield _assemble(samples, self.transform, self.epoch), skipped, worker, consumed
                samples, skipped, failed = [], {}, 0
        yield _assemble(samples, self.transform, self.epoch), skipped, worker, consumed
        # Training ends here only where the part is empty: `turn` counts on every worker's turns.
        while self.train:
            yield None, {}, worker, consumed

    def _records(self, part: int, parts: int) -> Iterator[dict[str, Any] | CorruptSample]:
        """This part's records: shuffled, again and again, if we train; otherwise in order, once."""
        if not self.train:
            yield from self.source.records(part, parts, None)
            return
        for lap in itertools.count():
            keys = (self.seed, self.epoch, lap)
            records = self.source.records(part, parts, keys)
            draw = random.Random(int(counter.bits(*keys, _BUFFER, part))).random
            buffer = list(itertools.islice(records, self.shuffle_buffer))
            if not buffer:
                return
            for record in records:
                place = int(draw() * len(buffer))
                buffer[place], record = record, buffer[place]
                yield record
            while buffer:
                yield buffer.pop(int(draw() * len(buffer)))


def _assemble(samples: list[Sample], transform: Transform | None, epoch: int) -> Batch | None:
    """A transformed batch of these samples, or None if there are none."""
    if not samples:
        return None
    if not isinstance(samples[0], Mapping) or not samples[0].keys() >= Sample.__required_keys__:
        raise TypeError(
            f"source: expected samples as dicts with {', '.join(sorted(Sample.__required_keys__))} "
            f"(jepa_fast.data.Sample), got {type(samples[0]).__name__}; a data set of others "
            "goes into a torch.utils.data.DataLoader, and models take what that gives"
        )
    if transform is None:
        return collate(samples)
    ids = torch.tensor([sample["id"] for sample in samples])
    images = transform([sample["image"] for sample in samples], ids, epoch)
    return collate(samples, images)
