"""What the guard needs to know of a model runner, whichever of vLLM's two it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from guard.errors import UnsupportedEngineError

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
    guesses: tuple[int, ...] = ()
    """The tokens in the last rows that a drafter guessed; each is a decision position if it is right."""
    first_token: int = -1
    """The token in `first_row`; only looked at where `count` is 1."""

    @property
    def all(self) -> range:
        """Every row."""
        return range(self.first_row, self.first_row + self.count)

    @property
    def deciding(self) -> range:
        """The rows that are decision positions, or may turn out to be."""
        return self.all[self.count - 1 - len(self.guesses) :] if self.samples else range(0)

    def accepted(self, sampled: int) -> Iterator[Rows]:
        """The rows that became part of the sequence, when `sampled` tokens were drawn: every decision position ends
        one part, so that the sequence can be judged after each, as it would be without a drafter."""
        sure = self.count - len(self.guesses)
        yield replace(self, count=sure, guesses=())
        for place, token in enumerate(self.guesses[: max(0, sampled - 1)], sure):
            yield replace(
                self,
                first_row=self.first_row + place,
                count=1,
                first_position=self.first_position + place,
                guesses=(),
                first_token=token,
            )


class Runner(Protocol):
    """An adapter to one of vLLM's model runners. All that it reads there is private to vLLM."""

    @property
    def model(self) -> nn.Module:
        """The loaded model."""
        ...

    @property
    def capacity(self) -> int:
        """The most rows that one forward pass can have."""
        ...

    def dummy_run(self, rows: int) -> None:
        """One forward pass of `rows` meaningless tokens, on the path that requests take."""
        ...

    def rows(self, step: SchedulerOutput) -> Iterator[Rows]:
        """Each sequence's rows in this step, in the order of the batch: from when its inputs are prepared until the
        next step's are.

        Raises:
            UnscoredError: the runner's batch is not the scheduler's step.
        """
        ...

    def forbid(self, token: int) -> None:
        """Keep the model from sampling this token in the step that was just computed."""
        ...

    def schedules_ahead(self) -> bool:
        """Whether tokens are sampled before the scheduler has seen the last ones."""
        ...

    def adapter(self, number: int) -> object | None:
        """What holds the weights of a LoRA adapter: another object whenever they were read again, None where there are
        none."""
        ...

    def last_slot_taken(self) -> bool:
        """Whether an adapter lies in the last of the slots that `--max-loras` makes."""
        ...

    def slots(self) -> int:
        """How many tokens the KV cache has room for.

        Raises:
            UnsupportedEngineError: no layer attends to all tokens, so that no block table knows where all of them are.
        """
        ...

    def where(self, sequence: str, first: int, stop: int) -> torch.Tensor:
        """int64 [stop - first]: the slots of the tokens at positions first to stop - 1 of a scheduled sequence."""
        ...

    def copies(self, step: SchedulerOutput) -> Iterator[tuple[slice, slice]]:
        """From which slots to which the runner copied KV at the beginning of the step."""
        ...


class LoraHolder:
    """What both runners have of one class of vLLM's, `v1/worker/lora_model_runner_mixin.py`."""

    _runner: Any

    def adapter(self, number: int) -> object | None:
        """What holds the weights of a LoRA adapter: another object whenever they were read again, None where there are
        none."""
        held: object | None = self._runner.lora_manager._adapter_manager.get_adapter(number)
        return held

    def last_slot_taken(self) -> bool:
        """Whether an adapter lies in the last of the slots that `--max-loras` makes."""
        return (
            bool(self._runner.lora_config)
            and self._runner.lora_manager._adapter_manager.lora_index_to_id[-1] is not None
        )


def full_attention(kv_cache_config: Any) -> int:
    """The place of the KV cache group whose layers attend to all tokens.

    Raises:
        UnsupportedEngineError: there is none, so that no block table knows where all tokens are.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    for place, group in enumerate(kv_cache_config.kv_cache_groups):
        if isinstance(group.kv_cache_spec, FullAttentionSpec):
            return place
    raise UnsupportedEngineError(
        "prefix caching in a model without full attention (no block table knows every token): "
        "add --no-enable-prefix-caching"
    )


def copied(step: SchedulerOutput, block_size: int) -> Iterator[tuple[slice, slice]]:
    """From which slots to which a step copies blocks of KV."""
    for copy in step.kv_cache_block_copies or ():
        source, target = copy.src_block_id * block_size, copy.dst_block_id * block_size
        yield slice(source, source + block_size), slice(target, target + block_size)
