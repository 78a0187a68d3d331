"""Who may ask, and how much."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from server.config.rules import Name
from server.config.strict import Strict

_Count = Annotated[int, Field(gt=0)]


class Quota(Strict):
    """What one key may take of one server. Null: as much as it likes."""

    requests_per_minute: _Count | None = Field(
        default=None, description="Requests; a minute's worth may come at once. 429 above."
    )
    tokens_per_minute: _Count | None = Field(
        default=None,
        description="Tokens of prompts and answers, charged when an answer is complete. 429 while more than these were "
        "taken; an answer that has begun is not cut off.",
    )
    concurrent_requests: _Count | None = Field(default=None, description="Requests at a time. 429 above.")
    concurrent_streams: _Count | None = Field(default=None, description="Of these, streams. 429 above.")


class AccessSettings(Strict):
    """API keys of clients, and their quotas."""

    keys_file: Path | None = Field(
        default=None,
        description="Written by `undertow keys`; holds hashes, no keys. Null: nobody is asked for a key, and a "
        "client's own `Authorization` goes to the engine.",
    )
    limits: Quota = Field(default=Quota(), description="Of each key.")
    tenants: dict[Name, Quota] = Field(
        default_factory=dict, description="Of each key of a tenant, in the place of `limits`."
    )

    @model_validator(mode="after")
    def _limits_need_keys(self) -> Self:
        if self.keys_file is None and (self.limits != Quota() or self.tenants):
            raise ValueError("limits are kept by key; expected `keys_file`")
        return self

    def quota(self, tenant: str) -> Quota:
        """Of a key of this tenant."""
        return self.tenants.get(tenant, self.limits)
