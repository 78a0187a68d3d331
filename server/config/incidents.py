"""Where incidents are kept, and for how long."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from server.config.strict import Strict

Variable = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]
"""Name of an environment variable that holds a secret."""


class IncidentSettings(Strict):
    """Flagged, steered and blocked requests, kept for review. What of their text is kept, policies say (`content`)."""

    path: Path | None = Field(
        default=Path("undertow-incidents.db"),
        description="An SQLite file, made where it is not there. Null: incidents are in the log only, unless `url_env` "
        "names a database.",
    )
    url_env: Variable | None = Field(
        default=None,
        description="Name of the environment variable that holds the URL of a PostgreSQL database "
        "(postgresql://USER:PASSWORD@HOST/NAME), for several servers together; with `_FILE` behind it, of one that "
        "names a file with it. In the place of `path`, which must then be null.",
    )
    spool: Path | None = Field(
        default=Path("undertow-incidents.spool"),
        description="A file for what the database cannot take now; written to it when it can. Null: kept in memory.",
    )
    spool_bytes: int = Field(default=64 * 2**20, ge=2**16, description="Largest spool; what comes after is dropped.")
    retention_days: float | None = Field(
        default=30, gt=0, description="Days after which an incident is deleted, labels and all. Null: never."
    )
    max_rows: int | None = Field(
        default=1_000_000, gt=0, description="Most incidents kept; the oldest are deleted first. Null: all."
    )
    hash_key_env: Variable = Field(
        default="UNDERTOW_HASH_KEY",
        description="Name of the environment variable with the key (at least 16 characters) of `content: hash`; with "
        "`_FILE` behind it, of one that names a file with it.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.url_env is not None and self.path is not None:
            raise ValueError("expected one of `path` and `url_env`; set `path: null` beside `url_env`")
        return self
