"""Fused exponential moving average over lists of parameters."""

from jepa_fast.ops.ema_update.api import ema_update_

__all__ = ["ema_update_"]
