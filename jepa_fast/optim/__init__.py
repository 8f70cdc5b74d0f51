"""Optimisation: parameter groups."""

from jepa_fast.optim.groups import parameter_groups

__all__ = ["parameter_groups"]
