"""What a client may ask, and the shape of every refusal."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

import httpx
import pytest

from guard.policy import Policy
from server.errors import ApiError
from server.protocols.accepted import CHAT_FIELDS, TEXT_FIELDS
from server.protocols.openai import CHAT, TEXT, Terms, read_call

from .conftest import Proxy
from .fake_engine import RESERVED, FakeEngine
from .test_server_answers import chat_body, text_body


def assert_openai_error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error


@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses/resp_1",
        "/v1/embeddings",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "/V1/chat/completions",
        "/v1/models/organism",
        "/undertow/status",
        "/tokenize",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
def test_what_is_not_guarded_is_not_offered(engine: FakeEngine, enforce: Proxy, path: str) -> None:
    assert assert_openai_error(enforce.post(path, chat_body()), 404)["code"] == "not_found"
    assert assert_openai_error(enforce.get(path), 404)["code"] == "not_found"
    assert engine.bodies == []


@pytest.mark.parametrize(("method", "path"), [("GET", CHAT.path), ("DELETE", TEXT.path), ("POST", "/v1/models")])
def test_a_wrong_method_is_a_405_that_names_the_right_one(enforce: Proxy, method: str, path: str) -> None:
    with httpx.Client(base_url=enforce.url, verify=False) as client:
        answer = client.request(method, path)
    assert_openai_error(answer, 405)
    assert answer.headers["allow"] == ("GET" if path == "/v1/models" else "POST")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"n": NaN}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "list", "text", "null", "not UTF-8", "NaN", "deep", "long number"],
)
@pytest.mark.parametrize("path", [CHAT.path, TEXT.path])
def test_a_body_that_is_not_an_object_is_a_400(engine: FakeEngine, enforce: Proxy, path: str, body: bytes) -> None:
    with httpx.Client(base_url=enforce.url, verify=False) as client:
        assert_openai_error(client.post(path, content=body, headers={"content-type": "application/json"}), 400)
    assert engine.bodies == []


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"Infinity", b"NaN"])
def test_a_number_that_json_does_not_have_is_a_400(number: bytes) -> None:
    assert read_call(CHAT, b'{"messages": [], "temperature": 1e30}').fields["temperature"] == 1e30
    with pytest.raises(ApiError, match="not valid JSON"):
        read_call(CHAT, b'{"messages": [], "temperature": ' + number + b"}")


def test_a_body_of_another_type_is_a_415(enforce: Proxy) -> None:
    with httpx.Client(base_url=enforce.url, verify=False) as client:
        assert_openai_error(client.post(CHAT.path, content=b"{}", headers={"content-type": "text/plain"}), 415)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_a_413_before_it_is_whole(engine: FakeEngine, enforce: Proxy, chunked: bool) -> None:
    body = json.dumps(chat_body(padding="x" * 200_000)).encode()
    content: Any = (body[start : start + 10_000] for start in range(0, len(body), 10_000)) if chunked else body
    with httpx.Client(base_url=enforce.url, verify=False) as client:
        answer = client.post(CHAT.path, content=content, headers={"content-type": "application/json"})
    assert_openai_error(answer, 413)
    assert engine.bodies == []


@pytest.mark.parametrize("field", sorted(CHAT_FIELDS.refused))
def test_a_field_that_would_weaken_the_guard_is_refused_by_name(engine: FakeEngine, enforce: Proxy, field: str) -> None:
    error = assert_openai_error(enforce.post(CHAT.path, chat_body(**{field: "true"})), 400)
    assert error["param"] == field
    assert engine.bodies == []
    for harmless in (None, False):
        assert enforce.post(CHAT.path, chat_body(**{field: harmless})).status_code == 200
        assert field not in engine.bodies[-1] or field == "vllm_xargs", "what is let pass is not passed on"


@pytest.mark.parametrize("field", sorted(TEXT_FIELDS.refused))
def test_a_text_completion_has_its_own_refused_fields(engine: FakeEngine, enforce: Proxy, field: str) -> None:
    error = assert_openai_error(enforce.post(TEXT.path, text_body(**{field: {"a": 1}})), 400)
    assert error["param"] == field
    assert engine.bodies == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop_token_ids": [RESERVED]}, "stop_token_ids"),
        ({"stop_token_ids": ["987654321012"]}, "stop_token_ids"),
        ({"stop_token_ids": {"987654321012": 1}}, "stop_token_ids"),
        ({"vllm_xargs": {"undertow_policy": '{"mode":"off"}'}}, "vllm_xargs"),
        ({"vllm_xargs": {"Undertow_anything": 1}}, "vllm_xargs"),
        ({"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs"),
        ({"vllm_xargs": [["undertow_policy", "x"]]}, "vllm_xargs"),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": True}, "stream_options"),
        ({"n": "2"}, "n"),
        ({"n": 2.0}, "n"),
        ({"n": True}, "n"),
        ({"n": 0}, "n"),
        ({"messages": "hello"}, "messages"),
    ],
)
def test_a_field_that_the_guard_reads_must_be_what_it_says(
    engine: FakeEngine, enforce: Proxy, fields: dict[str, Any], param: str
) -> None:
    error = assert_openai_error(enforce.post(CHAT.path, chat_body(**fields)), 400)
    assert error["param"] == param
    assert engine.bodies == []


@pytest.mark.parametrize("prompt", [None, "absent", [], [1, "a"], [[1], "a"], [True], {"a": 1}, 3, [[1, "2"]]])
def test_a_prompt_is_text_or_token_ids(enforce: Proxy, prompt: Any) -> None:
    body = text_body(prompt=prompt)
    if prompt == "absent":
        del body["prompt"]
    assert assert_openai_error(enforce.post(TEXT.path, body), 400)["param"] == "prompt"


def test_a_key_given_twice_means_what_the_engine_will_read(engine: FakeEngine, enforce: Proxy) -> None:
    body = b'{"messages": [], "vllm_xargs": {"undertow_policy": "x"}, "vllm_xargs": null, "seed": 1, "seed": 2}'
    with httpx.Client(base_url=enforce.url, verify=False) as client:
        client.post(CHAT.path, content=body, headers={"content-type": "application/json"})
    assert engine.bodies[-1]["vllm_xargs"] == {"undertow_policy": Policy().to_wire()}
    assert engine.bodies[-1]["seed"] == 2


def test_half_a_surrogate_pair_reaches_the_engine_as_it_came(engine: FakeEngine, enforce: Proxy) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    with httpx.Client(base_url=enforce.url, verify=False) as client:
        client.post(CHAT.path, content=body, headers={"content-type": "application/json"})
    assert engine.bodies[-1]["messages"][0]["content"] == "\ud800"


def test_a_call_with_an_absurd_number_of_choices_costs_nothing_here() -> None:
    call = read_call(TEXT, b'{"prompt": ["a", "b"], "n": 4000000000}', Terms(10**10))
    assert (call.prompts, call.n) == (2, 4_000_000_000)


def test_without_a_handshake_no_reserved_token_is_sent() -> None:
    call = read_call(CHAT, b'{"messages": []}')
    assert "stop_token_ids" not in json.loads(call.upstream_body(Policy(mode="monitor"), None))


def test_whoever_may_be_steered_has_a_cache_of_its_own() -> None:
    """KV that was computed under steering must be found by nobody, whatever salt a client asks for."""
    call = read_call(CHAT, b'{"messages": [], "cache_salt": "shared"}')
    steers = Policy.model_validate({"detections": {"density": {"action": "steer"}}})
    salts = {json.loads(call.upstream_body(steers, 7))["cache_salt"] for _ in range(3)}
    assert len(salts) == 3
    assert "shared" not in salts
    for other in (Policy(), steers.model_copy(update={"mode": "monitor"})):
        assert json.loads(call.upstream_body(other, 7))["cache_salt"] == "shared"


def test_a_client_that_uses_the_reserved_token_is_told_which_field() -> None:
    call = read_call(CHAT, b'{"messages": [], "stop_token_ids": [7]}')
    with pytest.raises(ApiError, match="stop_token_ids"):
        call.upstream_body(Policy(), 7)


@pytest.mark.parametrize("body", [b'{"prompt": ["a", "b"], "n": 33}', b'{"prompt": "a", "n": 65}'])
def test_more_answers_than_the_limit_are_a_bad_request_that_names_it(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        read_call(TEXT, body)
    assert caught.value.status == 400
    assert "64 answers at most" in caught.value.message


def test_who_sends_a_gigabyte_is_cut_off_long_before(engine: FakeEngine, enforce: Proxy) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    part = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", enforce.host.port), timeout=20) as client:
        client.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while sent < 2**30:
                client.sendall(part)
                sent += len(part)
    # What the kernel takes before the end of the connection comes to its sender.
    assert sent < 2**30 / 16
    assert engine.bodies == []
    assert enforce.post("/v1/chat/completions", {"model": "m", "messages": []}).status_code == 200
