"""Weights and models from elsewhere: public checkpoints, transformers, timm.

Importing it needs none of these packages.
"""

from jepa_fast.interop.checkpoints import (
    export_ijepa,
    export_tijepa,
    load_ijepa,
    load_parts,
    load_tijepa,
    read_checkpoint,
    save_checkpoint,
)
from jepa_fast.interop.text import TextEncoder, load_text_encoder
from jepa_fast.interop.timm import TimmEncoder, from_timm
from jepa_fast.interop.transformers import (
    TransformersEncoder,
    from_transformers,
    load_transformers_state,
    to_transformers,
)

__all__ = [
    "TextEncoder",
    "TimmEncoder",
    "TransformersEncoder",
    "export_ijepa",
    "export_tijepa",
    "from_timm",
    "from_transformers",
    "load_ijepa",
    "load_parts",
    "load_text_encoder",
    "load_tijepa",
    "load_transformers_state",
    "read_checkpoint",
    "save_checkpoint",
    "to_transformers",
]
