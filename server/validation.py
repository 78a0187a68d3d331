"""What can be known of settings before a server runs with them: everything that they name is opened and held together.

problems, notes = validate(settings, environ, [CalibrationFile.load(path)])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from guard.errors import ConfigError, EngineError
from guard.evidence import DetectorStatus
from server.admin.access import operator_token
from server.config.settings import Settings
from server.in_force import InForce
from server.incidents.database import Database
from server.incidents.webhooks import targets
from server.upstreams.handshake import check_supported
from server.upstreams.upstream import engine_key


@dataclass(frozen=True, slots=True)
class CalibrationFile:
    """What a policy's rates are held against, without an engine."""

    path: Path
    fingerprint: str
    """Of its bank."""
    detectors: tuple[DetectorStatus, ...]

    @classmethod
    def load(cls, path: Path) -> CalibrationFile:
        """Needs torch. Raises CalibrationError."""
        from guard.calibration import Calibration

        calibration = Calibration.load(path)
        rates = calibration.smallest_rates().items()
        detectors = tuple(DetectorStatus(detectors=group, supported_fpr=rate) for group, rate in rates)
        return cls(path, calibration.fingerprint, detectors)


class Found(NamedTuple):
    """One line each."""

    problems: list[str]
    """With these a server does not start, or would not judge."""
    notes: list[str]
    """What may be meant, and hardly is."""


def validate(settings: Settings, environ: Mapping[str, str], calibrations: Iterable[CalibrationFile] = ()) -> Found:
    """Hold settings against the environment, the files that they name, and calibrations."""
    problems: list[str] = []
    for name, engine in settings.engines.items():
        with _told(problems):
            engine_key(name, engine, environ)
    with _told(problems):
        operator_token(settings.admin, environ)
    with _told(problems):
        Database.of(settings.incidents, environ)
    with _told(problems):
        targets(settings.webhooks, environ)
    try:
        force = InForce.of(settings, environ)
    except ConfigError as error:
        return Found([*problems, str(error)], [])
    for calibration in calibrations:
        for place, policy in force.rulings.in_force().items():
            if policy.mode != "off":
                with _told(problems):
                    check_supported(str(calibration.path), calibration.detectors, place, policy)
        problems += _other_bank(settings, calibration)
    return Found(problems, list(_unused(settings, force)))


@contextmanager
def _told(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except (ConfigError, EngineError) as error:
        problems.append(str(error))


def _other_bank(settings: Settings, calibration: CalibrationFile) -> Iterator[str]:
    pinned = {engine.fingerprint for engine in settings.engines.values()}
    if None not in pinned and calibration.fingerprint not in pinned:
        named = ", ".join(sorted(filter(None, pinned)))
        yield f"{calibration.path}: is of bank {calibration.fingerprint}; `fingerprint` asks for {named}"


def _unused(settings: Settings, force: InForce) -> Iterator[str]:
    """What no request ever meets."""
    asked_for = {rule.policy for rule in settings.rules}
    for name in settings.policies:
        if name not in asked_for:
            yield f"no rule asks for `policies.{name}`"
    for index, rule in enumerate(settings.rules):
        tenant = rule.match.tenant
        if tenant is not None and tenant not in force.door.tenants:
            why = "has no key" if force.door.locked else "nobody has without `access.keys_file`"
            yield f"`rules.{index}` is for the tenant {tenant}, which {why}"
    for tenant in settings.access.tenants:
        if tenant not in force.door.tenants:
            yield f"`access.tenants.{tenant}` has no key"
