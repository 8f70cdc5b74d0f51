"""Buffers that follow from a module's options alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ConstantBuffers(nn.Module):
    """A module with buffers that no state dict holds, since `constants` makes them.

    `.bfloat16()` and the like leave them as wide as they are: rounded, they would not be those that
    the weights were trained with. Where the module leaves the meta device, by `to_empty` or by
    `load_state_dict(assign=True)`, they are made anew.
    """

    def constants(self) -> dict[str, Tensor]:
        """The buffers by name, on torch's default device."""
        raise NotImplementedError

    def register_constants(self) -> None:
        """Makes the buffers; called once, by a constructor that has set what they follow from."""
        constants = self.constants()
        self._constant_names = tuple(constants)
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)
        self.register_load_state_dict_post_hook(_follow_parameters)

    def make_anew(self, device: torch.device) -> None:
        """Puts the buffers, as made, on a device."""
        with torch.device("cpu"):  # not on what may be the default device: they have values
            constants = self.constants()
        for name, constant in constants.items():
            setattr(self, name, constant.to(device))

    def on_meta(self) -> bool:
        """Whether a buffer has no values."""
        return any(self.get_buffer(name).is_meta for name in self._constant_names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConstantBuffers:
        before = {name: self.get_buffer(name) for name in self._constant_names}
        had_values = not self.on_meta()
        super()._apply(fn, recurse)
        if had_values:
            for name, wide in before.items():
                now = self.get_buffer(name)
                if now.dtype.itemsize < wide.dtype.itemsize:
                    setattr(self, name, wide.to(now.device))
        elif not self.on_meta():
            self.make_anew(self.get_buffer(self._constant_names[0]).device)
        return self


def _follow_parameters(module: nn.Module, _: Any) -> None:
    device = next(module.parameters()).device
    if isinstance(module, ConstantBuffers) and module.on_meta() and device.type != "meta":
        module.make_anew(device)
