"""The private attributes of vLLM's V1 model runner that the guard reads, in this one file.

Held against vLLM's source by `tests/engine/contract.py` (`v1/worker/gpu_model_runner.py`,
`v1/worker/gpu_input_batch.py`, `v1/worker/block_table.py`, `lora/worker_manager.py`); `support.py` refuses other
versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from guard.engine.runner import LoraHolder, Rows, copied, full_attention
from guard.errors import UnscoredError

if TYPE_CHECKING:
    from torch import nn
    from vllm.v1.core.sched.output import SchedulerOutput


@dataclass(frozen=True, slots=True)
class _Entered:
    """What the model was called with."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    context: Any


class RunnerV1(LoraHolder):
    """What the guard needs to know of a V1 model runner."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._entered: _Entered | None = None

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
        """One forward pass of `rows` meaningless tokens, on the path that requests take; on every rank the same."""
        runner = self._runner
        # vLLM leaves zeros there: the padding token, whose embedding is often zero, too, and gives nothing to read.
        vocabulary = runner.model_config.get_vocab_size()
        runner.input_ids.gpu[:rows] = torch.linspace(1, vocabulary - 1, rows).to(runner.input_ids.gpu)
        if runner.supports_mm_inputs:
            width = runner.inputs_embeds.gpu.shape[-1]
            noise = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
            runner.inputs_embeds.gpu[:rows] = noise.to(runner.inputs_embeds.gpu)
        # Without attention its output is whatever the memory held.
        runner._dummy_run(rows, force_attention=True)

    def watch_forward(self, before: Callable[[], None]) -> None:
        """Call `before` whenever a forward pass begins and the batch is in its order; and keep what the pass is given,
        for `again`."""

        def enter(_model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            from vllm.forward_context import get_forward_context

            self._entered = _Entered(arguments, keywords, get_forward_context())
            before()

        self.model.register_forward_pre_hook(enter, with_kwargs=True)

    def again(self, changed: Iterable[tuple[Rows, int]]) -> None:
        """Run the last forward pass once more, before anything of it is sampled. What it gives takes the place of what
        the first run gave for the named rows alone: of each sequence those from a number of its rows on. No other row's
        KV is written."""
        from vllm.forward_context import override_forward_context

        state, entered = self._runner.execute_model_state, self._entered
        assert entered is not None, "nothing runs again before it ran once"
        changed = list(changed)
        kept = torch.cat(
            [torch.arange(rows.first_row + first, rows.first_row + rows.count) for rows, first in changed]
        ).to(state.hidden_states.device)
        with torch.inference_mode(), override_forward_context(entered.context):
            for mapping in {id(mapping): mapping for mapping in state.slot_mappings.values()}.values():
                slots = mapping[kept]
                mapping.fill_(-1)
                mapping[kept] = slots
            hidden = self.model(*entered.arguments, **entered.keywords)
            state.hidden_states[kept] = hidden[kept]
            places = [self._runner.input_batch.req_id_to_index[rows.sequence] for rows, _ in changed]
            last = hidden[[rows.first_row + rows.count - 1 for rows, _ in changed]]
            state.sample_hidden_states[places] = last
            state.logits[places] = self._runner.get_model().compute_logits(last)

    def rows(self, step: SchedulerOutput) -> Iterator[Rows]:
        """Each sequence's rows in the step that is about to be computed, in the order of the batch.

        Raises:
            UnscoredError: the runner's batch is not the scheduler's step.
        """
        batch = self._runner.input_batch
        if len(batch.req_ids) != len(step.num_scheduled_tokens) or set(batch.req_ids) != set(step.num_scheduled_tokens):
            raise UnscoredError(
                f"the batch's {len(batch.req_ids)} sequences are not the {len(step.num_scheduled_tokens)} scheduled",
                "batch_mismatch",
            )
        counts = [step.num_scheduled_tokens[sequence] for sequence in batch.req_ids]
        starts = [0, *accumulate(counts)][:-1]
        # Where tokens are sampled ahead of the scheduler, only these inputs know what was sampled.
        tokens = self._runner.input_ids.gpu[starts].tolist()
        for index, (sequence, row, count) in enumerate(zip(batch.req_ids, starts, counts, strict=True)):
            guesses = tuple(step.scheduled_spec_decode_tokens.get(sequence, ()))
            first = int(batch.num_computed_tokens_cpu[index])
            known = int(batch.num_tokens_no_spec[index])
            samples = first + count - len(guesses) >= known
            prompt = int(batch.num_prompt_tokens[index])
            yield Rows(sequence, row, count, first, prompt, samples, guesses, int(tokens[index]))

    def forbid(self, token: int) -> None:
        """Keep the model from sampling this token in the step that was just computed."""
        logits = self._runner.execute_model_state.logits
        if logits is not None:
            # Made in inference mode, and only to be written to there.
            with torch.inference_mode():
                logits[:, token] = -torch.inf

    def schedules_ahead(self) -> bool:
        """Whether tokens are sampled before the scheduler has seen the last ones."""
        return bool(self._runner.use_async_scheduling)

    # -- where the KV cache keeps tokens ------------------------------------------------------------------------------

    def slots(self) -> int:
        """How many tokens the KV cache has room for.

        Raises:
            UnsupportedEngineError: no layer attends to all tokens, so that no block table knows where all of them are.
        """
        return int(self._runner.kv_cache_config.num_blocks) * int(self._table().block_size)

    def where(self, sequence: str, first: int, stop: int) -> torch.Tensor:
        """int64 [stop - first]: the slots of the tokens at positions first to stop - 1 of a scheduled sequence."""
        table = self._table()
        size = int(table.block_size)
        blocks = torch.from_numpy(table.block_table.np[self._runner.input_batch.req_id_to_index[sequence]])
        positions = torch.arange(first, stop)
        return blocks[positions // size].long() * size + positions % size

    def copies(self, step: SchedulerOutput) -> Iterator[tuple[slice, slice]]:
        """From which slots to which the runner copied KV at the beginning of the step."""
        return copied(step, int(self._table().block_size))

    def _table(self) -> Any:
        return self._runner.input_batch.block_table[full_attention(self._runner.kv_cache_config)]
