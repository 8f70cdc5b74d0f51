"""The operators in plain PyTorch, as one writes them without this library, and races against them.

These are the `"eager"` of every benchmark and what goes under `torch.compile`. They take what the
public operators take (`backend` is ignored) and assume that it is valid and not empty. They go by
the papers and know nothing of the operators' own references.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_fast import ops
from jepa_fast.nn.linear import linear
from jepa_fast.ops._registry import OPERATORS
from jepa_fast.perf.race import Case, Cost, Race

# Gathers, tokens and loss of I-JEPA, arXiv 2301.08243.


def gather_patches(x: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """`torch.gather` with the index expanded over the width."""
    flat = index.flatten(1).long()
    taken = torch.gather(x, 1, flat[..., None].expand(-1, -1, x.shape[-1]))
    return taken.unflatten(1, index.shape[1:])


def gather_packed(rows: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """Advanced indexing."""
    return rows[index]


def assemble_predictor_tokens(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_index: Tensor,
    target_index: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Positions gathered for every image, contexts repeated for every block, all concatenated."""
    batch, _, width = context.shape
    if target_index.ndim == 2:
        target_index = target_index[:, None]
    positions = pos_embed.reshape(1, -1, width).expand(batch, -1, -1)
    seen = context + gather_patches(positions, context_index)
    hidden = mask_token.reshape(1, 1, 1, width) + gather_patches(positions, target_index)
    seen = seen.repeat(target_index.shape[1], 1, 1)
    return torch.cat([seen, hidden.transpose(0, 1).flatten(0, 1)], 1)


def latent_loss(
    prediction: Tensor,
    teacher: Tensor,
    target_index: Tensor,
    kind: str = "smooth_l1",
    normalize_target: bool = True,
    target_mask: Tensor | None = None,
    beta: float = 1.0,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm of the whole images, a gather, and a loss of `torch.nn.functional`."""
    if target_index.ndim == 2:
        target_index = target_index[:, None]
        target_mask = None if target_mask is None else target_mask[:, None]
    prediction, target = _widened(prediction), _widened(teacher.detach())
    target = target.to(prediction.dtype)
    if normalize_target:
        target = F.layer_norm(target, target.shape[-1:], eps=eps)
    target = gather_patches(target, target_index).transpose(0, 1).flatten(0, 1)
    if kind == "smooth_l1":
        token = F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).mean(-1)
    elif kind == "l1":
        token = F.l1_loss(prediction, target, reduction="none").mean(-1)
    elif kind == "l2":
        token = F.mse_loss(prediction, target, reduction="none").mean(-1)
    else:
        token = torch.linalg.vector_norm(prediction - target, dim=-1)
    if target_mask is None:
        return token.mean()
    return _weighted_mean(token, target_mask.transpose(0, 1).flatten(0, 1))


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    shadows: Sequence[Tensor] | None = None,
    *,
    backend: str = "auto",
) -> None:
    """A loop over the parameters."""
    for target, source in zip(targets, sources, strict=True):
        target.mul_(momentum).add_((1 - momentum) * source)
    for shadow, target in zip(shadows or [], targets, strict=bool(shadows)):
        shadow.copy_(target)


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    targets: Sequence[Tensor] = (),
    shadows: Sequence[Tensor] = (),
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    momentum: float = 1.0,
    backend: str = "auto",
) -> None:
    """A loop over the parameters, AdamW written out, and then the loop of the EMA."""
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        p.mul_(1 - lr * weight_decay)
        m.mul_(betas[0]).add_((1 - betas[0]) * g)
        v.mul_(betas[1]).add_((1 - betas[1]) * g * g)
        count = step.double()
        corrected = (m / (1 - betas[0] ** count), v / (1 - betas[1] ** count))
        p.sub_(lr * corrected[0] / (corrected[1].sqrt() + eps))
    ema_update_(targets, params[: len(targets)], momentum, shadows)


# The text conditioner of TC-JEPA, arXiv 2605.03245.


def text_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor,
    word_mask: Tensor | None = None,
    caption_mask: Tensor | None = None,
    num_heads: int = 1,
    scale: float | None = None,
    pool: str = "max",
    token_mask: Tensor | None = None,
    similarity: str = "relu",
    tau: float = 0.1,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """All captions at once: every score, every y_n and every cosine is a tensor of its own."""
    words, captions = _present(k, word_mask, caption_mask)
    blocks = q.shape[0] // k.shape[0]
    queries, keys, values = (_heads(x, num_heads) for x in (_blocks(q, k), k, v))
    scores = torch.einsum("mbthe,bcshe->mbhcts", queries, keys)
    scores = scores * ((q.shape[-1] // num_heads) ** -0.5 if scale is None else scale)
    lowest = torch.finfo(scores.dtype).min
    attention = scores.masked_fill(~words[None, :, None, :, None], lowest).softmax(-1)
    attended = torch.einsum("mbhcts,bcshe->mbcthe", attention.to(v.dtype), values)
    every = _blocks(residual, k)[:, :, None] + attended.flatten(-2)  # [M, B, C, T, d]
    there = captions[None, :, :, None, None]
    some = captions.any(1)[None, :, None, None]
    if pool == "max":
        y = every.masked_fill(~there, -torch.inf).amax(2)
    elif pool == "mean":
        y = (every * there).sum(2) / captions.sum(1).clamp_min(1)[None, :, None, None]
    else:
        y, some = every, some[:, :, None]
    unchanged = _blocks(residual, k) if pool != "none" else _blocks(residual, k)[:, :, None]
    features = torch.where(some, y, unchanged).flatten(0, 1).to(residual.dtype)
    cosine = _cosines(queries, keys)
    found = _similarities(cosine, similarity, tau) * words[None, :, None, :, None]
    sums = _widened(found).sum(-1).mean(2)  # [M, B, C, T]
    return features, _weighted_mean(sums, _pairs(captions, token_mask, blocks, sums))


def patch_word_consistency(
    q_layers: Sequence[Tensor] | Tensor,
    k_layers: Sequence[Tensor] | Tensor,
    word_mask: Tensor | None = None,
    caption_mask: Tensor | None = None,
    num_heads: int = 1,
    token_mask: Tensor | None = None,
    similarity: str = "relu",
    tau: float = 0.1,
    *,
    backend: str = "auto",
) -> Tensor:
    """The similarities of all layers in one tensor, then their mean and what differs from it."""
    first = k_layers[0]
    words, captions = _present(first, word_mask, caption_mask)
    layers = []
    for q, k in zip(q_layers, k_layers, strict=True):
        cosine = _cosines(_heads(_blocks(q, k), num_heads), _heads(k, num_heads))
        layers.append(_widened(_similarities(cosine, similarity, tau)).mean(2))
    found = torch.stack(layers) * words[None, None, :, :, None]  # [L, M, B, C, T, S]
    sums = (found - found.mean(0)).abs().sum(-1).mean(0)
    return _weighted_mean(sums, _pairs(captions, token_mask, len(sums), sums))


def _blocks(x: Tensor, k: Tensor) -> Tensor:
    """Block-major rows [M * B, T, d] to [M, B, T, d]."""
    return x.unflatten(0, (-1, k.shape[0]))


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1))


def _present(
    k: Tensor, word_mask: Tensor | None, caption_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[B, C, S] bool, words that exist, and [B, C] bool, captions that have some."""
    words = k.new_ones(k.shape[:3], dtype=torch.bool) if word_mask is None else word_mask
    if caption_mask is not None:
        words = words & caption_mask[..., None]
    return words, words.any(-1)


def _cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """[M, B, h, C, T, S] from [M, B, T, h, e] and [B, C, S, h, e]."""
    queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    return torch.einsum("mbthe,bcshe->mbhcts", queries, keys)


def _similarities(cosine: Tensor, similarity: str, tau: float) -> Tensor:
    return cosine.relu() if similarity == "relu" else F.softplus(cosine / tau)


def _pairs(captions: Tensor, token_mask: Tensor | None, blocks: int, like: Tensor) -> Tensor:
    """[M, B, C, T] bool: pairs of a caption that exists and a token that counts."""
    pairs = captions[None, :, :, None].expand_as(like)
    if token_mask is None:
        return pairs
    return pairs & token_mask.unflatten(0, (blocks, -1))[:, :, None]


def _weighted_mean(x: Tensor, counts: Tensor) -> Tensor:
    """The mean of x where the bool tensor `counts` is True."""
    return (x * counts).sum() / counts.sum().clamp_min(1)


# Likelihoods and layers of the probabilistic heads.


def mixture_nll(
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str = "gaussian",
    event: str = "joint",
    scale_floor: float = 1e-3,
    scale_map: str = "exp",
    *,
    backend: str = "auto",
) -> Tensor:
    """Log-densities of all components, and their logsumexp."""
    target, logits, loc, log_scale = (_widened(x) for x in (target, logits, loc, log_scale))
    scale = scale_floor + (log_scale.exp() if scale_map == "exp" else F.softplus(log_scale))
    z = (target[:, None] - loc) / scale
    if family == "gaussian":
        log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    else:
        log_density = -z - 2 * F.softplus(-z)
    log_density = log_density - scale.log()
    if event == "joint":
        return -torch.logsumexp(F.log_softmax(logits, 1) + log_density.sum(-1), 1)
    return -torch.logsumexp(F.log_softmax(logits, 1) + log_density, 1).sum(-1)


def linear_mixture_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    num_components: int,
    family: str = "gaussian",
    event: str = "joint",
    scale_floor: float = 1e-3,
    scale_map: str = "exp",
    reduction: str = "mean",
    token_mask: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """`F.linear`, whose outputs autograd keeps, and the likelihood of what it predicts."""
    tokens, width = target.shape
    parameters = F.linear(hidden, weight, bias)
    block = num_components * width
    count = num_components if event == "joint" else block
    logits, loc, log_scale = parameters.split([count, block, block], -1)
    shape = (tokens, num_components, width)
    logits = logits if event == "joint" else logits.reshape(shape)
    nll = mixture_nll(
        target, logits, loc.reshape(shape), log_scale.reshape(shape), family, event, scale_floor,
        scale_map,
    )  # fmt: skip
    nll = nll if token_mask is None else nll[token_mask]
    return nll.mean() if reduction == "mean" else nll.sum()


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """`F.linear` with a mask made of the degrees at every call."""
    return F.linear(x, weight * degree_mask(in_degree, out_degree, strict), bias)


def degree_mask(in_degree: Tensor, out_degree: Tensor, strict: bool) -> Tensor:
    """[O, I] bool: which weights count."""
    rows = out_degree[:, None]
    return rows > in_degree if strict else rows >= in_degree


def affine_coupling(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    scale_bound: float = 2.0,
    inverse: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Products with the mask, as in the public codes of RealNVP."""
    free = ~mask
    log_scale = scale_bound * torch.tanh(_widened(raw_scale)) * free
    wide, shift = _widened(x), _widened(shift) * free
    if inverse:
        return ((wide - shift) * torch.exp(-log_scale)).to(x.dtype), -log_scale.sum(-1)
    return (wide * torch.exp(log_scale) + shift).to(x.dtype), log_scale.sum(-1)


def _widened(x: Tensor) -> Tensor:
    """In float32 or wider: what autocast does before norms, losses and exponentials."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


PLAIN: dict[str, Callable[..., Any]] = {
    name: globals()[name] for name in ops.__all__ if name in globals()
}
"""Every function above that stands for a public operator, by its name."""
_PUBLIC = {name: getattr(ops, name) for name in PLAIN}


@contextmanager
def plain_operators() -> Iterator[None]:
    """Models and blocks run on the plain operators, wherever they have theirs from.

    Cheap enough to go around every timed call. What was compiled inside only serves calls inside.
    """
    # By their number, since what was imported since the last time may have operators, too.
    places = _places(len(sys.modules))
    before = [(module, name, getattr(module, name)) for module, name, _ in places]
    try:
        for module, name, function in places:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


@functools.lru_cache(maxsize=1)
def _places(_: int) -> list[tuple[ModuleType, str, Callable[..., Any]]]:
    """(module, name, plain operator) of all that refers to a public operator, or to `linear`."""
    places: list[tuple[ModuleType, str, Callable[..., Any]]] = [
        (ops, name, function) for name, function in PLAIN.items()
    ]
    by_public = {id(public): PLAIN[name] for name, public in _PUBLIC.items()}
    by_public[id(linear)] = F.linear
    for module_name, module in list(sys.modules.items()):
        inside = module_name.partition(".")[0] == "jepa_fast"
        if not inside or module_name.startswith("jepa_fast.ops"):
            continue
        for name, value in vars(module).items():
            if id(value) in by_public:
                places.append((module, name, by_public[id(value)]))
    return places


# Races.

_PERIOD = 4093  # prime, so that no two rows of a tensor are the same


def values(
    *shape: int, dtype: str = "float32", device: str = "cpu", seed: int = 0, grad: bool = False
) -> Tensor:
    """Random numbers that repeat: to draw them all would take longer than the work on them."""
    some = _drawn(seed).to(device, getattr(torch, dtype))
    size = math.prod(shape)
    return some.repeat(-(-size // _PERIOD))[:size].view(shape).requires_grad_(grad)


@functools.cache
def _drawn(seed: int) -> Tensor:
    return torch.randn(_PERIOD, generator=torch.Generator().manual_seed(seed))


def drawn_patches(*shape: int, patches: int, device: str = "cpu", seed: int = 0) -> Tensor:
    """`shape[-1]` of `patches` patches, without repetition and ascending, as masks are; int64."""
    *rows, taken = shape
    draws = torch.rand(*rows, patches, generator=torch.Generator().manual_seed(seed))
    return draws.argsort(-1)[..., :taken].sort(-1).values.to(device)


def distinct_patches(index: Tensor) -> int:
    """Patches of all images that an index [B, ...] names, however often."""
    return sum(len(image.unique()) for image in index)


def drawn_words(images: int, captions: int, words: int, device: str = "cpu") -> Tensor:
    """[B, C, S] bool: captions are half as long as the padded length, or longer."""
    generator = torch.Generator().manual_seed(0)
    length = torch.randint(words // 2, words + 1, (images, captions, 1), generator=generator)
    return (torch.arange(words) < length).to(device)


def backend_of(operator: str, *arguments: Any) -> str:
    """The registry's answer: which backend serves a call of the registered operator.

    Args:
        operator: by the name in its schema.
        arguments: those of the schema, without `backend`.
    """
    return OPERATORS[operator].select("auto", arguments)


@functools.cache
def why_no_compile(device: str) -> str:
    """What torch.compile lacks here; empty if nothing."""
    if device == "cuda":
        there = importlib.util.find_spec("triton") is not None
        return "" if there else "torch.compile needs triton: pip install triton"
    compiler = os.environ.get("CXX", "g++")  # as torch looks for it
    there = bool(compiler.split()) and shutil.which(compiler.split()[0]) is not None
    return "" if there else f"torch.compile needs a C++ compiler: {compiler} is not on the PATH"


class Compiled:
    """A function under torch.compile from its first call on, which so has the price of it.

    Attributes:
        built: whether it has been called.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.built = False
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        if not self.built:
            # What other cases compiled of the same code counts towards the limit at which torch
            # runs it eagerly.
            torch._dynamo.reset()
            self._function = torch.compile(self._function, fullgraph=True, dynamic=False)
            self.built = True
        return self._function(*arguments)


def compiled(function: Callable[..., Any], device: str) -> tuple[dict[str, Any], dict[str, str]]:
    """`others` and `why_not` of a race: `function` under torch.compile, or why it is not there."""
    why = why_no_compile(device)
    return ({}, {"compile": why}) if why else ({"compile": Compiled(function)}, {})


@dataclass(frozen=True)
class Other:
    """Another way to do an operator's work.

    Args:
        function: of the operator's tensors.
        exact: the plain way to what `function` gives; None: what the operator gives.
    """

    function: Callable[..., Any]
    exact: Callable[..., Any] | None = None


def operator_race(
    case: Case,
    device: str,
    cost: Cost,
    arguments: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    *,
    backend: str,
    grads: Sequence[Tensor] = (),
    others: Mapping[str, Other] | None = None,
    why_not: Mapping[str, str] | None = None,
) -> Race:
    """The public operator of a case against the plain one, also compiled, and against others.

    Args:
        case: `case.operator` is the function of `jepa_fast.ops` and here.
        device: `"cpu"` or `"cuda"`.
        cost: of one call.
        arguments: tensors, None, or lists of tensors.
        options: keyword arguments of the operator.
        backend: which one serves it.
        grads: upstream gradients, one an output; then a call is a forward and a backward pass, for
            those tensors that require a gradient. Without any it is a forward pass.
        others: other ways than the plain one, by name.
        why_not: others that are missing here, and why.
    """
    options = dict(options or {})

    def ours(*tensors: Any) -> Any:
        return getattr(ops, case.operator)(*tensors, **options)

    def eager(*tensors: Any) -> Any:
        return PLAIN[case.operator](*tensors, **options)

    built, no_compile = compiled(eager, device)
    ways = {"eager": Other(eager), **{name: Other(f) for name, f in built.items()}}
    ways |= others or {}
    providers = {
        name: functools.partial(run, way.function, arguments, grads) for name, way in ways.items()
    }

    def check() -> None:
        exact = functools.lru_cache(lambda f: run(f, in_float64(arguments), grads))
        for name, way in {"ours": Other(ours), **ways}.items():
            if isinstance(way.function, Compiled) and not way.function.built:
                continue  # the protocol calls every provider before it checks
            got = run(way.function, arguments, grads)
            assert_agree(name, got, exact(way.exact or eager), case.dtype)

    return Race(
        ours=functools.partial(run, ours, arguments, grads),
        others=providers,
        check=check,
        cost=cost,
        backend=backend,
        why_not={**no_compile, **(why_not or {})},
    )


def run(
    function: Callable[..., Any], arguments: Sequence[Any], grads: Sequence[Tensor]
) -> list[Tensor]:
    """The outputs of a call, and the gradients if there are `grads`, one an output."""
    if not grads:
        with torch.no_grad():
            return tensors_in([function(*arguments)])
    outputs = tensors_in([function(*arguments)])
    inputs = [tensor for tensor in tensors_in(arguments) if tensor.requires_grad]
    upstream = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=False)]
    return [out.detach() for out in outputs] + list(torch.autograd.grad(outputs, inputs, upstream))


def tensors_in(arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors among arguments or outputs, those in lists, too, in their order."""
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += tensors_in(argument)
    return found


def in_float64(arguments: Sequence[Any]) -> list[Any]:
    """The same arguments, floating tensors in float64; leaves where the originals are."""

    def wide(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [wide(a) for a in argument]
        if not isinstance(argument, Tensor) or not argument.is_floating_point():
            return argument
        return argument.detach().double().requires_grad_(argument.requires_grad)

    return [wide(argument) for argument in arguments]


TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "float16": 5e-3, "bfloat16": 3e-2}
"""Of an error's length in the length of what it is an error of: some rounding steps, summed up."""


def assert_agree(name: str, got: Sequence[Tensor], want: Sequence[Tensor], dtype: str) -> None:
    """Raises AssertionError if what provider `name` gives is off for inputs of `dtype`.

    By the row (the last dimension), so that a bad one cannot hide among good ones; a row that is
    shorter than most may be as far off as these.
    """
    assert len(got) == len(want), f"{name} gives {len(got)} tensors, not {len(want)}"
    for i, (one, exact) in enumerate(zip(got, want, strict=True)):
        assert one.shape == exact.shape, f"{name}[{i}] is {list(one.shape)}, not {exact.shape}"
        one, exact = (x.double().reshape(-1, x.shape[-1] if x.ndim else 1) for x in (one, exact))
        length = torch.linalg.vector_norm(exact, dim=-1)
        error = torch.linalg.vector_norm(one - exact, dim=-1)
        bound = TOLERANCE[dtype] * length.clamp_min(length.square().mean().sqrt())
        bad = ~(error <= bound)  # NaN is bad
        assert not bad.any(), (
            f"{name}: {int(bad.sum())} of {len(bad)} rows of tensor {i} are off; the worst by "
            f"{error[bad].max():.3g} where {bound[bad].max():.3g} is allowed"
        )
