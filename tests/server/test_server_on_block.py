"""`on_block: completion`: a blocked client reads an answer that says so, in the shape of its endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from server.app import create_app
from server.config.policies import REFUSAL, PolicySettings

from .conftest import Proxy, settings_for
from .fake_engine import MODEL, PROMPT_TOKENS, TOOL, FakeEngine, Script
from .hosting import Host, hosted
from .test_server_answers import CHAT, TEXT, assert_nothing_leaks, chat_body, choices_by_index, events, text_body

ENDPOINTS = ["chat", "text", "responses", "messages"]


@pytest.fixture(scope="module")
def told(played: tuple[FakeEngine, Host]) -> Iterator[Proxy]:
    settings = settings_for(played[1].url)
    policy = PolicySettings(mode="enforce", on_block="completion")
    with hosted(create_app(settings.model_copy(update={"policy": policy})), "on") as host:
        yield Proxy(host)


def ask(proxy: Proxy, endpoint: str, stream: bool) -> Any:
    fields: dict[str, Any] = {"model": MODEL, "stream": stream}
    match endpoint:
        case "chat":
            return proxy.post(CHAT, chat_body(stream=stream))
        case "text":
            return proxy.post(TEXT, text_body(stream=stream))
        case "responses":
            return proxy.post("/v1/responses", {**fields, "input": "a"})
    return proxy.post("/v1/messages", {**fields, "max_tokens": 9, "messages": [{"role": "user", "content": "a"}]})


def read(endpoint: str, answer: Any, stream: bool) -> tuple[str, str]:
    """The text that a client shows, and why it ended."""
    assert answer.status_code == 200
    data = [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line.startswith("data: {") or not stream
    ]
    match endpoint, stream:
        case ("chat", True):
            choices = choices_by_index(answer.content)[0]
            return "".join(choice["delta"].get("content", "") for choice in choices), choices[-1]["finish_reason"]
        case ("text", True):
            choices = choices_by_index(answer.content)[0]
            return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]
        case ("chat", False):
            return data[0]["choices"][0]["message"]["content"], data[0]["choices"][0]["finish_reason"]
        case ("text", False):
            return data[0]["choices"][0]["text"], data[0]["choices"][0]["finish_reason"]
        case ("responses", _):
            response = data[-1]["response"] if stream else data[0]
            text = "".join(part["text"] for item in response["output"] for part in item["content"])
            return text, response["incomplete_details"]["reason"]
    if not stream:
        return "".join(block["text"] for block in data[0]["content"]), data[0]["stop_reason"]
    deltas = [event["delta"] for event in data if "delta" in event]
    return "".join(delta.get("text", "") for delta in deltas), deltas[-1]["stop_reason"]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_prompt_is_an_answer_that_says_so(
    engine: FakeEngine, told: Proxy, endpoint: str, stream: bool
) -> None:
    engine.script = Script(blocked={0: 0})
    answer = ask(told, endpoint, stream)
    reason = "refusal" if endpoint == "messages" else "content_filter"
    assert read(endpoint, answer, stream) == (REFUSAL, reason)
    assert answer.headers["x-undertow-action"] == "block"
    assert_nothing_leaks(answer)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_answer_says_so_in_the_place_of_its_text_or_apart_from_what_was_read(
    engine: FakeEngine, told: Proxy, endpoint: str, stream: bool
) -> None:
    engine.script = Script(blocked={0: 3}, text_with_finish=True)
    answer = ask(told, endpoint, stream)
    text, reason = read(endpoint, answer, stream)
    assert text == (f"The answer\n\n{REFUSAL}" if stream else REFUSAL)
    assert reason == ("refusal" if endpoint == "messages" else "content_filter")
    assert_nothing_leaks(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_one_blocked_choice_says_so_and_the_others_are_whole(engine: FakeEngine, told: Proxy, stream: bool) -> None:
    engine.script = Script(blocked={1: 0, 2: 2})
    answer = told.post(CHAT, chat_body(n=3, stream=stream))
    if stream:
        texts = {
            index: "".join(choice["delta"].get("content", "") for choice in choices)
            for index, choices in choices_by_index(answer.content).items()
        }
    else:
        texts = {choice["index"]: choice["message"]["content"] for choice in answer.json()["choices"]}
    assert texts == {0: "The answer is 42.", 1: REFUSAL, 2: f"The\n\n{REFUSAL}" if stream else REFUSAL}


def test_a_block_that_broke_the_engines_answer_says_so_too(engine: FakeEngine, told: Proxy) -> None:
    engine.script = Script(blocked={0: 0}, status=500)
    answer = ask(told, "chat", stream=False)
    assert read("chat", answer, stream=False) == (REFUSAL, "content_filter")
    assert answer.json()["usage"]["prompt_tokens"] == PROMPT_TOKENS
    engine.script = Script(blocked={0: 2}, error_in_stream=True)
    answer = ask(told, "chat", stream=True)
    assert read("chat", answer, stream=True) == (f"The\n\n{REFUSAL}", "content_filter")
    assert events(answer.content)[-1] == b"data: [DONE]\n\n"


def test_it_is_counted_as_the_block_that_it_is(engine: FakeEngine, told: Proxy) -> None:
    def counted(outcome: str) -> float:
        return told.sample("undertow_requests_total", endpoint="chat_completions", outcome=outcome)

    before = counted("blocked_prompt"), counted("blocked_output")
    for blocked in ({0: 0}, {0: 2}):
        for stream in (False, True):
            engine.script = Script(blocked=blocked)
            ask(told, "chat", stream)
    assert (counted("blocked_prompt"), counted("blocked_output")) == (before[0] + 2, before[1] + 2)


def test_what_cannot_be_judged_is_an_error_all_the_same(engine: FakeEngine, told: Proxy) -> None:
    engine.script = Script(blocked={0: 0}, fault="missing")
    for endpoint in ENDPOINTS:
        assert ask(told, endpoint, stream=False).status_code == 503


def test_anthropics_client_shows_it_as_text(engine: FakeEngine, told: Proxy) -> None:
    engine.script = Script(blocked={0: 0})
    with anthropic.Anthropic(base_url=told.url, api_key="none") as client:
        message = client.messages.create(model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "a"}])
    assert (message.content[0].to_dict()["text"], message.stop_reason) == (REFUSAL, "refusal")


TOOLS: Any = [{"type": "function", "function": {"name": TOOL, "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_reads_a_blocked_prompt_as_an_answer(
    engine: FakeEngine, told: Proxy, stream: bool, n: int, tools: bool
) -> None:
    engine.script = Script(blocked=dict.fromkeys(range(n), 0), speaks="tool" if tools else "content")
    options: Any = {"tools": TOOLS, "tool_choice": "required"} if tools else {}
    texts: dict[int, str] = dict.fromkeys(range(n), "")
    reasons: dict[int, str | None] = {}
    with told.openai(max_retries=0) as client:
        ask: Any = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "n": n, **options}
        if stream:
            for chunk in client.chat.completions.create(stream=True, **ask):
                for piece in chunk.choices:
                    assert not piece.delta.tool_calls
                    texts[piece.index] += piece.delta.content or ""
                    reasons[piece.index] = piece.finish_reason
        else:
            for choice in client.chat.completions.create(**ask).choices:
                assert not choice.message.tool_calls
                texts[choice.index] = choice.message.content or ""
                reasons[choice.index] = choice.finish_reason
    assert texts == dict.fromkeys(range(n), REFUSAL)
    assert reasons == dict.fromkeys(range(n), "content_filter")


def test_openais_client_reads_why_a_tool_call_ends_in_the_middle(engine: FakeEngine, told: Proxy) -> None:
    """Its arguments are no JSON, and nobody is told that they are whole."""
    engine.script = Script(blocked={0: 3}, speaks="tool")
    with told.openai(max_retries=0) as client:
        asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "tools": TOOLS, "stream": True}
        choices = [choice for chunk in client.chat.completions.create(**asked) for choice in chunk.choices]
    assert any(choice.delta.tool_calls for choice in choices)
    assert (choices[-1].finish_reason, (choices[-1].delta.content or "").strip()) == ("content_filter", REFUSAL)
    assert not any(choice.finish_reason for choice in choices[:-1])
