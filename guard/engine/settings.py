"""What `--additional-config '{"undertow": {...}}'` says to a worker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from guard.errors import ConfigError
from guard.policy import Policy

KEY = "undertow"


class EngineSettings(BaseModel):
    """The worker's configuration. vLLM hashes it into its compile cache, so a graph is never shared between banks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bank: Path
    """The bank file."""
    fingerprint: str
    """The bank's fingerprint. Required, because the compile cache sees this text and not the file's content: a graph
    compiled for other directions must never be found again."""
    calibration: Path | None = None
    """The calibration file. None only while calibrating: such an engine refuses to serve."""
    reserved_token_id: int | None = None
    """The token that ends a blocked request. None: chosen from the tokenizer, see `stop.choose_reserved_token`."""
    steering: bool = False
    """Whether a policy may steer. Where it may not, the model is not hooked for it."""
    policy: Policy | None = None
    """What judges a request that names no policy. None: block on density at the calibration's target rate."""

    @classmethod
    def read(cls, additional_config: Mapping[str, Any]) -> EngineSettings:
        """Raises ConfigError, naming the key."""
        if KEY not in additional_config:
            raise ConfigError(
                f"--additional-config has no key `{KEY}`; expected "
                '{"undertow": {"bank": FILE, "fingerprint": "sha256:...", "calibration": FILE}}'
            )
        try:
            return cls.model_validate(additional_config[KEY])
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in (KEY, *first["loc"]))
            raise ConfigError(f"--additional-config: `{where}`: {first['msg']}, found {first['input']!r}") from error
