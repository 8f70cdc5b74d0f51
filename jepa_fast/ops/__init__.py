"""The operators. Each is a folder; its `reference.py` is its specification."""

from jepa_fast.ops._registry import BACKENDS
from jepa_fast.ops.ema_update import ema_update_
from jepa_fast.ops.gather_patches import gather_patches

__all__ = ["BACKENDS", "ema_update_", "gather_patches"]
