"""What every section of the settings is: no unknown key, no change after it was read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A section. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
