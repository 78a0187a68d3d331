"""Where each sequence's rows stand, as the runner's own numbers say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from guard.engine.runner import Rows
from guard.engine.runner_v1 import RunnerV1
from guard.engine.runner_v2 import RunnerV2
from guard.errors import UnscoredError, UnsupportedEngineError


def runner(**batch: list[Any]) -> RunnerV1:
    inputs = SimpleNamespace(gpu=torch.arange(100, 228))
    return RunnerV1(SimpleNamespace(input_batch=SimpleNamespace(**batch), max_num_tokens=128, input_ids=inputs))


def step(drafts: dict[str, list[int]] | None = None, **scheduled: int) -> Any:
    return SimpleNamespace(num_scheduled_tokens=scheduled, scheduled_spec_decode_tokens=drafts or {})


BATCH: dict[str, list[Any]] = {
    "req_ids": ["decode", "chunk", "last"],
    "num_computed_tokens_cpu": [12, 0, 4],
    "num_tokens_no_spec": [13, 20, 9],
    "num_prompt_tokens": [10, 20, 9],
}


def test_rows_stand_in_the_order_of_the_batch_and_not_of_the_schedule() -> None:
    found = list(runner(**BATCH).rows(step(last=5, chunk=16, decode=1)))
    assert found == [
        Rows("decode", 0, 1, 12, 10, True, (), 100),
        Rows("chunk", 1, 16, 0, 20, False, (), 101),
        Rows("last", 17, 5, 4, 9, True, (), 117),
    ]


def test_a_drafters_guesses_are_the_last_rows_of_their_sequence() -> None:
    decode, _, last = runner(**BATCH).rows(step({"decode": [7, 8, 9]}, last=5, chunk=16, decode=4))
    assert decode == Rows("decode", 0, 4, 12, 10, True, (7, 8, 9), 100)
    assert last.guesses == ()


@pytest.mark.parametrize(
    ("sampled", "parts"),
    [
        (0, [(20, 2, 11)]),
        (1, [(20, 2, 11)]),
        (2, [(20, 2, 11), (22, 1, 13)]),
        (4, [(20, 2, 11), (22, 1, 13), (23, 1, 14), (24, 1, 15)]),
    ],
)
def test_every_guess_that_came_true_is_a_part_of_its_own_and_the_others_are_none(
    sampled: int, parts: list[tuple[int, int, int]]
) -> None:
    rows = Rows("a", 20, 5, 11, 9, True, guesses=(70, 71, 72), first_token=5)
    found = list(rows.accepted(sampled))
    assert [(part.first_row, part.count, part.first_position) for part in found] == parts
    assert all(part.samples and not part.guesses and part.prompt_tokens == 9 for part in found)
    assert [part.first_token for part in found] == [5, 70, 71, 72][: len(parts)]


def test_rows_without_guesses_are_one_part_whatever_was_sampled() -> None:
    rows = Rows("a", 3, 5, 0, 9, False)
    assert list(rows.accepted(0)) == list(rows.accepted(1)) == [rows]


@pytest.mark.parametrize(
    "scheduled",
    [{"decode": 1, "chunk": 16}, {"decode": 1, "chunk": 16, "other": 5}, {}],
    ids=["one missing", "another", "none"],
)
def test_a_batch_that_is_not_the_schedulers_step_is_unscored(scheduled: dict[str, int]) -> None:
    with pytest.raises(UnscoredError, match="3 sequences are not"):
        list(runner(**BATCH).rows(step(**scheduled)))


def test_the_capacity_is_the_runners() -> None:
    assert runner(**BATCH).capacity == 128


def test_a_token_that_is_forbidden_can_be_drawn_for_no_sequence() -> None:
    with torch.inference_mode():
        logits = torch.ones(3, 8)
    state = SimpleNamespace(logits=logits)
    RunnerV1(SimpleNamespace(execute_model_state=state)).forbid(5)
    assert logits[:, 5].isneginf().all()
    assert logits[:, [0, 1, 2, 3, 4, 6, 7]].eq(1).all()


def test_a_step_that_samples_nothing_has_nothing_to_forbid() -> None:
    RunnerV1(SimpleNamespace(execute_model_state=SimpleNamespace(logits=None))).forbid(5)


class Doubling(torch.nn.Module):
    """A model that says something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.times += 1
        return inputs * 10**self.times

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 1


def test_of_a_pass_that_runs_again_only_the_named_rows_are_kept_and_only_their_kv_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contexts, seen = ["the pass"], []

    @contextmanager
    def override(context: str) -> Iterator[None]:
        contexts.append(context)
        yield
        contexts.pop()

    # Importing the real one changes the process that imports it.
    fake = SimpleNamespace(get_forward_context=lambda: contexts[-1], override_forward_context=override)
    monkeypatch.setitem(sys.modules, "vllm.forward_context", fake)
    model, inputs = Doubling(), torch.arange(1.0, 9.0)[:, None].repeat(1, 2)
    slots, other = torch.arange(50, 60), torch.arange(70, 80)
    whole = SimpleNamespace(req_id_to_index={"a": 0, "b": 1, "c": 2})
    some: Any = SimpleNamespace(get_model=lambda: model, input_batch=whole)
    adapter = RunnerV1(some)
    adapter.watch_forward(lambda: seen.append(contexts[-1]))
    hidden = model(inputs)
    last = hidden[[2, 5, 7]].clone()
    some.execute_model_state = SimpleNamespace(
        hidden_states=hidden,
        sample_hidden_states=last,
        logits=model.compute_logits(last),
        slot_mappings={"0": slots, "1": slots, "2": other},
    )
    contexts[:] = ["none"]
    adapter.again([(Rows("b", 3, 3, 0, 9, True), 1), (Rows("c", 6, 2, 0, 9, True), 0)])
    assert seen == ["the pass", "the pass"]
    times = torch.tensor([10.0, 10, 10, 10, 100, 100, 100, 100])
    state = some.execute_model_state
    assert torch.equal(state.hidden_states, inputs * times[:, None])
    assert torch.equal(state.sample_hidden_states[:, 0], torch.tensor([30.0, 600, 800]))
    assert torch.equal(state.logits[:, 0], torch.tensor([31.0, 601, 801]))
    for mapping, first in ((slots, 50), (other, 70)):
        assert mapping.tolist() == [*[-1] * 4, *range(first + 4, first + 8), -1, -1]


# -- V2 ---------------------------------------------------------------------------------------------------------------


class V2:
    """As much of vLLM's V2 model runner as the guard reads: two prompts in chunks, one decode."""

    decode_query_len = 1
    max_num_tokens = 128
    model = SimpleNamespace()

    def __init__(self) -> None:
        self.scheduler_config = SimpleNamespace(async_scheduling=True)
        # Slots of the request state, which are not the order of the batch.
        self.req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([9, 0, 10, 20])))
        group = SimpleNamespace(kv_cache_spec=FullAttentionSpec())
        self.kv_cache_config = SimpleNamespace(num_blocks=50, kv_cache_groups=[SimpleNamespace(kv_cache_spec=0), group])
        table = torch.tensor([[7, 0], [0, 0], [3, 5], [4, 0]])
        self.block_tables = SimpleNamespace(
            block_sizes=[1, 16], block_tables=[SimpleNamespace(), SimpleNamespace(gpu=table)]
        )
        self.sampler = SimpleNamespace(sample=lambda logits, *rest: (logits, rest))

    def prepare_inputs(self, step: Any, *_: Any) -> Any:
        return SimpleNamespace(
            req_ids=["decode", "last", "chunk"],
            idx_mapping=torch.tensor([2, 0, 3]),
            idx_mapping_np=np.array([2, 0, 3]),
            num_scheduled_tokens=np.array([1, 5, 16]),
            query_start_loc_np=np.array([0, 1, 6, 22, 22]),
            num_computed_tokens_np=np.array([12, 4, 0]),
            prefill_len_np=np.array([10, 9, 20]),
            input_ids=torch.arange(100, 132),
        )


class FullAttentionSpec:
    pass


@pytest.fixture
def v2(monkeypatch: pytest.MonkeyPatch) -> V2:
    monkeypatch.setitem(sys.modules, "vllm.v1.kv_cache_interface", SimpleNamespace(FullAttentionSpec=FullAttentionSpec))
    return V2()


def prepared(inner: V2, **scheduled: int) -> tuple[RunnerV2, Any]:
    """The adapter when a step's inputs were prepared, and the step."""
    adapter, now = RunnerV2(inner), step(**scheduled or {"decode": 1, "last": 5, "chunk": 16})
    inner.prepare_inputs(now, "batch state")
    return adapter, now


def test_v2_rows_stand_in_the_order_of_the_batch_that_was_prepared(v2: V2) -> None:
    adapter, now = prepared(v2)
    assert list(adapter.rows(now)) == [
        Rows("decode", 0, 1, 12, 10, True, (), 100),
        Rows("last", 1, 5, 4, 9, True, (), 101),
        Rows("chunk", 6, 16, 0, 20, False, (), 106),
    ]


def test_v2_a_sequence_that_lost_its_kv_decides_only_where_all_of_it_is_computed_again(v2: V2) -> None:
    adapter, now = prepared(v2)
    # Nine tokens of a prompt and three generated ones: what is to be computed again is twelve.
    adapter._batch.prefill_len_np[1] = 12
    _, again, _ = adapter.rows(now)
    assert not again.samples
    assert again.prompt_tokens == 9


def test_v2_a_batch_of_another_step_is_unscored(v2: V2) -> None:
    adapter, now = prepared(v2)
    with pytest.raises(UnscoredError, match="did not put this step's batch together"):
        list(adapter.rows(step(decode=1, last=5, chunk=16)))
    assert list(adapter.rows(now))


def test_v2_a_batch_that_was_never_seen_is_unscored(v2: V2) -> None:
    with pytest.raises(UnscoredError, match="did not put this step's batch together"):
        list(RunnerV2(v2).rows(step(decode=1)))


@pytest.mark.parametrize(
    "scheduled",
    [{"decode": 1, "chunk": 16}, {"decode": 1, "chunk": 15, "last": 5}, {"decode": 1, "chunk": 16, "other": 5}],
    ids=["one missing", "another count", "another"],
)
def test_v2_a_batch_that_is_not_the_schedulers_step_is_unscored(v2: V2, scheduled: dict[str, int]) -> None:
    adapter, now = prepared(v2, **scheduled)
    with pytest.raises(UnscoredError, match="3 sequences are not"):
        list(adapter.rows(now))


def test_v2_a_token_that_is_forbidden_can_be_drawn_for_no_sequence(v2: V2) -> None:
    adapter = RunnerV2(v2)
    assert v2.sampler.sample(torch.ones(2, 8), "rest")[0].eq(1).all()
    adapter.forbid(5)
    logits, rest = v2.sampler.sample(torch.ones(2, 8), "rest")
    assert logits[:, 5].isneginf().all()
    assert logits[:, [0, 1, 2, 3, 4, 6, 7]].eq(1).all()
    assert rest == ("rest",)


def test_v2_positions_lie_where_the_block_table_of_full_attention_says(v2: V2) -> None:
    adapter, _ = prepared(v2)
    assert adapter.slots() == 50 * 16
    assert adapter.where("decode", 14, 18).tolist() == [3 * 16 + 14, 3 * 16 + 15, 5 * 16, 5 * 16 + 1]
    assert adapter.where("last", 0, 2).tolist() == [7 * 16, 7 * 16 + 1]
    # The next step has a table of its own.
    v2.block_tables.block_tables[1].gpu[2, 1] = 6
    v2.prepare_inputs(step(decode=1))
    assert adapter.where("decode", 16, 17).tolist() == [6 * 16]


def test_v2_blocks_are_copied_whole(v2: V2) -> None:
    copy = SimpleNamespace(src_block_id=2, dst_block_id=5)
    found = list(RunnerV2(v2).copies(SimpleNamespace(kv_cache_block_copies=[copy])))
    assert found == [(slice(32, 48), slice(80, 96))]
    assert list(RunnerV2(v2).copies(SimpleNamespace(kv_cache_block_copies=None))) == []


def test_v2_a_model_that_samples_several_tokens_a_step_is_refused(v2: V2) -> None:
    v2.decode_query_len = 4
    with pytest.raises(UnsupportedEngineError, match="samples 4 tokens a step; expected 1"):
        RunnerV2(v2)


def test_v2_says_whether_it_schedules_ahead(v2: V2) -> None:
    assert RunnerV2(v2).schedules_ahead()
