"""What the database could not take, in a file until it can. Blocking.

One JSON line per incident, on the disk when `append` returns. Lines are removed only after the database has them; where
the process dies in between, they are written twice, and the database knows an incident by its id.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from guard.errors import ConfigError
from server.incidents.incident import Incident


class Spool:
    """The file, locked for as long as the process runs."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        """Raises ConfigError where it cannot be written, or another server has it."""
        self.path = path
        self._most_bytes = most_bytes
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise ConfigError(
                f"`incidents.spool`: {path} cannot be written: {error.strerror}; expected a place that can, or null"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise ConfigError(
                f"`incidents.spool`: another server has {path}; expected a file of this server's own"
            ) from None
        self._mend()

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._file).st_size

    def append(self, incidents: Sequence[Incident]) -> int:
        """Put them on the disk, as many as there is room for, the first ones; returns how many. Raises OSError, and
        then none of them is there."""
        before = size = self.size
        taken: list[bytes] = []
        for incident in incidents:
            line = incident.model_dump_json().encode() + b"\n"
            if size + len(line) > self._most_bytes:
                break
            size += len(line)
            taken.append(line)
        if taken:
            try:
                _write_all(self._file, b"".join(taken))
                os.fsync(self._file)
            except OSError:
                # Half a line would be read as none, but the next one would follow on it.
                os.ftruncate(self._file, before)
                raise
        return len(taken)

    def read(self, chunk: int = 500) -> Iterator[list[Incident]]:
        """All of them, some at a time, the oldest first. A line that is none is left out."""
        with self.path.open("rb") as file:
            found: list[Incident] = []
            for line in file:
                try:
                    found.append(Incident.model_validate_json(line))
                except ValidationError:
                    continue
                if len(found) == chunk:
                    yield found
                    found = []
            if found:
                yield found

    def clear(self) -> None:
        """The database has them all. Raises OSError."""
        os.ftruncate(self._file, 0)
        os.fsync(self._file)

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._file)

    def _mend(self) -> None:
        """Take away half a line that a crash left at the end."""
        size = self.size
        if not size:
            return
        with self.path.open("rb") as file:
            end = file.read(size).rfind(b"\n") + 1
        if end != size:
            os.ftruncate(self._file, end)


def _write_all(file: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
