"""Ports for servers that tests start."""

from __future__ import annotations

import os
import socket

# Below those that the kernel hands out for outgoing connections: one of them could be taken between now and the bind.
_FIRST, _LAST = 20_000, 32_000
# Processes that test beside each other begin far apart.
_next = _FIRST + os.getpid() * 97 % (_LAST - _FIRST)


def free_port() -> int:
    """A port that nobody listens at, and that no other test of this process was given lately."""
    global _next
    while True:
        _next = _FIRST + (_next + 1 - _FIRST) % (_LAST - _FIRST)
        try:
            with socket.create_server(("127.0.0.1", _next)):
                return _next
        except OSError:
            continue
