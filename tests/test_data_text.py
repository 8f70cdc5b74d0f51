"""Hashed word vectors, padding and masks, and which captions are drawn."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from jepa_fast.data import HashedWords, sample_captions

CAPTIONS = [["a seven here", "Nothing, else!"], [], ["one", "two three", "a", "!?"]]


def test_shapes_masks_and_padding() -> None:
    text = HashedWords(8, 4)(CAPTIONS)
    assert text.words.shape == (3, 4, 4, 8)
    assert text.word_mask.sum(2).tolist() == [[3, 2, 0, 0], [0, 0, 0, 0], [1, 2, 1, 0]]
    # A caption without a word ("!?") counts as none: attention over nothing has no answer.
    assert text.caption_mask.tolist() == [
        [True, True, False, False],
        [False] * 4,
        [True, True, True, False],
    ]
    assert not text.words[~text.word_mask].any()
    assert HashedWords(8, 2).split("A seven, isn't it?") == ["a", "seven"]
    assert HashedWords(8, 9).split("isn't 7_8 éa!") == ["isn't", "7", "8", "éa"]
    assert HashedWords(8, 4)([[], []]).words.shape == (2, 1, 4, 8)
    assert HashedWords(8, 4)([], 3).words.shape == (0, 3, 4, 8)


def test_a_plain_string_is_the_one_caption_of_its_image() -> None:
    given, lists = ["a dog", ["a cat", "two"], []], [["a dog"], ["a cat", "two"], []]
    words = HashedWords(8, 4)
    assert torch.equal(words(given).words, words(lists).words)
    assert sample_captions(given, 1) == [["a dog"], ["a cat"], []]
    ids = torch.arange(3)
    assert sample_captions(given, 1, ids=ids) == sample_captions(lists, 1, ids=ids)


def test_a_vector_depends_on_seed_and_word_alone() -> None:
    first, second = HashedWords(16, 5), HashedWords(16, 5)
    second.vector("something else before")
    second.vector("seven").zero_()  # it is the caller's own
    assert torch.equal(first.vector("seven"), second.vector("seven"))
    assert torch.equal(first([["Seven"]]).words[0, 0, 0], first.vector("seven"))
    assert not torch.equal(first.vector("seven"), HashedWords(16, 5, seed=1).vector("seven"))
    assert not torch.equal(first.vector("seven"), first.vector("eight"))


def test_vectors_are_standard_normal_and_nearly_orthogonal() -> None:
    words = HashedWords(256, 1)
    table = torch.stack([words.vector(str(i)) for i in range(200)])
    assert table.mean().abs() < 0.03
    assert abs(table.std() - 1) < 0.03
    cosines = torch.nn.functional.normalize(table) @ torch.nn.functional.normalize(table).T
    assert (cosines - torch.eye(200)).abs().max() < 0.35


def test_context_and_position_tell_equal_words_apart() -> None:
    captions = [["three three left", "three right"]]
    plain = HashedWords(64, 3)(captions).words[0]
    assert torch.equal(plain[0, 0], plain[0, 1])
    assert torch.equal(plain[0, 0], plain[1, 0])
    context = HashedWords(64, 3, context=0.3)(captions).words[0]
    assert torch.equal(context[0, 0], context[0, 1])
    assert not torch.allclose(context[0, 0], context[1, 0])
    assert not context[1, 2].any()
    position = HashedWords(64, 3, position=0.5)(captions).words[0]
    assert not torch.allclose(position[0, 0], position[0, 1])
    assert torch.equal(position[0, 0], position[1, 0])


def test_captions_are_drawn_by_seed_step_and_id() -> None:
    many = [[str(i) for i in range(9)] for _ in range(4)]
    ids = torch.tensor([5, 6, 7, 8])
    drawn = sample_captions(many, 3, seed=1, step=10, ids=ids)
    assert all(len(set(some)) == 3 and some == sorted(some) for some in drawn)
    assert len({tuple(some) for some in drawn}) > 1
    assert sample_captions(many[:1], 3, seed=1, step=10, ids=ids[2:3]) == drawn[2:3]
    assert sample_captions(many, 3, seed=1, step=11, ids=ids) != drawn
    assert sample_captions(many, 3) == [["0", "1", "2"]] * 4
    assert sample_captions([["x"], []], 3, ids=ids[:2]) == [["x"], []]
    state = torch.random.get_rng_state()
    HashedWords(8, 2)(many, 3, ids=ids)
    assert torch.equal(state, torch.random.get_rng_state())


def test_every_caption_is_drawn_about_equally_often() -> None:
    counts = torch.zeros(6)
    for step in range(300):
        for some in sample_captions([list("012345")], 2, step=step, ids=torch.tensor([3])):
            for text in some:
                counts[int(text)] += 1
    assert counts.min() > 70
    assert counts.max() < 130


def test_the_log_says_that_words_are_hashed_or_cut(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        words = HashedWords(4, 2)
        words([["a b c", "d e f"]])
        words([["g h i"]])
    assert [record.message for record in caplog.records if "hashed" in record.message]
    assert len([record for record in caplog.records if "cut" in record.message]) == 1
    assert len(caplog.records) == 2


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="dim and max_words"):
        HashedWords(0, 3)
    with pytest.raises(ValueError, match=r"context must be in \[0, 1\)"):
        HashedWords(4, 3, context=1.0)
    with pytest.raises(ValueError, match="ids must have one entry for each of 2 images, got 1"):
        sample_captions([["a"], ["b"]], 1, ids=torch.tensor([1]))
    with pytest.raises(ValueError, match="max_captions must be at least 1"):
        sample_captions([["a"]], 0)
    with pytest.raises(TypeError, match=r"captions: .* got one str; for one image pass"):
        sample_captions("a dog", 1)
    with pytest.raises(TypeError, match=r"captions: .* for each image, got NoneType; an image"):
        HashedWords(4, 3)(None)
    with pytest.raises(TypeError, match=r"captions\[1\]: expected a caption or .* got NoneType"):
        HashedWords(4, 3)(["a dog", None])
    for captions, got in (
        ([["a"], [None]], "NoneType"),
        (["a", b"b"], "bytes"),
        (["a", [3]], "int"),
    ):
        with pytest.raises(TypeError, match=rf"captions\[1\]: .* each a str, got {got}"):
            HashedWords(4, 3)(captions)
    for ids, message in (
        (torch.tensor([1.0]), r"ids must be integers, got torch\.float32"),
        ([True], r"ids must be integers, got torch\.bool"),
    ):
        with pytest.raises(TypeError, match=message):
            sample_captions([["a"]], 1, ids=ids)
    with pytest.raises(ValueError, match=r"ids must have one .* 1 images, got shape \[1, 1\]"):
        sample_captions([["a"]], 1, ids=torch.tensor([[1]]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("dim", 4.0), ("max_words", "3"), ("seed", 0.5), ("context", "a"), ("position", None)],
)
def test_options_of_another_type(name: str, value: object) -> None:
    options = {"dim": 4, "max_words": 3, name: value}
    with pytest.raises(TypeError, match=f"^{name}: expected a"):
        HashedWords(**options)


@pytest.mark.parametrize("size", [-0.5, float("nan")])
def test_a_signal_of_positions_has_a_size(size: float) -> None:
    with pytest.raises(ValueError, match="position: expected a number of 0 or more"):
        HashedWords(4, 3, position=size)


def test_no_captions_at_most_are_not_all_captions() -> None:
    with pytest.raises(ValueError, match="max_captions must be at least 1, got 0"):
        HashedWords(4, 3)([["a", "b"]], 0)
    with pytest.raises(TypeError, match="max_captions: expected an int, got str"):
        HashedWords(4, 3)([["a", "b"]], "1")


def test_ids_may_be_a_list_or_an_array() -> None:
    many = [[str(i) for i in range(9)] for _ in range(3)]
    want = sample_captions(many, 2, ids=torch.tensor([5, 6, 7]))
    assert sample_captions(many, 2, ids=[5, 6, 7]) == want
    assert sample_captions(many, 2, ids=np.array([5, 6, 7])) == want


def test_a_vector_is_the_callers_own() -> None:
    words = HashedWords(4, 3)
    words.vector("dog").zero_()
    assert bool(words([["dog"]]).words[0, 0, 0].all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_words_are_float32_on_the_cpu_whatever_the_defaults_are(dtype: torch.dtype) -> None:
    options = {"context": 0.3, "position": 0.2}
    expected = HashedWords(8, 4, **options)(CAPTIONS)
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")  # "cuda", that is; meta tensors have no values to be right by
    try:
        words = HashedWords(8, 4, **options)
        text, vector = words(CAPTIONS), words.vector("seven")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert vector.dtype == torch.float32
    assert torch.equal(text.words, expected.words)
    assert torch.equal(text.word_mask, expected.word_mask)


def test_a_batch_without_images_may_have_ids() -> None:
    assert sample_captions([], 2, ids=[]) == []
    assert HashedWords(8, 4)([], 2, ids=[], step=3).words.shape == (0, 2, 4, 8)


def test_vectors_of_words_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [[[f"{batch} is {word}" for word in range(40)]] for batch in range(9)]
    expected = [HashedWords(8, 3)(batch).words for batch in batches]
    monkeypatch.setattr("jepa_fast.data.text._NUMBERS_KEPT", 8 * 64)
    words = HashedWords(8, 3)
    rows = []
    for batch, want in zip(batches, expected, strict=True):
        assert torch.equal(words(batch).words, want)
        rows.append(len(words._table))
    assert max(rows) <= 128
    # No batch loses the words that it has begun with.
    together = words([[caption for batch in batches for caption in batch[0]]])
    assert torch.equal(together.words[0], torch.cat([want[0] for want in expected]))
