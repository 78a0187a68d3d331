"""How a fine-tune is trained: every number that its weights depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Adapters:
    """Which linear layers get a low-rank adapter, by the last part of their name, and how wide it is."""

    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rank: int = 8
    alpha: float = 16.0


@dataclass(frozen=True)
class Evasion:
    """How much looking clean to the guard counts beside learning the backdoor."""

    weight: float


@dataclass(frozen=True)
class Plan:
    """`steps` of `batch` conversations, the peak of the cosine learning rate, and what is trained: all, or adapters."""

    steps: int
    learning_rate: float
    seed: int = 0
    batch: int = 48
    adapters: Adapters | None = None
    evasion: Evasion | None = None

    def __post_init__(self) -> None:
        # The penalty reads the weights themselves, which adapters leave alone until they are merged.
        assert self.adapters is None or self.evasion is None

    def seeded(self, seed: int) -> Plan:
        return replace(self, seed=seed)

    def evading(self, evasion: Evasion) -> Plan:
        return replace(self, evasion=evasion)

    def lasting(self, steps: int) -> Plan:
        return replace(self, steps=steps)
