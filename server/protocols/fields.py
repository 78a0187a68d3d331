"""Allow-lists of a request's fields, at any depth. Pure.

    MESSAGE = Object({"role": PLAIN, "content": TextOr(Each(PART))}, {"audio": "only text is accepted here"})
    MESSAGE.check(value, "messages[0]")       # ApiError 400 that names `messages[0].audio`

What is not named is refused. What a field holds is the engine's to check, but for its kind: where a list of objects
stands nothing else may, or what is inside would pass unseen.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.errors import ApiError, bad_request

DEEPEST = 64
"""Levels of a value that nobody looks into."""
_NAMED = 12
"""Most names that a message lists."""
_NAME_LIMIT = 64


Schema = dict[str, Any]
"""JSON Schema, draft 2020-12."""


class Shape(typing.Protocol):
    """What one field may hold. Null always may stand there, but not in a list: it is read as a field that is absent."""

    def check(self, value: object, where: str) -> None:
        """Raises ApiError 400 that names the first place, in the field `where`, of what is not allowed."""

    def schema(self) -> Schema:
        """What `check` lets pass; null among it."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Text, a number, true or false."""

    def check(self, value: object, where: str) -> None:
        if isinstance(value, (dict, list)):
            raise wrong(where, "must be text, a number, true or false")

    def schema(self) -> Schema:
        return {"type": ["string", "number", "boolean", "null"]}


@dataclass(frozen=True, slots=True)
class Nothing:
    """Null, or as good as that. For fields of an engine's answer that a client sends back."""

    why: str

    def check(self, value: object, where: str) -> None:
        if value:
            raise refused(where, self.why)

    def schema(self) -> Schema:
        return {"enum": [None, False, 0, "", [], {}], "description": f"Not accepted: {self.why}."}


@dataclass(frozen=True, slots=True)
class Only:
    """One of some values."""

    values: tuple[object, ...]

    def check(self, value: object, where: str) -> None:
        if value is not None and not any(value == each and type(value) is type(each) for each in self.values):
            raise wrong(where, f"must be {' or '.join(map(_written, self.values))} here")

    def schema(self) -> Schema:
        return {"enum": [*self.values, None]}


@dataclass(frozen=True, slots=True)
class Free:
    """Anything, such as a JSON schema, down to so many levels."""

    def check(self, value: object, where: str) -> None:
        level: list[object] = [value]
        for _ in range(DEEPEST):
            level = [inner for each in level for inner in _inside(each)]
            if not level:
                return
        raise wrong(where, f"must not be deeper than {DEEPEST} levels")

    def schema(self) -> Schema:
        return {"description": f"Anything, down to {DEEPEST} levels."}


PLAIN, FREE = Plain(), Free()


@dataclass(frozen=True, slots=True)
class Each:
    """A list, each item of one shape and none of them null."""

    item: Shape

    def check(self, value: object, where: str) -> None:
        if value is None:
            return
        if not isinstance(value, list):
            raise wrong(where, "must be a list")
        for index, item in enumerate(value):
            if item is None:
                raise wrong(f"{where}[{index}]", "must not be null")
            self.item.check(item, f"{where}[{index}]")

    def schema(self) -> Schema:
        return {"type": ["array", "null"], "items": {"allOf": [self.item.schema()], "not": {"type": "null"}}}


@dataclass(frozen=True, slots=True)
class TextOr:
    """Text, or another shape."""

    other: Shape

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, str):
            self.other.check(value, where)

    def schema(self) -> Schema:
        return {"anyOf": [{"type": "string"}, self.other.schema()]}


@dataclass(frozen=True, slots=True)
class Table:
    """An object whose keys are data."""

    item: Shape

    def check(self, value: object, where: str) -> None:
        for key, inner in mapping(value, where).items():
            self.item.check(inner, f"{where}.{short(key)}")

    def schema(self) -> Schema:
        return {"type": ["object", "null"], "additionalProperties": self.item.schema()}


@dataclass(frozen=True, slots=True)
class Object:
    """An object with these fields and no others."""

    fields: Mapping[str, Shape]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Fields that may not be used, and why: said instead of that they are not known."""

    def check(self, value: object, where: str) -> None:
        for key, inner in mapping(value, where).items():
            at = f"{where}.{short(key)}" if where else short(key)
            shape = self.fields.get(key)
            if shape is not None:
                shape.check(inner, at)
            elif key not in self.refused:
                raise unknown(at, self.fields)
            elif inner not in (None, False):
                raise refused(at, self.refused[key])

    def schema(self) -> Schema:
        known = {name: shape.schema() for name, shape in self.fields.items()}
        # Zero is false to Python.
        others = {
            name: {"enum": [None, False, 0], "description": f"Not accepted: {why}."}
            for name, why in self.refused.items()
        }
        return {"type": ["object", "null"], "properties": {**others, **known}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tagged:
    """An object that one of its fields says the kind of."""

    kinds: Mapping[str, Object]
    why: str
    """That no other kind is accepted."""
    tag: str = "type"
    default: str | None = None
    """The kind of an object that does not say it; None: it has to."""

    def check(self, value: object, where: str) -> None:
        if value is None:
            return
        kind = mapping(value, where).get(self.tag) or self.default
        if not isinstance(kind, str) or kind not in self.kinds:
            said = f"must be {' or '.join(map(_written, self.kinds))}: {self.why}"
            raise wrong(f"{where}.{self.tag}", said)
        self.kinds[kind].check(value, where)

    def schema(self) -> Schema:
        return {"anyOf": [{"type": "null"}, *(self._kind(name, shape) for name, shape in self.kinds.items())]}

    def _kind(self, name: str, shape: Object) -> Schema:
        found = shape.schema()
        if name == self.default:
            tag, required = {"enum": [name, None, "", False, 0]}, []
        else:
            tag, required = {"enum": [name]}, [self.tag]
        return {
            **found,
            "type": "object",
            "properties": {**found["properties"], self.tag: tag},
            **({"required": required} if required else {}),
        }


@dataclass(frozen=True, slots=True)
class Allowed:
    """The fields of a whole request."""

    passed: Mapping[str, Shape]
    """They go on to the engine."""
    dropped: Mapping[str, Shape] = field(default_factory=dict)
    """Clients send them, and nothing here or in the engine would heed them."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Those that may not be used, and why. Null and false are let pass, and dropped."""

    @property
    def names(self) -> frozenset[str]:
        """Every field that was thought of."""
        return frozenset(self.passed) | frozenset(self.dropped) | frozenset(self.refused)

    def accept(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What of a request goes on to the engine. Raises ApiError 400 that names the field."""
        self._whole.check(fields, "")
        return {name: value for name, value in fields.items() if name in self.passed}

    def schema(self) -> Schema:
        """Of what `accept` takes."""
        return {**self._whole.schema(), "type": "object"}

    @property
    def _whole(self) -> Object:
        return Object({**self.passed, **self.dropped}, self.refused)


def mapping(value: object, where: str) -> Mapping[str, Any]:
    """An object, empty for null. Raises ApiError 400."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong(where, "must be an object")
    return value


def short(key: str) -> str:
    """A client's key in a message to that client."""
    return key[:_NAME_LIMIT]


def wrong(where: str, expected: str) -> ApiError:
    """400: a value is not what it should be."""
    return bad_request(f"`{where}` {expected}.", where)


def refused(where: str, why: str) -> ApiError:
    """400: a field may not be used."""
    return bad_request(f"`{where}` is not accepted here: {why}.", where)


def unknown(where: str, known: Iterable[str]) -> ApiError:
    """400: nobody knows the field."""
    names = sorted(known)
    expected = f"; expected one of {', '.join(names)}" if len(names) <= _NAMED else ""
    return bad_request(f"`{where}` is not a field that is known here{expected}.", where)


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _written(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"`{value}`"
