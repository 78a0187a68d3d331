"""Scores that live as long as the KV they were computed with.

A token whose KV another request takes from the prefix cache is not computed again, so no probe sees it. Its exceedance
is kept here, under the slot of the KV cache that holds it: whoever reads the slot has the score, and whoever overwrites
the slot overwrites the score. Detectors of decision positions need none of this: the last prompt token is always
computed.

The score depends on who speaks, and the same token can be the assistant's in one request and the user's in the next; so
there is one score per role.
"""

from __future__ import annotations

import torch

from guard.roles import ROLES


class Shadow:
    """One exceedance per slot of the KV cache and role, and the coordinate that it comes from."""

    def __init__(self, slots: int) -> None:
        self._values = torch.zeros(slots, len(ROLES))
        self._coordinates = torch.zeros(slots, len(ROLES), dtype=torch.int32)
        # Which calibration's score it is; 0: none was ever written.
        self._generations = torch.zeros(slots, dtype=torch.int32)
        self._generation = 1

    def forget(self) -> None:
        """What was written is of another calibration from now on."""
        self._generation += 1

    def write(self, slots: torch.Tensor, values: torch.Tensor, coordinates: torch.Tensor) -> None:
        """Keep the scores of T tokens: slots int64 [T]; values float32 and coordinates int64 [T, 3], per role."""
        self._values[slots] = values
        self._coordinates[slots] = coordinates.int()
        self._generations[slots] = self._generation

    def erase(self, slots: torch.Tensor) -> None:
        """These slots, int64 [T], hold the KV of tokens that were not scored here."""
        self._generations[slots] = 0

    def copy(self, source: slice, target: slice) -> None:
        """The KV of one block was copied into another."""
        for kept in (self._values, self._coordinates, self._generations):
            kept[target] = kept[source].clone()

    def read(self, slots: torch.Tensor, roles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Values float32 [T] and coordinates int64 [T] of tokens with these roles, int64 [T]; None where one of them
        was never scored by this calibration."""
        if not bool((self._generations[slots] == self._generation).all()):
            return None
        return self._values[slots, roles], self._coordinates[slots, roles].long()
