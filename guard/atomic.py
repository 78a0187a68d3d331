"""A file appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from guard.errors import InputError


def check_destination(path: Path, error: type[InputError]) -> None:
    """Raise `error` when a file cannot be written to `path`: asked before hours of work, not after."""
    if path.is_dir():
        raise error(f"{path}: is a folder; expected the name of a file to write")
    if not path.parent.is_dir():
        raise error(f"{path}: folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise error(f"{path}: folder {path.parent} cannot be written to")


def write_atomically(path: Path, content: bytes, error: type[InputError], mode: int = 0o644) -> None:
    """Write `content` to `path` by way of a temporary file in the same folder.

    A reader sees the old file or the new one; a crash, a full disk or an interrupt leaves the old one. Raises `error`
    when the folder is absent or cannot be written to.
    """
    check_destination(path, error)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes private files; a bank is read by the server and the worker, often as other users.
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as cause:
        raise error(f"{path}: cannot be written: {cause.strerror or cause}") from cause
