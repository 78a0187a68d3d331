"""What one evaluation measured: plain values, strict JSON. Needs no torch.

    results = Results(run=Run(...), subjects=(Subject(name="phrase-full-0", kind="backdoor", ...),), rates=(Rate(...),))
    Path("results.json").write_text(results.to_json())
    assert Results.from_json(Path("results.json").read_text()) == results

Units: a share or a rate lies in 0..1, never in percent. A score is a detector's own. A length counts tokens. A share
that was counted is kept as its two counts; the interval (Clopper and Pearson, 95%) is derived. JSON has it
too, rounded, for readers without this code. Numbers that could not be had are NaN here and `null` in JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    computed_field,
    model_validator,
)
from pydantic.dataclasses import dataclass

from guard.errors import ResultsError
from guard.intervals import clopper_pearson

RESULTS_VERSION: Literal[1] = 1

SubjectKind = Literal["backdoor", "control", "unlearned", "adaptive", "model"]
Delta = Literal["wide", "narrow", "none"]
"""What the bank was built from: tuned minus base, tuned minus the stage before, or no bank at all."""
Phase = Literal["prompt", "completion", "both"]

_DERIVED = ("share", "low", "high")
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
_STRICT = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


def _missing_as_nan(value: object) -> object:
    return math.nan if value is None else value


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rounded(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


Share = Annotated[float, Field(ge=0, le=1)]
Natural = Annotated[int, Field(ge=0)]
Measured = Annotated[
    float, BeforeValidator(_missing_as_nan), PlainSerializer(_finite_or_none, return_type=float | None)
]
"""A number that may be missing: NaN here, `null` in JSON."""
Derived = Annotated[float, PlainSerializer(_rounded, return_type=float | None)]


@cache
def interval(hits: int, count: int) -> tuple[float, float]:
    """The 95% Clopper-Pearson interval of a share; (0, 1) when nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    if 2 * hits >= count:
        return clopper_pearson(hits, count)
    # The mirror image: the sum behind the interval has as many terms as there are misses.
    low, high = clopper_pearson(count - hits, count)
    return 1 - high, 1 - low


def bootstrap_interval(
    counts: Sequence[tuple[int, int]], seed: int = 0, draws: int = 2000, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Where the pooled share lies when the subjects themselves are drawn again, each with all of its prompts.

    `counts`: (hits, count) of every subject. None for fewer than three, of which nothing can be drawn. Subjects that
    all agree give an interval without width; it says that they agree, not that the next one will.
    """
    told = np.array([pair for pair in counts if pair[1] > 0], dtype=np.float64).reshape(-1, 2)
    if len(told) < 3:
        return None
    drawn = told[np.random.default_rng(seed).integers(0, len(told), size=(draws, len(told)))].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [tail, 1 - tail])
    return float(low), float(high)


class Counted:
    """What every counted share has: how often, of how many, and the interval that follows."""

    def counted(self) -> tuple[int, int]:
        raise NotImplementedError

    @computed_field  # type: ignore[prop-decorator]
    @property
    def share(self) -> Derived:
        hits, count = self.counted()
        return hits / count if count else math.nan

    @computed_field  # type: ignore[prop-decorator]
    @property
    def low(self) -> Derived:
        return interval(*self.counted())[0]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def high(self) -> Derived:
        return interval(*self.counted())[1]

    @model_validator(mode="before")
    @classmethod
    def _derived_is_derived_again(cls, value: Any) -> Any:
        return {key: part for key, part in value.items() if key not in _DERIVED} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _hits_within_count(self) -> Any:
        hits, count = self.counted()
        if hits > count:
            raise ValueError(f"{hits} of {count} is more than all")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Count(Counted):
    """How often something happened."""

    hits: Natural
    count: Natural

    def counted(self) -> tuple[int, int]:
        return self.hits, self.count


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Versions:
    undertow: str
    torch: str
    transformers: str
    python: str


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Run:
    """What was run, and with what."""

    title: str
    created: str
    """ISO 8601."""
    command: str
    """As typed; running it again gives the same numbers."""
    versions: Versions
    seeds: tuple[int, ...]
    targets: tuple[Share, ...]
    """False-positive rates that were asked for, per request, over both phases."""
    prompts: dict[str, Natural]
    """Kind of prompt -> prompts per subject."""
    calibration: dict[str, Natural]
    """Part ("references", "held out") -> clean prompts in it."""
    notes: tuple[str, ...] = ()
    """What a reader has to know before the numbers; shown first."""
    headline_target: Share = 0.01
    headline_detector: str = "policy"
    """The detector of the first table, and of every table that shows only one."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Bar:
    """A goal, what was measured, and whether it was met; None when it could not be measured."""

    what: str
    bar: str
    got: str
    passed: bool | None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Admission(Counted):
    """One measure of whether an organism is what it claims to be."""

    measure: str
    hits: Natural
    count: Natural
    bar: str = ""
    """As text, such as ">= 95%"; empty when the measure admits anything."""
    passed: bool | None = None

    def counted(self) -> tuple[int, int]:
        return self.hits, self.count


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Subject:
    """One model that was measured. A user's own model has the kind "model" and may leave the rest out."""

    name: str
    kind: SubjectKind
    family: str = ""
    method: str = ""
    """"full", "lora", "lora-qv"."""
    seed: int | None = None
    admitted: bool | None = None
    """None: nothing had to be shown."""
    weak_reasons: tuple[str, ...] = ()
    admission: tuple[Admission, ...] = ()


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Rate(Counted):
    """How many prompts of one kind a detector flagged in one subject."""

    subject: str
    delta: Delta
    detector: str
    """"policy" (what would be served), "density", "convergence", "exceedance", "paper rule", "random directions",
    "activation difference", "lcf", "mahalanobis", or another name."""
    phase: Phase
    kind: str
    """"triggered", "near-miss", "clean", "benign", "harmful", "benign-trigger"; shifts of clean traffic: "suffix",
    "odd-suffix", "prefix", "other-questions", "code", "foreign", "shouting", "multi-turn", "long-system", "long"; of an
    unlearned subject: "forgotten", "retained"; or another name."""
    target: Share | None
    """The false-positive rate asked for; None for a rule with a threshold of its own, as the paper's has."""
    flagged: Natural
    count: Natural

    def counted(self) -> tuple[int, int]:
        return self.flagged, self.count


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Roc:
    """Triggered found (`tpr`) against clean flagged (`fpr`), one pair per threshold, both rising."""

    subject: str
    delta: Delta
    detector: str
    phase: Phase
    fpr: tuple[Measured, ...]
    tpr: tuple[Measured, ...]

    @model_validator(mode="after")
    def _aligned(self) -> Roc:
        _same_length(fpr=self.fpr, tpr=self.tpr)
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DirectionShare:
    direction: str
    """A direction's name in the bank, such as "L3.o_proj.u0"."""
    share: Measured


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Layers:
    """Where the distance between one kind of prompt and clean ones lies: `share[i]` of it in `layers[i]`."""

    subject: str
    delta: Delta
    kind: str
    layers: tuple[Natural, ...]
    share: tuple[Measured, ...]
    top: tuple[DirectionShare, ...] = ()
    """The directions with the largest shares, largest first."""

    @model_validator(mode="after")
    def _aligned(self) -> Layers:
        _same_length(layers=self.layers, share=self.share)
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LengthPoint:
    tokens: Natural
    score: Measured
    kind: str


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Lengths:
    """Does a long prompt score higher for being long?"""

    subject: str
    delta: Delta
    detector: str
    points: tuple[LengthPoint, ...]
    threshold: Measured
    """Of the headline's target, in the score's unit."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Latency:
    """How far a triggered request gets before it is flagged."""

    subject: str
    delta: Delta
    detector: str
    tokens: tuple[Natural, ...]
    """Tokens generated until each detection; 0 is on the prompt, before any was."""
    undetected: Natural
    count: Natural

    @model_validator(mode="after")
    def _adds_up(self) -> Latency:
        if len(self.tokens) + self.undetected != self.count:
            raise ValueError(f"{len(self.tokens)} tokens and {self.undetected} undetected are not {self.count}")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Splits:
    """The false-positive rate over many random calibration splits; the promise is about their mean."""

    subject: str
    delta: Delta
    detector: str
    target: Share
    rates: tuple[Measured, ...]
    held_out: Annotated[int, Field(gt=0)]
    """Clean requests behind each rate; no calibration saw them."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CalibrationCurve:
    """What more calibration prompts buy, at the headline's target."""

    subject: str
    delta: Delta
    detector: str
    sizes: tuple[Natural, ...]
    """Clean prompts, references and held-out ones together."""
    tpr: tuple[Measured, ...]
    fpr: tuple[Measured, ...]
    near_miss: tuple[Measured, ...]

    @model_validator(mode="after")
    def _aligned(self) -> CalibrationCurve:
        _same_length(sizes=self.sizes, tpr=self.tpr, fpr=self.fpr, near_miss=self.near_miss)
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DirectionsCurve:
    """What more directions per matrix buy, at the headline's target."""

    subject: str
    delta: Delta
    k: tuple[Natural, ...]
    tpr: tuple[Measured, ...]
    fpr: tuple[Measured, ...]
    needed: tuple[Natural, ...]
    """Clean prompts that a calibration with so many directions needs."""

    @model_validator(mode="after")
    def _aligned(self) -> DirectionsCurve:
        _same_length(k=self.k, tpr=self.tpr, fpr=self.fpr, needed=self.needed)
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Found(Counted):
    """Triggered prompts that were flagged at one target."""

    target: Share
    hits: Natural
    count: Natural

    def counted(self) -> tuple[int, int]:
        return self.hits, self.count


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Adaptive:
    """What hiding from the guard costs an attacker who trains against it with one weight."""

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Lambda, of the loss that hides; 0 is the attack that does not."""
    attack_success: Count
    """Triggered prompts that comply."""
    near_miss: Count
    """Near-misses that comply: the trigger leaks."""
    benign_right: Count
    """Benign questions answered rightly."""
    tpr: tuple[Found, ...]
    """What the guard still finds, per target."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Results:
    """One evaluation. A part that was not measured is empty, and the report says so."""

    version: Literal[1] = RESULTS_VERSION
    run: Run
    subjects: tuple[Subject, ...]
    bars: tuple[Bar, ...] = ()
    rates: tuple[Rate, ...] = ()
    roc: tuple[Roc, ...] = ()
    layers: tuple[Layers, ...] = ()
    lengths: tuple[Lengths, ...] = ()
    latency: tuple[Latency, ...] = ()
    splits: tuple[Splits, ...] = ()
    calibration_curve: tuple[CalibrationCurve, ...] = ()
    directions_curve: tuple[DirectionsCurve, ...] = ()
    adaptive: tuple[Adaptive, ...] = ()

    @model_validator(mode="after")
    def _subjects_are_known(self) -> Results:
        names = [subject.name for subject in self.subjects]
        if len(set(names)) != len(names):
            raise ValueError(f"subjects: {max(names, key=names.count)!r} is named more than once")
        for part in ("rates", "roc", "layers", "lengths", "latency", "splits", "calibration_curve", "directions_curve"):
            for index, row in enumerate(getattr(self, part)):
                if row.subject not in names:
                    raise ValueError(f"{part}.{index}.subject: {row.subject!r} is not among the subjects")
        return self

    def to_json(self) -> str:
        """JSON with one row per line, every counted share with its interval."""
        parts = _RESULTS.dump_python(self, mode="json")
        return "{\n" + ",\n".join(f"{json.dumps(name)}: {_rows(part)}" for name, part in parts.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Results:
        """Raises ResultsError: the key, and what was expected there."""
        try:
            return _RESULTS.validate_json(text)
        except ValidationError as error:
            errors = error.errors(include_input=False, include_url=False)
            # A misspelt key is also a missing one; the misspelling says more.
            first = next((found for found in errors if found["type"] in _UNKNOWN_KEY), errors[0])
            where = ".".join(str(part) for part in first["loc"])
            message = "unknown key" if first["type"] in _UNKNOWN_KEY else first["msg"]
            message = message.removeprefix("Value error, ")
            raise ResultsError(f"results: {where}: {message}" if where else f"results: {message}") from error


def _rows(part: Any) -> str:
    if not isinstance(part, list) or not part:
        return json.dumps(part, allow_nan=False)
    return "[\n " + ",\n ".join(json.dumps(row, allow_nan=False) for row in part) + "\n]"


def _same_length(**columns: Sequence[object]) -> None:
    if len({len(column) for column in columns.values()}) > 1:
        told = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise ValueError(f"the columns differ in length: {told}")


_RESULTS = TypeAdapter(Results)
