"""A linear layer and the mixture likelihood of what it predicts, in one."""

from jepa_fast.ops.linear_mixture_nll.api import linear_mixture_nll

__all__ = ["linear_mixture_nll"]
