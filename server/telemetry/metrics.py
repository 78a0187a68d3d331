"""Every metric, declared once. `docs/metrics.md` is generated from DECLARATIONS.

One `Metrics` per app, with its own registry. Labels come from closed sets only: never a model, a user or a request id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

from guard.evidence import Record, ScoreEvidence
from guard.faults import FAULT_MEANINGS
from guard.policy import Action, Mode
from guard.verdict import DETECTORS, PHASES, DetectorName, Phase, Score, Verdict
from server.errors import FAILURE_KINDS, LIMITS, UPSTREAM_KINDS, FailureKind, LimitName, ServerFailure, UpstreamKind
from server.incidents.incident import LABELS, Label
from server.shadow import Compared, Would
from server.telemetry.names import NONE, Bounded

EndpointLabel = Literal[
    "chat_completions",
    "completions",
    "responses",
    "messages",
    "embeddings",
    "tokenize",
    "detokenize",
    "models",
    "other",
]
ENDPOINTS: tuple[EndpointLabel, ...] = get_args(EndpointLabel)
GUARDED: tuple[EndpointLabel, ...] = ("chat_completions", "completions", "responses", "messages")

Outcome = Literal[
    "allowed",
    "flagged",
    "steered",
    "blocked_prompt",
    "blocked_output",
    "unguarded",
    "guard_failed",
    "upstream_rejected",
    "upstream_error",
    "client_error",
    "unauthorized",
    "rate_limited",
    "client_gone",
    "shut_down",
]
OUTCOMES: tuple[Outcome, ...] = (
    "allowed",
    "flagged",
    "steered",
    "blocked_prompt",
    "blocked_output",
    "unguarded",
    "guard_failed",
    "upstream_rejected",
    "upstream_error",
    "client_error",
    "unauthorized",
    "rate_limited",
    "client_gone",
    "shut_down",
)
EVALUATED: frozenset[Outcome] = frozenset({"allowed", "flagged", "steered", "blocked_prompt", "blocked_output"})
ELIGIBLE: frozenset[Outcome] = EVALUATED | {"unguarded", "guard_failed"}

INCIDENT_ACTIONS: tuple[Action, ...] = ("flag", "steer", "block")
ACTIONS: tuple[Action, ...] = ("allow", "flag", "steer", "block")
MODES: tuple[Mode, ...] = ("off", "monitor", "enforce")
BypassReason = Literal["endpoint", "off", "monitor", "on_error_open", "enforce"]
BYPASSES: tuple[BypassReason, ...] = get_args(BypassReason)
CanaryOutcome = Literal["scored", "failed"]
CANARIES: tuple[CanaryOutcome, ...] = get_args(CanaryOutcome)
WOULD: tuple[Would, ...] = ("pass", "flag")

_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 5.0, 10.0)
_RATIO_LIMIT = 100.0
"""Above it the sum would say nothing (a NaN score has an infinite ratio)."""
_ANSWER_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)


@dataclass(frozen=True, slots=True)
class Declaration:
    """One metric as it is exposed."""

    name: str
    """Family name; counters with `_total`."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    """Values that each label can have; None where they are not known beforehand (still few)."""
    buckets: tuple[float, ...] = ()


DECLARATIONS: tuple[Declaration, ...] = (
    Declaration(
        "undertow_requests_total",
        "counter",
        "Requests by how they ended. guard_failed: answered with an error because it could not be judged. unguarded: "
        "passed without being judged (in monitor and off; embeddings, tokenize and detokenize always). "
        "upstream_rejected: the engine answered 4xx. unauthorized: without a key that opens. shut_down: the server "
        "ended before the answer did.",
        {"endpoint": ENDPOINTS, "outcome": OUTCOMES},
    ),
    Declaration(
        "undertow_eligible_total",
        "counter",
        "Requests that had to be judged: all but those that the client or the engine ended before a whole answer.",
        {"endpoint": GUARDED},
    ),
    Declaration(
        "undertow_evaluated_total",
        "counter",
        "Eligible requests of which every token that needed a score had one. Below undertow_eligible_total, the guard "
        "is not working.",
        {"endpoint": GUARDED},
    ),
    Declaration(
        "undertow_decisions_total",
        "counter",
        "Sequences by detector and phase, and what was done about their score.",
        {"detector": DETECTORS, "phase": PHASES, "action": ACTIONS, "mode": MODES},
    ),
    Declaration(
        "undertow_shadow_decisions_total",
        "counter",
        "Scores that a policy holds against a second rate (`shadow`), by what the live threshold says and what the "
        "second one would.",
        {"policy": None, "detector": DETECTORS, "phase": PHASES, "live": WOULD, "shadow": WOULD},
    ),
    Declaration(
        "undertow_exceedance",
        "histogram",
        "Score over threshold, per sequence; 1.0 is at the threshold. Above 100 counts as 100.",
        {"detector": DETECTORS, "phase": PHASES},
        _RATIO_BUCKETS,
    ),
    Declaration(
        "undertow_threshold",
        "gauge",
        "Raw threshold in force, as the last evidence named it. Dimensionless.",
        {"detector": DETECTORS, "phase": PHASES},
    ),
    Declaration("undertow_tokens_scored_total", "counter", "Tokens that got a score.", {"phase": PHASES}),
    Declaration(
        "undertow_guard_failures_total",
        "counter",
        "Requests that could not be judged, by the first reason. In enforce they were refused.",
        {"kind": FAILURE_KINDS, "mode": MODES},
    ),
    Declaration(
        "undertow_added_latency_seconds",
        "histogram",
        "Time that a request spent in this process: total, from the end of its body to its answer (to its first byte "
        "in a stream), less the wait for the engine.",
        {},
        _SECONDS_BUCKETS,
    ),
    Declaration(
        "undertow_evaluation_seconds",
        "histogram",
        "Time in which this process read the evidence of one request and held it against the answer. Part of "
        "undertow_added_latency_seconds; scoring itself is the engine's work.",
        {},
        _SECONDS_BUCKETS,
    ),
    Declaration(
        "undertow_hold_back_seconds",
        "histogram",
        "Of a stream in enforce: time from the first token that was kept back to the first that was let go "
        "(`hold_back`).",
        {},
        _ANSWER_BUCKETS,
    ),
    Declaration(
        "undertow_upstream_seconds",
        "histogram",
        "Time from asking an engine to the end of its answer, of requests that were answered.",
        {"engine": None},
        _ANSWER_BUCKETS,
    ),
    Declaration(
        "undertow_bypass_total",
        "counter",
        "Requests that passed without being judged. endpoint: one that generates nothing; off, monitor: the policy's "
        "mode; on_error_open: the policy lets pass what cannot be judged; enforce: never.",
        {"reason": BYPASSES},
    ),
    Declaration(
        "undertow_tenant_requests_total",
        "counter",
        "Requests by who asked for what. tenant: of the API key; none: no keys are kept, or there was none that opens. "
        "model: one that the settings or an engine's list name; others are `other`.",
        {"tenant": None, "model": None, "outcome": OUTCOMES},
    ),
    Declaration(
        "undertow_flagged_total",
        "counter",
        "Sequences that were flagged, steered or blocked, by where the score was that did it. model and tenant as in "
        "undertow_tenant_requests_total; beyond 2000 combinations `other`.",
        {
            "tenant": None,
            "model": None,
            "layer": None,
            "direction": None,
            "detector": DETECTORS,
            "phase": PHASES,
            "action": INCIDENT_ACTIONS,
        },
    ),
    Declaration(
        "undertow_canaries_total",
        "counter",
        "Requests that the server made only to see them scored, by engine.",
        {"engine": None, "outcome": CANARIES},
    ),
    Declaration(
        "undertow_rate_limited_total",
        "counter",
        "Requests that were answered with 429, by the limit of their key that was reached.",
        {"limit": LIMITS},
    ),
    Declaration(
        "undertow_incidents_total",
        "counter",
        "Requests that were flagged, steered or blocked, each once.",
        {"action": INCIDENT_ACTIONS},
    ),
    Declaration(
        "undertow_incidents_dropped_total",
        "counter",
        "Incidents that neither the database nor the spool could take. The log has them.",
    ),
    Declaration("undertow_incident_spool_bytes", "gauge", "Size of what waits on this server's disk for the database."),
    Declaration("undertow_incident_database_up", "gauge", "1 where the database took what it was last given."),
    Declaration(
        "undertow_webhook_messages_total",
        "counter",
        "Messages about incidents, each to one address: sent, failed after every attempt, or dropped because too many "
        "waited.",
        {"result": ("sent", "failed", "dropped")},
    ),
    Declaration(
        "undertow_review_labels_total",
        "counter",
        "Labels that reviewers gave on this server's operators' port.",
        {"label": LABELS},
    ),
    Declaration(
        "undertow_reviewed_incidents",
        "gauge",
        "Incidents in the database by their label; none: nobody has said. Precision is true / (true + false).",
        {"label": (*LABELS, "none")},
    ),
    Declaration("undertow_inflight_requests", "gauge", "Completion requests that are being worked on."),
    Declaration(
        "undertow_upstream_errors_total",
        "counter",
        "Failures of engines: connect, timeout (silence), cut (ended mid-answer), status (5xx), protocol; busy "
        "where none had room in time.",
        {"kind": UPSTREAM_KINDS},
    ),
    Declaration(
        "undertow_engine_ready",
        "gauge",
        "1 where requests are sent to this engine: it answers, its guard is what the settings ask for, its last canary "
        "was scored.",
        {"engine": None},
    ),
    Declaration(
        "undertow_engine_breaker_open",
        "gauge",
        "1 where an engine gets no requests because several in a row failed.",
        {"engine": None},
    ),
    Declaration(
        "undertow_engine_inflight_requests",
        "gauge",
        "Requests that an engine works on for this server.",
        {"engine": None},
    ),
    Declaration(
        "undertow_engine_errors_total",
        "counter",
        "What went wrong with each engine: it did not answer (kinds of undertow_upstream_errors_total), or what it "
        "answered could not be judged (kinds of undertow_guard_failures_total).",
        {"engine": None, "kind": (*UPSTREAM_KINDS, *FAILURE_KINDS)},
    ),
    Declaration(
        "undertow_engine_passed_over_total",
        "counter",
        "Requests that an engine could not take, so that another one was asked.",
        {"engine": None},
    ),
    Declaration(
        "undertow_engine_info",
        "gauge",
        "Always 1. The fingerprint of each engine's bank; empty without a handshake.",
        {"engine": None, "fingerprint": None},
    ),
    Declaration(
        "undertow_config_last_reload_success",
        "gauge",
        "1 where the settings file, as it was read last, holds; 0 where it was refused, and what held before holds on.",
    ),
    Declaration(
        "undertow_config_last_reload_timestamp_seconds",
        "gauge",
        "When the settings that hold were taken, in seconds since 1970.",
    ),
    Declaration(
        "undertow_config_info",
        "gauge",
        "Always 1. The SHA-256 of the settings file that holds, as `sha256sum` prints it; empty without a file.",
        {"sha256": None},
    ),
    Declaration("undertow_build_info", "gauge", "Always 1. The server's version.", {"version": None}),
)

METRIC_NAMES: frozenset[str] = frozenset(declaration.name for declaration in DECLARATIONS)
"""Names of the exposed families; counters with `_total`."""

SERVER_MEANINGS: Mapping[ServerFailure, str] = {
    "no_handshake": "The engine's workers have not said what they guard with, or not what the settings ask for.",
    "evidence_missing": "An answer came without evidence: the middleware is not loaded.",
    "evidence_invalid": "Evidence could not be read: the versions of server and engine differ.",
    "channel_silent": "The engine's worker gave no evidence when it was asked: its evidence channel is dead, or it is "
    "overloaded.",
    "fingerprint": "Evidence of another bank than the handshake's: the engine was restarted with another one.",
    "policy": "The engine judged in another mode than the policy sent to it.",
    "coverage": "Fewer tokens or sequences have a score than were used.",
    "unexplained_stop": "A sequence ended with the reserved token, but no record blocks it.",
    "response_invalid": "The answer is not of a shape that evidence can be held against.",
    "internal": "A fault in this server; the log has its place.",
}

FAILURE_MEANINGS: Mapping[str, str] = dict([*SERVER_MEANINGS.items(), *FAULT_MEANINGS.items()])


class Metrics:
    """What one app counts. Every combination of known labels starts at 0, so that rates see the first event."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        self._fingerprints: dict[str, str] = {}
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for declaration in DECLARATIONS:
            self._register(declaration)
        self._gauges["undertow_build_info"].labels(version).set(1)
        self._asking = Bounded()
        self._flagged = Bounded()

    def _register(self, declaration: Declaration) -> None:
        name, text, labels = declaration.name, declaration.help, tuple(declaration.labels)
        metric: Counter | Gauge | Histogram
        match declaration.kind:
            case "counter":
                metric = self._counters[name] = Counter(name, text, labels, registry=self.registry)
            case "gauge":
                metric = self._gauges[name] = Gauge(name, text, labels, registry=self.registry)
            case "histogram":
                metric = self._histograms[name] = Histogram(
                    name, text, labels, registry=self.registry, buckets=declaration.buckets
                )
        known = [values for values in declaration.labels.values() if values is not None]
        # A threshold that nobody has named yet is not 0.
        if labels and len(known) == len(labels) and declaration.kind != "gauge":
            for values in product(*known):
                metric.labels(*values)

    def expose(self) -> bytes:
        """Prometheus text format 0.0.4, without the `_created` series: they would be metrics that nobody declared."""
        return generate_latest(_Declared(self.registry))

    def requested(self, endpoint: EndpointLabel, outcome: Outcome) -> None:
        """A request ended."""
        self._counters["undertow_requests_total"].labels(endpoint, outcome).inc()
        if endpoint in GUARDED and outcome in ELIGIBLE:
            self._counters["undertow_eligible_total"].labels(endpoint).inc()
            if outcome in EVALUATED:
                self._counters["undertow_evaluated_total"].labels(endpoint).inc()

    def incident(self, action: str) -> None:
        """A request was flagged, steered or blocked."""
        self._counters["undertow_incidents_total"].labels(action).inc()

    def incidents_dropped(self, count: int) -> None:
        """They are in the log only."""
        self._counters["undertow_incidents_dropped_total"].inc(count)

    def webhook(self, result: Literal["sent", "failed", "dropped"]) -> None:
        """A message about an incident came to its end."""
        self._counters["undertow_webhook_messages_total"].labels(result).inc()

    def spooled(self, size: int) -> None:
        """Bytes that wait for the database."""
        self._gauges["undertow_incident_spool_bytes"].set(size)

    def database(self, *, up: bool) -> None:
        """Whether it took what it was given."""
        self._gauges["undertow_incident_database_up"].set(up)

    def reviewed(self, label: Label) -> None:
        """Somebody said what an incident was."""
        self._counters["undertow_review_labels_total"].labels(label).inc()

    def labelled(self, label: str, count: int) -> None:
        """How many incidents have a label now."""
        self._gauges["undertow_reviewed_incidents"].labels(label).set(count)

    def asked(self, tenant: str | None, model: str, outcome: Outcome) -> None:
        """The same request, by who asked for what. `model`: as `model_label` says."""
        labels = self._asking.of((tenant or NONE, model, outcome), kept=1)
        self._counters["undertow_tenant_requests_total"].labels(*labels).inc()

    def flagged(self, tenant: str | None, model: str, record: Record) -> None:
        """A sequence was flagged, steered or blocked."""
        if record.action not in INCIDENT_ACTIONS or record.detector is None or record.phase is None:
            return
        decided = (record.detector, record.phase)
        score = next((score for score in record.scores if (score.detector, score.phase) == decided), None)
        layer, direction = (str(score.layer), str(score.direction)) if score else (NONE, NONE)
        labels = (tenant or NONE, model, layer, direction, record.detector, record.phase, record.action)
        self._counters["undertow_flagged_total"].labels(*self._flagged.of(labels, kept=3)).inc()

    def bypassed(self, reason: BypassReason) -> None:
        """A request passed without being judged."""
        self._counters["undertow_bypass_total"].labels(reason).inc()

    def evaluation(self, seconds: float) -> None:
        """Time that judging one request took here."""
        self._histograms["undertow_evaluation_seconds"].observe(seconds)

    def held_back(self, seconds: float) -> None:
        """Time for which the beginning of a stream was kept back."""
        self._histograms["undertow_hold_back_seconds"].observe(seconds)

    def answered(self, engine: str, seconds: float) -> None:
        """Time that an engine took for one answer."""
        self._histograms["undertow_upstream_seconds"].labels(engine).observe(seconds)

    def canary(self, engine: str, *, scored: bool) -> None:
        """A request that was made only to be scored."""
        self._counters["undertow_canaries_total"].labels(engine, "scored" if scored else "failed").inc()

    def limited(self, limit: LimitName) -> None:
        """A key has used up its quota."""
        self._counters["undertow_rate_limited_total"].labels(limit).inc()

    def judged(self, records: Iterable[Record]) -> None:
        """What the last evidence of a request says."""
        for record in records:
            prompt = min(record.tokens_scored, record.prompt_tokens)
            self._counters["undertow_tokens_scored_total"].labels("prompt").inc(prompt)
            self._counters["undertow_tokens_scored_total"].labels("completion").inc(record.tokens_scored - prompt)
            for score in record.scores:
                self._scored(record, score)

    def _scored(self, record: Record, score: ScoreEvidence) -> None:
        decided = (score.detector, score.phase) == (record.detector, record.phase)
        action: Action = record.action if decided else "allow"
        self._counters["undertow_decisions_total"].labels(score.detector, score.phase, action, record.mode).inc()
        ratio = exceedance(score)
        self._histograms["undertow_exceedance"].labels(score.detector, score.phase).observe(min(ratio, _RATIO_LIMIT))
        self._gauges["undertow_threshold"].labels(score.detector, score.phase).set(score.threshold)

    def shadowed(self, policy: str, compared: Iterable[Compared]) -> None:
        """What second thresholds say of a request. `policy`: its name in the settings."""
        for each in compared:
            labels = (policy, each.detector, each.phase, each.live, each.shadow)
            self._counters["undertow_shadow_decisions_total"].labels(*labels).inc()

    def failed(self, kind: FailureKind, mode: Mode) -> None:
        """A request could not be judged."""
        self._counters["undertow_guard_failures_total"].labels(kind, mode).inc()

    def upstream_failed(self, kind: UpstreamKind) -> None:
        """The engine failed."""
        self._counters["undertow_upstream_errors_total"].labels(kind).inc()

    def added_latency(self, seconds: float) -> None:
        """Time that one request spent here."""
        self._histograms["undertow_added_latency_seconds"].observe(seconds)

    @property
    def inflight(self) -> Gauge:
        """Completion requests being worked on."""
        return self._gauges["undertow_inflight_requests"]

    def engine(
        self, name: str, ready: Callable[[], bool], inflight: Callable[[], int], breaker_open: Callable[[], bool]
    ) -> None:
        """An engine of the settings, and how it is found out how it is."""
        self._gauges["undertow_engine_ready"].labels(name).set_function(ready)
        self._gauges["undertow_engine_inflight_requests"].labels(name).set_function(inflight)
        self._gauges["undertow_engine_breaker_open"].labels(name).set_function(breaker_open)
        self._counters["undertow_engine_passed_over_total"].labels(name)
        self._histograms["undertow_upstream_seconds"].labels(name)
        for outcome in CANARIES:
            self._counters["undertow_canaries_total"].labels(name, outcome)
        for kind in (*UPSTREAM_KINDS, *FAILURE_KINDS):
            self._counters["undertow_engine_errors_total"].labels(name, kind)
        self.loaded(name, "")

    def engine_failed(self, name: str, kind: UpstreamKind | FailureKind) -> None:
        """An engine did not answer, or its answer could not be judged."""
        self._counters["undertow_engine_errors_total"].labels(name, kind).inc()

    def passed_over(self, name: str) -> None:
        """An engine could not take a request, which another one is asked."""
        self._counters["undertow_engine_passed_over_total"].labels(name).inc()

    def settings_hold(self, sha256: str, at: float) -> None:
        """Settings from a file with this digest were taken, at this moment."""
        self._gauges["undertow_config_info"].clear()
        self._gauges["undertow_config_info"].labels(sha256).set(1)
        self._gauges["undertow_config_last_reload_timestamp_seconds"].set(at)
        self._gauges["undertow_config_last_reload_success"].set(1)

    def settings_refused(self) -> None:
        """The file, as it is now, was not taken."""
        self._gauges["undertow_config_last_reload_success"].set(0)

    def loaded(self, name: str, fingerprint: str) -> None:
        """An engine's bank changed; empty where it is not known."""
        before = self._fingerprints.get(name)
        if fingerprint == before:
            return
        info = self._gauges["undertow_engine_info"]
        if before is not None:
            info.remove(name, before)
        info.labels(name, fingerprint).set(1)
        self._fingerprints[name] = fingerprint


class _Declared(Collector):
    """A registry's families without the moments of their creation."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def exceedance(score: ScoreEvidence) -> float:
    """Score over threshold, as the guard's core defines it."""
    detector: DetectorName = score.detector
    phase: Phase = score.phase
    value = Score(detector, phase, score.score, score.position, score.layer, score.direction)
    return Verdict(value, score.threshold, score.p_value).ratio


def document() -> str:
    """`docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "Generated by `python -m server.telemetry.metrics > docs/metrics.md`. `GET /metrics` on the operators' port,",
        "Prometheus text format. Scrape one process per target: counts are per process.",
        "",
        "| Metric | Type | Labels | What it says |",
        "| --- | --- | --- | --- |",
    ]
    for declaration in DECLARATIONS:
        labels = ", ".join(f"`{label}`" for label in declaration.labels) or "-"
        lines.append(f"| `{declaration.name}` | {declaration.kind} | {labels} | {declaration.help} |")
    lines += ["", "## Labels", "", "| Label | Values |", "| --- | --- |"]
    seen: dict[str, tuple[str, ...] | None] = {}
    for declaration in DECLARATIONS:
        for label, values in declaration.labels.items():
            name = f"`{label}` of `{declaration.name}`" if label == "kind" else f"`{label}`"
            seen.setdefault(name, values)
    for name, known in seen.items():
        lines.append(
            f"| {name} | {', '.join(f'`{value}`' for value in known) if known else 'few, not known beforehand'} |"
        )
    lines += ["", "## Guard failures", "", "| Kind | Meaning |", "| --- | --- |"]
    lines += [f"| `{kind}` | {meaning} |" for kind, meaning in FAILURE_MEANINGS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")  # noqa: T201
