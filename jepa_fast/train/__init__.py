"""Training: configuration, schedules, the loop, checkpoints, logs."""

from jepa_fast._lazy import submodules

__getattr__, __dir__ = submodules(__name__)
