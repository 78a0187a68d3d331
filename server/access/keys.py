"""API keys: made, kept as hashes in one file, found again.

    key, record = new_key("lab", "Ada's laptop", expires=None)
    with changed_keys(path) as records:
        records.append(record)
    Keys(read_keys(path)).holder(key, now)        # -> KeyRecord, or KeyRefused

A key is `utk_ID_SECRET`. The id is no secret: it names the key in lists and logs, and finds the one record that the
rest is compared with. The secret has 256 random bits, so nobody can try them all, and its plain SHA-256 says nothing:
see `docs/decisions/`.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, ValidationError

from guard.atomic import write_atomically
from guard.errors import ConfigError
from server.config.rules import Name
from server.config.strict import Strict

_SHAPE = re.compile(r"utk_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NOBODY = "0" * 64

KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class KeyRecord(Strict):
    """What is kept of a key."""

    id: KeyId
    tenant: Name
    label: Annotated[str, Field(max_length=128)] = ""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the whole key."""
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        """Only an active one opens anything."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


class _File(Strict):
    version: Literal[1]
    keys: tuple[KeyRecord, ...]


class KeyRefused(Exception):  # noqa: N818 - an answer, not a fault
    """Why a key opens nothing. The text is for whoever sent it, and never has the key in it."""


def new_key(tenant: str, label: str, created: datetime, expires: datetime | None) -> tuple[str, KeyRecord]:
    """A key, which nobody can be told again, and what is kept of it. Raises ConfigError for a bad tenant or label."""
    identity = secrets.token_hex(6)
    key = f"utk_{identity}_{secrets.token_urlsafe(32)}"
    try:
        record = KeyRecord(
            id=identity, tenant=tenant, label=label, sha256=_digest(key), created=created, expires=expires
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"`{first['loc'][0]}`: found {first['input']!r}; {first['msg']}") from None
    return key, record


class Keys:
    """Every key there is. Immutable."""

    def __init__(self, records: Iterable[KeyRecord]) -> None:
        self._by_id = {record.id: record for record in records}

    @property
    def tenants(self) -> frozenset[str]:
        """That have a key."""
        return frozenset(record.tenant for record in self._by_id.values())

    def holder(self, key: str, now: datetime) -> KeyRecord:
        """Whose key it is. Raises KeyRefused.

        One hash and one comparison, whatever was sent: the time says nothing of how much of a key was right.
        """
        shape = _SHAPE.fullmatch(key)
        record = self._by_id.get(shape[1]) if shape else None
        if not hmac.compare_digest(_digest(key), record.sha256 if record else _NOBODY) or record is None:
            raise KeyRefused("Incorrect API key provided.")
        state = record.state(now)
        if state != "active":
            # Only its holder gets here.
            raise KeyRefused(f"The API key is {state}.")
        return record


def read_keys(path: Path) -> tuple[KeyRecord, ...]:
    """The records of a file. Raises ConfigError that names the file and the key's place, never a hash."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; `undertow keys create` makes one") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    try:
        records = _File.model_validate_json(text).keys
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {f'`{place}`: ' if place else ''}{first['msg']}") from None
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise ConfigError(f"{path}: two keys have the id {record.id}; expected one")
        seen.add(record.id)
    return records


@contextmanager
def changed_keys(path: Path, *, create: bool = False) -> Iterator[list[KeyRecord]]:
    """The records, to change in place; they are written at the end, unless something was raised. One at a time: others
    that change the file wait. Raises ConfigError.

    `create`: a file that is not there has none.
    """
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        # The folder is what is locked: the file itself is replaced.
        fcntl.flock(folder, fcntl.LOCK_EX)
        records = [] if create and not path.exists() else list(read_keys(path))
        yield records
        document = {"version": 1, "keys": [record.model_dump(mode="json", exclude_none=True) for record in records]}
        write_atomically(path, json.dumps(document, indent=1).encode() + b"\n", ConfigError, mode=0o600)
    finally:
        os.close(folder)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
