"""Settings: one YAML file, then the environment. Unknown keys, duplicate keys and secrets in the file are errors.

settings = load(Path("configs/undertow.yaml"), os.environ)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from server.config.access import AccessSettings
from server.config.admin import AdminSettings
from server.config.document import check, override, read_document
from server.config.endpoints import Endpoints
from server.config.file import read_file
from server.config.incidents import IncidentSettings
from server.config.policies import PolicySettings
from server.config.rules import Name, Rule
from server.config.sections import Limits, Listen, Log, Reloading, Shutdown
from server.config.strict import Strict
from server.config.telemetry import TelemetrySettings
from server.config.upstream import EngineName, UpstreamSettings
from server.config.webhooks import Webhooks

ENVIRONMENT: dict[str, tuple[str, ...]] = {
    "UNDERTOW_LISTEN_HOST": ("listen", "host"),
    "UNDERTOW_LISTEN_PORT": ("listen", "port"),
    "UNDERTOW_ADMIN_HOST": ("admin", "host"),
    "UNDERTOW_ADMIN_PORT": ("admin", "port"),
    "UNDERTOW_UPSTREAM_URL": ("upstream", "url"),
    "UNDERTOW_UPSTREAM_FINGERPRINT": ("upstream", "fingerprint"),
    "UNDERTOW_POLICY_MODE": ("policy", "mode"),
    "UNDERTOW_INCIDENTS_PATH": ("incidents", "path"),
    "UNDERTOW_INCIDENTS_SPOOL": ("incidents", "spool"),
    "UNDERTOW_LOG_LEVEL": ("log", "level"),
}
"""Environment variables that override the file, and the key that each one overrides."""


DEFAULT = "default"
"""The name that rules and metrics give to `policy`."""


class Settings(Strict):
    """Everything that the server can be told."""

    version: Literal[1] = Field(description="Of this file's shape.")
    listen: Listen = Listen()
    admin: AdminSettings = AdminSettings()
    access: AccessSettings = AccessSettings()
    upstream: UpstreamSettings = Field(
        default=UpstreamSettings(), description="The only engine: short for `upstreams` with one of the name `main`."
    )
    upstreams: dict[EngineName, UpstreamSettings] = Field(
        default_factory=dict,
        description="Several engines, by the names that metrics, logs and readiness give them; instead of `upstream`.",
    )
    policy: PolicySettings = Field(
        default=PolicySettings(), description="Of every request that no rule matches; in rules its name is `default`."
    )
    policies: dict[Name, PolicySettings] = Field(
        default_factory=dict, description="Others, by name, for rules. Each stands alone: nothing of `policy` is in it."
    )
    rules: tuple[Rule, ...] = Field(
        default=(),
        description="Which requests are judged by which policy. The most specific rule that matches holds: one with a "
        "tenant, then one with a model (a name before a pattern, a longer pattern before a shorter), then one with an "
        "endpoint. Two that match alike are an error.",
    )
    endpoints: Endpoints = Endpoints()
    limits: Limits = Limits()
    incidents: IncidentSettings = IncidentSettings()
    webhooks: Webhooks = Webhooks()
    shutdown: Shutdown = Shutdown()
    reload: Reloading = Reloading()
    log: Log = Log()
    telemetry: TelemetrySettings = TelemetrySettings()

    @property
    def engines(self) -> dict[str, UpstreamSettings]:
        """Every engine by its name, in the order of the file."""
        return self.upstreams or {"main": self.upstream}

    @property
    def files(self) -> tuple[Path, ...]:
        """Other files that they name, and that are read with them."""
        return () if self.access.keys_file is None else (self.access.keys_file,)

    @model_validator(mode="after")
    def _one_engine_or_several(self) -> Self:
        if self.upstreams and "upstream" in self.model_fields_set:
            raise ValueError(
                "expected one of `upstream` (which UNDERTOW_UPSTREAM_URL and UNDERTOW_UPSTREAM_FINGERPRINT set, too) "
                "and `upstreams`, found both"
            )
        return self

    @model_validator(mode="after")
    def _rules_fit(self) -> Self:
        if DEFAULT in self.policies:
            raise ValueError(f"`policies.{DEFAULT}` is the name of `policy`; expected another name, or `policy` alone")
        for index, rule in enumerate(self.rules):
            if rule.policy not in (DEFAULT, *self.policies):
                known = ", ".join((DEFAULT, *self.policies))
                raise ValueError(f"`rules.{index}.policy` is `{rule.policy}`, expected one of {known}")
            try:
                effective(self, rule)
            except ValidationError as error:
                told = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"`rules.{index}.override` does not fit policy `{rule.policy}`: {told}") from None
            for before, other in enumerate(self.rules[:index]):
                if other.match.ties(rule.match):
                    raise ValueError(
                        f"`rules.{before}` and `rules.{index}` match one request and are equally specific "
                        f"({other.match}; {rule.match}); make one of them more specific, or join them"
                    )
        return self


def effective(settings: Settings, rule: Rule) -> PolicySettings:
    """The policy that a rule asks for, with its changes. Raises ValidationError where they do not go together."""
    policy = settings.policy if rule.policy == DEFAULT else settings.policies[rule.policy]
    return policy if rule.override is None else rule.override.of(policy)


def load(path: Path, environ: Mapping[str, str]) -> Settings:
    """Read `path`, let `environ` override it (see ENVIRONMENT), check it. Raises ConfigError."""
    text, _ = read_file(path)
    return parse(text, str(path), environ)


def parse(text: str, name: str, environ: Mapping[str, str]) -> Settings:
    """What `load` does, given the file's text; `name` stands for the file in messages."""
    document = read_document(text, name)
    overridden = {path: variable for variable, path in ENVIRONMENT.items() if environ.get(variable)}
    for path, variable in overridden.items():
        override(document, path, environ[variable])
    return check(document, Settings, name, overridden)
