"""JEPA's loss: prediction against the teacher's gathered, normalised tokens."""

from jepa_fast.ops.latent_loss.api import latent_loss
from jepa_fast.ops.latent_loss.reference import KINDS

__all__ = ["KINDS", "latent_loss"]
