"""The three kinds of source that a `Loader` reads, and the one that keeps its images in memory.

`IndexedSource`: samples by number, read from disk (image folders, COCO).
`StreamedSource`: samples in the order of the files they come in (WebDataset shards).
`BatchSource`: whole batches by number, without a disk (digit scenes, images in memory).

A source may also have `skipped`, what it could not use as `{key: reason}`, logged already, and
`has_captions`, whether any of its samples has a caption, if it knows that without reading them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from jepa_fast._arguments import check_integers
from jepa_fast.data.batch import Batch, Sample, collate
from jepa_fast.data.skips import CorruptSample, SkipLog
from jepa_fast.data.transforms import Transform

_log = logging.getLogger("jepa_fast.data")


@runtime_checkable
class BatchSource(Protocol):
    """Hands out uint8 batches."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> Batch:
        """The samples `index` [B] int64."""
        ...


@runtime_checkable
class IndexedSource(Protocol):
    """Reads one sample by its number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises CorruptSample if the sample cannot be read."""
        ...


@runtime_checkable
class StreamedSource(Protocol):
    """Reads samples one after the other."""

    def __len__(self) -> int: ...

    def records(
        self, part: int, parts: int, order: tuple[int, ...] | None
    ) -> Iterator[dict[str, Any] | CorruptSample]:
        """Undecoded samples of one of `parts` disjoint parts.

        order: keys that shuffle the files, or None for the files' own order.
        """
        ...

    def decode(self, record: dict[str, Any]) -> Sample:
        """Raises CorruptSample if the record cannot be decoded."""
        ...


Source = BatchSource | IndexedSource | StreamedSource


class MemorySource:
    """Images of one size kept in memory as uint8, so that training never waits for a decoder.

    images: [n, 3, H, W] uint8.
    labels: [n] int64, or None for unknown ones.
    captions: captions of each image, or None.
    ids: [n] int64, or None for 0..n-1.
    patch_labels: [n, N] int64, or None.
    skipped: samples that could not be read on the way here, `{key: reason}`.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | Sequence[int] | None = None,
        captions: Sequence[list[str]] | None = None,
        ids: Tensor | Sequence[int] | None = None,
        patch_labels: Tensor | None = None,
        skipped: dict[str, str] | None = None,
    ) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
        n = len(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 [n, 3, H, W], got {images.dtype} {list(images.shape)}"
            )
        self.images = images
        self.labels = torch.full((n,), -1) if labels is None else torch.as_tensor(labels)
        self.captions = [[] for _ in range(n)] if captions is None else list(captions)
        self.ids = torch.arange(n) if ids is None else torch.as_tensor(ids)
        self.patch_labels = patch_labels
        self.has_captions = any(self.captions)
        self.skipped = dict(skipped or {})
        for name, value in (
            ("labels", self.labels),
            ("captions", self.captions),
            ("ids", self.ids),
        ):
            if len(value) != n:
                raise ValueError(
                    f"{name} must have one entry for each of {n} images, got {len(value)}"
                )
        for name, numbers in (("labels", self.labels), ("ids", self.ids)):
            check_integers(name, numbers)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor) -> Batch:
        """The samples `index` [B] int64."""
        return Batch(
            images=self.images[index],
            labels=self.labels[index],
            ids=self.ids[index],
            captions=[self.captions[i] for i in index.tolist()],
            patch_labels=None if self.patch_labels is None else self.patch_labels[index],
        )


def load_in_memory(source: IndexedSource | StreamedSource, size: int | None = None) -> MemorySource:
    """Decodes every sample of `source` once and keeps the images as uint8.

    size: pixels a side that the images are brought to (the centre square, resized); None if all
        have one size already.

    Raises DataError if no sample can be read, ValueError if the images differ in size and `size` is
    None.
    """
    skips = SkipLog()
    skips.reasons.update(getattr(source, "skipped", {}))
    resize = None if size is None else Transform(size)
    samples: list[Sample] = []
    for read in _read_all(source):
        if isinstance(read, CorruptSample):
            skips.add({read.key: read.reason})
            continue
        if resize is not None:
            read["image"] = resize.crop([read["image"]], torch.tensor([read["id"]]))[0]
        samples.append(read)
    if not samples:
        raise skips.nothing_readable(source)
    if len(skips):
        _log.warning("%s", skips.summary())
    whole = collate(samples)
    return MemorySource(
        whole.images, whole.labels, whole.captions, whole.ids, whole.patch_labels, skips.reasons
    )


def _read_all(source: IndexedSource | StreamedSource) -> Iterator[Sample | CorruptSample]:
    if isinstance(source, StreamedSource):
        for record in source.records(0, 1, None):
            yield record if isinstance(record, CorruptSample) else _attempt(source.decode, record)
    else:
        for index in range(len(source)):
            yield _attempt(source.__getitem__, index)


def _attempt(read: Any, argument: Any) -> Sample | CorruptSample:
    try:
        return read(argument)
    except CorruptSample as corrupt:
        return corrupt
