"""Who speaks in every sequence of the engine: the role of each of its tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from guard.engine.runner import Rows
from guard.roles import ROLES, RoleMap, TokenIds

GENERATED = ROLES.index("assistant")


class Turns:
    """The roles of running sequences."""

    def __init__(self, roles: RoleMap) -> None:
        self.map = roles
        self._prompts: dict[str, npt.NDArray[np.uint8]] = {}

    def admit(self, sequence: str, prompt: TokenIds) -> None:
        """A new sequence and its prompt's token ids; empty where the prompt is not of tokens."""
        self._prompts[sequence] = self.map.roles(prompt)

    def finish(self, sequences: Iterable[str]) -> None:
        """These sequences run no more."""
        for sequence in sequences:
            self._prompts.pop(sequence, None)

    def of(self, batch: Iterable[Rows]) -> torch.Tensor:
        """int64 [T]: for the rows of a step, in order, an index into `ROLES`. What is generated is the assistant's."""
        spans = ((rows.sequence, rows.first_position, rows.first_position + rows.count) for rows in batch)
        return torch.cat([self.between(*span) for span in spans])

    def between(self, sequence: str, first: int, stop: int) -> torch.Tensor:
        """int64 [stop - first]: the roles of the tokens at positions first to stop - 1 of a running sequence."""
        roles = np.full(stop - first, GENERATED, dtype=np.int64)
        known = self._prompts[sequence][first:stop]
        roles[: len(known)] = known
        return torch.from_numpy(roles)
