"""The loader: order, resumption, ranks, workers, and samples that cannot be read."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from jepa_fast.data import (
    Batch,
    CorruptSample,
    DigitScenes,
    Loader,
    MemorySource,
    Sample,
    Transform,
    load_in_memory,
)
from jepa_fast.errors import DataError

PLAIN = {"captions": ("corner",), "grid": (2, 2)}


class Numbers:
    """An indexed source of 1 x 1 images; those in `corrupt` cannot be read."""

    def __init__(self, n: int, corrupt: tuple[int, ...] = ()) -> None:
        self.n, self.corrupt = n, corrupt

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        if index in self.corrupt:
            raise CorruptSample(f"n{index}", "broken")
        image = torch.full((3, 1, 1), index, dtype=torch.uint8)
        return {"image": image, "label": index % 3, "captions": [str(index)], "id": index}


class Streams(Numbers):
    """The same as a streamed source, part p giving p, p + parts, ..."""

    __getitem__ = None  # type: ignore[assignment]

    def records(self, part: int, parts: int, order: tuple[int, ...] | None):
        for index in range(part, self.n, parts):
            yield {"index": index}

    def decode(self, record: dict) -> Sample:
        return Numbers(self.n, self.corrupt)[record["index"]]


def ids(loader: Loader) -> list[list[int]]:
    return [batch.ids.tolist() for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids) and a.captions == b.captions
    )


def test_a_training_epoch_is_a_shuffle_in_full_batches() -> None:
    loader = Loader(Numbers(23), 5, train=True)
    first, second = ids(loader), ids(loader)
    assert len(loader) == len(first) == 4
    assert all(len(batch) == 5 for batch in first)
    assert len(set(flat(first))) == 20
    assert first != second
    assert ids(Loader(Numbers(23), 5, train=True)) == first
    assert ids(Loader(Numbers(23), 5, train=True, seed=1)) != first


def test_evaluation_sees_everything_once_in_order() -> None:
    for source in (Numbers(23), Streams(23)):
        loader = Loader(source, 5, train=False)
        assert flat(ids(loader)) == list(range(23))
        assert len(loader) == 5
        assert flat(ids(loader)) == list(range(23))


MAKERS: dict[str, Callable[[], Loader]] = {
    "batch": lambda: Loader(
        DigitScenes(40, patch=None, **PLAIN), 6, train=True, transform=Transform(16, flip=0.5)
    ),
    "indexed": lambda: Loader(
        Numbers(40, corrupt=(3, 9)), 6, train=True, transform=Transform(2, crop_scale=(0.5, 1))
    ),
    "streamed": lambda: Loader(Streams(40, corrupt=(3, 9)), 6, train=True, shuffle_buffer=8),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("stop", [2, 6, 8])
def test_a_resumed_loader_goes_on_bit_for_bit(kind: str, stop: int) -> None:
    def stream(loader: Loader):
        while True:
            yield from loader

    straight = stream(MAKERS[kind]())
    expected = [next(straight) for _ in range(15)]

    loader = MAKERS[kind]()
    interrupted = stream(loader)
    for _ in range(stop):
        next(interrupted)
    state = loader.state_dict()
    resumed = MAKERS[kind]()
    resumed.load_state_dict(state)
    assert resumed.skipped == loader.skipped
    rest = stream(resumed)
    assert all(same(batch, next(rest)) for batch in expected[stop:])


def test_state_is_plain_and_refuses_other_settings(tmp_path) -> None:
    loader = Loader(Numbers(20), 5, train=True)
    next(iter(loader))
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["position"] == 1
    with pytest.raises(ValueError, match="batch_size: saved 5, here 4"):
        Loader(Numbers(20), 4, train=True).load_state_dict(state)
    with pytest.raises(ValueError, match="streamed: saved False, here True"):
        Loader(Streams(20), 5, train=True).load_state_dict(state)
    streamed = Loader(Streams(20), 5, train=True).state_dict()
    with pytest.raises(ValueError, match="streamed: saved True, here False"):
        Loader(Numbers(20), 5, train=True).load_state_dict(streamed)


def test_breaking_off_an_epoch_and_coming_back() -> None:
    whole = ids(Loader(Numbers(20), 5, train=True))
    loader = Loader(Numbers(20), 5, train=True)
    for batch in loader:
        assert batch.ids.tolist() == whole[0]
        break
    assert ids(loader) == whole[1:]


def test_ranks_share_what_one_process_would_see() -> None:
    alone = ids(Loader(Numbers(50), 6, train=True))
    ranks = [ids(Loader(Numbers(50), 3, train=True, rank=r, world_size=2)) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone
    parts = [
        ids(Loader(source(50), 3, train=False, rank=r, world_size=2))
        for source in (Numbers, Streams)
        for r in range(2)
    ]
    for pair in (parts[:2], parts[2:]):
        assert sorted(flat(pair[0] + pair[1])) == list(range(50))
    lengths = [
        len(ids(Loader(Streams(50), 3, train=True, rank=r, world_size=2, shuffle_buffer=4)))
        for r in range(2)
    ]
    assert lengths == [8, 8]


def test_another_number_of_processes_goes_on_where_one_has_stopped() -> None:
    alone = Loader(Numbers(50), 6, train=True)
    whole = ids(Loader(Numbers(50), 6, train=True))
    for _ in zip(range(3), alone, strict=False):
        pass
    ranks = [Loader(Numbers(50), 2, train=True, rank=r, world_size=3) for r in range(3)]
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    rest = [ids(rank) for rank in ranks]
    assert [a + b + c for a, b, c in zip(*rest, strict=True)] == whole[alone.position :]
    with pytest.raises(ValueError, match="batch_size: saved 6, here 4"):
        Loader(Numbers(50), 2, train=True, world_size=2).load_state_dict(alone.state_dict())
    streamed = Loader(Streams(50), 6, train=True).state_dict()
    with pytest.raises(ValueError, match="settings, got world_size: saved 1, here 2"):
        Loader(Streams(50), 3, train=True, world_size=2).load_state_dict(streamed)


def test_a_rank_without_a_share_has_no_batch() -> None:
    for source in (Numbers(5), Streams(2)):
        ranks = [Loader(source, 4, train=False, rank=rank, world_size=3) for rank in range(3)]
        for _ in range(2):
            found = [number for rank in ranks for batch in ids(rank) for number in batch]
            assert sorted(found) == list(range(len(source)))


def test_workers_change_nothing_for_indexed_sources() -> None:
    transform = Transform(2, crop_scale=(0.3, 1), flip=0.5)
    loaders = [
        Loader(Numbers(20, corrupt=(4,)), 5, train=True, transform=transform, num_workers=workers)
        for workers in (0, 2)
    ]
    for a, b in zip(*loaders, strict=True):
        assert same(a, b)
    assert [loader.skipped for loader in loaders] == [1, 1]


def test_streaming_with_workers_resumes_at_the_right_worker() -> None:
    def make() -> Loader:
        source = Streams(24, corrupt=(1, 3, 5))
        return Loader(source, 2, train=True, num_workers=2, shuffle_buffer=3)

    loader = make()
    expected, state = [], {}
    for batch in loader:
        expected.append(batch.ids.tolist())
        if len(expected) == 3:
            state = loader.state_dict()
    assert set(flat(expected)) <= set(range(24)) - {1, 3, 5}
    resumed = make()
    resumed.load_state_dict(state)
    assert ids(resumed) == expected[3:]


class FewerParts(Streams):
    """The first part, as of an empty shard, has nothing."""

    def records(self, part: int, parts: int, order: tuple[int, ...] | None):
        yield from super().records(part, parts, order) if part else ()


def test_streaming_resumes_at_the_right_worker_where_one_has_nothing_to_read() -> None:
    def make() -> Loader:
        return Loader(FewerParts(24), 2, train=True, num_workers=3, shuffle_buffer=3)

    loader = make()
    expected, state = [], {}
    for batch in loader:
        expected.append(batch.ids.tolist())
        if len(expected) == 4:
            state = loader.state_dict()
    assert len(expected) == 12
    resumed = make()
    resumed.load_state_dict(state)
    assert ids(resumed) == expected[4:]


def test_loading_leaves_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    for make in MAKERS.values():
        next(iter(make()))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("source", [Numbers, Streams])
def test_corrupt_samples_are_skipped_counted_and_reported(
    source: type[Numbers], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "jepa_fast.data"):
        loader = Loader(source(20, corrupt=(2, 11)), 5, train=False)
        assert flat(ids(loader)) == [i for i in range(20) if i not in (2, 11)]
        ids(loader)
    assert loader.skipped == 2
    messages = [record.message for record in caplog.records]
    assert messages == [
        "skipped n2: broken",
        "skipped n11: broken",
        "epoch 0: 2 samples skipped: 2 x broken (such as n2)",
    ]


@pytest.mark.parametrize("source", [Numbers, Streams])
def test_training_fills_the_place_of_a_corrupt_sample(source: type[Numbers]) -> None:
    loader = Loader(source(20, corrupt=(2, 11)), 5, train=True, shuffle_buffer=4)
    batches = ids(loader)
    assert [len(batch) for batch in batches] == [5] * 4
    assert not {2, 11} & set(flat(batches))
    assert loader.skipped == 2


@pytest.mark.parametrize("source", [Numbers, Streams])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_source_is_an_error(source: type[Numbers], train: bool, workers: int) -> None:
    loader = Loader(source(6, corrupt=tuple(range(6))), 2, train=train, num_workers=workers)
    with pytest.raises(DataError, match=r"no readable sample in .*: 6 samples skipped: 6 x broken"):
        list(loader)


class Signalled(Numbers):
    """Each read begins with a signal to the worker's process group and one to every process."""

    def __getitem__(self, index: int) -> Sample:
        if get_worker_info() is not None:
            os.killpg(os.getpgrp(), signal.SIGINT)
            if index == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_workers_leave_signals_to_the_main_process() -> None:
    loader = Loader(Signalled(8), 2, train=False, num_workers=1)
    assert flat(ids(loader)) == list(range(8))


class Killed(Numbers):
    """Its reader is killed, as by a system that is short of memory."""

    def __getitem__(self, index: int) -> Sample:
        if index == 6 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_is_killed_is_an_error_that_says_so() -> None:
    # torch's handler of SIGCHLD raises wherever the process is, perhaps outside the loader.
    told = r"that reads data was ended \(SIGKILL\), as where memory|is killed by signal: Killed"
    with pytest.raises((DataError, RuntimeError), match=told):
        list(Loader(Killed(8), 2, train=False, num_workers=1))


@pytest.mark.parametrize("error", ["", "raise RuntimeError('as of a full GPU')"])
def test_a_process_with_workers_left_over_ends(error: str) -> None:
    script = f"""
import torch
from test_data_loader import Loader, Numbers
batches = iter(Loader(Numbers(8), 2, train=True, num_workers=2))
next(batches)
{error}
"""
    tests = Path(__file__).parent
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == bool(error), finished.stderr
    assert ("RuntimeError" in finished.stderr) == bool(error)


def test_a_worker_whose_part_is_unreadable_does_not_stop_the_others() -> None:
    source = Streams(12, corrupt=tuple(range(1, 12, 2)))
    loader = Loader(source, 2, train=True, num_workers=2, shuffle_buffer=2)
    batches = ids(loader)
    assert [len(batch) for batch in batches] == [2] * 6
    assert all(i % 2 == 0 for i in flat(batches))
    assert loader.skipped == 6


def test_in_memory_images_are_those_of_the_source() -> None:
    for source in (Numbers(6, corrupt=(1,)), Streams(6, corrupt=(1,))):
        memory = load_in_memory(source, size=2)
        assert memory.images.shape == (5, 3, 2, 2)
        loader = Loader(memory, 2, train=False)
        assert flat(ids(loader)) == [0, 2, 3, 4, 5]
        assert [c for batch in loader for c in batch.captions] == [
            ["0"],
            ["2"],
            ["3"],
            ["4"],
            ["5"],
        ]
        assert loader.skipped == 1
    with pytest.raises(DataError, match="no readable sample"):
        load_in_memory(Numbers(2, corrupt=(0, 1)))


def test_images_of_several_sizes_in_memory_say_which_setting_brings_them_to_one() -> None:
    class Growing(Numbers):
        def __getitem__(self, index: int) -> Sample:
            return {**super().__getitem__(index), "image": torch.zeros(3, 4, 4 + index)}

    with pytest.raises(ValueError, match=r"got 3 sizes .* \(data\.memory_size\)"):
        load_in_memory(Growing(3))


def test_patch_labels_survive_and_forbid_crops() -> None:
    source = DigitScenes(20, **PLAIN)
    batch = next(iter(Loader(source, 4, train=False, transform=Transform(32))))
    assert batch.images.shape == (4, 3, 32, 32)
    assert batch.patch_labels is not None
    assert batch.patch_labels.shape == (4, 16)
    moved = batch.to("cpu")
    assert torch.equal(moved.patch_labels, batch.patch_labels)
    for transform in (
        Transform(16, flip=0.5),
        Transform(16, crop_scale=(0.3, 1)),
        Transform((8, 16)),
    ):
        with pytest.raises(ValueError, match="transform must not crop or flip"):
            next(iter(Loader(source, 4, train=False, transform=transform)))


def test_errors_name_the_argument() -> None:
    for name in ("batch_size", "num_workers", "shuffle_buffer", "seed", "rank", "world_size"):
        with pytest.raises(TypeError, match=f"^{name}: expected an int, got str"):
            Loader(Numbers(4), **{"batch_size": 1, "train": True, name: "2"})
    with pytest.raises(TypeError, match="source: expected samples as dicts with captions, id, ima"):
        next(iter(Loader([(torch.zeros(3, 4, 4), 0)] * 4, 2, train=True)))
    whole = Loader(Numbers(4), np.int64(2), train=True, transform=Transform(np.int64(2)))
    assert next(iter(whole)).images.shape == (2, 3, 2, 2)
    with pytest.raises(ValueError, match="batch_size and shuffle_buffer must be at least 1"):
        Loader(Numbers(4), 0, train=True)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        Loader(Numbers(4), 1, train=True, rank=2, world_size=2)
    with pytest.raises(ValueError, match="at most the 4 samples of the source, got 3 x 2"):
        Loader(Numbers(4), 3, train=True, world_size=2)
    with pytest.raises(ValueError, match="source must have at least one sample"):
        Loader(Numbers(0), 3, train=False)
    pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    batch = MemorySource(pictures, [4, 5], ids=[7, 8]).batch(torch.tensor([1]))
    assert (batch.labels.tolist(), batch.ids.tolist()) == ([5], [8])
    with pytest.raises(TypeError, match=r"^labels: expected integers, got torch.float32"):
        MemorySource(pictures, [0.5, 1])
    with pytest.raises(TypeError, match=r"^images: expected a tensor, got ndarray"):
        MemorySource(pictures.numpy())
    with pytest.raises(ValueError, match="images must be uint8"):
        MemorySource(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="labels must have one entry for each of 2 images, got 1"):
        MemorySource(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), labels=torch.zeros(1))
