"""What `--additional-config '{"undertow": {...}}'` says to a worker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from guard.errors import ConfigError
from guard.policy import Policy

KEY = "undertow"
BASE = ""
"""Stands for the base model where adapters are named."""


class BankFiles(BaseModel):
    """A bank and its calibration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bank: Path
    """The bank file."""
    fingerprint: str
    """The bank's fingerprint. Required, because the compile cache sees this text and not the file's content: a graph
    compiled for other directions must never be found again."""
    calibration: Path | None = None
    """The calibration file. None only while calibrating: such an engine refuses to serve."""


class EngineSettings(BaseModel):
    """The worker's configuration. vLLM hashes it into its compile cache, so a graph is never shared between banks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bank: Path | None = None
    """Of the model that is served, as are the next two; see `BankFiles`. None: a request that uses no adapter cannot be
    scored."""
    fingerprint: str | None = None
    calibration: Path | None = None
    adapters: Mapping[Annotated[str, Field(min_length=1)], BankFiles] = {}
    """Of LoRA adapters, by the names that vLLM serves them under. A request that uses another cannot be scored."""
    reserved_token_id: int | None = None
    """The token that ends a blocked request. None: chosen from the tokenizer, see `stop.choose_reserved_token`."""
    steering: bool = False
    """Whether a policy may steer. Where it may not, the model is not hooked for it."""
    policy: Policy | None = None
    """What judges a request that names no policy. None: block on density at the calibration's target rate."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.bank is None) != (self.fingerprint is None):
            raise ValueError(f"`{'bank' if self.bank is None else 'fingerprint'}` is missing")
        if self.bank is None and self.calibration is not None:
            raise ValueError("`calibration` needs the `bank` that it was made for")
        files = self.files()
        if not files:
            raise ValueError("expected a `bank`, or `adapters` with theirs")
        without = [name or "the base model" for name, each in files.items() if each.calibration is None]
        if 0 < len(without) < len(files):
            raise ValueError(f"no `calibration` for {', '.join(without)}: expected one for every bank, or none")
        return self

    def files(self) -> dict[str, BankFiles]:
        """Every bank, by adapter; BASE for the base model's, which comes first."""
        own = {}
        if self.bank is not None and self.fingerprint is not None:
            own[BASE] = BankFiles(bank=self.bank, fingerprint=self.fingerprint, calibration=self.calibration)
        return own | dict(self.adapters)

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
