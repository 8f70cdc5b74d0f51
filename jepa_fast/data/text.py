"""Captions as padded word vectors, and the word vectors to use where no text encoder is at hand."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from jepa_fast._arguments import captions_by_image, check_number, holds_integers, integer
from jepa_fast.data import counter

_log = logging.getLogger(__name__)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_CAPTIONS_KEPT = 200_000
_NUMBERS_KEPT = 2**26  # of the vectors of words: 256 MB


@dataclass(frozen=True)
class TextBatch:
    """The captions of `B` images as word vectors; padding is zero and masked.

    words: [B, C, S, Dt] float32, or in the dtype of the text encoder.
    word_mask: [B, C, S] bool, True where there is a word.
    caption_mask: [B, C] bool, True where there is a caption (of at least one word).
    """

    words: Tensor
    word_mask: Tensor
    caption_mask: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextBatch:
        """The batch with its tensors on `device`."""
        return replace(
            self,
            words=self.words.to(device, non_blocking=non_blocking),
            word_mask=self.word_mask.to(device, non_blocking=non_blocking),
            caption_mask=self.caption_mask.to(device, non_blocking=non_blocking),
        )


def sample_captions(
    captions: Sequence[str | Sequence[str]],
    max_captions: int,
    *,
    seed: int = 0,
    step: int = 0,
    ids: Tensor | Sequence[int] | None = None,
) -> list[list[str]]:
    """At most `max_captions` captions an image, drawn by (seed, step, id) and kept in their order.

    captions: for each image its captions, possibly none, or a plain string: its one caption.
    ids: [B] integers, or None to take the first ones of every image (evaluation).

    Raises TypeError if `captions` are neither strings nor sequences of them or a number is no
    integer, ValueError if `ids` and `captions` differ in length or `max_captions` is below 1.
    """
    max_captions = integer("max_captions", max_captions)
    if max_captions < 1:
        raise ValueError(f"max_captions must be at least 1, got {max_captions}")
    captions = captions_by_image("captions", captions)
    if ids is None:
        return [some[:max_captions] for some in captions]
    ids = torch.as_tensor(ids)
    if ids.shape != (len(captions),):
        got = len(ids) if ids.ndim == 1 else f"shape {list(ids.shape)}"
        raise ValueError(f"ids must have one entry for each of {len(captions)} images, got {got}")
    if len(ids) == 0:  # torch takes an empty list for floats
        return []
    if not holds_integers(ids):
        raise TypeError(f"ids must be integers, got {ids.dtype}; use .long()")
    seed, step = integer("seed", seed), integer("step", step)
    longest = max((len(some) for some in captions), default=0)
    draws = counter.bits(seed, step, ids[:, None].cpu(), np.arange(longest))
    chosen = []
    for some, draw in zip(captions, draws, strict=True):
        keep = np.sort(np.argsort(draw[: len(some)], kind="stable")[:max_captions])
        chosen.append([some[i] for i in keep])
    return chosen


def caption_slots(captions: Sequence[Sequence[str]], max_captions: int | None) -> int:
    """C of a batch: `max_captions`, or as many captions as an image has at the most, at least 1."""
    if max_captions is not None:
        return max_captions
    return max((len(some) for some in captions), default=0) or 1


class HashedWords:
    """Word vectors without a text encoder: a word is hashed to a fixed Gaussian vector.

    A vector depends on (seed, word) alone, with unit variance a dimension, so that different words
    are nearly orthogonal and nothing has to be downloaded or trained. Unlike the output of a
    pretrained encoder, a hashed word carries no meaning and does not know its caption; `context`
    and `position` add what a frozen encoder would give away about the caption.

    dim: width Dt of a word vector.
    max_words: words a caption S; shorter captions are padded, longer ones cut (logged once).
    context: share in [0, 1) of a word's vector that is the (unit-variance) sum of its caption's
        words, so that "three" in "a three in the top left corner" differs from any other three.
    position: size of a sinusoidal signal of the word's place in its caption, 0 or more.

    Raises TypeError for an option of another type, ValueError for one out of range.
    """

    def __init__(
        self,
        dim: int,
        max_words: int,
        seed: int = 0,
        *,
        context: float = 0.0,
        position: float = 0.0,
    ) -> None:
        dim, max_words = integer("dim", dim), integer("max_words", max_words)
        seed = integer("seed", seed)
        if dim < 1 or max_words < 1:
            raise ValueError(f"dim and max_words must be at least 1, got {dim} and {max_words}")
        check_number("context", context, zero=True)
        check_number("position", position, zero=True)
        if not 0 <= context < 1:
            raise ValueError(f"context must be in [0, 1), got {context}")
        self.dim, self.max_words, self.seed = dim, max_words, seed
        self.context, self.position = context, position
        self._forget()
        self._told_cut = False
        _log.warning(
            "words get fixed hashed vectors (width %d, seed %d), not those of a pretrained text "
            "encoder: equal words match, related words do not",
            dim,
            seed,
        )

    def vector(self, word: str) -> Tensor:
        """The vector of one word, [Dt] float32."""
        self._make_room()
        row = self._row(word)
        return self._table[row].clone()

    def __call__(
        self,
        captions: Sequence[str | Sequence[str]],
        max_captions: int | None = None,
        *,
        ids: Tensor | Sequence[int] | None = None,
        step: int = 0,
    ) -> TextBatch:
        """Embeds the captions of `B` images.

        captions: for each image its captions, possibly none, or a plain string: its one caption.
        max_captions: C; the default is the largest number an image of the batch has.
        ids, step: which captions are drawn where an image has more, see `sample_captions`.

        Returns a TextBatch with words [B, C, S, Dt], word_mask [B, C, S], caption_mask [B, C].

        Raises TypeError, ValueError as `sample_captions`.
        """
        captions = captions_by_image("captions", captions)
        count = caption_slots(captions, max_captions)
        chosen = sample_captions(captions, count, seed=self.seed, step=step, ids=ids)
        self._make_room()
        rows = np.zeros((len(chosen), count, self.max_words), dtype=np.int64)
        for i, some in enumerate(chosen):
            for j, caption in enumerate(some):
                rows[i, j] = self._caption_rows(caption)
        index = torch.from_numpy(rows)
        mask = index > 0
        words = self._table[index]
        if self.context > 0:
            length = mask.sum(2).clamp(min=1)[:, :, None, None].to(words.dtype)
            total = words.sum(2, keepdim=True) / length.sqrt()
            words = (1 - self.context) ** 0.5 * words + self.context**0.5 * total
        if self.position > 0:
            words = words + self.position * _sinusoid(self.max_words, self.dim)
        if self.context > 0 or self.position > 0:
            words = words * mask[..., None]
        return TextBatch(words, mask, mask.any(2))

    def split(self, caption: str) -> list[str]:
        """The words of a caption in their order, at most `max_words`."""
        return _WORD.findall(caption.lower())[: self.max_words]

    def _make_room(self) -> None:
        """Between batches only, whose captions keep rows of the table."""
        if self._table.numel() > _NUMBERS_KEPT:
            self._forget()

    def _forget(self) -> None:
        self._rows: dict[str, int] = {}
        # Row 0 is padding; grows by doubling. Whatever torch's default dtype and device are.
        self._table = torch.zeros(64, self.dim, dtype=torch.float32, device="cpu")
        self._captions: dict[str, np.ndarray] = {}

    def _caption_rows(self, caption: str) -> np.ndarray:
        rows = self._captions.get(caption)
        if rows is None:
            if not self._told_cut and len(_WORD.findall(caption)) > self.max_words:
                self._told_cut = True
                _log.warning(
                    "captions longer than max_words=%d are cut, the first is %.80r",
                    self.max_words,
                    caption,
                )
            rows = np.zeros(self.max_words, dtype=np.int64)
            found = [self._row(word) for word in self.split(caption)]
            rows[: len(found)] = found
            if len(self._captions) >= _CAPTIONS_KEPT:
                self._captions.clear()
            self._captions[caption] = rows
        return rows

    def _row(self, word: str) -> int:
        row = self._rows.get(word)
        if row is None:
            row = self._rows[word] = len(self._rows) + 1
            if row == len(self._table):
                self._table = torch.cat([self._table, torch.zeros_like(self._table)])
            vector = counter.normal(self.seed, counter.text_key(word), np.arange(self.dim))
            self._table[row] = torch.from_numpy(vector)
        return row


def _sinusoid(length: int, dim: int) -> Tensor:
    """Sine and cosine of the place at falling frequencies, [length, dim]."""
    with torch.device("cpu"):
        frequency = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim]
