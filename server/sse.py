"""Server-sent events, read incrementally. Sans-I/O.

    parser = EventParser()
    for event in parser.feed(received): ...

Lines end with LF or CRLF. However the bytes are split, the same events come out.
"""

from __future__ import annotations

from dataclasses import dataclass

DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Event:
    """One `data` event, or one comment line."""

    data: bytes | None
    """The lines of `data:`, joined by LF; None for a comment."""
    raw: bytes
    """The bytes as they came: all lines of the event and its blank line, without comments in between."""

    @property
    def comment(self) -> bytes | None:
        """The comment line without its end, colon included; None for a data event."""
        return self.raw.rstrip(b"\r\n") if self.data is None else None


class EventParser:
    """Bytes in, events out. Keeps only what does not make a whole event yet."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._lines: list[bytes] = []
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[Event]:
        """The events that `received` completes."""
        if not (self._rest or self._lines) and (event := _plain(received)) is not None:
            return [event]
        events: list[Event] = []
        searched = len(self._rest)
        self._rest += received
        start = 0
        while (end := self._rest.find(b"\n", max(start, searched))) >= 0:
            event = self._line(bytes(self._rest[start : end + 1]))
            if event is not None:
                events.append(event)
            start = end + 1
        del self._rest[:start]
        return events

    def _line(self, raw: bytes) -> Event | None:
        line = raw[:-2] if raw.endswith(b"\r\n") else raw[:-1]
        if line.startswith(b":"):
            return Event(None, raw)
        self._lines.append(raw)
        if line:
            field, _, value = line.partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        event = Event(b"\n".join(self._data), b"".join(self._lines)) if self._data else None
        self._lines.clear()
        self._data.clear()
        return event


def _plain(received: bytes) -> Event | None:
    """What nearly every read of a stream is: one event of one `data` line, ended by LF. None for anything else."""
    if received.startswith(b"data: ") and received.find(b"\n") == len(received) - 2 and received.endswith(b"\n\n"):
        return Event(received[6:-2], received) if b"\r" not in received else None
    return None
