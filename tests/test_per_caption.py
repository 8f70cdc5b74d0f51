"""The per-caption reading in chunks, against the same with all captions at once."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_accurate
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_fast import ops
from jepa_fast.nn import per_caption
from jepa_fast.nn.attention import Mlp
from jepa_fast.nn.per_caption import pool_per_caption
from jepa_fast.nn.text_conditioner import Captions, WordConditioner
from jepa_fast.perf.memory import peak_allocation

IMAGES, BLOCKS, TOKENS, CAPTIONS, WORDS, DIM = 3, 2, 4, 5, 3, 8
ROWS = IMAGES * BLOCKS * TOKENS
WORD_MASK = torch.ones(IMAGES, CAPTIONS, WORDS, dtype=torch.bool)
WORD_MASK[:, 1, 2:] = False
WORD_MASK[0, 0] = WORD_MASK[0, 3] = False  # captions without words, the first one, too
WORD_MASK[2] = False  # an image without captions
TOKEN_MASK = torch.arange(BLOCKS * IMAGES * TOKENS).view(-1, TOKENS) % 3 != 0
OPTIONS: dict[str, Any] = {
    "mlp_residual": False,
    "num_heads": 1,
    "scale": None,
    "pool": "max",
    "similarity": "relu",
    "tau": 0.1,
}
each_pool = pytest.mark.parametrize("pool", ["max", "mean", "attention"])
# One caption at a time, three and two (or one, for a tenth of a row), and all.
each_chunk = pytest.mark.parametrize("captions_at_once", [0.1, 1, 3, 100])


class Layer(nn.Module):
    """The inputs of the function, as parameters, so that all have a gradient."""

    def __init__(self, dim: int = DIM, pool: str = "max", rows: int = BLOCKS * IMAGES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        images = rows // BLOCKS
        self.query, self.tokens = normal(rows, TOKENS, dim), normal(rows, TOKENS, dim)
        self.keys, self.values = (normal(images, CAPTIONS, WORDS, dim) for _ in range(2))
        self.mlp, self.norm = Mlp(dim, 2 * dim), nn.LayerNorm(dim, eps=1e-6)
        self.pool_query = normal(dim) if pool == "attention" else None
        for p in (*self.mlp.parameters(), *self.norm.parameters()):
            nn.init.normal_(p, std=0.5, generator=generator)

    def forward(
        self, way: Any, word_mask: Tensor = WORD_MASK, token_mask: Tensor | None = TOKEN_MASK,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return way(
            self.query, self.keys, self.values, self.tokens, word_mask, token_mask,
            self.mlp, self.norm, self.pool_query, **{**OPTIONS, **options},
        )  # fmt: skip


def at_once(
    query: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, word_mask: Tensor,
    token_mask: Tensor | None, mlp: Mlp, norm: nn.LayerNorm, pool_query: Tensor | None,
    *, mlp_residual: bool, pool: str, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every y_n, then every MLP, then the pool: what autograd keeps is all of it."""
    y, sparsity = ops.text_cross_attention(
        query, keys, values, tokens, word_mask, pool="none", token_mask=token_mask, **options
    )
    z = norm(y + mlp(y) if mlp_residual else mlp(y))
    present = word_mask.any(2)
    present = present | ~present.any(1, keepdim=True)
    present = present.repeat(len(query) // len(keys), 1)[:, :, None, None]
    if pool == "max":
        return z.masked_fill(~present, -torch.inf).amax(1), sparsity
    if pool_query is None:
        weights = present.to(z.dtype) / present.sum(1, keepdim=True)
    else:
        scores = (z * pool_query).sum(-1, keepdim=True)
        weights = scores.masked_fill(~present, -torch.inf).softmax(1)
    return (z * weights.to(z.dtype)).sum(1), sparsity


def results(layer: Layer, way: Any, **options: Any) -> list[Tensor]:
    """Values, then gradients of all inputs and weights."""
    pooled, sparsity = layer(way, **options)
    upstream = torch.linspace(-1, 1, pooled.numel()).view_as(pooled).sin().to(pooled.dtype)
    grads = torch.autograd.grad(
        [pooled, sparsity], list(layer.parameters()), [upstream, torch.full_like(sparsity, 3.0)]
    )
    return [pooled.detach(), sparsity.detach(), *grads]


@pytest.fixture
def chunk(monkeypatch: pytest.MonkeyPatch) -> Any:
    def of(captions: float) -> None:
        monkeypatch.setitem(per_caption.CHUNK_ROWS, "cpu", int(captions * ROWS))

    return of


@each_pool
@each_chunk
@pytest.mark.parametrize("num_heads", [1, 4])  # by words, and with y_n: 3 and 12 of 8 numbers
@pytest.mark.parametrize("mlp_residual", [False, True])
def test_values_and_gradients(
    pool: str, captions_at_once: float, num_heads: int, mlp_residual: bool, chunk: Any
) -> None:
    chunk(captions_at_once)
    options = {"pool": pool, "num_heads": num_heads, "mlp_residual": mlp_residual}
    layer = Layer(pool=pool).double()
    for got, want in zip(
        results(layer, pool_per_caption, **options), results(layer, at_once, **options), strict=True
    ):
        assert got.dtype == want.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"similarity": "softplus", "tau": 0.5, "scale": 1.0},
        {"token_mask": None},
        {"word_mask": torch.ones_like(WORD_MASK)},
        {"word_mask": torch.zeros_like(WORD_MASK)},
    ],
    ids=["softplus", "all tokens", "all words", "no words"],
)
def test_options(options: dict[str, Any], chunk: Any) -> None:
    chunk(2)
    layer = Layer().double()
    for got, want in zip(
        results(layer, pool_per_caption, **options), results(layer, at_once, **options), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@each_pool
def test_gradcheck(pool: str, chunk: Any) -> None:
    chunk(2)
    layer = Layer(4, pool).double()
    names = [name for name, _ in layer.named_parameters()]

    def function(*values: Tensor) -> Any:
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, named, (pool_per_caption,), {"pool": pool})

    values = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(function, values)


def test_of_equal_captions_the_lowest_that_is_there_wins(chunk: Any) -> None:
    chunk(2)
    layer = Layer()
    with torch.no_grad():
        for words in (layer.keys, layer.values):
            words.copy_(words[:, :1].expand_as(words))
    mask = torch.ones_like(WORD_MASK)
    mask[0, :2] = False
    pooled, _ = layer(pool_per_caption, word_mask=mask)
    (to_values,) = torch.autograd.grad(pooled.square().sum(), [layer.values])
    assert to_values.flatten(2).any(2).tolist() == [
        [False, False, True, False, False],
        [True, False, False, False, False],
        [True, False, False, False, False],
    ]


def test_captions_that_are_not_there_never_win() -> None:
    """Though LayerNorm's output of the tokens alone would, with values that pull others down."""
    layer = Layer()
    with torch.no_grad():
        layer.norm.bias.fill_(-50.0)
    layer(pool_per_caption)[0].sum().backward()
    assert layer.values.grad is not None
    assert not layer.values.grad[~WORD_MASK].any()
    assert layer.values.grad[WORD_MASK].any(1).sum() > 5
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@each_pool
def test_autocast(pool: str, chunk: Any) -> None:
    chunk(2)
    layer = Layer(pool=pool)
    exact = results(copy.deepcopy(layer).double(), at_once, pool=pool)

    def under(way: Any) -> Any:
        # As from the projections: query, keys and values are in autocast's dtype.
        def narrow(query: Tensor, keys: Tensor, values: Tensor, *rest: Any, **options: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                halved = (x.bfloat16() for x in (query, keys, values))
                return way(*halved, *rest, **options)

        return narrow

    got = results(layer, under(pool_per_caption), pool=pool)
    want = results(layer, under(at_once), pool=pool)
    assert got[0].dtype == want[0].dtype == torch.bfloat16
    assert got[1].dtype == want[1].dtype == torch.float32
    for name, ours, eager, true in zip(
        ["pooled", "sparsity", *dict(layer.named_parameters())], got, want, exact, strict=True
    ):
        assert ours.dtype == eager.dtype, name
        error, bound = ((x.double() - true).norm() for x in (ours, eager))
        # A maximum of rounded numbers may be another caption's; all else as exact as eager.
        assert error <= 1.5 * bound + 1e-2 * true.norm(), (name, error, bound, true.norm())


def test_a_caption_alone_has_all_the_weight_under_autocast() -> None:
    """Whatever its score is, so that nothing is learned of scores from it."""
    layer = Layer(pool="attention")
    alone = WORD_MASK.clone()
    alone[:, 1:] = False  # and images without captions
    with torch.autocast("cpu", torch.bfloat16):
        pooled, _ = layer(pool_per_caption, alone, pool="attention")
    (grad,) = torch.autograd.grad(pooled.float().sin().sum(), [layer.pool_query])
    assert not grad.any()


def test_autocast_of_the_backward_pass_does_not_matter() -> None:
    layer = Layer()
    outside = results(layer, pool_per_caption)
    pooled, sparsity = layer(pool_per_caption)
    upstream = torch.linspace(-1, 1, pooled.numel()).view_as(pooled).sin()
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(
            [pooled, sparsity], list(layer.parameters()), [upstream, torch.tensor(3.0)]
        )
    assert all(map(torch.equal, inside, outside[2:]))


def test_float32_is_as_accurate_as_all_at_once(chunk: Any) -> None:
    chunk(1)
    layer = Layer(pool="attention")
    exact = results(copy.deepcopy(layer).double(), at_once, pool="attention")
    eager = results(layer, at_once, pool="attention")
    for ours, theirs, true in zip(
        results(layer, pool_per_caption, pool="attention"), eager, exact, strict=True
    ):
        assert ours.dtype == theirs.dtype == torch.float32
        assert (ours - true).abs().max() <= 4 * (
            theirs - true
        ).abs().max() + 1e-6 * true.abs().max()
    assert_as_accurate(layer(pool_per_caption, pool="attention")[0], eager[0], exact[0])


@each_pool
def test_results_repeat_bit_for_bit(pool: str) -> None:
    layer = Layer(pool=pool)
    once, again = (results(layer, pool_per_caption, pool=pool) for _ in range(2))
    assert all(map(torch.equal, once, again))


# Memory


def conditioned(
    pool: str = "max", captions: int = 8, words: int = 16, rows: int = 8
) -> tuple[Any, Tensor, Captions]:
    """A conditioner of width 64 with an MLP four times as wide, and rows of 32 tokens."""
    torch.manual_seed(0)
    conditioner = WordConditioner(64, 1, 48, per_caption=True, pool=pool)
    text = Captions.of(torch.randn(2, captions, words, 48), images=2, text_dim=48)
    return conditioner, torch.randn(rows, 32, 64, requires_grad=True), text


@each_pool
def test_a_twentieth_of_the_memory_is_saved_for_the_backward_pass(
    pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {}
    for way in (pool_per_caption, at_once):
        monkeypatch.setattr("jepa_fast.nn.text_conditioner.pool_per_caption", way)
        conditioner, tokens, text = conditioned(pool, rows=100)
        conditioning = conditioner(text)
        storages: dict[int, int] = {}

        def pack(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            out = conditioning(0, tokens)
        # What is there anyway: the tokens, and the weights.
        for there in (tokens, *conditioner.parameters(), *conditioning.keys, *conditioning.values):
            storages.pop(there.untyped_storage().data_ptr(), None)
        saved[way] = sum(storages.values())
        out.sum().backward()
    assert 0 < saved[pool_per_caption] <= saved[at_once] / 20


def test_few_tokens_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same results, of equal captions, too; from 2 MiB on in chunks."""
    calls = []

    def recorded(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return pool_per_caption(*arguments, **options)

    monkeypatch.setattr("jepa_fast.nn.text_conditioner.pool_per_caption", recorded)
    for pool in ("max", "mean", "attention"):
        conditioner, tokens, text = conditioned(pool)
        # In float64, as sums over tokens nearly cancel.
        conditioner, tokens = conditioner.double(), tokens.detach().double().requires_grad_()
        same = Captions(text.words[:, [0, 0, 2, 2, 0]].double(), text.word_mask[:, :5])
        found = []
        for limit in (2**26, 0):
            monkeypatch.setattr(per_caption, "AT_ONCE", limit)
            conditioning = conditioner(same)
            out = conditioning(0, tokens)
            loss = out.square().sum() + conditioning.sparsity()
            inputs = [tokens, *conditioning.keys, *conditioning.values]
            inputs += [p for p in conditioner.parameters() if p.requires_grad]
            found.append([out, *torch.autograd.grad(loss, inputs)])
            assert len(calls) == (limit == 0)
        calls.clear()
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    monkeypatch.undo()
    # 8 captions of 704 numbers in four bytes: 94 tokens are the first that are too many.
    mlp = conditioner.layers[0].mlp
    assert not per_caption.is_worthwhile(torch.empty(1, 93, 64), 8, mlp)
    assert per_caption.is_worthwhile(torch.empty(1, 94, 64), 8, mlp)


@pytest.mark.parametrize("limit", [0, 2**40], ids=["chunks", "at once"])
@pytest.mark.parametrize("caption", [0, 1, 7])
@each_pool
def test_nan_of_a_caption_is_seen(
    pool: str, caption: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_caption, "AT_ONCE", limit)
    conditioner, tokens, text = conditioned(pool)
    text.words[0, caption] = math.nan
    out = conditioner(text)(0, tokens)
    assert bool(out[::2].isnan().all())
    assert not out[1::2].isnan().any()


@each_chunk
def test_nan_of_a_token_that_does_not_count_stays_out_of_the_sparsity(
    captions_at_once: float, chunk: Any
) -> None:
    chunk(captions_at_once)
    layer = Layer()
    token = tuple((~TOKEN_MASK).nonzero()[0].tolist())
    want, sparsity = layer(pool_per_caption)
    layer.query.data[token] = math.nan
    pooled, got = layer(pool_per_caption)
    assert torch.equal(got, sparsity)
    assert bool(pooled[token].isnan().all())
    pooled[token] = want[token]
    assert torch.equal(pooled, want)


@pytest.mark.parametrize("limit", [0, 2**40], ids=["chunks", "at once"])
def test_captions_that_are_not_there_have_no_score(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However high it would be."""
    monkeypatch.setattr(per_caption, "AT_ONCE", limit)
    conditioner, tokens, text = conditioned("attention", captions=2)
    nn.init.normal_(conditioner.layers[0].pool_query, std=100.0)
    for absent in (0, 1):
        word_mask = text.word_mask.clone()
        word_mask[:, absent] = False
        conditioning = conditioner(Captions(text.words, word_mask))
        out = conditioning(0, tokens)
        grads = torch.autograd.grad(out.square().sum(), [tokens, *conditioning.values])
        assert all(bool(grad.isfinite().all()) for grad in grads)


def test_peak_memory_is_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(captions: int, at_once: int) -> float:
        """Beyond what was there before, in hidden layers of one caption."""
        monkeypatch.setitem(per_caption.CHUNK_ROWS, "cpu", at_once * 8 * 32)
        monkeypatch.setattr(per_caption, "AT_ONCE", 0)
        conditioner, tokens, text = conditioned(captions=captions, words=2)
        conditioning = conditioner(text)

        def call() -> None:
            out = conditioning(0, tokens)
            torch.autograd.grad(out.sum(), [tokens], retain_graph=True)

        call()
        return peak_allocation(call) / (8 * 32 * 4 * 64 * 4)

    few = peak(4, 1)
    assert few < 12
    # Words are more with captions, chunks are not.
    assert peak(32, 1) < few + 1
    assert peak(32, 16) > 4 * few


# What else asks for gradients, or for none


def test_without_gradients() -> None:
    layer = Layer()
    want, sparsity = layer(pool_per_caption)
    with torch.no_grad():
        got, same = layer(pool_per_caption)
    assert not got.requires_grad
    assert torch.equal(got, want)
    assert torch.equal(same, sparsity)


def test_some_inputs_are_frozen() -> None:
    layer = Layer(pool="attention")
    want = dict(
        zip(
            dict(layer.named_parameters()),
            results(layer, pool_per_caption, pool="attention")[2:],
            strict=True,
        )
    )
    for frozen in ("mlp", "keys", "pool_query"):
        some = copy.deepcopy(layer)
        for name, p in some.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        pooled, sparsity = some(pool_per_caption, pool="attention")
        upstream = torch.linspace(-1, 1, pooled.numel()).view_as(pooled).sin()
        torch.autograd.backward([pooled, sparsity], [upstream, torch.tensor(3.0)])
        for name, p in some.named_parameters():
            if name.startswith(frozen):
                assert p.grad is None
            else:
                assert torch.equal(p.grad, want[name]), name


def test_gradients_may_be_taken_twice_and_once_only_each_way() -> None:
    layer = Layer()
    pooled, _ = layer(pool_per_caption)
    first, second = (
        torch.autograd.grad(pooled.sum(), [layer.values], retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    (slope,) = torch.autograd.grad(pooled.square().sum(), [layer.values], create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        slope.sum().backward()


def test_dtypes_that_do_not_fit() -> None:
    layer = Layer()
    layer.mlp.bfloat16()
    with pytest.raises(TypeError, match=r"tokens: expected .* torch.bfloat16, got torch.float32"):
        layer(pool_per_caption)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(5, TOKENS, DIM)}, ValueError, "query.shape.0. must be a multiple"),
        ({"query": torch.zeros(6, TOKENS, 4)}, ValueError, "query.shape.2. and keys.shape.3. must"),
        ({"query": torch.zeros(6, DIM)}, ValueError, r"query must be \[R, T, d\]"),
        ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
        ({"tokens": torch.zeros(6, 3, DIM)}, ValueError, "tokens must have the shape of query"),
        ({"tokens": torch.zeros(6, TOKENS, DIM).long()}, TypeError, "tokens must be of a floating"),
        ({"values": torch.zeros(3, 5, 4, DIM)}, ValueError, "values must have the shape of keys"),
        (
            {"values": torch.zeros(3, 5, 3, DIM).double()},
            TypeError,
            "query, keys and values must have one dtype",
        ),
        ({"word_mask": WORD_MASK[:1]}, ValueError, r"word_mask must have shape \[3, 5, 3\]"),
        ({"word_mask": None}, TypeError, "word_mask must be a tensor, got NoneType"),
        ({"token_mask": TOKEN_MASK[:, :1]}, ValueError, r"token_mask must have shape \[6, 4\]"),
        ({"token_mask": TOKEN_MASK.float()}, TypeError, "token_mask must be bool"),
        ({"mlp": Mlp(4, 8)}, ValueError, "mlp must be of the width 8 of query, got 4"),
        ({"norm": nn.LayerNorm(4)}, ValueError, "norm must be of the width 8 of query, got 4"),
        ({"pool": "median"}, ValueError, "pool must be one of"),
        ({"pool": "attention"}, TypeError, "pool_query must be a tensor for pool='attention'"),
        ({"pool_query": torch.zeros(8)}, ValueError, "pool_query must be None for pool='max'"),
        (
            {"pool": "attention", "pool_query": torch.zeros(4)},
            ValueError,
            r"pool_query must have shape \[8\], got \[4\]",
        ),
        ({"num_heads": 3}, ValueError, "num_heads must be a positive divisor of the width 8"),
        ({"scale": -1.0}, ValueError, "scale must be positive and finite, got -1.0"),
        ({"similarity": "tanh"}, ValueError, "similarity must be one of"),
        ({"tau": 0.0}, ValueError, "tau must be positive and finite, got 0.0"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = Layer()
    inputs = {name: getattr(layer, name) for name in ("query", "keys", "values", "tokens")}
    inputs |= {"word_mask": WORD_MASK, "token_mask": TOKEN_MASK, "pool_query": None}
    inputs |= {"mlp": layer.mlp, "norm": layer.norm, **OPTIONS, **changes}
    with pytest.raises(error, match=f"pool_per_caption: {message}"):
        pool_per_caption(**inputs)


def test_gradients_in_distributed_data_parallel(one_process: None) -> None:
    """Which reduces a parameter's gradient when it arrives, and waits for all to arrive."""
    layer = Layer()
    want = results(layer, pool_per_caption)[2:]
    parallel = nn.parallel.DistributedDataParallel(layer)
    pooled, sparsity = parallel(pool_per_caption)
    upstream = torch.linspace(-1, 1, pooled.numel()).view_as(pooled).sin()
    torch.autograd.backward([pooled, sparsity], [upstream, torch.tensor(3.0)])
    for p, grad in zip(layer.parameters(), want, strict=True):
        assert torch.equal(p.grad, grad)


# Compilation


@each_pool
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("halved", [False, True])
def test_compiles_without_a_break(pool: str, dynamic: bool, halved: bool) -> None:
    layer = Layer(pool=pool)

    def function(tokens: Tensor) -> tuple[Tensor, Tensor]:
        arguments = (tokens.sin(), layer.keys.sin(), layer.values, tokens)
        return pool_per_caption(
            *arguments, WORD_MASK, None, layer.mlp, layer.norm, layer.pool_query,
            **{**OPTIONS, "pool": pool},
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tokens in (layer.tokens, F.pad(layer.tokens.detach(), (0, 0, 0, 2), value=0.3))[
        : 1 + dynamic
    ]:
        tokens = tokens.detach().requires_grad_()
        inputs = [
            tokens,
            layer.keys,
            layer.values,
            *layer.mlp.parameters(),
            *layer.norm.parameters(),
        ]
        found = []
        for way in (compiled, function):
            with torch.autocast("cpu", torch.bfloat16, enabled=halved):
                pooled, sparsity = way(tokens)
            loss = pooled.square().sum() + sparsity
            found.append([pooled, sparsity, *torch.autograd.grad(loss, inputs)])
        for got, want in zip(*found, strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pool", ["max", "attention"])
@pytest.mark.parametrize("why", ["no_grad", "inference_mode", "frozen"])
def test_compiles_where_no_gradient_is_taken(pool: str, why: str) -> None:
    layer = Layer(pool=pool).requires_grad_(why != "frozen")
    around = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda: layer(pool_per_caption, pool=pool), backend="aot_eager", fullgraph=True
    )
    with around.get(why, nullcontext)():
        for got, want in zip(compiled(), layer(pool_per_caption, pool=pool), strict=True):
            assert not got.requires_grad
            torch.testing.assert_close(got, want)


@each_pool
def test_opcheck(pool: str) -> None:
    layer = Layer(pool=pool)
    calls = []
    operators = torch.ops.jepa_fast_nn
    names = ("pool_per_caption", "pool_per_caption_backward")

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in [getattr(operators, name).default for name in names]:
                calls.append((func, [x.detach() if isinstance(x, Tensor) else x for x in args]))
            return func(*args, **(kwargs or {}))

    with Calls():
        results(layer, pool_per_caption, pool=pool)
    assert len(calls) == 2
    for func, args in calls:
        torch.library.opcheck(func, tuple(args))
