"""Frozen text encoders from transformers: captions to padded word vectors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast._arguments import captions_by_image, check_choice
from jepa_fast.data.text import TextBatch, caption_slots, sample_captions

Normalization = Literal["none", "word", "sequence"]


class TextEncoder(nn.Module):
    """A frozen transformers model that gives one vector a token, for every token of a caption.

    Nothing is cached: a caption that comes again is encoded again.

    Args:
        model: maps ``input_ids`` and ``attention_mask`` to an output with ``last_hidden_state``
            (T5's encoder, BERT, gte and their like). It is frozen in place.
        tokenizer: the model's own.
        max_words: tokens a caption ``S``, special ones included; longer captions are cut.
        normalize: ``"none"``; ``"word"``, every vector to unit L2 norm; or ``"sequence"``, every
            dimension to unit L2 norm over the caption's tokens and the padding up to the longest
            caption of the batch. The last is a mistake of the public TI-JEPA code; its checkpoints
            were trained on such words.
        seed: for the choice of captions where an image has more than wanted.

    Attributes:
        dim: width ``Dt`` of a word vector.

    Raises:
        TypeError: a model of more than text, as CLIP is.
        ValueError: ``max_words`` below 1 or beyond the positions that the model has, an unknown
            ``normalize``, or a tokenizer that cannot pad.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_words: int = 64,
        normalize: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if max_words < 1:
            raise ValueError(f"max_words: expected at least 1, got {max_words}")
        check_choice("normalize", normalize, get_args(Normalization))
        if tokenizer.pad_token is None:
            raise ValueError(
                "tokenizer: expected one with a padding token, got none; "
                "set tokenizer.pad_token to a token of its vocabulary"
            )
        config: Any = model.config
        if getattr(config, "hidden_size", None) is None:
            raise TypeError(
                f"model: expected a text model, whose configuration has a hidden_size, got "
                f"{type(model).__name__}; of a model of images and text save and load the text "
                "part, such as transformers.CLIPTextModel"
            )
        # Otherwise found out by the first caption that is so long, perhaps after days.
        positions = getattr(config, "max_position_embeddings", None) or max_words
        if 0 < positions < max_words:
            raise ValueError(
                f"max_words: expected at most {positions}, the positions of the "
                f"{type(model).__name__}, got {max_words}"
            )
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.max_words = max_words
        self.normalize = normalize
        self.seed = seed
        self.dim = int(config.hidden_size)

    @torch.no_grad()
    def forward(
        self,
        captions: Sequence[str | Sequence[str]],
        max_captions: int | None = None,
        *,
        ids: Tensor | Sequence[int] | None = None,
        step: int = 0,
    ) -> TextBatch:
        """Encode the captions of ``B`` images.

        Args:
            captions: for each image its captions, possibly none, or a plain string: its one
                caption. Blank ones do not count.
            max_captions: ``C``; None: the largest number that an image of the batch has.
            ids: ``[B]`` integers and ``step``: which captions are drawn where an image has more,
                see :func:`~jepa_fast.data.text.sample_captions`.

        Returns:
            words ``[B, C, S, Dt]`` in the model's dtype, zero at padding, with word_mask
            ``[B, C, S]`` and caption_mask ``[B, C]``, on the model's device and without gradient.

        Raises:
            TypeError, ValueError: as :func:`~jepa_fast.data.text.sample_captions`.
        """
        given = captions_by_image("captions", captions)
        written = [[caption for caption in some if caption.strip()] for some in given]
        count = caption_slots(written, max_captions)
        chosen = sample_captions(written, count, seed=self.seed, step=step, ids=ids)
        parameter = next(self.model.parameters())
        shape = (len(chosen), count, self.max_words)
        words = parameter.new_zeros(*shape, self.dim)
        word_mask = torch.zeros(shape, dtype=torch.bool, device=parameter.device)
        slots = [(i, j) for i, some in enumerate(chosen) for j in range(len(some))]
        if slots:
            vectors, mask = self._encode([chosen[i][j] for i, j in slots], parameter.device)
            images, places = torch.tensor(slots, device=parameter.device).unbind(1)
            # Encoded to the longest caption, padded to S afterwards: shapes stay the same from
            # batch to batch, and no time goes into encoding padding.
            words[images, places, : mask.shape[1]] = vectors.to(words.dtype)
            word_mask[images, places, : mask.shape[1]] = mask
        return TextBatch(words, word_mask, word_mask.any(2))

    def split(self, caption: str) -> list[str]:
        """The tokens of a caption as text, at most ``max_words``."""
        tokens = self.tokenizer(caption, max_length=self.max_words, truncation=True)
        return self.tokenizer.convert_ids_to_tokens(tokens["input_ids"])

    def _encode(self, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            captions,
            max_length=self.max_words,
            truncation=True,
            padding=True,
            return_tensors="pt",
        ).to(device)
        vectors = self.model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).last_hidden_state
        mask = tokens["attention_mask"].bool()
        if self.normalize != "none":
            vectors = F.normalize(vectors, dim=1 if self.normalize == "sequence" else 2)
        # What overflowed there is no number, which factors of 0 would leave as it is.
        return vectors.masked_fill(~mask[..., None], 0), mask

    def train(self, mode: bool = True) -> TextEncoder:
        """Has no effect on the frozen model: it stays in evaluation mode (no dropout)."""
        super().train(mode)
        self.model.eval()
        return self


def load_text_encoder(
    source: str | Path,
    *,
    max_words: int = 64,
    normalize: str = "none",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    download: bool = True,
) -> TextEncoder:
    """Load a text encoder: of an encoder-decoder model such as T5, its encoder.

    Args:
        source: folder written by ``save_pretrained`` or ``hf download``, or a name on the Hugging
            Face hub such as ``"google-t5/t5-base"``, which is taken from the local cache if it is
            there.
        max_words: see :class:`TextEncoder`, like ``normalize`` and ``seed``.
        dtype: of the weights, and so of the words.
        trust_remote_code: run model code that comes with the weights, which some models need
            (``"Alibaba-NLP/gte-base-en-v1.5"``). Read that code first.
        download: fetch a name that is not in the cache.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: no such folder, files missing in it, or a name that is not in the cache
            and cannot be downloaded; says what to do.
        TypeError, ValueError: the model needs ``trust_remote_code``; or as :class:`TextEncoder`.
    """
    on_disk = Path(source).expanduser().is_dir()
    name = str(Path(source).expanduser()) if on_disk else str(source)
    is_path = on_disk or name.startswith((os.sep, ".", "~")) or name.count("/") > 1
    expected = (
        "a folder with config, weights and tokenizer"
        if is_path
        else "an existing folder, or a name that is in the Hugging Face cache or on its hub"
    )
    advice = (
        f"expected {expected}, got {name}; on a machine with internet access run `hf download "
        f"{'<name>' if is_path else name} --local-dir {name if is_path else '<folder>'}`, "
        "copy that folder to this machine, and pass its path"
    )
    if is_path and not Path(name, "config.json").is_file():
        raise FileNotFoundError(f"source: {advice}; there is no {Path(name, 'config.json')}")
    # The cache first: a name that is in it must work without a network.
    for local_only in (True,) if is_path or not download else (True, False):
        try:
            model, tokenizer = _from_pretrained(name, trust_remote_code, local_only)
            break
        except OSError as error:
            failure = error
    else:
        raise FileNotFoundError(f"source: {advice}; transformers: {failure}") from failure
    return TextEncoder(
        model.to(dtype), tokenizer, max_words=max_words, normalize=normalize, seed=seed
    )


def _from_pretrained(name: str, trust_remote_code: bool, local_only: bool) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'text encoders need transformers: pip install "jepa-fast[text]"'
        ) from error
    options = {"trust_remote_code": trust_remote_code, "local_files_only": local_only}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        kind: Any = transformers.AutoModel
        # A T5EncoderModel saves itself as no encoder-decoder, and would get a random decoder.
        names = config.architectures or ()
        if config.is_encoder_decoder or any(name.endswith("EncoderModel") for name in names):
            kind = transformers.AutoModelForTextEncoding
        model = kind.from_pretrained(name, config=config, **options)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"source: {name} comes with model code of its own, which is not run unless you ask; "
            "read that code, then pass trust_remote_code=True"
        ) from error
    # Without its files transformers makes an empty tokenizer, for which every word is unknown.
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if len(set(tokenizer.get_vocab()) - added) < 2:
        raise FileNotFoundError(f"{name} has no tokenizer files")
    return model, tokenizer
