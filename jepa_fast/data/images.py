"""Image files: decoding, folders with a class in each sub-folder, COCO captions."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_fast.data.batch import UNKNOWN, Sample
from jepa_fast.data.extras import require
from jepa_fast.data.fields import integer, texts
from jepa_fast.data.skips import CorruptSample, SkipLog, describe

_log = logging.getLogger("jepa_fast.data")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def decode_image(data: bytes, key: str) -> Tensor:
    """An encoded picture as RGB, [3, H, W] uint8. Raises CorruptSample if it cannot be decoded."""
    pil = require("PIL.Image", "decoding images")
    try:
        with pil.open(io.BytesIO(data)) as picture:
            if picture.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
                grey = (np.asarray(picture) / 257).round().astype(np.uint8)
                pixels = np.repeat(grey[..., None], 3, axis=2)
            else:
                pixels = np.array(picture.convert("RGB"))
    # What Pillow raises for broken files: OSError (also UnidentifiedImageError), SyntaxError (PNG),
    # ValueError, struct.error and IndexError from its parsers, DecompressionBombError.
    except Exception as error:
        if isinstance(error, pil.UnidentifiedImageError):  # it says only where the bytes lie
            raise CorruptSample(key, "image cannot be decoded (no known format)") from error
        raise CorruptSample(key, f"image cannot be decoded ({describe(error)})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_image(path: Path, key: str) -> Tensor:
    """The picture in a file, [3, H, W] uint8. Raises CorruptSample if it cannot be read."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: of a name that no file can have
        raise CorruptSample(key, f"image cannot be read ({describe(error)})") from error
    return decode_image(data, key)


def _images_below(folder: Path, within: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files with the name of an image. `Path.rglob` follows no links, as of classes of a subset."""
    here = os.path.realpath(folder)
    if here in within:  # a link leads back
        return
    try:
        entries = list(os.scandir(folder))
    except PermissionError as error:
        _log.warning("left out %s: %s", folder, describe(error))
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        # Of a link to itself DirEntry.is_dir raises.
        if os.path.isdir(path) if entry.is_symlink() else entry.is_dir():
            yield from _images_below(path, within | {here})
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield path


class ImageFolder:
    """Images below `root`, each sub-folder a class: `root/<class>/**/<name>.jpg`.

    Labels number the sub-folders in alphabetical order; images that lie in `root` itself have none.
    Files and folders whose names begin with a dot are left out; links to folders are followed.
    captions: a text with `{}` for the class name, underscores as spaces; None for no captions.
    classes: the sub-folders that labels number, where `root` may lack some of them, as validation
        images do; None for those that are there.

    Raises FileNotFoundError if `root` is no folder, ValueError if it holds no image, or images of a
    class that is not among `classes`, or if `captions` asks for more than the class name.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        captions: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"root must be a folder of images, {self.root} is none")
        if captions is not None:
            try:
                captions.format("class")
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise ValueError(
                    "captions must be a text with {} for the class name, and {{ for a brace, got "
                    f"{captions!r} ({describe(error)})"
                ) from error
            if captions.format("a") == captions.format("b"):
                _log.warning(
                    "captions: expected {} in the text, for the class name, got %r: every image "
                    "has the same caption, which says nothing of it",
                    captions,
                )
        self.paths = sorted(path.relative_to(self.root) for path in _images_below(self.root))
        if not self.paths:
            raise ValueError(f"root must hold images ({', '.join(IMAGE_SUFFIXES)}): {self.root}")
        present = {path.parts[0] for path in self.paths if len(path.parts) > 1}
        self.classes = sorted(present if classes is None else classes)
        if unknown := sorted(present - set(self.classes)):
            raise ValueError(
                f"sub-folders of {self.root} must be among the {len(self.classes)} classes, got "
                f"{', '.join(unknown[:5])}"
            )
        self._label = {name: label for label, name in enumerate(self.classes)}
        self.captions = captions
        self.has_captions = captions is not None and bool(present)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        name = path.parts[0] if len(path.parts) > 1 else None
        captions = []
        if self.captions is not None and name is not None:
            captions = [self.captions.format(name.replace("_", " "))]
        return {
            "image": read_image(self.root / path, str(path)),
            "label": UNKNOWN if name is None else self._label[name],
            "captions": captions,
            "id": index,
        }

    def __repr__(self) -> str:
        return f"ImageFolder({str(self.root)!r})"


class CocoCaptions:
    """Images with captions from a COCO annotation file (`captions_train2017.json`).

    annotations: JSON with "images" (id, file_name) and "annotations" (image_id, caption).
    images: folder of the image files.

    An image keeps its COCO id and all its captions. Entries of the file that cannot be used are
    left out, logged, and kept in `skipped`, `{entry: reason}`.

    Raises FileNotFoundError if a path is missing and ValueError if the file is not in that form, or
    none of its images or none of its annotations can be used.
    """

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        self.annotations, self.images = Path(annotations), Path(images)
        if not self.annotations.is_file():
            raise FileNotFoundError(f"annotations must be a JSON file, {annotations} is none")
        if not self.images.is_dir():
            raise FileNotFoundError(f"images must be a folder, {images} is none")
        expected = (
            'annotations must be COCO captions, with "images" (id, file_name) and "annotations" '
            f"(image_id, caption); {self.annotations}: "
        )
        try:
            content: Mapping[str, Any] = json.loads(self.annotations.read_text(encoding="utf-8"))
            pictures, told = list(content["images"]), list(content["annotations"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(expected + describe(error)) from error

        self._files: list[tuple[int, str]] = []
        self._captions: dict[int, list[str]] = {}
        skips = SkipLog()
        for i, entry in enumerate(pictures):
            try:
                number = integer("id", entry["id"])
                (name,) = texts("file_name", [entry["file_name"]])
            except (ValueError, KeyError, TypeError) as error:
                skips.add({f"{self.annotations.name} images[{i}]": f"unusable ({describe(error)})"})
                continue
            self._files.append((number, name))
            self._captions[number] = []
        for i, entry in enumerate(told):
            try:
                number = integer("image_id", entry["image_id"])
                (caption,) = texts("caption", [entry["caption"]])
                if number not in self._captions:
                    raise ValueError("image_id is of none of the images")
            except (ValueError, KeyError, TypeError) as error:
                key = f"{self.annotations.name} annotations[{i}]"
                skips.add({key: f"unusable ({describe(error)})"})
                continue
            self._captions[number].append(caption.strip())
        self.has_captions = any(self._captions.values())
        if not self._files or (told and not self.has_captions):
            raise ValueError(expected + (skips.summary() if skips else "it has no images"))
        self.skipped = skips.reasons
        if self.skipped:
            _log.warning("%s", skips.summary())

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        number, name = self._files[index]
        return {
            "image": read_image(self.images / name, name),
            "label": UNKNOWN,
            "captions": self._captions[number],
            "id": number,
        }

    def __repr__(self) -> str:
        return f"CocoCaptions({str(self.annotations)!r}, {str(self.images)!r})"
