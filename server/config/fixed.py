"""What of the settings holds from start to end: addresses, engines, and whatever else is opened once. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from server.config.document import shown
from server.config.settings import Settings

LIVE = frozenset({"version", "access", "policy", "policies", "rules", "endpoints", "limits", "log", "reload"})
"""Sections that can change while the server runs. What is not named here cannot: a section that is new is safe."""

FIXED: frozenset[tuple[str, ...]] = frozenset(
    {("limits", "header_timeout_s"), ("limits", "max_header_bytes"), ("limits", "max_connections")}
)
"""Keys of those that cannot all the same."""


def moved(held: Settings, wanted: Settings) -> list[str]:
    """What cannot become what is wanted while the server runs: one line a key, with both values."""
    before, after = held.model_dump(mode="json"), wanted.model_dump(mode="json")
    return [
        f"`{'.'.join(path)}`: found {shown(path, new)}; expected {shown(path, old)}, as the server was started with: "
        "it cannot change while it runs"
        for path, old, new in _differences((), before, after)
        if path[0] not in LIVE or path in FIXED
    ]


def _differences(path: tuple[str, ...], old: Any, new: Any) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Every leaf that is not the same; what only one of them has, whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences((*path, str(key)), old.get(key), new.get(key))
    elif old != new:
        yield path, old, new
