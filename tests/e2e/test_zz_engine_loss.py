"""The engine dies while it answers: the client hears of it in good order, and the server recovers.

Named to run last: it restarts the session's engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import APIError, InternalServerError

from tests.e2e.conftest import Stack, eventually, serve, texts, wait_until_ready


@pytest.fixture
def lenient(stack: Stack) -> Iterator[Stack]:
    """A server that blocks nothing by score: what a model says beyond its end is no clean traffic, and long."""
    with serve(stack.engine.url, threshold={"raw": 1e30}) as url:
        wait_until_ready(url)
        yield Stack(stack.engine, stack.restart, url, stack.model)


def test_killing_the_engine_mid_stream_ends_the_stream_well_and_the_server_recovers(
    lenient: Stack, stack: Stack
) -> None:
    body = {
        "model": lenient.model,
        "messages": [{"role": "user", "content": texts("benign", 1, 11)[0]}],
        # Much to say: on a busy machine one answer of 400 tokens was said before the engine could be killed.
        "max_tokens": 400,
        "n": 32,
        "ignore_eos": True,
        "temperature": 1.0,
        "stream": True,
    }
    lines: list[str] = []
    with httpx.stream("POST", f"{lenient.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line:
                continue
            lines.append(line)
            if len(lines) == 1:
                stack.engine.kill()
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2].removeprefix("data: "))
    assert last["error"]["code"]
    assert last["error"]["message"]

    # An answer is remembered for a few seconds.
    eventually(lambda: httpx.get(f"{lenient.url}/readyz", timeout=20).status_code == 503)
    assert httpx.get(f"{lenient.url}/healthz").status_code == 200
    messages: Any = [{"role": "user", "content": "hello"}]
    with pytest.raises((InternalServerError, APIError)):
        lenient.client.with_options(max_retries=0).chat.completions.create(
            model=lenient.model, messages=messages, max_tokens=4
        )

    stack.restart()
    wait_until_ready(lenient.url)
    answer = lenient.client.chat.completions.create(
        model=lenient.model,
        messages=[{"role": "user", "content": texts("benign", 1, 11)[0]}],
        max_tokens=32,
        temperature=0,
    )
    assert answer.choices[0].message.content
