"""Endpoints that generate nothing, so that there is nothing to judge. Off, unless the settings name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from server.protocols.accepted import MESSAGE, PLAINS, TOOL
from server.protocols.fields import PLAIN, Allowed, Each, Schema, Shape

UnguardedName = Literal["embeddings", "tokenize", "detokenize"]

_TEMPLATE = "it would run a template of the client's"
_MEDIA = "only text is accepted"


@dataclass(frozen=True, slots=True)
class Unguarded:
    """One of them."""

    name: UnguardedName
    path: str
    """Of the server and of the engine."""
    accepted: Allowed


_PROMPT: Mapping[str, Shape] = {"model": PLAIN, "add_special_tokens": PLAIN}


class _TextOrTokens:
    """Text, a list of texts or token ids, or a list of lists of token ids."""

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, list):
            PLAIN.check(value, where)
            return
        for index, item in enumerate(value):
            (PLAINS if isinstance(item, list) else PLAIN).check(item, f"{where}[{index}]")

    def schema(self) -> Schema:
        return {"anyOf": [PLAIN.schema(), {"type": "array", "items": {"anyOf": [PLAIN.schema(), PLAINS.schema()]}}]}


_TEXT_OR_TOKENS = _TextOrTokens()

UNGUARDED: tuple[Unguarded, ...] = (
    Unguarded(
        "embeddings",
        "/v1/embeddings",
        Allowed(
            passed={
                **_PROMPT,
                # Messages are objects, and no input here.
                "input": _TEXT_OR_TOKENS,
                "encoding_format": PLAIN,
                "dimensions": PLAIN,
                "truncate_prompt_tokens": PLAIN,
                "truncation_side": PLAIN,
                "padding": PLAIN,
                "embed_dtype": PLAIN,
                "endianness": PLAIN,
                "use_activation": PLAIN,
                "cache_salt": PLAIN,
            },
            dropped={"user": PLAIN},
            refused={
                "request_id": "the header `x-request-id` is for that",
                "messages": "give text as `input`",
                "mm_processor_kwargs": _MEDIA,
                "priority": "it decides about other clients' requests too",
            },
        ),
    ),
    Unguarded(
        "tokenize",
        "/tokenize",
        Allowed(
            passed={
                **_PROMPT,
                "prompt": PLAIN,
                "messages": Each(MESSAGE),
                "tools": Each(TOOL),
                "add_generation_prompt": PLAIN,
                "continue_final_message": PLAIN,
                "return_token_strs": PLAIN,
            },
            refused={
                "chat_template": _TEMPLATE,
                "chat_template_kwargs": _TEMPLATE,
                "mm_processor_kwargs": _MEDIA,
                "media_io_kwargs": _MEDIA,
            },
        ),
    ),
    Unguarded("detokenize", "/detokenize", Allowed(passed={"model": PLAIN, "tokens": PLAINS})),
)
