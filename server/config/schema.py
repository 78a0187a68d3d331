"""The JSON Schema of the settings, for editors: `configs/schema.json`.

undertow config schema > configs/schema.json

What pydantic says of the models, and, below, what their validators say of several keys together. What it cannot say is
whether names fit each other: that a rule's policy exists, that two rules do not tie. `undertow config validate` does.
"""

from __future__ import annotations

import json
from typing import Any, get_args

from guard.verdict import DetectorName
from server.config.settings import DEFAULT, Settings

Schema = dict[str, Any]


def _says(key: str, value: object) -> Schema:
    """A mapping that has this key with this value."""
    return {"required": [key], "properties": {key: {"const": value}}}


def _has(key: str, **properties: object) -> Schema:
    """A mapping that has this key, and not null."""
    return {"required": [key], "properties": {key: {"not": {"type": "null"}, **properties}}}


def _shadowed(detector: DetectorName) -> Schema:
    """A second rate stands beside a live one."""
    live = {"properties": {"threshold": _has("fpr")}}
    # Where nothing is said, density is what is detected.
    named = {} if detector == "density" else {"required": ["detections"]}
    return {
        "if": _has("shadow", required=[detector]),
        "then": {**named, "properties": {"detections": {"required": [detector], "properties": {detector: live}}}},
    }


_POLICY: Schema = {
    "allOf": [
        {"if": {"not": _says("mode", "off")}, "then": {"properties": {"detections": {"minProperties": 1}}}},
        {
            "if": _says("on_error", "open"),
            "then": {
                "required": ["detections"],
                "properties": {"detections": {"additionalProperties": {"properties": {"action": {"const": "flag"}}}}},
            },
        },
        *map(_shadowed, get_args(DetectorName)),
    ]
}

_TOGETHER: dict[str, Schema] = {
    "Threshold": {"oneOf": [_has("fpr"), _has("raw")]},
    "PolicySettings": _POLICY,
    "Match": {"anyOf": [_has("endpoint"), _has("model"), _has("tenant")]},
    "Override": {"minProperties": 1},
    "AccessSettings": {
        "if": {"not": _has("keys_file")},
        "then": {
            "properties": {"tenants": {"maxProperties": 0}, "limits": {"additionalProperties": {"type": "null"}}},
        },
    },
}
"""By section, what its validators add."""

_WHOLE: Schema = {"not": {"required": ["upstream", "upstreams"], "properties": {"upstreams": {"minProperties": 1}}}}


def schema() -> Schema:
    """JSON Schema, draft 2020-12. It refuses more than the loader where YAML's texts are taken for numbers."""
    made = Settings.model_json_schema()
    for name, more in _TOGETHER.items():
        made["$defs"][name] |= more
    _close(made)
    made["properties"]["policies"]["propertyNames"] = {"not": {"const": DEFAULT}}
    made["$defs"]["UpstreamSettings"]["properties"]["url"]["pattern"] = r"^https?://[^/?#@\s]+/?$"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, **_WHOLE, "title": "Undertow's settings"}


def _close(part: object) -> None:
    """A name that does not look as names do is refused: pydantic says so of sections only."""
    if isinstance(part, dict):
        if "patternProperties" in part:
            part.setdefault("additionalProperties", False)
        for inner in part.values():
            _close(inner)
    elif isinstance(part, list):
        for inner in part:
            _close(inner)


def schema_text() -> str:
    """As it lies in `configs/schema.json`."""
    return json.dumps(schema(), indent=1) + "\n"
