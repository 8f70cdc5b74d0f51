"""Optimisation: parameter groups, and AdamW that also moves the teacher."""

from jepa_fast.optim.adamw_ema import AdamWEma
from jepa_fast.optim.groups import parameter_groups
from jepa_fast.optim.teachers import copy_teacher_buffers, teacher_parameters

__all__ = ["AdamWEma", "copy_teacher_buffers", "parameter_groups", "teacher_parameters"]
