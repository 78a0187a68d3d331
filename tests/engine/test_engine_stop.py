"""Which token ends a blocked sequence, and that nothing else is touched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from guard.engine.stop import Endings, Stop, choose_reserved_token, replace_sampled
from guard.errors import ConfigError

WORDS = {"a": 0, "b": 1, "</s>": 2}


def tokenizer(**extra: int) -> Any:
    return SimpleNamespace(get_vocab=lambda: WORDS | extra)


@pytest.mark.parametrize(
    ("reserved", "expected"),
    [
        ({"<|guard|>": 5, "<unused3>": 6}, 5),
        (
            {"<|reserved_special_token_0|>": 4, "<|reserved_special_token_247|>": 9, "<|reserved_special_token_9|>": 5},
            9,
        ),
        ({"<unused0>": 3, "<unused98>": 8, "<unused>": 9}, 8),
        ({"<|extra_0|>": 3, "<|extra_204|>": 7}, 7),
    ],
    ids=["the demo's", "Llama 3", "Gemma", "Qwen"],
)
def test_each_familys_reserved_token_is_found(reserved: dict[str, int], expected: int) -> None:
    assert choose_reserved_token(tokenizer(**reserved), 10, None) == expected


def test_a_token_that_only_looks_reserved_or_lies_outside_the_model_is_not_taken() -> None:
    lookalikes = {"x<unused1>": 3, "<unused1>y": 4, "<unused>": 5, "<unused9>": 12}
    with pytest.raises(ConfigError, match="no reserved token"):
        choose_reserved_token(tokenizer(**lookalikes), 6, None)
    assert choose_reserved_token(tokenizer(**lookalikes, **{"<unused2>": 2}), 6, None) == 2


def test_padding_above_the_tokenizers_ids_is_free() -> None:
    assert choose_reserved_token(tokenizer(), 64, None) == 63
    assert choose_reserved_token(tokenizer(), 4, None) == 3


def test_without_a_free_token_the_operator_is_asked() -> None:
    with pytest.raises(ConfigError, match=r"undertow\.reserved_token_id"):
        choose_reserved_token(tokenizer(), 3, None)


@pytest.mark.parametrize("configured", [0, 1, 9])
def test_the_operators_choice_comes_first(configured: int) -> None:
    assert choose_reserved_token(tokenizer(**{"<|guard|>": 5}), 10, configured) == configured


@pytest.mark.parametrize("configured", [-1, 10, 10**9])
def test_a_choice_outside_the_vocabulary_is_refused(configured: int) -> None:
    with pytest.raises(ConfigError, match=f"reserved_token_id`: {configured} is not in the vocabulary of 10"):
        choose_reserved_token(tokenizer(), 10, configured)


@pytest.mark.parametrize(
    ("stops", "eos", "expected"),
    [
        ([3, 9], 2, 9),
        ([9], None, 9),
        ([3, 4], 2, 2),
        ([3, 4], 0, 0),
        (None, 2, 2),
        ([3, 4], None, 3),
        ([], None, 9),
        (None, None, 9),
    ],
)
def test_the_reserved_token_ends_a_sequence_that_lists_it_and_its_own_end_another(
    stops: list[int] | None, eos: int | None, expected: int
) -> None:
    parameters: Any = SimpleNamespace(stop_token_ids=stops, eos_token_id=eos, max_tokens=4)
    found = Endings.of(parameters, 9)
    assert found.token == expected
    assert found.tokens == {*(stops or ()), *([] if eos is None else [eos])}
    assert found.longest == 4


@pytest.mark.parametrize(
    ("token", "generated", "over"), [(5, 1, False), (3, 1, True), (5, 3, False), (5, 4, True), (5, 5, True)]
)
def test_a_sequence_is_over_after_a_stop_token_or_at_its_length(token: int, generated: int, over: bool) -> None:
    assert Endings(9, frozenset({3, 9}), 4).before(token, generated) == over
    assert Endings(9, frozenset({3})).before(5, 10**6) is False


def sampled(logprobs: bool = True) -> Any:
    """What three sequences sampled; the second is in the middle of its prompt."""
    held = SimpleNamespace(
        logprob_token_ids=np.arange(12).reshape(3, 4),
        logprobs=-np.arange(1.0, 13.0).reshape(3, 4),
        sampled_token_ranks=np.array([1, 2, 3]),
        cu_num_generated_tokens=None,
    )
    return SimpleNamespace(
        req_id_to_index={"a": 0, "chunk": 1, "c": 2},
        sampled_token_ids=[[10], [], [12]],
        logprobs=held if logprobs else None,
    )


def test_only_what_was_sampled_for_a_blocked_sequence_is_replaced() -> None:
    output = sampled()
    replace_sampled(output, {"c": Stop(0, 77)})
    assert output.sampled_token_ids == [[10], [], [77]]
    untouched = sampled().logprobs
    for name in ("logprob_token_ids", "logprobs", "sampled_token_ranks"):
        assert np.array_equal(getattr(output.logprobs, name)[:2], getattr(untouched, name)[:2])


def test_the_likeliest_tokens_of_a_blocked_sequence_are_hidden() -> None:
    output = sampled()
    replace_sampled(output, {"c": Stop(0, 77)})
    assert set(output.logprobs.logprob_token_ids[2].tolist()) == {77}
    assert set(output.logprobs.logprobs[2].tolist()) == {0.0}
    assert output.logprobs.sampled_token_ranks[2] == 0


def test_a_prompt_that_is_not_at_its_end_samples_nothing_and_is_left_alone() -> None:
    output = sampled()
    replace_sampled(output, {"chunk": Stop(0, 77)})
    assert output.sampled_token_ids == [[10], [], [12]]
    assert np.array_equal(output.logprobs.logprobs, sampled().logprobs.logprobs)


def test_a_step_without_log_probabilities_is_no_trouble() -> None:
    output = sampled(logprobs=False)
    replace_sampled(output, {"a": Stop(0, 77), "c": Stop(0, 78)})
    assert output.sampled_token_ids == [[77], [], [78]]


def test_a_step_in_which_nothing_is_blocked_stays_as_it_was() -> None:
    output = sampled()
    replace_sampled(output, {})
    assert output.sampled_token_ids == sampled().sampled_token_ids


@pytest.mark.parametrize(("kept", "tokens", "hidden"), [(0, [77], 1), (1, [20, 77], 2), (2, [20, 21, 77], 3)])
def test_of_guesses_that_came_true_those_before_the_row_that_blocks_are_kept(
    kept: int, tokens: list[int], hidden: int
) -> None:
    held = SimpleNamespace(
        logprob_token_ids=np.arange(20).reshape(5, 4),
        logprobs=-np.arange(1.0, 21.0).reshape(5, 4),
        sampled_token_ranks=np.arange(5),
        cu_num_generated_tokens=[0, 1, 4, 5],
    )
    output: Any = SimpleNamespace(
        req_id_to_index={"a": 0, "b": 1, "c": 2}, sampled_token_ids=[[10], [20, 21, 22], [30]], logprobs=held
    )
    replace_sampled(output, {"b": Stop(kept, 77)})
    assert output.sampled_token_ids == [[10], tokens, [30]]
    # Rows 1 to 3 are those of b.
    assert (held.logprob_token_ids == 77).all(axis=1).tolist() == [row == hidden for row in range(5)]
