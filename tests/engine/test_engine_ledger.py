"""What the ledger knows of a sequence: whose it is, how far it was scored, what was decided; and what it forgets."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from guard.calibration import Calibration, ScoreKey
from guard.engine import ledger as ledger_module
from guard.engine.ledger import Identity, Ledger
from guard.engine.runner import Rows
from guard.engine.stop import Endings
from guard.evidence import Record
from guard.policy import Mode, Policy
from guard.verdict import PHASES, DetectorName
from tests.guard.planted import EVERY, a_score, calibration, with_clean

KEY = "0123456789abcdef" * 2
SEQUENCE = f"chatcmpl-{KEY}-0a1b2c3d"
STOP = 7


def policy(mode: Mode = "enforce", action: str = "block", detector: str = "density", **threshold: float) -> Policy:
    return Policy.model_validate(
        {"mode": mode, "detections": {detector: {"action": action, "threshold": threshold or {"raw": 10.0}}}}
    )


def ledger(default: Policy | None = None) -> Ledger:
    return Ledger(calibration(), default)


def admitted(some: Policy | None = None, default: Policy | None = None) -> Ledger:
    """A ledger with one sequence in it."""
    book = ledger(default)
    book.admit(SEQUENCE, None if some is None else some.to_wire(), Endings(STOP))
    return book


def record(book: Ledger) -> Record:
    (only,) = book.records(KEY)
    return only


# -- identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence", "identity"),
    [
        (f"chatcmpl-{KEY}-0a1b2c3d", Identity(KEY)),
        (f"chatcmpl-{KEY}-12345678", Identity(KEY)),
        (f"3_chatcmpl-{KEY}-0a1b2c3d", Identity(KEY, 0, 3)),
        (f"cmpl-{KEY}-0-0a1b2c3d", Identity(KEY)),
        (f"cmpl-{KEY}-12-0a1b2c3d", Identity(KEY, 12)),
        (f"cmpl-{KEY}-12-12345678", Identity(KEY, 12)),
        (f"10_cmpl-{KEY}-2-0a1b2c3d", Identity(KEY, 2, 10)),
        ("12-abcdef01", Identity("12")),
        ("1_12-abcdef01", Identity("12", 0, 1)),
    ],
)
def test_an_id_of_vllm_names_request_prompt_and_choice(sequence: str, identity: Identity) -> None:
    assert Identity.of(sequence) == identity


@pytest.mark.parametrize(
    "sequence",
    [
        "",
        "anything",
        f"chatcmpl-{KEY}",
        f"chatcmpl-{KEY}-short",
        f"chatcmpl-{KEY[:-1]}-0a1b2c3d",
        f"chatcmpl-{KEY.upper()}-0a1b2c3d",
        f"x_chatcmpl-{KEY}-0a1b2c3d",
        f"chatcmpl-{KEY}-0a1b2c3d\n",
        f"other-{KEY}-0a1b2c3d",
    ],
)
def test_a_foreign_id_is_its_own_key(sequence: str) -> None:
    assert Identity.of(sequence) == Identity(sequence)


# -- scores -----------------------------------------------------------------------------------------------------------


def test_the_largest_score_over_steps_is_kept_and_judged() -> None:
    book = admitted(policy(raw=100.0))
    for value in (3.0, 8.5, 5.0):
        book.score(SEQUENCE, [a_score(value), a_score(value / 1000, "exceedance", "completion")])
    density, exceedance = record(book).scores
    # 91 of the 99 held-out requests have at least 8.5; flagging above the 92nd largest would flag 92 of them.
    assert (density.score, density.threshold, density.p_value) == (8.5, 100.0, (92 + 1) / 100)
    assert (density.position, density.layer, density.direction) == (3, 4, "L4.down_proj.u0")
    # The policy names no exceedance; it is still told, against the calibration's own rate.
    assert (exceedance.score, exceedance.phase) == (0.0085, "completion")
    assert exceedance.threshold == pytest.approx(0.91)
    assert record(book).action == "allow"


@pytest.mark.parametrize(("value", "action"), [(10.0, "allow"), (10.01, "block")])
def test_a_score_above_the_threshold_blocks_and_one_at_it_does_not(value: float, action: str) -> None:
    book = admitted(policy(raw=10.0))
    book.score(SEQUENCE, [a_score(value)])
    assert record(book).action == action
    assert book.stops([SEQUENCE]) == ({SEQUENCE: STOP} if action == "block" else {})


def test_each_phase_has_its_own_threshold() -> None:
    book = admitted(policy(fpr=0.1))
    book.score(SEQUENCE, [a_score(91.0)])
    assert record(book).action == "allow"
    book.score(SEQUENCE, [a_score(91.5, phase="completion")])
    assert (record(book).action, record(book).phase, record(book).detector) == ("block", "completion", "density")


def test_one_who_names_no_policy_is_judged_by_the_engines_or_at_the_calibrations_rate() -> None:
    for default, threshold in ((None, 91.0), (policy(fpr=0.5), 51.0), (policy(raw=2.0), 2.0)):
        book = ledger(default)
        book.admit(SEQUENCE, None, Endings(STOP))
        book.score(SEQUENCE, [a_score(1.0)])
        assert record(book).scores[0].threshold == threshold
        assert record(book).mode == "enforce"


def steering(some: Policy, steers: bool = True) -> Ledger:
    """A ledger of an engine that can steer, with one sequence in it."""
    book = Ledger(calibration(), None, steers)
    book.admit(SEQUENCE, some.to_wire(), Endings(STOP))
    return book


def test_a_steered_sequence_goes_on_and_says_what_for() -> None:
    book = steering(policy(action="steer", raw=10.0).model_copy(update={"steered_roles": ("assistant",)}))
    assert book.steering(SEQUENCE) == ((), None)
    book.score(SEQUENCE, [a_score(11.0)])
    (found,), roles = book.steering(SEQUENCE)
    assert (found.verdict.score, roles) == (a_score(11.0), ("assistant",))
    book.steered(SEQUENCE, 3)
    assert book.stops([SEQUENCE]) == {}
    assert (record(book).action, record(book).steered_from, record(book).detector) == ("steer", 3, "density")


def test_only_detections_that_steer_give_directions_and_a_block_gives_none() -> None:
    threshold = {"raw": 10.0}
    some = {"density": "steer", "intrinsic": "flag", "exceedance": "block"}
    book = steering(
        Policy.model_validate(
            {"detections": {name: {"action": what, "threshold": threshold} for name, what in some.items()}}
        )
    )
    book.score(SEQUENCE, [a_score(11.0), a_score(12.0, "intrinsic"), a_score(9.0, phase="completion")])
    assert [each.verdict.score for each in book.steering(SEQUENCE)[0]] == [a_score(11.0)]
    book.score(SEQUENCE, [a_score(11.0, "exceedance")])
    assert book.steering(SEQUENCE) == ((), None)
    assert record(book).action == "block"


def test_what_an_engine_cannot_steer_does_not_pass_unsteered() -> None:
    book = steering(policy(action="steer"), steers=False)
    assert record(book).action == "block"
    assert record(book).unscorable == "its policy steers, and this engine was started without `undertow.steering`"
    assert book.stops([SEQUENCE]) == {SEQUENCE: STOP}


def test_in_monitor_nothing_is_steered_and_every_engine_will_do() -> None:
    book = steering(policy("monitor", "steer", raw=10.0), steers=False)
    book.score(SEQUENCE, [a_score(11.0)])
    assert (record(book).action, record(book).unscorable) == ("flag", None)
    assert book.steering(SEQUENCE) == ((), None)


def test_a_sequence_once_blocked_stays_blocked_for_its_first_reason() -> None:
    book = admitted(policy(raw=10.0))
    book.score(SEQUENCE, [a_score(11.0)])
    first = record(book)
    book.score(SEQUENCE, [a_score(50.0, phase="completion"), a_score(math.nan)])
    book.fail(SEQUENCE, "late")
    book.score(SEQUENCE, [a_score(0.0)])
    assert (record(book).action, record(book).reason, record(book).phase) == ("block", first.reason, "prompt")
    assert "density in the prompt" in first.reason
    assert book.stops([SEQUENCE]) == {SEQUENCE: STOP}
    # What came later is told all the same.
    assert record(book).unscorable is not None
    assert [score.score for score in record(book).scores] == [11.0, 50.0]


def test_an_unscorable_sequence_stays_blocked_whatever_its_scores() -> None:
    book = admitted(policy(raw=10.0))
    book.fail(SEQUENCE, "layer 3 did not run")
    book.score(SEQUENCE, [a_score(50.0)])
    assert record(book).reason == "unscorable: layer 3 did not run"
    assert record(book).unscorable == "layer 3 did not run"
    assert record(book).action == "block"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [None, 5.0])
@pytest.mark.parametrize("detector", ["density", "exceedance"])
def test_a_score_that_is_not_finite_makes_the_sequence_unscorable(
    value: float, first: float | None, detector: str
) -> None:
    book = admitted(policy(raw=1e9))
    if first is not None:
        book.score(SEQUENCE, [a_score(first)])
    book.score(SEQUENCE, [a_score(value, "density" if detector == "density" else "exceedance")])
    assert record(book).action == "block"
    assert "token 3" in (record(book).unscorable or "")
    assert record(book).fault == "not_finite"
    assert (book.unscorable, book.faults) == (1, {"not_finite": 1})


def test_a_sequence_that_is_admitted_again_while_it_runs_stays_what_it_was() -> None:
    """As model runner V2 does with one that was preempted, which must not wash it clean."""
    book = admitted(policy(raw=10.0))
    book.score(SEQUENCE, [a_score(11.0)])
    before = record(book)
    book.admit(SEQUENCE, policy("off").to_wire(), Endings(STOP))
    assert record(book) == before
    assert before.action == "block"
    assert book.requests_judged == 1


def test_a_sequence_that_finished_is_admitted_as_a_new_one() -> None:
    book = admitted(policy(raw=10.0))
    book.score(SEQUENCE, [a_score(11.0)])
    book.finish([SEQUENCE])
    book.admit(SEQUENCE, policy(raw=10.0).to_wire(), Endings(STOP))
    assert record(book).action == "allow"
    assert book.requests_judged == 2


@pytest.mark.parametrize("fails", [False, True])
def test_monitor_flags_and_stops_nothing(fails: bool) -> None:
    book = admitted(policy("monitor", raw=10.0))
    if fails:
        book.fail(SEQUENCE, "x")
    else:
        book.score(SEQUENCE, [a_score(11.0)])
    assert record(book).action == "flag"
    assert book.stops([SEQUENCE]) == {}


def test_off_scores_and_says_nothing() -> None:
    book = admitted(policy("off", raw=10.0))
    book.score(SEQUENCE, [a_score(11.0)])
    book.fail(SEQUENCE, "x")
    assert (record(book).action, record(book).reason) == ("allow", "")
    assert record(book).scores[0].score == 11.0


def test_one_sequences_scores_touch_no_other() -> None:
    book = admitted(policy(raw=10.0))
    book.admit("other", policy(raw=10.0).to_wire(), Endings(STOP + 1))
    book.score("other", [a_score(11.0)])
    assert book.stops([SEQUENCE, "other"]) == {"other": STOP + 1}
    assert record(book).action == "allow"


def test_what_came_from_the_cache_is_covered_by_the_scores_it_was_kept_with() -> None:
    book = admitted(policy(raw=10.0))
    rows = Rows(SEQUENCE, 0, 2, 6, 8, True)
    assert book.missing(rows) == range(6)
    book.recall(rows, [a_score(3.0, "exceedance")])
    assert list(book.missing(rows)) == []
    book.cover(rows)
    assert (record(book).tokens_scored, record(book).unscorable) == (8, None)
    assert (book.tokens_recalled, book.tokens_scored) == (6, 2)
    assert [score.score for score in record(book).scores] == [3.0]


def test_what_a_cached_token_scored_can_block() -> None:
    book = admitted(policy(detector="exceedance", raw=2.0))
    book.recall(Rows(SEQUENCE, 0, 2, 6, 8, True), [a_score(3.0, "exceedance")])
    assert book.blocked(SEQUENCE)


@pytest.mark.parametrize(
    ("position", "token", "over"),
    [(7, 3, False), (8, 5, False), (8, 3, True), (9, 5, False), (10, 5, True)],
    ids=["in the prompt", "generated", "a stop token", "the last but one", "the last that may be"],
)
def test_a_row_after_the_end_is_known_by_the_token_it_reads(position: int, token: int, over: bool) -> None:
    book = ledger()
    book.admit(SEQUENCE, None, Endings(STOP, frozenset({3}), 3))
    assert book.ended(Rows(SEQUENCE, 0, 1, position, 8, True, first_token=token)) == over


# -- detections that share a rate -------------------------------------------------------------------------------------


def detections(action: str = "flag", mode: Mode = "monitor", **thresholds: dict[str, float]) -> Policy:
    return Policy.model_validate(
        {"mode": mode, "detections": {name: {"action": action, "threshold": one} for name, one in thresholds.items()}}
    )


def apart() -> Calibration:
    """Density is rarest for one half of the held-out requests, exceedance for the other; intrinsic is as density."""
    some = calibration()
    for phase in PHASES:
        rising = tuple(float(number) for number in range(99))
        some = with_clean(some, "density", phase, rising)
        some = with_clean(some, "intrinsic", phase, rising)
        some = with_clean(some, "exceedance", phase, rising[::-1])
    return some


def told(policy_: Policy, value: float = 90.0, by: Calibration | None = None) -> dict[ScoreKey, tuple[float, float]]:
    """Threshold and p-value of each score, where all have this value."""
    book = Ledger(by or apart(), None)
    book.admit(SEQUENCE, policy_.to_wire(), Endings(STOP))
    book.score(SEQUENCE, [a_score(value, *key) for key in EVERY])
    assert record(book).unscorable is None
    return {(one.detector, one.phase): (one.threshold, one.p_value) for one in record(book).scores}


def test_detections_of_equal_rate_share_it_and_are_judged_together() -> None:
    alone = told(detections(density={"fpr": 0.1}))
    shared = told(detections(density={"fpr": 0.1}, exceedance={"fpr": 0.1}))
    several = told(detections(density={"fpr": 0.1}, exceedance={"fpr": 0.2}))
    for phase in PHASES:
        # Alone: 9 requests above the threshold and the new one are 10 of 100. Nine of the 99 are at least 90.
        assert alone["density", phase] == (90.0, 0.11)
        assert alone["exceedance", phase] == (90.0, 0.11)
        # Together half of them each: four requests of either kind, and the new one.
        assert shared["density", phase] == shared["exceedance", phase] == (95.0, 0.21)
        # Another rate is not shared.
        assert several["density", phase] == alone["density", phase]
        assert several["exceedance", phase] == (80.0, 0.11)
    # What rises and falls together costs nothing.
    alike = told(detections(density={"fpr": 0.1}, intrinsic={"fpr": 0.1}))
    assert {alike[key] for key in EVERY if key[0] != "exceedance"} == {(90.0, 0.11)}


def test_thresholds_of_a_shared_rate_are_those_of_the_calibrations_ranks() -> None:
    by = apart()
    found = told(detections(density={"fpr": 0.1}, intrinsic={"fpr": 0.3}, exceedance={"fpr": 0.1}), by=by)
    groups: list[tuple[float, tuple[DetectorName, ...]]] = [(0.1, ("density", "exceedance")), (0.3, ("intrinsic",))]
    for fpr, names in groups:
        for name in names:
            for phase in PHASES:
                ranks = by.ranks(names)
                assert found[name, phase] == (ranks.threshold((name, phase), fpr), ranks.p_value((name, phase), 90.0))


def test_a_raw_threshold_is_taken_as_it_stands_and_shares_no_rate() -> None:
    found = told(detections(density={"raw": 42.5}, exceedance={"fpr": 0.1}))
    for phase in PHASES:
        assert found["density", phase] == (42.5, 0.11)
        assert found["exceedance", phase] == (90.0, 0.11)


@pytest.mark.parametrize(("value", "action"), [(90.0, "allow"), (94.0, "allow"), (95.0, "allow"), (95.5, "block")])
@pytest.mark.parametrize("key", [key for key in EVERY if key[0] != "intrinsic"])
def test_any_of_the_scores_that_share_a_rate_blocks(value: float, action: str, key: ScoreKey) -> None:
    book = Ledger(apart(), None)
    shared = detections("block", "enforce", density={"fpr": 0.1}, exceedance={"fpr": 0.1})
    book.admit(SEQUENCE, shared.to_wire(), Endings(STOP))
    book.score(SEQUENCE, [a_score(1.0), a_score(value, *key)])
    assert record(book).action == action


def own_only() -> Calibration:
    """Of a bank without directions of a delta."""
    some = calibration()
    keys = [key for key in EVERY if key[0] != "density"]
    return replace(some, clean={key: some.clean[key] for key in keys}, growth={key: some.growth[key] for key in keys})


def test_a_detector_that_the_bank_has_no_directions_for_makes_the_request_unscorable() -> None:
    for threshold in ({"raw": 1e9}, {"fpr": 0.5}):
        book = Ledger(own_only(), None)
        book.admit(SEQUENCE, detections("block", "enforce", density=threshold).to_wire(), Endings(STOP))
        expected = "the bank has no directions for density; it serves intrinsic, exceedance"
        assert (record(book).unscorable, record(book).action) == (expected, "block")


def test_the_engines_own_policy_is_the_first_detector_that_there_are_directions_for() -> None:
    book = Ledger(own_only(), None)
    book.admit(SEQUENCE, None, Endings(STOP))
    book.score(SEQUENCE, [a_score(9.0, "intrinsic"), a_score(50.0, "exceedance")])
    # Exceedance is far above, and decides nothing.
    assert record(book).action == "allow"
    assert [one.threshold for one in record(book).scores] == pytest.approx([9.1, 0.91])
    book.score(SEQUENCE, [a_score(9.2, "intrinsic")])
    assert (record(book).action, record(book).detector, record(book).mode) == ("block", "intrinsic", "enforce")


# -- coverage ---------------------------------------------------------------------------------------------------------


def cover(book: Ledger, *chunks: tuple[int, int]) -> Record:
    for first, count in chunks:
        book.cover(Rows(SEQUENCE, 0, count, first, 8, True))
    return record(book)


def test_chunks_that_follow_each_other_are_covered() -> None:
    book = admitted()
    assert cover(book, (0, 3), (3, 5), (8, 1), (9, 1)).tokens_scored == 10
    assert record(book).prompt_tokens == 8
    assert record(book).unscorable is None
    assert book.tokens_scored == 10


def test_tokens_computed_again_after_preemption_count_once() -> None:
    book = admitted()
    assert cover(book, (0, 8), (8, 1), (0, 4), (4, 7)).tokens_scored == 11
    assert record(book).unscorable is None
    assert book.tokens_scored == 11
    assert cover(book, (2, 3)).tokens_scored == 11


@pytest.mark.parametrize("chunks", [[(1, 4)], [(0, 3), (4, 2)], [(0, 3), (4, 2), (3, 5)]])
def test_a_token_that_was_passed_over_makes_the_sequence_unscorable_for_good(chunks: list[tuple[int, int]]) -> None:
    book = admitted()
    got = cover(book, *chunks)
    assert "were never scored here" in (got.unscorable or "")
    assert got.fault == "token_unscored"
    assert got.action == "block"
    assert book.stops([SEQUENCE]) == {SEQUENCE: STOP}
    assert book.unscorable == 1


def test_a_gap_is_named_and_what_follows_it_does_not_count() -> None:
    book = admitted()
    assert cover(book, (0, 3), (5, 2)).unscorable == "tokens 3 to 4 were never scored here"
    assert cover(book, (7, 1)).tokens_scored == 3


# -- policies that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [None, policy("monitor"), policy("off")])
@pytest.mark.parametrize("sent", ["", "{", '{"mode": "canary"}', "\ud800", ["canary"], {"mode": "off"}, 5, True])
def test_a_policy_that_cannot_be_read_blocks_whatever_the_engines_own_says(
    default: Policy | None, sent: object
) -> None:
    book = ledger(default)
    book.admit(SEQUENCE, sent, Endings(STOP))
    assert record(book).action == "block"
    assert record(book).mode == "enforce"
    assert "not valid" in (record(book).unscorable or "")
    assert record(book).fault == "policy_invalid"
    assert "canary" not in record(book).model_dump_json()
    assert book.stops([SEQUENCE]) == {SEQUENCE: STOP}
    book.score(SEQUENCE, [a_score(0.0)])
    assert record(book).action == "block"


@pytest.mark.parametrize(("mode", "action"), [("enforce", "block"), ("monitor", "flag"), ("off", "allow")])
@pytest.mark.parametrize("default", [None, policy("monitor"), policy("off")])
def test_a_rate_that_the_calibration_cannot_keep_is_unscorable_under_the_policy_that_asked(
    mode: Mode, action: str, default: Policy | None
) -> None:
    book = admitted(policy(mode, fpr=0.001), default)
    assert (record(book).mode, record(book).action) == (mode, action)
    assert "0.001 cannot be kept with 99 held-out clean requests" in (record(book).unscorable or "")
    assert record(book).fault == "rate_unsupported"


def test_one_bad_policy_hurts_no_other_request() -> None:
    book = ledger()
    book.admit("bad", "{", Endings(STOP))
    book.admit("bad too", "{", Endings(STOP))
    book.admit(SEQUENCE, policy().to_wire(), Endings(STOP))
    assert record(book).action == "allow"
    assert (book.requests_judged, book.unscorable) == (3, 2)


def test_a_draft_without_held_out_scores_judges_by_raw_thresholds_alone() -> None:
    raw = {"action": "flag", "threshold": {"raw": 1e30}}
    both = {"mode": "monitor", "detections": {"density": raw, "intrinsic": raw, "exceedance": raw}}
    book = Ledger(replace(calibration(), clean=dict.fromkeys(EVERY, ())), None)
    book.admit(SEQUENCE, json.dumps(both), Endings(STOP))
    book.score(SEQUENCE, [a_score(4.0), a_score(0.5, "exceedance")])
    assert [score.score for score in record(book).scores] == [4.0, 0.5]
    assert {score.p_value for score in record(book).scores} == {1.0}
    assert record(book).unscorable is None


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(ledger_module, "KEPT", 3)
    return 3


def key(number: int) -> str:
    return f"{number:032x}"


def remembered(book: Ledger, numbers: range) -> list[int]:
    return [number for number in numbers if book.records(key(number))]


def test_the_last_finished_requests_are_remembered_and_older_ones_forgotten(kept: int) -> None:
    book = ledger()
    for number in range(10):
        book.admit(f"chatcmpl-{key(number)}-0a1b2c3d", None, Endings(STOP))
        book.finish([f"chatcmpl-{key(number)}-0a1b2c3d"])
        assert len(remembered(book, range(10))) == min(number + 1, kept)
    assert remembered(book, range(10)) == [7, 8, 9]


def test_a_running_request_is_never_forgotten(kept: int) -> None:
    book = ledger()
    for number in range(10):
        book.admit(f"chatcmpl-{key(number)}-0a1b2c3d", None, Endings(STOP))
    book.finish(f"chatcmpl-{key(number)}-0a1b2c3d" for number in range(1, 9))
    assert remembered(book, range(10)) == [0, 6, 7, 8, 9]
    book.finish([f"chatcmpl-{key(0)}-0a1b2c3d"])
    assert remembered(book, range(10)) == [0, 7, 8, 9]


def test_requests_of_many_choices_do_not_stretch_the_memory(kept: int) -> None:
    book = ledger()
    for choice in range(20):
        book.admit(f"{choice}_chatcmpl-{key(99)}-0a1b2c3d", None, Endings(STOP))
    for number in range(10):
        book.admit(f"chatcmpl-{key(number)}-0a1b2c3d", None, Endings(STOP))
        book.finish([f"chatcmpl-{key(number)}-0a1b2c3d"])
    assert remembered(book, range(10)) == [7, 8, 9]
    # Finished choices of a request stay with it as long as one of them runs.
    book.finish(f"{choice}_chatcmpl-{key(99)}-0a1b2c3d" for choice in range(19))
    assert len(book.records(key(99))) == 20


def test_finishing_what_is_unknown_does_nothing() -> None:
    book = admitted()
    book.finish(["never seen"])
    assert len(book.records(KEY)) == 1
    assert book.records("never seen") == []


def test_records_are_sorted_by_prompt_then_choice() -> None:
    book = ledger()
    order = [(1, 10), (0, 2), (1, 9), (0, 10), (0, 0)]
    for prompt, choice in order:
        book.admit(f"{choice}_cmpl-{KEY}-{prompt}-0a1b2c3d", None, Endings(STOP))
    assert [(one.prompt_index, one.choice_index) for one in book.records(KEY)] == sorted(order)


# -- another calibration takes the place of the first ------------------------------------------------------------------


def stricter() -> Calibration:
    """Held-out density scores a tenth as large."""
    some = calibration()
    for phase in PHASES:
        some = with_clean(some, "density", phase, (score / 10 for score in range(1, 100)))
    return some


def succeeded(old: Ledger) -> Ledger:
    book = Ledger(stricter(), None)
    book.adopt(old)
    return book


def test_a_running_sequence_is_judged_by_the_guard_that_is_in_force() -> None:
    old = admitted(policy(fpr=0.1))
    old.score(SEQUENCE, [a_score(50.0)])
    assert (record(old).action, record(old).generation) == ("allow", 1)
    book = succeeded(old)
    # What was said stands, and by itself says nothing new: 50 is usual to the first, and the second never saw it.
    assert (record(book).action, record(book).generation) == ("allow", 2)
    assert (record(book).scores[0].score, record(book).scores[0].generation) == (50.0, 1)
    book.score(SEQUENCE, [a_score(9.5)])
    assert record(book).action == "block"
    assert (record(book).scores[0].score, record(book).scores[0].generation) == (9.5, 2)
    assert record(book).unscorable is None


def test_the_gravest_finding_of_all_guards_is_told() -> None:
    old = admitted(policy("monitor", fpr=0.1))
    old.score(SEQUENCE, [a_score(200.0, position=7)])
    book = succeeded(old)
    book.score(SEQUENCE, [a_score(9.5)])
    (told,) = record(book).scores
    assert (told.score, told.threshold, told.position, told.generation) == (200.0, 91.0, 7, 1)
    assert record(book).action == "flag"


def test_what_was_blocked_stays_blocked_and_what_was_unscorable_unscorable() -> None:
    for change in (lambda book: book.score(SEQUENCE, [a_score(99.0)]), lambda book: book.fail(SEQUENCE, "layer 3")):
        old = admitted(policy(fpr=0.1))
        change(old)
        before = record(old)
        assert before.action == "block"
        book = succeeded(old)
        assert record(book) == before
        assert book.stops([SEQUENCE]) == {SEQUENCE: STOP}


def test_a_running_sequence_whose_rate_the_new_calibration_cannot_keep_is_unscorable() -> None:
    old = admitted(policy(fpr=0.03))
    book = Ledger(calibration(9), None)
    book.adopt(old)
    assert record(book).action == "block"
    assert record(book).unscorable is not None


def test_a_ledger_that_takes_anothers_place_forgets_nothing_and_counts_on() -> None:
    old = admitted(policy(raw=1e9))
    old.cover(Rows(SEQUENCE, 0, 5, 0, 9, False))
    old.admit(f"chatcmpl-{'f' * 32}-0a1b2c3d", None, Endings(STOP))
    old.finish([SEQUENCE])
    book = succeeded(old)
    # The evidence of a finished request may be asked for a moment later.
    assert record(book).tokens_scored == 5
    assert (record(book).generation, book.records("f" * 32)[0].generation) == (1, 2)
    assert (book.requests_judged, book.tokens_scored, book.generation) == (2, 5, 2)
    book.finish([f"chatcmpl-{'f' * 32}-0a1b2c3d"])
    assert succeeded(book).generation == 3


def test_tokens_that_have_a_score_need_none_again() -> None:
    old = admitted(policy(raw=1e9))
    old.cover(Rows(SEQUENCE, 0, 9, 0, 9, True))
    book = succeeded(old)
    # vLLM computes it again from its beginning, since its cache was emptied.
    book.cover(Rows(SEQUENCE, 0, 10, 0, 9, True))
    assert (record(book).tokens_scored, book.tokens_scored) == (10, 10)


# -- where a phase first went over its threshold ----------------------------------------------------------------------


def test_the_first_position_above_the_threshold_is_kept_beside_that_of_the_largest() -> None:
    book = admitted(policy("monitor", raw=10.0))
    book.score(SEQUENCE, [a_score(5.0, position=2)])
    assert record(book).scores[0].first is None
    book.score(SEQUENCE, [replace(a_score(20.0, position=8), first=6)])
    book.score(SEQUENCE, [replace(a_score(30.0, position=12), first=11)])
    told = record(book).scores[0]
    assert (told.score, told.position, told.first) == (30.0, 12, 6)


def test_tokens_without_a_score_are_counted_once() -> None:
    book = admitted(policy("monitor"))
    book.cover(Rows(SEQUENCE, 0, 4, 4, 20, False))
    assert (book.tokens_missed, book.tokens_scored) == (8, 0)
    book.cover(Rows(SEQUENCE, 0, 4, 8, 20, False))
    assert book.tokens_missed == 12
    # A step that could not be read, and what follows it.
    book.fail(SEQUENCE, "layer 3", 4)
    book.cover(Rows(SEQUENCE, 0, 1, 16, 20, False))
    assert book.tokens_missed == 17


# -- counts -----------------------------------------------------------------------------------------------------------


def test_every_sequence_is_counted_under_what_is_done_about_it_last() -> None:
    book = ledger()
    actions = [("flag", 11.0), ("block", 11.0), ("block", 9.0), ("flag", 9.0), ("flag", 12.0)]
    for index, (action, score) in enumerate(actions):
        book.admit(str(index), policy(action=action).to_wire(), Endings(STOP))
        book.score(str(index), [a_score(score)])
        book.score(str(index), [a_score(score + 0.5)])
    book.fail("0", "planted")  # flagged, and under `enforce` it does not pass now
    book.fail("1", "planted")  # blocked already
    assert (book.decided["allow"], book.decided["flag"], book.decided["block"]) == (2, 1, 2)
    after = ledger()
    after.adopt(book)
    assert after.decided.total() == 5
