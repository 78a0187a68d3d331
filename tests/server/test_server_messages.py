"""Anthropic's Messages, through a real proxy, with Anthropic's own client and held to its own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.message_create_params import MessageCreateParamsBase
from pydantic import TypeAdapter

from server.protocols.messages.accepted import MESSAGE_FIELDS
from server.protocols.messages.asking import MESSAGES
from server.protocols.messages.telling import MessageWriter
from tests.server.test_server_fields import engines_model, undecided_in

from .conftest import KEY, Proxy, settings_for
from .fake_engine import MODEL, PROMPT_TOKENS, RESERVED, TOOL, FakeEngine, Script
from .hosting import Host
from .test_server_answers import assert_nothing_leaks
from .test_server_keys import make_key, served

PATH = MESSAGES.path
TALKS: Any = ("reasoning", "content", "content", "tool", "tool")
TOKENS = ("Hm.", "It", " is", '{"city":', ' "Ulm"}')


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 64, "messages": [{"role": "user", "content": "Six times seven?"}], **fields}


@contextmanager
def client(proxy: Proxy) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=proxy.url, api_key=KEY, max_retries=2) as talking:
        yield talking


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """A stream's events, each held to the type that Anthropic's client reads it as."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith(":")]
        if not lines:
            continue
        name, data = lines
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "error":
            TypeAdapter(RawMessageStreamEvent).validate_python(event)
        found.append(event)
    return found


def outline(found: list[dict[str, Any]]) -> list[str]:
    """The types in their order, repeated deltas once."""
    names = [event["type"].removeprefix("content_block_") for event in found]
    return [name for position, name in enumerate(names) if name != "delta" or names[position - 1] != "delta"]


def test_a_whole_answer_is_a_message(engine: FakeEngine, enforce: Proxy) -> None:
    answer = enforce.post(PATH, body())
    message = Message.model_validate(answer.json(), strict=True)
    assert (answer.status_code, answer.headers["x-undertow-action"]) == (200, "allow")
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "The answer is 42."}]
    assert (message.stop_reason, message.model, message.id) == ("max_tokens", MODEL, "msg_fake")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (PROMPT_TOKENS, 5)


def test_thinking_text_and_tools_are_blocks_in_that_order(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(tokens=TOKENS, places=TALKS, finish="tool_calls")
    with client(enforce) as talking:
        message = talking.messages.create(**body())
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    thinking, text, tool = (block.to_dict() for block in message.content)
    assert (thinking["thinking"], text["text"], tool["input"]) == ("Hm.", "It is", {"city": "Ulm"})
    assert (tool["name"], message.stop_reason) == (TOOL, "tool_use")


def test_a_stream_has_every_event_that_a_client_needs(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(tokens=TOKENS, places=TALKS, finish="tool_calls", keep_alive=True)
    answer = enforce.post(PATH, body(stream=True))
    found = events(answer)
    block = ["start", "delta", "stop"]
    assert outline(found) == ["message_start", *block, *block, *block, "message_delta", "message_stop"]
    assert found[0]["message"]["usage"]["input_tokens"] == PROMPT_TOKENS, "as the client knows it from the start"
    assert [event["index"] for event in found if event["type"] == "content_block_start"] == [0, 1, 2]
    assert found[-2]["usage"]["output_tokens"] == 5
    assert_nothing_leaks(answer)


def test_anthropics_client_reads_whole_and_stream_as_the_same_message(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(tokens=TOKENS, places=TALKS, finish="tool_calls")
    with client(enforce) as talking:
        whole = talking.messages.create(**body())
        with talking.messages.stream(**body()) as stream:
            texts = list(stream.text_stream)
            streamed = stream.get_final_message()
    assert texts == ["It", " is"]
    assert streamed.to_dict() == whole.to_dict()


@pytest.mark.parametrize(
    ("finish", "stop", "expected"),
    [
        ("stop", None, ("end_turn", None)),
        ("stop", "\n\nHuman:", ("stop_sequence", "\n\nHuman:")),
        ("length", None, ("max_tokens", None)),
        ("tool_calls", None, ("tool_use", None)),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_why_it_stopped(
    engine: FakeEngine, enforce: Proxy, finish: str, stop: str | None, expected: tuple[str, str | None], stream: bool
) -> None:
    engine.script = Script(finish=finish, stop=stop)
    answer = enforce.post(PATH, body(stream=stream))
    told = events(answer)[-2]["delta"] if stream else answer.json()
    assert (told["stop_reason"], told["stop_sequence"]) == expected


def test_a_forced_call_of_a_tool_stopped_for_the_tool(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(tokens=("{}",), speaks="tool", finish="stop")
    assert enforce.post(PATH, body()).json()["stop_reason"] == "tool_use"
    assert events(enforce.post(PATH, body(stream=True)))[-2]["delta"]["stop_reason"] == "tool_use"


def test_arguments_that_are_no_json_are_shown_and_not_taken_for_a_call(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(tokens=('{"city": "U',), speaks="tool")
    answer = enforce.post(PATH, body()).json()
    assert (answer["content"][0]["input"], answer["stop_reason"]) == ({"arguments": '{"city": "U'}, "max_tokens")


@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_prompt_is_a_400_that_the_client_does_not_repeat(
    engine: FakeEngine, enforce: Proxy, stream: bool
) -> None:
    engine.script = Script(blocked={0: 0})
    answer = enforce.post(PATH, body(stream=stream))
    assert answer.json() == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "The prompt was blocked by the content filter."},
        "request_id": None,
    }
    assert (answer.status_code, answer.headers["x-undertow-action"]) == (400, "block")
    engine.bodies.clear()
    with client(enforce) as talking, pytest.raises(anthropic.BadRequestError, match="content filter"):
        talking.messages.create(**body(stream=stream))
    assert len(engine.bodies) == 1


@pytest.mark.parametrize("speaks", ["content", "reasoning", "tool"])
def test_a_blocked_answer_is_a_refusal_without_content(engine: FakeEngine, enforce: Proxy, speaks: Any) -> None:
    engine.script = Script(blocked={0: 3}, speaks=speaks, logprobs=True)
    answer = enforce.post(PATH, body())
    message = Message.model_validate(answer.json(), strict=True)
    assert (message.content, message.stop_reason) == ([], "refusal")
    assert message.stop_details is not None
    assert message.usage.output_tokens == 4
    assert_nothing_leaks(answer)


@pytest.mark.parametrize("speaks", ["content", "reasoning", "tool"])
@pytest.mark.parametrize("blocked_at", [1, 2, 5])
@pytest.mark.parametrize("merge", [1, 2])
def test_a_blocked_stream_ends_as_a_refusal_before_the_payload(
    engine: FakeEngine, enforce: Proxy, speaks: Any, blocked_at: int, merge: int
) -> None:
    engine.script = Script(blocked={0: blocked_at}, merge=merge, speaks=speaks, text_with_finish=True, logprobs=True)
    answer = enforce.post(PATH, body(stream=True))
    found = events(answer)
    assert [event["type"] for event in found[-2:]] == ["message_delta", "message_stop"]
    assert found[-2]["delta"]["stop_reason"] == "refusal"
    starts, stops = (
        [event["index"] for event in found if event["type"] == f"content_block_{name}"] for name in ("start", "stop")
    )
    assert starts == stops, "what was begun was ended"
    assert_nothing_leaks(answer)


def test_anthropics_client_reads_a_blocked_stream_to_its_end(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(blocked={0: 4})
    with client(enforce) as talking, talking.messages.stream(**body()) as stream:
        message = stream.get_final_message()
    assert (message.content[0].to_dict()["text"], message.stop_reason) == ("The answer is", "refusal")
    assert message.usage.output_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_judged_is_a_503_in_anthropics_shape(engine: FakeEngine, enforce: Proxy, stream: bool) -> None:
    engine.script = Script(fault="missing")
    answer = enforce.post(PATH, body(stream=stream))
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "api_error")
    assert answer.json()["type"] == "error"
    with client(enforce) as talking, pytest.raises(anthropic.InternalServerError):
        talking.with_options(max_retries=0).messages.create(**body(stream=stream))


@pytest.mark.parametrize("script", [Script(fault="no_final"), Script(cut_after=3), Script(fault="short")])
def test_a_stream_that_fails_ends_with_an_error_that_the_client_raises(
    engine: FakeEngine, enforce: Proxy, script: Script
) -> None:
    engine.script = script
    found = events(enforce.post(PATH, body(stream=True)))
    assert found[-1]["error"]["type"] == "api_error"
    assert "message_stop" not in [event["type"] for event in found]
    with client(enforce) as talking, pytest.raises(anthropic.APIStatusError):
        list(talking.messages.create(**body(stream=True)))


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_told_in_anthropics_shape(engine: FakeEngine, enforce: Proxy, stream: bool) -> None:
    engine.script = Script(status=400)
    answer = enforce.post(PATH, body(stream=stream))
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "context length" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [("GET", PATH, 405, "invalid_request_error"), ("POST", f"{PATH}/batches", 404, "not_found_error")],
)
def test_other_errors_have_its_shape_too(enforce: Proxy, method: str, path: str, status: int, kind: str) -> None:
    with httpx.Client(base_url=enforce.url, verify=False) as plain:
        answer = plain.request(method, path, json=body())
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)


def test_a_whole_agents_turn_is_one_chat(engine: FakeEngine, enforce: Proxy) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    asked = body(
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Where?", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": TOOL, "input": {"city": "Ulm"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t1",
                        "is_error": False,
                        "content": [{"type": "text", "text": "rain"}],
                    },
                    {"type": "text", "text": "And tomorrow?"},
                ],
            },
        ],
        tools=[{"name": TOOL, "description": "d", "input_schema": schema, "strict": True}],
        tool_choice={"type": "tool", "name": TOOL, "disable_parallel_tool_use": True},
        thinking={"type": "disabled"},
        output_config={"format": {"type": "json_schema", "schema": schema}},
        stop_sequences=["END"],
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        metadata={"user_id": "u"},
    )
    assert enforce.post(PATH, asked).status_code == 200
    sent = engine.bodies[-1]
    call = {"id": "t1", "type": "function", "function": {"name": TOOL, "arguments": '{"city": "Ulm"}'}}
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.", "reasoning": "Where?", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "user", "content": "And tomorrow?"},
    ]
    function = {"name": TOOL, "parameters": schema, "description": "d", "strict": True}
    expected = {
        "model": MODEL,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": TOOL}},
        "parallel_tool_calls": False,
        "reasoning_effort": "none",
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        "stop": ["END"],
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "max_completion_tokens": 64,
        "stop_token_ids": [RESERVED],
    }
    assert {name: value for name, value in sent.items() if name not in ("messages", "vllm_xargs")} == expected


def test_the_key_of_anthropics_clients_reaches_the_engine(engine: FakeEngine, enforce: Proxy) -> None:
    with httpx.Client(base_url=enforce.url, verify=False) as plain:
        assert plain.post(PATH, json=body(), headers={"x-api-key": KEY}).status_code == 200
    assert engine.headers[-1]["authorization"] == f"Bearer {KEY}"
    assert "x-api-key" not in engine.headers[-1]
    with client(enforce) as talking:
        talking.messages.create(**body())
    assert engine.headers[-1]["authorization"] == f"Bearer {KEY}"


def test_its_keys_and_quotas_are_told_in_its_shape(
    engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    key = make_key(file, "shop", capsys)
    access = {"keys_file": file, "tenants": {"shop": {"requests_per_minute": 1}}}
    with served(settings_for(played[1].url), access=access) as proxy:
        stranger = anthropic.Anthropic(base_url=proxy.url, api_key="utk_no", max_retries=0)
        with stranger, pytest.raises(anthropic.AuthenticationError) as raised:
            stranger.messages.create(**body())
        assert raised.value.type == "authentication_error"
        with anthropic.Anthropic(base_url=proxy.url, api_key=key, max_retries=0) as known:
            known.messages.create(**body())
            with pytest.raises(anthropic.RateLimitError) as limited:
                known.messages.create(**body())
        assert limited.value.type == "rate_limit_error"
        assert not {"authorization", "x-api-key"} & engine.headers[-1].keys()


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://10.0.0.1/"}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}]},
        "messages[0].content[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "url": "b"}]}]}, "content[0].url"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "name": "a"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages[1].role"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "a", "server_url": "http://evil/"}]}, "tools[0].server_url"),
    ({"tool_choice": {"type": "computer"}}, "tool_choice.type"),
    ({"mcp_servers": [{"type": "url", "url": "http://evil/"}]}, "mcp_servers"),
    ({"container": "c"}, "container"),
    ({"chat_template": "x"}, "chat_template"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
    ({"vllm_xargs": {"undertow_policy": "x"}}, "vllm_xargs"),
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"stop_token_ids": [RESERVED]}, "stop_token_ids"),
    ({"api_base": "http://evil/"}, "api_base"),
]


@pytest.mark.parametrize(("fields", "named"), BAD, ids=[f"{named}-{index}" for index, (_, named) in enumerate(BAD)])
def test_what_is_not_accepted_is_refused_by_name(
    engine: FakeEngine, enforce: Proxy, fields: dict[str, Any], named: str
) -> None:
    answer = enforce.post(PATH, body(**fields))
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert f"{named}`" in answer.json()["error"]["message"]
    assert engine.bodies == []


def test_every_field_that_vllm_and_anthropics_client_know_was_decided() -> None:
    model = engines_model("anthropic.protocol", "AnthropicMessagesRequest")
    assert set(model.model_fields) - MESSAGE_FIELDS.names == set()
    assert undecided_in(MESSAGE_FIELDS, MessageCreateParamsBase) == []


@pytest.mark.parametrize(
    "chunks",
    [
        [b"data: [DONE]\n\n"],
        [b"data: {}\n\n", b"data: [DONE]\n\n"],
        [b"data: <html>\n\n"],
        [
            b'data: {"choices": [{"index": 0, "delta": {"tool_calls": 7}, "finish_reason": null}]}\n\n',
            b"data: [DONE]\n\n",
        ],
    ],
)
def test_whatever_comes_the_stream_ends_once_in_its_own_shape(chunks: list[bytes]) -> None:
    writer = MessageWriter()
    written = b"".join(writer.write(chunk) for chunk in [*chunks, b"data: [DONE]\n\n", b"data: {}\n\n"])
    assert written.count(b"event: error") == 1
    assert written.endswith(b"\n\n")
    assert b"event: message_stop" not in written


def test_a_stream_that_is_done_without_an_end_has_failed() -> None:
    assert MessageWriter().write(b"data: [DONE]\n\n").startswith(b"event: error")
    writer = MessageWriter()
    begun = {"id": "a-b", "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
    assert b"error" not in writer.write(b"data: " + json.dumps(begun).encode() + b"\n\n")
    assert writer.write(b"data: [DONE]\n\n").startswith(b"event: error")


def test_a_call_of_a_tool_that_goes_on_after_its_end_is_an_error_and_not_another_call() -> None:
    def chunk(index: int) -> bytes:
        call = {"index": index, "id": "c", "function": {"name": "n", "arguments": "{"}}
        choice = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}
        return b"data: " + json.dumps({"id": "a-b", "choices": [choice]}).encode() + b"\n\n"

    writer = MessageWriter()
    assert b"error" not in writer.write(chunk(0) + chunk(1))
    assert b"event: error" in writer.write(chunk(0))


def test_its_requests_are_counted_under_its_name(engine: FakeEngine, alone: Proxy) -> None:
    engine.script = Script(flagged=True)
    alone.post(PATH, body())
    assert alone.sample("undertow_evaluated_total", endpoint="messages") == 1
    assert alone.sample("undertow_requests_total", endpoint="messages", outcome="flagged") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_monitor_lets_pass_what_enforce_would_block(engine: FakeEngine, monitor: Proxy, stream: bool) -> None:
    engine.script = Script(blocked={0: 3})
    answer = monitor.post(PATH, body(stream=stream))
    told = events(answer)[-2]["delta"] if stream else answer.json()
    assert told["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_none_is_an_error_even_where_nothing_is_enforced(
    engine: FakeEngine, monitor: Proxy, stream: bool
) -> None:
    engine.script = Script(garbage=True)
    answer = monitor.post(PATH, body(stream=stream))
    error = events(answer)[-1]["error"] if stream else answer.json()["error"]
    assert error["type"] == "api_error"
