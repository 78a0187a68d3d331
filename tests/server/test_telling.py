"""What a client is told of its verdict: headers of every answer, and, where the policy says so, an object in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from server.app import create_app
from server.config.settings import Settings

from .conftest import Proxy, settings_for
from .fake_engine import FakeEngine, Script
from .hosting import Host, hosted
from .test_server_answers import CHAT, TEXT, chat_body, text_body
from .test_server_failures import eventually
from .test_server_on_block import ENDPOINTS, ask


@pytest.fixture(scope="module")
def keeping(played: tuple[FakeEngine, Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A server that keeps incidents, and says verdicts in answers to chats."""
    folder = tmp_path_factory.mktemp("keeping")
    fields = settings_for(played[1].url).model_dump(exclude_unset=True) | {
        "incidents": {"path": folder / "incidents.db", "spool": folder / "spool"},
        "policies": {"telling": {"verdict": "answer"}},
        "rules": [
            {"match": {"endpoint": endpoint}, "policy": "telling"} for endpoint in ("chat_completions", "completions")
        ],
    }
    with hosted(create_app(Settings.model_validate(fields), {}), "on") as host:
        yield Proxy(host)


def told(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("x-undertow-")}


def kept(proxy: Proxy, identity: str) -> dict[str, Any]:
    """The incident of this id, once it is there."""
    assert eventually(lambda: proxy.admin(f"/incidents/{identity}").status_code == 200)
    found: dict[str, Any] = proxy.admin(f"/incidents/{identity}").json()
    return found


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_allowed_answer_names_its_policy_and_no_incident(
    engine: FakeEngine, enforce: Proxy, endpoint: str, stream: bool
) -> None:
    action = "pending" if stream else "allow"
    expected = {"x-undertow-action": action, "x-undertow-policy": "default", "x-undertow-schema": "1"}
    assert told(ask(enforce, endpoint, stream)) == expected


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("script", "action"), [(Script(blocked={0: 0}), "block"), (Script(flagged=True), "flag")])
def test_a_request_that_is_kept_names_the_incident(
    engine: FakeEngine, keeping: Proxy, endpoint: str, stream: bool, script: Script, action: str
) -> None:
    engine.script = script
    headers = told(ask(keeping, endpoint, stream))
    assert headers["x-undertow-action"] == action
    incident = kept(keeping, headers["x-undertow-incident"])
    assert (incident["action"], incident["policy"]) == (action, headers["x-undertow-policy"])


def test_where_nothing_is_kept_no_incident_is_named(engine: FakeEngine, enforce: Proxy) -> None:
    engine.script = Script(flagged=True)
    assert told(enforce.post(CHAT, chat_body())).keys() == {
        "x-undertow-action",
        "x-undertow-policy",
        "x-undertow-schema",
    }


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body), (TEXT, text_body)])
def test_a_whole_answer_says_it_where_the_policy_does(engine: FakeEngine, keeping: Proxy, path: str, body: Any) -> None:
    engine.script = Script(blocked={0: 3})
    answer = keeping.post(path, body())
    assert answer.json()["undertow"] == {
        "schema": "1",
        "action": "block",
        "policy": "telling",
        "incident": answer.headers["x-undertow-incident"],
    }
    assert answer.json()["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body), (TEXT, text_body)])
def test_the_last_chunk_of_a_stream_says_what_its_headers_could_not(
    engine: FakeEngine, keeping: Proxy, path: str, body: Any
) -> None:
    engine.script = Script(blocked={0: 3})
    answer = keeping.post(path, body(stream=True))
    assert told(answer)["x-undertow-action"] == "pending"
    *others, last, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert done == "[DONE]"
    chunk = json.loads(last)
    assert (chunk["choices"], chunk["undertow"]["action"]) == ([], "block")
    assert chunk["id"] == json.loads(others[1])["id"]
    assert kept(keeping, chunk["undertow"]["incident"])["phase"] == "completion"
    assert not any("undertow" in each for each in others if each.startswith("{"))


def test_openais_client_reads_on_and_finds_it(engine: FakeEngine, keeping: Proxy) -> None:
    messages: Any = [{"role": "user", "content": "a"}]
    client: openai.OpenAI
    with keeping.openai() as client:
        whole = client.chat.completions.create(model="organism", messages=messages)
        *chunks, last = client.chat.completions.create(model="organism", messages=messages, stream=True)
    assert whole.model_extra is not None
    assert whole.model_extra["undertow"]["action"] == "allow"
    assert last.model_extra is not None
    assert last.model_extra["undertow"]["action"] == "allow"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The answer is 42."


@pytest.mark.parametrize("stream", [False, True])
def test_neither_headers_nor_object_say_how_far_it_was(engine: FakeEngine, keeping: Proxy, stream: bool) -> None:
    engine.script = Script(flagged=True)
    answer = keeping.post(CHAT, chat_body(stream=stream))
    said = answer.text + json.dumps(dict(answer.headers))
    assert not any(word in said for word in ("score", "threshold", "layer", "direction", "p_value", "density"))
