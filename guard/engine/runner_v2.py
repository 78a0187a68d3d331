"""The private attributes of vLLM's V2 model runner that the guard reads, in this one file.

Held against vLLM's source by `tests/engine/contract.py` (`v1/worker/gpu/`); `support.py` refuses other versions. Run on
a CPU, where Triton interprets the runner's kernels (`tests/e2e/test_fuzz.py`); it has not run on a GPU.

This runner keeps its batch to itself until the forward pass is over, and has no logits between pass and sampling. So
two of its methods are wrapped: the one that puts the batch together, to know it, and the one that samples from logits,
to forbid a token there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from guard.engine.runner import LoraHolder, Rows, copied, full_attention
from guard.errors import UnscoredError, UnsupportedEngineError

if TYPE_CHECKING:
    from torch import nn
    from vllm.v1.core.sched.output import SchedulerOutput


class RunnerV2(LoraHolder):
    """What the guard needs to know of a V2 model runner."""

    def __init__(self, runner: Any) -> None:
        """`runner`: with its model loaded. Raises UnsupportedEngineError where a step is not one token a sequence."""
        if runner.decode_query_len != 1:
            raise UnsupportedEngineError(
                f"{type(runner.model).__name__} samples {runner.decode_query_len} tokens a step; expected 1"
            )
        self._runner = runner
        self._step: SchedulerOutput | None = None
        self._batch: Any = None
        self._places: dict[str, int] = {}
        self._blocks: torch.Tensor | None = None
        self._forbidden: int | None = None
        self._prepare, self._sample = runner.prepare_inputs, runner.sampler.sample
        runner.prepare_inputs, runner.sampler.sample = self._prepared, self._sampled

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
        """Each sequence's rows in this step, in the order of the batch.

        Raises:
            UnscoredError: the runner's batch is not the scheduler's step.
        """
        scheduled = step.num_scheduled_tokens
        if self._step is not step:
            raise UnscoredError(
                "the runner did not put this step's batch together where it is watched", "batch_mismatch"
            )
        batch: Any = self._batch
        counts = batch.num_scheduled_tokens.tolist()
        if dict(zip(batch.req_ids, counts, strict=True)) != scheduled:
            raise UnscoredError(
                f"the batch's {len(batch.req_ids)} sequences are not the {len(scheduled)} scheduled", "batch_mismatch"
            )
        starts = batch.query_start_loc_np[: len(counts)].tolist()
        # Only these inputs know what was sampled ahead of the scheduler.
        tokens = batch.input_ids[starts].tolist()
        prompts = self._runner.req_states.prompt_len.np[batch.idx_mapping_np]
        for index, (sequence, row, count) in enumerate(zip(batch.req_ids, starts, counts, strict=True)):
            first = int(batch.num_computed_tokens_np[index])
            samples = first + count >= int(batch.prefill_len_np[index])
            yield Rows(sequence, row, count, first, int(prompts[index]), samples, (), int(tokens[index]))

    def forbid(self, token: int) -> None:
        """Keep the model from sampling this token from now on."""
        self._forbidden = token

    def schedules_ahead(self) -> bool:
        """Whether tokens are sampled before the scheduler has seen the last ones."""
        return bool(self._runner.scheduler_config.async_scheduling)

    def slots(self) -> int:
        """How many tokens the KV cache has room for.

        Raises:
            UnsupportedEngineError: no layer attends to all tokens, so that no block table knows where all of them are.
        """
        return int(self._runner.kv_cache_config.num_blocks) * self._block_size()

    def where(self, sequence: str, first: int, stop: int) -> torch.Tensor:
        """int64 [stop - first]: the slots of the tokens at positions first to stop - 1 of a scheduled sequence."""
        if self._blocks is None:
            # On the device only: once a step for all of its sequences, instead of once for each.
            table = self._runner.block_tables.block_tables[full_attention(self._runner.kv_cache_config)].gpu
            self._blocks = table[self._batch.idx_mapping].cpu()
        size = self._block_size()
        positions = torch.arange(first, stop)
        return self._blocks[self._places[sequence], positions // size].long() * size + positions % size

    def copies(self, step: SchedulerOutput) -> Iterator[tuple[slice, slice]]:
        """From which slots to which the runner copied KV at the beginning of the step."""
        return copied(step, self._block_size())

    def _block_size(self) -> int:
        return int(self._runner.block_tables.block_sizes[full_attention(self._runner.kv_cache_config)])

    def _prepared(self, step: SchedulerOutput, *arguments: Any, **keywords: Any) -> Any:
        self._batch = self._prepare(step, *arguments, **keywords)
        self._step, self._blocks = step, None
        self._places = {sequence: place for place, sequence in enumerate(self._batch.req_ids)}
        return self._batch

    def _sampled(self, logits: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if self._forbidden is not None:
            logits[:, self._forbidden] = -torch.inf
        return self._sample(logits, *arguments, **keywords)
