"""What is kept of a request that was flagged, steered or blocked. Pure.

One incident per request: of several sequences the gravest decides what it says of phase, layer and direction, and all
that were not allowed are in `sequences`. Numbers that are none (a NaN score) are null: JSON knows no other word.
"""

from __future__ import annotations

from datetime import datetime
from math import isfinite
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict

from guard.evidence import Record, ScoreEvidence
from guard.policy import SEVERITY, Action, Mode

Label = Literal["true", "false", "unsure"]
LABELS: tuple[Label, ...] = ("true", "false", "unsure")
"""What a reviewer says: the behaviour was there, it was not, or nobody can tell."""

ContentKind = Literal["off", "hash", "redacted", "full", "too_large"]


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoreKept(_Kept):
    """The largest score of one detector in one phase."""

    detector: str
    phase: str
    score: float | None
    threshold: float | None
    p_value: float | None
    position: int
    first: int | None
    """Position of the first token above the threshold; None where none is."""
    layer: int
    direction: str | None


class TraceKept(_Kept):
    """One detector's scores over tokens around the first that was too large, over their thresholds."""

    detector: str
    start: int
    ratios: tuple[float | None, ...]


class SequenceKept(_Kept):
    """One sequence that was not allowed."""

    prompt_index: int
    choice_index: int
    prompt_tokens: int
    tokens_scored: int
    action: str
    reason: str
    phase: str | None
    detector: str | None
    steered_from: int | None
    scores: tuple[ScoreKept, ...]
    trace: tuple[TraceKept, ...] = ()


class Incident(_Kept):
    """One request that was not simply allowed."""

    id: str
    """32 hexadecimal digits."""
    at: AwareDatetime
    request_id: str
    endpoint: str
    model: str
    engine: str | None
    tenant: str | None
    key: str | None
    """The id of the key that it came with."""
    policy: str
    mode: str
    action: str
    reason: str
    phase: str | None
    detector: str | None
    score: float | None
    threshold: float | None
    p_value: float | None
    position: int | None
    layer: int | None
    direction: str | None
    stream: bool
    bank: str
    """Fingerprint of what judged it."""
    calibration: str
    content_kind: ContentKind
    content: str | None
    """By `content_kind`: a keyed hash, or JSON with `messages` or `prompt`, redacted or as it came."""
    sequences: tuple[SequenceKept, ...]


class Reviewed(_Kept):
    """An incident as it is stored: with what was said about it."""

    incident: Incident
    label: Label | None
    labelled_by: str | None
    labelled_at: AwareDatetime | None
    note: str | None


class Who(_Kept):
    """Whose request, and by which rules."""

    id: str
    at: datetime
    request_id: str
    endpoint: str
    model: str
    engine: str | None
    tenant: str | None
    key: str | None
    policy: str
    mode: Mode
    stream: bool


def incident_of(
    who: Who, records: tuple[Record, ...], guard: tuple[str, str], content: tuple[ContentKind, str | None]
) -> Incident | None:
    """What to keep; None where every sequence was allowed.

    `guard`: the bank's fingerprint and the calibration's digest. `content`: from `content.kept`.
    """
    told = [record for record in records if record.action != "allow"]
    if not told:
        return None
    gravest = max(told, key=_severity)
    score = deciding_score(gravest)
    return Incident(
        **who.model_dump(),
        action=gravest.action,
        reason=gravest.reason,
        phase=gravest.phase,
        detector=gravest.detector,
        score=_finite(score.score) if score else None,
        threshold=_finite(score.threshold) if score else None,
        p_value=_finite(score.p_value) if score else None,
        position=score.position if score else None,
        layer=score.layer if score else None,
        direction=score.direction if score else None,
        bank=guard[0],
        calibration=guard[1],
        content_kind=content[0],
        content=content[1],
        sequences=tuple(_sequence(record) for record in told),
    )


def plain(text: str) -> str:
    """Text as every database takes it: no NUL, no half of a surrogate pair."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def deciding_score(record: Record) -> ScoreEvidence | None:
    """The score that a sequence's action comes from; None where it could not be scored."""
    for score in record.scores:
        if (score.detector, score.phase) == (record.detector, record.phase):
            return score
    return None


def _severity(record: Record) -> int:
    action: Action = record.action
    return SEVERITY[action]


def _sequence(record: Record) -> SequenceKept:
    return SequenceKept(
        prompt_index=record.prompt_index,
        choice_index=record.choice_index,
        prompt_tokens=record.prompt_tokens,
        tokens_scored=record.tokens_scored,
        action=record.action,
        reason=record.reason,
        phase=record.phase,
        detector=record.detector,
        steered_from=record.steered_from,
        scores=tuple(
            ScoreKept(
                detector=score.detector,
                phase=score.phase,
                score=_finite(score.score),
                threshold=_finite(score.threshold),
                p_value=_finite(score.p_value),
                position=score.position,
                first=score.first,
                layer=score.layer,
                direction=score.direction,
            )
            for score in record.scores
        ),
        trace=tuple(TraceKept(**each.model_dump()) for each in record.trace),
    )


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
