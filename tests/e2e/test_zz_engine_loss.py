"""The engine dies while it answers: the client hears of it in good order, and the server recovers.

Named to run last: it restarts the session's engine.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import APIError, InternalServerError

from tests.e2e.conftest import Stack, texts, wait_until_ready


def test_killing_the_engine_mid_stream_ends_the_stream_well_and_the_server_recovers(stack: Stack) -> None:
    body = {
        "model": stack.model,
        "messages": [{"role": "user", "content": texts("benign", 1, 11)[0]}],
        "max_tokens": 400,
        "ignore_eos": True,
        "temperature": 1.0,
        "stream": True,
    }
    lines: list[str] = []
    with httpx.stream("POST", f"{stack.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line:
                lines.append(line)
            if len(lines) == 3:
                stack.engine.kill()
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2].removeprefix("data: "))
    assert last["error"]["code"]
    assert last["error"]["message"]

    assert httpx.get(f"{stack.url}/readyz", timeout=20).status_code == 503
    assert httpx.get(f"{stack.url}/healthz").status_code == 200
    messages: Any = [{"role": "user", "content": "hello"}]
    with pytest.raises((InternalServerError, APIError)):
        stack.client.with_options(max_retries=0).chat.completions.create(
            model=stack.model, messages=messages, max_tokens=4
        )

    stack.restart()
    wait_until_ready(stack.url)
    answer = stack.client.chat.completions.create(
        model=stack.model,
        messages=[{"role": "user", "content": texts("benign", 1, 11)[0]}],
        max_tokens=32,
        temperature=0,
    )
    assert answer.choices[0].message.content
