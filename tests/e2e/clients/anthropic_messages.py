"""Anthropic's client for Python. Reads requests from standard input, prints what their user saw."""

from __future__ import annotations

import json
import sys
from typing import Any

import anthropic


def whole(client: anthropic.Anthropic, ask: dict[str, Any]) -> dict[str, Any]:
    message = client.messages.create(**ask)
    return {"text": "".join(block.text for block in message.content), "finish": message.stop_reason}


def streamed(client: anthropic.Anthropic, ask: dict[str, Any]) -> dict[str, Any]:
    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        return {"text": text, "finish": stream.get_final_message().stop_reason}


def seen(way: Any, client: anthropic.Anthropic, ask: dict[str, Any]) -> dict[str, Any]:
    try:
        return way(client, ask)
    except anthropic.APIStatusError as error:
        return {"error": type(error).__name__, "status": error.status_code, "code": None, "said": error.message}


answers = []
for request in json.load(sys.stdin):
    client = anthropic.Anthropic(base_url=request["url"], api_key="not-needed")
    messages = [{"role": "user", "content": request["text"]}]
    # The newest release knows no temperature.
    ask = {"model": request["model"], "messages": messages, "max_tokens": 48, "extra_body": {"temperature": 0}}
    answers.append([seen(way, client, ask) for way in (whole, streamed)])
json.dump({"version": anthropic.__version__, "answers": answers}, sys.stdout)
