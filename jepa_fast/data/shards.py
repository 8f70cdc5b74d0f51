"""WebDataset shards: tar files in which the files of one sample share their name.

00017.jpg   the image (jpg, jpeg, png or webp)
00017.json  "label", "captions" or "caption"; or, in its place,
00017.txt   one caption, and/or
00017.cls   the label
"""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

from jepa_fast.data import counter
from jepa_fast.data.batch import UNKNOWN, Sample
from jepa_fast.data.extras import require
from jepa_fast.data.images import IMAGE_SUFFIXES, decode_image
from jepa_fast.data.skips import CorruptSample, describe

_SHARDS = 0
_IMAGES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
_REMOTE = ("pipe:", "http:", "https:", "s3:", "gs:")


class ShardSource:
    """Samples of WebDataset shards, read through the `webdataset` library.

    urls: paths, globs (`train-*.tar`), brace ranges (`train-{000..127}.tar`), or what webdataset
        opens (`https:...`, `pipe:...`); one or several.
    length: samples in all shards. None counts them in local files.

    A sample that is incomplete, or a shard that ends too early, is reported as corrupt. The id of a
    sample is a hash of its shard's file name and its key, since keys may begin anew in every shard.

    Raises FileNotFoundError if no shard matches, ValueError if remote shards come without `length`.
    """

    def __init__(self, urls: str | Sequence[str], length: int | None = None) -> None:
        patterns = [urls] if isinstance(urls, str) else list(urls)
        self.shards = sorted(itertools.chain.from_iterable(map(_expand, patterns)))
        if not self.shards:
            raise FileNotFoundError(f"urls must match at least one shard, {patterns} match none")
        if length is None:
            remote = [shard for shard in self.shards if shard.startswith(_REMOTE)]
            if remote:
                raise ValueError(
                    f"length must say how many samples remote shards hold, got None for {remote[0]}"
                )
            length = sum(map(_count, self.shards))
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        more = f" and {len(self.shards) - 1} more" if len(self.shards) > 1 else ""
        return f"ShardSource({self.shards[0]}{more})"

    def records(
        self, part: int, parts: int, order: tuple[int, ...] | None
    ) -> Iterator[dict[str, Any] | CorruptSample]:
        """Undecoded samples of one of `parts` parts: whole shards, or, where there are fewer shards
        than parts, every `parts`-th sample.

        order: keys that shuffle the shards, or None for their own order.
        """
        shards = self.shards
        if order is not None:
            shards = [shards[i] for i in counter.permutation(len(shards), *order, _SHARDS)]
        if len(shards) >= parts:
            return itertools.chain.from_iterable(map(_read, shards[part::parts]))
        return itertools.islice(
            itertools.chain.from_iterable(map(_read, shards)), part, None, parts
        )

    def decode(self, record: dict[str, Any]) -> Sample:
        """Raises CorruptSample if the record has no image, no description, or broken ones."""
        key = record["__key__"]
        image = next((record[name] for name in record if name.rpartition(".")[2] in _IMAGES), None)
        if image is None:
            raise CorruptSample(key, "no image")
        label, captions = _describe(record, key)
        shard = record["__url__"].rpartition("/")[2]
        return {
            "image": decode_image(image, key),
            "label": label,
            "captions": captions,
            "id": counter.text_key(f"{shard}/{key}"),
        }


def _describe(record: dict[str, Any], key: str) -> tuple[int, list[str]]:
    """Label and captions from the files beside the image."""
    if not record.keys() & {"json", "txt", "cls"}:
        raise CorruptSample(key, "no json, txt or cls beside the image")
    try:
        content = json.loads(record.get("json", b"{}"))
        label = content.get("label")
        label = int(record.get("cls", UNKNOWN) if label is None else label)
        captions = content.get("captions") or content.get("caption") or []
        captions = [captions] if isinstance(captions, str) else [str(text) for text in captions]
        if not captions and "txt" in record:
            captions = [record["txt"].decode()]
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptSample(key, f"broken description ({type(error).__name__}: {error})") from error
    return label, captions


def _expand(pattern: str) -> list[str]:
    if pattern.startswith(_REMOTE):
        return require("webdataset.shardlists", "reading shards").expand_urls(pattern)
    braces = require("braceexpand", "reading shards").braceexpand(pattern)
    return [path for expanded in braces for path in glob.glob(expanded)]


def _count(path: str) -> int:
    """Images in a local shard. A broken one counts as far as it can be read."""
    count = 0
    try:
        with tarfile.open(path, "r:*") as shard:
            for member in shard:
                count += member.name.lower().endswith(IMAGE_SUFFIXES)
    except (tarfile.TarError, zlib.error, OSError, EOFError):
        return count  # reading it reports what is wrong with it
    return count


def _read(shard: str) -> Iterator[dict[str, Any] | CorruptSample]:
    """Undecoded samples of one shard, then, if it cannot be read to its end, why."""
    gopen = require("webdataset.gopen", "reading shards").gopen
    tariterators = require("webdataset.tariterators", "reading shards")
    broken: list[Exception] = []

    def note(error: Exception) -> bool:
        broken.append(error)
        return False

    try:
        with _Pushback(gopen(shard), 2) as raw:
            plain: Any = raw
            if raw.head == b"\x1f\x8b":
                plain = gzip.GzipFile(fileobj=plain)
            stream = _Tail(plain)
            files = tariterators.tar_file_expander([{"url": shard, "stream": stream}], note)
            yield from tariterators.group_by_keys(files, handler=note)
            if not broken and any(stream.tail):
                broken.append(EOFError("no end-of-archive mark"))
    except OSError as unopened:
        broken.append(unopened)
    if broken:
        yield CorruptSample(shard, f"shard cannot be read to its end ({describe(broken[0])})")


class _Tail:
    """A stream that remembers its last bytes: tarfile takes a cut between members for the end."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.tail = stream, b""

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.tail = (self.tail + data)[-512:]
        return data


class _Pushback:
    """A stream, perhaps of a pipe, whose first `size` bytes can be seen before they are read."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self.stream, self.head = stream, stream.read(size)

    def read(self, size: int = -1) -> bytes:
        if not self.head:
            return self.stream.read(size)
        taken = self.head if size < 0 else self.head[:size]
        self.head = self.head[len(taken) :]
        return taken + self.stream.read(size if size < 0 else size - len(taken))

    def __enter__(self) -> _Pushback:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()
