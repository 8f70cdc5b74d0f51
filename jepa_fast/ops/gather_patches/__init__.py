"""Masked-block gather: patches out of every image by index."""

from jepa_fast.ops.gather_patches.api import gather_packed, gather_patches

__all__ = ["gather_packed", "gather_patches"]
