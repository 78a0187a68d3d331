"""Of several choices each is blocked alone, and nothing that it said leaves in any field."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from .conftest import Proxy
from .fake_engine import MODEL, TOOL, FakeEngine, Script
from .test_server_answers import CHAT, MESSAGES, assert_nothing_leaks, chat_body, choices_by_index, text_body

PLACES: list[Any] = ["content", "reasoning", "refusal", "tool"]


@pytest.mark.parametrize("speaks", PLACES)
def test_a_blocked_choice_keeps_nothing_of_what_it_said(engine: FakeEngine, enforce: Proxy, speaks: Any) -> None:
    engine.script = Script(blocked={1: 3}, speaks=speaks, logprobs=True)
    answer = enforce.post(CHAT, chat_body(n=2, logprobs=True, return_token_ids=True))
    benign, blocked = answer.json()["choices"]
    assert blocked == {
        "index": 1,
        "message": {"role": "assistant", "content": None, "refusal": None},
        "logprobs": None,
        "finish_reason": "content_filter",
    }
    assert "42" in json.dumps(benign["message"])
    assert benign["logprobs"] is not None
    assert_nothing_leaks(answer)


@pytest.mark.parametrize("speaks", PLACES)
@pytest.mark.parametrize("merge", [1, 2])
def test_a_blocked_choice_of_a_stream_releases_nothing_after_the_block(
    engine: FakeEngine, enforce: Proxy, speaks: Any, merge: int
) -> None:
    engine.script = Script(blocked={1: 3}, speaks=speaks, logprobs=True, merge=merge, text_with_finish=True)
    answer = enforce.post(CHAT, chat_body(n=2, logprobs=True, stream=True))
    found = choices_by_index(answer.content)
    assert found[1][-1] == {"index": 1, "delta": {}, "logprobs": None, "finish_reason": "content_filter"}
    assert found[0][-1]["finish_reason"] == "length"
    said = json.dumps(found[0])
    assert all(token in said for token in ("The", "answer", "42"))
    assert_nothing_leaks(answer)


def test_a_blocked_text_has_neither_text_nor_logprobs(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(blocked={1: 3}, logprobs=True)
    answer = enforce.post("/v1/completions", text_body(n=2, logprobs=1))
    blocked = answer.json()["choices"][1]
    assert blocked == {"index": 1, "text": "", "logprobs": None, "finish_reason": "content_filter"}
    assert_nothing_leaks(answer)


@pytest.mark.parametrize("blocked", [{}, {0: 3}])
def test_a_blocked_json_answer_is_empty_and_not_cut(
    engine: FakeEngine, enforce: Proxy, blocked: dict[int, int]
) -> None:
    engine.script = Script(tokens=('{"a":', " 1", "}"), blocked=blocked)
    schema = {"name": "x", "schema": {"type": "object"}}
    answer = enforce.post(CHAT, chat_body(response_format={"type": "json_schema", "json_schema": schema}))
    assert answer.json()["choices"][0]["message"]["content"] == (None if blocked else '{"a": 1}')


def test_openais_client_raises_for_a_blocked_json_answer(engine: FakeEngine, enforce: Proxy) -> None:
    class Answer(BaseModel):
        a: int

    engine.script = Script(tokens=('{"a":', " 1", "}"), blocked={0: 3})
    with enforce.openai() as client, pytest.raises(openai.ContentFilterFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Answer)


def test_the_clients_stream_helper_assembles_a_call_of_a_tool(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(tokens=('{"city":', ' "Ulm"}'), speaks="tool", finish="tool_calls")
    tools: Any = [{"type": "function", "function": {"name": TOOL, "parameters": {"type": "object"}}}]
    with (
        enforce.openai() as client,
        client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=tools) as stream,
    ):
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Ulm"}'
