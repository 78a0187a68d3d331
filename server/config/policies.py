"""What a policy says to the server alone, beside what the engine judges by, and what a rule may change of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from guard.policy import Mode, Policy
from guard.verdict import DetectorName
from server.config.strict import Strict

OnError = Literal["closed", "open"]
OnBlock = Literal["error", "completion"]
Content = Literal["off", "hash", "redacted", "full"]
Verdict = Literal["headers", "answer"]


class Window(Strict):
    """How many of a choice's newest tokens are held back."""

    window: int = Field(ge=1, le=4096, description="Tokens of each choice that are held back.")


def _token_window_or_answer(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise ValueError("expected `token`, `answer` or `{window: N}` with N from 1 to 4096") from None


HoldBack = Annotated[Literal["token", "answer"] | Window, WrapValidator(_token_window_or_answer)]

REFUSAL = "The content filter stopped this."

_ON_ERROR = (
    "What becomes of a request that cannot be judged, in `enforce`. `closed`: 503. `open`: it passes, as `unguarded`; "
    "only where every action is `flag`."
)
_ON_BLOCK = (
    "How a client is told. `error`: 400 `content_filter` for a prompt, no text for an answer. `completion`: an answer "
    "that says `refusal` and ends with `content_filter`, for chat windows that show errors badly."
)
_REFUSAL = "What a blocked client reads, with `on_block: completion`."
_HOLD_BACK = (
    "How much of a stream is held back in `enforce`. `token`: the newest chunk of each choice, which is what has no "
    "verdict yet. `{window: N}`: N tokens. `answer`: all, until it was judged."
)
_VERDICT = (
    "Where clients are told what was decided. `headers`: in `x-undertow-*`. `answer`: also as an object `undertow` in "
    "answers of chat/completions and completions; in a stream as its last chunk, when its output has a verdict."
)
_CONTENT = (
    "What of a flagged, steered or blocked request's text is kept with its incident. `off`: nothing. `hash`: a keyed "
    "hash, so that the same prompt is known again. `redacted`: without what looks like a secret or a person, as far as "
    "patterns go. `full`: all."
)


class Shadow(Strict):
    """A threshold that is tried and decides nothing."""

    fpr: float = Field(gt=0, lt=1, description="False-positive rate at which it would flag; see `threshold`.")


class PolicySettings(Policy):
    """What one request is judged by, and what the server does about it."""

    on_error: OnError = Field(default="closed", description=_ON_ERROR)
    on_block: OnBlock = Field(default="error", description=_ON_BLOCK)
    refusal: Annotated[str, Field(min_length=1, max_length=2000)] = Field(default=REFUSAL, description=_REFUSAL)
    hold_back: HoldBack = Field(default="token", description=_HOLD_BACK)
    verdict: Verdict = Field(default="headers", description=_VERDICT)
    content: Content = Field(default="off", description=_CONTENT)
    shadow: dict[DetectorName, Shadow] = Field(
        default_factory=dict,
        description="By detector, a second threshold that is only counted (`undertow_shadow_decisions_total`): what it "
        "would flag. The detector must be one of `detections`, with a threshold that is an `fpr`.",
    )

    @model_validator(mode="after")
    def _opens_only_for_flags(self) -> Self:
        acting = [f"{name}: {each.action}" for name, each in self.detections.items() if each.action != "flag"]
        if self.on_error == "open" and acting:
            raise ValueError(
                "`on_error: open` would let pass what nobody judged, while the policy acts on what it finds "
                f"({', '.join(acting)}); expected every action to be `flag`, or `on_error: closed`"
            )
        return self

    @model_validator(mode="after")
    def _shadows_what_is_detected(self) -> Self:
        for name in self.shadow:
            live = self.detections.get(name)
            if live is None or live.threshold.fpr is None:
                raise ValueError(
                    f"`shadow.{name}` has nothing beside it; expected `detections.{name}` with a threshold that is an "
                    "`fpr`: only then does the engine say p-values that it can be held against"
                )
        return self

    @property
    def judged(self) -> Policy:
        """The engine's part. With `on_error: open` that is `monitor`, which for flags alone differs in nothing but what
        becomes of a request that could not be judged."""
        mode: Mode = "monitor" if self.mode == "enforce" and self.on_error == "open" else self.mode
        return Policy(mode=mode, detections=self.detections, steered_roles=self.steered_roles)

    def to_wire(self) -> str:
        """Only the engine's part travels."""
        return self.judged.to_wire()


class Override(Strict):
    """What a rule changes of its policy. What is not named stays."""

    mode: Mode = Field(default="enforce", description="off, monitor or enforce.")
    on_error: OnError = Field(default="closed", description=_ON_ERROR)
    on_block: OnBlock = Field(default="error", description=_ON_BLOCK)
    refusal: Annotated[str, Field(min_length=1, max_length=2000)] = Field(default=REFUSAL, description=_REFUSAL)
    hold_back: HoldBack = Field(default="token", description=_HOLD_BACK)
    verdict: Verdict = Field(default="headers", description=_VERDICT)
    content: Content = Field(default="off", description=_CONTENT)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(f"changes nothing; expected one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """The keys that were named."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}

    def of(self, policy: PolicySettings) -> PolicySettings:
        """The policy with these changes, checked anew. Raises ValueError where they do not go together."""
        kept = {name: getattr(policy, name) for name in PolicySettings.model_fields}
        return PolicySettings.model_validate(kept | self.changes)
