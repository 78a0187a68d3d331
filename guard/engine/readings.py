"""What the probes saw in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from guard.errors import UnscoredError
from guard.scores import BankSpace


@dataclass(frozen=True, slots=True)
class Readings:
    """Of T rows, D of which were read in full."""

    cosines: torch.Tensor
    """float32 [T, E]: with the directions that are read at every token, `BankSpace.of_every_token`."""
    lengths: torch.Tensor
    """float32 [T, layers]: of the residual stream after each watched layer."""
    decisions: torch.Tensor
    """int64 [D], ascending: which rows were read in full."""
    features: torch.Tensor
    """float32 [D, 2 size], of these: where the residual stands along each direction, and what its layer wrote."""

    @classmethod
    def whole(
        cls, space: BankSpace, coordinates: torch.Tensor, written: torch.Tensor, lengths: torch.Tensor
    ) -> Readings:
        """Every row read in full: cosines and what was written, float32 [T, size], and lengths [T, layers]."""
        standing = coordinates * lengths[:, space.layer_slot()]
        return cls(
            coordinates[:, space.of_every_token()],
            lengths,
            torch.arange(len(coordinates)),
            torch.cat([standing, written], dim=-1),
        )

    def coordinates(self, space: BankSpace) -> torch.Tensor:
        """float32 [D, size]: the cosines with every direction, of the rows that were read in full."""
        found = self.features[:, : space.size] / self.lengths[self.decisions][:, space.layer_slot()]
        # To the last bit what every token is held against.
        found[:, space.of_every_token()] = self.cosines[self.decisions]
        return found

    def full(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [R, 2 size]: the features of rows, int64 [R].

        Raises:
            UnscoredError: one of them was not read in full.
        """
        places = torch.searchsorted(self.decisions, rows)
        if bool((places == len(self.decisions)).any()) or not torch.equal(self.decisions[places], rows):
            raise UnscoredError("a row that decides was not read in full", "probe_missed")
        return self.features[places]
