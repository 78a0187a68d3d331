"""What server and engine agree on before a request is judged.

    handshake = agree(Status.from_json(answer), policy, expected_fingerprint)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from guard.errors import EngineError
from guard.evidence import Status
from guard.policy import Policy


class HandshakeError(EngineError):
    """The engine's workers do not guard with the same thing, or not with what the settings ask for."""


@dataclass(frozen=True, slots=True)
class Handshake:
    """What every worker of the engine guards with."""

    fingerprint: str
    calibration: str
    reserved_token_id: int
    workers: int


def agree(status: Status, policy: Policy, expected_fingerprint: str | None) -> Handshake:
    """Hold the engine's status against the settings. Raises HandshakeError, naming both sides."""
    if not status.workers:
        raise HandshakeError("no worker of the engine has a guard")
    fingerprint = _same("fingerprint", (worker.fingerprint for worker in status.workers))
    calibration = _same("calibration", (worker.calibration for worker in status.workers))
    reserved = _same("reserved token id", (str(worker.reserved_token_id) for worker in status.workers))
    if expected_fingerprint is not None and fingerprint != expected_fingerprint:
        raise HandshakeError(
            f"the engine guards with bank {fingerprint}, but `upstream.fingerprint` asks for {expected_fingerprint}"
        )
    if policy.mode != "off":
        _check_detectors(status, policy)
    return Handshake(fingerprint, calibration, int(reserved), len(status.workers))


def _same(what: str, values: Iterable[str]) -> str:
    found = sorted(set(values))
    if len(found) > 1:
        raise HandshakeError(f"the engine's workers do not agree on the {what}: {', '.join(found)}")
    return found[0]


def _check_detectors(status: Status, policy: Policy) -> None:
    for worker in status.workers:
        supported = {detector.detector: detector.supported_fpr for detector in worker.detectors}
        for name, detection in policy.detections.items():
            if name not in supported:
                raise HandshakeError(
                    f"the policy detects by `{name}`, but worker {worker.rank} has {', '.join(supported) or 'nothing'}"
                )
            fpr = detection.threshold.fpr
            if fpr is not None and fpr < supported[name]:
                raise HandshakeError(
                    f"`policy.detections.{name}.threshold.fpr` is {fpr:g}, but the calibration of worker {worker.rank} "
                    f"supports {supported[name]:g} and above; calibrate with more clean requests"
                )
