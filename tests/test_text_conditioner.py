"""The text conditioner of TC-JEPA and the caption-level baselines."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import device_mesh

from jepa_fast.nn import per_caption
from jepa_fast.nn.text_conditioner import (
    CONDITIONERS,
    AdaLNConditioner,
    Captions,
    FeatureConditioner,
    MeanWordConditioner,
    WordAppender,
    WordConditioner,
)
from jepa_fast.perf.memory import peak_allocation

BATCH, BLOCKS, TOKENS, DIM, DEPTH = 3, 2, 4, 8, 2
CAPTIONS, WORDS, TEXT_DIM = 3, 5, 6
WORD_MASK = torch.ones(BATCH, CAPTIONS, WORDS, dtype=torch.bool)
WORD_MASK[:, 0, 3:] = False
WORD_MASK[1, 1] = False  # a caption without words
CAPTION_MASK = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])


def captions() -> Captions:
    words = torch.randn(
        BATCH, CAPTIONS, WORDS, TEXT_DIM, generator=torch.Generator().manual_seed(1)
    )
    return Captions.of(words, WORD_MASK, CAPTION_MASK, images=BATCH, text_dim=TEXT_DIM)


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(BLOCKS * BATCH, TOKENS, DIM, generator=generator)


def build(name: str = "words", **options: Any) -> Any:
    torch.manual_seed(0)
    conditioner = CONDITIONERS[name](DIM, DEPTH, TEXT_DIM, **options)
    for p in conditioner.parameters():  # as if trained
        nn.init.normal_(p, std=0.4)
    return conditioner


def run(conditioner: nn.Module, text: Captions, x: Tensor) -> tuple[Tensor, Any]:
    conditioning = conditioner(text)
    for layer in range(DEPTH):
        x = conditioning(layer, x)
    return x, conditioning


def oracle(conditioner: WordConditioner, text: Captions, x: Tensor) -> Tensor:
    """The paper's equations, one row, token, caption and head at a time, in float64."""
    weights = {name: w.detach().double() for name, w in conditioner.state_dict().items()}
    heads, head_dim = conditioner.num_heads, DIM // conditioner.num_heads
    scale = head_dim**-0.5 if conditioner.scale is None else conditioner.scale
    x = x.double()
    for layer in range(DEPTH):
        w = {n.split(".", 2)[2]: v for n, v in weights.items() if n.startswith(f"layers.{layer}.")}
        w_k, w_v = weights["keys_values.weight"].split(DIM)[2 * layer : 2 * layer + 2]

        def transform(y: Tensor, w: dict[str, Tensor] = w) -> Tensor:
            hidden = nn.functional.gelu(w["mlp.fc1.weight"] @ y + w["mlp.fc1.bias"])
            out = w["mlp.fc2.weight"] @ hidden + w["mlp.fc2.bias"]
            out = out + y if conditioner.layers[0].mlp_residual else out
            out = (out - out.mean()) / (out.var(correction=0) + 1e-6).sqrt()
            return out * w["norm.weight"] + w["norm.bias"]

        rows = []
        for r, t in torch.cartesian_prod(torch.arange(len(x)), torch.arange(TOKENS)).tolist():
            q, of_captions = w["query.weight"] @ x[r, t], []
            for n in range(CAPTIONS):
                there = text.words[r % BATCH, n][text.word_mask[r % BATCH, n]].double()
                if not len(there):
                    continue
                k, v, y = there @ w_k.T, there @ w_v.T, x[r, t].clone()
                for h in range(heads):
                    e = slice(h * head_dim, (h + 1) * head_dim)
                    y[e] += (scale * k[:, e] @ q[e]).softmax(0) @ v[:, e]
                of_captions.append(y)
            of_captions = of_captions or [x[r, t]]
            if conditioner.per_caption:
                of_captions = [transform(y) for y in of_captions]
            stack = torch.stack(of_captions)
            if conditioner.pool == "max":
                y = stack.amax(0)
            elif conditioner.pool == "mean":
                y = stack.mean(0)
            else:
                y = (stack @ w["pool_query"]).softmax(0) @ stack
            rows.append(y if conditioner.per_caption else transform(y))
        x = torch.stack(rows).view(x.shape)
    return x


@pytest.mark.parametrize("pool", ["max", "mean", "attention"])
@pytest.mark.parametrize(("per_caption", "at_once"), [(False, 0), (True, 0), (True, 2**30)])
@pytest.mark.parametrize(
    "more", [{}, {"num_heads": 2, "scale": 1.0, "mlp_residual": True, "mlp_ratio": 1.5}], ids=str
)
def test_values(
    pool: str,
    per_caption: bool,
    at_once: int,
    more: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jepa_fast.nn.per_caption.AT_ONCE", at_once)
    conditioner = build(pool=pool, per_caption=per_caption, **more)
    x, _ = run(conditioner, captions(), tokens())
    torch.testing.assert_close(
        x.double(), oracle(conditioner, captions(), tokens()), rtol=1e-4, atol=1e-5
    )


def test_keys_and_values_of_all_layers_are_one_projection_of_the_words() -> None:
    conditioner = build()
    calls = []
    conditioner.keys_values.register_forward_hook(lambda *_: calls.append(1))
    _, conditioning = run(conditioner, captions(), tokens())
    assert len(calls) == 1
    assert len(conditioning.keys) == len(conditioning.values) == DEPTH
    # One copy an image, whatever the number of sequences.
    assert conditioning.keys[0].shape == (BATCH, CAPTIONS, WORDS, DIM)


def test_text_attention_after_some_blocks_only() -> None:
    whole, last = build(), build(after=[1])
    of_last = {
        name.replace("layers.1.", "layers.0."): value
        for name, value in whole.state_dict().items()
        if not name.startswith("layers.0.")
    }
    of_last["keys_values.weight"] = of_last["keys_values.weight"][2 * DIM :]
    last.load_state_dict(of_last)
    text, x = captions(), tokens()
    of_both, of_one = whole(text), last(text)
    assert of_one(0, x) is x
    torch.testing.assert_close(of_one(1, x), of_both(1, x))
    assert len(of_one.queries) == 1
    torch.testing.assert_close(of_one.sparsity(), of_both.sparsity())


@pytest.mark.parametrize("after", [[], [2], [-1], [0, 0]], ids=str)
def test_blocks_that_text_attention_cannot_follow(after: list[int]) -> None:
    with pytest.raises(ValueError, match=r"after: expected different blocks from 0 to 1, .* got"):
        build(after=after)


def test_regularisers_are_means_over_layers() -> None:
    from jepa_fast import ops

    conditioner = build(num_heads=2, similarity="softplus", tau=0.3)
    token_mask = torch.arange(BLOCKS * BATCH * TOKENS).view(-1, TOKENS) % 3 != 0
    conditioning = conditioner(captions(), token_mask)
    x, sparsities, queries = tokens(), [], []
    for layer in range(DEPTH):
        queries.append(conditioner.layers[layer].query(x))
        options = {"num_heads": 2, "similarity": "softplus", "tau": 0.3, "token_mask": token_mask}
        keys, values = conditioning.keys[layer], conditioning.values[layer]
        mask = conditioning.word_mask
        sparsities.append(
            ops.text_cross_attention(queries[-1], keys, values, x, mask, **options)[1]
        )
        x = conditioning(layer, x)
    torch.testing.assert_close(conditioning.sparsity(), sum(sparsities) / DEPTH)
    expected = ops.patch_word_consistency(queries, conditioning.keys, mask, **options)
    torch.testing.assert_close(conditioning.consistency(), expected)
    assert conditioning.sparsity() > 0
    assert conditioning.consistency() > 0
    assert conditioning.similarity_map().shape == (BLOCKS * BATCH, CAPTIONS, TOKENS, WORDS)


def test_blocks_may_be_called_in_any_order() -> None:
    conditioner, inputs = build(), (tokens(), tokens().flip(1))
    found = []
    for order in ((0, 1), (1, 0), (1, 0, 1)):
        conditioning = conditioner(captions())
        for layer in order:
            conditioning(layer, inputs[layer])
        found.append(
            [
                conditioning.sparsity(),
                conditioning.consistency(),
                conditioning.similarity_map(),
                *conditioning.statistics(2),
            ]
        )
    for want, *others in zip(*found, strict=True):
        for got in others:
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["sparsity", "consistency", "similarity_map", "statistics"])
def test_what_is_over_layers_needs_some(name: str) -> None:
    arguments = (2,) if name == "statistics" else ()
    with pytest.raises(ValueError, match=f"{name}: expected layers that have been called, got"):
        getattr(build()(captions()), name)(*arguments)


def test_statistics_of_the_first_images() -> None:
    conditioner = build()
    _, conditioning = run(conditioner, captions(), tokens())
    few, first = (
        conditioning.statistics(1),
        Captions(captions().words[:1], captions().word_mask[:1]),
    )
    _, alone = run(conditioner, first, tokens()[:1])
    for got, want in zip(few, alone.statistics(100), strict=True):
        torch.testing.assert_close(got, want)
    assert all(0 < float(x) < 1 for x in few)


def test_statistics_take_the_memory_of_a_layer_and_of_the_images_asked_for() -> None:
    def peak(depth: int, images: int, blocks: int) -> int:
        conditioning = WordConditioner(16, depth, TEXT_DIM)(
            Captions.of(torch.randn(images, 8, 32, TEXT_DIM), images=images, text_dim=TEXT_DIM)
        )
        for layer in range(depth):
            conditioning(layer, torch.randn(blocks * images, 64, 16))
        conditioning.statistics(2)
        return peak_allocation(lambda: conditioning.statistics(2))

    few = peak(1, 2, 1)
    assert few > 2 * 64 * 2 * 32 * 4  # the scores of two images and two captions
    assert peak(5, 2, 1) < 1.01 * few
    assert peak(1, 12, 3) == few


@pytest.mark.parametrize("name", CONDITIONERS)
@pytest.mark.parametrize("options", [{}, {"pool": "attention", "per_caption": True}], ids=str)
def test_padding_words_do_not_matter(name: str, options: dict[str, Any]) -> None:
    if options and name not in ("words", "mean_words"):
        options = {}
    conditioner, text = build(name, **options), captions()
    other = Captions(text.words.masked_fill(~text.word_mask[..., None], 50.0), text.word_mask)
    got, conditioning = run(conditioner, other, tokens())
    want, expected = run(conditioner, text, tokens())
    torch.testing.assert_close(got, want)
    if name in ("words", "mean_words"):
        torch.testing.assert_close(conditioning.sparsity(), expected.sparsity())
        torch.testing.assert_close(conditioning.consistency(), expected.consistency())


@pytest.mark.parametrize("name", ["words", "mean_words", "adaln", "feature"])
@pytest.mark.parametrize("pool", ["max", "mean", "attention"])
def test_caption_order_does_not_matter(name: str, pool: str) -> None:
    conditioner = build(name, **({"pool": pool} if "words" in name else {}))
    text, order = captions(), torch.tensor([2, 0, 1])
    permuted = Captions(text.words[:, order], text.word_mask[:, order])
    torch.testing.assert_close(
        run(conditioner, permuted, tokens())[0], run(conditioner, text, tokens())[0]
    )


@pytest.mark.parametrize("name", CONDITIONERS)
def test_text_matters_and_only_that_of_the_same_image(name: str) -> None:
    conditioner, text = build(name), captions()
    changed = text.words.clone()
    changed[0, 0, 0] += 1
    one, first = run(conditioner, text, tokens())
    two, second = run(conditioner, Captions(changed, text.word_mask), tokens())
    if name == "append":
        one, two = first.appended[0].repeat(BLOCKS, 1, 1), second.appended[0].repeat(BLOCKS, 1, 1)
    differs = (one != two).flatten(1).any(1).view(BLOCKS, BATCH)
    assert differs.tolist() == [[True, False, False]] * BLOCKS


def test_mean_words_attend_to_captions() -> None:
    """The same as captions of one word each, all in one caption."""
    conditioner, text = build("mean_words"), captions()
    vectors = torch.zeros(BATCH, CAPTIONS, TEXT_DIM)
    for b, n in torch.cartesian_prod(torch.arange(BATCH), torch.arange(CAPTIONS)).tolist():
        there = text.words[b, n][text.word_mask[b, n]]
        vectors[b, n] = there.mean(0) if len(there) else 0
    one_caption = Captions(vectors[:, None], text.word_mask.any(2)[:, None])
    expected = WordConditioner(DIM, DEPTH, TEXT_DIM)
    expected.load_state_dict(conditioner.state_dict())
    assert isinstance(conditioner, MeanWordConditioner)
    torch.testing.assert_close(
        run(conditioner, text, tokens())[0], run(expected, one_caption, tokens())[0]
    )


def _image_vectors(text: Captions) -> Tensor:
    """Means over captions of means over words, by hand."""
    vectors = torch.zeros(BATCH, TEXT_DIM)
    for b in range(BATCH):
        of_captions = [
            text.words[b, n][text.word_mask[b, n]].mean(0)
            for n in range(CAPTIONS)
            if text.word_mask[b, n].any()
        ]
        if of_captions:
            vectors[b] = torch.stack(of_captions).mean(0)
    return vectors.repeat(BLOCKS, 1)[:, None]


def test_adaln() -> None:
    conditioner, text, x = build("adaln"), captions(), tokens()
    assert isinstance(conditioner, AdaLNConditioner)
    vectors = _image_vectors(text)
    got = run(conditioner, text, x)[0]
    for layer in range(DEPTH):
        rows = slice(2 * layer * DIM, 2 * (layer + 1) * DIM)
        linear = conditioner.modulation
        shift, scale = (vectors @ linear.weight[rows].T + linear.bias[rows]).chunk(2, -1)
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)
    fresh = AdaLNConditioner(DIM, DEPTH, TEXT_DIM)(text)
    plain = nn.functional.layer_norm(x, (DIM,), eps=1e-6)
    torch.testing.assert_close(fresh(0, x), plain)


def test_feature() -> None:
    conditioner, text, x = build("feature"), captions(), tokens()
    assert isinstance(conditioner, FeatureConditioner)
    caption = conditioner.caption(_image_vectors(text)).expand(x.shape)
    got = run(conditioner, text, x)[0]
    for linear in conditioner.layers:
        x = x + linear(torch.cat([x, caption], -1))
    torch.testing.assert_close(got, x)


def test_append() -> None:
    conditioner, text = build("append"), captions()
    assert isinstance(conditioner, WordAppender)
    x, conditioning = run(conditioner, text, tokens())
    assert torch.equal(x, tokens())
    words, exist = conditioning.appended
    assert words.shape == (BATCH, CAPTIONS * WORDS, DIM)
    assert torch.equal(exist, text.word_mask.flatten(1))
    torch.testing.assert_close(words[1, WORDS + 2], conditioner.embed(text.words[1, 1, 2]))


def test_fresh_attention_is_not_uniform() -> None:
    """Nor are the fresh similarities dead, at the width of a small predictor."""
    torch.manual_seed(0)
    conditioner = WordConditioner(96, 1, 64)
    text = Captions.of(torch.randn(2, 4, 12, 64), images=2, text_dim=64)
    conditioning = conditioner(text)
    conditioning(0, torch.randn(4, 9, 96))
    positive, entropy = conditioning.statistics(2)
    assert 0.4 < float(positive) < 0.6
    assert 0.5 < float(entropy) < 0.95
    for images in (0, -1):
        with pytest.raises(ValueError, match=f"images: expected at least 1, got {images}"):
            conditioning.statistics(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "median"}, "pool: expected one of .*got 'median'"),
        ({"num_heads": 3}, "num_heads: expected a positive divisor of dim 8, got 3"),
        ({"similarity": "tanh"}, "similarity: expected one of .*got 'tanh'"),
        ({"tau": 0.0}, "tau: expected a positive number that is finite, got 0.0"),
        ({"scale": -1}, "scale: expected a positive number that is finite, got -1"),
        ({"scale": math.nan}, "scale: expected a positive number that is finite, got nan"),
        ({"mlp_ratio": 0.1}, "mlp_ratio: expected at least 1 / dim, 1 / 8, got 0.1"),
        ({"mlp_ratio": 0}, "mlp_ratio: expected a positive number"),
        ({"after": []}, "after: expected different blocks from 0 to 1, at least one, got"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WordConditioner(DIM, DEPTH, TEXT_DIM, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 2.0}, "num_heads: expected an integer, got 2.0"),
        ({"scale": "1"}, "scale: expected a positive number, got '1'"),
        ({"scale": torch.tensor(1.0)}, "scale: expected a positive number, got tensor"),
        ({"tau": None}, "tau: expected a positive number, got None"),
        ({"mlp_ratio": "4"}, "mlp_ratio: expected a positive number, got '4'"),
        ({"per_caption": "no"}, "per_caption: expected True or False, got 'no'"),
        ({"mlp_residual": 1}, "mlp_residual: expected True or False, got 1"),
        ({"after": 1}, r"after: expected a list of blocks, got 1; for one block pass \[1\]"),
        ({"after": ["1"]}, "after: expected a list of integers"),
    ],
)
def test_option_types(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        WordConditioner(DIM, DEPTH, TEXT_DIM, **options)


@pytest.mark.parametrize("per_caption", [False, True])
@pytest.mark.parametrize(
    ("made", "later", "message"),
    [
        ("max", "median", "pool: expected one of .*got 'median'"),
        ("max", "none", "pool: expected one of .*got 'none'"),
        ("max", "attention", "pool: expected 'max' or 'mean', got 'attention'; .*constructor"),
        ("attention", "mean", "pool: expected 'attention', got 'mean'; .*constructor"),
    ],
)
def test_pools_that_are_set_later(made: str, later: str, message: str, per_caption: bool) -> None:
    """They became other pools without a word."""
    conditioner = WordConditioner(DIM, DEPTH, TEXT_DIM, pool=made, per_caption=per_caption)
    conditioner.pool = later
    with pytest.raises(ValueError, match=message):
        conditioner(captions())


@pytest.mark.parametrize("shape", [(2, 3, DIM + 1), (3, DIM)])
def test_tokens_of_another_shape(shape: tuple[int, ...]) -> None:
    conditioning = WordConditioner(DIM, DEPTH, TEXT_DIM)(captions())
    with pytest.raises(ValueError, match=rf"tokens: expected \[R, T, {DIM}\], got \[{shape[0]}"):
        conditioning(0, torch.ones(shape))


def test_a_reading_that_is_set_later() -> None:
    conditioner = WordConditioner(DIM, DEPTH, TEXT_DIM)
    conditioner.per_caption = "no"
    with pytest.raises(TypeError, match="per_caption: expected True or False, got 'no'"):
        conditioner(captions())


@pytest.mark.parametrize("name", sorted(CONDITIONERS))
def test_words_have_a_width(name: str) -> None:
    with pytest.raises(ValueError, match="text_dim: expected at least 1, got 0"):
        CONDITIONERS[name](DIM, DEPTH, 0)
    with pytest.raises(TypeError, match=r"text_dim: expected an integer, got 6\.0"):
        CONDITIONERS[name](DIM, DEPTH, 6.0)


@pytest.mark.parametrize(
    "shape", [(3, 3, 4, 5), (2, 3, 4, 6), (2, 0, 4, 5), (2, 3, 0, 5), (2, 4, 5)]
)
def test_word_shape_errors(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"words: expected \[2, C, S, 5\].*got \[" + str(shape[0])):
        Captions.of(torch.zeros(shape), images=2, text_dim=5)


def test_word_shape_errors_say_how_to_make_pooled_texts_fit() -> None:
    words = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"got \[2, 5\]; .* pass words\[:, None, None\]"):
        Captions.of(words, images=2, text_dim=5)
    Captions.of(words[:, None, None], images=2, text_dim=5)
    words = torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match=r"got \[2, 4, 5\]; .* pass words\[:, None\]"):
        Captions.of(words, images=2, text_dim=5)
    Captions.of(words[:, None], images=2, text_dim=5)


def test_captions_that_no_encoder_has_seen() -> None:
    with pytest.raises(TypeError, match=r"words: expected a tensor \[2, C, S, 5\], got list"):
        Captions.of([["a dog"], ["two cats"]], images=2, text_dim=5)


def test_mask_errors() -> None:
    words, sizes = torch.zeros(2, 3, 4, 5), {"images": 2, "text_dim": 5}
    with pytest.raises(TypeError, match=r"word_mask: expected bool, got torch.float32; use .bool"):
        Captions.of(words, torch.ones(2, 3, 4), **sizes)
    with pytest.raises(ValueError, match=r"caption_mask: expected \[2, 3\], got \[2, 4\]"):
        Captions.of(words, None, torch.ones(2, 4, dtype=torch.bool), **sizes)


# FSDP


@pytest.mark.parametrize("at_once", [0, 2**21], ids=["chunks", "at once"])
@pytest.mark.parametrize(
    "options", [{}, {"pool": "attention"}, {"per_caption": True}], ids=lambda o: str(o) or "plain"
)
def test_layers_may_be_units_of_fsdp(
    options: dict[str, Any], at_once: int, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setattr(per_caption, "AT_ONCE", at_once)
    whole, conditioner = build(**options), build(**options)
    mesh = device_mesh.init_device_mesh("cpu", (1,))
    for unit in (*conditioner.layers, conditioner.keys_values):
        fully_shard(unit, mesh=mesh)
    for each in (whole, conditioner):
        out, conditioning = run(each, captions(), tokens())
        (out.square().sum() + conditioning.sparsity() + conditioning.consistency()).backward()
    grads = zip(whole.parameters(), conditioner.parameters(), strict=True)
    assert all(torch.equal(p.grad, sharded.grad.full_tensor()) for p, sharded in grads)
