"""Fixed 2-D sine-cosine position embeddings, as the public I-JEPA uses them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_position_embedding(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed position embedding of every patch of a grid, in raster order.

    The first half of the channels encodes the column, the second half the row; each half is
    ``[sin(p w_0), .., sin(p w_n), cos(p w_0), .., cos(p w_n)]``, ``w_i = 10000 ** (-4 i / dim)``
    (arXiv 2301.08243, appendix A; the frequencies are those of "Attention Is All You Need").

    Args:
        dim: channels, a multiple of 4.
        grid: (H, W) patches.

    Returns:
        ``[H * W, dim]`` float32, computed in float64.

    Raises:
        ValueError: ``dim`` is not a multiple of 4, or a side of ``grid`` is not positive.
    """
    if dim <= 0 or dim % 4:
        raise ValueError(
            f"dim: expected a positive multiple of 4 (sine and cosine of two axes), got {dim}; "
            "choose an embedding width divisible by 4"
        )
    height, width = grid
    if height < 1 or width < 1:
        raise ValueError(
            f"grid: expected at least one patch a side, got {tuple(grid)}; "
            "make the image at least as large as a patch"
        )
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    angles = torch.stack([columns, rows])[:, :, None] * frequency  # [2, N, dim / 4]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [2, N, dim / 2]
    return torch.cat([embedding[0], embedding[1]], dim=-1).float()


def interpolate_position_embedding(
    embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Position embedding resampled (bicubic) from one grid to another.

    Args:
        embedding: ``[1, H * W, D]`` in raster order.
        grid: (H, W) that ``embedding`` was made for.
        new_grid: (H', W') wanted.

    Returns:
        ``[1, H' * W', D]`` in the dtype of ``embedding``; ``embedding`` itself if the grids agree.
    """
    if tuple(grid) == tuple(new_grid):
        return embedding
    image = embedding.float().unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, H, W]
    image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2).to(embedding.dtype)
