"""What a client is told of its verdict: headers, and, where the policy says so, an object in the answer. Pure.

Never a score, a layer or a direction: they would teach an attacker how far to go.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from server.assessment import Assessor
from server.protocols.openai import Call, new_head

SCHEMA = "1"
"""Version of what headers and object say."""


def headers(assessor: Assessor, begins: bool = False) -> dict[str, str]:
    """Beside an answer. `begins`: of a stream, whose output has no verdict yet."""
    action = assessor.told
    judged = assessor.ruling.mode != "off"
    told = {
        "x-undertow-action": "pending" if begins and judged and action == "allow" else action,
        "x-undertow-policy": assessor.ruling.name,
        "x-undertow-schema": SCHEMA,
    }
    if assessor.incident is not None:
        told["x-undertow-incident"] = assessor.incident
    return told


def in_answer(assessor: Assessor, answer: bytes) -> bytes:
    """A whole answer with the object in it, where the policy says so."""
    body = answer.rstrip()
    if assessor.ruling.verdict != "answer" or not body.endswith(b"}") or len(body) < len(b'{"a":0}'):
        return answer
    return body[:-1] + b', "undertow": ' + json.dumps(_object(assessor)).encode() + b"}"


def last_chunk(call: Call, assessor: Assessor, head: Mapping[str, Any]) -> list[bytes]:
    """The event before `[DONE]` that says it, where the policy says so: a chunk without choices, as that of usage is.

    `head`: any chunk of the stream, for its id and model.
    """
    if assessor.ruling.verdict != "answer":
        return []
    known = {key: head[key] for key in ("id", "object", "created", "model") if key in head}
    chunk = {**new_head(call), **known, "choices": [], "undertow": _object(assessor)}
    return [b"data: " + json.dumps(chunk).encode() + b"\n\n"]


def _object(assessor: Assessor) -> dict[str, str | None]:
    return {
        "schema": SCHEMA,
        "action": assessor.told,
        "policy": assessor.ruling.name,
        "incident": assessor.incident,
    }
