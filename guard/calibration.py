"""What clean traffic looked like to one bank on one engine, and the thresholds that follow.

Two disjoint sets of clean requests make a calibration. The first gives the shape of clean: ranges and references. The
second, held out, is scored against that shape by the very engine that will serve; its scores, one per request, phase
and detector, turn any false-positive rate into a threshold by split conformal prediction (Vovk, Gammerman and Shafer,
2005): the k-th largest of n held-out scores, k = floor(rate * (n + 1)), is exceeded by a new clean request with
probability at most rate. A request is judged in two phases, so each phase gets half of the rate.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from guard.atomic import write_atomically
from guard.errors import CalibrationError
from guard.scores import NEAREST, BankSpace, Density, Detector, Exceedance, density_scales
from guard.verdict import DETECTORS, PHASES, DetectorName, Phase

FORMAT = 1
"""Of the file, and of what its scores mean: a change of either detector needs another number, or old thresholds would
be held against new scores."""
METADATA_KEY = "undertow"


@dataclass(frozen=True, slots=True)
class Shape:
    """What clean traffic looked like, by phase (0 prompt, 1 completion)."""

    low: torch.Tensor
    """float32 [2, size]: smallest cosine of any clean token, per coordinate."""
    high: torch.Tensor
    """float32 [2, size]: largest."""
    references: tuple[torch.Tensor, torch.Tensor]
    """float32 [N, size] per phase: coordinates of clean tokens at decision positions."""
    scales: torch.Tensor
    """float32 [2, layers]: what distance is usual between them."""

    @classmethod
    def fit(
        cls,
        space: BankSpace,
        low: torch.Tensor,
        high: torch.Tensor,
        references: tuple[torch.Tensor, torch.Tensor],
    ) -> Shape:
        """Raises CalibrationError where a phase holds too few clean tokens to be a reference."""
        for phase, rows in zip(PHASES, references, strict=True):
            if len(rows) <= NEAREST:
                raise CalibrationError(
                    f"the clean prompts gave {len(rows)} {phase} references; more than {NEAREST} needed"
                )
        scales = torch.stack([density_scales(space, rows) for rows in references])
        return cls(low, high, references, scales)

    def detectors(self, space: BankSpace) -> dict[DetectorName, Detector]:
        """Every detector, ready to score."""
        return {
            "density": Density(space, self.references, self.scales),
            "exceedance": Exceedance(space, self.low, self.high),
        }


@dataclass(frozen=True, slots=True)
class Calibration:
    """A shape of clean for one bank, and the held-out clean scores."""

    fingerprint: str
    """Of the bank."""
    space: BankSpace
    shape: Shape
    clean: Mapping[tuple[DetectorName, Phase], tuple[float, ...]]
    """Held-out clean scores, one per request, ascending; -inf where a request had no token in the phase."""
    target_fpr: float
    """The rate that `undertow calibrate` was asked for: the default of a policy that names none."""
    facts: Mapping[str, Any]
    """Of the engine and the data: vLLM version, dtype, counts, seed, digest of the prompts."""

    def supported_fpr(self, detector: DetectorName) -> float:
        """The smallest rate per request that a threshold can keep: 2 / (n + 1)."""
        return supported_fpr(min(len(self.clean[detector, phase]) for phase in PHASES))

    def threshold(self, detector: DetectorName, phase: Phase, fpr: float) -> float:
        """The score that a clean request exceeds in this phase with probability at most `fpr` / 2.

        Raises:
            CalibrationError: too few held-out requests for so small a rate.
        """
        clean = self.clean[detector, phase]
        rank = conformal_rank(len(clean), fpr)
        if rank < 1:
            raise CalibrationError(
                f"a false-positive rate of {fpr:g} for {detector} needs {needed_requests(fpr)} held-out clean "
                f"requests; this calibration has {len(clean)} and supports {supported_fpr(len(clean)):.4g} or more"
            )
        return clean[len(clean) - rank]

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
        tensors = {"low": self.shape.low, "high": self.shape.high, "scales": self.shape.scales}
        for phase, rows in zip(PHASES, self.shape.references, strict=True):
            tensors[f"references.{phase}"] = rows
        for (detector, phase), scores in self.clean.items():
            tensors[f"clean.{detector}.{phase}"] = torch.tensor(scores, dtype=torch.float64)
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "layers": self.space.layers,
            "widths": self.space.widths,
            "names": self.space.names,
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
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})[METADATA_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}: not a calibration file ({type(error).__name__}: {error})") from error
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise CalibrationError(f"{path}: not a calibration file of format {FORMAT}")
        try:
            calibration = cls._assemble(metadata, tensors)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CalibrationError(f"{path}: incomplete or wrong: {type(error).__name__}: {error}") from error
        calibration._check(path)
        return calibration

    @classmethod
    def _assemble(cls, metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Calibration:
        return cls(
            fingerprint=str(metadata["fingerprint"]),
            space=_read_space(metadata),
            shape=Shape(
                tensors["low"],
                tensors["high"],
                (tensors["references.prompt"], tensors["references.completion"]),
                tensors["scales"],
            ),
            clean={
                (detector, phase): _read_scores(tensors, f"clean.{detector}.{phase}")
                for detector in DETECTORS
                for phase in PHASES
            },
            target_fpr=float(metadata["target_fpr"]),
            facts=dict(metadata["facts"]),
        )

    def _check(self, path: Path) -> None:
        size, layers = self.space.size, len(self.space.layers)
        tensors = {"low": self.shape.low, "high": self.shape.high, "scales": self.shape.scales}
        expected = {"low": (2, size), "high": (2, size), "scales": (2, layers)}
        for phase, rows in zip(PHASES, self.shape.references, strict=True):
            tensors[f"references.{phase}"] = rows
            expected[f"references.{phase}"] = (max(len(rows), NEAREST + 1), size)
        for name, tensor in tensors.items():
            found = tuple(tensor.shape)
            if found != expected[name] or tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise CalibrationError(
                    f"{path}: `{name}` is {tensor.dtype} {list(found)}, expected finite float32 {list(expected[name])}"
                )
        if not (self.shape.scales > 0).all():
            raise CalibrationError(f"{path}: `scales` must be positive")
        for (detector, phase), scores in self.clean.items():
            if any(math.isnan(score) for score in scores) or list(scores) != sorted(scores):
                raise CalibrationError(f"{path}: `clean.{detector}.{phase}` must be ascending, without NaN")
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


def _read_scores(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[float, ...]:
    scores = tensors[name]
    if scores.dtype != torch.float64 or scores.ndim != 1:
        raise ValueError(f"`{name}` is {scores.dtype} with {scores.ndim} dimensions, expected float64 with 1")
    return tuple(scores.tolist())


def conformal_rank(count: int, fpr: float) -> int:
    """Which of `count` held-out scores, counted from the largest, is the threshold of one phase. 0: none is."""
    # 1e-9: a rate written as 2/(n+1) must not lose its rank to rounding.
    return math.floor(fpr / len(PHASES) * (count + 1) + 1e-9)


def supported_fpr(count: int) -> float:
    """The smallest rate per request that `count` held-out requests can keep."""
    return min(1.0, len(PHASES) / (count + 1))


def needed_requests(fpr: float) -> int:
    """How many held-out requests a rate needs."""
    return math.ceil(len(PHASES) / fpr - 1e-9) - 1
