"""What a client sees, through a real proxy, in full responses and in streams."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from guard.policy import Policy

from .conftest import KEY, Proxy
from .fake_engine import FINGERPRINT, MODEL, PAYLOAD, PROMPT_TOKENS, RESERVED, FakeEngine, Play, Script

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "What is six times seven?"}]


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": MESSAGES, **fields}


def text_body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Six times seven is", **fields}


BODIES = [pytest.param(CHAT, chat_body, id="chat"), pytest.param(TEXT, text_body, id="completions")]


def events(content: bytes) -> list[bytes]:
    return [event + b"\n\n" for event in content.split(b"\n\n") if event]


def played(engine: FakeEngine) -> Play:
    """The engine's side of the last request."""
    return Play(engine.script, engine.bodies[-1], chat="messages" in engine.bodies[-1])


def choices_by_index(content: bytes) -> dict[int, list[dict[str, Any]]]:
    """Each choice's chunks of a stream, in order."""
    found: dict[int, list[dict[str, Any]]] = {}
    for event in events(content):
        if event != b"data: [DONE]\n\n":
            for choice in json.loads(event.removeprefix(b"data: "))["choices"]:
                found.setdefault(choice["index"], []).append(choice)
    return found


def assert_nothing_leaks(answer: httpx.Response) -> None:
    assert PAYLOAD.encode() not in answer.content
    assert str(RESERVED).encode() not in answer.content
    assert b"undertow" not in answer.content
    assert "x-undertow-evidence" not in answer.headers


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_benign_answer_is_the_engines_byte_for_byte(engine: FakeEngine, enforce: Proxy, path: str, body: Any) -> None:
    answer = enforce.post(path, body(n=2))
    assert answer.status_code == 200
    assert answer.content == played(engine).full()
    assert answer.headers["x-undertow-action"] == "allow"
    assert_nothing_leaks(answer)


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("merge", [1, 2, 5])
@pytest.mark.parametrize("mode", ["enforce", "monitor", "off"])
def test_a_benign_stream_is_the_engines_byte_for_byte(
    engine: FakeEngine, request: pytest.FixtureRequest, path: str, body: Any, merge: int, mode: str
) -> None:
    proxy: Proxy = request.getfixturevalue(mode)
    engine.script = Script(merge=merge)
    answer = proxy.post(path, body(stream=True, stream_options={"include_usage": True}))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content == b"".join(played(engine).data_events()) + b"data: [DONE]\n\n"
    assert_nothing_leaks(answer)


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_stream_without_usage_lacks_only_the_usage_chunk(
    engine: FakeEngine, enforce: Proxy, path: str, body: Any
) -> None:
    answer = enforce.post(path, body(stream=True, stream_options={"continuous_usage_stats": True}))
    assert answer.content == b"".join(played(engine).data_events()[:-1]) + b"data: [DONE]\n\n"
    assert engine.bodies[-1]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_benign_stream_of_several_choices_loses_nothing(
    engine: FakeEngine, enforce: Proxy, path: str, body: Any
) -> None:
    answer = enforce.post(path, body(stream=True, n=3))
    assert sorted(events(answer.content)[:-1]) == sorted(played(engine).data_events()[:-1])
    expected = choices_by_index(b"".join(played(engine).data_events()[:-1]))
    assert choices_by_index(answer.content) == expected


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_prompt_is_a_400_that_names_the_prompt(
    engine: FakeEngine, enforce: Proxy, path: str, body: Any, stream: bool
) -> None:
    engine.script = Script(blocked={0: 0})
    answer = enforce.post(path, body(stream=stream))
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["code"] == "content_filter"
    assert error["type"] == "invalid_request_error"
    assert error["param"] == ("messages" if path == CHAT else "prompt")
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-undertow-action"] == "block"
    assert_nothing_leaks(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_client_raises_bad_request_for_a_blocked_prompt_and_does_not_retry(
    engine: FakeEngine, enforce: Proxy, stream: bool
) -> None:
    engine.script = Script(blocked={0: 0})
    with enforce.openai() as client, pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
    assert raised.value.code == "content_filter"
    assert len(engine.bodies) == 1


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_blocked_answer_has_no_text_and_says_content_filter(
    engine: FakeEngine, enforce: Proxy, path: str, body: Any
) -> None:
    engine.script = Script(blocked={0: 3})
    answer = enforce.post(path, body())
    choice = answer.json()["choices"][0]
    assert answer.status_code == 200
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["content"] is None if path == CHAT else choice["text"] == ""
    assert answer.json()["usage"]["completion_tokens"] == 4
    assert answer.headers["x-undertow-action"] == "block"
    assert_nothing_leaks(answer)


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("blocked_at", [1, 2, 3, 5])
@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("text_with_finish", [False, True])
def test_a_blocked_stream_ends_with_content_filter_before_the_payload(
    engine: FakeEngine, enforce: Proxy, path: str, body: Any, blocked_at: int, merge: int, text_with_finish: bool
) -> None:
    engine.script = Script(blocked={0: blocked_at}, merge=merge, text_with_finish=text_with_finish)
    answer = enforce.post(path, body(stream=True, stream_options={"include_usage": True}))
    *_, last, usage, done = events(answer.content)
    choice = json.loads(last.removeprefix(b"data: "))["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert choice["delta"] == {} if path == CHAT else choice["text"] == ""
    assert "stop_reason" not in choice
    assert json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"] == blocked_at + 1
    assert done == b"data: [DONE]\n\n"
    assert_nothing_leaks(answer)
    texts = [
        choice.get("delta", choice).get("content", choice.get("text", ""))
        for choice in choices_by_index(answer.content)[0]
    ]
    safe = "".join(engine.script.tokens[: blocked_at - 1])
    assert safe.startswith("".join(text for text in texts if text))


def test_one_blocked_choice_of_three_leaves_the_others_whole(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(blocked={1: 2})
    answer = enforce.post(CHAT, chat_body(n=3))
    first, second, third = answer.json()["choices"]
    assert [first["finish_reason"], second["finish_reason"], third["finish_reason"]] == [
        "length",
        "content_filter",
        "length",
    ]
    assert second["message"] == {"role": "assistant", "content": None, "refusal": None}
    assert first["message"]["content"] == third["message"]["content"] == "The answer is 42."
    assert_nothing_leaks(answer)


def test_one_blocked_choice_of_a_stream_leaves_the_others_whole(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(blocked={1: 2})
    answer = enforce.post(CHAT, chat_body(n=3, stream=True))
    found = choices_by_index(answer.content)
    texts = {index: "".join(choice["delta"].get("content", "") for choice in found[index]) for index in found}
    assert texts == {0: "The answer is 42.", 1: "The", 2: "The answer is 42."}
    assert [found[index][-1]["finish_reason"] for index in range(3)] == ["length", "content_filter", "length"]
    assert_nothing_leaks(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_one_blocked_prompt_of_two_blocks_its_choices_only(engine: FakeEngine, enforce: Proxy, stream: bool) -> None:
    engine.script = Script(blocked={2: 0, 3: 0})
    answer = enforce.post(TEXT, text_body(prompt=["one", "two"], n=2, stream=stream))
    assert answer.status_code == 200
    if stream:
        found = choices_by_index(answer.content)
        assert events(answer.content)[-1] == b"data: [DONE]\n\n"
    else:
        found = {choice["index"]: [choice] for choice in answer.json()["choices"]}
    reasons = [found[index][-1]["finish_reason"] for index in range(4)]
    assert reasons == ["length", "length", "content_filter", "content_filter"]
    texts = ["".join(choice["text"] for choice in found[index]) for index in range(4)]
    assert texts == ["The answer is 42.", "The answer is 42.", "", ""]
    assert answer.headers["x-undertow-action"] == "block"
    assert_nothing_leaks(answer)


@pytest.mark.parametrize("blocked", [{}, {2: 0, 3: 0}, {2: 2}])
def test_prompts_that_wait_for_their_turn_are_judged_when_it_comes(
    engine: FakeEngine, enforce: Proxy, blocked: dict[int, int]
) -> None:
    engine.script = Script(late=frozenset({2, 3}), blocked=blocked)
    answer = enforce.post(TEXT, text_body(prompt=["one", "two"], n=2, stream=True))
    found = choices_by_index(answer.content)
    reasons = [found[index][-1]["finish_reason"] for index in range(4)]
    assert reasons == ["content_filter" if index in blocked else "length" for index in range(4)]
    texts = ["".join(choice["text"] for choice in found[index]) for index in range(4)]
    assert all(texts[index] == "The answer is 42." for index in range(4) if index not in blocked)
    assert_nothing_leaks(answer)


def test_a_prompt_of_token_ids_is_one_prompt(engine: FakeEngine, enforce: Proxy) -> None:
    assert enforce.post(TEXT, text_body(prompt=[1, 2, 3])).status_code == 200
    assert enforce.post(TEXT, text_body(prompt=[[1, 2], [3]])).status_code == 200


def test_a_block_that_breaks_structured_output_is_a_block_and_not_a_fault(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(blocked={0: 2}, status=500)
    answer = enforce.post(CHAT, chat_body(response_format={"type": "json_object"}))
    choice = answer.json()["choices"][0]
    assert answer.status_code == 200
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "content_filter")
    assert answer.json()["usage"]["total_tokens"] == PROMPT_TOKENS + 3
    engine.script = Script(blocked={0: 0}, status=500)
    assert enforce.post(CHAT, chat_body()).json()["error"]["code"] == "content_filter"


def test_a_block_that_breaks_structured_output_in_a_stream_is_a_block(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(blocked={0: 2}, error_in_stream=True)
    answer = enforce.post(CHAT, chat_body(stream=True))
    *_, last, done = events(answer.content)
    chunk = json.loads(last.removeprefix(b"data: "))
    assert chunk["choices"][0]["finish_reason"] == "content_filter"
    assert (chunk["id"], chunk["model"], chunk["object"]) == ("chatcmpl-fake", MODEL, "chat.completion.chunk")
    assert done == b"data: [DONE]\n\n"
    assert b"error" not in answer.content
    assert_nothing_leaks(answer)


def test_an_error_of_the_engine_in_a_stream_reaches_the_client_without_what_was_held(
    engine: FakeEngine, enforce: Proxy
) -> None:
    engine.script = Script(error_in_stream=True)
    answer = enforce.post(CHAT, chat_body(stream=True))
    *_, error, done = events(answer.content)
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "Internal server error"
    assert done == b"data: [DONE]\n\n"
    assert b"length" not in answer.content, "the last chunk waits for evidence that never came"


def test_the_openai_client_reads_a_blocked_stream_to_its_end(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(blocked={0: 4})
    with enforce.openai() as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "The answer is"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "content_filter"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


async def test_the_async_openai_client_gets_whole_answers_and_streams(engine: FakeEngine, enforce: Proxy) -> None:
    async with openai.AsyncOpenAI(base_url=f"{enforce.url}/v1", api_key=KEY) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert answer.choices[0].message.content == "The answer is 42."
        completion = await client.completions.create(model=MODEL, prompt=["a", "b"])
        assert [choice.text for choice in completion.choices] == ["The answer is 42."] * 2
        stream = await client.completions.create(model=MODEL, prompt="a", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "The answer is 42."
        assert [model.id async for model in client.models.list()] == [MODEL]


def test_a_flagged_request_passes_and_says_so(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(flagged=True)
    answer = enforce.post(CHAT, chat_body())
    assert (answer.status_code, answer.headers["x-undertow-action"]) == (200, "flag")
    assert answer.content == played(engine).full()


@pytest.mark.parametrize("stream", [False, True])
def test_a_steered_request_passes_and_says_so(
    engine: FakeEngine, alone: Proxy, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = Script(steered=True)
    answer = alone.post(CHAT, chat_body(stream=stream))
    assert (answer.status_code, answer.headers["x-undertow-action"]) == (200, "steer")
    assert "42" in answer.text
    assert alone.sample("undertow_requests_total", endpoint="chat_completions", outcome="steered") == 1
    assert alone.sample("undertow_evaluated_total", endpoint="chat_completions") == 1
    decided = {"detector": "density", "phase": "prompt", "mode": "enforce"}
    assert alone.sample("undertow_decisions_total", action="steer", **decided) == 1
    (incident,) = [each for each in caplog.records if each.message == "incident"]
    fields = incident.__dict__["fields"]
    assert (fields["action"], fields["steered_from"]) == ("steer", PROMPT_TOKENS - 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("blocked_at", [0, 3])
def test_monitor_lets_pass_what_enforce_would_block_and_flags_it(
    engine: FakeEngine, monitor: Proxy, stream: bool, blocked_at: int
) -> None:
    engine.script = Script(blocked={0: blocked_at})
    answer = monitor.post(CHAT, chat_body(stream=stream))
    assert answer.status_code == 200
    expected = b"".join(played(engine).data_events()[:-1]) + b"data: [DONE]\n\n" if stream else played(engine).full()
    assert answer.content == expected
    at_header_time = "flag" if blocked_at == 0 or not stream else "pending"
    assert answer.headers["x-undertow-action"] == at_header_time


def test_off_says_nothing_and_still_counts_evidence(engine: FakeEngine, off: Proxy) -> None:
    engine.script = Script(blocked={0: 0})
    before = off.sample("undertow_evaluated_total", endpoint="chat_completions")
    answer = off.post(CHAT, chat_body())
    assert (answer.status_code, answer.headers["x-undertow-action"]) == (200, "allow")
    assert Policy.from_wire(engine.bodies[-1]["vllm_xargs"]["undertow_policy"]).mode == "off"
    assert off.sample("undertow_evaluated_total", endpoint="chat_completions") == before + 1


def test_the_engine_gets_the_policy_and_the_reserved_token_and_the_clients_fields(
    engine: FakeEngine, enforce: Proxy
) -> None:
    enforce.post(
        CHAT,
        chat_body(stop_token_ids=[5], cache_salt="s", logit_bias={"3": 1.5}, user="u", metadata={"a": "b"}),
        {"x-request-id": "mine-1", "cookie": "c=1", "x-forwarded-for": "6.6.6.6"},
    )
    sent, headers = engine.bodies[-1], engine.headers[-1]
    assert sent["stop_token_ids"] == [5, RESERVED]
    assert sent["vllm_xargs"] == {"undertow_policy": Policy().to_wire()}
    assert (sent["cache_salt"], sent["logit_bias"]) == ("s", {"3": 1.5})
    assert not {"user", "metadata"} & sent.keys(), "nobody there would heed them"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["x-undertow-evidence"] == "1"
    assert headers["x-request-id"] == "mine-1"
    assert not {"cookie", "x-forwarded-for"} & headers.keys()


def test_an_authorization_that_is_not_ascii_reaches_the_engine_as_it_came(engine: FakeEngine, enforce: Proxy) -> None:
    with httpx.Client(base_url=enforce.url, verify=False) as client:
        headers = {b"authorization": "Bearer caf\xe9".encode()}
        answer = client.post(CHAT, json=chat_body(), headers=headers)
    assert answer.status_code == 200
    assert engine.headers[-1]["authorization"].encode("latin-1").decode() == "Bearer caf\xe9"


def test_an_authorization_that_is_not_utf_8_reaches_nobody(engine: FakeEngine, enforce: Proxy) -> None:
    with httpx.Client(base_url=enforce.url, verify=False) as client:
        answer = client.post(CHAT, json=chat_body(), headers={b"authorization": b"Bearer caf\xe9"})
        models = client.get("/v1/models", headers={b"authorization": b"Bearer caf\xe9"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "authorization")
    assert (models.status_code, models.json()["error"]["param"]) == (400, "authorization")
    assert engine.bodies == engine.headers == []


@pytest.mark.parametrize("given", ["evil id", "http://10.0.0.1/", "a" * 65, "a_b"])
def test_a_request_id_that_is_not_plain_is_replaced(engine: FakeEngine, enforce: Proxy, given: str) -> None:
    answer = enforce.post(CHAT, chat_body(), {"x-request-id": given})
    assert answer.headers["x-request-id"] == engine.headers[-1]["x-request-id"]
    assert len(answer.headers["x-request-id"]) == 32


def test_keep_alive_comments_pass_and_evidence_does_not(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(keep_alive=True)
    content = enforce.post(CHAT, chat_body(stream=True)).content
    assert content.count(b": keep-alive\n\n") >= 3
    assert FINGERPRINT.encode() not in content
