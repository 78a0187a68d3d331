"""What the engine tells the server about a request: versioned, small, JSON. Pure, torch-free.

One HTTP request can hold several sequences (several prompts, `n > 1`): one `Record` each. Nothing here is an activation
or a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guard.errors import EvidenceError
from guard.faults import Fault
from guard.policy import Action, Mode
from guard.verdict import DetectorName, Phase

EVIDENCE_VERSION: Literal[1] = 1

REQUEST_HEADER = "x-undertow-evidence"
"""Request header (any value) that asks the engine for evidence; response header that carries it in a full response."""
STREAM_PREFIX = ": undertow "
"""SSE comment with evidence in a stream: before the first chunk, each chunk that ends a choice, and `[DONE]`."""
STATUS_PATH = "/undertow/status"
"""Where the engine's API process says what its workers guard with (a `Status` as JSON)."""
STATUS_AGE = "max_age_s"
"""Query parameter of it: how many seconds old the answer of an idle engine may be, as long as the same bank and
calibration guard. Every fresh answer wakes the engine's workers, and vLLM's workers spin for a second after each thing
that they are asked."""
SILENT = "silent"
"""Stands in the place of evidence, in header and comment, where the worker gave none to the engine's API process."""
POLICY_ARGUMENT = "undertow_policy"
"""Key in `vllm_xargs` that carries `Policy.to_wire()`."""


class _Wire(BaseModel):
    # A score can be NaN (and then is never a pass); JSON's own null would lose that.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants", hide_input_in_errors=True)


class ScoreEvidence(_Wire):
    """The largest score of one detector in one phase so far, held against its threshold."""

    detector: DetectorName
    phase: Phase
    score: Annotated[float, Field(allow_inf_nan=True)]
    threshold: float
    p_value: float
    position: int
    """Of the largest score."""
    first: int | None = None
    """Position of the first token of the phase above the threshold; None where none is."""
    layer: int
    direction: str | None = None
    generation: Annotated[int, Field(ge=1)] = 1
    """Which of the engine's guards gave the score."""


class Trace(_Wire):
    """One detector's scores over tokens around the first that was too large."""

    detector: DetectorName
    start: Annotated[int, Field(ge=0)]
    """Position of the first of them."""
    ratios: tuple[float | None, ...]
    """Score over its phase's threshold, of each token from `start` on, three decimals; None where the detector read
    none, or nothing finite came of it."""


class Record(_Wire):
    """One sequence: what of it was scored and what was decided."""

    prompt_index: Annotated[int, Field(ge=0)] = 0
    choice_index: Annotated[int, Field(ge=0)] = 0
    prompt_tokens: Annotated[int, Field(ge=0)]
    tokens_scored: Annotated[int, Field(ge=0)]
    """Leading tokens of the sequence that have a score. A finished sequence of p prompt and c completion tokens needs
    p + c - 1: the last token sampled never enters the model."""
    mode: Mode
    action: Action
    reason: str = ""
    phase: Phase | None = None
    """The phase that decided; None for `allow` and for what could not be scored."""
    detector: DetectorName | None = None
    unscorable: str | None = None
    """What was found and what was expected, where the sequence could not be scored."""
    fault: Fault | None = None
    """The same by name."""
    generation: Annotated[int, Field(ge=1)] = 1
    """Which of the engine's guards scored the last token: 1 at its start, one more with every change. Where one was
    replaced meanwhile, each token is judged by the one that was in force when it was computed."""
    steered_from: int | None = None
    """Index of the token from which on it was steered; None where it was not."""
    scores: tuple[ScoreEvidence, ...] = ()
    """Of each detector and phase the gravest, over all guards that scored it."""
    trace: tuple[Trace, ...] = ()
    """Of a sequence that was not simply allowed: how it got there."""


class Evidence(_Wire):
    """Everything the engine knows about one HTTP request, at one moment."""

    version: Literal[1] = EVIDENCE_VERSION
    fingerprint: str
    """Of the bank that guards now the model that the request names; empty where none does."""
    calibration: str
    """`Calibration.digest` of the one that guards it now; empty where none does."""
    records: tuple[Record, ...]

    def to_json(self) -> str:
        """One line of ASCII JSON, fit for a header. Defaults are left out, but for the version."""
        fields = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps({"version": self.version, **fields}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Evidence:
        """Raises EvidenceError, never with the text in its message."""
        try:
            evidence = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            # The name of a key that does not belong there is text, too.
            known = first["loc"][:-1] if first["type"] == "extra_forbidden" else first["loc"]
            where = ".".join(str(part) for part in known) or "the whole"
            raise EvidenceError(f"evidence from the engine is not valid at {where}: {first['msg']}") from error
        if "version" not in evidence.model_fields_set:
            raise EvidenceError("evidence from the engine is not valid at version: it is missing")
        return evidence


class DetectorStatus(_Wire):
    """What detectors that share a false-positive rate can promise with the calibration that is loaded."""

    detectors: tuple[DetectorName, ...]
    """One, or several, in alphabetical order."""
    supported_fpr: float
    """The smallest rate that the calibration supports for them together."""


class AdapterStatus(_Wire):
    """What guards the requests that use one LoRA adapter."""

    name: str
    """As vLLM serves it: what requests name as their model."""
    fingerprint: str
    calibration: str
    detectors: tuple[DetectorStatus, ...]


class WorkerStatus(_Wire):
    """What one worker guards with."""

    rank: int
    fingerprint: str | None
    """Of the bank of the model itself. None: only adapters have banks, and a request that uses none is unscorable."""
    calibration: str | None
    """Digest of the calibration file's content."""
    generation: Annotated[int, Field(ge=1)]
    """Which guard it is: 1 at the engine's start, one more with every change."""
    layers: tuple[int, ...]
    """Watched decoder layers whose op was seen to run."""
    reserved_token_id: int
    detectors: tuple[DetectorStatus, ...]
    """Every combination of the detectors that the bank has directions for."""
    adapters: tuple[AdapterStatus, ...] = ()
    undertow_version: str
    vllm_version: str
    dtype: str
    requests_judged: int
    tokens_scored: int
    """In the forward pass."""
    tokens_recalled: int
    """Whose KV, and with it whose score, came from the prefix cache."""
    tokens_missed: int
    """That entered the model, or came from the prefix cache, and have no score: their requests are unscorable."""
    unscorable: int
    """Sequences that could not be scored."""
    faults: dict[Fault, int] = Field(default_factory=dict)
    """The same by why."""
    steering: bool = False
    """Whether it can steer."""
    flagged: int = 0
    blocked: int = 0


COVERAGE = ("requests_judged", "unscorable")
"""What every worker of one engine has counted alike, or it has not seen what the others have."""
VERDICTS = ("flagged", "blocked", "tokens_scored", "tokens_recalled")
"""What they count alike as long as their verdicts are the same: a blocked sequence is not scored any further. Those of
the first rank hold, and those of another may differ by rounding, so close to a threshold."""


class Status(_Wire):
    """What every worker of one engine guards with; the server's handshake."""

    version: Literal[1] = EVIDENCE_VERSION
    workers: tuple[WorkerStatus, ...]
    channel: Literal["answers", "silent"] | None = None
    """Whether the worker gives evidence when it is asked. None: nobody asked."""

    @classmethod
    def from_json(cls, text: str | bytes) -> Status:
        """Raises EvidenceError."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise EvidenceError(f"status from the engine is not valid: {error.error_count()} errors") from error

    def apart(self, fields: Iterable[str]) -> list[str]:
        """Where the workers, which all see every step and are all asked between the same two, differ: `blocked: 3 by
        rank 0, 4 by rank 1`."""
        found = []
        for name in fields:
            told = {worker.rank: getattr(worker, name) for worker in self.workers}
            if len(set(told.values())) > 1:
                found.append(f"{name}: " + ", ".join(f"{value} by rank {rank}" for rank, value in told.items()))
        return found


@dataclass(frozen=True, slots=True)
class Coverage:
    """Tokens that needed a score against tokens that have one."""

    needed: int
    scored: int

    @property
    def complete(self) -> bool:
        return self.scored >= self.needed
