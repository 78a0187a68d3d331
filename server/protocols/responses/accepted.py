"""Which fields of a request for a response are accepted, at any depth."""

from __future__ import annotations

from collections.abc import Mapping

from server.protocols.accepted import PLAINS, SAMPLING, TEXT_ONLY
from server.protocols.fields import FREE, PLAIN, Allowed, Each, Nothing, Object, Only, Shape, Tagged, TextOr

_KEPT = "nothing is kept here between requests; send the whole conversation as `input`"
_MEDIA = "only text is accepted"
_OTHERS = "it decides about other clients' requests too"
_INSIDE = "it shows or changes the engine's insides"
_TOOLS = "only functions that the client runs are offered to the model"

_BREAKPOINT = Object({"mode": PLAIN, "ttl": PLAIN})

_INPUT_TEXT = Object({"type": PLAIN, "text": PLAIN, "prompt_cache_breakpoint": _BREAKPOINT})

_PART = Tagged(
    {
        "input_text": _INPUT_TEXT,
        "output_text": Object({"type": PLAIN, "text": PLAIN, "annotations": FREE, "logprobs": FREE}),
        "refusal": Object({"type": PLAIN, "refusal": PLAIN}),
    },
    TEXT_ONLY,
)

_THOUGHTS = Each(Object({"type": PLAIN, "text": PLAIN}))

_CALL: Mapping[str, Shape] = {
    "type": PLAIN,
    "id": PLAIN,
    "call_id": PLAIN,
    "name": PLAIN,
    "status": PLAIN,
    "async": Only((False,)),
    "caller": Nothing("only the model calls tools here"),
    "namespace": Nothing("tools have no namespaces here"),
}

ITEM = Tagged(
    {
        "message": Object(
            {
                "type": PLAIN,
                "id": PLAIN,
                "role": PLAIN,
                "content": TextOr(Each(_PART)),
                "status": PLAIN,
                "phase": PLAIN,
            }
        ),
        "function_call": Object({**_CALL, "arguments": PLAIN}),
        "function_call_output": Object(
            {**_CALL, "output": TextOr(Each(Tagged({"input_text": _INPUT_TEXT}, TEXT_ONLY)))}
        ),
        "reasoning": Object(
            {
                "type": PLAIN,
                "id": PLAIN,
                "summary": _THOUGHTS,
                "content": _THOUGHTS,
                "encrypted_content": Nothing("nothing here can read it"),
                "status": PLAIN,
            }
        ),
    },
    "nothing is kept, searched, drawn or run here",
    default="message",
)
"""An item of the input."""

_FORMAT = Tagged(
    {
        "text": Object({"type": PLAIN}),
        "json_object": Object({"type": PLAIN}),
        "json_schema": Object({"type": PLAIN, "name": PLAIN, "schema": FREE, "strict": PLAIN, "description": PLAIN}),
    },
    "the engine knows no other format",
)

_SAMPLING = (
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "structured_outputs",
    "temperature",
    "top_k",
    "top_p",
    "watermarking",
)

RESPONSE_FIELDS = Allowed(
    passed={
        **{name: SAMPLING[name] for name in _SAMPLING},
        "model": PLAIN,
        "input": TextOr(Each(ITEM)),
        "instructions": PLAIN,
        "max_output_tokens": PLAIN,
        "parallel_tool_calls": PLAIN,
        "reasoning": Object(
            {"effort": PLAIN, "summary": PLAIN, "generate_summary": PLAIN, "context": PLAIN, "mode": PLAIN}
        ),
        "include_reasoning": PLAIN,
        "stream": PLAIN,
        "text": Object({"format": _FORMAT, "verbosity": PLAIN}),
        "tools": Each(
            Tagged(
                {
                    "function": Object(
                        {
                            "type": PLAIN,
                            "name": PLAIN,
                            "description": PLAIN,
                            "parameters": FREE,
                            "strict": PLAIN,
                            "defer_loading": PLAIN,
                            "allowed_callers": PLAINS,
                            "output_schema": FREE,
                            "async": Only((False,)),
                        }
                    )
                },
                _TOOLS,
            )
        ),
        "tool_choice": TextOr(Tagged({"function": Object({"type": PLAIN, "name": PLAIN})}, _TOOLS)),
        "include": Each(Only(("message.output_text.logprobs", "reasoning.encrypted_content"))),
        "top_logprobs": PLAIN,
        "cache_salt": PLAIN,
        "chat_template_kwargs": FREE,
    },
    dropped={
        "store": Only((False,)),
        "background": Only((False,)),
        "truncation": Only(("disabled",)),
        "max_tool_calls": PLAIN,
        "metadata": FREE,
        "user": PLAIN,
        "service_tier": PLAIN,
        "safety_identifier": PLAIN,
        "prompt_cache_key": PLAIN,
        "prompt_cache_retention": PLAIN,
        "prompt_cache_options": FREE,
        "stream_options": Object({"include_obfuscation": PLAIN}),
    },
    refused={
        **dict.fromkeys(("previous_response_id", "conversation", "prompt", "previous_input_messages"), _KEPT),
        **dict.fromkeys(("background_options", "context_management"), "nothing is kept or run here"),
        **dict.fromkeys(("image", "mm_processor_kwargs", "media_io_kwargs", "mm_payload", "return_mm_kwargs"), _MEDIA),
        **dict.fromkeys(("priority", "session_id"), _OTHERS),
        "access_programs": "the server's settings say what is judged",
        "moderation": "the server's settings say what is judged",
        "request_id": "the header `x-request-id` is for that",
        "enable_response_messages": _INSIDE,
        "kv_transfer_params": "scores do not travel with a transferred cache",
        "ec_transfer_params": "scores do not travel with a transferred cache",
        "vllm_xargs": "it carries the server's policy",
        "chat_template": "it would change which tokens the guard decides at",
    },
)
"""`chat_template_kwargs` is looked into where every chat's is."""
