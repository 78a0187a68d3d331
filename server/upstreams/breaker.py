"""When an engine that fails is left alone, and when it is tried again. Sans-I/O.

breaker.failed(); breaker.succeeded()          what became of requests
if breaker.open: ... breaker.probed(well)      what became of a request of our own
"""

from __future__ import annotations

FAILURES = 5
"""In a row, after which an engine gets no requests."""
_FIRST_S = 1.0
_LONGEST_S = 30.0


class Breaker:
    """Closed until several requests in a row failed; then open until a probe of our own comes through.

    No client's request is the probe: one that kills engines would else be handed to each that comes back, and who
    sends many that fail could keep an engine that is well out of use.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._probes = 0
        self.open = False

    def failed(self) -> bool:
        """A request failed; True where that opens it."""
        self._failures += 1
        opens = not self.open and self._failures >= FAILURES
        self.open = self.open or opens
        return opens

    def succeeded(self) -> None:
        """A request was answered. One that began before it opened does not close it."""
        if not self.open:
            self._failures = 0

    def probed(self, well: bool) -> float | None:
        """A probe ended. Seconds until the next one is due; None where none is."""
        if well:
            self._failures = self._probes = 0
            self.open = False
            return None
        self._probes += 1
        return min(_LONGEST_S, _FIRST_S * 2.0 ** min(self._probes - 1, 16))
