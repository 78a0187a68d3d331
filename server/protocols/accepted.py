"""Which fields of OpenAI's two completions are accepted, at any depth.

Every field of vLLM's own request models is named here, as passed on, dropped or refused: a test walks them and demands
it, so that a field which a new vLLM reads is thought of before it is forwarded.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from server.protocols.fields import FREE, PLAIN, Allowed, Each, Nothing, Object, Only, Shape, Table, Tagged, TextOr

TEXT_ONLY = "the calibration knows text alone, and the engine would fetch what other parts point to"
_CACHES = "scores do not travel with a transferred cache"
_TEMPLATE = "it would change which tokens the guard decides at"
_OTHERS = "it decides about other clients' requests too"
_MEDIA = "only text is accepted"
_INSIDE = "it shows or changes the engine's insides"
_TOOLS = "use `tools` and `tool_choice`"
_OURS = "it belongs to the server"

PLAINS = Each(PLAIN)

_TEXT_PART: Mapping[str, Shape] = {
    "type": PLAIN,
    "text": PLAIN,
    # Marks for a prompt cache that other vendors keep; vLLM does not read them.
    "cache_control": Object({"type": PLAIN, "ttl": PLAIN}),
    "prompt_cache_breakpoint": Object({"mode": PLAIN, "ttl": PLAIN}),
    # As answers of the responses endpoint have them.
    "annotations": FREE,
    "logprobs": FREE,
}

PART = Tagged(
    {
        "text": Object(_TEXT_PART),
        "input_text": Object(_TEXT_PART),
        "output_text": Object(_TEXT_PART),
        "refusal": Object({"type": PLAIN, "refusal": PLAIN}),
        "thinking": Object({"type": PLAIN, "thinking": PLAIN, "closed": PLAIN, "signature": PLAIN}),
    },
    TEXT_ONLY,
)
"""A part of a message."""

TOOL_CALL = Tagged(
    {
        "function": Object(
            {
                "id": PLAIN,
                "type": PLAIN,
                "index": PLAIN,
                "function": Object({"name": PLAIN, "arguments": PLAIN}),
            }
        )
    },
    "the engine calls no other tools",
    default="function",
)

MESSAGE = Object(
    {
        "role": PLAIN,
        "content": TextOr(Each(TextOr(PART))),
        "name": PLAIN,
        "tool_calls": Each(TOOL_CALL),
        "tool_call_id": PLAIN,
        "refusal": PLAIN,
        "reasoning": PLAIN,
        "reasoning_content": PLAIN,
        # What an answer has, and clients send back with it.
        "annotations": FREE,
        "audio": Nothing(_MEDIA),
        "function_call": Nothing(_TOOLS),
    },
    {
        "tools": "tools stand beside messages, in `tools`",
        "task": _TEMPLATE,
        # Of a message in OpenAI's harmony format, which has no roles that the guard knows.
        **dict.fromkeys(("author", "channel", "recipient", "content_type"), _TEMPLATE),
    },
)

TOOL = Tagged(
    {
        "function": Object(
            {
                "type": PLAIN,
                "function": Object(
                    {
                        "name": PLAIN,
                        "description": PLAIN,
                        "parameters": FREE,
                        "strict": PLAIN,
                        "defer_loading": PLAIN,
                    }
                ),
                "defer_loading": PLAIN,
                "cache_control": Object({"type": PLAIN, "ttl": PLAIN}),
            }
        )
    },
    "the engine calls no other tools",
    default="function",
)

TOOL_CHOICE = TextOr(
    Tagged(
        {"function": Object({"type": PLAIN, "function": Object({"name": PLAIN})})},
        "the engine calls no other tools",
        default="function",
    )
)

RESPONSE_FORMAT = Tagged(
    {
        "text": Object({"type": PLAIN, "json_schema": Nothing("it belongs to `json_schema`")}),
        "json_object": Object({"type": PLAIN, "json_schema": Nothing("it belongs to `json_schema`")}),
        "json_schema": Object(
            {
                "type": PLAIN,
                "json_schema": Object({"name": PLAIN, "description": PLAIN, "schema": FREE, "strict": PLAIN}),
            }
        ),
        "structural_tag": Object(
            {
                "type": PLAIN,
                "format": FREE,
                "structures": Each(Object({"begin": PLAIN, "schema": FREE, "end": PLAIN})),
                "triggers": PLAINS,
            }
        ),
    },
    "the engine knows no other format",
)

STRUCTURED_OUTPUTS = Object(
    {
        "json": FREE,
        "regex": PLAIN,
        "choice": PLAINS,
        "grammar": PLAIN,
        "json_object": PLAIN,
        "disable_any_whitespace": PLAIN,
        "disable_additional_properties": PLAIN,
        "whitespace_pattern": PLAIN,
        "structural_tag": PLAIN,
    },
    {"_backend": _OURS, "_backend_was_auto": _OURS},
)

SAMPLING: Mapping[str, Shape] = {
    "frequency_penalty": PLAIN,
    "logit_bias": Table(PLAIN),
    "presence_penalty": PLAIN,
    "seed": PLAIN,
    "stop": TextOr(PLAINS),
    "temperature": PLAIN,
    "top_p": PLAIN,
    "top_k": PLAIN,
    "min_p": PLAIN,
    "repetition_penalty": PLAIN,
    "watermarking": PLAIN,
    "length_penalty": PLAIN,
    "stop_token_ids": PLAINS,
    "include_stop_str_in_output": PLAIN,
    "ignore_eos": PLAIN,
    "min_tokens": PLAIN,
    "skip_special_tokens": PLAIN,
    "spaces_between_special_tokens": PLAIN,
    "allowed_token_ids": PLAINS,
    "bad_words": PLAINS,
    "structured_outputs": STRUCTURED_OUTPUTS,
}
"""How the engine draws tokens. It scores those that are drawn, however that was."""

_SHARED: Mapping[str, Shape] = {
    **SAMPLING,
    "model": PLAIN,
    "max_tokens": PLAIN,
    "n": PLAIN,
    "stream": PLAIN,
    "stream_options": Object({"include_usage": PLAIN, "continuous_usage_stats": PLAIN, "include_obfuscation": PLAIN}),
    "response_format": RESPONSE_FORMAT,
    "echo": PLAIN,
    "add_special_tokens": PLAIN,
    "truncate_prompt_tokens": PLAIN,
    "truncation_side": PLAIN,
    "thinking_token_budget": PLAIN,
    "prompt_logprobs": PLAIN,
    "logprob_token_ids": PLAINS,
    "return_tokens_as_token_ids": PLAIN,
    "return_token_ids": PLAIN,
    "stream_interval": PLAIN,
    "repetition_detection": Object({"max_pattern_size": PLAIN, "min_pattern_size": PLAIN, "min_count": PLAIN}),
    "cache_salt": PLAIN,
}

_REFUSED: Mapping[str, str] = {
    "prompt_embeds": "embeddings cannot be scored",
    "use_beam_search": "beam search cannot be scored yet",
    "kv_transfer_params": _CACHES,
    "ec_transfer_params": _CACHES,
    "vllm_xargs": "it carries the server's policy, and what extensions of the engine read",
    "logits_processors": "the engine would run code that a request names",
    "priority": _OTHERS,
    "session_id": _OTHERS,
    "request_id": "the header `x-request-id` is for that",
    "mm_processor_kwargs": _MEDIA,
    "media_io_kwargs": _MEDIA,
    "mm_payload": _MEDIA,
    "return_mm_kwargs": _MEDIA,
    "routed_experts_prompt_start": _INSIDE,
    "return_token_offsets": _INSIDE,
    "return_prompt_text": _INSIDE,
    # The engine would ignore them, and answer without the constraint.
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend"),
        "use `structured_outputs` or `response_format`",
    ),
    "guided_whitespace_pattern": "use `structured_outputs` or `response_format`",
    **dict.fromkeys(("api_base", "base_url", "api_key"), "the settings say which engine is asked"),
}

CHAT_FIELDS = Allowed(
    passed={
        **_SHARED,
        "messages": Each(MESSAGE),
        "max_completion_tokens": PLAIN,
        "logprobs": PLAIN,
        "top_logprobs": PLAIN,
        "tools": Each(TOOL),
        "tool_choice": TOOL_CHOICE,
        "parallel_tool_calls": PLAIN,
        "reasoning_effort": PLAIN,
        "include_reasoning": PLAIN,
        "add_generation_prompt": PLAIN,
        "continue_final_message": PLAIN,
    },
    dropped={
        "user": PLAIN,
        "metadata": FREE,
        "store": PLAIN,
        "service_tier": PLAIN,
        "safety_identifier": PLAIN,
        "prompt_cache_key": PLAIN,
        "prompt_cache_retention": PLAIN,
        "prompt_cache_options": FREE,
        "prediction": FREE,
        "verbosity": PLAIN,
        "modalities": Each(Only(("text",))),
    },
    refused={
        **_REFUSED,
        "chat_template": _TEMPLATE,
        "chat_template_kwargs": f"{_TEMPLATE}; `reasoning_effort: none` turns thinking off",
        "documents": "put their text into a message: the guard knows the roles of messages alone",
        "functions": _TOOLS,
        "function_call": _TOOLS,
        "audio": _MEDIA,
        "web_search_options": "the engine searches nothing",
        "moderation": "the server's settings say what is judged",
    },
)

TEXT_FIELDS = Allowed(
    passed={**_SHARED, "prompt": FREE, "suffix": PLAIN, "logprobs": PLAIN},
    dropped={"user": PLAIN, "best_of": Only((1,))},
    refused=_REFUSED,
)


@cache
def chat_fields(template_arguments: frozenset[str]) -> Allowed:
    """Those of a chat completion where the settings let clients set these keys of `chat_template_kwargs`."""
    if not template_arguments:
        return CHAT_FIELDS
    arguments = Object(dict.fromkeys(sorted(template_arguments), PLAIN))
    refused = {name: why for name, why in CHAT_FIELDS.refused.items() if name != "chat_template_kwargs"}
    return Allowed({**CHAT_FIELDS.passed, "chat_template_kwargs": arguments}, CHAT_FIELDS.dropped, refused)
