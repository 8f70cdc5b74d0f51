"""Text encoders through transformers, built tiny and random on disk: nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast import TIJepa
from jepa_fast.interop.text import TextEncoder, load_text_encoder
from jepa_fast.masks import BlockMaskSampler

transformers = pytest.importorskip("transformers")

WORDS = ("a", "dog", "on", "the", "grass", "two", "cats")
CAPTIONS = [["a dog on the grass", "two cats"], [], ["the grass"]]


@pytest.fixture(scope="module", params=["t5", "bert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``save_pretrained`` leaves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[END]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [END]", special_tokens=[("[END]", 2)]
    )
    torch.manual_seed(0)
    if request.param == "t5":
        config = transformers.T5Config(
            vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.5
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.BertConfig(
            vocab_size=16,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            hidden_dropout_prob=0.5,
        )
        model = transformers.BertModel(config)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(folder, max_words=8)


def test_words_are_those_of_the_caption_alone(encoder: TextEncoder) -> None:
    text = encoder(CAPTIONS)
    assert text.words.shape == (3, 2, 8, 8)
    assert encoder.dim == 8
    assert text.caption_mask.tolist() == [[True, True], [False, False], [True, False]]
    assert text.word_mask.sum(2).tolist() == [[6, 3], [0, 0], [3, 0]]
    for i, some in enumerate(CAPTIONS):
        for j, caption in enumerate(some):
            ids = torch.tensor([encoder.tokenizer(caption)["input_ids"]])
            expected = encoder.model(input_ids=ids).last_hidden_state[0]
            torch.testing.assert_close(text.words[i, j][text.word_mask[i, j]], expected)
    assert (text.words[~text.word_mask] == 0).all()


def test_a_plain_string_is_the_one_caption_of_its_image(encoder: TextEncoder) -> None:
    text = encoder(["a dog", ["two cats", " "]])
    assert torch.equal(text.words, encoder([["a dog"], ["two cats"]]).words)


def test_only_the_encoder_of_t5_is_loaded(folder: Path, encoder: TextEncoder) -> None:
    assert not any("decoder" in name for name in encoder.state_dict())


def test_an_encoder_that_was_saved_alone_is_the_same(encoder: TextEncoder, tmp_path: Path) -> None:
    for part in (encoder.model, encoder.tokenizer):
        part.save_pretrained(tmp_path)
    again = load_text_encoder(tmp_path, max_words=8)
    assert type(again.model) is type(encoder.model)
    assert torch.equal(again(CAPTIONS).words, encoder(CAPTIONS).words)


def test_a_model_of_images_and_text_is_refused(folder: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "projection_dim": 8}
    text = {**sizes, "vocab_size": 16, "max_position_embeddings": 12, "eos_token_id": 2}
    vision = {**sizes, "image_size": 32}
    clip = tmp_path / "clip"
    shutil.copytree(folder, clip)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    transformers.CLIPModel(config).save_pretrained(clip)
    with pytest.raises(TypeError, match=r"got CLIPModel; .*such as transformers\.CLIPTextModel"):
        load_text_encoder(clip)
    transformers.CLIPTextModel.from_pretrained(clip).save_pretrained(clip)
    assert load_text_encoder(clip, max_words=12)(["a dog"]).words.shape == (1, 1, 12, 8)
    with pytest.raises(ValueError, match=r"max_words: expected at most 12, .*TextModel, got 13"):
        load_text_encoder(clip, max_words=13)


def test_it_is_frozen(encoder: TextEncoder) -> None:
    encoder.train()
    assert not any(module.training for module in encoder.model.modules())
    first, second = encoder(CAPTIONS), encoder(CAPTIONS)
    assert not first.words.requires_grad
    assert torch.equal(first.words, second.words)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_captions_are_cut_padded_drawn_and_blank_ones_dropped(folder: Path) -> None:
    encoder = load_text_encoder(folder, max_words=4)
    text = encoder([["  ", "a dog on the grass"]])
    assert text.words.shape == (1, 1, 4, 8)
    assert text.word_mask.all()
    empty = encoder([[], [""]], max_captions=3)
    assert empty.words.shape == (2, 3, 4, 8)
    assert not empty.caption_mask.any()

    many = [["a", "dog", "on", "the", "grass"]]
    alone = {tuple(encoder([[c]]).words.flatten().tolist()): c for c in many[0]}
    draws = set()
    for step in range(20):
        drawn = encoder(many, 2, ids=torch.tensor([5]), step=step)
        assert drawn.words.shape == (1, 2, 4, 8)
        near = [
            min(alone, key=lambda v: F.mse_loss(torch.tensor(v), w))
            for w in drawn.words[0].flatten(1)
        ]
        draws.add(tuple(alone[v] for v in near))
    assert len(draws) > 3


class _Overflows(nn.Module):
    """An encoder whose padding is infinite, as a T5's may be in float16."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        padding = attention_mask[..., None] == 0
        return SimpleNamespace(
            last_hidden_state=found.last_hidden_state.masked_fill(padding, torch.inf)
        )


def test_padding_is_zero_whatever_the_model_makes_of_it(encoder: TextEncoder) -> None:
    overflowing = TextEncoder(_Overflows(encoder.model), encoder.tokenizer, max_words=8)
    assert torch.equal(overflowing(CAPTIONS).words, encoder(CAPTIONS).words)


def test_normalize(folder: Path) -> None:
    plain = load_text_encoder(folder, max_words=8)(CAPTIONS)
    word = load_text_encoder(folder, max_words=8, normalize="word")(CAPTIONS)
    norms = word.words.norm(dim=-1)
    torch.testing.assert_close(norms[word.word_mask], torch.ones_like(norms[word.word_mask]))
    torch.testing.assert_close(word.words, F.normalize(plain.words, dim=-1))

    # With captions of one length there is no padding, so the norm is over the caption alone.
    captions = [["two cats"], ["the grass"]]
    plain = load_text_encoder(folder, max_words=8)(captions)
    sequence = load_text_encoder(folder, max_words=8, normalize="sequence")(captions)
    torch.testing.assert_close(sequence.words, F.normalize(plain.words, dim=2))


def test_dtype(folder: Path) -> None:
    assert load_text_encoder(folder, dtype=torch.bfloat16)(CAPTIONS).words.dtype == torch.bfloat16


def test_a_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    missing = tmp_path / "t5-base"
    with pytest.raises(FileNotFoundError, match="hf download <name> --local-dir") as error:
        load_text_encoder(missing)
    assert str(missing) in str(error.value)


def test_an_incomplete_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"config, weights and tokenizer.*no .*config\.json"
    ):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize(("lost", "reason"), [("tokenizer", "tokenizer"), ("model", "model")])
def test_lost_files_say_what_to_do(folder: Path, tmp_path: Path, lost: str, reason: str) -> None:
    for file in folder.iterdir():
        if not file.name.startswith(lost):
            shutil.copy(file, tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"hf download <name>.*transformers:.*{reason}"):
        load_text_encoder(tmp_path)


def test_a_name_that_is_not_cached_says_what_to_do() -> None:
    with pytest.raises(FileNotFoundError, match="hf download nobody/no-such-encoder --local-dir"):
        load_text_encoder("nobody/no-such-encoder", download=False)


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ValueError, match="pass trust_remote_code=True"):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"max_words": 0}, "max_words: expected at least 1"), ({"normalize": "l2"}, "normalize:")],
)
def test_bad_arguments(folder: Path, arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_text_encoder(folder, **arguments)


def test_ti_jepa_reads_captions_through_it(folder: Path) -> None:
    model = TIJepa(
        None,
        image_dim=8,
        grid=(8, 8),
        text_dim=8,
        text_encoder=load_text_encoder(folder, max_words=8),
        width=8,
        depth=1,
        num_heads=2,
        predictor_dim=8,
        predictor_depth=1,
        predictor_heads=2,
    )
    assert not any(name.startswith("text_encoder") for name in model.state_dict())
    assert not any(name.startswith("text_encoder") for name, _ in model.trainable_parameters())
    features, masks = torch.randn(3, 64, 8), BlockMaskSampler((8, 8))(0, 3)
    out = model(None, masks, CAPTIONS, image_features=features)
    text = model.text_encoder(CAPTIONS)
    same = model(
        None, masks, text.words, text.word_mask, text.caption_mask, image_features=features
    )
    assert torch.equal(out.loss, same.loss)
    out.loss.backward()
    assert model.energy(None, ["a dog", "two cats"], image_features=features).shape == (3, 2)
