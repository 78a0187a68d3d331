"""What one request is judged by. The settings give one to every request; nothing of a client's body changes it.

rulings = Rulings(settings)
ruling = rulings.of(Asked("chat_completions", model, tenant))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from guard.policy import Mode, Policy
from guard.verdict import DetectorName
from server.config.policies import REFUSAL, Content, HoldBack, OnBlock, OnError, PolicySettings, Verdict
from server.config.rules import Asked, Rule
from server.config.settings import DEFAULT, Settings, effective
from server.errors import bad_request


@dataclass(frozen=True, slots=True)
class Ruling:
    """The policy in force for one request."""

    policy: Policy
    """What the engine judges by."""
    name: str = DEFAULT
    """Of the policy."""
    why: str = "no rule matches"
    tenant: str | None = None
    """Whose key the request came with; None where no keys are kept."""
    on_error: OnError = "closed"
    on_block: OnBlock = "error"
    refusal: str = REFUSAL
    """What a blocked client reads, with `on_block: completion`."""
    hold_back: HoldBack = "token"
    verdict: Verdict = "headers"
    """Where a client is told of it."""
    content: Content = "off"
    """What of the request's text is kept with an incident."""
    shadow: Mapping[DetectorName, float] = field(default_factory=dict)
    """By detector, a false-positive rate that is tried and decides nothing."""

    @property
    def mode(self) -> Mode:
        return self.policy.mode

    @property
    def told(self) -> str | None:
        """What a blocked client reads in the place of an answer; None where it is told by an error, or by nothing."""
        return self.refusal if self.on_block == "completion" else None

    @property
    def enforcing(self) -> bool:
        """What cannot be judged does not pass."""
        return self.policy.mode == "enforce"


@dataclass(frozen=True, slots=True)
class Considered:
    """One rule, held against a request."""

    place: str
    """In the settings, such as `rules.0`."""
    rule: Rule
    holds: bool
    reason: str
    """Why it does, or does not."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A rule, and the policy that it comes to."""

    place: str
    """In the settings, such as `rules.0`."""
    rule: Rule
    policy: PolicySettings
    """With what the rule changes of it."""

    @property
    def name(self) -> str:
        """Of the policy in the settings."""
        return self.rule.policy


class Rulings:
    """Every policy in force, and which of them a request is judged by. Immutable."""

    def __init__(self, settings: Settings) -> None:
        self._default = settings.policy
        chosen = [
            Placed(f"rules.{index}", rule, effective(settings, rule)) for index, rule in enumerate(settings.rules)
        ]
        # Of those that match, the first is the most specific: equally specific ones match no request together.
        self.rules = sorted(chosen, key=lambda each: each.rule.match.specificity, reverse=True)
        """The most specific first."""
        self.names_models = any(rule.match.model is not None for rule in settings.rules)
        """Some rule looks at the model, so that a request must name one: the engine would take its own."""

    def of(self, asked: Asked) -> Ruling:
        """What a request is judged by."""
        found = self._found(asked)
        if found is None:
            return _ruling(self._default, DEFAULT, "no rule matches", asked.tenant)
        return _ruling(found.policy, found.name, f"{found.place} ({found.rule.match})", asked.tenant)

    def policy(self, asked: Asked) -> PolicySettings:
        """The same as the settings would say it."""
        found = self._found(asked)
        return self._default if found is None else found.policy

    def _found(self, asked: Asked) -> Placed | None:
        return next((each for each in self.rules if each.rule.match.misses(asked) is None), None)

    @property
    def default(self) -> Ruling:
        """What a request is judged by that no rule matches."""
        return _ruling(self._default, DEFAULT, "no rule matches", None)

    def explain(self, asked: Asked) -> list[Considered]:
        """Every rule, held against a request: the one that holds first, then those that lost, then those that miss."""
        told: list[Considered] = []
        missed: list[Considered] = []
        winner: Placed | None = None
        for each in self.rules:
            miss = each.rule.match.misses(asked)
            if miss is not None:
                missed.append(Considered(each.place, each.rule, False, miss))
            elif winner is None:
                winner = each
                told.append(Considered(each.place, each.rule, True, "the most specific rule that matches"))
            else:
                reason = f"matches, but {winner.place} is more specific: {_difference(winner.rule, each.rule)}"
                told.append(Considered(each.place, each.rule, False, reason))
        return told + missed

    def in_force(self) -> dict[str, Policy]:
        """What the engine may be asked to judge by, each under its place in the settings."""
        return {"policy": self._default.judged} | {
            f"policies.{each.name}" if each.rule.override is None else f"{each.place} ({each.name})": each.policy.judged
            for each in self.rules
            if each.name != DEFAULT or each.rule.override is not None
        }


def rule(rulings: Rulings, endpoint: str, model: object, tenant: str | None) -> Ruling:
    """What a request is judged by, as it came. `model`: its field of that name, whatever that is.

    Raises ApiError 400 where it names none and rules look at it: the engine would answer with a model of its own.
    """
    named = model if isinstance(model, str) else ""
    if not named and rulings.names_models:
        raise bad_request("`model` must be named here.", "model")
    return rulings.of(Asked(endpoint, named, tenant))


def _ruling(policy: PolicySettings, name: str, why: str, tenant: str | None) -> Ruling:
    return Ruling(
        policy=policy.judged,
        name=name,
        why=why,
        tenant=tenant,
        on_error=policy.on_error,
        on_block=policy.on_block,
        refusal=policy.refusal,
        hold_back=policy.hold_back,
        verdict=policy.verdict,
        content=policy.content,
        shadow={detector: each.fpr for detector, each in policy.shadow.items()},
    )


_SAYS = {
    "tenant": "it names the tenant",
    "exact_model": "it names the model and not a pattern",
    "model_letters": "its pattern is longer",
    "model": "it names a model",
    "endpoint": "it names the endpoint",
}


def _difference(winner: Rule, loser: Rule) -> str:
    """The first thing that the winner says and the loser does not."""
    ours, theirs = winner.match.specificity, loser.match.specificity
    return next(_SAYS[name] for name, one, two in zip(ours._fields, ours, theirs, strict=True) if one != two)
