"""The private attributes of vLLM's V1 model runner that the guard reads, in this one file.

Checked against vLLM 0.32 (`v1/worker/gpu_model_runner.py`, `v1/worker/gpu_input_batch.py`); `support.py` refuses
others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guard.errors import UnscoredError

if TYPE_CHECKING:
    from torch import nn
    from vllm.v1.core.sched.output import SchedulerOutput


@dataclass(frozen=True, slots=True)
class Rows:
    """Where one sequence's tokens stand in the batch of one step."""

    sequence: str
    """vLLM's request id."""
    first_row: int
    count: int
    first_position: int
    """Position in the sequence of the token in `first_row`."""
    prompt_tokens: int
    samples: bool
    """True where the last row's logits are sampled: a decision position."""


class RunnerV1:
    """What the guard needs to know of a V1 model runner."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    @property
    def model(self) -> nn.Module:
        """The loaded model."""
        model: nn.Module = self._runner.get_model()
        return model

    @property
    def capacity(self) -> int:
        """The most rows that one forward pass can have."""
        return int(self._runner.max_num_tokens)

    def dummy_run(self, rows: int) -> None:
        """One forward pass of `rows` meaningless tokens, on the path that requests take."""
        self._runner._dummy_run(rows)

    def rows(self, step: SchedulerOutput) -> Iterator[Rows]:
        """Each sequence's rows in the step that was just computed, in the order of the batch.

        Raises:
            UnscoredError: the runner's batch is not the scheduler's step.
        """
        batch = self._runner.input_batch
        if len(batch.req_ids) != len(step.num_scheduled_tokens) or set(batch.req_ids) != set(step.num_scheduled_tokens):
            raise UnscoredError(
                f"the batch's {len(batch.req_ids)} sequences are not the {len(step.num_scheduled_tokens)} scheduled"
            )
        row = 0
        for index, sequence in enumerate(batch.req_ids):
            count = step.num_scheduled_tokens[sequence]
            first = int(batch.num_computed_tokens_cpu[index])
            known = int(batch.num_tokens_no_spec[index])
            yield Rows(sequence, row, count, first, int(batch.num_prompt_tokens[index]), first + count >= known)
            row += count
