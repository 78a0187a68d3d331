"""Settings files as they lie on disk."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path

from guard.errors import ConfigError

_MOST_BYTES = 4 * 2**20
"""Anything larger is another file."""


def read_file(path: Path) -> tuple[str, str]:
    """Its text, and the SHA-256 of its bytes. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path}: more than {_MOST_BYTES} bytes; expected settings")
    try:
        return content.decode("utf-8"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error


def can_be_read_again(path: Path) -> bool:
    """False for a pipe, such as a shell's `<(...)`: who reads it a second time waits for ever. True where there is
    nothing: then reading says so."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def look(paths: Iterable[Path]) -> tuple[str, ...]:
    """What stands in each file: its SHA-256, or why it cannot be read. Links are followed to wherever they lead now."""
    return tuple(map(_look, paths))


def _look(path: Path) -> str:
    if not can_be_read_again(path):
        return "special"
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"errno {error.errno}"
