"""Affine couplings of normalising flows: forward, inverse, log-determinant."""

from jepa_fast.ops.affine_coupling.api import affine_coupling

__all__ = ["affine_coupling"]
