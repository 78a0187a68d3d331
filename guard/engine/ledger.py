"""What is known of every sequence in the engine: its scores so far, its verdicts, the decision."""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

from guard.calibration import Calibration, ScoreKey
from guard.conformal import JointRanks
from guard.engine.finding import Finding
from guard.engine.runner import Rows
from guard.engine.stop import Endings
from guard.engine.trail import Trail
from guard.errors import CalibrationError, ConfigError
from guard.evidence import Record, Trace
from guard.faults import Fault
from guard.policy import Action, Decision, Policy, Role, decide
from guard.verdict import PHASES, DetectorName, Score, Verdict

KEPT = 4096
"""How many finished sequences are remembered, so that their evidence can still be asked for."""

# vLLM's ids: over HTTP `chatcmpl-KEY-RANDOM` and `cmpl-KEY-PROMPT-RANDOM`, with `CHOICE_` in front where n > 1; from
# the `LLM` class `NUMBER-RANDOM`.
_SEQUENCE = re.compile(
    r"(?:(?P<choice>\d+)_)?(?:(?:chatcmpl|cmpl)-)?(?P<key>[0-9a-f]{32}|\d+)(?:-(?P<prompt>\d+))?-\w{8}"
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which HTTP request a sequence belongs to, and which prompt and choice of it."""

    key: str
    prompt: int = 0
    choice: int = 0

    @classmethod
    def of(cls, sequence: str) -> Identity:
        """Read vLLM's id. An id that the middleware did not make is its own key."""
        match = _SEQUENCE.fullmatch(sequence)
        if match is None:
            return cls(sequence)
        return cls(match["key"], int(match["prompt"] or 0), int(match["choice"] or 0))


@dataclass(frozen=True, slots=True)
class Limit:
    """What one score is held against."""

    threshold: float
    ranks: JointRanks[ScoreKey]
    """Of all scores that share the false-positive rate."""


@dataclass(slots=True)
class Sequence:
    """One sequence, from admission until it is forgotten."""

    identity: Identity
    policy_text: str | None
    policy: Policy
    limits: dict[ScoreKey, Limit]
    endings: Endings
    generation: int
    """Of the guard that scored its last token."""
    prompt_tokens: int = 0
    scored: int = 0
    """Leading tokens that have a score."""
    missed: int = 0
    """Where it was found that tokens have none: so many entered the model."""
    best: dict[ScoreKey, Score] = field(default_factory=dict)
    verdicts: dict[ScoreKey, Verdict] = field(default_factory=dict)
    first: dict[ScoreKey, int] = field(default_factory=dict)
    """Position of the first token above the threshold."""
    trails: dict[DetectorName, Trail] = field(default_factory=dict)
    """Of the guard that judges it now."""
    earlier: dict[ScoreKey, Finding] = field(default_factory=dict)
    """The gravest of what guards said that were replaced while it ran."""
    unscorable: str | None = None
    fault: Fault | None = None
    decision: Decision = field(default_factory=lambda: Decision("allow"))
    steered_from: int | None = None

    @property
    def blocked(self) -> bool:
        return self.decision.action == "block"

    def findings(self) -> dict[ScoreKey, Finding]:
        """The gravest of each detector and phase, over all guards that scored it."""
        found = dict(self.earlier)
        for key, verdict in list(self.verdicts.items()):
            finding = Finding(verdict, self.first.get(key), self.generation)
            if key not in found or finding.weight >= found[key].weight:
                found[key] = finding
        return found


class Ledger:
    """Every sequence in the engine and the last finished ones. Lives in the worker's thread; `records` may be called
    from another thread and sees a sequence as it was after some step."""

    def __init__(self, calibration: Calibration, default_policy: Policy | None, steering: bool = False) -> None:
        """`steering`: whether this engine can steer."""
        self._calibration = calibration
        self._steering = steering
        self._default = default_policy or self._target_policy(calibration)
        self._running: dict[str, Sequence] = {}
        self._by_key: OrderedDict[str, dict[str, Sequence]] = OrderedDict()
        self._compile = lru_cache(maxsize=256)(self._compile_policy)
        self.generation = 1
        """Counts the guards of this engine."""
        self.requests_judged = 0
        self.tokens_scored = 0
        self.tokens_recalled = 0
        self.tokens_missed = 0
        self.decided: Counter[Action] = Counter()
        """Sequences, by what is done about them."""
        self.faults: Counter[Fault] = Counter()
        """Sequences that could not be scored, by why."""

    @property
    def unscorable(self) -> int:
        """Sequences that could not be scored."""
        return self.faults.total()

    @staticmethod
    def _target_policy(calibration: Calibration) -> Policy:
        # The first is the strongest that the bank has directions for.
        detection = {"action": "block", "threshold": {"fpr": calibration.target_fpr}}
        return Policy.model_validate({"detections": {calibration.detectors[0]: detection}})

    def admit(self, sequence: str, policy_text: object, endings: Endings) -> None:
        """A new sequence, with what its request names as its policy: a text of `Policy.to_wire`, or None. One that runs
        is left as it is: model runner V2 is told of a preempted sequence as of a new one.

        One whose policy cannot be read never passes. One whose policy asks for a rate that the calibration cannot keep
        is unscorable, and does not pass where that policy enforces.
        """
        if sequence in self._running:
            return
        identity = Identity.of(sequence)
        # A client can put anything there; a list could not even be looked up.
        text = policy_text if policy_text is None or isinstance(policy_text, str) else ""
        policy, limits, problem = self._compile(text)
        entry = Sequence(identity, text, policy, limits, endings, self.generation)
        self._running[sequence] = entry
        self._by_key.setdefault(identity.key, {})[sequence] = entry
        self.requests_judged += 1
        self.decided[entry.decision.action] += 1
        if problem is not None:
            self._give_up(entry, *problem)

    def adopt(self, other: Ledger) -> None:
        """Take the place of another ledger, with all that runs under it and all that it remembers.

        Every token is judged by the guard that was in force when it was computed. So the verdicts of a running sequence
        stand, and what comes is held against this calibration's thresholds.
        """
        self._running, self._by_key = other._running, other._by_key
        self.generation = other.generation + 1
        self.requests_judged, self.faults = other.requests_judged, other.faults
        self.tokens_scored, self.tokens_recalled = other.tokens_scored, other.tokens_recalled
        self.tokens_missed = other.tokens_missed
        self.decided = other.decided.copy()
        for entry in self._running.values():
            if entry.blocked:
                continue
            policy, limits, problem = self._compile(entry.policy_text)
            # Replaced and never changed in place: the thread that tells evidence may be reading them.
            entry.earlier = entry.findings()
            entry.best, entry.verdicts, entry.first, entry.trails = {}, {}, {}, {}
            entry.policy, entry.limits, entry.generation = policy, limits, self.generation
            if problem is not None:
                self._give_up(entry, *problem)

    def finish(self, sequences: Iterable[str]) -> None:
        """These sequences run no more; the oldest finished ones are forgotten."""
        for sequence in sequences:
            entry = self._running.pop(sequence, None)
            if entry is not None:
                self._by_key.move_to_end(entry.identity.key)
                if entry.decision.action == "allow":
                    entry.trails = {}
        if len(self._by_key) <= KEPT:
            return
        active = {entry.identity.key for entry in self._running.values()}
        idle = (key for key in self._by_key if key not in active)
        for key in list(islice(idle, max(0, len(self._by_key) - len(active) - KEPT))):
            del self._by_key[key]

    def missing(self, rows: Rows) -> range:
        """Positions before `rows` that have no score yet: their KV came from the cache."""
        return range(self._running[rows.sequence].scored, rows.first_position)

    def recall(self, rows: Rows, scores: Iterable[Score]) -> None:
        """The scores of everything that was missing before `rows`."""
        entry = self._running[rows.sequence]
        self.tokens_recalled += rows.first_position - entry.scored
        entry.scored = rows.first_position
        self.score(rows.sequence, scores)

    def cover(self, rows: Rows) -> None:
        """Note which tokens of a sequence this step scores; a token that was passed over makes it unscorable."""
        entry = self._running[rows.sequence]
        entry.prompt_tokens = rows.prompt_tokens
        end = rows.first_position + rows.count
        if rows.first_position > entry.scored:
            self.tokens_missed += end - max(entry.scored, entry.missed)
            entry.missed = end
            detail = f"tokens {entry.scored} to {rows.first_position - 1} were never scored here"
            self._give_up(entry, detail, "token_unscored")
            return
        self.tokens_scored += max(0, end - entry.scored)
        entry.scored = max(entry.scored, end)

    def threshold(self, sequence: str, key: ScoreKey) -> float:
        """What a sequence's scores are held against, infinity where nothing is."""
        limit = self._running[sequence].limits.get(key)
        return math.inf if limit is None else limit.threshold

    def best(self, sequence: str, key: ScoreKey) -> float:
        """A sequence's largest score so far, minus infinity where it has none."""
        found = self._running[sequence].best.get(key)
        return -math.inf if found is None else found.value

    def blocked(self, sequence: str) -> bool:
        """Whether it has to end."""
        return self._running[sequence].blocked

    def ended(self, rows: Rows) -> bool:
        """Whether a sequence was over before `rows`: an engine that schedules ahead computes a step more, and drops
        it."""
        generated = rows.first_position - rows.prompt_tokens + 1
        return generated > 0 and self._running[rows.sequence].endings.before(rows.first_token, generated)

    def score(self, sequence: str, scores: Iterable[Score]) -> None:
        """Add a step's scores of one sequence and judge it again where one is its largest so far."""
        entry = self._running[sequence]
        changed = False
        for score in scores:
            key = (score.detector, score.phase)
            best = entry.best.get(key)
            if not math.isfinite(score.value):
                detail = f"{score.detector} at token {score.position} is {score.value}: the residual is not finite"
                self._give_up(entry, detail, "not_finite")
            elif best is None or score.value > best.value:
                entry.best[key] = score
                changed = True
                if (limit := entry.limits.get(key)) is not None:
                    if score.first is not None:
                        entry.first.setdefault(key, score.first)
                    entry.verdicts[key] = Verdict(score, limit.threshold, limit.ranks.p_value(key, score.value))
        if changed:
            self._decide(entry)

    def note(self, sequence: str, detector: DetectorName, first: int, values: Iterable[float]) -> None:
        """Scores of tokens from a position on, for whoever asks how a sequence came to be flagged."""
        trails = self._running[sequence].trails
        trail = trails.get(detector)
        if trail is None:
            trail = trails[detector] = Trail()
        trail.add(first, values)

    def fail(self, sequence: str, reason: str, tokens: int = 0, fault: Fault = "unscorable") -> None:
        """So many tokens of this sequence could not be scored in this step."""
        entry = self._running[sequence]
        self.tokens_missed += tokens
        entry.missed = max(entry.scored, entry.missed) + tokens
        self._give_up(entry, reason, fault)

    def steering(self, sequence: str) -> tuple[tuple[Finding, ...], tuple[Role, ...] | None]:
        """What a sequence is steered for, and whose tokens; nothing where it is not steered."""
        entry = self._running[sequence]
        if entry.decision.action != "steer":
            return (), None
        actions = {name: detection.action for name, detection in entry.policy.detections.items()}
        flagged = (finding for finding in entry.findings().values() if finding.verdict.exceeded)
        return (
            tuple(each for each in flagged if actions.get(each.verdict.score.detector) == "steer"),
            entry.policy.steered_roles,
        )

    def steered(self, sequence: str, position: int) -> None:
        """Note from which position on."""
        self._running[sequence].steered_from = position

    def stops(self, sequences: Iterable[str]) -> dict[str, int]:
        """Of these sequences the blocked ones, each with the token that ends it."""
        return {
            sequence: self._running[sequence].endings.token for sequence in sequences if self._running[sequence].blocked
        }

    def records(self, key: str) -> list[Record]:
        """What is known of one HTTP request's sequences, by prompt and choice."""
        entries = list(self._by_key.get(key, {}).values())
        entries.sort(key=lambda entry: (entry.identity.prompt, entry.identity.choice))
        return [self._record(entry) for entry in entries]

    def _record(self, entry: Sequence) -> Record:
        verdict = entry.decision.verdict
        return Record(
            prompt_index=entry.identity.prompt,
            choice_index=entry.identity.choice,
            prompt_tokens=entry.prompt_tokens,
            tokens_scored=entry.scored,
            mode=entry.policy.mode,
            action=entry.decision.action,
            reason=entry.decision.reason,
            phase=verdict.score.phase if verdict else None,
            detector=verdict.score.detector if verdict else None,
            unscorable=entry.unscorable,
            fault=entry.fault,
            generation=entry.generation,
            steered_from=entry.steered_from,
            scores=tuple(finding.evidence() for finding in entry.findings().values()),
            trace=() if entry.decision.action == "allow" else _traces(entry),
        )

    def _give_up(self, entry: Sequence, reason: str, fault: Fault) -> None:
        if entry.unscorable is None:
            entry.unscorable, entry.fault = reason, fault
            self.faults[fault] += 1
        self._decide(entry)

    def _decide(self, entry: Sequence) -> None:
        # A sequence once blocked stays blocked, for the reason it was.
        if not entry.blocked:
            self.decided[entry.decision.action] -= 1
            verdicts = [*(finding.verdict for finding in entry.earlier.values()), *entry.verdicts.values()]
            entry.decision = decide(entry.policy, verdicts, entry.unscorable)
            self.decided[entry.decision.action] += 1
            if entry.decision.action != "allow":
                for trail in entry.trails.values():
                    trail.settle()

    def _compile_policy(self, text: str | None) -> tuple[Policy, dict[ScoreKey, Limit], tuple[str, Fault] | None]:
        """A policy's text to a policy, what its scores are held against, and what is wrong with it."""
        try:
            policy = self._default if text is None else Policy.from_wire(text)
        except ConfigError as error:
            # It may have asked for `enforce`, and the default may be weaker.
            return Policy(), {}, (str(error), "policy_invalid")
        if policy.steers and not self._steering:
            detail = "its policy steers, and this engine was started without `undertow.steering`"
            return policy, {}, (detail, "policy_invalid")
        try:
            return policy, self._limits(policy), None
        except CalibrationError as error:
            return policy, {}, (str(error), "rate_unsupported")

    def _limits(self, policy: Policy) -> dict[ScoreKey, Limit]:
        """Raises CalibrationError where the calibration cannot keep a rate, or has no such detector."""
        limits: dict[ScoreKey, Limit] = {}
        for fpr, detectors in policy.shared_rates().items():
            ranks = self._calibration.ranks(detectors)
            for detector in detectors:
                for phase in PHASES:
                    limits[detector, phase] = Limit(ranks.threshold((detector, phase), fpr), ranks)
        for detector in (*policy.detections, *self._calibration.detectors):
            detection = policy.detections.get(detector)
            for phase in PHASES:
                if (detector, phase) in limits:
                    continue
                ranks = self._calibration.ranks((detector,))
                # A detector that the policy does not name is still reported, against the calibration's own rate.
                raw = None if detection is None else detection.threshold.raw
                threshold = ranks.threshold((detector, phase), self._calibration.target_fpr) if raw is None else raw
                limits[detector, phase] = Limit(threshold, ranks)
        return limits


def _traces(entry: Sequence) -> tuple[Trace, ...]:
    """What led to a sequence's being flagged, each score over the threshold of its phase."""
    found = []
    for detector, trail in list(entry.trails.items()):
        # A copy: the worker may be adding to it.
        points = list(trail.points)
        if not points:
            continue
        start, last = points[0][0], points[-1][0]
        ratios: list[float | None] = [None] * (last - start + 1)
        for position, value in points:
            phase = PHASES[int(position >= entry.prompt_tokens)]
            limit = entry.limits.get((detector, phase))
            if limit is not None and limit.threshold > 0 and math.isfinite(value):
                ratios[position - start] = round(max(0.0, value / limit.threshold), 3)
        found.append(Trace(detector=detector, start=start, ratios=tuple(ratios)))
    return tuple(found)
