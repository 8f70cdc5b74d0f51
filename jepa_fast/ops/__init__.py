"""The operators. Each is a folder; its `reference.py` is its specification."""

from jepa_fast.ops._registry import BACKENDS
from jepa_fast.ops.adamw_ema import adamw_ema_
from jepa_fast.ops.affine_coupling import affine_coupling
from jepa_fast.ops.assemble_predictor_tokens import assemble_predictor_tokens
from jepa_fast.ops.draw_block_masks import draw_block_masks
from jepa_fast.ops.ema_update import ema_update_
from jepa_fast.ops.gather_patches import gather_packed, gather_patches
from jepa_fast.ops.latent_loss import latent_loss
from jepa_fast.ops.linear_mixture_nll import linear_mixture_nll
from jepa_fast.ops.masked_linear import masked_linear
from jepa_fast.ops.mixture_nll import (
    mixture_cdf,
    mixture_mean,
    mixture_nll,
    mixture_quantile,
    mixture_responsibilities,
    mixture_sample,
    mixture_variance,
)
from jepa_fast.ops.patch_word_consistency import patch_word_consistency, patch_word_similarity
from jepa_fast.ops.q_sample import denoising_loss, noise_seed, q_sample
from jepa_fast.ops.text_cross_attention import attention_statistics, text_cross_attention

__all__ = [
    "BACKENDS",
    "adamw_ema_",
    "affine_coupling",
    "assemble_predictor_tokens",
    "attention_statistics",
    "denoising_loss",
    "draw_block_masks",
    "ema_update_",
    "gather_packed",
    "gather_patches",
    "latent_loss",
    "linear_mixture_nll",
    "masked_linear",
    "mixture_cdf",
    "mixture_mean",
    "mixture_nll",
    "mixture_quantile",
    "mixture_responsibilities",
    "mixture_sample",
    "mixture_variance",
    "noise_seed",
    "patch_word_consistency",
    "patch_word_similarity",
    "q_sample",
    "text_cross_attention",
]
