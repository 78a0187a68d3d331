"""The key of `content: hash`."""

from __future__ import annotations

from collections.abc import Mapping

from guard.control import read_token
from guard.errors import ConfigError
from server.config.settings import Settings


def hash_key(settings: Settings, environ: Mapping[str, str]) -> bytes | None:
    """The key of `content: hash`. Raises ConfigError where a policy asks for hashes and there is none."""
    variable = settings.incidents.hash_key_env
    key = read_token(environ, variable)
    policies = {"policy": settings.policy} | {f"policies.{name}": each for name, each in settings.policies.items()}
    asking = [f"{name}.content" for name, policy in policies.items() if policy.content == "hash"]
    asking += [
        f"rules.{index}.override.content"
        for index, rule in enumerate(settings.rules)
        if rule.override is not None and rule.override.changes.get("content") == "hash"
    ]
    if key is None and asking:
        raise ConfigError(
            f"`{asking[0]}`: hash needs a key; expected one in {variable} or {variable}_FILE (at least 16 characters)"
        )
    return key
