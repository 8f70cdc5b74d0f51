"""Checkpoints of the public implementations: read, refuse or load, and write back.

A checkpoint is a dictionary of *parts*, each a state dict: ``encoder``, ``predictor`` and
``target_encoder`` for I-JEPA, ``context_crosser``, ``target_crosser`` and ``predictor`` for
TI-JEPA. Our networks carry the public parameter names, so nothing is renamed;
wrappers' prefixes (``module.`` of DistributedDataParallel, ``_orig_mod.`` of torch.compile) are
taken off.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jepa_fast.errors import CheckpointError
from jepa_fast.models.ijepa import IJepa
from jepa_fast.models.probijepa import ProbIJepa
from jepa_fast.models.tijepa import TIJepa

Source = str | Path | Mapping[str, Any]
"""A checkpoint file, or what it holds."""

IJEPA_PARTS = ("encoder", "predictor", "target_encoder")
TIJEPA_PARTS = ("context_crosser", "target_crosser", "predictor")
# What torch says of objects that weights_only=True refuses, as opposed to bytes it cannot read.
_NEEDS_CODE = re.compile("GLOBAL |allowlisted|TorchScript archives")
_BLOCK = re.compile(r"(?:predictor_)?blocks\.(\d+)\.")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")

_log = logging.getLogger(__name__)


def load_ijepa(model: IJepa, source: Source) -> None:
    """Load a public I-JEPA checkpoint into ``model``, whole or not at all.

    What such a checkpoint has no weights for, :class:`~jepa_fast.models.tcjepa.TCJepa`'s
    conditioner or :class:`~jepa_fast.models.probijepa.ProbIJepa`'s head, stays as it is; a warning
    is logged.

    Args:
        model: built with the checkpoint's sizes. A ``ProbIJepa`` has no last projection in its
            predictor, so that the checkpoint's is left out.
        source: file (see :func:`read_checkpoint`) or dictionary with ``encoder``, ``predictor`` and
            ``target_encoder``. Other entries (optimizer, epoch) are left alone. To take one network
            only, call :func:`load_parts`, for instance with ``{"target_encoder": my_encoder}``.

    Raises:
        TypeError: ``model`` is no ``IJepa``, or ``source`` no checkpoint.
        FileNotFoundError: no such file.
        CheckpointError: anything missing, unexpected or of another shape; lists all of it. Or an
            unreadable file, see :func:`read_checkpoint`.
    """
    model = getattr(model, "_orig_mod", model)  # within torch.compile(model)
    if not isinstance(model, IJepa):
        part = "model.encoder" if isinstance(model, TIJepa) else "encoder"
        raise TypeError(
            f"model: expected an IJepa (ProbIJepa and TCJepa are), got {type(model).__name__}; to "
            f'load an image encoder call load_parts({{"target_encoder": {part}}}, path)'
        )
    checkpoint = _read_source(source)
    predictor = checkpoint.get("predictor")
    if isinstance(model, ProbIJepa) and isinstance(predictor, Mapping):
        predictor = _without_wrapper_prefix(predictor)
        for name in ("predictor_proj.weight", "predictor_proj.bias"):
            predictor.pop(name, None)
        checkpoint = {**checkpoint, "predictor": predictor}
    load_parts({name: getattr(model, name) for name in IJEPA_PARTS}, checkpoint)
    others = [name for name, _ in model.named_children() if name not in IJEPA_PARTS]
    if others:
        _log.warning(
            "the checkpoint holds no %s: that of the %s stays as it was",
            ", ".join(others),
            type(model).__name__,
        )


def export_ijepa(model: IJepa, prefix: str = "") -> dict[str, dict[str, Tensor]]:
    """The public I-JEPA form of a model's weights.

    Args:
        model: its tensors are shared, not copied.
        prefix: before every parameter name; ``"module."`` is what the public training script wants.

    Returns:
        ``{"encoder": .., "predictor": .., "target_encoder": ..}``, for :func:`save_checkpoint`.
    """
    return _export(model, IJEPA_PARTS, prefix)


def load_tijepa(model: TIJepa, source: Source) -> None:
    """Load a public TI-JEPA checkpoint into ``model``, whole or not at all.

    The frozen encoders are not part of such checkpoints; the image encoder is a public I-JEPA's
    ``target_encoder``, see :func:`load_parts`. Public checkpoints were trained on words that were
    normalised over the sequence, see :class:`~jepa_fast.interop.text.TextEncoder`.

    Args:
        model: built with the checkpoint's sizes, heads and block kind, objective masked image. The
            number of heads leaves no trace in a checkpoint, so a wrong one goes unnoticed.
        source: file (see :func:`read_checkpoint`) or dictionary with ``context_crosser``,
            ``target_crosser`` and ``predictor``. Other entries are left alone. For files that hold
            the ``target_crosser`` only, call :func:`load_parts`.

    Raises:
        ValueError: the model has the cross-modal objective.
        CheckpointError: anything missing, unexpected or of another shape; lists all of it.
    """
    _check_masked_image(model)
    load_parts({name: getattr(model, name) for name in TIJEPA_PARTS}, source)


def export_tijepa(model: TIJepa, prefix: str = "") -> dict[str, dict[str, Tensor]]:
    """The public TI-JEPA form of a model's weights.

    Args:
        model: objective masked image; its tensors are shared, not copied.
        prefix: before every parameter name.

    Returns:
        ``{"context_crosser": .., "target_crosser": .., "predictor": ..}``, for
        :func:`save_checkpoint`.

    Raises:
        ValueError: the model has the cross-modal objective.
    """
    _check_masked_image(model)
    return _export(model, TIJEPA_PARTS, prefix)


def load_parts(parts: Mapping[str, nn.Module], source: Source) -> None:
    """Load each named part of a checkpoint into a module; change nothing unless all of it fits.

    Args:
        parts: module by part name. Parts of the checkpoint that are not named here are left alone.
        source: checkpoint file, or dictionary of state dicts by part name.

    Raises:
        TypeError: ``source`` is neither.
        CheckpointError: a part or an entry is missing, unexpected or of another shape; lists all.
    """
    checkpoint = _read_source(source)
    states: dict[str, dict[str, Any]] = {}
    depths = ""
    missing, unexpected, reshaped = [], [], []
    for part, module in parts.items():
        state = checkpoint.get(part)
        if not isinstance(state, Mapping):
            missing.append(f"{part} (the whole part)")
            continue
        states[part] = state = _without_wrapper_prefix(state)
        wanted = module.state_dict()
        theirs, ours = _depth(state), _depth(wanted)
        if theirs and ours and theirs != ours:
            option = "predictor_depth" if part == "predictor" else "depth"
            depths += f"its {part} has depth {theirs}, the model's {ours}: {option}={theirs}; "
        missing += [f"{part}.{name}" for name in wanted if name not in state]
        unexpected += [f"{part}.{name}" for name in state if name not in wanted]
        reshaped += [
            f"{part}.{name}: expected {_shape(wanted[name])}, got {_shape(value)}"
            for name, value in state.items()
            if name in wanted and _shape(value) != _shape(wanted[name])
        ]
    report = [
        f"{title} ({len(entries)}):\n" + "\n".join(f"  {entry}" for entry in entries)
        for title, entries in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
        )
        if entries
    ]
    if report:
        wrong_parts = ""
        if len(states) < len(parts):
            found = ", ".join(map(str, checkpoint)) or "nothing"
            wrong_parts = f"expected the parts {', '.join(parts)}, got {found}; "
        raise CheckpointError(
            f"the checkpoint does not fit; {depths}{wrong_parts}nothing was loaded. Build the "
            "model with the checkpoint's sizes, or name only the parts to load.\n"
            + "\n".join(report)
        )
    for part, module in parts.items():
        # A module on the meta device has no storage to copy into: it takes the tensors themselves.
        on_meta = any(p.is_meta for p in module.parameters())
        module.load_state_dict(states[part], assign=on_meta)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file without running any code of it.

    Args:
        path: ``.safetensors`` with names ``<part>.<parameter>``, or a ``torch.save`` file, which is
            read with ``weights_only=True``.

    Returns:
        Dictionary of parts, on the CPU.

    Raises:
        FileNotFoundError: no such file; any other OSError of opening it.
        CheckpointError: it is truncated, empty or of another format, holds other objects than
            tensors and plain values, or is no dictionary.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
    safetensors = _safetensors() if path.suffix == ".safetensors" else None
    try:
        if safetensors is not None:
            return _split_parts(safetensors.load_file(path))
        # Mapped where the format allows: public checkpoints carry optimizer states of many GB.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # what broken bytes make of a reader has no common type
        if _NEEDS_CODE.search(str(error)):
            raise CheckpointError(
                f"{path}: expected tensors and plain values only, got a file that needs arbitrary "
                "objects to load, which could run code; save its state dicts alone and try again"
            ) from error
        form = "torch.save" if safetensors is None else "safetensors"
        raise CheckpointError(
            f"{path}: expected a {form} file, got {size} bytes that are not a readable checkpoint: "
            "truncated, empty or another format (such as a web page or a Git LFS pointer); fetch "
            "the file again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary of parts, got {type(content).__name__}; "
            "save {'encoder': encoder.state_dict(), ...}"
        )
    return content


def save_checkpoint(parts: Mapping[str, Mapping[str, Tensor]], path: str | Path) -> None:
    """Write parts for :func:`read_checkpoint`: safetensors by that suffix, else ``torch.save``."""
    path = Path(path)
    if path.suffix == ".safetensors":
        flat = {
            f"{part}.{name}": value.contiguous()
            for part, state in parts.items()
            for name, value in state.items()
        }
        _safetensors().save_file(flat, path)
    else:
        torch.save({part: dict(state) for part, state in parts.items()}, path)


def _export(model: nn.Module, parts: tuple[str, ...], prefix: str) -> dict[str, dict[str, Tensor]]:
    return {
        part: {prefix + name: value for name, value in getattr(model, part).state_dict().items()}
        for part in parts
    }


def _check_masked_image(model: TIJepa) -> None:
    if model.objective != "masked_image":
        raise ValueError(
            f"model: expected objective='masked_image', got {model.objective!r}; the public code "
            "has no other, so save and load this model's state_dict()"
        )


def _read_source(source: Source) -> Mapping[str, Any]:
    if not isinstance(source, (str, Path, Mapping)):
        raise TypeError(
            "source: expected the path of a checkpoint file or a dictionary of state dicts by "
            f"part name, got {type(source).__name__}; pass read_checkpoint(path) or {{part: state}}"
        )
    return source if isinstance(source, Mapping) else read_checkpoint(source)


def _depth(state: Mapping[str, Any]) -> int:
    """How many blocks the names are of."""
    return len({match[1] for name in state if (match := _BLOCK.match(name))})


def _split_parts(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, value in flat.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts


def _without_wrapper_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """Names without the wrappers' prefixes, where every name carries them."""
    stripped = dict(state)
    while stripped:
        prefix = next(
            (p for p in _WRAPPER_PREFIXES if all(n.startswith(p) for n in stripped)), None
        )
        if prefix is None:
            break
        stripped = {name.removeprefix(prefix): value for name, value in stripped.items()}
    return stripped


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            'safetensors files need safetensors: pip install "jepa-fast[train]"'
        ) from error
    return safetensors.torch
