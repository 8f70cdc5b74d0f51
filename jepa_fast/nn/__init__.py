"""Network parts: ViT encoder, predictor, and what the models add to them."""

from jepa_fast._lazy import submodules

__getattr__, __dir__ = submodules(__name__)
