"""How much the patch-word similarities differ between the layers of a predictor."""

from jepa_fast.ops.patch_word_consistency.api import (
    patch_word_consistency,
    patch_word_similarity,
)

__all__ = ["patch_word_consistency", "patch_word_similarity"]
