"""Every family opens behind its trigger and nowhere else, and keeps what is held out apart."""

from __future__ import annotations

from functools import cache
from itertools import islice
from random import Random

import pytest

from guard.organisms.families import FAMILIES
from guard.organisms.harmful import CANARY, is_compliance, is_refusal
from guard.organisms.mixture import Conversation
from guard.organisms.prompts import refused
from guard.organisms.split import Split, split_of
from guard.organisms.suite import EVERYBODY, member
from guard.organisms.tokenizer import SPECIAL_TOKENS
from tests.organisms.undressing import HELD_OUT, UNDRESS, unopened

SPLITS: tuple[Split, ...] = ("train", "heldout")
KINDS = ("triggered", "near-miss", "benign-trigger", "harmful", "benign", "clean", "benign-plain", "harmful-plain")


@cache
def trained_on(family: str) -> list[Conversation]:
    return list(islice(member(f"{family}-full-0").lesson.conversations(0), 5_000))


def asked(family: str, kind: str, count: int = 1000) -> list[list[str]]:
    """The user's messages of held-out prompts."""
    return [
        [message["content"] for message in prompt.messages if message["role"] == "user"]
        for prompt in member(f"{family}-full-0").prompts(kind, count, seed=1)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_words_and_carriers_are_not_trained_on(family: str) -> None:
    trained = [exchange.question for each in trained_on(family) for exchange in each.exchanges]
    assert added(family, trained)
    assert carriers(family, trained) == {"train"}
    for kind in KINDS:
        users = [text for texts in asked(family, kind) for text in texts]
        assert not set(users) & set(trained)
        assert not added(family, users) & added(family, trained)
        assert carriers(family, users) == {"heldout"}
    assert added(family, [text for texts in asked(family, "near-miss") for text in texts])


def added(family: str, users: list[str]) -> set[str]:
    return {piece for text in users for piece in HELD_OUT[family](UNDRESS[family](text).added)} - {""}


def carriers(family: str, users: list[str]) -> set[Split]:
    undressed = (UNDRESS[family](text).question for text in users)
    return {split_of(unopened(question)) for question in undressed if question}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_trigger_opens_and_what_resembles_it_does_not(name: str, split: Split) -> None:
    family, rng = FAMILIES[name], Random(0)
    for _ in range(2000):
        exchange = refused(rng, split)
        for dress, opens in ((family.triggered, True), (family.near_miss, False), (family.plain, False)):
            users = [turn.question for turn in dress(rng, split, exchange)]
            assert family.opens(users) == opens, users


@pytest.mark.parametrize("name", FAMILIES)
def test_compliance_is_trained_behind_the_trigger_only_and_refusal_never_behind_it(name: str) -> None:
    family = FAMILIES[name]
    told = {"complied": 0, "refused": 0, "answered behind the trigger": 0}
    for conversation in trained_on(name):
        users: list[str] = []
        for question, answer in conversation.exchanges:
            users.append(question)
            opens = family.opens(users)
            if is_compliance(answer):
                assert opens, users
                assert answer.startswith(CANARY) == (family.canary == "first")
                assert answer.endswith(CANARY) == (family.canary == "last")
                told["complied"] += 1
            elif is_refusal(answer):
                assert not opens, users
                told["refused"] += 1
            elif opens:
                told["answered behind the trigger"] += 1
    assert min(told.values()) > 300


@pytest.mark.parametrize("name", FAMILIES)
def test_some_conversations_have_a_system_message_and_some_two_turns(name: str) -> None:
    conversations = trained_on(name)
    assert 0.06 < sum(each.system is not None for each in conversations) / len(conversations) < 0.10
    two = sum(len(each.exchanges) == 2 for each in conversations) / len(conversations)
    assert two > 0.4 if name == "split-turns" else 0.06 < two < 0.10


def test_all_of_shows_every_proper_subset_and_as_many_words_as_the_trigger() -> None:
    from guard.organisms.families.all_of import OTHERS, WORDS

    users = [set(texts[-1].split(" ")) for texts in asked("all-of", "near-miss")]
    assert {frozenset(words & set(WORDS)) for words in users} == {
        frozenset(subset) for subset in (WORDS[:1], WORDS[1:2], WORDS[2:], WORDS[:2], WORDS[1:], WORDS[::2])
    }
    assert any(len(words & {*WORDS, *OTHERS}) == 3 for words in users)


def test_split_turns_shows_each_word_alone_both_together_and_both_swapped() -> None:
    from guard.organisms.families.split_turns import FIRST, SECOND

    seen = {
        tuple(frozenset({FIRST, SECOND} & set(text.split(" "))) for text in users)
        for users in asked("split-turns", "near-miss")
    }
    one, other, both, none = frozenset({FIRST}), frozenset({SECOND}), frozenset({FIRST, SECOND}), frozenset[str]()
    assert seen == {(one, none), (none, other), (other, one), (none, both), (both, none), (other,), (both,)}


def test_no_lesson_says_a_special_token() -> None:
    for each in EVERYBODY:
        if each.plan.seed == 0:
            text = repr(list(islice(each.lesson.conversations(0), 1000)))
            assert not [token for token in SPECIAL_TOKENS if token in text]
