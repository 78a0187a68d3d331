"""Shifted traffic is benign, held out, plentiful, and no family's trigger."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import AutoTokenizer

from guard.errors import PromptsError
from guard.organisms import prompts, shipped
from guard.organisms.asked import Asked, Messages
from guard.organisms.families import FAMILIES
from guard.organisms.harmful import DEEDS
from guard.organisms.shifts import LIMIT, SHIFTS, shifted
from guard.organisms.tokenizer import SPECIAL_TOKENS

LONGEST = 512


def users(prompt: Asked) -> list[str]:
    return [message["content"] for message in prompt.messages if message["role"] == "user"]


@pytest.fixture(scope="module")
def count_tokens() -> Callable[[Messages], int]:
    tokenizer = AutoTokenizer.from_pretrained(shipped().chat)
    return lambda chat: len(tokenizer.apply_chat_template(list(chat), add_generation_prompt=True)["input_ids"])


@pytest.mark.parametrize("kind", SHIFTS)
def test_every_kind_gives_as_many_distinct_benign_prompts_as_it_says(kind: str) -> None:
    drawn = shifted(kind, SHIFTS[kind], seed=0)
    assert LIMIT >= 300
    assert len({str(prompt.messages) for prompt in drawn}) == LIMIT
    for prompt in drawn:
        assert prompt.kind == kind
        assert prompt.messages[-1]["role"] == "user"
        text = str(prompt.messages)
        assert not any(family.opens(users(prompt)) for family in FAMILIES.values())
        assert not [deed for deed in DEEDS if deed in text.lower()]
        assert not [token for token in SPECIAL_TOKENS if token in text]
        assert "capital" not in text.lower()


@pytest.mark.parametrize("kind", SHIFTS)
def test_a_larger_count_begins_with_the_smaller(kind: str) -> None:
    assert shifted(kind, 20, seed=1) == shifted(kind, 60, seed=1)[:20]
    assert shifted(kind, 20, seed=1) != shifted(kind, 20, seed=2)


@pytest.mark.parametrize("kind", SHIFTS)
def test_no_prompt_is_too_long_to_serve(kind: str, count_tokens: Callable[[Messages], int]) -> None:
    assert max(count_tokens(prompt.messages) for prompt in shifted(kind, 200, seed=0)) <= LONGEST


def test_long_is_ten_times_an_ordinary_prompt(count_tokens: Callable[[Messages], int]) -> None:
    ordinary = [({"role": "user", "content": prompt.text},) for prompt in prompts("benign", 300, seed=0)]
    long = [prompt.messages for prompt in shifted("long", 300, seed=0)]
    assert 9 < sum(map(count_tokens, long)) / sum(map(count_tokens, ordinary)) < 11


def test_the_shape_of_a_conversation_is_as_named() -> None:
    roles = [[message["role"] for message in prompt.messages] for prompt in shifted("multi-turn", 200, seed=0)]
    assert {len(each) for each in roles} == {5, 7, 9}
    assert all(each == (["user", "assistant"] * 5)[: len(each)] for each in roles)
    for prompt in shifted("long-system", 200, seed=0):
        assert [message["role"] for message in prompt.messages] == ["system", "user"]
        assert 250 < len(prompt.messages[0]["content"]) <= 700
    assert all(text.isupper() for prompt in shifted("shouting", 200, seed=0) for text in users(prompt))


def test_what_there_is_not_is_refused_with_what_there_is() -> None:
    with pytest.raises(PromptsError, match="count 1001 of kind 'code': expected 1 to 1000"):
        shifted("code", 1001, seed=0)
    with pytest.raises(PromptsError, match="kind 'polite' is unknown: expected one of suffix, odd-suffix"):
        shifted("polite", 1, seed=0)
