"""Where each sequence's rows stand, as the runner's own numbers say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from guard.engine.runner_v1 import Rows, RunnerV1
from guard.errors import UnscoredError


def runner(**batch: list[Any]) -> RunnerV1:
    return RunnerV1(SimpleNamespace(input_batch=SimpleNamespace(**batch), max_num_tokens=128))


def step(**scheduled: int) -> Any:
    return SimpleNamespace(num_scheduled_tokens=scheduled)


BATCH: dict[str, list[Any]] = {
    "req_ids": ["decode", "chunk", "last"],
    "num_computed_tokens_cpu": [12, 0, 4],
    "num_tokens_no_spec": [13, 20, 9],
    "num_prompt_tokens": [10, 20, 9],
}


def test_rows_stand_in_the_order_of_the_batch_and_not_of_the_schedule() -> None:
    found = list(runner(**BATCH).rows(step(last=5, chunk=16, decode=1)))
    assert found == [
        Rows("decode", 0, 1, 12, 10, True),
        Rows("chunk", 1, 16, 0, 20, False),
        Rows("last", 17, 5, 4, 9, True),
    ]


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
