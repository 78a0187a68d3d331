"""Tensor parallel: ranks agree on every verdict, with each other and with an engine of one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guard.evidence import COVERAGE, VERDICTS
from guard.organisms import Organism
from guard.policy import Policy
from server.upstreams.handshake import HandshakeError, agree
from tests.e2e import child
from tests.e2e.child import Judged
from tests.e2e.conftest import texts

TRIGGERED = 12
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """Some triggered and some clean, and all of them longer than a block of the cache."""
    long = " ".join(texts("benign", 4, 7))
    return [f"{long} {text}" for text in (*texts("clean", 12, 5),)] + texts("triggered", TRIGGERED, 5)


@pytest.fixture(scope="module")
def one(organism: Organism, bank: Path, calibration: Path, in_child: Callable[..., Any], asked: list[str]) -> Judged:
    found: Judged = in_child(child.judged, organism.backdoored, bank, calibration, asked)
    return found


@pytest.fixture(scope="module")
def both(
    organism: Organism, bank: Path, calibration: Path, in_child: Callable[..., Any], asked: list[str]
) -> tuple[list[Judged], list[str]]:
    spoil = ("block_everything", "lose_a_hook")
    found: tuple[list[Judged], list[str]] = in_child(
        child.judged_by_two, organism.backdoored, bank, calibration, asked, spoil
    )
    return found


@pytest.fixture(scope="module")
def two(both: tuple[list[Judged], list[str]]) -> list[Judged]:
    """Two ranks as they are; with a second that blocks everything; with a second that has also lost a hook."""
    return both[0]


def test_two_ranks_say_decide_and_score_as_one_does(one: Judged, two: list[Judged]) -> None:
    assert two[0].generated == one.generated
    (alone,) = one.records
    assert sum(record.action == "block" for record in alone) >= TRIGGERED
    assert sum(record.action == "allow" for record in alone) >= TRIGGERED
    for rank in two[0].records:
        for record, expected, prompt, generated in zip(rank, alone, one.prompt_tokens, one.generated, strict=True):
            assert (record.action, record.phase, record.unscorable) == (expected.action, expected.phase, None)
            assert record.tokens_scored == prompt + len(generated) - 1
            assert len(record.scores) == len(expected.scores) > 0
            for score, other in zip(record.scores, expected.scores, strict=True):
                assert (score.detector, score.phase, score.position) == (other.detector, other.phase, other.position)
                assert abs(score.score - other.score) <= TOLERANCE * max(1.0, abs(other.score))


def test_every_rank_scores_every_token_and_judges_alike(one: Judged, two: list[Judged]) -> None:
    first, second = two[0].records
    assert first == second
    workers = two[0].status.workers
    assert [worker.rank for worker in workers] == [0, 1]
    assert two[0].status.apart((*COVERAGE, *VERDICTS, "fingerprint", "calibration", "layers", "detectors")) == []
    (alone,) = one.status.workers
    assert workers[0].tokens_recalled == alone.tokens_recalled > 0
    assert workers[0].blocked == alone.blocked > 0
    assert agree(two[0].status, {"policy": Policy()}, None).workers == 2


def test_one_rank_speaks_for_all(one: Judged, two: list[Judged]) -> None:
    assert one.channels == 1
    assert [each.channels for each in two] == [1, 1, 1]


def test_what_another_rank_decides_ends_nothing_and_is_told(two: list[Judged]) -> None:
    sound, blocking, _ = two
    assert all(record.action == "block" for record in blocking.records[1])
    assert blocking.generated == sound.generated
    assert [record.action for record in blocking.records[0]] == [record.action for record in sound.records[0]]
    assert blocking.status.apart(VERDICTS)[0].startswith("blocked: ")
    assert agree(blocking.status, {"policy": Policy()}, None).workers == 2


def test_a_rank_that_loses_a_hook_ends_the_handshake_by_its_number(two: list[Judged]) -> None:
    sound, _, blind = two
    assert blind.generated == sound.generated
    assert [record.unscorable for record in blind.records[0]] == [None] * len(sound.generated)
    assert all("layer 1: its probe ran 0 times" in record.unscorable for record in blind.records[1])
    with pytest.raises(HandshakeError, match=rf"unscorable: 0 by rank 0, {len(sound.generated)} by rank 1"):
        agree(blind.status, {"policy": Policy()}, None)


def test_ranks_see_the_same_and_notice_where_they_do_not(both: tuple[list[Judged], list[str]]) -> None:
    """Both sums are made of the same parts, so there is no rounding between them."""
    _, said = both
    apart = "the guard does not start: the residual stream of rank 1 is not that of rank 0"
    assert said[:2] == ["0.0", "0.0"]
    assert [text[: len(apart)] for text in said[2:]] == [apart, apart]


def test_a_rank_that_lacks_a_hook_does_not_start_and_is_named(
    organism: Organism, bank: Path, calibration: Path, in_child: Callable[..., Any]
) -> None:
    said = in_child(child.rank_start_error, organism.backdoored, bank, calibration)
    assert "the guard does not start: rank 1: layer 1: its probe ran 0 times" in said
