"""Mixture densities: the negative log-likelihood, samples, moments, CDF and quantiles."""

from jepa_fast.ops.mixture_nll.api import (
    check_mixture_options,
    mixture_mean,
    mixture_nll,
    mixture_sample,
    mixture_variance,
)
from jepa_fast.ops.mixture_nll.distribution import (
    mixture_cdf,
    mixture_quantile,
    mixture_responsibilities,
)
from jepa_fast.ops.mixture_nll.reference import (
    component_scale,
    mixture_parameter_count,
    split_mixture_parameters,
)

__all__ = [
    "check_mixture_options",
    "component_scale",
    "mixture_cdf",
    "mixture_mean",
    "mixture_nll",
    "mixture_parameter_count",
    "mixture_quantile",
    "mixture_responsibilities",
    "mixture_sample",
    "mixture_variance",
    "split_mixture_parameters",
]
