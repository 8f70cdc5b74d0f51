"""The models: each file reads like its paper."""

from jepa_fast._lazy import submodules

__getattr__, __dir__ = submodules(__name__)
