"""The ranks of a tensor-parallel engine: what they have to agree on before any of them serves.

Every rank multiplies with its part of every matrix, and the parts are summed over all ranks after each attention and
each MLP. So every rank has the whole residual stream, and every rank reads, scores and judges it. vLLM hands the
scheduler the output of the first rank alone: its verdicts are the ones that end a sequence and that the evidence tells
of. Those of the others end nothing. They cost no time, since a rank that did not judge would wait for the one that
does, and they are what `undertow status` and the handshake hold the first one's against.

That the residual stream is whole on every rank is a property of vLLM's models, and is measured here once, at start: of
embeddings and MLPs. Attention reads an empty KV cache then, and adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed

from guard.errors import EngineError, UnscoredError

if TYPE_CHECKING:
    from guard.engine.readings import Readings

TOLERANCE = 0.05
"""The largest difference between two ranks, of a cosine or of a length relative to itself: far above rounding in
bfloat16, far below what a rank has that lacks the others' part of one sum."""
TIMEOUT_S = 300.0
"""How long one rank waits for the others. They arrive together, unless one has failed in vLLM's own warm-up."""
_TEXT = 512


@dataclass(frozen=True, slots=True)
class Sight:
    """What one rank saw of the forward pass that proves the probes."""

    values: torch.Tensor
    """float32 [N], as many on every rank; NaN where it could not read."""
    problem: str = ""
    """Why it could not."""

    @classmethod
    def of(cls, readings: Readings) -> Sight:
        """Its cosines and lengths."""
        return cls(torch.cat([readings.cosines.flatten(), readings.lengths.flatten()]))

    @classmethod
    def none(cls, rows: int, size: int, layers: int, error: UnscoredError) -> Sight:
        """Of a rank that could not read so many rows, of so many cosines and watched layers."""
        return cls(torch.full((rows * (size + layers),), torch.nan), str(error))


def exchange(own: Sight, group: torch.distributed.ProcessGroup) -> list[Sight]:
    """What every rank saw, in their order. Every rank has to call it, also one that saw nothing: the others wait.

    Raises:
        EngineError: another rank did not call it.
    """
    text = own.problem.encode()[:_TEXT].ljust(_TEXT)
    try:
        values = _gather(own.values, group)
        texts = _gather(torch.frombuffer(bytearray(text), dtype=torch.uint8), group)
    except RuntimeError as error:
        raise EngineError(f"a rank did not come to compare its residual stream: {error}") from error
    problems = [bytes(each.tolist()).decode(errors="replace").rstrip() for each in texts]
    return [Sight(*each) for each in zip(values, problems, strict=True)]


def check(sights: Sequence[Sight]) -> float:
    """The largest difference between the ranks' residual streams; 0.0 where there is one rank.

    Raises:
        EngineError: a rank could not read, or its residual stream is another one than the first rank's; named.
    """
    alone = len(sights) == 1
    problems = {rank: each.problem for rank, each in enumerate(sights) if each.problem}
    if problems:
        told = [problem if alone else f"rank {rank}: {problem}" for rank, problem in problems.items()]
        raise EngineError(f"the guard does not start: {'; '.join(told)}")
    largest = 0.0
    first = sights[0].values
    if not alone and not bool(first.isfinite().any()):
        raise EngineError("the guard does not start: there was nothing to compare the ranks' residual streams by")
    for rank, each in enumerate(sights):
        # Cosines are at most 1.
        apart = (each.values - first).abs() / first.abs().clamp_min(1.0)
        apart[each.values.isnan() & first.isnan()] = 0.0
        difference = float(apart.max())
        if not difference <= TOLERANCE:
            raise EngineError(
                f"the guard does not start: the residual stream of rank {rank} is not that of rank 0 (it differs by "
                f"{difference:.3g}, at most {TOLERANCE:g} is rounding): this model does not sum it up after every layer"
            )
        largest = max(largest, difference)
    return largest


def _gather(own: torch.Tensor, group: torch.distributed.ProcessGroup) -> list[torch.Tensor]:
    found = [torch.empty_like(own) for _ in range(group.size())]
    work = torch.distributed.all_gather(found, own.contiguous(), group=group, async_op=True)
    work.wait(timedelta(seconds=TIMEOUT_S))
    return found
