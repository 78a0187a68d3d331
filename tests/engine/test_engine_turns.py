"""Whose each row of a step is: a prompt's tokens by the chat template's headers, what is generated the assistant's."""

from __future__ import annotations

import pytest
import torch

from guard.engine.runner import Rows
from guard.engine.turns import Turns
from guard.roles import ROLES, RoleMap
from tests.guard.planted import ROLE_MAP

SYSTEM, USER, ASSISTANT = range(3)

PROMPT = (1, 9, 9, 2, 9, 9, 9, 3, 9, 2, 9, 3)
"""System, user, assistant, user, and a generation prompt."""
SAID = [SYSTEM] * 3 + [USER] * 4 + [ASSISTANT] * 2 + [USER] * 2 + [ASSISTANT]


def turns(**prompts: tuple[int, ...]) -> Turns:
    made = Turns(ROLE_MAP)
    for name, prompt in prompts.items():
        made.admit(name, prompt)
    return made


def rows(first: int, count: int, sequence: str = "a", prompt: int = len(PROMPT), row: int = 0) -> Rows:
    return Rows(sequence, row, count, first, prompt, first + count >= prompt)


def test_roles_are_in_the_order_of_their_ids() -> None:
    assert ROLES == ("system", "user", "assistant")


@pytest.mark.parametrize("first", range(len(PROMPT)))
@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_chunk_of_a_prompt_has_the_roles_of_its_tokens_in_the_whole(first: int, count: int) -> None:
    """A chunk that begins within a turn does not show that turn's header."""
    found = turns(a=PROMPT).of([rows(first, count)])
    assert found.dtype == torch.int64
    assert found.tolist() == (SAID + [ASSISTANT] * 40)[first : first + count]


@pytest.mark.parametrize("first", [len(PROMPT), len(PROMPT) + 7])
def test_what_is_generated_is_the_assistants_whatever_it_looks_like(first: int) -> None:
    assert turns(a=PROMPT).of([rows(first, 1)]).tolist() == [ASSISTANT]
    assert turns(a=PROMPT).of([rows(first, 4)]).tolist() == [ASSISTANT] * 4


def test_a_prompt_without_a_generation_prompt_ends_with_its_last_turn() -> None:
    assert turns(a=(2, 9, 9)).of([rows(1, 4, prompt=3)]).tolist() == [USER, USER, ASSISTANT, ASSISTANT]


def test_sequences_of_a_step_stand_one_after_another() -> None:
    made = turns(a=PROMPT, b=(1, 9, 2, 9, 9), c=(9, 9))
    batch = [rows(12, 1), rows(1, 3, "b", 5, 1), rows(0, 2, "c", 2, 4), rows(4, 4, row=6)]
    expected = [ASSISTANT, SYSTEM, USER, USER, USER, USER, *SAID[4:8]]
    assert made.of(batch).tolist() == expected


def test_where_the_template_tells_nothing_the_prompt_is_the_users() -> None:
    made = Turns(RoleMap.unknown("no chat template"))
    made.admit("a", PROMPT)
    assert made.of([rows(10, 4)]).tolist() == [USER, USER, ASSISTANT, ASSISTANT]


def test_finished_sequences_are_forgotten_and_others_stay() -> None:
    made = turns(a=PROMPT, b=(2, 9))
    made.finish(["b", "never seen"])
    assert made.of([rows(0, 3)]).tolist() == [SYSTEM] * 3
    with pytest.raises(KeyError):
        made.of([rows(0, 1, "b", 2)])


def test_a_sequence_that_is_admitted_again_has_its_new_prompt() -> None:
    made = turns(a=PROMPT)
    made.finish(["a"])
    made.admit("a", (2, 9, 9))
    assert made.of([rows(0, 3, prompt=3)]).tolist() == [USER] * 3
