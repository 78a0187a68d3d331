"""A YAML text and the environment -> a checked model, and one line for each thing that is wrong with it.

read_document(text, "undertow.yaml") -> mapping;  check(document, Settings, name, variables) -> Settings
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from guard.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def read_document(text: str, name: str) -> dict[str, Any]:
    """A YAML mapping; `name` stands for the file in messages. Raises ConfigError."""
    try:
        document = yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise ConfigError(f"{name}: {where}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: is not YAML") from error
    except RecursionError:
        raise ConfigError(f"{name}: is nested too deep") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{name}: expected a mapping of settings, found {_kind(document)}")
    return document


def check(document: dict[str, Any], model: type[M], name: str, overridden: Mapping[tuple[str, ...], str]) -> M:
    """The document as a model. `overridden`: the variable that each overridden key came from. Raises ConfigError."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise ConfigError("\n".join(_explain(problem, model, name, overridden) for problem in problems)) from None


def override(document: dict[str, Any], path: tuple[str, ...], value: str) -> None:
    """Put `value` at a dotted place of the document, in place."""
    section = document
    for key in path[:-1]:
        inner = section.get(key)
        if inner is None:
            inner = section[key] = {}
        if not isinstance(inner, dict):
            return  # The file is wrong here; validation says so better.
        section = inner
    section[path[-1]] = value


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which PyYAML silently takes the last, and reads `off` as a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key `{key.value}`", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.2: only true and false are truth values. In 1.1, which PyYAML reads, `mode: off` would be one.
_StrictLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _explain(problem: ErrorDetails, root: type[BaseModel], name: str, overridden: Mapping[tuple[str, ...], str]) -> str:
    """One problem as one line: file or variable, dotted key, value found, what was expected."""
    path = tuple(str(part) for part in problem["loc"] if part != "[key]")
    source = overridden.get(path)
    place = f"{source} (for `{'.'.join(path)}`)" if source else f"{name}: `{'.'.join(path)}`"
    if not path:
        return f"{name}: {problem['msg'].removeprefix('Value error, ')}"
    if problem["type"] == "extra_forbidden":
        # Its value is not shown: it may be a secret that somebody wanted to keep here.
        known = _known_keys(root, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        meant = f"did you mean `{near[0]}`? " if near else ""
        return f"{place}: unknown key; {meant}expected one of {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{place}: missing; expected {'1' if path == ('version',) else 'a value'}"
    message = problem["msg"].removeprefix("Value error, ")
    message = re.sub(r"^Input should be ", "expected ", message)
    if "[key]" in problem["loc"]:
        return f"{place}: unknown name; {message}"
    return f"{place}: found {shown(path, problem['input'])}; {message}"


def _known_keys(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The keys that may stand at a place: fields of sections, also inside of lists and of mappings with free names."""
    kinds: list[Any] = [model]
    for part in path:
        kinds = [inner for kind in kinds for inner in _inside(kind, part)]
    return sorted({key for kind in kinds if _is_section(kind) for key in kind.model_fields})


def _inside(kind: Any, key: str) -> Iterable[Any]:
    """The types that stand under a key of a type."""
    if _is_section(kind):
        inner = kind.model_fields[key].annotation if key in kind.model_fields else None
    else:
        inner = next((each for each in reversed(get_args(kind)) if each is not Ellipsis), None)
    return _alternatives(inner)


def _alternatives(kind: Any) -> Iterable[Any]:
    origin = get_origin(kind)
    if origin is Annotated:
        return _alternatives(get_args(kind)[0])
    if origin in (Union, UnionType):
        return [inner for each in get_args(kind) for inner in _alternatives(each)]
    return [kind]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def shown(path: tuple[str, ...], value: object) -> str:
    """A value as a message may show it: short, and nothing that may be a key or a password."""
    if path[-1:] == ("api_key_env",):
        return "something that is not a variable's name (not shown)"
    if "@" in str(value) and (path[-1:] == ("url",) or "://" in str(value)):
        return "a URL with credentials (not shown)"
    if isinstance(value, (dict, list)):
        return _kind(value)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")
