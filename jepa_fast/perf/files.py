"""Writing results: a file is there whole, or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `path` in one step: whoever reads it sees the old content or the new one.

    A link stays, and the file that it leads to is written; so does what is no file, such as
    `/dev/stdout` or a pipe.

    Raises:
        OSError: the folder cannot be made or written; an earlier file stays as it was.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(partial, 0o666 & ~mask)  # mkstemp's files are for their owner alone
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def check_target(file: Path) -> None:
    """Raises OSError if `file` is a folder, or no file can be made where it lies.

    What is there and no file, such as `/dev/stdout` or a pipe, has to be writable itself.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder, expected a file")
    if not file.exists() or file.is_file():
        check_writable(file.resolve().parent)
    elif not os.access(file, os.W_OK):
        raise PermissionError(f"nothing can be written to {file}")


def check_writable(folder: Path) -> None:
    """Raises OSError if no file can be made in `folder`, or in what it would be made in.

    One is made there, and deleted: permissions do not tell of quotas, of a full disk, or of /proc.
    """
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is not a folder")
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".", suffix=".partial") as file:
            file.write(b"\0")  # a first block, which a quota may not leave
            file.flush()
    except OSError as error:
        raise OSError(f"nothing can be written to {there}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, keys in the order given. Raises as `write_text`."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
