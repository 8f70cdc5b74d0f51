"""The papers' shapes, and what each case has to move and to compute at the least.

Sizes go by the names of the field: `B` images, `N` patches, `D` encoder width, `d` predictor width,
`M` target blocks an image, `Kt` patches of a block, `Kc` context patches, `T` tokens, `C` captions
an image, `S` words a caption, `K` mixture components. A cost counts every input once and every
output once, whatever an implementation reads again or holds in between; the backward pass adds
upstream gradients to the inputs and gradients to the outputs. In flops a multiplication, an
addition, a comparison or an exponential is one.
"""

from __future__ import annotations

from dataclasses import dataclass

from jepa_fast.perf.race import Case, Cost

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_INDEX = 8  # int64
_WIDE = 4  # float32: losses, and what autocast keeps wide

# I-JEPA with a ViT-L/16 at 224 px: 196 patches, context blocks of 82 on average, 4 target blocks.
VIT_L = {"B": 256, "N": 196, "D": 1024, "M": 4, "Kt": 33, "Kc": 82}
# A ViT-S/16 on the batch that a CPU of two cores takes.
VIT_S = {**VIT_L, "B": 64, "D": 384}
# The predictor's width is 384 with every encoder.
PREDICTOR = {"B": 256, "N": 196, "d": 384, "M": 4, "Kt": 33, "Kc": 82}
# TC-JEPA: 8 captions of 64 words; a predictor sequence is a context and a target block.
CAPTIONS = {"B": 256, "M": 4, "T": 116, "C": 8, "S": 64, "d": 384}
LAYERS = {**CAPTIONS, "L": 12}
# Probabilistic heads: the tokens of a small step, and of VIT_L's.
HEAD = {"T": 2048, "D": 384, "K": 5}
HEAD_L = {"T": 256 * 132, "D": 1024, "K": 5}

# A component's log-density of a coordinate is then about zero, and a token's small: of a large one
# float32 keeps too few digits for the components' shares.
LOG_SCALE = -1.37


def vit_parameters(width: int, depth: int) -> list[tuple[int, ...]]:
    """The shapes of all parameters of a ViT with patches of 16 pixels."""

    def linear(outputs: int, inputs: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs), (outputs,)]

    norm: list[tuple[int, ...]] = [(width,), (width,)]
    attention = [*norm, *linear(3 * width, width), *linear(width, width)]
    mlp = [*norm, *linear(4 * width, width), *linear(width, 4 * width)]
    return [(width, 3, 16, 16), (width,), *depth * [*attention, *mlp], *norm]


def gather_patches_cost(case: Case, backward: bool, distinct: int) -> Cost:
    """`[B, M, K]` of `[B, N, D]`; the gradient has a value for every patch.

    Args:
        distinct: patches of the batch that the index names, however often.
    """
    item, width = _BYTES[case.dtype], case["D"]
    rows, index = case["B"] * case["M"] * case["K"], case["B"] * case["M"] * case["K"] * _INDEX
    forward = Cost(read=distinct * width * item + index, written=rows * width * item)
    if not backward:
        return forward
    return forward + Cost(rows * width * item, case["B"] * case["N"] * width * item, rows * width)


def gather_packed_cost(case: Case, backward: bool) -> Cost:
    """`[K]` of `[T, D]`."""
    item, width, rows = _BYTES[case.dtype], case["D"], case["K"]
    forward = Cost(read=rows * (width * item + _INDEX), written=rows * width * item)
    if not backward:
        return forward
    return forward + Cost(rows * width * item, case["T"] * width * item, rows * width)


def assemble_predictor_tokens_cost(case: Case, backward: bool) -> Cost:
    """Context in the case's dtype, the rest in float32; gradients of context and mask token."""
    batch, blocks, width = case["B"], case["M"], case["d"]
    item = _BYTES[case.dtype]
    context = batch * case["Kc"] * width * item
    index = batch * (case["Kc"] + blocks * case["Kt"]) * _INDEX
    tokens = batch * blocks * (case["Kc"] + case["Kt"]) * width
    forward = Cost(
        read=context + (1 + case["N"]) * width * _WIDE + index,
        written=tokens * _WIDE,
        flops=batch * (case["Kc"] + blocks * case["Kt"]) * width,
    )
    if not backward:
        return forward
    return forward + Cost(tokens * _WIDE, context + width * _WIDE, tokens)


def latent_loss_cost(case: Case, backward: bool, distinct: int) -> Cost:
    """LayerNorm of the target (5 flops an element), residual and loss (4), gradient (2).

    Args:
        distinct: patches of the batch that are in any block.
    """
    item, blocks = _BYTES[case.dtype], case["M"] * case["Kt"]
    elements = case["B"] * blocks * case["D"]
    teacher = distinct * case["D"] * item
    index = case["B"] * blocks * _INDEX
    forward = Cost(elements * item + teacher + index, _WIDE, 9 * elements)
    return forward + Cost(_WIDE, elements * item, 2 * elements) if backward else forward


def ema_update_cost(parameters: int, target: str, source: str, shadow: str | None = None) -> Cost:
    """Target, source and, written alone, a shadow, all of as many parameters, by their dtypes."""
    kept = parameters * _BYTES[target]
    copied = 0 if shadow is None else parameters * _BYTES[shadow]
    return Cost(kept + parameters * _BYTES[source], kept + copied, 3 * parameters)


def adamw_ema_cost(parameters: int, shadow: str | None = None) -> Cost:
    """Parameter, two moments and target read and written, gradient read, and a shadow written."""
    copied = 0 if shadow is None else parameters * _BYTES[shadow]
    return Cost(5 * parameters * _WIDE, 4 * parameters * _WIDE + copied, 18 * parameters)


def text_cross_attention_cost(case: Case, backward: bool, present: int) -> Cost:
    """Two products of queries and words, four in the backward pass; cosines reuse the scores.

    Padding is read and takes a gradient, of zero, but has no part in the products.

    Args:
        present: words of the batch that are no padding.
    """
    item, width = _BYTES[case.dtype], case["d"]
    tokens, words = case["B"] * case["M"] * case["T"], case["B"] * case["C"] * case["S"]
    product = 2 * case["M"] * case["T"] * present * width
    inputs = (tokens + 2 * words) * width * item
    features = tokens * width * _WIDE  # of the residual, and of the sum
    forward = Cost(inputs + features + words, features + _WIDE, 2 * product)
    if not backward:
        return forward
    return forward + Cost(features + _WIDE, inputs + features, 4 * product)


def per_caption_cost(case: Case, present: int) -> Cost:
    """A query, `text_cross_attention`, and an MLP four times as wide for each caption.

    Forward and backward; nothing is computed twice. A caption's y_n and all that follows them up to
    the pool move nowhere.

    Args:
        present: words of the batch that are no padding.
    """
    width, tokens = case["d"], case["B"] * case["M"] * case["T"]
    attention = text_cross_attention_cost(case, True, present)
    weights = (9 * width**2 + 7 * width) * _WIDE
    mlp = 2 * _product(tokens * case["C"], width, 4 * width)
    query = _product(tokens, width, width)
    return attention + Cost(weights, weights, 3 * (mlp + query))


def patch_word_consistency_cost(case: Case, backward: bool, present: int) -> Cost:
    """One product a layer, two in the backward pass, which needs only the signs of the others.

    Args:
        present: words of the batch that are no padding.
    """
    item, width, layers = _BYTES[case.dtype], case["d"], case["L"]
    tokens, words = case["B"] * case["M"] * case["T"], case["B"] * case["C"] * case["S"]
    product = 2 * case["M"] * case["T"] * present * width * layers
    inputs = layers * (tokens + words) * width * item
    forward = Cost(inputs + words, _WIDE, product)
    return forward + Cost(_WIDE, inputs, 2 * product) if backward else forward


def mixture_nll_cost(case: Case, event: str, backward: bool) -> Cost:
    """A component's coordinate takes about 8 flops, and as many again in the backward pass.

    Parameters are of the case's dtype, the target is float32 and takes no gradient.
    """
    tokens, components, width = case["T"], case["K"], case["D"]
    elements = tokens * components * width
    logits = tokens * components if event == "joint" else elements
    parameters = (logits + 2 * elements) * _BYTES[case.dtype]
    forward = Cost(parameters + tokens * width * _WIDE, tokens * _WIDE, 8 * elements)
    return forward + Cost(tokens * _WIDE, parameters, 8 * elements) if backward else forward


def linear_mixture_nll_cost(case: Case, event: str, backward: bool) -> Cost:
    """`mixture_nll` and one product, two in the backward pass; parameters move nowhere."""
    tokens, hidden, components, width = case["T"], case["H"], case["K"], case["D"]
    item = _BYTES[case.dtype]
    outputs = components * (2 * width + 1) if event == "joint" else 3 * components * width
    product = 2 * tokens * hidden * outputs
    inputs = (tokens * hidden + outputs * (hidden + 1)) * item
    likelihood = 8 * tokens * components * width
    forward = Cost(inputs + tokens * width * _WIDE, _WIDE, product + likelihood)
    return forward + Cost(_WIDE, inputs, 2 * product + likelihood) if backward else forward


def masked_linear_cost(case: Case, backward: bool) -> Cost:
    """Half of the weights count where degrees ascend together: half of a dense layer's flops."""
    item, tokens = _BYTES[case.dtype], case["T"]
    inputs, outputs = case["I"], case["O"]
    product = tokens * inputs * outputs
    tensors = (tokens * inputs + outputs * inputs + outputs) * item
    forward = Cost(tensors + (inputs + outputs) * _INDEX, tokens * outputs * item, product)
    return forward + Cost(tokens * outputs * item, tensors, 2 * product) if backward else forward


def autoregressive_sample_cost(case: Case) -> Cost:
    """One pass of the masked network, half of the dense one, and of the condition's layers."""
    item, tokens, hidden = _BYTES[case.dtype], case["T"], case["H"]
    outputs = 3 * case["K"] * case["D"]
    masked = hidden * (case["D"] + (case["depth"] - 1) * hidden + outputs)
    dense = case["d"] * (2 * case["depth"] * hidden + outputs)
    read = (masked // 2 + dense + tokens * case["d"]) * item
    return Cost(read, tokens * case["D"] * item, tokens * (masked + 2 * dense))


def affine_coupling_cost(case: Case, backward: bool) -> Cost:
    """x whole, scale and shift of the half that changes; 5 flops an element of that, 8 backward."""
    item, tokens, elements = _BYTES[case.dtype], case["T"], case["T"] * case["D"]
    changed = tokens * (case["D"] - (case["D"] + 1) // 2)
    inputs = (elements + 2 * changed) * item + case["D"]
    forward = Cost(inputs, elements * item + tokens * _WIDE, 5 * changed)
    if not backward:
        return forward
    upstream = elements * item + tokens * _WIDE
    return forward + Cost(upstream, 3 * elements * item, 8 * changed)


def realnvp_cost(case: Case) -> Cost:
    """Forward and backward of the couplings' networks: products of halves of the coordinates."""
    tokens, width, hidden = case["T"], case["D"], case["H"]
    half = width // 2
    weights = half * hidden + case["d"] * hidden + hidden * hidden + hidden * 2 * half
    parameters = case["couplings"] * weights * _BYTES[case.dtype]
    condition = tokens * case["d"] * _BYTES[case.dtype]
    target = tokens * width * _BYTES[case.dtype]
    flops = 3 * 2 * tokens * case["couplings"] * weights
    return Cost(parameters + condition + target, parameters + condition, flops)


def q_sample_cost(case: Case, backward: bool) -> Cost:
    """Noising takes 3 flops an element, and a normal number about 5: half a logarithm, square root,
    sine and cosine each, and products. Targets take no gradient.
    """
    elements = case["T"] * case["D"]
    moved = elements * _BYTES[case.dtype]
    return Cost(moved + 2 * case["T"] * _WIDE + _INDEX, moved, 8 * elements)


def denoising_loss_cost(case: Case, backward: bool) -> Cost:
    """A normal number (5 flops), the residual and its square (3); noise moves nowhere."""
    elements = case["T"] * case["D"]
    moved = elements * _BYTES[case.dtype]
    forward = Cost(moved + _INDEX, _WIDE, 8 * elements)
    return forward + Cost(_WIDE, moved, elements) if backward else forward


def draw_block_masks_cost(case: Case) -> Cost:
    """Ids to contexts of Kc slots with their mask and lengths, and to M targets of Kt patches."""
    indices = case["Kc"] + 1 + case["M"] * case["Kt"]
    return Cost(read=case["B"] * _INDEX, written=case["B"] * (indices * _INDEX + case["Kc"]))


def block_masks_cost(case: Case, indices: int) -> Cost:
    """As many indices of context and target patches, drawn for B images."""
    return Cost(read=case["B"] * _INDEX, written=indices * _INDEX)


# Training steps: `heads` and `depth` are the encoder's, `L` and `predictor_heads` the predictor's,
# `Dt` is the width of words, `crosser*` and `T5*` the sizes of TI-JEPA's crossers and of the text
# encoder. A context has exactly `Kc` patches, as with the sampler's min_context = max_context.
# `live`: words come from the text encoder in every step; `cached`: features of the frozen image
# encoder are given.

_TINY = {
    "B": 4, "pixels": 48, "patch": 8, "D": 64, "depth": 2, "heads": 2,
    "d": 48, "L": 2, "predictor_heads": 3, "M": 4, "Kt": 6, "Kc": 12,
}  # fmt: skip
_TINY_TEXT = {"C": 2, "S": 8, "Dt": 64}
_TINY_T5 = {"T5": 2, "T5_heads": 4}
_TINY_CROSSER = {"crosser": 64, "crosser_depth": 2, "crosser_heads": 4}
_STEP = {"pixels": 224, "patch": 16, "d": 384, "M": 4, "Kt": 35, "Kc": 82}
_STEP_S = {**_STEP, "D": 384, "depth": 12, "heads": 6, "L": 6, "predictor_heads": 6}
_STEP_B = {**_STEP, "B": 256, "D": 768, "depth": 12, "heads": 12, "L": 6, "predictor_heads": 12}
_STEP_L = {**_STEP, "B": 256, "D": 1024, "depth": 24, "heads": 16, "L": 12, "predictor_heads": 16}
# TI-JEPA's predictor has 12 layers and heads whatever the encoder is. "Small" on a ViT-H/14, as in
# the paper, and one caption of 64 words.
_CROSSER = {
    "crosser": 768, "crosser_depth": 4, "crosser_heads": 8,
    "C": 1, "S": 64, "Dt": 768, "L": 12, "predictor_heads": 12,
}  # fmt: skip
_STEP_H = {
    "pixels": 224, "patch": 14, "D": 1280, "depth": 32, "heads": 16,
    "d": 384, "M": 4, "Kt": 42, "Kc": 107, "cached": 1, **_CROSSER,
}  # fmt: skip
# The setting on Tiny ImageNet-100.
_TINY_IMAGENET = {
    "pixels": 64, "patch": 8, "D": 384, "depth": 10, "heads": 8,
    "d": 384, "L": 6, "predictor_heads": 8, "M": 4, "Kt": 12, "Kc": 24, "K": 5,
}  # fmt: skip


def _cpu(operator: str, name: str, sizes: dict[str, int]) -> Case:
    """Float32, of a size for a CPU of two cores."""
    return Case(operator, name, sizes, devices=("cpu",))


def _gpu(operator: str, name: str, sizes: dict[str, int]) -> Case:
    """Under autocast, of a size for a GPU."""
    return Case(operator, name, sizes, "bfloat16", devices=("cuda",))


IJEPA_STEPS = (
    Case("ijepa_step", "tiny", _TINY, quick=True),
    _cpu("ijepa_step", "vit-s16-b4", {**_STEP_S, "B": 4}),
    # 1.6 TFLOP: seconds a step on a CPU of two cores.
    _cpu("ijepa_step", "vit-s16-b32", {**_STEP_S, "B": 32}),
    _gpu("ijepa_step", "vit-b16-b256", _STEP_B),
)
TCJEPA_STEPS = (
    Case("tcjepa_step", "tiny", {**_TINY, **_TINY_TEXT}, quick=True),
    Case("tcjepa_step", "tiny-live", {**_TINY, **_TINY_TEXT, **_TINY_T5, "live": 1}),
    # T5-small.
    _cpu(
        "tcjepa_step",
        "vit-s16-b2",
        {**_STEP_S, "B": 2, "C": 8, "S": 64, "Dt": 512, "T5": 6, "T5_heads": 8},
    ),
    # T5-large.
    _gpu(
        "tcjepa_step",
        "vit-l16-b256",
        {**_STEP_L, "C": 8, "S": 64, "Dt": 1024, "T5": 24, "T5_heads": 16},
    ),
)
TIJEPA_STEPS = (
    Case("tijepa_step", "tiny", {**_TINY, **_TINY_TEXT, **_TINY_CROSSER}, quick=True),
    Case(
        "tijepa_step",
        "tiny-live",
        {**_TINY, **_TINY_TEXT, **_TINY_CROSSER, **_TINY_T5, "live": 1},
    ),
    _cpu("tijepa_step", "vit-h14-cached-b2", {**_STEP_H, "B": 2}),
    _gpu("tijepa_step", "vit-b16-b256", {**_STEP_B, **_CROSSER}),
    _gpu("tijepa_step", "vit-h14-cached-b256", {**_STEP_H, "B": 256}),
)
PROBIJEPA_STEPS = (
    Case("probijepa_step", "tiny", {**_TINY, "K": 3}, quick=True),
    _cpu("probijepa_step", "tiny-imagenet-b8", {**_TINY_IMAGENET, "B": 8}),
    _gpu("probijepa_step", "vit-b16-b256", {**_STEP_B, "K": 5}),
)

# Steps on contexts as they are drawn, `batches` batches of masks in turn: `Kmin` is the fewest
# patches that a context may be left with, the other numbers of the masks are the paper's.
_TINY_DRAWN = {n: size for n, size in _TINY.items() if n not in ("Kt", "Kc")} | {"Kmin": 2}
_DRAWN = {"pixels": 224, "patch": 16, "M": 4, "Kmin": 10, "batches": 15}
PACKING_STEPS = (
    Case("packing_step", "tiny", {**_TINY_DRAWN, "batches": 1}, quick=True),
    _cpu(
        "packing_step",
        "vit-ti16-b16",
        {
            **_DRAWN, "B": 16, "D": 192, "depth": 12, "heads": 3,
            "d": 192, "L": 6, "predictor_heads": 3,
        },
    ),
    _gpu(
        "packing_step",
        "vit-b16-b256",
        {
            **_DRAWN, "B": 256, "D": 768, "depth": 12, "heads": 12,
            "d": 384, "L": 6, "predictor_heads": 12,
        },
    ),
)  # fmt: skip

_METRIC_PAIRS = 8
"""Images whose text TI-JEPA swaps for its energy metrics, a forward pass each."""


def step_cost(case: Case, union: int, trained: int, taught: int) -> Cost:
    """A whole step: products forward and backward; AdamW's and the EMA's passes over parameters.

    Left out: everything elementwise, norms, softmax, metrics other than TI-JEPA's energies, and
    whatever activations move. A backward pass has two products for one of the forward pass, but one
    where the input (images, words, features) takes no gradient. Nothing is computed twice, such as
    attention for its backward pass.

    Args:
        union: most patches that lie in any target block of an image, of which TI-JEPA makes one
            sequence; the other models do not read it.
        trained: parameters that the optimizer moves (read with gradient and two moments, written
            without the gradient).
        taught: parameters of the EMA, whose sources have just been written, and are at hand.
    """
    moved = _update_cost(trained, taught)
    model = _tijepa_flops(case, union) if case.operator == "tijepa_step" else _ijepa_flops(case)
    text = _t5_flops(case) if "live" in case.sizes else 0
    return moved + Cost(flops=model + text)


def _update_cost(trained: int, taught: int) -> Cost:
    return Cost(read=16 * trained + 4 * taught, written=12 * trained + 4 * taught)


@dataclass(frozen=True)
class Computed:
    """What a step of I-JEPA works on, wanted or not: padding and slack count, too.

    Args:
        context: tokens of the context encoder.
        context_pairs: of its queries and keys, in a layer.
        predictor: tokens of the predictor.
        predictor_pairs: of its queries and keys, in a layer but the last.
        last_pairs: in the last.
        predictions: target slots that are predicted.
    """

    context: int
    context_pairs: int
    predictor: int
    predictor_pairs: int
    last_pairs: int
    predictions: int


def packing_step_flops(case: Case, computed: Computed) -> dict[str, int]:
    """Of context encoder, predictor and step, forward and backward, counted as in `step_cost`."""
    images, width, inner, layers = case["B"], case["D"], case["d"], case["L"]
    patches = _patches(case)
    embedding = _product(images * patches, 3 * case["patch"] ** 2, width)
    teacher = embedding + case["depth"] * _block(images, patches, width)
    layer = _product(computed.context, width, 12 * width)
    layer += 2 * _product(computed.context_pairs, width, 1)
    encoder = 2 * embedding + 3 * case["depth"] * layer
    forward = _product(computed.context, width, inner)
    forward += (layers - 1) * _product(computed.predictor, inner, 12 * inner)
    forward += (layers - 1) * 2 * _product(computed.predictor_pairs, inner, 1)
    # The last block has queries, keys and values of all, and the rest of what is read alone.
    forward += _product(computed.predictor, inner, 3 * inner)
    forward += 2 * _product(computed.last_pairs, inner, 1)
    forward += _product(computed.predictions, inner, 9 * inner + width)
    predictor = 3 * forward
    return {"encoder": encoder, "predictor": predictor, "step": teacher + encoder + predictor}


def packing_step_cost(flops: int, trained: int, taught: int) -> Cost:
    """As `step_cost`, of as many products."""
    return _update_cost(trained, taught) + Cost(flops=flops)


def _ijepa_flops(case: Case) -> int:
    """I-JEPA, with a text conditioner where there are captions, a mixture where there is K."""
    images, width, inner, layers = case["B"], case["D"], case["d"], case["L"]
    patches, context, hidden = _patches(case), case["Kc"], case["Kt"]
    rows, tokens = images * case["M"], case["Kc"] + case["Kt"]
    embedding = _product(images * patches, 3 * case["patch"] ** 2, width)
    teacher = embedding + case["depth"] * _block(images, patches, width)
    student = 2 * embedding + 3 * case["depth"] * _block(images, context, width)
    # The last block of a predictor without conditioner leaves out the context.
    skip = 0 if "C" in case.sizes else context
    predictor = _product(images * context, width, inner)
    predictor += (layers - 1) * _block(rows, tokens, inner) + _block(rows, tokens, inner, skip)
    if "K" in case.sizes:
        predictor += _product(rows * hidden, inner, case["K"] * (2 * width + 1))
    else:
        predictor += _product(rows * hidden, inner, width)
    total = teacher + student + 3 * predictor
    if "C" in case.sizes:
        words = case["C"] * case["S"]
        total += 2 * _product(images * words, case["Dt"], layers * 2 * inner)
        # Query and MLP; scores, attended values, and scores once more for the consistency.
        layer = _product(rows * tokens, inner, 9 * inner)
        layer += 3 * _product(rows * tokens, inner, words)
        total += 3 * layers * layer
    return total


def _tijepa_flops(case: Case, union: int) -> int:
    images, width, inner = case["B"], case["crosser"], case["d"]
    patches, context = _patches(case), case["Kc"]
    frozen = _product(images * patches, 3 * case["patch"] ** 2, case["D"])
    frozen += case["depth"] * _block(images, patches, case["D"])

    def crosser(images: int, tokens: int) -> tuple[int, int]:
        """Forward products whose input takes a gradient, and those whose input takes none."""
        words = case["C"] * case["S"]
        block = _block(images, tokens, width) + 2 * _product(images * tokens, width, width)
        block += 2 * _product(images * tokens, width, words)
        keys_values = 2 * _product(images * words, case["Dt"], width)
        depth = case["crosser_depth"]
        return depth * block, depth * keys_values + _product(images * tokens, case["D"], width)

    def predictor(images: int) -> int:
        tokens = context + union
        blocks = (case["L"] - 1) * _block(images, tokens, inner)
        blocks += _block(images, tokens, inner, skip=context)
        return _product(images * tokens, width, inner) + blocks

    inside, outside = crosser(images, context)
    total = 3 * (inside + predictor(images)) + 2 * outside + sum(crosser(images, patches))
    pairs = min(_METRIC_PAIRS, images)
    if pairs > 1:
        total += sum(crosser(pairs, context)) + sum(crosser(pairs, patches)) + predictor(pairs)
    return total if "cached" in case.sizes else total + frozen


def _t5_flops(case: Case) -> int:
    """The forward pass of T5's encoder: four products of the width, an MLP, attention."""
    return case["T5"] * _block(case["B"] * case["C"], case["S"], case["Dt"])


def _patches(case: Case) -> int:
    return (case["pixels"] // case["patch"]) ** 2


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _block(rows: int, tokens: int, width: int, skip: int = 0) -> int:
    """A transformer block on as many sequences, the first tokens of which are only attended to."""
    out = tokens - skip
    everywhere = _product(rows * tokens, width, 3 * width)
    return everywhere + rows * (_product(out, width, 9 * width) + 2 * _product(out, tokens, width))
