"""Every way of asking that makes vLLM sample, constrain or end an answer differently."""

from __future__ import annotations

import json
from typing import Any

import httpx

from guard.evidence import POLICY_ARGUMENT
from guard.policy import Policy
from tests.e2e.conftest import MAX_TOKENS, Stack

CHAT = "/v1/chat/completions"
UNGUARDED = {POLICY_ARGUMENT: Policy(mode="off").to_wire()}
RESERVED = 6
"""`<|guard|>` of the organism's tokenizer."""
_TOOL = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": _TOOL}}]

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 7},
    "penalties": {"presence_penalty": 0.5, "repetition_penalty": 1.1},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "stop string": {"stop": ["e"]},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 3},
    "min_tokens": {"min_tokens": 4},
    "repetition detection": {"repetition_detection": {"max_pattern_size": 4, "min_count": 2}},
    "bad words": {"bad_words": ["the"]},
    "choice": {"structured_outputs": {"choice": ["yes", "no"]}},
    "regex": {"structured_outputs": {"regex": "(kite|ball) [a-z]{1,6}"}},
    "grammar": {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}},
    "JSON": {"response_format": {"type": "json_object"}, "max_tokens": 12},
    "JSON schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _TOOL}},
        "max_tokens": 12,
    },
    "choice, ignore_eos": {"structured_outputs": {"choice": ["yes", "no"]}, "ignore_eos": True, "max_tokens": 3},
    "choice, min_tokens": {"structured_outputs": {"choice": ["yes", "no"]}, "min_tokens": 10},
    # What a client would try who knows the reserved token.
    "reserved token, biased": {"logit_bias": {str(RESERVED): 100}},
    "reserved token, allowed": {"allowed_token_ids": [RESERVED, *range(7, 400), 5]},
    "reserved token, no other allowed": {"allowed_token_ids": [RESERVED], "max_tokens": 3},
    "reserved token, spelt by a grammar": {"structured_outputs": {"regex": "<\\|guard\\|>"}},
}


MORE_WAYS: dict[str, dict[str, Any]] = {
    "thinking budget": {"thinking_token_budget": 2},
    "tools, auto": {"tools": _TOOLS},
    "tools, required": {"tools": _TOOLS, "tool_choice": "required", "max_tokens": 12},
    "tools, named": {
        "tools": _TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "max_tokens": 12,
    },
}
"""Which an engine has to be started for; whoever does not ask for tools gets other chunks from one that knows them."""
MORE_ARGUMENTS = (
    *("--enable-auto-tool-choice", "--tool-call-parser", "pythonic"),
    # All that the organism says counts as thinking, until a full stop.
    *("--reasoning-config", '{"reasoning_start_str": "<|assistant|>", "reasoning_end_str": "."}'),
)


def asked(way: str) -> dict[str, Any]:
    """The fields of a chat completion, but for its messages."""
    fields = {**WAYS, **MORE_WAYS}[way]
    return {"temperature": 0, "max_tokens": MAX_TOKENS, "return_token_ids": True, **fields}


def post(url: str, text: str, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    return httpx.post(f"{url}{CHAT}", json=body, timeout=60)


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The choices of a stream's chunks."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line).get("choices", [])]


def ends_as_blocked(stack: Stack, text: str, way: str) -> None:
    """Whole and streamed."""
    for stream in (False, True):
        answer = post(stack.url, text, stream=stream, **asked(way))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_filter"), answer.text


def is_answered_as_by_the_engine_alone(stack: Stack, text: str, way: str) -> list[int]:
    """Whole and streamed, as by the engine that is told nothing of the reserved token and says nothing of what it
    scored; the answer's token ids."""
    answer = post(stack.url, text, **asked(way))
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    alone = post(stack.engine.url, text, vllm_xargs=UNGUARDED, **asked(way)).json()["choices"][0]
    assert without_ids(choice) == without_ids(alone)
    assert choice["finish_reason"] in ("stop", "length", "repetition", "tool_calls")
    streamed = chunks(post(stack.url, text, stream=True, **asked(way)))
    token_ids: list[int] = choice["token_ids"]
    assert [token for part in streamed for token in part.get("token_ids") or ()] == token_ids
    assert streamed[-1]["finish_reason"] == choice["finish_reason"]
    return token_ids


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice, but for the random ids of its tool calls."""
    calls = [{**call, "id": None} for call in choice["message"].get("tool_calls") or ()]
    return {**choice, "message": {**choice["message"], "tool_calls": calls}}
