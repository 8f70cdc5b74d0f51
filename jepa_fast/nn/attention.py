"""Pre-LN transformer blocks; parameter names are those of the public I-JEPA state dict."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast.nn.linear import Linear
from jepa_fast.nn.precision import without_autocast

if TYPE_CHECKING:
    from jepa_fast.nn.packed import Sequences


def check_heads(
    heads: int,
    dim: int,
    heads_name: str = "num_heads",
    dim_name: str = "the width",
    default: str = "",
) -> None:
    """Refuse heads that do not divide the width; the names are those that the user passed them by.

    ``default`` says where a number of heads comes from that the user did not pass.

    Raises:
        TypeError: ``heads`` is no integer.
        ValueError: ``heads`` is not positive, or does not divide ``dim``.
    """
    if not isinstance(heads, Integral):
        raise TypeError(f"{heads_name}: expected an integer, got {heads!r}")
    if heads < 1 or dim % heads:
        raise ValueError(
            f"{heads_name}: expected a positive divisor of {dim_name} {dim}, got {heads}{default}; "
            "change the head count or the width"
        )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, by the kernel that is fast where it runs.

    On the CPU a backward pass in half precision takes torch 2.11 to 2.15 five times as long as in
    float32, so there it runs in float32.

    Args:
        q: ``[B, heads, T, head dim]``.
        k, v: ``[B, heads, S, head dim]``.
        mask: bool, True where to attend, broadcast to ``[B, heads, T, S]``; None: everywhere, which
            keeps the fastest path.

    Returns:
        ``[B, heads, T, head dim]`` in the dtype of ``q``.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    if half and q.device.type == "cpu" and torch.is_grad_enabled():
        with without_autocast(q):
            attended = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
        return attended.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask)


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value projection.

    Args:
        dim: token width.
        num_heads: heads; must divide ``dim``.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(num_heads, dim)
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        skip: int = 0,
        sequences: Sequences | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: ``[B, T, dim]``, or packed ``[T, dim]``.
            key_mask: ``[B, T]`` bool, False where a token must not be attended to.
            skip: leading tokens that are attended to, but whose own outputs nobody needs.
            sequences: where packed tokens' sequences begin; the two above are then not read.
            rows: ``[R]`` int64, the packed tokens whose outputs are needed; None: all.

        Returns:
            ``[B, T - skip, dim]``; packed ``[T, dim]`` or ``[R, dim]``.
        """
        if sequences is not None:
            return self._packed(x, sequences, rows)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, heads, dim / heads]
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, heads, T, dim / heads]
        mask = None if key_mask is None else key_mask[:, None, None, :]
        attended = attend(q[:, :, skip:], k, v, mask)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def _packed(self, x: Tensor, sequences: Sequences, rows: Tensor | None) -> Tensor:
        from jepa_fast import ops
        from jepa_fast.nn.packed import attend_packed

        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        attended = attend_packed(q, k, v, sequences).flatten(1)
        return self.proj(attended if rows is None else ops.gather_packed(attended, rows))


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim]`` to ``[..., dim]``."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-LN residual block: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``.

    Args:
        dim: token width.
        num_heads: attention heads; must divide ``dim``.
        mlp_ratio: hidden width of the MLP over ``dim``.
        eps: epsilon of both LayerNorms.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        # Rounded down, as the public code does, but not because a ratio like 48 / 11 is inexact.
        self.mlp = Mlp(dim, int(round(dim * mlp_ratio, 6)))

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        skip: int = 0,
        sequences: Sequences | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Arguments and result as those of :meth:`Attention.forward`."""
        from jepa_fast import ops

        attended = self.attn(self.norm1(x), key_mask, skip, sequences, rows)
        if sequences is None:
            x = x[:, skip:]
        elif rows is not None:
            x = ops.gather_packed(x, rows)
        x = x + attended
        return x + self.mlp(self.norm2(x))
