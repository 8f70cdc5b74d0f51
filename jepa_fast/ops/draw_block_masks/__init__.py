"""I-JEPA's multi-block masks, drawn from counters."""

from jepa_fast.ops.draw_block_masks.api import draw_block_masks

__all__ = ["draw_block_masks"]
