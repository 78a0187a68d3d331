"""By which policy a request would be judged, and why: what operators read. Pure.

explain(InForce.of(settings, environ), Asked("chat_completions", "support-1", "lab"))
"""

from __future__ import annotations

from typing import Any

from guard.errors import ConfigError
from server.config.rules import Asked
from server.in_force import InForce


def explain(force: InForce, asked: Asked) -> dict[str, Any]:
    """A mapping for YAML: what was asked, the policy's name, every rule with its reason, and the policy in effect.

    Raises ConfigError where such a request would be refused, whatever the policy.
    """
    rulings = force.rulings
    if rulings.names_models and not asked.model:
        raise ConfigError("--model: missing; rules look at it, and a request that names none is answered with 400")
    if force.door.locked and asked.tenant is None:
        raise ConfigError("--tenant or --key: missing; clients need a key, and a request without one gets 401")
    ruling = rulings.of(asked)
    return {
        "asked": asked._asdict(),
        "policy": ruling.name,
        "why": ruling.why,
        "rules": [
            {
                "rule": each.place,
                "match": each.rule.match.model_dump(mode="json", exclude_none=True),
                "policy": each.rule.policy,
                "holds": each.holds,
                "reason": each.reason,
            }
            for each in rulings.explain(asked)
        ],
        "effective": rulings.policy(asked).model_dump(mode="json"),
    }
