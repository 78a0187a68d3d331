"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$UNDERTOW_CACHE`, else `$XDG_CACHE_HOME/undertow`, else `~/.cache/undertow`."""
    if own := os.environ.get("UNDERTOW_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "undertow"
