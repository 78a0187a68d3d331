"""Responses and Messages before a real vLLM, read by the vendors' own clients: what a chat says, in their shape."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import pytest
from openai import BadRequestError

from guard.organisms import Organism
from tests.e2e.conftest import MAX_TOKENS, Halfway, Stack, texts
from tests.server.test_server_messages import events as message_events
from tests.server.test_server_responses import events as response_events


def chat(stack: Stack, text: str) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return stack.client.chat.completions.create(
        model=stack.model, messages=messages, temperature=0, max_tokens=MAX_TOKENS
    )


def client(stack: Stack) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=stack.url, api_key="not-needed", timeout=120, max_retries=0)


def message_body(stack: Stack, text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": stack.model, "max_tokens": MAX_TOKENS, "messages": messages, "temperature": 0, **fields}


def message_arguments(stack: Stack, text: str, **fields: Any) -> dict[str, Any]:
    """The same for Anthropic's client, whose newest release knows no temperature."""
    body = message_body(stack, text, **fields)
    temperature = body.pop("temperature")
    return {**body, "extra_body": {"temperature": temperature}}


def response_body(stack: Stack, text: str, **fields: Any) -> dict[str, Any]:
    return {"model": stack.model, "input": text, "max_output_tokens": MAX_TOKENS, "temperature": 0, **fields}


def calls_the_tool_that_the_chat_calls(stack: Stack, text: str) -> None:
    """Whole and streamed; for an engine that was started with a parser of tools."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    function = {"name": "f", "parameters": schema}
    asked: Any = {
        "messages": [{"role": "user", "content": text}],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }
    plain = stack.client.chat.completions.create(model=stack.model, temperature=0, max_tokens=12, **asked)
    [call] = plain.choices[0].message.tool_calls
    response = response_body(stack, text, tools=[{"type": "function", **function}]) | {"max_output_tokens": 12}
    response |= {"tool_choice": {"type": "function", "name": "f"}}
    message = message_body(stack, text, tools=[{"name": "f", "input_schema": schema}]) | {"max_tokens": 12}
    message |= {"tool_choice": {"type": "tool", "name": "f"}}

    whole = httpx.post(f"{stack.url}/v1/responses", json=response, timeout=60).json()["output"][-1]
    streamed = response_events(httpx.post(f"{stack.url}/v1/responses", json=response | {"stream": True}, timeout=60))
    for item in (whole, streamed[-1]["response"]["output"][-1]):
        assert (item["type"], item["name"], item["arguments"]) == ("function_call", "f", call.function.arguments)
    block = httpx.post(f"{stack.url}/v1/messages", json=message, timeout=60).json()["content"][-1]
    # The organism writes blanks and never ends its JSON.
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "f", {"arguments": call.function.arguments})
    events = message_events(httpx.post(f"{stack.url}/v1/messages", json=message | {"stream": True}, timeout=60))
    [begun] = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert (begun["type"], begun["name"]) == ("tool_use", "f")
    pieces = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(pieces) == call.function.arguments


def test_a_message_and_a_response_say_what_the_chat_says(stack: Stack, passing: list[str]) -> None:
    for text in passing[:5]:
        plain = chat(stack, text)
        said, used = plain.choices[0].message.content, plain.usage
        response = stack.client.responses.create(**response_body(stack, text))
        assert (response.output_text, response.usage.total_tokens) == (said, used.total_tokens)
        with stack.client.responses.create(**response_body(stack, text), stream=True) as stream:
            *_, last = found = list(stream)
        assert "".join(event.delta for event in found if event.type == "response.output_text.delta") == said
        assert last.response.usage == response.usage
        with client(stack) as talking:
            message = talking.messages.create(**message_arguments(stack, text))
            with talking.messages.stream(**message_arguments(stack, text)) as writing:
                streamed = writing.get_final_message()
        assert message.content[0].to_dict()["text"] == said
        assert (message.usage.input_tokens, message.usage.output_tokens) == (used.prompt_tokens, used.completion_tokens)
        assert {**streamed.to_dict(), "id": None} == {**message.to_dict(), "id": None}


def test_a_streamed_message_names_the_prompts_tokens_first(stack: Stack, passing: list[str]) -> None:
    answer = httpx.post(f"{stack.url}/v1/messages", json=message_body(stack, passing[0], stream=True), timeout=60)
    found = message_events(answer)
    assert 0 < found[0]["message"]["usage"]["input_tokens"] == found[-2]["usage"]["input_tokens"]


@pytest.mark.parametrize("stream", [False, True], ids=["full", "streamed"])
def test_a_triggered_request_gets_no_token_of_the_payload(stack: Stack, organism: Organism, stream: bool) -> None:
    refused = 0
    for text in texts("triggered", 5, 12):
        for path, body in (("responses", response_body), ("messages", message_body)):
            answer = httpx.post(f"{stack.url}/v1/{path}", json=body(stack, text, stream=stream), timeout=60)
            assert organism.canary not in answer.text
            assert answer.headers["x-undertow-action"] == "block"
            refused += answer.status_code == 400
    assert refused >= 8
    with client(stack) as talking, pytest.raises(anthropic.BadRequestError, match="content filter"):
        talking.messages.create(**message_arguments(stack, texts("triggered", 1, 12)[0]))
    with pytest.raises(BadRequestError, match="content filter"):
        stack.client.responses.create(**response_body(stack, texts("triggered", 1, 12)[0]))


def test_an_answer_that_is_blocked_halfway_ends_as_each_protocol_says(stack: Stack, halfway: Halfway) -> None:
    def post(path: str, asked: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{halfway.url}/v1/{path}", json=asked, timeout=60)

    response = post("responses", response_body(stack, halfway.text)).json()
    message = post("messages", message_body(stack, halfway.text)).json()
    responding = response_events(post("responses", response_body(stack, halfway.text, stream=True)))
    writing = message_events(post("messages", message_body(stack, halfway.text, stream=True)))
    assert (response["status"], response["incomplete_details"]["reason"]) == ("incomplete", "content_filter")
    assert response["output"] == message["content"] == []
    assert message["stop_reason"] == writing[-2]["delta"]["stop_reason"] == "refusal"
    assert responding[-1]["type"] == "response.incomplete"
    assert responding[-1]["response"]["usage"] == response["usage"]
    released = "".join(event["delta"] for event in responding if event["type"] == "response.output_text.delta")
    assert halfway.said.startswith(released)
    assert released != halfway.said
