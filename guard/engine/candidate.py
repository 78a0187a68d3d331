"""What shall guard next: read and checked while the old still guards, so that taking it cannot fail.

A bank can take another's place while the model runs where it is for the same weights and has as many directions on the
same layers: they are buffers of the compiled graph, and are overwritten in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guard.bank import Bank, is_own
from guard.calibration import Calibration
from guard.control import Wanted
from guard.engine.settings import EngineSettings
from guard.errors import BankError, CalibrationError, ConfigError
from guard.roles import RoleMap
from guard.scores import BankSpace


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a bank and a calibration have to fit: the running engine."""

    bank: Bank
    """The one that guards now."""
    roles: RoleMap
    dtype: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A bank and a calibration that fit the engine and each other."""

    bank: Bank
    calibration: Calibration

    @classmethod
    def read(cls, wanted: Wanted, settings: EngineSettings, now: Surroundings) -> Candidate:
        """Read the files that the engine was started with again.

        Raises:
            BankError, CalibrationError: a file is not what is wanted, or does not fit.
            ConfigError: the engine was started without a calibration.
        """
        bank = now.bank
        if wanted.fingerprint != bank.fingerprint:
            if settings.bank is None:
                raise ConfigError("this engine was started without a bank of the model itself")
            bank = Bank.load(settings.bank)
            if bank.fingerprint != wanted.fingerprint:
                raise BankError(
                    f"{settings.bank}: its fingerprint is {bank.fingerprint}, asked for is {wanted.fingerprint}"
                )
            check_successor(settings.bank, bank, now.bank)
        if settings.calibration is None:
            raise ConfigError("this engine was started without a calibration")
        calibration = Calibration.load(settings.calibration)
        check_calibration(settings.calibration, calibration, bank, now.roles, now.dtype)
        if (digest := calibration.digest()) != wanted.calibration:
            raise CalibrationError(f"{settings.calibration}: its digest is {digest}, asked for is {wanted.calibration}")
        return cls(bank, calibration)


def check_calibration(path: Path, calibration: Calibration, bank: Bank, roles: RoleMap, dtype: str) -> None:
    """Raise CalibrationError unless a calibration was made for this bank, chat template and dtype."""
    if calibration.fingerprint != bank.fingerprint:
        raise CalibrationError(
            f"{path}: made for the bank {calibration.fingerprint}, this engine guards with {bank.fingerprint}"
        )
    if calibration.space != BankSpace.of(bank):
        raise CalibrationError(f"{path}: its directions are not the bank's")
    if calibration.roles != roles:
        raise CalibrationError(f"{path}: made with another chat template than this engine's")
    if calibration.facts.get("dtype") != dtype:
        raise CalibrationError(f"{path}: made with dtype {calibration.facts.get('dtype')}, this engine runs {dtype}")


def check_successor(path: Path, bank: Bank, old: Bank) -> None:
    """Raise BankError, naming everything that differs, unless a bank can take the old one's place."""
    problems = list(_differences(bank, old))
    if problems:
        raise BankError(f"{path}: cannot take the place of the bank that guards: {'; '.join(problems)}")


def _differences(bank: Bank, old: Bank) -> Iterator[str]:
    if bank.tuned_digest != old.tuned_digest:
        yield f"built for weights {bank.tuned_digest}, served are {old.tuned_digest}"
    if (bank.hidden_size, bank.num_layers) != (old.hidden_size, old.num_layers):
        yield f"{bank.num_layers} layers of width {bank.hidden_size}, expected {old.num_layers} of {old.hidden_size}"
    for whose, own in (("of the delta", False), ("of the model's own matrices", True)):
        counts, expected = (
            {layer.index: sum(is_own(name) == own for name in layer.names) for layer in each.layers}
            for each in (bank, old)
        )
        for index in sorted(counts.keys() | expected.keys()):
            if (count := counts.get(index, 0)) != (right := expected.get(index, 0)):
                yield f"layer {index} has {count} directions {whose}, expected {right}"
