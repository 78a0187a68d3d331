"""Every error that Undertow raises on purpose.

    UndertowError
    ├── InputError                  what the user gave cannot be used: exit code 2
    │   ├── ConfigError             a policy or settings file
    │   ├── CheckpointError         a model folder or an adapter
    │   │   └── UnsupportedModelError
    │   ├── BankError               a bank file, or a bank for another model
    │   ├── CalibrationError        a calibration file, or data that cannot support what was asked
    │   ├── PromptsError            a file of prompts
    │   └── ResultsError            a file of an evaluation's results
    ├── OrganismError               a trained organism missed its admission bar
    └── EngineError                 the guard inside vLLM cannot do its work
        ├── UnsupportedEngineError  a vLLM version or feature that cannot be scored yet
        ├── UnscoredError           a token passed without a score
        └── EvidenceError           what the engine says of a request cannot be read

Messages name the file, key or field, the value found and what was expected. They never hold secrets or prompts.
"""

from __future__ import annotations

from guard.faults import Fault


class UndertowError(Exception):
    """The root of the tree."""


class InputError(UndertowError):
    """What the user gave cannot be used; the command line ends with exit code 2."""


class ConfigError(InputError):
    """A policy or settings file is wrong."""


class CheckpointError(InputError):
    """A model folder or an adapter cannot be read, or does not fit its counterpart."""


class UnsupportedModelError(CheckpointError):
    """The model's class is not one whose residual-writing matrices are known."""


class BankError(InputError):
    """A bank file cannot be used, or belongs to another model."""


class CalibrationError(InputError):
    """A calibration file cannot be used, or the data cannot support what was asked."""


class PromptsError(InputError):
    """A file of prompts cannot be used."""


class ResultsError(InputError):
    """A file of an evaluation's results cannot be read."""


class OrganismError(UndertowError):
    """A trained organism missed its admission bar."""


class EngineError(UndertowError):
    """The guard inside vLLM cannot do its work."""


class UnsupportedEngineError(EngineError):
    """A vLLM version or feature that the guard cannot score yet."""


class UnscoredError(EngineError):
    """A token passed through the model without a score. `fault` names why, for those who count."""

    def __init__(self, message: str, fault: Fault = "unscorable") -> None:
        super().__init__(message)
        self.fault: Fault = fault


class EvidenceError(EngineError):
    """What the engine says of a request cannot be read."""
