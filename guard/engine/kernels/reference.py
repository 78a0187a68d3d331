"""What the kernels compute, in plain torch: what any faster one is held against, and what runs where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from guard import scores
from guard.scores import along, known_lengths, lengths_of


def read(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: torch.Tensor,
    decisions: torch.Tensor,
    previous: torch.Tensor,
    cosines: torch.Tensor,
    full: torch.Tensor,
    lengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """Read the residual stream of T rows at one place: of every row its length and its cosines with the first
    directions; of the D rows that decide, where they stand along all directions and what was written since the last
    place.

    Args:
        hidden, residual: [T, H], the two halves that vLLM keeps apart.
        directions: float32 [K, H].
        decisions: int64 [capacity + 1]: D, then D rows.
        previous: float32 [capacity, H]: the residual of the rows that decide, at the last place; becomes that at this
            one.
        cosines: float32 [capacity, E], E <= K; written.
        full: float32 [2, capacity, K]: where decisions stand, and what was written; written.
        lengths: float32 [capacity, 1]; written. NaN, as all else of the row, where it cannot be scored.
        count: int64 [2]; grows by one run and T rows.
    """
    rows = hidden.float() if residual is None else hidden.float() + residual.float()
    deciding = decisions[1 : 1 + int(decisions[0])]
    stands = rows[deciding]
    wrote = stands - previous[: len(deciding)]
    previous[: len(deciding)] = stands
    own = known_lengths(lengths_of(rows))[:, None]
    lengths[: len(rows)] = own
    cosines[: len(rows)] = along(rows, directions[: cosines.shape[1]]) / own
    # A length over itself: NaN where the length is.
    for half, what in zip(full, (stands, wrote), strict=True):
        half[: len(deciding)] = along(what, directions) * (own / own)[deciding]
    count += torch.tensor([1, len(rows)], device=count.device)


def worst(cosines: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far each row stands outside a range, and where: the largest of max(cosine - high, low - cosine).

    Args:
        cosines: float32 [T, E].
        low, high: float32 [R, E], the range of each of R roles.

    Returns:
        Values float32 [T, R], and places int64 [T, R], the first that has the value. NaN counts as the largest.
    """
    found = [torch.maximum(cosines - top, bottom - cosines).max(dim=-1) for bottom, top in zip(low, high, strict=True)]
    values, places = (torch.stack(each, dim=-1) for each in zip(*found, strict=True))
    return values, places


def squares(deviations: torch.Tensor, panels: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [T]: see `guard.scores.squares`."""
    return scores.squares(deviations, panels)


def gather(parts: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    """The first `rows` rows of parts float32 [capacity, W_i] side by side: float32 [rows, sum W_i]."""
    return torch.cat([part[:rows] for part in parts], dim=-1)
