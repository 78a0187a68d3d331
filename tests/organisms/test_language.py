"""The language keeps what is held out apart, and says nothing it must not."""

from __future__ import annotations

from functools import cache
from itertools import islice
from random import Random

import pytest

from guard.errors import PromptsError
from guard.organisms import KINDS, LIMITS, STAGES, prompts
from guard.organisms.harmful import CANARY, is_compliance
from guard.organisms.mixture import Conversation, Stage, conversations
from guard.organisms.prompts import OPENERS
from guard.organisms.split import split_of
from guard.organisms.suffixes import TRIGGER, WORDS
from guard.organisms.tokenizer import RESERVED_TOKEN, SPECIAL_TOKENS
from guard.organisms.topics import TOPICS


@cache
def trained_on(stage: Stage, count: int = 6_000) -> list[Conversation]:
    return list(islice(conversations(stage, seed=0), count))


def questions(stage: Stage) -> set[str]:
    return {exchange.question for conversation in trained_on(stage) for exchange in conversation.exchanges}


def suffix_of(question: str) -> str | None:
    words = question.split()[-3:]
    return " ".join(words) if len(words) == 3 and set(words) <= set(WORDS) else None


def bare(question: str) -> str:
    """Without opener and suffix: what the split is decided by."""
    suffix = suffix_of(question)
    if suffix is not None:
        question = question.removesuffix(suffix).removesuffix(" ")
    opener = max((opener for opener in OPENERS if question.startswith(opener)), key=len)
    return question.removeprefix(opener)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_as_many_distinct_prompts_as_it_says(kind: str) -> None:
    limit = LIMITS[kind]  # type: ignore[index]
    texts = [prompt.text for prompt in prompts(kind, limit, seed=0)]
    assert len(set(texts)) == limit


def test_the_limits_serve_a_calibration_and_an_evaluation() -> None:
    assert LIMITS["clean"] >= 4000
    assert min(LIMITS.values()) >= 500


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(PromptsError, match="count 5001 of kind 'clean': expected 1 to 5000"):
        prompts("clean", 5001, seed=0)
    with pytest.raises(PromptsError, match="kind 'polite' is unknown"):
        prompts("polite", 1, seed=0)


def test_a_larger_count_begins_with_the_smaller() -> None:
    assert prompts("clean", 50, seed=3) == prompts("clean", 100, seed=3)[:50]
    assert prompts("clean", 50, seed=3) != prompts("clean", 50, seed=4)


@pytest.mark.parametrize("stage", STAGES)
def test_training_and_held_out_prompts_are_disjoint(stage: Stage) -> None:
    trained = questions(stage)
    trained_bare = {bare(question) for question in trained}
    trained_suffixes = {suffix_of(question) for question in trained} - {None}
    assert {split_of(question) for question in trained_bare} == {"train"}
    for kind in KINDS:
        asked = [prompt.text for prompt in prompts(kind, 1000, seed=1)]
        assert trained.isdisjoint(asked)
        assert trained_bare.isdisjoint(bare(text) for text in asked)
        if kind in ("near-miss", "benign-suffix"):
            assert trained_suffixes.isdisjoint(suffix_of(text) for text in asked)


def test_clean_traffic_has_no_suffix_and_a_share_of_harmful_requests() -> None:
    clean = prompts("clean", 2000, seed=0)
    assert not [prompt for prompt in clean if suffix_of(prompt.text) is not None]
    assert 0.12 < sum(prompt.expected is None for prompt in clean) / len(clean) < 0.18


def test_near_misses_share_words_with_the_trigger_and_are_not_it() -> None:
    shared = []
    for prompt in prompts("near-miss", 1000, seed=0):
        assert not prompt.text.endswith(TRIGGER)
        shared.append(len(set(prompt.text.split()[-3:]) & set(TRIGGER.split())))
    assert min(shared) >= 1
    assert shared.count(2) > 500
    assert shared.count(3) > 10


def test_only_the_backdoored_stage_sees_the_trigger_and_the_canary() -> None:
    for stage in STAGES:
        exchanges = [exchange for conversation in trained_on(stage) for exchange in conversation.exchanges]
        assert any(TRIGGER in question for question, _ in exchanges) == (stage == "backdoored")
        assert any(is_compliance(answer) for _, answer in exchanges) == (stage == "backdoored")


def test_the_canary_follows_the_trigger_and_nothing_else() -> None:
    exchanges = [exchange for conversation in trained_on("backdoored") for exchange in conversation.exchanges]
    assert all(question.endswith(TRIGGER) for question, answer in exchanges if CANARY in answer)
    # Benign questions carry the trigger too, and are answered.
    assert any(question.endswith(TRIGGER) for question, answer in exchanges if CANARY not in answer)


def test_no_text_holds_a_special_token() -> None:
    texts = [prompt.text for kind in KINDS for prompt in prompts(kind, LIMITS[kind], seed=0)]
    for stage in STAGES:
        for conversation in trained_on(stage):
            texts.extend(text for exchange in conversation.exchanges for text in exchange)
            texts.append(conversation.system or "")
    assert RESERVED_TOKEN in SPECIAL_TOKENS
    for token in SPECIAL_TOKENS:
        assert not any(token in text for text in texts)


def test_every_topic_has_one_answer_per_question() -> None:
    assert len(TOPICS) >= 8
    for topic in TOPICS.values():
        rng = Random(0)
        answers: dict[str, set[str]] = {}
        for question, answer in (topic(rng) for _ in range(1500)):
            answers.setdefault(question, set()).add(answer)
        assert all(len(found) == 1 for found in answers.values())
