"""Endpoints that generate nothing: off, or passed and counted as unguarded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.embedding_create_params import EmbeddingCreateParams

from server.app import create_app
from server.config.endpoints import Endpoints
from server.errors import ApiError
from server.protocols.unguarded import UNGUARDED

from .conftest import KEY, Proxy, settings_for
from .fake_engine import FakeEngine, Script
from .hosting import Host, hosted
from .test_server_fields import engines_model
from .test_server_keys import make_key, served
from .test_server_requests import assert_openai_error

PATHS = {endpoint.name: endpoint.path for endpoint in UNGUARDED}
BODIES: dict[str, dict[str, Any]] = {
    "embeddings": {"model": "organism", "input": ["a", "b"]},
    "tokenize": {"messages": [{"role": "user", "content": "a"}]},
    "detokenize": {"tokens": [1, 2]},
}


@pytest.fixture(scope="module")
def opened(played: tuple[FakeEngine, Host]) -> Iterator[Proxy]:
    settings = settings_for(played[1].url)
    endpoints = Endpoints(unguarded=("embeddings", "tokenize", "detokenize"))
    with hosted(create_app(settings.model_copy(update={"endpoints": endpoints})), "on") as host:
        yield Proxy(host)


@pytest.mark.parametrize("name", PATHS)
def test_they_are_off_until_the_settings_name_them(engine: FakeEngine, enforce: Proxy, name: str) -> None:
    assert_openai_error(enforce.post(PATHS[name], BODIES[name]), 404)
    assert_openai_error(enforce.get(PATHS[name]), 404)
    assert engine.bodies == []


@pytest.mark.parametrize("name", PATHS)
def test_they_pass_to_their_own_path_and_are_counted_as_unguarded(engine: FakeEngine, opened: Proxy, name: str) -> None:
    before = opened.sample("undertow_requests_total", endpoint=name, outcome="unguarded")
    answer = opened.post(PATHS[name], BODIES[name], {"x-request-id": "mine-1"})
    assert (answer.status_code, answer.json()) == (200, {"path": PATHS[name]})
    assert engine.bodies == [BODIES[name]]
    assert engine.headers[-1]["authorization"] == f"Bearer {KEY}"
    assert answer.headers["x-request-id"] == engine.headers[-1]["x-request-id"] == "mine-1"
    assert opened.sample("undertow_requests_total", endpoint=name, outcome="unguarded") == before + 1


def test_openais_client_gets_its_embeddings_from_there(engine: FakeEngine, opened: Proxy) -> None:
    with opened.openai() as client, pytest.raises(ValueError, match="No embedding data"):
        client.embeddings.create(model="organism", input="a")  # the fake has none to give
    assert engine.bodies[-1]["input"] == "a"


@pytest.mark.parametrize("name", PATHS)
def test_a_wrong_method_is_a_405(opened: Proxy, name: str) -> None:
    with httpx.Client(base_url=opened.url, verify=False) as client:
        answer = client.get(PATHS[name])
    assert_openai_error(answer, 405)
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("name", "fields", "param"),
    [
        ("tokenize", {"chat_template": "{{ x }}"}, "chat_template"),
        ("tokenize", {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        (
            "tokenize",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://10/"}]}]},
            "messages[0].content[0].type",
        ),
        ("embeddings", {"messages": []}, "messages"),
        ("embeddings", {"input": [{"role": "user", "content": []}]}, "input[0]"),
        ("embeddings", {"input": [[{"url": "http://10/"}]]}, "input[0][0]"),
        ("embeddings", {"api_base": "http://evil/"}, "api_base"),
        ("detokenize", {"prompt": "a"}, "prompt"),
    ],
)
def test_their_fields_are_on_allow_lists_too(
    engine: FakeEngine, opened: Proxy, name: str, fields: dict[str, Any], param: str
) -> None:
    error = assert_openai_error(opened.post(PATHS[name], {**BODIES[name], **fields}), 400)
    assert error["param"] == param
    assert engine.bodies == []


@pytest.mark.parametrize(
    ("script", "status", "outcome"),
    [(Script(status=400), 400, "upstream_rejected"), (Script(status=500), 500, "upstream_error")],
)
def test_what_the_engine_answers_is_the_answer(
    engine: FakeEngine, opened: Proxy, script: Script, status: int, outcome: str
) -> None:
    engine.script = script
    before = opened.sample("undertow_requests_total", endpoint="tokenize", outcome=outcome)
    assert opened.post("/tokenize", BODIES["tokenize"]).status_code == status
    assert opened.sample("undertow_requests_total", endpoint="tokenize", outcome=outcome) == before + 1


def test_a_silent_engine_is_a_504_and_a_dead_one_a_503(engine: FakeEngine, opened: Proxy) -> None:
    engine.script = Script(delay_s=6)
    assert_openai_error(opened.post("/tokenize", BODIES["tokenize"]), 504)
    update = {"endpoints": Endpoints(unguarded=("tokenize",))}
    with hosted(create_app(settings_for("http://127.0.0.1:9").model_copy(update=update)), "on") as host:
        assert_openai_error(Proxy(host).post("/tokenize", BODIES["tokenize"]), 503)


def test_a_client_that_leaves_is_counted_as_gone(engine: FakeEngine, opened: Proxy) -> None:
    engine.script = Script(delay_s=1)
    before = opened.sample("undertow_requests_total", endpoint="tokenize", outcome="client_gone")
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=opened.url, timeout=0.2, verify=False) as client:
        client.post("/tokenize", json=BODIES["tokenize"])
    for _ in range(50):
        if opened.sample("undertow_requests_total", endpoint="tokenize", outcome="client_gone") == before + 1:
            return
    pytest.fail("nobody noticed")


def test_keys_and_quotas_hold_there_too(
    engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    key = make_key(file, "shop", capsys)
    access = {"keys_file": file, "tenants": {"shop": {"requests_per_minute": 1}}}
    with served(settings_for(played[1].url), access=access, endpoints={"unguarded": ["tokenize"]}) as proxy:
        assert_openai_error(proxy.post("/tokenize", BODIES["tokenize"], {"authorization": "Bearer utk_no"}), 401)
        assert engine.bodies == []
        assert proxy.post("/tokenize", BODIES["tokenize"], {"authorization": f"Bearer {key}"}).status_code == 200
        assert "authorization" not in engine.headers[-1]
        assert_openai_error(proxy.post("/tokenize", BODIES["tokenize"], {"authorization": f"Bearer {key}"}), 429)
        for outcome in ("unauthorized", "unguarded", "rate_limited"):
            assert proxy.sample("undertow_requests_total", endpoint="tokenize", outcome=outcome) == 1


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff"])
def test_a_body_that_is_not_an_object_is_a_400(opened: Proxy, body: bytes) -> None:
    with httpx.Client(base_url=opened.url, verify=False) as client:
        assert_openai_error(client.post("/tokenize", content=body, headers={"content-type": "application/json"}), 400)


def test_every_field_that_vllm_and_openais_client_know_was_decided() -> None:
    accepted = {endpoint.name: endpoint.accepted for endpoint in UNGUARDED}
    assert set(EmbeddingCreateParams.__annotations__) - accepted["embeddings"].names == set()
    for name, models in (
        ("tokenize", ("TokenizeCompletionRequest", "TokenizeChatRequest")),
        ("detokenize", ("DetokenizeRequest",)),
    ):
        for model in models:
            fields = engines_model("serve.tokenize.protocol", model).model_fields
            assert set(fields) - accepted[name].names == set()
    text = engines_model("pooling.embed.protocol", "EmbeddingCompletionRequest").model_fields
    assert set(text) - accepted["embeddings"].names == set()


def test_nothing_that_generates_is_among_them() -> None:
    assert not any("completions" in path or "generate" in path for path in PATHS.values())
    with pytest.raises(ValueError, match="unguarded"):
        Endpoints.model_validate({"unguarded": ["chat_completions"]})
    with pytest.raises(ApiError):
        UNGUARDED[0].accepted.accept({"prompt": "a"})
