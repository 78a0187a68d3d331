"""Whatever is answered fits the vendors' own models, which they generate from the schemas that they publish: each field
that has to be there is, and no value is of another kind. What they do not know may stand beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.shared import ErrorObject
from pydantic import TypeAdapter

from .conftest import Proxy
from .fake_engine import FakeEngine, Script

TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "organism", "messages": MESSAGES},
    "/v1/completions": {"model": "organism", "prompt": "hello"},
    "/v1/responses": {"model": "organism", "input": "hello"},
    "/v1/messages": {"model": "organism", "messages": MESSAGES, "max_tokens": 9},
}
WHOLE: dict[str, TypeAdapter[Any]] = {
    "/v1/chat/completions": TypeAdapter(ChatCompletion),
    "/v1/completions": TypeAdapter(Completion),
    "/v1/responses": TypeAdapter(Response),
    "/v1/messages": TypeAdapter(Message),
}
EVENTS: dict[str, TypeAdapter[Any]] = {
    "/v1/chat/completions": TypeAdapter(ChatCompletionChunk),
    "/v1/completions": TypeAdapter(Completion),
    "/v1/responses": TypeAdapter(ResponseStreamEvent),
    "/v1/messages": TypeAdapter(RawMessageStreamEvent),
}
ENDED = {
    "allowed": Script(),
    "flagged": Script(flagged=True),
    "with logprobs": Script(logprobs=True),
    "reasoned": Script(speaks="reasoning"),
    "calling a tool": Script(speaks="tool", finish="tool_calls"),
    "blocked halfway": Script(blocked={0: 3}),
    "blocked at its first token": Script(blocked={0: 1}),
    "at its length": Script(finish="length"),
    "at its end": Script(finish="stop"),
}
REFUSED = {
    "blocked prompt": (Script(blocked={0: 0}), 400),
    "guard failure": (Script(fault="short"), 503),
    "dead guard": (Script(guard_down=True), 503),
    "rejected by the engine": (Script(status=400), 400),
    "broken engine": (Script(status=500), 500),
}


def fields_of(path: str, script: Script) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if script.logprobs and path == "/v1/chat/completions":
        more = {"logprobs": True, "top_logprobs": 1}
    if script.logprobs and path == "/v1/responses":
        more = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    return {**BODIES[path], **more}


ways = pytest.mark.parametrize(
    ("path", "ending"),
    # Completions of text have neither tools nor reasoning.
    [(path, ending) for path in BODIES for ending in ENDED if path != TEXT or ENDED[ending].speaks == "content"],
)


@ways
def test_a_whole_answer(engine: FakeEngine, enforce: Proxy, path: str, ending: str) -> None:
    engine.script = ENDED[ending]
    answer = enforce.post(path, fields_of(path, ENDED[ending]))
    assert answer.status_code == 200, answer.text
    WHOLE[path].validate_json(answer.content, strict=True)


@ways
def test_every_event_of_a_stream(engine: FakeEngine, enforce: Proxy, path: str, ending: str) -> None:
    engine.script = ENDED[ending]
    answer = enforce.post(path, {**fields_of(path, ENDED[ending]), "stream": True})
    assert answer.status_code == 200, answer.text
    data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    found = [each for each in data if each != "[DONE]"]
    assert len(found) >= 1
    for each in map(json.loads, found):
        if path == TEXT and each["choices"] and each["choices"][0]["finish_reason"] is None:
            # Their schema has no word for a choice that goes on; their own streams have null there, as vLLM's.
            each["choices"][0]["finish_reason"] = "stop"
        EVENTS[path].validate_python(each, strict=True)


def openai_error(body: dict[str, Any]) -> None:
    TypeAdapter(ErrorObject).validate_python(body["error"])


def anthropic_error(body: dict[str, Any]) -> None:
    TypeAdapter(ErrorResponse).validate_python(body)


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", BODIES)
def test_an_error(engine: FakeEngine, enforce: Proxy, path: str, stream: bool, why: str) -> None:
    engine.script, status = REFUSED[why]
    answer = enforce.post(path, {**BODIES[path], "stream": stream})
    check: Callable[[dict[str, Any]], None] = anthropic_error if path == "/v1/messages" else openai_error
    if answer.status_code == 200:
        # The fault came to light when the stream had begun.
        assert stream
        assert why == "guard failure"
        last = [line for line in answer.text.splitlines() if line.startswith("data: {")][-1]
        told = json.loads(last.removeprefix("data: "))
        if "error" in told:
            check(told if path == "/v1/messages" else {"error": told["error"]})
        else:
            EVENTS[path].validate_json(json.dumps(told), strict=True)
        return
    assert answer.status_code == status
    check(answer.json())


def test_what_is_missing_or_of_another_kind_is_found(engine: FakeEngine, enforce: Proxy) -> None:
    """So that the models are as strict as these tests take them for."""
    answer = enforce.post("/v1/chat/completions", BODIES["/v1/chat/completions"]).json()
    for broken in (
        {name: value for name, value in answer.items() if name != "created"},
        {**answer, "created": "1"},
        {**answer, "choices": [{**answer["choices"][0], "finish_reason": "blocked"}]},
    ):
        with pytest.raises(ValueError, match="validation error"):
            WHOLE["/v1/chat/completions"].validate_python(broken, strict=True)
