"""OpenAI's client for Python, of any release. Reads requests from standard input, prints what their user saw."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai


def whole(client: openai.OpenAI, ask: dict[str, Any]) -> dict[str, Any]:
    choice = client.chat.completions.create(**ask).choices[0]
    return {"text": choice.message.content or "", "finish": choice.finish_reason}


def streamed(client: openai.OpenAI, ask: dict[str, Any]) -> dict[str, Any]:
    text, finish = "", None
    for chunk in client.chat.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return {"text": text, "finish": finish}


def seen(way: Any, client: openai.OpenAI, ask: dict[str, Any]) -> dict[str, Any]:
    try:
        return way(client, ask)
    except openai.APIStatusError as error:
        return {"error": type(error).__name__, "status": error.status_code, "code": error.code, "said": error.message}


answers = []
for request in json.load(sys.stdin):
    client = openai.OpenAI(base_url=request["url"] + "/v1", api_key="not-needed")
    messages = [{"role": "user", "content": request["text"]}]
    ask = {"model": request["model"], "messages": messages, "temperature": 0, "max_tokens": 48}
    answers.append([seen(way, client, ask) for way in (whole, streamed)])
json.dump({"version": openai.__version__, "answers": answers}, sys.stdout)
