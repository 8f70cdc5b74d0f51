"""WebDataset shards: tar files in which the files of one sample share their name.

00017.jpg   the image (jpg, jpeg, png, webp or bmp); not 00017.mask.png, where both are there
00017.json  "label", "captions" or "caption"; or, in its place,
00017.txt   one caption, and/or
00017.cls   the label
"""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from jepa_fast.data import counter
from jepa_fast.data.batch import UNKNOWN, Sample
from jepa_fast.data.extras import require
from jepa_fast.data.fields import integer, texts
from jepa_fast.data.images import IMAGE_SUFFIXES, decode_image
from jepa_fast.data.skips import CorruptSample, describe

_SHARDS = 0
_IMAGES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
_METADATA = re.compile(r"__[^/]*__($|/)")  # which webdataset leaves out, too
_REMOTE = ("pipe:", "http:", "https:", "s3:", "gs:")
_LARGEST_LABEL = 2**31 - 1
_MISSING_NAMED = 20
# What reading a broken, cut or unreachable shard raises.
_BROKEN = (tarfile.TarError, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)


class ShardSource:
    """Samples of WebDataset shards, read through the `webdataset` library.

    urls: paths, globs (`train-*.tar`), brace ranges (`train-{000..127}.tar`), or what webdataset
        opens (`https:...`, `pipe:...`); one or several.
    length: samples in all shards. None counts them in local files.

    A sample that is incomplete or has a broken description, and a shard that is damaged or ends too
    early, are reported as corrupt; reading goes on behind a damaged header. The id of a sample is a
    hash of its shard's file name and its key, since keys may begin anew in every shard; where
    shards in several folders have the same name, folders are part of it.

    Raises FileNotFoundError naming each path, after expansion of braces, that matches no shard, or
    that is a folder, ValueError if remote shards come without `length`.
    """

    def __init__(self, urls: str | Path | Sequence[str | Path], length: int | None = None) -> None:
        patterns = [str(url) for url in ([urls] if isinstance(urls, (str, Path)) else urls)]
        self.shards = sorted(itertools.chain.from_iterable(map(find_shards, patterns)))
        if not self.shards:
            raise FileNotFoundError(f"urls must match at least one shard, got {patterns}")
        if length is None:
            remote = [shard for shard in self.shards if shard.startswith(_REMOTE)]
            if remote:
                raise ValueError(
                    f"length must say how many samples remote shards hold, got None for {remote[0]}"
                )
            length = sum(map(_count, self.shards))
        self.length = length
        self._names = _names(self.shards)

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
        key = f"{self._names[record['__url__']]}/{record['__key__']}"
        found = [name for name in record if name.rpartition(".")[2] in _IMAGES]
        if not found:
            raise CorruptSample(key, "no image")
        image = record[min(found, key=lambda name: name.count("."))]  # no mask.png before a jpg
        label, captions = _describe(record, key)
        return {
            "image": decode_image(image, key),
            "label": label,
            "captions": captions,
            "id": counter.text_key(key),
        }


def _names(shards: Sequence[str]) -> dict[str, str]:
    """File names of shards, with as many folders before them as it takes to tell all apart."""
    parts = {shard: shard.split("/") for shard in shards}
    for length in itertools.count(1):
        names = {shard: "/".join(its[-length:]) for shard, its in parts.items()}
        if len({*names.values()}) == len(names):
            break
    return names


def _describe(record: dict[str, Any], key: str) -> tuple[int, list[str]]:
    """Label and captions from the files beside the image."""
    if not record.keys() & {"json", "txt", "cls"}:
        raise CorruptSample(key, "no json, txt or cls beside the image")
    try:
        content = json.loads(record.get("json", b"{}"))
        label = content.get("label")
        label = record.get("cls", UNKNOWN) if label is None else label
        label = integer("label", label, UNKNOWN, _LARGEST_LABEL)
        captions = texts("captions", content.get("captions") or content.get("caption") or None)
        if not captions and "txt" in record:
            captions = [record["txt"].decode()]
    except (ValueError, AttributeError, RecursionError) as error:
        raise CorruptSample(key, f"broken description ({type(error).__name__}: {error})") from error
    return label, captions


def find_shards(pattern: str) -> list[str]:
    """The shards of a pattern. Raises FileNotFoundError naming what matches none."""
    if pattern.startswith(_REMOTE):
        return require("webdataset.shardlists", "reading shards").expand_urls(pattern)
    if os.path.isdir(pattern):
        raise FileNotFoundError(
            f"urls must be tar files, got the folder {pattern}; for all those in it, "
            f"{os.path.join(pattern, '*.tar')}"
        )
    if os.path.exists(pattern):  # whatever brackets and braces are in its name
        return [pattern]
    shards, missing = [], []
    for path in require("braceexpand", "reading shards").braceexpand(pattern):
        found = [path] if os.path.exists(path) else glob.glob(path)
        shards += found
        if not found:
            missing.append(path)
    if missing:
        more = f" and {len(missing) - _MISSING_NAMED} more" if len(missing) > _MISSING_NAMED else ""
        raise FileNotFoundError(
            f"urls must match at least one shard each, {', '.join(missing[:_MISSING_NAMED])}{more} "
            "match none"
        )
    return shards


class _Member(tarfile.TarInfo):
    """A file of a shard, whose header notes in its archive what is wrong with the shard."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:
        at = archive.fileobj.tell()
        try:
            member = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            archive.zeros_from = at if archive.zeros_from is None else archive.zeros_from
            raise
        except (
            tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
            tarfile.SubsequentHeaderError,  # type: ignore[attr-defined]
        ) as error:
            archive.note_damage(at)
            # Of this kind alone `ignore_zeros` takes it to look for a header in the next block.
            raise tarfile.InvalidHeaderError(str(error)) from error  # type: ignore[attr-defined]
        if archive.zeros_from is not None:
            archive.note_damage(at)  # zeros may have replaced files, or two archives be one file
        archive.lost = False
        return member


class _Archive(tarfile.TarFile):
    """A tar file that is read past damaged headers; tarfile itself would take them for the end.

    zeros_from: the byte since which there has been nothing but zeros, or None.
    lost: no header has been found since a damaged one.
    damaged: the bytes at which something is wrong.
    """

    tarinfo = _Member
    ignore_zeros = True
    zeros_from: int | None = None
    lost = False

    def __init__(self, *args: Any, **options: Any) -> None:
        self.damaged: list[int] = []
        super().__init__(*args, **options)  # reads the first header

    def note_damage(self, at: int) -> None:
        if not self.lost:
            self.damaged.append(at if self.zeros_from is None else self.zeros_from)
        self.zeros_from, self.lost = None, True


def _count(path: str) -> int:
    """Samples with an image in a local shard. A broken one counts as far as it can be read."""
    base_plus_ext = require("webdataset.tariterators", "reading shards").base_plus_ext
    count, last = 0, None
    try:
        with _Archive.open(path, "r:*") as shard:
            for member in shard:
                if member.name.lower().endswith(IMAGE_SUFFIXES):
                    key, _ = base_plus_ext(member.name)  # None of what has no name but a suffix
                    count += key is not None and key != last
                    last = key
    except _BROKEN:
        return count  # reading it reports what is wrong with it
    return count


def _read(shard: str) -> Iterator[dict[str, Any] | CorruptSample]:
    """Undecoded samples of one shard, then, if something is wrong with it, what."""
    gopen = require("webdataset.gopen", "reading shards").gopen
    group_by_keys = require("webdataset.tariterators", "reading shards").group_by_keys
    broken: list[Exception] = []

    def note(error: Exception) -> bool:
        broken.append(error)
        return False

    def files(stream: Any) -> Iterator[dict[str, Any]]:
        try:
            archive: Any = _Archive.open(fileobj=stream, mode="r|*")
            for member in archive:
                if member.isreg() and not _METADATA.match(member.name):
                    data = archive.extractfile(member).read()
                    yield {"fname": member.name, "data": data, "__url__": shard}
                archive.members = []  # it would keep them all
            if archive.damaged:
                first, *others = archive.damaged
                more = f" and {len(others)} more" if others else ""
                note(tarfile.ReadError(f"damaged header at byte {first}{more}"))
            elif archive.zeros_from is None:
                note(EOFError("no end-of-archive mark"))
        except _BROKEN as error:
            note(error)

    try:
        with _Pushback(gopen(shard), 2) as raw:
            stream: Any = raw
            if raw.head == b"\x1f\x8b":
                stream = gzip.GzipFile(fileobj=stream)
            yield from group_by_keys(files(stream), handler=note)
    except _BROKEN as error:
        note(error)
    if broken:
        yield CorruptSample(shard, f"shard cannot be read in full ({describe(broken[0])})")


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
