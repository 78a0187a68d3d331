"""What holds for requests that begin now. It can change while the server runs; a request keeps what it began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from server.access.door import Door
from server.config.rules import is_pattern
from server.config.sections import Limits
from server.config.settings import Settings
from server.incidents.hashing import hash_key
from server.protocols.openai import Terms
from server.ruling import Rulings


@dataclass(frozen=True, slots=True)
class InForce:
    """Everything that a request is held against, all from one state of the settings."""

    settings: Settings
    rulings: Rulings
    terms: Terms
    door: Door
    environ: Mapping[str, str]
    """Where secrets are that the settings name."""
    hash_key: bytes | None
    """Of `content: hash`."""
    models: frozenset[str]
    """That the settings name."""

    @classmethod
    def of(cls, settings: Settings, environ: Mapping[str, str]) -> Self:
        """What these settings say. Raises ConfigError where a file that they name is not right."""
        terms = Terms(settings.limits.max_sequences, frozenset(settings.endpoints.template_arguments))
        return cls(
            settings,
            Rulings(settings),
            terms,
            Door.of(settings.access),
            environ,
            hash_key(settings, environ),
            _models(settings),
        )

    def changed(self, settings: Settings) -> Self:
        """The same from other settings. Raises ConfigError."""
        return type(self).of(settings, self.environ)

    @property
    def limits(self) -> Limits:
        return self.settings.limits


def _models(settings: Settings) -> frozenset[str]:
    listed = {name for engine in settings.engines.values() for name in engine.models or ()}
    ruled = {model for rule in settings.rules if (model := rule.match.model) and not is_pattern(model)}
    return frozenset(listed | ruled)


class Live:
    """What is in force now. Take `now` once per request; it changes whole, between two of them."""

    def __init__(self, now: InForce) -> None:
        self.now = now
