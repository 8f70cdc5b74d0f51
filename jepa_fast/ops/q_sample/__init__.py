"""Noised targets of diffusion and flow matching, and the loss of what is predicted of them."""

from jepa_fast.ops.q_sample.api import denoising_loss, noise_seed, q_sample

__all__ = ["denoising_loss", "noise_seed", "q_sample"]
