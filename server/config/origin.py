"""The file that settings were read from, and how it is read again.

settings, origin = open_settings(path, parse)
again, digest = origin.read()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from guard.errors import ConfigError
from server.config.file import can_be_read_again, look, read_file
from server.config.settings import Settings


@dataclass(frozen=True, slots=True)
class Origin:
    """A settings file, and what makes settings of its text: the environment and the command line are in that."""

    path: Path
    parse: Callable[[str], Settings]
    """Raises ConfigError."""
    seen: tuple[str, ...]
    """What stood in the file and in those that it names, as `look` tells it, when the server started."""

    @property
    def sha256(self) -> str:
        """Of the file's bytes then."""
        return self.seen[0]

    def read(self) -> tuple[Settings, str]:
        """What the file says now, and the digest of its bytes. Raises ConfigError."""
        if not can_be_read_again(self.path):
            raise ConfigError(f"{self.path}: is no regular file; expected one, to be read while the server runs")
        text, sha256 = read_file(self.path)
        return self.parse(text), sha256


def open_settings(path: Path, parse: Callable[[str], Settings]) -> tuple[Settings, Origin | None]:
    """Settings, and where they can be read again; None where they came through a pipe. Raises ConfigError."""
    again = can_be_read_again(path)
    text, sha256 = read_file(path)
    settings = parse(text)
    return settings, Origin(path, parse, (sha256, *look(settings.files))) if again else None
