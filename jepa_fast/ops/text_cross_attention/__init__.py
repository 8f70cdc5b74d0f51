"""Cross-attention from patches to the words of several captions, with its sparsity term."""

from jepa_fast.ops.text_cross_attention.api import attention_statistics, text_cross_attention

__all__ = ["attention_statistics", "text_cross_attention"]
