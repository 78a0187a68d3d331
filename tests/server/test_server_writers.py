"""Every stream that a chat can be, said by every protocol: nothing lost, nothing added, one end. No sockets."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from guard.policy import Policy
from server.protocols.messages.asking import MESSAGES, read_messages
from server.protocols.messages.telling import MessageWriter
from server.protocols.openai import Call, Terms
from server.protocols.protocol import StreamWriter
from server.protocols.responses.asking import RESPONSES, read_response
from server.protocols.responses.telling import ResponseWriter
from server.protocols.said import read_said

from .fake_engine import PAYLOAD, RESERVED, Place, Play, Script
from .test_server_stream import HOLD_BACKS, comment, data, opened

PLACES: list[Place] = ["content", "reasoning", "refusal", "tool"]
Said = dict[str, str]
"""Text, reasoning and arguments, each put together."""
DONE = b"data: [DONE]\n\n"
ASKED: dict[str, dict[str, Any]] = {
    RESPONSES.name: {"input": "a", "stream": True, "include": ["message.output_text.logprobs"]},
    MESSAGES.name: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9, "stream": True},
}


def call_of(name: str) -> tuple[Call, StreamWriter]:
    body = json.dumps(ASKED[name]).encode()
    if name == MESSAGES.name:
        return read_messages(body, Terms()), MessageWriter()
    call = read_response(body, Terms())
    return call, ResponseWriter(call)


@st.composite
def places(draw: st.DrawFn, size: int) -> tuple[Place, ...]:
    """As models talk: each place once, tools last."""
    order = [*draw(st.permutations(["content", "reasoning", "refusal"])), "tool"]
    found = [order[min(draw(st.integers(0, 3)), 3)] for _ in range(size)]
    return tuple(sorted(found, key=order.index))


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    tokens = tuple(f"<{number}>" for number in range(draw(st.integers(1, 8))))
    blocked = draw(st.none() | st.integers(1, len(tokens)))
    return Script(
        tokens=tokens,
        blocked={} if blocked is None else {0: blocked},
        places=draw(places(len(tokens))),
        text_with_finish=draw(st.booleans()),
        logprobs=draw(st.booleans()),
        finish=draw(st.sampled_from(["stop", "length", "tool_calls"])),
    )


def read(written: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in written.decode().splitlines() if line.startswith("data: ")]


def said_in_chat(released: bytes) -> Said:
    found = {"text": "", "reasoning": "", "arguments": ""}
    for line in released.split(b"\n\n"):
        if not line.startswith(b"data: {") or b'"error"' in line:
            continue
        said = read_said(json.loads(line[6:]), "delta")
        found["text"] += said.text
        found["reasoning"] += said.reasoning
        found["arguments"] += "".join(call.arguments for call in said.tool_calls)
    return found


def said_in_response(events: list[dict[str, Any]]) -> Said:
    kinds = {
        "text": "response.output_text.delta",
        "reasoning": "response.reasoning_text.delta",
        "arguments": "response.function_call_arguments.delta",
    }
    return {name: "".join(event["delta"] for event in events if event["type"] == kind) for name, kind in kinds.items()}


def said_in_message(events: list[dict[str, Any]]) -> Said:
    kinds = {"text": "text", "reasoning": "thinking", "arguments": "partial_json"}
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    return {name: "".join(delta.get(kind, "") for delta in deltas) for name, kind in kinds.items()}


READ: dict[str, Callable[[list[dict[str, Any]]], Said]] = {
    RESPONSES.name: said_in_response,
    MESSAGES.name: said_in_message,
}
ENDS = {"response.completed", "response.incomplete", "response.failed", "message_stop"}


def split(stream: bytes, draw: st.DataObject) -> list[bytes]:
    """The same bytes in whole events, joined at random."""
    events = [event + b"\n\n" for event in stream.split(b"\n\n") if event]
    parts: list[bytes] = []
    while events:
        size = draw.draw(st.integers(1, len(events)))
        parts.append(b"".join(events[:size]))
        events = events[size:]
    return parts


def assert_nothing_is_open(events: list[dict[str, Any]]) -> None:
    for begun, ended in (
        ("content_block_start", "content_block_stop"),
        ("response.output_item.added", "response.output_item.done"),
        ("response.content_part.added", "response.content_part.done"),
    ):
        count = [sum(event["type"] == kind for event in events) for kind in (begun, ended)]
        assert count[0] == count[1], (begun, count)


@given(st.sampled_from(sorted(ASKED)), scripts(), HOLD_BACKS, st.data())
def test_a_protocol_says_what_the_chat_says_and_no_more(
    name: str, script: Script, hold_back: Any, draw: st.DataObject
) -> None:
    call, writer = call_of(name)
    play = Play(script, json.loads(call.upstream_body(Policy(), RESERVED)), chat=True)
    guard, _ = opened(call, hold_back=hold_back)
    released = guard.feed(comment(play.evidence(final=False)))
    for chunk in play.data_events():
        if b'"finish_reason":"' in chunk:
            released += guard.feed(comment(play.evidence(final=False, finished=frozenset({0}))))
        released += guard.feed(data(chunk))
    released += guard.feed(comment(play.evidence(final=True)))
    released += guard.feed(data(DONE))
    stream = b"".join(released)
    written = b"".join(writer.write(part) for part in split(stream, draw))
    events = read(written)
    assert PAYLOAD.encode() not in written
    assert READ[name](events) == said_in_chat(stream)
    assert [event["type"] for event in events if event["type"] in ENDS] == [events[-1]["type"]]
    assert_nothing_is_open(events)
    blocked = "refusal" in written.decode() if name == MESSAGES.name else b"content_filter" in written
    assert bool(blocked) == bool(script.blocked)
    assert writer.write(stream) == b"", "after its end it says nothing"


@given(st.sampled_from(sorted(ASKED)), scripts(), st.integers(0, 12))
def test_a_cut_anywhere_ends_with_an_error(name: str, script: Script, cut_after: int) -> None:
    call, writer = call_of(name)
    play = Play(script, json.loads(call.upstream_body(Policy(), RESERVED)), chat=True)
    guard, _ = opened(call)
    released = guard.feed(comment(play.evidence(final=False)))
    for chunk in play.data_events()[:cut_after]:
        released += guard.feed(data(chunk))
    released += guard.cut()
    written = writer.write(b"".join(released))
    events = read(written)
    assert PAYLOAD.encode() not in written
    assert [event["type"] for event in events].count("error") == 1
    assert not {"response.completed", "response.incomplete", "message_stop"} & {event["type"] for event in events}
    assert events[-1]["type"] in ("error", "response.failed")
