"""When a file that was changed is to be read. Sans-I/O.

settled = Settled(look)
if settled.see(look):       # every second
    read what is there
"""

from __future__ import annotations

from collections.abc import Hashable


class Settled:
    """Editors write in several steps, and whoever copies a file writes it bit by bit: what is seen has to be the same
    in two looks in a row before it is taken."""

    def __init__(self, read: Hashable) -> None:
        """`read`: what stood there when it was read last."""
        self._read = self._last = read

    def see(self, seen: Hashable) -> bool:
        """Whether this is new and has stood still. Then it counts as read, whatever becomes of it."""
        still, self._last = seen == self._last, seen
        if not still or seen == self._read:
            return False
        self._read = seen
        return True

    def read(self, seen: Hashable) -> None:
        """It was read at another time, and this stood there."""
        self._read = self._last = seen
