"""OpenAI's two completion shapes, and the fields of them that belong to the guard.

`read_call` turns a client's body into a `Call`: what is asked for, and how many sequences of evidence must come back.
`Call.upstream_body` is what goes to vLLM: of the client's fields those that `accepted` passes on. Fields that this
module reads are checked strictly, because vLLM reads them leniently: a `stream: "yes"` that vLLM takes for true and we
for false would pass unguarded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import time
from typing import Any, Literal
from uuid import uuid4

from guard.evidence import POLICY_ARGUMENT
from guard.policy import Policy
from server.errors import ApiError, bad_request
from server.protocols.accepted import TEXT_FIELDS, chat_fields
from server.protocols.fields import mapping

EndpointName = Literal["chat_completions", "completions", "responses", "messages"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A guarded endpoint, and which completion of the engine's it comes to."""

    name: EndpointName
    path: str
    engine_path: str
    prompt_field: Literal["messages", "prompt", "input"]
    """The field that a blocked prompt's error names."""
    chat: bool
    """The engine's completion is a chat's."""


CHAT = Endpoint("chat_completions", "/v1/chat/completions", "/v1/chat/completions", "messages", chat=True)
TEXT = Endpoint("completions", "/v1/completions", "/v1/completions", "prompt", chat=False)

_MODEL_NAME_LIMIT = 128


@dataclass(frozen=True, slots=True)
class Terms:
    """What the settings let one request ask for."""

    max_sequences: int = 64
    """Most answers, prompts times `n`. The evidence of each rides in one header of the engine's answer, and headers
    have their limits."""
    template_arguments: frozenset[str] = frozenset()
    """Keys of `chat_template_kwargs` that it may set."""


@dataclass(frozen=True, slots=True)
class Call:
    """What one client asked for."""

    endpoint: Endpoint
    fields: dict[str, Any]
    """What of it goes on to the engine, as it came."""
    stream: bool
    wants_usage: bool
    """The client asked for the usage chunk at the end of a stream."""
    prompts: int
    n: int
    asked: Mapping[str, Any] = field(default_factory=dict)
    """The client's own body, where it speaks otherwise than OpenAI's completions."""

    @property
    def model(self) -> str:
        """The model's name as the client gave it, cut to a length that a log can bear."""
        return str(self.fields.get("model") or "")[:_MODEL_NAME_LIMIT]

    def index(self, prompt_index: int, choice_index: int) -> int:
        """The index that vLLM gives to a sequence's choice in its response."""
        return prompt_index * self.n + choice_index

    def upstream_body(self, policy: Policy, reserved_token_id: int | None) -> bytes:
        """The body for vLLM. `reserved_token_id` is None where no handshake told it (monitor and off only).

        Raises ApiError 400 where the client uses the reserved id itself.
        """
        fields = dict(self.fields)
        stops = list(fields.get("stop_token_ids") or [])
        if reserved_token_id is not None:
            if reserved_token_id in stops:
                raise bad_request(
                    f"Token id {reserved_token_id} in `stop_token_ids` belongs to the server.", "stop_token_ids"
                )
            stops.append(reserved_token_id)
        if stops:
            fields["stop_token_ids"] = stops
        if policy.steers:
            # What is computed under steering must be found by nobody else: vLLM's cache looks for tokens and salt.
            fields["cache_salt"] = uuid4().hex
        fields["vllm_xargs"] = {POLICY_ARGUMENT: policy.to_wire()}
        if self.stream:
            options = dict(fields.get("stream_options") or {})
            if not self.wants_usage:
                # vLLM ignores it without include_usage; set by us, it would put usage into every chunk.
                options.pop("continuous_usage_stats", None)
            fields["stream_options"] = {**options, "include_usage": True}
        return json.dumps(fields, separators=(",", ":")).encode()


def read_call(endpoint: Endpoint, body: bytes, terms: Terms = Terms()) -> Call:
    """Read a client's body. Raises ApiError 400 that names the field."""
    return read_fields(endpoint, parse(body), terms)


def read_fields(endpoint: Endpoint, asked: Mapping[str, Any], terms: Terms) -> Call:
    """The same of a body that is an object already."""
    accepted = chat_fields(terms.template_arguments) if endpoint.chat else TEXT_FIELDS
    fields = accepted.accept(asked)
    stream = _boolean(fields, "stream")
    options = mapping(fields.get("stream_options"), "stream_options")
    stops = fields.get("stop_token_ids")
    if stops is not None and not (isinstance(stops, list) and all(type(stop) is int for stop in stops)):
        raise bad_request("`stop_token_ids` must be a list of integers.", "stop_token_ids")
    n = fields.get("n")
    if n is not None and (type(n) is not int or n < 1):
        raise bad_request("`n` must be an integer of at least 1.", "n")
    if endpoint.chat and not isinstance(fields.get("messages"), list):
        raise bad_request("`messages` must be a list.", "messages")
    prompts = 1 if endpoint.chat else _count_prompts(fields.get("prompt"))
    if prompts * (n or 1) > terms.max_sequences:
        raise bad_request(f"One request may ask for {terms.max_sequences} answers at most (prompts times `n`).", "n")
    return Call(
        endpoint=endpoint,
        fields=fields,
        stream=stream,
        wants_usage=stream and _boolean(options, "include_usage", "stream_options.include_usage"),
        prompts=prompts,
        n=n or 1,
    )


def parse(body: bytes) -> dict[str, Any]:
    """A body as an object. Raises ApiError 400."""
    try:
        fields = json.loads(body, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        raise bad_request("The body is not valid JSON.") from None
    if not isinstance(fields, dict):
        raise bad_request("The body must be a JSON object.")
    return fields


def _finite(number: str) -> float:
    """JSON has no infinity, and a number that is too large for a double is one to Python."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(number)
    return value


def _count_prompts(prompt: object) -> int:
    """How many prompts vLLM reads: a text or a list of token ids is one, a list of either is many."""
    if isinstance(prompt, str):
        return 1
    if not isinstance(prompt, list) or not prompt:
        raise bad_request("`prompt` must be text, a list of texts, or a list of token ids.", "prompt")
    if all(type(part) is int for part in prompt):
        return 1
    if all(isinstance(part, str) for part in prompt):
        return len(prompt)
    if all(isinstance(part, list) and all(type(token) is int for token in part) for part in prompt):
        return len(prompt)
    raise bad_request("`prompt` must be text, a list of texts, or a list of token ids.", "prompt")


def _boolean(fields: Mapping[str, Any], name: str, full_name: str | None = None) -> bool:
    value = fields.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise bad_request(f"`{full_name or name}` must be true or false.", full_name or name)


def new_head(call: Call) -> dict[str, Any]:
    """Id, object, time and model for an answer of which the engine sent nothing."""
    prefix, name = ("chatcmpl", "chat.completion") if call.endpoint.chat else ("cmpl", "text_completion")
    if call.stream and call.endpoint.chat:
        name += ".chunk"
    return {"id": f"{prefix}-{uuid4().hex}", "object": name, "created": int(time()), "model": call.model}


def blocked_choice(endpoint: Endpoint, index: int, role: str = "assistant", told: str | None = None) -> dict[str, Any]:
    """A choice of a full response whose sequence was blocked, built anew so that nothing of the old one stays.

    Its text is dropped whole: text alone does not say where the blocked token begins. `told`: what it says instead.
    """
    choice: dict[str, Any] = {"index": index}
    if endpoint.chat:
        choice["message"] = {"role": role, "content": told, "refusal": None}
    else:
        choice["text"] = told or ""
    return {**choice, "logprobs": None, "finish_reason": "content_filter"}


def blocked_chunk(endpoint: Endpoint, index: int, head: Mapping[str, Any], told: str | None = None) -> bytes:
    """The last event of a blocked choice in a stream. `head` is any chunk of that stream, for its id and model; `told`:
    what the choice says at its end."""
    chunk = {key: head[key] for key in ("id", "object", "created", "model") if key in head}
    choice: dict[str, Any] = {"index": index}
    if endpoint.chat:
        choice["delta"] = {} if told is None else {"role": "assistant", "content": told}
    else:
        choice["text"] = told or ""
    chunk["choices"] = [{**choice, "logprobs": None, "finish_reason": "content_filter"}]
    if "usage" in head:
        chunk["usage"] = head["usage"]
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def method_not_allowed(method: str, allowed: str) -> ApiError:
    """405, with the `Allow` header that HTTP asks for."""
    return ApiError(405, f"{method[:16]} is not allowed here.", code="method_not_allowed", headers={"allow": allowed})


def not_found() -> ApiError:
    """404: an endpoint that is not guarded is not offered."""
    return ApiError(404, "This endpoint does not exist here.", code="not_found")
