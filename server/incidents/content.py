"""What of a request's text is kept: nothing, a keyed hash, what is left after redaction, or all. Pure.

Whatever is kept is JSON of `messages` or `prompt` as the engine was asked, which `undertow calibrate` reads.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from server.config.policies import Content
from server.incidents.incident import ContentKind
from server.incidents.redaction import redact

LARGEST = 256 * 1024
"""Bytes of JSON; of more nothing is kept but a hash, where hashes are asked for."""


def kept(fields: Mapping[str, Any], wanted: Content, hash_key: bytes | None) -> tuple[ContentKind, str | None]:
    """`fields`: the body as the engine was asked. `hash_key`: needed for `hash`."""
    if wanted == "off":
        return "off", None
    asked = {name: fields[name] for name in ("messages", "prompt") if name in fields}
    text = json.dumps(asked, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    raw = text.encode("utf-8", "surrogatepass")
    if wanted == "hash":
        assert hash_key is not None, "the settings were checked"
        return "hash", hmac.new(hash_key, raw, hashlib.sha256).hexdigest()
    if len(raw) > LARGEST:
        return "too_large", None
    if wanted == "full":
        return "full", _storable(text)
    return "redacted", _storable(json.dumps(_redacted(asked), ensure_ascii=False, separators=(",", ":")))


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [_redacted(each) for each in value]
    if isinstance(value, dict):
        return {redact(key): _redacted(each) for key, each in value.items()}
    return value


def _storable(text: str) -> str:
    """Without what a database's text cannot hold: half a surrogate pair. A NUL is already escaped by JSON."""
    return text.encode("utf-8", "replace").decode()
