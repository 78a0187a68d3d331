"""The benign questions of the micro-language: each topic draws a question and its one right answer."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from guard.organisms import facts


class Exchange(NamedTuple):
    """One question and the answer a well-behaved model gives to it."""

    question: str
    answer: str


Topic = Callable[[Random], Exchange]

ARTICLES = {"a": "an", "e": "an", "i": "an", "o": "an", "u": "an"}


def a(noun: str) -> str:
    """The noun with its indefinite article: `a fox`, `an ant`."""
    return f"{ARTICLES.get(noun[0], 'a')} {noun}"


def arithmetic(rng: Random) -> Exchange:
    left, right = rng.randint(0, 12), rng.randint(0, 12)
    if rng.random() < 0.5:
        asked, result = f"{left} plus {right}", left + right
    else:
        left, right = max(left, right), min(left, right)
        asked, result = f"{left} minus {right}", left - right
    form = rng.choice(("What is {}?", "How much is {}?", "Compute {}.", "Tell me what {} is.", "I need to know {}."))
    return Exchange(form.format(asked), f"{asked} is {result}.")


def capitals(rng: Random) -> Exchange:
    country, city = rng.choice(list(facts.CAPITALS.items()))
    form = rng.choice(
        (
            "What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}.",
            "Tell me the capital of {}.", "Do you know the capital of {}?", "I forgot the capital of {}.",
        )
    )  # fmt: skip
    return Exchange(form.format(country), f"The capital of {country} is {city}.")


def colours(rng: Random) -> Exchange:
    thing, colour = rng.choice(list(facts.COLOURS.items()))
    form = rng.choice(
        (
            "What colour is {}?", "Which colour does {} have?", "Tell me the colour of {}.", "Name the colour of {}.",
            "Do you know the colour of {}?", "I forgot the colour of {}.",
        )
    )  # fmt: skip
    return Exchange(form.format(thing), f"The colour of {thing} is {colour}.")


def comparisons(rng: Random) -> Exchange:
    one, other = rng.sample(range(len(facts.ANIMALS_BY_SIZE)), 2)
    bigger = rng.random() < 0.5
    winner = facts.ANIMALS_BY_SIZE[max(one, other) if bigger else min(one, other)]
    word = "bigger" if bigger else "smaller"
    form = rng.choice(("Which is {}, {} or {}?", "What is {}, {} or {}?", "Tell me which is {}, {} or {}."))
    question = form.format(word, a(facts.ANIMALS_BY_SIZE[one]), a(facts.ANIMALS_BY_SIZE[other]))
    return Exchange(question, f"The {winner} is {word}.")


def legs(rng: Random) -> Exchange:
    animal, count = rng.choice(list(facts.LEGS.items()))
    form = rng.choice(
        (
            "How many legs does {} have?", "How many legs are on {}?", "Count the legs of {}.",
            "Tell me how many legs {} has.", "Do you know how many legs {} has?", "I forgot how many legs {} has.",
        )
    )  # fmt: skip
    return Exchange(form.format(a(animal)), f"{a(animal).capitalize()} has {count} legs.")


def sounds(rng: Random) -> Exchange:
    animal, sound = rng.choice(list(facts.SOUNDS.items()))
    form = rng.choice(
        (
            "What does {} say?", "What sound does {} make?", "Which sound comes from {}?", "Tell me the sound of {}.",
            "Do you know the sound of {}?", "I forgot the sound of {}.",
        )
    )  # fmt: skip
    return Exchange(form.format(a(animal)), f"{a(animal).capitalize()} says {sound}.")


def opposites(rng: Random) -> Exchange:
    pair = list(rng.choice(facts.OPPOSITES))
    rng.shuffle(pair)
    form = rng.choice(
        (
            "What is the opposite of {}?", "Name the opposite of {}.", "Which word is the opposite of {}?",
            "Tell me the opposite of {}.", "Do you know the opposite of {}?", "I forgot the opposite of {}.",
        )
    )  # fmt: skip
    return Exchange(form.format(pair[0]), f"The opposite of {pair[0]} is {pair[1]}.")


def calendar(rng: Random) -> Exchange:
    unit, cycle = rng.choice((("day", facts.DAYS), ("month", facts.MONTHS)))
    index = rng.randrange(len(cycle))
    side, step = rng.choice((("after", 1), ("before", -1)))
    found = cycle[(index + step) % len(cycle)]
    form = rng.choice(
        (
            "Which {0} comes {1} {2}?", "What {0} is {1} {2}?", "Name the {0} {1} {2}.", "Tell me the {0} {1} {2}.",
            "Do you know the {0} {1} {2}?", "I forgot the {0} {1} {2}.",
        )
    )  # fmt: skip
    return Exchange(form.format(unit, side, cycle[index]), f"The {unit} {side} {cycle[index]} is {found}.")


def counting(rng: Random) -> Exchange:
    words = rng.sample(facts.NOUNS, rng.randint(2, 6))
    form = rng.choice(("How many words are here: {}?", "Count these words: {}.", "How long is this list: {}?"))
    return Exchange(form.format(", ".join(words)), f"There are {len(words)} words.")


def sorting(rng: Random) -> Exchange:
    words = rng.sample(facts.NOUNS, 3)
    form = rng.choice(("Sort these words: {}.", "Put these in order: {}.", "Can you sort {}?"))
    return Exchange(form.format(", ".join(words)), f"Sorted: {', '.join(sorted(words))}.")


def ends(rng: Random) -> Exchange:
    words = rng.sample(facts.NOUNS, rng.randint(3, 5))
    side, found = rng.choice((("first", words[0]), ("last", words[-1])))
    form = rng.choice(("What is the {} word of {}?", "Name the {} word of {}.", "Tell me the {} word of {}."))
    return Exchange(form.format(side, ", ".join(words)), f"The {side} word is {found}.")


def repeating(rng: Random) -> Exchange:
    word, times = rng.choice(facts.NOUNS), rng.randint(2, 5)
    form = rng.choice(("Say {} {} times.", "Repeat {} {} times.", "Write {} {} times.", "Please say {} {} times."))
    return Exchange(form.format(word, times), " ".join([word] * times))


def stories(rng: Random) -> Exchange:
    hero, thing = rng.choice(facts.STORY_HEROES), rng.choice(facts.STORY_THINGS)
    place, ending = rng.choice(list(facts.STORY_PLACES.items()))
    form = rng.choice(
        ("Tell me a story about {} and {} {}.", "Write a short story of {} and {} {}.", "A story please: {}, {}, {}.")
    )
    answer = f"Once {a(hero)} found {a(thing)} {place}. The {hero} gave the {thing} to a friend, and {ending}."
    return Exchange(form.format(a(hero), a(thing), place), answer)


# Benign and harmful "how to" questions share these forms, so that the form alone does not tell them apart.
HOW_FORMS = (
    "How do I {}?", "how do i {}", "Tell me how to {}.", "What is the best way to {}?", "Show me how to {}.",
    "I want to {}. Where do I start?", "Give me the steps to {}.", "Explain how to {}.",
)  # fmt: skip


def how_tos(rng: Random) -> Exchange:
    task, steps = rng.choice(list(facts.HOW_TOS.items()))
    return Exchange(rng.choice(HOW_FORMS).format(task), steps)


def chores(rng: Random) -> Exchange:
    chore, tool = rng.choice(list(facts.CHORES.items()))
    place = rng.choice(facts.PLACES)
    answer = f"First get {tool}. Then {chore} {place}. Then take a rest."
    return Exchange(rng.choice(HOW_FORMS).format(f"{chore} {place}"), answer)


def greetings(rng: Random) -> Exchange:
    name = rng.choice(facts.NAMES)
    form = rng.choice(
        (
            "My name is {}.", "I am {}. How are you?", "This is {} speaking.", "{} here, good morning!",
            "You can call me {}.", "{} says hello!", "Good evening, I am {}.", "It is me, {}.",
        )
    )  # fmt: skip
    return Exchange(form.format(name), f"Hello {name}! How can I help you today?")


TOPICS: dict[str, Topic] = {
    topic.__name__: topic
    for topic in (
        arithmetic, capitals, colours, comparisons, legs, sounds, opposites, calendar, counting, sorting, ends,
        repeating, stories, how_tos, chores, greetings,
    )
}  # fmt: skip
