"""Whole training steps of the four models: forward, backward, AdamW, and the EMA of the target.

Masks are drawn, images are on the device. `ours` is what the trainer does: the library's operators,
`AdamWEma`, and on a CPU the memory of a step kept for the next one. `eager` is the same model on
plain PyTorch operators with AdamW as torch sets it up, and with a predictor as public code has it,
whose last block computes the tokens of the context, too, which nobody reads. Under `compile` and
`ours_compile` every transformer block is compiled by itself, and of the plain operators all but the
EMA (in a race `compile` comes first, and its blocks then serve `ours_compile`, whose first call so
costs less). Cases say how text and images come:

- words as tensors, as from a cache; where the case names a text encoder, `live` is ours with that
  encoder (a T5 of random weights) in every step;
- `-live`: the text encoder in every step, of all providers, which needs transformers;
- `-cached`: TI-JEPA on given features of its frozen image encoder; `recomputing` is ours with that
  encoder in every step.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import IJEPA_STEPS, PROBIJEPA_STEPS, TCJEPA_STEPS, TIJEPA_STEPS, step_cost
from plain import PLAIN, TOLERANCE, plain_operators, why_no_compile
from torch import Tensor, nn

from jepa_fast import IJepa, ProbIJepa, TCJepa, TIJepa, ops
from jepa_fast.host_memory import keep_host_memory, return_host_memory
from jepa_fast.masks import BlockMasks, BlockMaskSampler
from jepa_fast.nn.attention import Block
from jepa_fast.nn.vit import VisionTransformer
from jepa_fast.optim import (
    AdamWEma,
    copy_teacher_buffers,
    parameter_groups,
    teacher_parameters,
)
from jepa_fast.perf import Case, NotHere, Race, benchmark

MOMENTUM = 0.996
_SEED = 0
_WEIGHT_DECAY = 0.04
_LEARNING_RATE = 1e-4  # low, as a race takes hundreds of steps on one batch
_CHECKED_IMAGES = 4
_JUMPS = {"tcjepa_step": 1e-3}
"""How far off gradients may be besides: of captions that are equal but for rounding TC-JEPA's max
picks one, in ours not always the plain one's. (With `pool="mean"` both are as near to float64.)"""
_NO_TEXT_ENCODER = 'a text encoder needs transformers: pip install "jepa-fast[text]"'
_HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


@pytest.fixture(scope="module", autouse=True)
def host_memory() -> Iterator[None]:
    """Files after one that makes steps get their memory as programs do by default."""
    yield
    return_host_memory()


@benchmark(IJEPA_STEPS)
def bench_ijepa_step(case: Case, device: str) -> Race:
    """I-JEPA: target and context encoder, predictor."""
    return step_race(case, device)


@benchmark(TCJEPA_STEPS)
def bench_tcjepa_step(case: Case, device: str) -> Race:
    """TC-JEPA: I-JEPA with a text conditioner in the predictor."""
    return step_race(case, device)


@benchmark(TIJEPA_STEPS)
def bench_tijepa_step(case: Case, device: str) -> Race:
    """TI-JEPA: frozen encoders, crossers of image and text, predictor."""
    return step_race(case, device)


@benchmark(PROBIJEPA_STEPS)
def bench_probijepa_step(case: Case, device: str) -> Race:
    """Probabilistic I-JEPA with a mixture density head."""
    return step_race(case, device)


def step_race(case: Case, device: str) -> Race:
    """The race of a case; every provider has a model of its own, all of the same weights.

    Raises:
        NotHere: the case needs transformers, and they are not installed.
    """
    if "live" in case.sizes and not _HAS_TRANSFORMERS:
        raise NotHere(_NO_TEXT_ENCODER)
    inputs = make_inputs(case, device)
    model = make_model(case, device)

    def step(**options: bool) -> Step:
        # A copy takes less time than to draw the weights again.
        return Step(case, device, copy.deepcopy(model), inputs, **options)

    steps = {"ours": step(), "eager": step(plain=True)}
    why_not = {}
    if why := why_no_compile(device):
        why_not = {"compile": why, "ours_compile": why}
    else:
        steps["compile"] = step(plain=True, compiled=True)
        steps["ours_compile"] = step(compiled=True)

    others = dict(steps)
    variants = {"ours_compile": others.pop("ours_compile")} if "ours_compile" in others else {}
    if "cached" in case.sizes:
        whole = make_model(case, device, frozen=True)
        variants["recomputing"] = Step(case, device, whole, replace(inputs, features=None))
    if "T5" in case.sizes and "live" not in case.sizes:
        if _HAS_TRANSFORMERS:
            live = replace(inputs, text=live_text(case, device))
            variants["live"] = Step(case, device, copy.deepcopy(model), live)
        else:
            why_not["live"] = _NO_TEXT_ENCODER

    def check() -> None:
        for name, step in steps.items():
            if step.first_loss is not None and steps["ours"].first_loss is not None:
                assert_same_loss(name, step.first_loss, steps["ours"].first_loss, case.dtype)
        check_step(case, device)

    return Race(
        ours=others.pop("ours"),
        others=others,
        check=check,
        cost=step_cost(
            case,
            union=inputs.masks.target_union()[0].shape[1],
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            taught=sum(p.numel() for p in networks(model)[0].parameters()),
        ),
        backend="auto",
        why_not=why_not,
        variants=variants,
    )


# What goes into a step.


@dataclass(frozen=True)
class Inputs:
    """A batch, as the trainer gives it to a model.

    Args:
        images: [B, 3, H, W].
        masks: of the images.
        text: gives the model's arguments about words; called in every step.
        features: of the frozen image encoder, instead of images.
    """

    images: Tensor
    masks: BlockMasks
    text: Callable[[], dict[str, Tensor]]
    features: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """What a model is called with."""
        images = {"images": self.images}
        if self.features is not None:
            images = {"images": None, "image_features": self.features}
        return {**images, "masks": self.masks, **self.text()}

    def in_float64(self) -> Inputs:
        """The same batch, in a wider dtype."""

        def text() -> dict[str, Tensor]:
            given = self.text()
            return {n: x.double() if x.is_floating_point() else x for n, x in given.items()}

        features = None if self.features is None else self.features.double()
        return Inputs(self.images.double(), self.masks, text, features)


def make_inputs(case: Case, device: str) -> Inputs:
    """The same batch at every call."""
    generator = torch.Generator().manual_seed(_SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    images = normal(case["B"], 3, case["pixels"], case["pixels"])
    masks = _masks(case)
    if case.operator != "tijepa_step":  # whose union of blocks is made on the CPU
        masks = masks.to(device)
    words: dict[str, Tensor] = {}
    if "C" in case.sizes:
        shape = (case["B"], case["C"], case["S"])
        words = {
            "words": normal(*shape, case["Dt"]),
            "word_mask": torch.ones(shape, dtype=torch.bool, device=device),
            "caption_mask": torch.ones(shape[:2], dtype=torch.bool, device=device),
        }
    text = live_text(case, device) if "live" in case.sizes else lambda: words
    features = None
    if "cached" in case.sizes:
        features = normal(case["B"], math.prod(masks.grid), case["D"])
    return Inputs(images, masks, text, features)


def _masks(case: Case) -> BlockMasks:
    """Blocks of `Kt` patches, as square as can be, and contexts of `Kc`."""
    side, size = case["pixels"] // case["patch"], case["Kt"]
    height = max(h for h in range(1, math.isqrt(size) + 1) if size % h == 0)
    share, aspect = size / side**2, height**2 / size
    sampler = BlockMaskSampler(
        side,
        num_targets=case["M"],
        target_scale=(share, share),
        target_aspect=(aspect, aspect),
        min_context=case["Kc"],
        max_context=case["Kc"],
        seed=_SEED,
    )
    return sampler(0, case["B"])


def live_text(case: Case, device: str) -> Callable[[], dict[str, Tensor]]:
    """Encodes the captions of a batch at every call, all of `S` tokens, by a T5 of no training."""
    # Here, as it takes seconds to import, and only some cases need it.
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    from jepa_fast.interop.text import TextEncoder

    names = ("[PAD]", "[UNK]", "[END]", *(f"word{i}" for i in range(97)))
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [END]", special_tokens=[("[END]", names.index("[END]"))]
    )
    config = T5Config(
        vocab_size=len(names),
        d_model=case["Dt"],
        d_kv=case["Dt"] // case["T5_heads"],
        d_ff=4 * case["Dt"],
        num_layers=case["T5"],
        num_heads=case["T5_heads"],
    )
    with seeded(), torch.device(device):
        model = T5EncoderModel(config).to(getattr(torch, case.dtype))
    encoder = TextEncoder(
        model,
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"),
        max_words=case["S"],
    )
    count = case["S"] - 1
    words = itertools.cycle(names[3:])
    captions = [
        [" ".join(itertools.islice(words, count)) for _ in range(case["C"])]
        for _ in range(case["B"])
    ]

    def encode() -> dict[str, Tensor]:
        text = encoder(captions, case["C"])
        return {
            "words": text.words,
            "word_mask": text.word_mask,
            "caption_mask": text.caption_mask,
        }

    return encode


# A step.


class Step:
    """A provider: one more training step at every call.

    Args:
        case: sizes and dtype.
        device: `"cpu"` or `"cuda"`.
        model: is trained, by this step alone.
        inputs: the batch of every step.
        plain: plain operators, torch's AdamW, a predictor that computes all tokens and memory as
            the process gets it by default, instead of ours and what the trainer takes.
        compiled: the transformer blocks under torch.compile, from the first call on.

    Attributes:
        first_loss: of the first call, None before.
    """

    def __init__(
        self,
        case: Case,
        device: str,
        model: Any,
        inputs: Inputs,
        *,
        plain: bool = False,
        compiled: bool = False,
    ) -> None:
        self.model = model.train()
        groups = parameter_groups(self.model, _WEIGHT_DECAY)
        self.optimizer: AdamWEma | torch.optim.AdamW
        if plain:
            self.optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE)
        else:
            targets = teacher_parameters(self.model)
            self.optimizer = AdamWEma(groups, lr=_LEARNING_RATE, targets=targets, momentum=MOMENTUM)
        self.first_loss: Tensor | None = None
        self._inputs = inputs
        self._operators: Callable[[], AbstractContextManager[None]] = nullcontext
        if plain:
            self._operators = _compiled_operators if compiled else plain_operators
            _compute_all_tokens(self.model.predictor.predictor_blocks[-1])
        self._on_cpu = device == "cpu"
        self._keeps_memory = not plain
        self._to_compile = compiled
        self._autocast = functools.partial(
            torch.autocast, device, torch.bfloat16, enabled=case.dtype == "bfloat16"
        )

    def __call__(self) -> Tensor:
        """A step; gives the loss."""
        if self._to_compile:
            self._to_compile = False
            _compile_blocks(self.model)
        if self._on_cpu:
            self._set_memory()
        if self.first_loss is None:
            with seeded():
                loss = self.first_loss = self.backward()
        else:
            loss = self.backward()
        self.update()
        return loss

    def backward(self) -> Tensor:
        """Forward and backward pass; gives the loss."""
        arguments = self._inputs.arguments()
        with self._operators():
            with self._autocast():
                loss = self.model(**arguments).loss
            loss.backward()
        return loss.detach()

    def _set_memory(self) -> None:
        if self._keeps_memory:
            keep_host_memory()
        else:
            # The heap stays, or each turn of ours would have to build it up again.
            return_host_memory(heap=False)

    def update(self) -> None:
        """Moves the weights, and then the teacher."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(self.optimizer, AdamWEma):
            copy_teacher_buffers(self.model)
        else:
            with self._operators():
                self.model.update_target(MOMENTUM)


def make_model(case: Case, device: str, frozen: bool | None = None) -> Any:
    """The model of a case, of the same weights at every call.

    Args:
        frozen: whether TI-JEPA has its frozen encoder; None: if the case's features are not cached.
    """
    if frozen is None:
        frozen = "cached" not in case.sizes
    with seeded(), torch.device(device):
        return _model(case, frozen)


def _model(case: Case, with_encoder: bool) -> Any:
    predictor = {
        "predictor_dim": case["d"],
        "predictor_depth": case["L"],
        "predictor_heads": case["predictor_heads"],
    }
    side = case["pixels"] // case["patch"]
    encoder = None
    if with_encoder:
        encoder = VisionTransformer(
            case["pixels"], case["patch"], case["D"], case["depth"], case["heads"]
        )
    if case.operator == "ijepa_step":
        return IJepa(encoder, **predictor)
    if case.operator == "tcjepa_step":
        return TCJepa(encoder, text_dim=case["Dt"], **predictor)
    if case.operator == "probijepa_step":
        return ProbIJepa(encoder, head_options={"num_components": case["K"]}, **predictor)
    return TIJepa(
        encoder,
        text_dim=case["Dt"],
        width=case["crosser"],
        depth=case["crosser_depth"],
        num_heads=case["crosser_heads"],
        image_dim=case["D"],
        grid=(side, side),
        **predictor,
    )


def networks(model: Any) -> tuple[nn.Module, nn.Module]:
    """The teacher of a model, and whom it follows."""
    if isinstance(model, TIJepa):
        return model.target_crosser, model.context_crosser
    return model.target_encoder, model.encoder


def _compute_all_tokens(block: Block) -> None:
    """Has the block leave tokens out when all are computed."""

    def forward(x: Tensor, key_mask: Tensor | None = None, skip: int = 0) -> Tensor:
        return Block.forward(block, x, key_mask)[:, skip:]

    block.forward = forward  # type: ignore[method-assign]


def _compile_blocks(model: nn.Module) -> None:
    """Blocks of all kinds are in lists. Each sees the same shapes at every step."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile(dynamic=False)


@contextmanager
def _compiled_operators() -> Iterator[None]:
    """As `plain_operators`, but compiled."""
    with plain_operators():  # which puts back what is set here, too
        for name, function in _compiled_plain().items():
            setattr(ops, name, function)
        yield


@functools.cache
def _compiled_plain() -> dict[str, Callable[..., Any]]:
    # The EMA is a loop over all tensors of a model, which takes minutes to compile.
    return {
        name: torch.compile(function, dynamic=False)
        for name, function in PLAIN.items()
        if name not in ("ema_update_", "adamw_ema_")
    }


@contextmanager
def seeded() -> Iterator[None]:
    """The same random draws every time, and outside as if there had been none."""
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        yield


# Whether it is right.


def check_step(case: Case, device: str) -> None:
    """Loss, gradients and new weights of a step of ours against the plain one, on some images.

    Losses and gradients are judged by the plain step in float64.

    Raises:
        AssertionError: ours is off.
    """
    images = min(case["B"], _CHECKED_IMAGES)
    case = replace(case, sizes={**case.sizes, "B": images})
    inputs, model = make_inputs(case, device), make_model(case, device)
    ours = Step(case, device, copy.deepcopy(model), inputs)
    plain = Step(case, device, copy.deepcopy(model), inputs, plain=True)
    wide = replace(case, dtype="float64")
    exact = Step(wide, device, model.double(), inputs.in_float64(), plain=True)
    found = []
    for step in (ours, plain, exact):
        with seeded():
            loss = step.backward()
        gradients = {n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}
        found.append({"the loss": loss, **gradients})
    allowed = max(TOLERANCE[case.dtype], _JUMPS.get(case.operator, 0.0))
    assert_as_accurate(*found, loss=TOLERANCE[case.dtype], gradients=allowed)
    del exact, model, found
    _check_update(ours, plain)


def assert_as_accurate(
    ours: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    loss: float,
    gradients: float,
) -> None:
    """Ours may be twice as far off as the plain one is anywhere, and by as much as is given."""
    assert ours.keys() == plain.keys() == exact.keys(), f"{ours.keys() ^ exact.keys()} differ"
    first, *others = exact
    # The short may be as far off as the average: some gradients are zero but for rounding.
    squares = sum(float(exact[name].square().sum()) for name in others)
    average = squares / sum(exact[name].numel() for name in others)

    def off(got: dict[str, Tensor], name: str) -> float:
        want = exact[name]
        length = float(want.norm())
        if name != first:
            length = max(length, math.sqrt(average * want.numel()))
        return float((got[name].double() - want).norm()) / length

    for names, allowed in (([first], loss), (others, gradients)):
        bound = 2 * max(off(plain, name) for name in names) + allowed
        for name in names:
            error = off(ours, name)
            assert error <= bound, (  # NaN is not
                f"{name}: ours is off by {error:.3g} of its length, {bound:.3g} is allowed"
            )


def _check_update(ours: Step, plain: Step) -> None:
    """The weights after an update by the same gradients, and the teacher after its EMA."""
    # The same: AdamW divides gradients by their length, so that rounding errors in small ones would
    # come out as large as any.
    for mine, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        if mine.grad is not None:
            other.grad = mine.grad.clone()
    for step in (ours, plain):
        teacher, student = networks(step.model)
        with torch.no_grad():
            for p in teacher.parameters():
                p.mul_(0.5)  # one that equals its student could not be seen to move
        before = [p.clone() for p in teacher.parameters()]
        step.update()
        for old, new, source in zip(
            before, teacher.parameters(), student.parameters(), strict=True
        ):
            moved = MOMENTUM * old + (1 - MOMENTUM) * source.detach()
            torch.testing.assert_close(new, moved, rtol=1e-5, atol=1e-8)
    theirs = dict(plain.model.named_parameters())
    for name, mine in ours.model.named_parameters():
        torch.testing.assert_close(
            mine, theirs[name], rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_loss(name: str, got: Tensor, want: Tensor, dtype: str) -> None:
    difference = (got.double() - want.double()).abs()
    assert difference <= TOLERANCE[dtype] * want.double().abs(), (
        f"{name}: the loss is {float(got)}, not {float(want)}"
    )
