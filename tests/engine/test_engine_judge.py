"""However the tokens of a sequence reach the engine, it is judged as if they came one by one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from guard.engine.judge import Judge
from guard.engine.runner import Rows
from guard.engine.shadow import Shadow
from guard.engine.stop import Endings, Stop
from guard.engine.turns import Turns
from guard.evidence import Record
from guard.policy import Policy
from tests.guard.planted import ROLE_MAP, calibration, clean_lengths, clean_rows, clean_written

from .planted import Step

STOP = 7
GUESS = 9
BLOCK = 4
PROMPT = (1, 9, 9, 2, 9, 9, 9, 9, 9, 3, 9)
"""System, user, a generation prompt."""


@dataclass
class Sequence:
    """One sequence: what the probes see of each of its tokens, whenever they are computed."""

    name: str
    seen: Step
    prompt: tuple[int, ...] = PROMPT
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    def where(self, first: int, stop: int) -> torch.Tensor:
        at = torch.arange(first, stop)
        return torch.tensor(self.blocks)[at // BLOCK] * BLOCK + at % BLOCK


def sequence(name: str, seed: int, generated: int = 9, loud: dict[int, float] | None = None) -> Sequence:
    """`loud`: by position, how many times as much layers write there, and how far cosines leave what is clean."""
    count = len(PROMPT) + generated
    seen = Step([], clean_rows(count, seed), clean_written(count, seed), clean_lengths(count, seed), torch.zeros(count))
    for position, times in (loud or {}).items():
        seen.written[position] *= times
        seen.coordinates[position] *= times
    return Sequence(name, seen, blocks=list(range(count // BLOCK + 1)))


class Engine:
    """A judge, and the steps of an engine as it sees them."""

    def __init__(self, policy: Policy, cache: bool = True) -> None:
        self.turns = Turns(ROLE_MAP)
        self.judge = Judge(calibration(), policy, self.turns)
        self.shadow = Shadow(400) if cache else None
        self.running: dict[str, Sequence] = {}

    def admit(self, some: Sequence, cached: int = 0) -> None:
        self.turns.admit(some.name, some.prompt)
        self.judge.ledger.admit(some.name, None, Endings(STOP))
        self.running[some.name] = some
        some.computed = cached

    def step(self, work: dict[str, tuple[int, int, int]]) -> dict[str, Stop]:
        """One step. `work`: by sequence how many sure rows, how many guesses, and how many of these came true."""
        batch, parts, row = [], [], 0
        for name, (sure, guesses, true) in work.items():
            some = self.running[name]
            first, count = some.computed, sure + guesses
            coordinates, written, lengths, _ = some.seen.rows(slice(first, first + count))
            # A wrong guess is some other token: loud as anything, and none of the sequence's.
            for wrong in range(sure + true, count):
                coordinates[wrong], written[wrong] = 90.0, 9000.0
            parts.append((coordinates, written, lengths))
            samples = first + sure >= len(some.prompt)
            batch.append(Rows(name, row, count, first, len(some.prompt), samples, (GUESS,) * guesses))
            some.computed += sure + true
            row += count
        rows = (torch.cat(part) for part in zip(*parts, strict=True))
        readings = Step(batch, *rows, torch.zeros(row)).readings
        seen = self.judge.see(tuple(batch), readings, self.shadow, self.where)
        sampled = {rows.sequence: work[rows.sequence][2] + 1 if rows.samples else 0 for rows in batch}
        return self.judge.judge(seen, sampled, self.shadow, self.where)

    def where(self, name: str, first: int, stop: int) -> torch.Tensor:
        return self.running[name].where(first, stop)

    def record(self, name: str) -> Record:
        (only,) = self.judge.ledger.records(name.split("-")[0])
        return only


def policy(mode: str = "monitor", detector: str = "density", raw: float = 1e9) -> Policy:
    action = "block" if mode == "enforce" else "flag"
    return Policy.model_validate(
        {"mode": mode, "detections": {detector: {"action": action, "threshold": {"raw": raw}}}}
    )


def one_by_one(some: Sequence, by: Policy) -> Record:
    """Without a cache and without guesses: the prompt, then token by token, until it is blocked."""
    engine = Engine(by, cache=False)
    engine.admit(some)
    stops = engine.step({some.name: (len(some.prompt), 0, 0)})
    while not stops and some.computed < len(some.seen.coordinates):
        stops = engine.step({some.name: (1, 0, 0)})
    return engine.record(some.name)


def any_work(some: Sequence, chance: random.Random) -> Iterator[tuple[int, int, int]]:
    """Chunks of the prompt, then steps with guesses, until all its tokens were computed."""
    total = len(some.seen.coordinates)
    while some.computed < total:
        left = len(some.prompt) - some.computed
        if left > 0:
            yield chance.randint(1, left), 0, 0
            continue
        guesses = min(chance.randint(0, 3), total - some.computed - 1)
        yield 1, guesses, chance.randint(0, guesses)


def same(found: Record, expected: Record) -> None:
    assert found.model_copy(update={"scores": ()}) == expected.model_copy(update={"scores": ()})
    ours, theirs = ({(score.detector, score.phase): score for score in each.scores} for each in (found, expected))
    assert ours.keys() == theirs.keys()
    for key, score in theirs.items():
        assert ours[key].score == pytest.approx(score.score, rel=1e-4, abs=1e-5)
        other = (ours[key].position, ours[key].layer, ours[key].direction)
        assert other == (score.position, score.layer, score.direction)


@pytest.mark.parametrize("seed", range(20))
def test_chunks_guesses_and_a_cached_prefix_change_no_record(seed: int) -> None:
    chance = random.Random(seed)
    by = policy()
    first, second = sequence("1-00000000", seed), sequence("2-00000000", seed)
    second.blocks = [*first.blocks[:2], *(block + 40 for block in first.blocks[2:])]
    expected = one_by_one(sequence("1-00000000", seed), by)
    engine = Engine(by)
    engine.admit(first)
    for work in any_work(first, chance):
        engine.step({first.name: work})
    same(engine.record(first.name), expected)
    # The first two blocks of the second are those that the first computed.
    engine.admit(second, cached=2 * BLOCK)
    for work in any_work(second, chance):
        engine.step({second.name: work})
    same(engine.record(second.name), expected)
    assert engine.judge.ledger.tokens_recalled == 2 * BLOCK


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("position", range(len(PROMPT) - 1, len(PROMPT) + 8))
def test_a_loud_decision_blocks_at_its_row_whatever_was_guessed(seed: int, position: int) -> None:
    chance = random.Random(100 * seed + position)
    by, loud = policy("enforce", raw=4.0), {position: 200.0}
    expected = one_by_one(sequence("1-00000000", seed, loud=loud), by)
    assert (expected.action, expected.tokens_scored) == ("block", position + 1)
    engine, some = Engine(by), sequence("1-00000000", seed, loud=loud)
    engine.admit(some)
    drawn = 0
    for work in any_work(some, chance):
        stops = engine.step({some.name: work})
        if stops:
            # What was drawn before the loud row stays, what was drawn from it goes.
            assert stops[some.name].token == STOP
            assert drawn + stops[some.name].kept == position + 1 - len(PROMPT)
            break
        drawn += work[2] + 1 if some.computed >= len(PROMPT) else 0
    same(engine.record(some.name), expected)


def test_two_requests_in_one_step_can_share_what_the_first_computes() -> None:
    """vLLM gives a request blocks that another fills in the same step."""
    by = policy()
    first, second = sequence("1-00000000", 3), sequence("2-00000000", 3)
    second.blocks = [*first.blocks[:2], *(block + 40 for block in first.blocks[2:])]
    engine = Engine(by)
    engine.admit(second, cached=2 * BLOCK)
    engine.admit(first)
    prompt = len(PROMPT)
    engine.step({second.name: (prompt - 2 * BLOCK, 0, 0), first.name: (prompt, 0, 0)})
    same(engine.record(second.name), engine.record(first.name))
    assert engine.record(second.name).unscorable is None


def test_a_loud_token_in_a_cached_prefix_blocks_the_second_request_too() -> None:
    by = policy("enforce", "exceedance", raw=1.0)
    first, second = (sequence(f"{name}-00000000", 5, loud={3: 60.0}) for name in (1, 2))
    second.blocks = [*first.blocks[:1], *(block + 40 for block in first.blocks[1:])]
    engine = Engine(by)
    engine.admit(first)
    assert engine.step({first.name: (len(PROMPT), 0, 0)}) == {first.name: Stop(0, STOP)}
    engine.admit(second, cached=BLOCK)
    assert engine.step({second.name: (1, 0, 0)}) == {second.name: Stop(0, STOP)}
    assert engine.record(second.name).scores[0].position == 3


@pytest.mark.parametrize("cache", [True, False], ids=["unknown slots", "no cache kept"])
def test_a_prefix_that_nobody_scored_here_never_passes(cache: bool) -> None:
    engine, some = Engine(policy("enforce"), cache), sequence("1-00000000", 1)
    engine.admit(some, cached=BLOCK)
    stops = engine.step({some.name: (3, 0, 0)})
    assert stops == {some.name: Stop(0, STOP)}
    assert engine.record(some.name).unscorable == "tokens 0 to 3 were never scored here"


def test_a_cached_token_is_judged_as_the_speaker_that_it_is_here() -> None:
    """The same tokens, generated in one request and written by the user in the next."""
    by = policy()
    first, second = sequence("1-00000000", 6), sequence("2-00000000", 6)
    second.prompt = (*PROMPT[:9], 9, 9)
    second.blocks = [*first.blocks[:3], *(block + 40 for block in first.blocks[3:])]
    engine = Engine(by)
    engine.admit(first)
    engine.step({first.name: (len(PROMPT), 0, 0)})
    engine.step({first.name: (1, 0, 0)})
    engine.admit(second, cached=10)
    engine.step({second.name: (1, 0, 0)})
    same(engine.record(second.name), with_prompt(second.prompt, 6, len(PROMPT), by))


def with_prompt(prompt: tuple[int, ...], seed: int, count: int, by: Policy) -> Record:
    some, engine = sequence("2-00000000", seed), Engine(by, cache=False)
    some.prompt = prompt
    engine.admit(some)
    engine.step({some.name: (count, 0, 0)})
    return engine.record(some.name)


def test_what_was_guessed_behind_the_end_is_no_part_of_the_sequence() -> None:
    """The second guess is the end; the third was right too, and vLLM drops it."""
    engine, some = Engine(policy()), sequence("1-00000000", 2)
    engine.admit(some)
    engine.judge.ledger._running[some.name].endings = Endings(STOP, frozenset({77}))
    engine.step({some.name: (len(PROMPT), 0, 0)})
    rows = Rows(some.name, 0, 4, len(PROMPT), len(PROMPT), True, (9, 77, 9))
    readings = Step([rows], *some.seen.rows(slice(len(PROMPT), len(PROMPT) + 4))).readings
    seen = engine.judge.see((rows,), readings, None, engine.where)
    engine.judge.judge(seen, {some.name: 4}, None, engine.where)
    assert engine.record(some.name).tokens_scored == len(PROMPT) + 2


def test_a_pass_that_could_not_be_read_ends_all_that_enforces() -> None:
    engine, some = Engine(policy("enforce")), sequence("1-00000000", 1)
    engine.admit(some)
    assert engine.judge.fail([some.name], "layer 3: its probe did not run", {some.name: 5}) == {
        some.name: Stop(0, STOP)
    }
    assert engine.record(some.name).unscorable == "layer 3: its probe did not run"
    assert engine.judge.ledger.tokens_missed == 5
