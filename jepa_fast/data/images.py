"""Image files: decoding, folders with a class in each sub-folder, COCO captions."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_fast.data.batch import UNKNOWN, Sample
from jepa_fast.data.extras import require
from jepa_fast.data.skips import CorruptSample, describe

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def decode_image(data: bytes, key: str) -> Tensor:
    """An encoded picture as RGB, [3, H, W] uint8. Raises CorruptSample if it cannot be decoded."""
    pil = require("PIL.Image", "decoding images")
    try:
        with pil.open(io.BytesIO(data)) as picture:
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
    except OSError as error:
        raise CorruptSample(key, f"image cannot be read ({describe(error)})") from error
    return decode_image(data, key)


class ImageFolder:
    """Images below `root`, each sub-folder a class: `root/<class>/**/<name>.jpg`.

    Labels number the sub-folders in alphabetical order; images that lie in `root` itself have none.
    captions: a text with `{}` for the class name, underscores as spaces; None for no captions.
    classes: the sub-folders that labels number, where `root` may lack some of them, as validation
        images do; None for those that are there.

    Raises FileNotFoundError if `root` is no folder, ValueError if it holds no image, or images of a
    class that is not among `classes`.
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
        found = (p for p in self.root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        self.paths = sorted(path.relative_to(self.root) for path in found)
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

    An image keeps its COCO id and all its captions.

    Raises FileNotFoundError if a path is missing and ValueError if the file is not in that form.
    """

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        self.annotations, self.images = Path(annotations), Path(images)
        if not self.annotations.is_file():
            raise FileNotFoundError(f"annotations must be a JSON file, {annotations} is none")
        if not self.images.is_dir():
            raise FileNotFoundError(f"images must be a folder, {images} is none")
        try:
            content: Mapping[str, Any] = json.loads(self.annotations.read_text(encoding="utf-8"))
            self._files = [(int(entry["id"]), entry["file_name"]) for entry in content["images"]]
            self._captions: dict[int, list[str]] = {number: [] for number, _ in self._files}
            for entry in content["annotations"]:
                self._captions[int(entry["image_id"])].append(entry["caption"].strip())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                'annotations must be COCO captions, with "images" (id, file_name) and '
                f'"annotations" (image_id, caption); {self.annotations}: {describe(error)}'
            ) from error
        if not self._files:
            raise ValueError(f"annotations must list images, {self.annotations} lists none")

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
