"""AdamW and the moving average of the updated parameters, in one pass."""

from jepa_fast.ops.adamw_ema.api import adamw_ema_

__all__ = ["adamw_ema_"]
