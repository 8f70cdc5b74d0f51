"""Checkpoints that survive a crash at any moment and load with `weights_only=True`.

A folder holds `step-<n>.pt` files and `last.pt`, a link to the newest. A file appears under its
name only when it is whole and on the disk; `last.pt` changes in one atomic step. Where the link is
gone, as from a copy without symbolic links, the file of the highest step is the newest.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jepa_fast.errors import CheckpointError

_log = logging.getLogger(__name__)
FORMAT = 1
_OURS = re.compile(r"last\.(pt|tmp)|step-(\d+)\.(pt|tmp)")


def find_last(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder, or None if there is none."""
    link = folder / "last.pt"
    return link if link.exists() else max(_by_step(folder).items(), default=(0, None))[1]


def _by_step(folder: Path) -> dict[int, Path]:
    """The whole checkpoints of a folder."""
    found = ((_OURS.fullmatch(path.name), path) for path in folder.glob("step-*.pt"))
    return {int(match[2]): path for match, path in found if match is not None}


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: made if it does not exist.
        keep: how many checkpoints to keep besides the last.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep
        path.mkdir(parents=True, exist_ok=True)

    @property
    def last(self) -> Path | None:
        """The newest checkpoint's name, or None before the first."""
        return find_last(self.path)

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write `state` atomically, point `last.pt` at it, drop the oldest beyond `keep`.

        Raises:
            CheckpointError: it could not be written, on a full disk for instance. Nothing is left
                of it, and `last.pt` is as it was.
        """
        path = self.path / f"step-{step:09d}.pt"
        unfinished = path.with_suffix(".tmp")
        try:
            with unfinished.open("wb") as file, _checksums():
                torch.save({"format": FORMAT, "step": step, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except Exception as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            if (cause := _why_unwritten(error)) is None:
                raise
            last = self.last
            kept = (
                f"{last} still is the one before; make room on that disk and go on with --resume"
                if last
                else "there is none before it; make room on that disk, or set output=FOLDER"
            )
            raise CheckpointError(
                f"{path} could not be written ({type(cause).__name__}: {cause}); {kept}"
            ) from error
        self._point_last_to(path)
        for old in self._oldest_first()[: -1 - self.keep]:
            old.unlink()
        return path

    def rewind(self, step: int) -> None:
        """Make the checkpoint of `step` the last: a run goes on from it, so later ones are dropped.

        Nothing happens where there is none of that step.
        """
        found = _by_step(self.path)
        if step not in found:
            return
        self._point_last_to(found[step])
        for later in (path for number, path in found.items() if number > step):
            later.unlink()

    def drop_unfinished(self) -> None:
        """Remove what a process that was killed has left of files it was writing."""
        for path in self.path.glob("step-*.tmp"):
            if _OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every checkpoint, whole or unfinished, and nothing else."""
        for path in self.path.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()

    def _oldest_first(self) -> list[Path]:
        # By time, not by step: a run resumed from elsewhere may find newer numbers here.
        return sorted(
            _by_step(self.path).values(), key=lambda path: (path.stat().st_mtime_ns, path.name)
        )

    def _point_last_to(self, path: Path) -> None:
        link = self.path / "last.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, self.path / "last.pt")
        self._sync()

    def _sync(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _checksums() -> Iterator[None]:
    """Whatever else the process has told torch, `check_whole` needs them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _why_unwritten(error: BaseException) -> BaseException | None:
    """What the system, or else torch's zip writer, said; None for what was not about writing."""
    # After an error of the system the writer raises one of its own, about where it is in the file.
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, OSError):
            return each
        each = each.__cause__ or each.__context__
    by_writer = any(name in str(error) for name in ("inline_container", "PytorchStreamWriter"))
    return error if by_writer else None


WEIGHTS = ("step", "config", "model", "frozen")
"""What it takes to use a trained model: a checkpoint cut down to this is half as large or less."""
RUN = (*WEIGHTS, "optimizer", "ranks")
"""What it takes to go on with a run."""


def load_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    only_config: bool = False,
    parts: Sequence[str] = (),
) -> dict[str, Any]:
    """Read a checkpoint of a run.

    Args:
        path: file, or the run's folder.
        device: where its tensors go.
        only_config: leave the tensors on the disk, mapped into memory, and unchecked.
        parts: keys that it must have, such as `WEIGHTS`.

    Raises:
        CheckpointError: there is none, it is damaged, it is not a checkpoint of a run here, or it
            lacks one of `parts`.
    """
    path = Path(path)
    if path.is_dir():
        link, path = path / "last.pt", find_last(path) or path / "last.pt"
        if link.is_symlink() and link != path and not only_config:
            _log.warning("%s leads to %s, which is gone: taking %s", link, link.readlink(), path)
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint at {path}: expected a file, or the output folder of a run with last.pt"
        )
    if not path.stat().st_size:
        raise _unreadable(path, "it is empty")
    if not only_config:
        check_whole(path)
    mapped = only_config and zipfile.is_zipfile(path)  # torch's old format cannot be
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises almost anything on a damaged file
        # Its first sentence alone: others advise to try it without weights_only.
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise _unreadable(path, f"{type(error).__name__}: {why}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of `jepa-fast pretrain` (format {FORMAT}), got "
            f"{'another kind of file' if found is None else f'format {found}'}; weights of other "
            "projects are loaded with jepa_fast.interop"
        )
    if missing := [name for name in parts if name not in state]:
        raise CheckpointError(
            f"{path}: expected a checkpoint with {', '.join(parts)}, as `jepa-fast pretrain` "
            f"writes it, got one without {', '.join(missing)}; take the original, or an older "
            "step-*.pt of the run"
        )
    return state


def check_whole(path: Path) -> None:
    """Compare a file of torch.save with its checksums, which torch.load does not look at.

    Reads the file once: a third of a second a GB. Files in torch's old format have no checksums.

    Raises:
        CheckpointError: what is in the file is not what was written.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except Exception as error:  # as torch.load
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if damaged is not None:
        raise _unreadable(path, f"the checksum of {damaged} in it is wrong")


def _unreadable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({why}); it is damaged or was not written by `jepa-fast pretrain`; "
        "an older step-*.pt beside it may still be whole"
    )


def load_weights(model: nn.Module, state: dict[str, Any]) -> None:
    """Load the model of a checkpoint, wholly.

    Raises:
        CheckpointError: anything missing, unexpected or of another shape; lists it. Or the model's
            frozen encoder is not the one of the run.
    """
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint is of another model: {error}") from None
    if state["frozen"] != frozen_digest(model):
        raise CheckpointError(
            "the frozen encoder has other weights now than when the checkpoint was written; name "
            "the old ones by model.encoder_weights, or train anew"
        )


def frozen_digest(model: nn.Module) -> str | None:
    """SHA-256 of the weights that the model's state dict leaves out; None if it holds them all."""
    saved = model.state_dict().keys()
    left_out = [(name, p) for name, p in model.named_parameters() if name not in saved]
    if not left_out:
        return None
    digest = hashlib.sha256()
    for name, p in left_out:
        digest.update(name.encode())
        digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def rng_state() -> dict[str, Any]:
    """State of every global random generator a training step may draw from."""
    version, words, gauss = random.getstate()
    generator: Any = np.random.get_state()
    name, key, *place = generator
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [name, key.tolist(), *place],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since `rng_state()` gave `state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"].cpu())
    np.random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
