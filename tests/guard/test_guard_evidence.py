"""Evidence crosses the wire whole, or is refused without being repeated."""

from __future__ import annotations

import json
import math
import traceback

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import EvidenceError
from guard.evidence import Coverage, DetectorStatus, Evidence, Record, ScoreEvidence, Status, WorkerStatus

SCORE = ScoreEvidence(
    detector="density", phase="prompt", score=2.5, threshold=2.0, p_value=0.01, position=7, layer=4, direction="L4.u0"
)
RECORD = Record(
    prompt_index=1,
    choice_index=2,
    prompt_tokens=8,
    tokens_scored=9,
    mode="enforce",
    action="block",
    reason="density in the prompt, p = 0.01",
    phase="prompt",
    detector="density",
    scores=(SCORE,),
)
EVIDENCE = Evidence(
    fingerprint="sha256:bank",
    calibration="sha256:calibration",
    records=(RECORD, Record(prompt_tokens=1, tokens_scored=0, mode="off", action="allow")),
)
WORKER = WorkerStatus(
    rank=0,
    fingerprint="sha256:bank",
    calibration="sha256:calibration",
    generation=1,
    layers=(1, 4),
    reserved_token_id=5,
    detectors=(
        DetectorStatus(detectors=("density",), supported_fpr=0.01),
        DetectorStatus(detectors=("density", "exceedance"), supported_fpr=0.02),
    ),
    undertow_version="1",
    vllm_version="2",
    dtype="float32",
    requests_judged=3,
    tokens_scored=4,
    tokens_recalled=0,
    tokens_missed=0,
    unscorable=0,
)


def changed(**changes: object) -> str:
    return json.dumps(json.loads(EVIDENCE.to_json()) | changes)


def test_evidence_comes_back_from_the_wire_as_it_was_sent() -> None:
    assert Evidence.from_json(EVIDENCE.to_json()) == EVIDENCE
    assert Evidence.from_json(EVIDENCE.to_json().encode()) == EVIDENCE


@given(st.floats(), st.floats(), st.one_of(st.none(), st.text(max_size=20)))
def test_every_score_crosses_the_wire_nan_and_infinity_too(value: float, threshold: float, name: str | None) -> None:
    score = SCORE.model_copy(update={"score": value, "threshold": threshold, "direction": name})
    sent = Evidence(
        fingerprint="x", calibration="sha256:calibration", records=(RECORD.model_copy(update={"scores": (score,)}),)
    )
    got = Evidence.from_json(sent.to_json()).records[0].scores[0]
    assert got.score == value or (math.isnan(got.score) and math.isnan(value))
    assert got.threshold == threshold or (math.isnan(got.threshold) and math.isnan(threshold))
    assert got.direction == name


def test_evidence_fits_a_header_whatever_it_names() -> None:
    record = RECORD.model_copy(update={"reason": "層\r\nx-injected: 1"})
    text = Evidence(fingerprint="x", calibration="sha256:calibration", records=(record,)).to_json()
    assert text.isascii()
    assert text.isprintable()
    assert Evidence.from_json(text).records[0].reason == record.reason


def test_the_version_always_travels_and_another_or_none_is_refused() -> None:
    assert json.loads(EVIDENCE.to_json())["version"] == 1
    for version in (2, 0, "1", None):
        with pytest.raises(EvidenceError, match="version"):
            Evidence.from_json(changed(version=version))
    with pytest.raises(EvidenceError, match="version: it is missing"):
        Evidence.from_json('{"fingerprint": "x", "calibration": "y", "records": []}')
    with pytest.raises(EvidenceError):
        Status.from_json('{"version": 2, "workers": []}')


def test_a_key_of_a_later_version_is_refused_where_it_stands() -> None:
    with pytest.raises(EvidenceError, match="not valid at the whole: Extra inputs"):
        Evidence.from_json(changed(canary=1))
    with pytest.raises(EvidenceError, match=r"not valid at records\.0: Extra inputs") as caught:
        Evidence.from_json(changed(records=[json.loads(RECORD.model_dump_json()) | {"canary": 1}]))
    assert "canary" not in str(caught.value)


CANARIES = {
    "not JSON": "canary",
    "half of it": EVIDENCE.to_json()[:-9] + "canary",
    "another type": '"canary"',
    "a wrong value": '{"version":1,"fingerprint":"x","records":[{"prompt_tokens":"canary"}]}',
    "a wrong choice": changed(records=[{"prompt_tokens": 1, "tokens_scored": 1, "mode": "canary", "action": "allow"}]),
    "a wrong fingerprint": changed(fingerprint=["canary"]),
}


@pytest.mark.parametrize("wrong", CANARIES)
def test_no_error_and_no_traceback_holds_what_was_sent(wrong: str) -> None:
    for read in (Evidence.from_json, Status.from_json):
        with pytest.raises(EvidenceError) as caught:
            read(CANARIES[wrong])
        told = [str(caught.value), *traceback.format_exception_only(caught.value)]
        told += traceback.format_exception_only(caught.value.__cause__) if caught.value.__cause__ else []
        assert "canary" not in "".join(told)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_damaged_evidence_is_evidence_or_an_evidence_error(place: int, bytes_: bytes) -> None:
    text = EVIDENCE.to_json().encode()
    place %= len(text)
    try:
        Evidence.from_json(text[:place] + bytes_ + text[place + len(bytes_) :])
    except EvidenceError:
        return


def test_a_status_comes_back_from_the_wire() -> None:
    status = Status(workers=(WORKER, WORKER.model_copy(update={"rank": 1})))
    assert Status.from_json(status.model_dump_json()) == status


def test_coverage_is_complete_when_no_needed_token_lacks_a_score() -> None:
    assert [Coverage(5, scored).complete for scored in (4, 5, 6)] == [False, True, True]
