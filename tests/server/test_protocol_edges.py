"""What clients of Responses and Messages may ask and engines may answer, at the edges. No sockets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.errors import ApiError
from server.protocols.known import spoken_at
from server.protocols.messages.asking import read_messages
from server.protocols.messages.telling import MessageWriter, error
from server.protocols.messages.telling import engine_error as message_error
from server.protocols.openai import Terms
from server.protocols.responses.asking import read_response
from server.protocols.responses.telling import ResponseWriter
from server.protocols.said import UnreadableError, read_answer

TOOL = {"name": "f", "input_schema": {"type": "object"}}
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}


def message(**fields: Any) -> dict[str, Any]:
    """The chat that a message comes to."""
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": "a"}], **fields}
    return read_messages(json.dumps(body).encode(), Terms()).fields


def response(**fields: Any) -> dict[str, Any]:
    """The chat that a response comes to."""
    return read_response(json.dumps({"input": "a", **fields}).encode(), Terms()).fields


def test_text_before_and_after_results_of_tools_stays_in_its_place() -> None:
    blocks = [
        {"type": "text", "text": "before"},
        {"type": "tool_result", "tool_use_id": "one", "content": "rain"},
        {"type": "text", "text": "after"},
    ]
    assert message(messages=[{"role": "user", "content": blocks}])["messages"] == [
        {"role": "user", "content": "before"},
        {"role": "tool", "tool_call_id": "one", "content": "rain"},
        {"role": "user", "content": "after"},
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"tool_choice": "required", "parallel_tool_calls": False}),
        ({"type": "tool", "name": "f"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        (None, {}),
    ],
)
def test_which_tool_a_message_wants(choice: Any, expected: dict[str, Any]) -> None:
    chat = message(tools=[TOOL], tool_choice=choice)
    assert {name: chat[name] for name in ("tool_choice", "parallel_tool_calls") if name in chat} == expected


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({"output_config": {"effort": "low"}}, "low"),
        ({"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}}, "low"),
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, None),
    ],
)
def test_how_much_a_message_lets_think(fields: dict[str, Any], effort: str | None) -> None:
    assert message(**fields).get("reasoning_effort") == effort


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("required", "required"), ({"type": "function", "name": "f"}, {"type": "function", "function": {"name": "f"}})],
)
def test_which_tool_a_response_wants(choice: Any, expected: Any) -> None:
    assert response(tools=[FUNCTION], tool_choice=choice)["tool_choice"] == expected
    if isinstance(choice, str):
        assert "tool_choice" not in response(tool_choice=choice), "nothing to choose from"


@pytest.mark.parametrize("kind", ["text", "json_object"])
def test_formats_without_a_schema_are_the_chats(kind: str) -> None:
    assert response(text={"format": {"type": kind}})["response_format"] == {"type": kind}


@pytest.mark.parametrize("item", ["words", 3, [], None])
def test_an_item_that_is_no_object_is_named(item: object) -> None:
    with pytest.raises(ApiError) as refused:
        response(input=[item])
    assert refused.value.param == "input[0]"


@pytest.mark.parametrize("content", [b"<html>", b"[]", b"{}", b'{"error": 3}', b'{"error": {}}', b"\xff"])
def test_an_error_of_the_engines_that_is_none_is_still_one_in_a_messages_shape(content: bytes) -> None:
    told = json.loads(message_error(500, content))
    assert told["error"] == {"type": "api_error", "message": "The model could not answer."}


@pytest.mark.parametrize("content", [b"<html>", b"[]", b"{}", b'{"error": 3}', b'{"error": {"code": "x"}}', b"\xff"])
def test_an_error_of_the_engines_without_a_number_is_passed_on_as_it_is(content: bytes) -> None:
    chat = spoken_at("/v1/chat/completions")
    assert chat is not None
    assert chat.engine_error(500, content) == content


@pytest.mark.parametrize("code", ["upstream_busy", "shutting_down"])
def test_who_should_come_back_is_told_overloaded(code: str) -> None:
    assert json.loads(error(ApiError(503, "Later.", code=code)))["error"]["type"] == "overloaded_error"


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "a-b", "choices": [choice]}).encode() + b"\n\n"


def call(index: int, arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "id": f"c{index}", "function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize("of", ["responses", "messages"])
@pytest.mark.parametrize(
    "last",
    [
        chunk(call(0, "{}")),
        b'data: {"choices": [{"index": 0, "delta": "words"}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": 3}]}}]}\n\n',
        b'data: {"choices": 3}\n\n',
    ],
    ids=["goes back to a call that had ended", "no delta", "no function", "no choices"],
)
def test_a_stream_that_cannot_be_is_an_error_in_its_own_shape(of: str, last: bytes) -> None:
    asked = read_response(b'{"input": "a", "stream": true}', Terms())
    writer = ResponseWriter(asked) if of == "responses" else MessageWriter()
    told = b"".join(writer.write(part) for part in (chunk(call(0, "{")), chunk(call(1, "{")), last))
    assert told.count(b"event: error") == 1
    assert b"upstream_cut" in told or b"stopped answering" in told
    assert writer.write(b"data: [DONE]\n\n") == b""


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        b"3",
        b'{"choices": []}',
        b'{"choices": [{"index": 0, "message": {}, "finish_reason": "stop"}]}',
        b'{"choices": [{"index": 0, "message": {}}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}',
    ],
)
def test_an_answer_without_an_end_or_usage_is_none(answer: bytes) -> None:
    with pytest.raises(UnreadableError):
        read_answer(answer)
