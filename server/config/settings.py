"""Settings: one YAML file, then the environment. Unknown keys, duplicate keys and secrets in the file are errors.

settings = load(Path("configs/undertow.yaml"), os.environ)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from guard.errors import ConfigError
from guard.policy import Policy
from server.config.document import check, override, read_document
from server.config.sections import Limits, Listen, Log
from server.config.strict import Strict
from server.config.upstream import UpstreamSettings

ENVIRONMENT: dict[str, tuple[str, ...]] = {
    "UNDERTOW_LISTEN_HOST": ("listen", "host"),
    "UNDERTOW_LISTEN_PORT": ("listen", "port"),
    "UNDERTOW_UPSTREAM_URL": ("upstream", "url"),
    "UNDERTOW_UPSTREAM_FINGERPRINT": ("upstream", "fingerprint"),
    "UNDERTOW_POLICY_MODE": ("policy", "mode"),
    "UNDERTOW_LOG_LEVEL": ("log", "level"),
}
"""Environment variables that override the file, and the key that each one overrides."""


class Settings(Strict):
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
    document = read_document(text, name)
    overridden = {path: variable for variable, path in ENVIRONMENT.items() if environ.get(variable)}
    for path, variable in overridden.items():
        override(document, path, environ[variable])
    return check(document, Settings, name, overridden)
