"""The predictor's input: context tokens and mask tokens with their positions."""

from jepa_fast.ops.assemble_predictor_tokens.api import assemble_predictor_tokens

__all__ = ["assemble_predictor_tokens"]
