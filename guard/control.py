"""How an operator changes what a running engine guards with. Torch-free: commands send it, the engine reads it.

    POST /undertow/reload                       on vLLM's own port, never through the server
    authorization: Bearer TOKEN
    {"fingerprint": "sha256:...", "calibration": "sha256:..."}

The request names digests and no files: the engine reads again those that it was started with, and takes them only where
they are what the request names. Without a token in its environment an engine has no such endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from guard.errors import ConfigError

RELOAD_PATH = "/undertow/reload"
TOKEN_VARIABLE = "UNDERTOW_ADMIN_TOKEN"
TOKEN_FILE_VARIABLE = f"{TOKEN_VARIABLE}_FILE"
SHORTEST_TOKEN = 16

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Wanted(_Wire):
    """What an engine shall guard with."""

    fingerprint: Digest
    """Of the bank."""
    calibration: Digest
    """`Calibration.digest`."""


class Loaded(_Wire):
    """What an engine guards with now."""

    fingerprint: str
    calibration: str
    generation: int
    """1 at the engine's start, one more with every change."""
    changed: bool
    """False where it was what it should be already."""
    workers: int
    prepared_s: float
    """While files were read and checked. Steps wait for as much of it as the slowest worker needs."""
    paused_s: float
    """While no request was computed."""


def admin_token(environ: Mapping[str, str]) -> bytes | None:
    """The secret of whoever may change a running engine; None where none is configured. Raises ConfigError."""
    return read_token(environ, TOKEN_VARIABLE)


def read_token(environ: Mapping[str, str], variable: str) -> bytes | None:
    """A secret from a variable, or from the file that the variable of that name with `_FILE` behind it names; None
    where neither is set.

    Raises:
        ConfigError: both are set, a file cannot be read, or a token is too short. Never with the token.
    """
    file_variable = f"{variable}_FILE"
    text, file = environ.get(variable), environ.get(file_variable)
    if text is not None and file is not None:
        raise ConfigError(f"{variable} and {file_variable} are both set; expected one of them")
    source = variable
    if file is not None:
        source = f"{file_variable}: {file}"
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}: cannot be read: {type(error).__name__}") from None
    if text is None:
        return None
    if len(text) < SHORTEST_TOKEN or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(
            f"{source}: {len(text)} characters; expected at least {SHORTEST_TOKEN} of printable ASCII, without spaces"
        )
    return text.encode()
