"""Linear layers masked by degrees, for autoregressive networks."""

from jepa_fast.ops.masked_linear.api import masked_linear

__all__ = ["masked_linear"]
