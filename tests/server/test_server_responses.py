"""OpenAI's Responses, through a real proxy, with OpenAI's own client and held to its own types."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import BaseModel, TypeAdapter

from server.protocols.openai import Terms
from server.protocols.responses.accepted import RESPONSE_FIELDS
from server.protocols.responses.asking import RESPONSES, read_response
from server.protocols.responses.telling import ResponseWriter

from .conftest import Proxy
from .fake_engine import MODEL, PROMPT_TOKENS, RESERVED, TOOL, FakeEngine, Script
from .test_server_answers import assert_nothing_leaks
from .test_server_fields import engines_model, undecided_in

PATH = RESPONSES.path
TALKS: Any = ("reasoning", "content", "content", "tool", "tool")
TOKENS = ("Hm.", "It", " is", '{"city":', ' "Ulm"}')


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "Six times seven?", **fields}


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """A stream's events, each held to the type that OpenAI's client reads it as; numbered without a gap."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith(":")]
        if not lines:
            continue
        name, data = lines
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        TypeAdapter(ResponseStreamEvent).validate_python(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def outline(found: list[dict[str, Any]]) -> list[str]:
    """The types in their order, repeated deltas once."""
    names = [event["type"].removeprefix("response.") for event in found]
    return [name for position, name in enumerate(names) if not name.endswith("delta") or names[position - 1] != name]


def _without_ids(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("id", "parsed", "parsed_arguments")}


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def test_a_whole_answer_is_a_response(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(finish="stop")
    answer = enforce.post(PATH, body(instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=9))
    response = Response.model_validate(answer.json(), strict=True)
    assert (answer.status_code, answer.headers["x-undertow-action"]) == (200, "allow")
    assert (response.status, response.output_text, response.error) == ("completed", "The answer is 42.", None)
    assert (response.model, response.id, response.instructions) == (MODEL, "resp_fake", "Be brief.")
    assert (response.metadata, response.max_output_tokens) == ({"a": "b"}, 9)
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (PROMPT_TOKENS, 5)
    assert answer.json()["store"] is False


def test_reasoning_text_and_calls_of_tools_are_items_in_that_order(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(tokens=TOKENS, places=TALKS, finish="tool_calls")
    with enforce.openai() as client:
        response = client.responses.create(**body())
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    reasoning, message, call = (item.to_dict() for item in response.output)
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert response.output_text == "It is"
    assert (call["name"], call["call_id"], call["arguments"]) == (TOOL, "call_1", '{"city": "Ulm"}')
    assert {item["status"] for item in (reasoning, message, call)} == {"completed"}


def test_a_stream_has_every_event_that_a_client_needs(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(tokens=TOKENS, places=TALKS, finish="tool_calls", keep_alive=True)
    answer = enforce.post(PATH, body(stream=True))
    found = events(answer)

    def item(kind: str) -> list[str]:
        inside = ["content_part.added", f"{kind}.delta", f"{kind}.done", "content_part.done"]
        return ["output_item.added", *inside, "output_item.done"]

    arguments = ["function_call_arguments.delta", "function_call_arguments.done"]
    assert outline(found) == [
        *("created", "in_progress"),
        *item("reasoning_text"),
        *item("output_text"),
        *("output_item.added", *arguments, "output_item.done"),
        "completed",
    ]
    assert found[-1]["response"]["usage"]["output_tokens"] == 5
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert done == found[-1]["response"]["output"]
    assert_nothing_leaks(answer)


def test_openais_client_reads_whole_and_stream_as_the_same_response(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(tokens=TOKENS, places=TALKS, finish="tool_calls")
    with enforce.openai() as client:
        whole = client.responses.create(**body())
        with client.responses.stream(**body()) as stream:
            texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
            streamed = stream.get_final_response()
    assert texts == ["It", " is"]

    def items(response: Any) -> Any:
        """What the client itself parsed aside."""
        return json.loads(json.dumps(response.to_dict()["output"]), object_hook=_without_ids)

    assert items(streamed) == items(whole)
    assert streamed.output_text == whole.output_text
    assert streamed.usage == whole.usage


async def test_the_async_client_parses_structured_output(engine: FakeEngine, enforce: Proxy) -> None:
    class Answer(BaseModel):
        number: int

    engine.script = Script(tokens=('{"number":', " 42}"), finish="stop")
    async with openai.AsyncOpenAI(base_url=f"{enforce.url}/v1", api_key="none") as client:
        response = await client.responses.parse(**body(), text_format=Answer)
        assert response.output_parsed == Answer(number=42)
        async with client.responses.stream(**body(), text_format=Answer) as stream:
            async for _ in stream:
                pass
            assert (await stream.get_final_response()).output_parsed == Answer(number=42)
    assert engine.bodies[-1]["response_format"]["json_schema"]["name"] == "Answer"


@pytest.mark.parametrize(
    ("finish", "status", "reason"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_why_it_ended(
    engine: FakeEngine, enforce: Proxy, finish: str, status: str, reason: str | None, stream: bool
) -> None:
    engine.script = Script(finish=finish)
    answer = enforce.post(PATH, body(stream=stream))
    last = events(answer)[-1] if stream else None
    response = last["response"] if last else answer.json()
    assert last is None or last["type"] == f"response.{status}"
    assert (response["status"], (response["incomplete_details"] or {}).get("reason")) == (status, reason)
    assert response["output"][-1]["status"] == status


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_stand_beside_their_text_where_they_were_asked_for(
    engine: FakeEngine, enforce: Proxy, stream: bool
) -> None:
    engine.script = Script(logprobs=True)
    answer = enforce.post(PATH, body(stream=stream, include=["message.output_text.logprobs"], top_logprobs=2))
    assert (engine.bodies[-1]["logprobs"], engine.bodies[-1]["top_logprobs"]) == (True, 2)
    found = events(answer) if stream else []
    response = found[-1]["response"] if stream else answer.json()
    logprobs = response["output"][0]["content"][0]["logprobs"]
    assert "".join(each["token"] for each in logprobs) == text_of(response)
    Response.model_validate(response)
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert all([each["token"] for each in event["logprobs"]] == [event["delta"]] for event in deltas)


@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_prompt_is_a_400_that_the_client_does_not_repeat(
    engine: FakeEngine, enforce: Proxy, stream: bool
) -> None:
    engine.script = Script(blocked={0: 0})
    with enforce.openai() as client, pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(**body(stream=stream))
    assert (raised.value.code, raised.value.param) == ("content_filter", "input")
    assert len(engine.bodies) == 1


@pytest.mark.parametrize("speaks", ["content", "reasoning", "tool"])
def test_a_blocked_answer_is_incomplete_and_empty(engine: FakeEngine, enforce: Proxy, speaks: Any) -> None:
    engine.script = Script(blocked={0: 3}, speaks=speaks, logprobs=True)
    answer = enforce.post(PATH, body())
    response = Response.model_validate(answer.json(), strict=True)
    assert (response.status, response.output) == ("incomplete", [])
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "content_filter"
    assert response.usage is not None
    assert response.usage.output_tokens == 4
    assert_nothing_leaks(answer)


@pytest.mark.parametrize("speaks", ["content", "reasoning", "tool"])
@pytest.mark.parametrize("blocked_at", [1, 2, 5])
@pytest.mark.parametrize("merge", [1, 2])
def test_a_blocked_stream_ends_incomplete_before_the_payload(
    engine: FakeEngine, enforce: Proxy, speaks: Any, blocked_at: int, merge: int
) -> None:
    engine.script = Script(blocked={0: blocked_at}, merge=merge, speaks=speaks, text_with_finish=True, logprobs=True)
    answer = enforce.post(PATH, body(stream=True, include=["message.output_text.logprobs"]))
    found = events(answer)
    last = found[-1]
    assert (last["type"], last["response"]["incomplete_details"]) == (
        "response.incomplete",
        {"reason": "content_filter"},
    )
    assert all(item["status"] == "incomplete" for item in last["response"]["output"])
    added, done = (
        [event["output_index"] for event in found if event["type"] == f"response.output_item.{name}"]
        for name in ("added", "done")
    )
    assert added == done, "what was begun was ended"
    assert_nothing_leaks(answer)


def test_openais_client_reads_a_blocked_stream_to_its_end(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(blocked={0: 4})
    with enforce.openai() as client:
        found = list(client.responses.create(**body(stream=True)))
    assert "".join(event.delta for event in found if event.type == "response.output_text.delta") == "The answer is"
    assert found[-1].type == "response.incomplete"
    assert found[-1].response.output_text == "The answer is"


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_judged_is_a_503(engine: FakeEngine, enforce: Proxy, stream: bool) -> None:
    engine.script = Script(fault="missing")
    answer = enforce.post(PATH, body(stream=stream))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guard_unavailable")


@pytest.mark.parametrize("script", [Script(fault="no_final"), Script(cut_after=3), Script(fault="short")])
def test_a_stream_that_fails_says_so_to_whoever_reads_events_and_whoever_waits_for_the_end(
    engine: FakeEngine, enforce: Proxy, script: Script
) -> None:
    engine.script = script
    *_, error, failed = events(enforce.post(PATH, body(stream=True)))
    assert (error["type"], failed["type"]) == ("error", "response.failed")
    assert failed["response"]["error"]["code"] == "server_error"
    assert failed["response"]["status"] == "failed"
    with enforce.openai() as client, pytest.raises(openai.APIError, match=r"judge|stopped"):
        list(client.responses.create(**body(stream=True)))


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_passed_on(engine: FakeEngine, enforce: Proxy, stream: bool) -> None:
    engine.script = Script(status=400)
    with enforce.openai() as client, pytest.raises(openai.BadRequestError, match="context length"):
        client.responses.create(**body(stream=stream))


def test_a_conversation_of_items_is_one_chat(engine: FakeEngine, enforce: Proxy) -> None:
    """What a client sends who appends each response's output to its input."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    asked = body(
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Be kind."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
            },
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": TOOL, "arguments": "{}"},
            {"type": "function_call", "id": "fc_2", "call_id": "c2", "name": TOOL, "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
            {"role": "assistant", "content": "Rain."},
            {"role": "assistant", "content": "And sun."},
            {"role": "user", "content": "Tomorrow?"},
        ],
        tools=[{"type": "function", "name": TOOL, "description": "d", "parameters": schema, "strict": True}],
        tool_choice={"type": "function", "name": TOOL},
        text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}, "verbosity": "low"},
        reasoning={"effort": "low", "summary": "auto"},
        max_output_tokens=9,
        parallel_tool_calls=False,
        temperature=0.5,
        top_p=0.9,
        store=False,
        include=["reasoning.encrypted_content"],
        user="u",
        prompt_cache_key="k",
    )
    answer = enforce.post(PATH, asked)
    assert answer.status_code == 200, answer.text
    Response.model_validate(answer.json(), strict=True)
    sent = engine.bodies[-1]
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": TOOL, "arguments": "{}"}} for n in (1, 2)]
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "reasoning": "Hm.", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
        {"role": "assistant", "content": "Rain."},
        {"role": "assistant", "content": "And sun."},
        {"role": "user", "content": "Tomorrow?"},
    ]
    function = {"name": TOOL, "parameters": schema, "description": "d", "strict": True}
    expected = {
        "model": MODEL,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": TOOL}},
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        "temperature": 0.5,
        "top_p": 0.9,
        "max_completion_tokens": 9,
        "stop_token_ids": [RESERVED],
    }
    assert {name: value for name, value in sent.items() if name not in ("messages", "vllm_xargs")} == expected


def test_the_output_of_an_answer_is_accepted_as_input(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(tokens=TOKENS, places=TALKS, finish="tool_calls")
    with enforce.openai() as client:
        first = client.responses.create(**body())
        given: Any = [{"role": "user", "content": "Six?"}, *first.output]
        client.responses.create(
            **body(input=[*given, {"type": "function_call_output", "call_id": "call_1", "output": "rain"}])
        )
    _, turn, result = engine.bodies[-1]["messages"]
    assert (turn["reasoning"], turn["content"], turn["tool_calls"][0]["function"]["arguments"]) == (
        "Hm.",
        "It is",
        '{"city": "Ulm"}',
    )
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "rain"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "mcp", "server_url": "http://evil/", "server_label": "a"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "a", "server_url": "http://evil/"}]}, "tools[0].server_url"),
    ({"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}, "tools[0].type"),
    ({"tool_choice": {"type": "mcp", "server_label": "a"}}, "tool_choice.type"),
    ({"input": [{"type": "item_reference", "id": "rs_1"}]}, "input[0].type"),
    ({"input": [{"type": "computer_call_output"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://10/"}]}]}, "content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "http://10/"}]}]}, "content[0].type"),
    ({"input": [{"type": "function_call_output", "output": [{"type": "input_image"}]}]}, "input[0].output[0].type"),
    ({"input": [{"type": "reasoning", "id": "a", "summary": [], "encrypted_content": "x"}]}, "encrypted_content"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [None]}, "input[0]"),
    ({"input": []}, "input"),
    ({"input": None}, "input"),
    ({"input": {"role": "user"}}, "input"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"stream": 1}, "stream"),
    ({"n": 2}, "n"),
    ({"messages": []}, "messages"),
    ({"max_tokens": 3}, "max_tokens"),
    ({"stop_token_ids": [RESERVED]}, "stop_token_ids"),
    ({"chat_template": "x"}, "chat_template"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
    ({"vllm_xargs": {"undertow_policy": "x"}}, "vllm_xargs"),
    ({"previous_input_messages": [{}]}, "previous_input_messages"),
    ({"api_base": "http://evil/"}, "api_base"),
]


@pytest.mark.parametrize(("fields", "named"), BAD, ids=[f"{named}-{index}" for index, (_, named) in enumerate(BAD)])
def test_what_is_not_accepted_is_refused_by_name(
    engine: FakeEngine, enforce: Proxy, fields: dict[str, Any], named: str
) -> None:
    answer = enforce.post(PATH, body(**fields))
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"].endswith(named)
    assert engine.bodies == []


def test_every_field_that_vllm_and_openais_client_know_was_decided() -> None:
    model = engines_model("openai.responses.protocol", "ResponsesRequest")
    assert set(model.model_fields) - RESPONSE_FIELDS.names == set()
    assert undecided_in(RESPONSE_FIELDS, ResponseCreateParamsBase) == []


@pytest.mark.parametrize(
    "chunks",
    [
        [b"data: [DONE]\n\n"],
        [b"data: {}\n\n", b"data: [DONE]\n\n"],
        [b"data: <html>\n\n"],
        [b'data: {"choices": [{"index": 0, "delta": {"tool_calls": 7}, "finish_reason": null}]}\n\n'],
    ],
)
def test_whatever_comes_the_stream_ends_once_in_its_own_shape(chunks: list[bytes]) -> None:
    writer = ResponseWriter(read_response(json.dumps(body(stream=True)).encode(), Terms()))
    written = b"".join(writer.write(chunk) for chunk in [*chunks, b"data: [DONE]\n\n", b"data: {}\n\n"])
    assert written.count(b"event: error") == 1
    assert b"event: response.completed" not in written


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_none_is_an_error_even_where_nothing_is_enforced(
    engine: FakeEngine, monitor: Proxy, stream: bool
) -> None:
    engine.script = Script(garbage=True)
    answer = monitor.post(PATH, body(stream=stream))
    error = events(answer)[-1] if stream else answer.json()["error"]
    assert error["code"] == ("upstream_cut" if stream else "upstream_unavailable")
