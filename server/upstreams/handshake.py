"""What server and engine agree on before a request is judged.

handshake = agree(Status.from_json(answer), policies, expected_fingerprint)

keeper = HandshakeKeeper(name, upstream, lambda: policies, expected_fingerprint)
handshake = await keeper.get()
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import TypeVar

from guard.errors import EngineError, EvidenceError
from guard.evidence import COVERAGE, STATUS_PATH, VERDICTS, DetectorStatus, Evidence, Status, WorkerStatus
from guard.policy import Policy
from server.errors import UpstreamError
from server.telemetry.logs import log
from server.upstreams.upstream import Upstream

T = TypeVar("T")

_RETRY_S = 0.5
"""A failed handshake is tried again for a request after this long: a crowd of them must not storm the engine."""
_WATCH_LOST_S = 1.0
_WATCH_FOUND_S = 1.0
"""What guards can be changed while the engine runs."""
_WATCH_AGE_S = 20
"""How often the watch wakes an idle engine's workers (`STATUS_AGE` says why they are let sleep)."""
_ASKS = 3
"""How often a busy engine that does not answer in time is asked for one request's sake."""
_REMEMBERED = 8
"""Evidence is told after the fact, so that of a request that ran through a change may name what guarded before."""


class HandshakeError(EngineError):
    """The engine's workers do not guard with the same thing, or not with what the settings ask for."""


@dataclass(frozen=True, slots=True)
class Handshake:
    """What every worker of the engine guards with."""

    fingerprint: str | None
    """Of the model's own bank; None where only adapters have banks."""
    calibration: str | None
    generation: int
    reserved_token_id: int
    workers: int
    adapters: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Of every LoRA adapter's guard, bank and calibration, by the name that requests give as their model."""

    def guard_of(self, model: object) -> tuple[str, str]:
        """Bank and calibration that judge a request for this model; both empty where none do."""
        own = self.adapters.get(model) if isinstance(model, str) else None
        return own or (self.fingerprint or "", self.calibration or "")


def agree(status: Status, policies: Mapping[str, Policy], expected_fingerprint: str | None) -> Handshake:
    """Hold the engine's status against the settings. `policies`: all that requests may be judged by, each under its
    place in the settings. Raises HandshakeError, naming both sides."""
    if not status.workers:
        raise HandshakeError("no worker of the engine has a guard")
    fingerprint = _same("fingerprint", (worker.fingerprint for worker in status.workers))
    calibration = _same("calibration", (worker.calibration for worker in status.workers))
    generation = _same("generation", (worker.generation for worker in status.workers))
    reserved = _same("reserved token id", (worker.reserved_token_id for worker in status.workers))
    _same("adapters", (_named(worker) for worker in status.workers))
    adapters = {each.name: (each.fingerprint, each.calibration) for each in status.workers[0].adapters}
    _same("layers", (", ".join(map(str, worker.layers)) for worker in status.workers))
    if expected_fingerprint is not None and fingerprint != expected_fingerprint:
        raise HandshakeError(
            f"the engine guards with bank {fingerprint}, but `upstream.fingerprint` asks for {expected_fingerprint}"
        )
    check_policies(status, policies)
    if apart := status.apart(COVERAGE):
        raise HandshakeError(f"a rank of the engine did not score what another did: {'; '.join(apart)}")
    return Handshake(fingerprint, calibration, generation, reserved, len(status.workers), adapters)


def check_policies(status: Status, policies: Mapping[str, Policy]) -> None:
    """Whether the engine can judge by every policy. Raises HandshakeError, naming the first by which it cannot."""
    for place, policy in policies.items():
        if policy.mode != "off":
            _check_detectors(status, place, policy)


def _same(what: str, values: Iterable[T]) -> T:
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        raise HandshakeError(f"the engine's workers do not agree on the {what}: {', '.join(sorted(map(str, found)))}")
    return found[0]


def _named(worker: WorkerStatus) -> tuple[str, ...]:
    return tuple(f"{each.name} {each.fingerprint} {each.calibration}" for each in worker.adapters)


def _check_detectors(status: Status, place: str, policy: Policy) -> None:
    for worker in status.workers:
        if policy.steers and not worker.steering:
            raise HandshakeError(
                f"`{place}` steers, but worker {worker.rank} was started without `undertow.steering`; "
                "start it with `undertow up --steering`"
            )
        if worker.fingerprint is not None:
            check_supported(f"worker {worker.rank}", worker.detectors, place, policy)
        for adapter in worker.adapters:
            check_supported(f"worker {worker.rank} for adapter `{adapter.name}`", adapter.detectors, place, policy)


def check_supported(who: str, detectors: Iterable[DetectorStatus], place: str, policy: Policy) -> None:
    """Whether whoever has these detectors can judge by a policy. Raises HandshakeError."""
    supported = {entry.detectors: entry.supported_fpr for entry in detectors}
    for name in policy.detections:
        if (name,) not in supported:
            known = ", ".join(names[0] for names in supported if len(names) == 1)
            raise HandshakeError(f"`{place}` detects by `{name}`, but {who} has {known or 'nothing'}")
    for fpr, names in policy.shared_rates().items():
        sharing = " and ".join(names) + (" together" if len(names) > 1 else "")
        if names not in supported:
            raise HandshakeError(f"{who} says nothing of {sharing}: is it of another version?")
        if fpr < supported[names]:
            raise HandshakeError(
                f"`{place}.detections.{names[0]}.threshold.fpr` is {fpr:g}, but the calibration of "
                f"{who} supports {supported[names]:g} and above for {sharing}; calibrate with more clean "
                "requests"
            )


class HandshakeKeeper:
    """Keeps the handshake of one engine, through its restarts."""

    def __init__(
        self,
        name: str,
        upstream: Upstream,
        policies: Callable[[], Mapping[str, Policy]],
        expected_fingerprint: str | None,
        on_change: Callable[[Handshake | None], None] = lambda _: None,
    ) -> None:
        self._name = name
        self._upstream = upstream
        self._policies = policies
        self._upstream = upstream
        self._policies = policies
        self._expected = expected_fingerprint
        self._on_change = on_change
        self._lock = asyncio.Lock()
        self._tried = float("-inf")
        self._answered = float("-inf")
        """When the last question was asked that the engine answered."""
        self._agreed: deque[tuple[str, str]] = deque(maxlen=_REMEMBERED)
        self.error: EngineError | UpstreamError = UpstreamError("connect", "the engine was not asked yet")
        """Why there is none; of the last time that there was none."""
        self._apart: list[str] = []
        self.status: Status | None = None
        """What the engine said last; None where it does not answer, or was dropped."""
        self.current: Handshake | None = None
        """The last handshake; None where it failed or was dropped."""
        self.silences = 0
        """Questions for the status in a row that were not answered in time."""

    async def get(self) -> Handshake:
        """The handshake, trying again where there is none. Raises EngineError or UpstreamError."""
        if self.current is not None:
            return self.current
        async with self._lock:
            if self.current is None and monotonic() - self._tried >= _RETRY_S:
                await self._refresh()
        if self.current is None:
            raise self.error
        return self.current

    async def refresh(self) -> Handshake:
        """The handshake as it is now. Raises EngineError or UpstreamError."""
        async with self._lock:
            await self._refresh()
        if self.current is None:
            raise self.error
        return self.current

    def knows(self, evidence: Evidence) -> bool:
        """Whether evidence is of a bank and a calibration that this server has agreed on with the engine."""
        return (evidence.fingerprint, evidence.calibration) in self._agreed

    async def catch_up(self, text: bytes | None) -> None:
        """Renew the handshake where evidence names what it does not know: the guard may have just been changed."""
        if text is None or self.current is None:
            return  # where there is no handshake, `get` and `watch` are at it
        known = [*self._agreed, self.current.guard_of(None), *self.current.adapters.values()]
        if any(bank.encode() in text and calibration.encode() in text for bank, calibration in known):
            return
        try:
            evidence = Evidence.from_json(text)
        except EvidenceError:
            return  # whoever judges it says so
        began = monotonic()
        async with self._lock:
            for _ in range(_ASKS):
                # Of many requests at once the first asks; an answer to what was asked before tells nothing.
                if self.knows(evidence) or self._answered >= began:
                    return
                await self._refresh()

    def drop(self, reason: str) -> None:
        """Trust the handshake no longer: the engine went away or speaks of another bank."""
        if self.current is not None:
            self._set(None, HandshakeError(reason))
            self._tried = float("-inf")
            self.status = None

    async def watch(self) -> None:
        """Renew the handshake forever, so that a restarted engine is found without a request."""
        while True:
            async with self._lock:
                await self._refresh(_WATCH_AGE_S if self.current else 0)
            await asyncio.sleep(_WATCH_FOUND_S if self.current else _WATCH_LOST_S)

    async def _refresh(self, max_age_s: int = 0) -> None:
        asked = monotonic()
        try:
            answer = await self._upstream.status(max_age_s)
            self._answered = asked
            self.silences = 0
            if answer.status_code != 200:
                absent = answer.status_code == 404
                hint = "is Undertow's middleware loaded in the engine?" if absent else "its workers gave no status"
                raise HandshakeError(f"{STATUS_PATH} of the engine answered {answer.status_code}; {hint}")
            self.status = status = Status.from_json(answer.content)
            self._set(agree(status, self._policies(), self._expected), None)
            self._tell_apart(status.apart(VERDICTS))
        except UpstreamError as error:
            self.silences = self.silences + 1 if error.kind == "timeout" else 0
            # A busy engine is still the same engine.
            if error.kind != "timeout" or self.current is None:
                self._set(None, error)
        except (HandshakeError, EvidenceError) as error:
            self._set(None, error)
        finally:
            self._tried = monotonic()

    def _tell_apart(self, apart: list[str]) -> None:
        """Ranks that judge differently: every answer was judged in full by the first one, and something is wrong with
        the engine."""
        if apart and not self._apart:
            log(logging.ERROR, "the engine's ranks judge differently", engine=self._name, reason="; ".join(apart))
        self._apart = apart

    def _set(self, handshake: Handshake | None, error: EngineError | UpstreamError | None) -> None:
        if error is not None and (self.current is not None or str(error) != str(self.error)):
            log(logging.ERROR, "no handshake with the engine", engine=self._name, reason=str(error))
        if handshake is not None and handshake != self.current:
            log(
                logging.WARNING if self.current else logging.INFO,
                "handshake with the engine",
                engine=self._name,
                fingerprint=handshake.fingerprint,
                calibration=handshake.calibration,
                generation=handshake.generation,
                workers=handshake.workers,
                adapters=sorted(handshake.adapters),
            )
        if isinstance(error, UpstreamError):
            self.status = None
        if handshake is None:
            self._agreed.clear()  # an engine that comes back is another one
        elif (agreed := handshake.guard_of(None)) not in self._agreed:
            self._agreed.append(agreed)
        changed = handshake != self.current
        self.current = handshake
        if error is not None:
            self.error = error
        if changed:
            self._on_change(handshake)
