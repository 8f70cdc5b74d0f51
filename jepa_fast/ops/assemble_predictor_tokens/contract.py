"""Schemas, fakes and backends of `assemble_predictor_tokens`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jepa_fast.ops._checks import check_index_range, only_kernel_dtypes
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.assemble_predictor_tokens import reference


def _fake(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_index: Tensor,
    target_index: Tensor,
) -> Tensor:
    return reference.empty_tokens(context, mask_token, pos_embed, target_index)


def _reference(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_index: Tensor,
    target_index: Tensor,
) -> Tensor:
    patches = pos_embed.shape[0]
    check_index_range("assemble_predictor_tokens", "context_index", context_index, patches)
    check_index_range("assemble_predictor_tokens", "target_index", target_index, patches)
    return reference.assemble_predictor_tokens(
        context, mask_token, pos_embed, context_index, target_index
    )


def _fake_backward(
    grad: Tensor, context_index: Tensor, target_index: Tensor, patches: int, needs: Sequence[bool]
) -> list[Tensor]:
    width = grad.shape[-1]
    shapes = ((*context_index.shape, width), (width,), (patches, width))
    return [grad.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]


def _unsupported(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_index: Tensor,
    target_index: Tensor,
) -> list[str]:
    return only_kernel_dtypes(context, mask_token, pos_embed)


def _unsupported_backward(grad: Tensor, *rest: object) -> list[str]:
    return only_kernel_dtypes(grad)


_FOLDER = "jepa_fast.ops.assemble_predictor_tokens"
FORWARD = Operator(
    "assemble_predictor_tokens(Tensor context, Tensor mask_token, Tensor pos_embed, "
    "Tensor context_index, Tensor target_index, str backend) -> Tensor",
    fake=_fake,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:assemble_predictor_tokens", _unsupported),
        "cpu": Backend(f"{_FOLDER}.native:assemble_predictor_tokens", _unsupported),
        "reference": Backend(f"{__name__}:_reference"),
    },
)
BACKWARD = Operator(
    "assemble_predictor_tokens_backward(Tensor grad, Tensor context_index, Tensor target_index, "
    "SymInt patches, bool[] needs, str backend) -> Tensor[]",
    fake=_fake_backward,
    backends={
        "triton": Backend(
            f"{_FOLDER}.triton:assemble_predictor_tokens_backward", _unsupported_backward
        ),
        "cpu": Backend(
            f"{_FOLDER}.native:assemble_predictor_tokens_backward", _unsupported_backward
        ),
        "reference": Backend(f"{reference.__name__}:assemble_predictor_tokens_backward"),
    },
)
