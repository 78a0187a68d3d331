"""LangChain's chat model for OpenAI's API. Reads requests from standard input, prints what their user saw."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import openai
from langchain_openai import ChatOpenAI


def whole(model: ChatOpenAI, text: str) -> dict[str, Any]:
    message = model.invoke(text)
    return {"text": message.content, "finish": message.response_metadata["finish_reason"]}


def streamed(model: ChatOpenAI, text: str) -> dict[str, Any]:
    said, finish = "", None
    for chunk in model.stream(text):
        said += chunk.content
        finish = chunk.response_metadata.get("finish_reason", finish)
    return {"text": said, "finish": finish}


def seen(way: Any, model: ChatOpenAI, text: str) -> dict[str, Any]:
    try:
        return way(model, text)
    except openai.APIStatusError as error:
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("openai")]
        return {"error": kinds[0], "status": error.status_code, "code": error.code, "said": error.message}


answers = []
for request in json.load(sys.stdin):
    model = ChatOpenAI(
        base_url=request["url"] + "/v1", api_key="not-needed", model=request["model"], temperature=0, max_tokens=48
    )
    answers.append([seen(way, model, request["text"]) for way in (whole, streamed)])
json.dump({"version": version("langchain-openai"), "answers": answers}, sys.stdout)
