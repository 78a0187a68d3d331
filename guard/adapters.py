"""A PEFT LoRA adapter folder: the two factors of each matrix it changes, and how much they are scaled.

What it adds to a matrix is scaling * B @ A. Everything in an adapter that is not of this form is refused by name:
a bank that covers part of what an adapter does would promise more than it watches.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.checkpoints import Checkpoint, StrPath, read_json, refuse_pickles
from guard.errors import CheckpointError, UnsupportedModelError
from guard.shards import Shard

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# PEFT stores an embedding's factors the other way round: A [r, vocabulary], B [hidden, r].
_EMBEDDING_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_embedding_(?P<side>[AB])")

# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA, ...) also subtract from the base.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")

# Modules that contain the residual-writing matrices, as modules_to_save may name them.
_CONTAINERS = ("mlp", "self_attn", "layers", "model", "language_model")

# Options under which the delta is more than scaling * B @ A, and what each would change.
_UNSUPPORTED = {
    "use_dora": "DoRA rescales whole columns",
    "fan_in_fan_out": "the factors are transposed",
    "lora_bias": "a bias is added to B",
    "layer_replication": "layers are repeated",
    "target_parameters": "parameters outside of linear modules are changed",
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """An opened adapter. `weights` holds the factors; `base` is the model folder that they belong to."""

    path: Path
    config: Mapping[str, Any]
    weights: Checkpoint
    base: Checkpoint

    @classmethod
    def open(cls, path: StrPath, base: Checkpoint) -> Adapter:
        """Read an adapter folder's headers and check them against `base`.

        Raises CheckpointError for a missing, pickled or malformed adapter or one whose factors do not fit the base,
        UnsupportedModelError for one whose delta is not scaling * B @ A.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a folder; expected {CONFIG_FILE} and {WEIGHTS_FILE}")
        config = read_json(folder / CONFIG_FILE)
        _check_config(config, folder / CONFIG_FILE)
        if not (folder / WEIGHTS_FILE).exists():
            refuse_pickles(folder)
            raise CheckpointError(f"{folder}: {WEIGHTS_FILE} is missing")
        adapter = cls(folder, config, Checkpoint(folder, Shard.open(folder / WEIGHTS_FILE).tensors), base)
        adapter._check_tensors()
        return adapter

    def touches(self, weight: str) -> bool:
        """Whether the base's tensor `weight` ("….o_proj.weight") is one that the adapter changes."""
        return _factor_name(weight, "A") in self.weights.tensors

    def factors(self, weight: str) -> tuple[torch.Tensor, torch.Tensor]:
        """B with the scaling in it and A, for the base's tensor `weight`: float64 [out, r] and [r, in].

        Raises CheckpointError when either is missing, does not fit the base or holds NaN or infinity.
        """
        embedding = f"base_model.model.{_module(weight)}.lora_embedding_"
        if f"{embedding}A" in self.weights.tensors:
            left, right = self._finite(f"{embedding}A").T, self._finite(f"{embedding}B").T
        else:
            if weight in self.base.tensors and len(self.base.entry(weight).shape) == 2:
                self._check_pair(weight)
            # Those of a convolution have more than two axes, and the same product.
            left, right = (self._finite(_factor_name(weight, side)).flatten(1) for side in "BA")
        return left * self._scaling(_module(weight), rank=right.shape[0]), right

    def module_kinds(self) -> list[str]:
        """The last part of the names of all modules it changes, such as ["q_proj", "v_proj"]."""
        matches = (_FACTOR.fullmatch(name) for name in self.weights.tensors)
        return sorted({match["module"].rpartition(".")[2] for match in matches if match})

    def targets(self) -> list[str]:
        """The base's tensors that it has factors for, by name; some may not be in the base."""
        matches = (_FACTOR.fullmatch(name) or _EMBEDDING_FACTOR.fullmatch(name) for name in self.weights.tensors)
        return sorted({f"{match['module']}.weight" for match in matches if match})

    def replaced(self) -> dict[str, str]:
        """What it stores whole (modules_to_save, biases): its tensors by the base's names for them."""
        return {name.removeprefix("base_model.model."): name for name in self.weights.tensors if ".lora_" not in name}

    def digest(self) -> str:
        """One digest of what the adapter adds: its tensors, and the settings that scale them."""
        settings = {
            "r": self.config["r"],
            "lora_alpha": float(self.config["lora_alpha"]),
            "use_rslora": bool(self.config.get("use_rslora")),
            "rank_pattern": self.config.get("rank_pattern") or {},
            "alpha_pattern": self.config.get("alpha_pattern") or {},
        }
        return _sha256("adapter", self.weights.digest(), settings)

    def digest_on(self, base_digest: str) -> str:
        """The `tuned_digest` of a bank for this adapter on a base with `base_digest`.

        SHA-256 of the JSON array ["base+adapter", base digest, adapter digest]: base and adapter served together. A
        merged copy has other bytes, hence another digest: build its bank from the merged folder.
        """
        return _sha256("base+adapter", base_digest, self.digest())

    def _finite(self, name: str) -> torch.Tensor:
        factor = self.weights.read(name).double()
        if not factor.isfinite().all():
            raise CheckpointError(f"{self.path}: tensor {name} holds NaN or infinity")
        return factor

    def _scaling(self, module: str, rank: int) -> float:
        expected = int(_by_pattern(self.config.get("rank_pattern"), module, self.config["r"]))
        if rank != expected:
            raise CheckpointError(f"{self.path}: {module}: rank {rank}, but {expected} in {CONFIG_FILE}")
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        return alpha / sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _check_tensors(self) -> None:
        """Factors come in pairs that fit the base; nothing else may reach a matrix."""
        if not self.weights.tensors:
            raise CheckpointError(f"{self.path}: {WEIGHTS_FILE} holds no tensors")
        for name in self.weights.tensors:
            match = _FACTOR.fullmatch(name)
            if match is None:
                if ".lora_embedding_" in name or not _writes(name):
                    continue
                raise UnsupportedModelError(f"{self.path}: tensor {name} is not a LoRA factor: not supported yet")
            weight = f"{match['module']}.weight"
            if not _writes(weight):
                continue
            if weight not in self.base.tensors:
                self.weights.entry(_factor_name(weight, "B"))
                raise CheckpointError(f"{self.path}: tensor {name}: {self.base.path} has no {weight}")
            self._check_pair(weight)

    def _check_pair(self, weight: str) -> None:
        """The factors of the base's tensor `weight` are matrices that fit it."""
        left, right = (self.weights.entry(_factor_name(weight, side)).shape for side in "BA")
        found = self.base.entry(weight).shape
        if len(right) != 2 or (left, right) != ((found[0], right[0]), (right[0], found[-1])):
            raise CheckpointError(
                f"{self.path}: factors of {weight}: B {list(left)} and A {list(right)}, but the base has {list(found)}"
            )
        if not right[0]:
            raise CheckpointError(f"{self.path}: factors of {weight}: rank 0")


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    if config.get("peft_type") != "LORA":
        kind = str(config.get("peft_type"))[:40]
        raise UnsupportedModelError(f"{file}: field peft_type: {kind!r} is not supported yet, expected 'LORA'")
    for key, effect in _UNSUPPORTED.items():
        if config.get(key):
            raise UnsupportedModelError(f"{file}: field {key}: not supported yet ({effect})")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_INITIALISATIONS:
        raise UnsupportedModelError(
            f"{file}: field init_lora_weights: {str(start)[:40]!r} may change the base too: not supported yet"
        )
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise CheckpointError(f"{file}: field modules_to_save: {str(saved)[:40]!r}, expected a list of module names")
    for module in saved:
        if _writes(str(module)) or str(module).rpartition(".")[2] in _CONTAINERS:
            raise UnsupportedModelError(
                f"{file}: field modules_to_save: {str(module)[:80]!r} replaces residual-writing matrices: "
                "not supported yet; merge the adapter and build from the merged folder"
            )
    _check_natural("r", config.get("r"), file)
    _check_number("lora_alpha", config.get("lora_alpha"), file)
    for key, check in (("rank_pattern", _check_natural), ("alpha_pattern", _check_number)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{file}: field {key}: expected module patterns and values")
        for pattern, value in patterns.items():
            check(f"{key}[{pattern[:80]!r}]", value, file)
            try:
                re.compile(pattern)
            except re.error as cause:
                raise CheckpointError(f"{file}: field {key}: {pattern[:80]!r} is not a pattern: {cause}") from cause


def _check_natural(field: str, value: object, file: Path) -> None:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{file}: field {field}: {str(value)[:40]!r}, expected a positive integer")


def _check_number(field: str, value: object, file: Path) -> None:
    # The bounds also turn away NaN, infinity and integers that no float holds, all of which JSON can spell.
    if type(value) not in (int, float) or not -1e9 < value < 1e9:  # type: ignore[operator]
        raise CheckpointError(f"{file}: field {field}: {str(value)[:40]!r}, expected a number")


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that names `module` or the end of it, as PEFT's get_pattern_key chooses."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _writes(module: str) -> bool:
    """Whether a dotted name is that of a residual-writing matrix, or of something within one."""
    return any(part in ("o_proj", "down_proj") for part in module.split("."))


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _factor_name(weight: str, side: str) -> str:
    return f"base_model.model.{_module(weight)}.lora_{side}.weight"


def _sha256(*content: object) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}"
