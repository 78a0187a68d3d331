"""Which slots of the KV cache hold what was computed under steering, and whose it is.

vLLM finds a block again by the tokens in it, and does not know that one was steered. A request that takes it would be
steered along, and nothing that it computes would be the model's own; a steered request that takes another's is steered
no more. The server gives every request that may be steered a salt of its own, so that nobody finds its blocks. This is
what holds where a request came without one: whoever reads another's steered KV is known, and does not pass.
"""

from __future__ import annotations

import torch

UNKNOWN = -1


class Taint:
    """One number per slot: 0 for what the model computed by itself, or that of the `Course` it was computed under."""

    def __init__(self, slots: int) -> None:
        self._owners = torch.zeros(slots, dtype=torch.int32)
        self._any = False

    def __bool__(self) -> bool:
        """Whether there ever was anything to be found here."""
        return self._any

    def mark(self, slots: torch.Tensor, owner: int) -> None:
        """What lies in slots int64 [T] was computed under this course; 0: under none."""
        if owner:
            self._any = True
        if self._any:
            self._owners[slots] = owner

    def copy(self, source: slice, target: slice) -> None:
        """The KV of one block was copied into another."""
        self._owners[target] = self._owners[source].clone()

    def distrust(self) -> None:
        """Nobody can say what was computed how."""
        self._any = True
        self._owners.fill_(UNKNOWN)

    def holds(self, slots: torch.Tensor, owner: int) -> bool:
        """Whether all of slots int64 [T] hold what was computed under this course; 0: under none."""
        return not self._any or bool((self._owners[slots] == owner).all())
