"""Which fields of a message request are accepted, at any depth."""

from __future__ import annotations

from collections.abc import Mapping

from server.protocols.accepted import PLAINS, TEXT_ONLY
from server.protocols.fields import FREE, PLAIN, Allowed, Each, Nothing, Object, Shape, Tagged, TextOr

_ENGINES = "it is read by the engine's own endpoint, which is not offered here"
_KEPT = "nothing is kept or run here"
_TOOLS = "only tools that the client runs are offered to the model"

_TOOLSET = Nothing("tools come in no sets here")

_CACHE = Object({"type": PLAIN, "ttl": PLAIN, "scope": PLAIN})
"""A mark for a prompt cache that Anthropic keeps; nothing here reads it."""

TEXT = Object({"type": PLAIN, "text": PLAIN, "cache_control": _CACHE, "citations": FREE})

_TEXTS = TextOr(Each(Tagged({"text": TEXT}, TEXT_ONLY)))

BLOCK = Tagged(
    {
        "text": TEXT,
        "thinking": Object({"type": PLAIN, "thinking": PLAIN, "signature": PLAIN}),
        "redacted_thinking": Object({"type": PLAIN, "data": PLAIN}),
        "tool_use": Object(
            {
                "type": PLAIN,
                "id": PLAIN,
                "name": PLAIN,
                "input": FREE,
                "cache_control": _CACHE,
                "caller": FREE,
                "toolset_name": _TOOLSET,
            }
        ),
        "tool_result": Object(
            {
                "type": PLAIN,
                "tool_use_id": PLAIN,
                "content": _TEXTS,
                "is_error": PLAIN,
                "cache_control": _CACHE,
                "toolset_name": _TOOLSET,
            }
        ),
    },
    TEXT_ONLY,
)

_TOOL = Tagged(
    {
        "custom": Object(
            {
                "type": PLAIN,
                "name": PLAIN,
                "description": PLAIN,
                "input_schema": FREE,
                "strict": PLAIN,
                "cache_control": _CACHE,
                "input_examples": FREE,
                "eager_input_streaming": PLAIN,
                "defer_loading": PLAIN,
                "allowed_callers": PLAINS,
            }
        )
    },
    _TOOLS,
    default="custom",
)

_PARALLEL: Mapping[str, Shape] = {"type": PLAIN, "disable_parallel_tool_use": PLAIN}

MESSAGE_FIELDS = Allowed(
    passed={
        "model": PLAIN,
        "messages": Each(Object({"role": PLAIN, "content": TextOr(Each(BLOCK))})),
        "system": _TEXTS,
        "max_tokens": PLAIN,
        "stop_sequences": PLAINS,
        "stream": PLAIN,
        "temperature": PLAIN,
        "top_k": PLAIN,
        "top_p": PLAIN,
        "tools": Each(_TOOL),
        "tool_choice": Tagged(
            {
                "auto": Object(_PARALLEL),
                "any": Object(_PARALLEL),
                "tool": Object({**_PARALLEL, "name": PLAIN}),
                "none": Object({"type": PLAIN}),
            },
            _TOOLS,
        ),
        "thinking": Tagged(
            {
                "enabled": Object({"type": PLAIN, "budget_tokens": PLAIN, "display": PLAIN}),
                "adaptive": Object({"type": PLAIN, "display": PLAIN}),
                "disabled": Object({"type": PLAIN}),
            },
            "the engine knows no other",
        ),
        "output_config": Object(
            {
                "effort": PLAIN,
                "format": Tagged({"json_schema": Object({"type": PLAIN, "schema": FREE})}, "the engine knows no other"),
            },
            {"task_budget": "the engine knows none"},
        ),
        "chat_template_kwargs": FREE,
        "cache_salt": PLAIN,
        "watermarking": PLAIN,
    },
    dropped={
        "metadata": FREE,
        "service_tier": PLAIN,
        "cache_control": _CACHE,
        "context_management": FREE,
        "diagnostics": FREE,
        "speed": PLAIN,
    },
    refused={
        "container": _KEPT,
        "mcp_servers": _KEPT,
        "inference_geo": "the settings say which engine is asked",
        "workspace_id": _KEPT,
        "user_profile_id": _KEPT,
        "output_format": "use `output_config.format`",
        "mm_payload": _ENGINES,
        "return_mm_kwargs": _ENGINES,
        "kv_transfer_params": "scores do not travel with a transferred cache",
        "ec_transfer_params": "scores do not travel with a transferred cache",
        "vllm_xargs": "it carries the server's policy",
        "chat_template": "it would change which tokens the guard decides at",
    },
)
"""`chat_template_kwargs` is looked into where every chat's is."""
