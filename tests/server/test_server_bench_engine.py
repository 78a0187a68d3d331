"""The engine of `undertow bench server` speaks as the scripted one of these tests, which is held to the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.evidence import POLICY_ARGUMENT, REQUEST_HEADER, STREAM_PREFIX, Evidence
from guard.policy import Policy
from server.benching.engine import BLOCKED, MODEL, PAYLOAD, RESERVED
from server.benching.processes import BenchError, Engine

from .fake_engine import shape_of, shapes
from .test_server_answers import CHAT


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one."""
    with Engine(tmp_path_factory.mktemp("engine")) as engine:
        yield f"http://127.0.0.1:{engine.port}"


def ask(url: str, content: str = "hello", mode: str = "enforce", **fields: Any) -> httpx.Response:
    policy = Policy.model_validate({"mode": mode})
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4,
        "seed": 1000,
        "vllm_xargs": {POLICY_ARGUMENT: policy.to_wire()},
        **fields,
    }
    answer = httpx.post(url + CHAT, json=body, headers={REQUEST_HEADER: "1"}, verify=False)
    assert answer.status_code == 200
    return answer


def streamed(url: str, content: str = "hello", **fields: Any) -> list[str]:
    answer = ask(url, content, stream=True, stream_options={"include_usage": True}, **fields)
    return [line for line in answer.text.splitlines() if line]


def test_its_bodies_and_chunks_have_the_shapes_of_the_real_engine(paced: str) -> None:
    events = [json.loads(line.removeprefix("data: ")) for line in streamed(paced) if line.startswith("data: {")]
    blocked = [
        json.loads(line.removeprefix("data: ")) for line in streamed(paced, BLOCKED) if line.startswith("data: {")
    ]
    found = {
        "status": httpx.get(f"{paced}/undertow/status", verify=False).json(),
        "chat.full": ask(paced).json(),
        "chat.role": events[0],
        "chat.chunk": events[1],
        "chat.finish": events[-2],
        "chat.usage": events[-1],
        "chat.blocked_finish": blocked[-2],
    }
    known = shapes()
    assert {name: shape_of(body) for name, body in found.items()} == {name: known[name] for name in found}
    assert {name for name in known if not name.startswith("completions.")} == found.keys()


def test_a_stream_of_it_carries_evidence_first_before_the_end_and_last(paced: str) -> None:
    lines = streamed(paced)
    places = [index for index, line in enumerate(lines) if line.startswith(STREAM_PREFIX)]
    assert (places[0], places[-1], lines[-1]) == (0, len(lines) - 2, "data: [DONE]")
    assert '"finish_reason":"length"' in lines[places[1] + 1]
    (first,) = Evidence.from_json(lines[0].removeprefix(STREAM_PREFIX)).records
    (last,) = Evidence.from_json(lines[-2].removeprefix(STREAM_PREFIX)).records
    assert (first.tokens_scored, last.tokens_scored) == (first.prompt_tokens, last.prompt_tokens + 3)
    assert first.action == last.action == "allow"


def test_a_whole_answer_of_it_carries_evidence_that_covers_it(paced: str) -> None:
    answer = ask(paced)
    (record,) = Evidence.from_json(answer.headers[REQUEST_HEADER]).records
    usage = answer.json()["usage"]
    assert record.tokens_scored == usage["prompt_tokens"] + usage["completion_tokens"] - 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_it_blocks_it_blocks_where_the_policy_enforces(paced: str, stream: bool) -> None:
    answer = ask(paced, BLOCKED, stream=stream)
    assert PAYLOAD in answer.text
    assert f'"stop_reason":{RESERVED}' in answer.text
    assert '"action":"block"' in (answer.text if stream else answer.headers[REQUEST_HEADER]).replace(" ", "")
    let_pass = ask(paced, BLOCKED, mode="monitor", stream=stream)
    assert PAYLOAD not in let_pass.text


def test_tokens_are_numbered_and_as_far_apart_as_was_asked_for(paced: str) -> None:
    lines = streamed(paced, max_tokens=5, seed=20_000)
    texts = [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines if '"content":"' in line][1:]
    numbers, sent, received = zip(*(map(int, text.split(":")) for text in texts), strict=True)
    assert numbers == (0, 1, 2, 3, 4)
    assert len(set(received)) == 1
    assert sent[-1] - received[0] >= 5 * 20_000_000 - 1_000_000


def test_who_asks_for_no_evidence_gets_none(paced: str) -> None:
    body = {"messages": [{"content": "hello"}], "max_tokens": 2}
    whole = httpx.post(paced + CHAT, json=body, verify=False)
    stream = httpx.post(paced + CHAT, json={**body, "stream": True}, verify=False)
    assert REQUEST_HEADER not in whole.headers
    assert STREAM_PREFIX not in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")


def test_a_port_that_is_taken_is_said(paced: str, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"engine ended with code 1(.|\n)*address already in use"):
        Engine(tmp_path, httpx.URL(paced).port or 0)


def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    with Engine(tmp_path) as engine:
        assert engine.process.stdin is not None
        engine.process.stdin.close()
        assert engine.process.wait(5) == 0
