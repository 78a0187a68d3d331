"""What of a whole answer may be released. Sans-I/O; `stream.py` is its counterpart.

released = judge_answer(call, assessor, evidence, content)
released = judge_error(call, assessor, evidence, content)
"""

from __future__ import annotations

import json
from typing import Any

from guard.faults import FAULTS
from server.assessment import Assessor, Usage, choices_of
from server.errors import ApiError, GuardFailure, blocked_prompt, guard_unavailable
from server.protocols.openai import Call, blocked_choice, new_head


def judge_answer(call: Call, assessor: Assessor, evidence: bytes | None, content: bytes) -> bytes | ApiError:
    """The body for the client: the engine's own where nothing was blocked. Or the error to answer with."""
    body, choices = _read(content)
    failure = assessor.final(evidence, Usage.read(body.get("usage"))) or _check(call, assessor, choices)
    if failure is not None and assessor.enforcing:
        return guard_unavailable()
    if assessor.prompt_blocked and assessor.ruling.told is None:
        return blocked_prompt(call.endpoint.prompt_field)
    if not assessor.blocked or choices is None:
        return content
    body["choices"] = [_without_blocked(call, assessor, choice) for choice in choices]
    return json.dumps(body).encode()


def judge_error(call: Call, assessor: Assessor, evidence: bytes | None, content: bytes) -> bytes | ApiError | None:
    """The engine answered with an error. None where that error is the answer.

    Where sequences had begun, evidence says whether a block made the error: a grammar cannot take the reserved token.
    """
    failure = assessor.opening(evidence) if evidence is not None else None
    if _says_guard_unavailable(content):
        assessor.fail(GuardFailure("evidence_missing", "the guard in the engine cannot reach its workers"))
        return guard_unavailable()
    if failure is not None and failure.kind in FAULTS and assessor.enforcing:
        return guard_unavailable()
    if (assessor.prompt_blocked and assessor.ruling.told is None) or (assessor.blocked and call.stream):
        return blocked_prompt(call.endpoint.prompt_field)
    if assessor.blocked:
        return json.dumps(_all_blocked(call, assessor)).encode()
    return None


def _read(content: bytes) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """A body and its choices; an empty body and None where it is not of the shape that OpenAI says."""
    try:
        body = json.loads(content)
    except ValueError:
        return {}, None
    return (body, choices_of(body)) if isinstance(body, dict) else ({}, None)


def _check(call: Call, assessor: Assessor, choices: list[dict[str, Any]] | None) -> GuardFailure | None:
    """The choices are those that evidence was held against, and each that was stopped was blocked."""
    if choices is None or {choice["index"] for choice in choices} != set(range(len(choices))):
        return assessor.fail(GuardFailure("response_invalid", "the answer has no choices, or not one of each"))
    if len(choices) != call.prompts * call.n:
        detail = f"the answer has {len(choices)} choices, expected {call.prompts * call.n}"
        return assessor.fail(GuardFailure("response_invalid", detail))
    for choice in choices:
        if failure := assessor.stopped_unexplained(choice["index"], choice.get("stop_reason")):
            return failure
    return None


def _says_guard_unavailable(content: bytes) -> bool:
    """The guard inside the engine answered, and not the model."""
    try:
        return bool(json.loads(content)["error"]["code"] == "guard_unavailable")
    except (ValueError, KeyError, TypeError):
        return False


def _without_blocked(call: Call, assessor: Assessor, choice: dict[str, Any]) -> dict[str, Any]:
    if choice["index"] not in assessor.blocked:
        return choice
    message = choice.get("message")
    role = message.get("role") if isinstance(message, dict) else None
    role = role if isinstance(role, str) else "assistant"
    return blocked_choice(call.endpoint, choice["index"], role, assessor.ruling.told)


def _all_blocked(call: Call, assessor: Assessor) -> dict[str, Any]:
    """The answer where a block made the engine fail: it sent no text for any choice. Usage is the evidence's."""
    records = assessor.records
    prompt = sum(record.prompt_tokens for record in records if record.choice_index == 0)
    completion = sum(max(0, record.tokens_scored + 1 - record.prompt_tokens) for record in records)
    return {
        **new_head(call),
        "choices": [
            blocked_choice(call.endpoint, index, told=assessor.ruling.told) for index in range(call.prompts * call.n)
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }
