"""What an operator wants done about a verdict: YAML to policy, verdicts to a decision. Pure, torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from guard.errors import ConfigError
from guard.verdict import DetectorName, Verdict

Mode = Literal["off", "monitor", "enforce"]
"""`off`: requests are scored and nothing is said. `monitor`: detections are flagged and let pass.
`enforce`: detections are acted on, and a request that cannot be judged does not pass."""

Action = Literal["allow", "flag", "steer", "block"]

SEVERITY: dict[Action, int] = {"allow": 0, "flag": 1, "steer": 2, "block": 3}

Role = Literal["system", "user", "assistant"]
"""Whose words a token is."""


class _Strict(BaseModel):
    # A policy also comes with a request, and what a client sent belongs in no traceback.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Threshold(_Strict):
    """Where a detection begins: a share of clean requests that may be flagged, or a raw score."""

    fpr: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="False-positive rate per request, over both phases and all detections that name the same rate; "
        "0.01 flags 1 in 100 clean requests.",
    )
    raw: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        default=None, description="A raw score, as `undertow calibrate` and the metric `undertow_threshold` show it."
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.fpr is None) == (self.raw is None):
            raise ValueError("give exactly one of `fpr` and `raw`")
        return self


class Detection(_Strict):
    """What to do when one detector's score lies above its threshold."""

    action: Literal["flag", "steer", "block"] = Field(
        description="`flag` lets the request pass and says so; `steer` takes the flagged directions out of the "
        "residual stream for the rest of it (the engine must be started for it); `block` ends it."
    )
    threshold: Threshold = Threshold(fpr=0.01)


def _block_on_density() -> dict[DetectorName, Detection]:
    return {"density": Detection(action="block")}


class Policy(_Strict):
    """What one request is judged by."""

    mode: Mode = Field(default="enforce", description="off, monitor or enforce.")
    detections: dict[DetectorName, Detection] = Field(
        default_factory=_block_on_density,
        description="By detector. Those that name the same false-positive rate share it: together they flag at most "
        "that share of clean requests. Different rates add up.",
    )
    steered_roles: Annotated[tuple[Role, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="Whose tokens `steer` changes, from the one that flagged on: system, user, assistant. Null: all.",
    )

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if self.mode != "off" and not self.detections:
            raise ValueError(f"mode `{self.mode}` needs at least one detection")
        return self

    @property
    def steers(self) -> bool:
        """Whether it may change what the model computes."""
        return self.mode == "enforce" and any(each.action == "steer" for each in self.detections.values())

    def shared_rates(self) -> dict[float, tuple[DetectorName, ...]]:
        """Each false-positive rate that is named, and the detectors that share it."""
        shared: dict[float, tuple[DetectorName, ...]] = {}
        for name, detection in sorted(self.detections.items()):
            fpr = detection.threshold.fpr
            if fpr is not None:
                shared[fpr] = (*shared.get(fpr, ()), name)
        return shared

    def to_wire(self) -> str:
        """The policy as it travels with a request to the engine: compact JSON."""
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def from_wire(cls, text: str) -> Policy:
        """Read what `to_wire` wrote. Raises ConfigError."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(f"policy sent with a request is not valid: {error.error_count()} errors") from error


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done with a request, and the verdict that says so."""

    action: Action
    verdict: Verdict | None = None
    """The most severe verdict; None where the action is `allow` or the request could not be judged."""
    reason: str = ""


def decide(policy: Policy, verdicts: Iterable[Verdict], unscorable: str | None = None) -> Decision:
    """The action for a request, given every verdict so far.

    In `monitor` nothing is blocked or steered: what would be flags. A request that could not be scored (`unscorable`
    says why) is blocked in `enforce` and flagged in `monitor`, whatever its scores.
    """
    if policy.mode == "off":
        return Decision("allow")
    if unscorable is not None:
        return Decision("block" if policy.mode == "enforce" else "flag", None, f"unscorable: {unscorable}")
    decision = Decision("allow")
    for verdict in verdicts:
        detection = policy.detections.get(verdict.score.detector)
        if detection is None or not verdict.exceeded:
            continue
        action: Action = detection.action if policy.mode == "enforce" else "flag"
        if SEVERITY[action] > SEVERITY[decision.action]:
            score = verdict.score
            decision = Decision(action, verdict, f"{score.detector} in the {score.phase}, p = {verdict.p_value:.2g}")
    return decision
