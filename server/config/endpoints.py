"""What clients may ask for beyond completions, and within them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from server.config.strict import Strict
from server.protocols.unguarded import UnguardedName

_NEVER = ("chat_template", "tokenize")
"""They decide which tokens the guard decides at."""


def _harmless(name: str) -> str:
    if name in _NEVER:
        raise ValueError(f"`{name}` changes which tokens the guard decides at; expected another one")
    return name


TemplateArgument = Annotated[
    str,
    Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$", json_schema_extra={"not": {"enum": list(_NEVER)}}),
    AfterValidator(_harmless),
]


class Endpoints(Strict):
    """What clients may ask for beyond what every client may."""

    unguarded: tuple[UnguardedName, ...] = Field(
        default=(),
        description="Endpoints that generate nothing, and are passed to the engine without being judged: embeddings, "
        "tokenize, detokenize. Counted as `unguarded`.",
    )
    template_arguments: tuple[TemplateArgument, ...] = Field(
        default=(),
        description="Keys of `chat_template_kwargs` that a request may set, to text, a number, true or false: such as "
        "`enable_thinking`. Calibrate with what clients will set.",
    )
