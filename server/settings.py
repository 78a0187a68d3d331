"""Settings: one YAML file, then the environment. Unknown keys, duplicate keys and secrets in the file are errors.

settings = load(Path("configs/undertow.yaml"), os.environ)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from guard.errors import ConfigError
from guard.policy import Policy

ENVIRONMENT: dict[str, tuple[str, ...]] = {
    "UNDERTOW_LISTEN_HOST": ("listen", "host"),
    "UNDERTOW_LISTEN_PORT": ("listen", "port"),
    "UNDERTOW_UPSTREAM_URL": ("upstream", "url"),
    "UNDERTOW_UPSTREAM_FINGERPRINT": ("upstream", "fingerprint"),
    "UNDERTOW_POLICY_MODE": ("policy", "mode"),
    "UNDERTOW_LOG_LEVEL": ("log", "level"),
}
"""Environment variables that override the file, and the key that each one overrides."""

LogLevel = Literal["debug", "info", "warning", "error"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(_Strict):
    """Where clients reach the proxy."""

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(default=8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")


class UpstreamSettings(_Strict):
    """The vLLM server that is guarded."""

    url: str = Field(default="http://127.0.0.1:8000", description="Where vLLM listens, without /v1.")
    connect_timeout_s: float = Field(default=2.0, gt=0, description="Seconds to wait for a connection.")
    read_timeout_s: float = Field(
        default=300.0, gt=0, description="Seconds of silence from vLLM, before or inside an answer, that end a request."
    )
    api_key_env: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] | None = Field(
        default=None,
        description="Name of the environment variable that holds vLLM's API key. Where set, that key replaces the "
        "client's Authorization; where null, the client's own is forwarded.",
    )
    fingerprint: str | None = Field(
        default=None,
        min_length=1,
        description="The bank that must be loaded, as `undertow bank inspect` names it. Null accepts any.",
    )

    @field_validator("url")
    @classmethod
    def _plain_http(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            port_is_good = parts.port is None or parts.port > 0
        except ValueError:
            port_is_good = False
        if not port_is_good or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected http://HOST:PORT or https://HOST:PORT")
        if parts.username is not None or parts.password is not None:
            raise ValueError("must not hold credentials; put the key in a variable and name it in `api_key_env`")
        if parts.query or parts.fragment or parts.path not in ("", "/"):
            raise ValueError("expected no path, query or fragment after the port")
        return url.rstrip("/")


class Limits(_Strict):
    """What one client may take."""

    max_body_bytes: int = Field(default=10 * 2**20, gt=0, description="Largest request body in bytes; 413 above.")
    max_sequences: int = Field(
        default=64, gt=0, description="Most answers that one request may ask for: prompts times `n`."
    )
    body_timeout_s: float = Field(
        default=30.0, gt=0, description="Seconds in which a whole body must arrive; 408 after."
    )


class Log(_Strict):
    """JSON lines on stderr."""

    level: LogLevel = Field(default="info", description="Least severe level that is written.")


class Settings(_Strict):
    """Everything that the server can be told."""

    version: Literal[1] = Field(description="Of this file's shape.")
    listen: Listen = Listen()
    upstream: UpstreamSettings = UpstreamSettings()
    policy: Policy = Policy()
    limits: Limits = Limits()
    log: Log = Log()


def load(path: Path, environ: Mapping[str, str]) -> Settings:
    """Read `path`, let `environ` override it (see ENVIRONMENT), check it. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    return parse(text, str(path), environ)


def parse(text: str, name: str, environ: Mapping[str, str]) -> Settings:
    """What `load` does, given the file's text; `name` stands for the file in messages."""
    try:
        document = yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise ConfigError(f"{name}: {where}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: is not YAML") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{name}: expected a mapping of settings, found {_kind(document)}")
    overridden = {path: variable for variable, path in ENVIRONMENT.items() if environ.get(variable)}
    for path, variable in overridden.items():
        _override(document, path, environ[variable])
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise ConfigError("\n".join(_explain(problem, name, overridden) for problem in problems)) from None


def _override(document: dict[str, Any], path: tuple[str, ...], value: str) -> None:
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
    """SafeLoader that refuses a key given twice, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key `{key.value}`", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _explain(problem: ErrorDetails, name: str, overridden: Mapping[tuple[str, ...], str]) -> str:
    """One problem as one line: file or variable, dotted key, value found, what was expected."""
    path = tuple(str(part) for part in problem["loc"] if part != "[key]")
    source = overridden.get(path)
    place = f"{source} (for `{'.'.join(path)}`)" if source else f"{name}: `{'.'.join(path)}`"
    if problem["type"] == "extra_forbidden":
        # Its value is not shown: it may be a secret that somebody wanted to keep here.
        return f"{place}: unknown key; expected one of {', '.join(_known_keys(path[:-1]))}"
    if problem["type"] == "missing":
        return f"{place}: missing; expected {'1' if path == ('version',) else 'a value'}"
    message = problem["msg"].removeprefix("Value error, ")
    message = re.sub(r"^Input should be ", "expected ", message)
    if "[key]" in problem["loc"]:
        return f"{place}: unknown name; {message}"
    return f"{place}: found {_shown(path, problem['input'])}; {message}"


def _known_keys(path: tuple[str, ...]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in path:
        field = model.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return _DEEP_KEYS.get(path[-1], ["(see `undertow config schema`)"])
        model = inner
    return sorted(model.model_fields)


_DEEP_KEYS = {"threshold": ["fpr", "raw"], "density": ["action", "threshold"], "exceedance": ["action", "threshold"]}


def _shown(path: tuple[str, ...], value: object) -> str:
    """A value as a message may show it: short, and nothing that may be a key or a password."""
    if path[-1:] == ("api_key_env",):
        return "something that is not a variable's name (not shown)"
    if path[-1:] == ("url",) and "@" in str(value):
        return "a URL with credentials (not shown)"
    if isinstance(value, (dict, list)):
        return _kind(value)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")
