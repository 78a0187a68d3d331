"""What clean traffic looked like to one bank on one engine, and the thresholds that follow.

Two disjoint sets of clean requests make a calibration. The first gives the shape of clean: ranges and references. The
second, held out, is scored against that shape by the very engine that will serve; its scores, one per request, phase
and detector, turn any false-positive rate into thresholds, for one detector or for several that share the rate
(`guard/conformal.py`). So one file serves every rate that its data supports, without running the model again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from guard.atomic import write_atomically
from guard.conformal import JointRanks
from guard.errors import CalibrationError
from guard.growth import Growth
from guard.roles import ROLES, RoleMap
from guard.scores import BankSpace, Density, Detector, Exceedance, Moments
from guard.verdict import DETECTORS, PHASES, DetectorName, Phase

FORMAT = 3
"""Of the file, and of what its scores mean: a change of any detector needs another number, or old thresholds would
be held against new scores."""
METADATA_KEY = "undertow"

ScoreKey = tuple[DetectorName, Phase]


@dataclass(frozen=True, slots=True)
class Shape:
    """What clean traffic looked like: ranges by role, moments of decisions by phase."""

    low: torch.Tensor
    """float32 [3, size]: smallest cosine of any clean token of a role (system, user, assistant), per coordinate; +inf
    for a role without tokens."""
    high: torch.Tensor
    """float32 [3, size]: largest; -inf for a role without tokens."""
    decisions: tuple[Moments, Moments]
    """Of `features` at decision positions, per phase (0 prompt, 1 completion)."""
    sinks: tuple[int, ...]
    """Positions that the model uses as attention sinks: their residual says nothing of the text, so no range is made
    of them and none is held against them."""

    def detectors(self, space: BankSpace) -> dict[DetectorName, Detector]:
        """Every detector that the bank has directions for, ready to score.

        Raises CalibrationError where there were too few clean decisions.
        """
        delta, own = space.of_delta(), space.of_weights()
        found: dict[DetectorName, Detector] = {}
        if len(delta):
            found["density"] = Density("density", space, self.decisions, delta)
        if len(own):
            found["intrinsic"] = Density("intrinsic", space, self.decisions, own)
        # Where no delta could be read, the paper's own variant without a base: the range of the model's own directions.
        found["exceedance"] = Exceedance(space, self.low, self.high, delta if len(delta) else own)
        return found


@dataclass(frozen=True, slots=True)
class Calibration:
    """A shape of clean for one bank, and the held-out clean scores."""

    fingerprint: str
    """Of the bank."""
    space: BankSpace
    shape: Shape
    clean: Mapping[ScoreKey, tuple[float, ...]]
    """Held-out clean scores, one per request, the requests in one order for all; -inf where a request had no token in
    the phase."""
    growth: Mapping[ScoreKey, Growth]
    """What each score may grow by beyond the lengths of calibration."""
    roles: RoleMap
    """How the model's chat template marks who speaks."""
    target_fpr: float
    """The rate that `undertow calibrate` was asked for: the default of a policy that names none."""
    facts: Mapping[str, Any]
    """Of the engine and the data: vLLM version, dtype, counts, seed, digest of the prompts."""

    @property
    def detectors(self) -> tuple[DetectorName, ...]:
        """Those that the bank has directions for."""
        return tuple(name for name in DETECTORS if (name, PHASES[0]) in self.clean)

    @property
    def held_out(self) -> int:
        """How many held-out requests there are."""
        return min(len(scores) for scores in self.clean.values())

    def ranks(self, detectors: Collection[DetectorName]) -> JointRanks[ScoreKey]:
        """Thresholds and p-values of detectors that share one false-positive rate, over both phases.

        Raises CalibrationError where the bank has no directions for one.
        """
        for name in detectors:
            if name not in self.detectors:
                raise CalibrationError(f"the bank has no directions for {name}; it serves {', '.join(self.detectors)}")
        return JointRanks({(name, phase): self.clean[name, phase] for name in sorted(detectors) for phase in PHASES})

    def smallest_rates(self) -> dict[tuple[DetectorName, ...], float]:
        """Of every combination of detectors, sorted by name: the smallest rate that the data supports for it."""
        names = sorted(self.detectors)
        groups = (group for size in range(1, len(names) + 1) for group in combinations(names, size))
        return {group: self.ranks(group).supported for group in groups}

    def digest(self) -> str:
        """sha256 over everything that decides a verdict."""
        tensors, metadata = self._parts()
        whole = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
        for name in sorted(tensors):
            whole.update(name.encode() + tensors[name].numpy().tobytes())
        return f"sha256:{whole.hexdigest()}"

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors, metadata = self._parts()
        content = save(tensors, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)})
        write_atomically(path, content, CalibrationError)

    def _parts(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {"low": self.shape.low, "high": self.shape.high}
        for phase, moments in zip(PHASES, self.shape.decisions, strict=True):
            tensors[f"mean.{phase}"], tensors[f"covariance.{phase}"] = moments.mean, moments.covariance
        for (detector, phase), scores in self.clean.items():
            tensors[f"clean.{detector}.{phase}"] = torch.tensor(scores, dtype=torch.float64)
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "layers": self.space.layers,
            "widths": self.space.widths,
            "names": self.space.names,
            "detectors": self.detectors,
            "decisions": [moments.count for moments in self.shape.decisions],
            "sinks": self.shape.sinks,
            "growth": {f"{detector}.{phase}": asdict(growth) for (detector, phase), growth in self.growth.items()},
            "roles": self.roles.to_dict(),
            "target_fpr": self.target_fpr,
            "facts": dict(self.facts),
        }
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read and check a file.

        Raises:
            CalibrationError: names the file, what was found and what was expected.
        """
        try:
            # Read whole, and never mapped: a file that is overwritten in place must not change what guards.
            content = path.read_bytes()
            tensors = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            metadata = json.loads(header["__metadata__"][METADATA_KEY])
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}: not a calibration file ({type(error).__name__}: {error})") from error
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise CalibrationError(f"{path}: not a calibration file of format {FORMAT}")
        try:
            calibration = cls._assemble(metadata, tensors)
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from error
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise CalibrationError(f"{path}: incomplete or wrong: {type(error).__name__}: {error}") from error
        calibration._check(path)
        return calibration

    @classmethod
    def _assemble(cls, metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Calibration:
        if unknown := set(metadata["detectors"]) - set(DETECTORS):
            raise ValueError(f"`detectors` has {unknown}, expected some of {DETECTORS}")
        keys = [(name, phase) for name in DETECTORS if name in metadata["detectors"] for phase in PHASES]
        counts = metadata["decisions"]
        return cls(
            fingerprint=str(metadata["fingerprint"]),
            space=_read_space(metadata),
            shape=Shape(
                tensors["low"],
                tensors["high"],
                (_read_moments(tensors, counts[0], "prompt"), _read_moments(tensors, counts[1], "completion")),
                tuple(_whole(position, 0) for position in metadata["sinks"]),
            ),
            clean={(detector, phase): _read_scores(tensors, f"clean.{detector}.{phase}") for detector, phase in keys},
            growth={
                (detector, phase): _read_growth(metadata["growth"][f"{detector}.{phase}"]) for detector, phase in keys
            },
            roles=RoleMap.from_dict(metadata["roles"]),
            target_fpr=float(metadata["target_fpr"]),
            facts=dict(metadata["facts"]),
        )

    def _check(self, path: Path) -> None:
        size, roles = self.space.size, len(ROLES)
        tensors = {"low": self.shape.low, "high": self.shape.high}
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "low": (torch.float32, (roles, size)),
            "high": (torch.float32, (roles, size)),
        }
        for phase, moments in zip(PHASES, self.shape.decisions, strict=True):
            tensors[f"mean.{phase}"], tensors[f"covariance.{phase}"] = moments.mean, moments.covariance
            expected[f"mean.{phase}"] = (torch.float64, (2 * size,))
            expected[f"covariance.{phase}"] = (torch.float64, (2 * size, 2 * size))
        for name, tensor in tensors.items():
            # A role that clean traffic did not have is an empty range, from +inf to -inf; the other way round it would
            # be one that nothing leaves.
            empty = {"low": math.inf, "high": -math.inf}.get(name)
            wrong = ~tensor.isfinite() if empty is None else ~(tensor.isfinite() | (tensor == empty))
            dtype, shape = expected[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or wrong.any():
                raise CalibrationError(
                    f"{path}: `{name}` is {tensor.dtype} {list(tensor.shape)}, expected finite {dtype} {list(shape)}"
                )
        if not (self.shape.low <= self.shape.high).all(dim=-1).any():
            raise CalibrationError(f"{path}: `low` and `high` hold no role's range")
        try:
            available = tuple(self.shape.detectors(self.space))
        except (CalibrationError, RuntimeError) as error:  # torch's own for a matrix that is no covariance
            raise CalibrationError(f"{path}: its covariance cannot be used: {error}") from error
        if set(available) != set(self.detectors):
            raise CalibrationError(f"{path}: scores of {self.detectors}, but its directions serve {available}")
        counts = {f"clean.{detector}.{phase}": len(scores) for (detector, phase), scores in self.clean.items()}
        if len(set(counts.values())) != 1:
            raise CalibrationError(f"{path}: every score must be of the same requests, found {counts}")
        for (detector, phase), scores in self.clean.items():
            if any(math.isnan(score) or score == math.inf for score in scores):
                raise CalibrationError(f"{path}: `clean.{detector}.{phase}` must be numbers or -inf")
        if not 0 < self.target_fpr < 1:
            raise CalibrationError(f"{path}: `target_fpr` is {self.target_fpr}, expected a rate between 0 and 1")


def _read_space(metadata: Mapping[str, Any]) -> BankSpace:
    space = BankSpace(tuple(metadata["layers"]), tuple(metadata["widths"]), tuple(metadata["names"]))
    if not all(type(number) is int for number in (*space.layers, *space.widths)) or min(space.widths) < 1:
        raise TypeError("`layers` and `widths` must be whole numbers, at least one direction per layer")
    if not all(isinstance(name, str) for name in space.names):
        raise TypeError("`names` must be texts")
    if len(space.layers) != len(space.widths) or space.size != len(space.names):
        raise ValueError("`layers`, `widths` and `names` do not fit each other")
    return space


def _read_moments(tensors: Mapping[str, torch.Tensor], count: object, phase: Phase) -> Moments:
    return Moments(_whole(count, 1), tensors[f"mean.{phase}"], tensors[f"covariance.{phase}"])


def _whole(value: object, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r}, expected a whole number from {least}")
    return value


def _read_growth(values: Mapping[str, Any]) -> Growth:
    tokens, scale = values["tokens"], values["scale"]
    if type(tokens) is not int or tokens < 1 or not isinstance(scale, float) or not 0 <= scale < math.inf:
        raise ValueError("`growth` needs `tokens` from 1 and a `scale` from 0")
    return Growth(tokens, scale)


def _read_scores(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[float, ...]:
    scores = tensors[name]
    if scores.dtype != torch.float64 or scores.ndim != 1:
        raise ValueError(f"`{name}` is {scores.dtype} with {scores.ndim} dimensions, expected float64 with 1")
    return tuple(scores.tolist())
