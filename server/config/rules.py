"""Which requests are judged by which policy. Pure.

Of the rules that match a request the most specific one holds. What counts, in this order: it names the tenant; it names
the model, a name before a pattern, a longer pattern before a shorter one; it names the endpoint. Two rules that could
match one request and are equally specific are an error in the file, so the order of the rules never matters.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Annotated, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from server.config.policies import Override
from server.config.strict import Strict
from server.telemetry.metrics import GUARDED

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
"""Of a policy or a tenant: it becomes a label and a header, so it is short and plain."""


def _guarded(endpoint: str) -> str:
    if endpoint not in GUARDED:
        raise ValueError(f"expected one of {', '.join(GUARDED)}")
    return endpoint


EndpointField = Annotated[str, AfterValidator(_guarded), Field(json_schema_extra={"enum": list(GUARDED)})]
"""An endpoint whose requests are judged, as metrics name it."""


class Asked(NamedTuple):
    """What rules look at in a request."""

    endpoint: str
    model: str
    """As the client names it; empty where it does not."""
    tenant: str | None
    """Whose key it came with; None where no keys are kept."""


class Specificity(NamedTuple):
    """How much a rule says of the requests it is for. Larger wins."""

    tenant: bool
    exact_model: bool
    model_letters: int
    """That a pattern fixes."""
    model: bool
    endpoint: bool


class Match(Strict):
    """Which requests a rule is for: those with all of what is named."""

    endpoint: EndpointField | None = Field(default=None, description="As in metrics, such as chat_completions.")
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None,
        description="A model's name as requests give it, or a pattern: `*` stands for any text, `?` for one character. "
        "A LoRA adapter is named as a model.",
    )
    tenant: Name | None = Field(default=None, description="Of the API key; see `keys`.")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.endpoint is None and self.model is None and self.tenant is None:
            raise ValueError("matches everything, which `policy` is for; expected endpoint, model or tenant")
        return self

    def misses(self, asked: Asked) -> str | None:
        """The first thing that does not fit; None where all does."""
        if self.tenant is not None and self.tenant != asked.tenant:
            return f"tenant is {asked.tenant or 'not known'}, not {self.tenant}"
        if self.model is not None and not fits(self.model, asked.model):
            return f"model is {asked.model or 'not named'}, not {self.model}"
        if self.endpoint is not None and self.endpoint != asked.endpoint:
            return f"endpoint is {asked.endpoint}, not {self.endpoint}"
        return None

    @property
    def specificity(self) -> Specificity:
        exact = self.model is not None and not is_pattern(self.model)
        letters = len(re.sub(r"[*?]", "", self.model or ""))
        return Specificity(
            self.tenant is not None, exact, 0 if exact else letters, self.model is not None, self.endpoint is not None
        )

    def ties(self, other: Match) -> bool:
        """Whether one request could match both, and neither is more specific."""
        if self.specificity != other.specificity or self.tenant != other.tenant or self.endpoint != other.endpoint:
            return False  # Equally specific rules name the same things; where one differs, no request has both.
        return self.model == other.model or (
            self.model is not None and other.model is not None and overlap(self.model, other.model)
        )

    def __str__(self) -> str:
        named = {"tenant": self.tenant, "model": self.model, "endpoint": self.endpoint}
        return ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)


class Rule(Strict):
    """Requests that match are judged by this policy."""

    match: Match
    policy: Name = Field(default="default", description="A name in `policies`, or `default` for `policy`.")
    override: Override | None = Field(default=None, description="What is different for these requests.")


def is_pattern(model: str) -> bool:
    """Whether it stands for more than one name."""
    return "*" in model or "?" in model


def fits(pattern: str, name: str) -> bool:
    """Whether a name is one that the pattern stands for. A bracket is a bracket."""
    return fnmatchcase(name, pattern.replace("[", "[[]"))


def overlap(one: str, other: str) -> bool:
    """Whether some name fits both patterns."""
    # Places in both patterns that one name can have reached: each step takes a letter of both, or all that a `*` takes.
    reached, todo = {(0, 0)}, [(0, 0)]
    while todo:
        i, j = todo.pop()
        here, there = one[i : i + 1], other[j : j + 1]
        steps = set()
        if "*" in (here, there):
            steps = {(i + 1, j)} if here else set()
            steps |= {(i, j + 1)} if there else set()
        elif here and there and (here == there or "?" in (here, there)):
            steps = {(i + 1, j + 1)}
        todo += steps - reached
        reached |= steps
    return (len(one), len(other)) in reached
