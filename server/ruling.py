"""What one request is judged by. The settings give one to every request; nothing of a client's body changes it."""

from __future__ import annotations

from dataclasses import dataclass

from guard.policy import Mode, Policy


@dataclass(frozen=True, slots=True)
class Ruling:
    """The policy in force for one request."""

    policy: Policy
    """What the engine judges by."""

    @property
    def mode(self) -> Mode:
        return self.policy.mode

    @property
    def enforcing(self) -> bool:
        """What cannot be judged does not pass."""
        return self.policy.mode == "enforce"
