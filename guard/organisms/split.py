"""Which texts training may see: decided by the text itself, so that no seed or count can mix the two."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "heldout"]

HELD_OUT_OF_256 = 72


def split_of(text: str) -> Split:
    """The side of a bare question (no opener, no suffix) or of a suffix."""
    return "heldout" if hashlib.sha256(text.encode()).digest()[0] < HELD_OUT_OF_256 else "train"
