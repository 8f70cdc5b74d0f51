"""JEPA's loss: prediction against the teacher's gathered, normalised tokens."""

from jepa_fast.ops.latent_loss.api import latent_loss

__all__ = ["latent_loss"]
