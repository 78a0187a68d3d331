"""One log line per sequence that was flagged, steered or blocked, and per request that could not be judged."""

from __future__ import annotations

import logging

from guard.evidence import Record
from guard.policy import Mode
from server.errors import GuardFailure
from server.incidents.incident import deciding_score
from server.protocols.openai import Call
from server.telemetry.logs import log


def report(call: Call, request_id: str, record: Record) -> None:
    """A flagged, steered or blocked sequence: where, and how rare that is among clean requests. Never the prompt."""
    score = deciding_score(record)
    log(
        logging.WARNING,
        "incident",
        request_id=request_id,
        model=call.model,
        endpoint=call.endpoint.name,
        mode=record.mode,
        action=record.action,
        reason=record.reason,
        prompt_index=record.prompt_index,
        choice_index=record.choice_index,
        phase=record.phase,
        detector=record.detector,
        score=score.score if score else None,
        threshold=score.threshold if score else None,
        p_value=score.p_value if score else None,
        layer=score.layer if score else None,
        direction=score.direction if score else None,
        position=score.position if score else None,
        steered_from=record.steered_from,
    )


def report_failure(call: Call, request_id: str, failure: GuardFailure, mode: Mode, passed: bool) -> None:
    """A request that could not be judged. CRITICAL where it passed although somebody was watching (monitor)."""
    log(
        logging.CRITICAL if passed and mode == "monitor" else logging.ERROR,
        "guard failure",
        request_id=request_id,
        model=call.model,
        endpoint=call.endpoint.name,
        mode=mode,
        kind=failure.kind,
        detail=failure.detail,
        passed=passed,
    )
