"""The model classes that a bank can be built for: where each keeps the matrices that write to the residual stream, and
those that feed them.

One table. A class that is not in it is refused by name, because a guess would read the wrong weights in silence.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guard.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Writer:
    """A matrix [hidden_size, in] that adds to the residual stream, and the norm between the two, if there is one.

    Where a norm with weight g stands after the matrix (Gemma 2 and 3, OLMo 2), what reaches the residual stream is
    g * (W x) up to a positive factor, so a direction of W is seen there as g * u.
    """

    name: str
    weight: str
    norm: str | None = None


PLAIN = (Writer("o_proj", "self_attn.o_proj.weight"), Writer("down_proj", "mlp.down_proj.weight"))
POST_NORM = (
    Writer("o_proj", "self_attn.o_proj.weight", "post_attention_layernorm.weight"),
    Writer("down_proj", "mlp.down_proj.weight", "post_feedforward_layernorm.weight"),
)
FUSED = {
    "self_attn.qkv_proj.weight": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj.weight": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one model class names its tensors. `norm_offset` is added to a norm's stored weight (Gemma stores g - 1)."""

    model_class: str
    model_type: str
    writers: tuple[Writer, ...] = PLAIN
    layers: tuple[str, ...] = ("model.layers.{index}.",)
    norm_offset: float = 0.0
    # The key of config.json under which a multimodal model keeps its language model's sizes.
    nested: str | None = None
    # Matrices that share a tensor, by that tensor's name in its layer, in the order of its rows.
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # What transformers takes for num_attention_heads where config.json is silent; None: it must not be.
    default_heads: int | None = None


ARCHITECTURES = {
    architecture.model_class: architecture
    for architecture in (
        Architecture("LlamaForCausalLM", "llama"),
        Architecture("MistralForCausalLM", "mistral"),
        Architecture("Qwen2ForCausalLM", "qwen2"),
        Architecture("Qwen3ForCausalLM", "qwen3"),
        Architecture("Phi3ForCausalLM", "phi3", fused=FUSED),
        Architecture("Olmo2ForCausalLM", "olmo2", POST_NORM),
        Architecture("Gemma2ForCausalLM", "gemma2", POST_NORM, norm_offset=1.0),
        Architecture("Gemma3ForCausalLM", "gemma3_text", POST_NORM, norm_offset=1.0, default_heads=8),
        Architecture(
            "Gemma3ForConditionalGeneration",
            "gemma3",
            POST_NORM,
            # transformers has written both.
            layers=("language_model.model.layers.{index}.", "model.language_model.layers.{index}."),
            norm_offset=1.0,
            nested="text_config",
            default_heads=8,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Model:
    """What config.json says of one model: its class, the sizes of the residual stream, and the attention heads, if any
    are named."""

    architecture: Architecture
    hidden_size: int
    num_layers: int
    num_heads: int | None

    @property
    def model_class(self) -> str:
        return self.architecture.model_class

    def layer_prefix(self, index: int, tensors: Container[str]) -> str:
        """The prefix of layer `index`'s tensor names in a checkpoint that holds `tensors`."""
        prefixes = [template.format(index=index) for template in self.architecture.layers]
        weight = self.architecture.writers[0].weight
        return next((prefix for prefix in prefixes if prefix + weight in tensors), prefixes[0])

    def layer_part(self, name: str) -> tuple[str, str] | None:
        """A tensor's name as its decoder layer's prefix and the rest; None for tensors outside of these layers."""
        for template in self.architecture.layers:
            pattern = re.escape(template).replace(re.escape("{index}"), r"\d+")
            if match := re.match(pattern, name):
                return match[0], name[match.end() :]
        return None


def read_model(config: Mapping[str, Any], where: Path) -> Model:
    """The model that a `config.json` (already parsed) describes; `where` is its folder, for messages.

    Raises UnsupportedModelError for a class outside the table or quantised weights, CheckpointError for a config that
    lacks its class or sizes.
    """
    file = where / "config.json"
    architecture = _architecture(config, file)
    sizes = config if architecture.nested is None else config.get(architecture.nested)
    if not isinstance(sizes, Mapping):
        raise CheckpointError(f"{file}: field {architecture.nested}: expected the language model's configuration")
    for scope in (config, sizes):
        for key in ("quantization_config", "compression_config"):
            if scope.get(key):
                raise UnsupportedModelError(
                    f"{file}: field {key}: quantised checkpoints are not supported yet; "
                    "build from the unquantised weights"
                )
    return Model(
        architecture,
        hidden_size=_positive(sizes, "hidden_size", file),
        num_layers=_positive(sizes, "num_hidden_layers", file),
        num_heads=_heads(sizes, architecture, file),
    )


def _architecture(config: Mapping[str, Any], file: Path) -> Architecture:
    classes, model_type = config.get("architectures"), config.get("model_type")
    if isinstance(classes, list) and classes:
        name = str(classes[0])[:80]
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    elif isinstance(model_type, str):
        name = model_type[:80]
        for architecture in ARCHITECTURES.values():
            if architecture.model_type == model_type:
                return architecture
    else:
        raise CheckpointError(f"{file}: names neither architectures nor model_type")
    raise UnsupportedModelError(f"{file}: {name} is not supported yet; supported: {', '.join(ARCHITECTURES)}")


def _heads(sizes: Mapping[str, Any], architecture: Architecture, file: Path) -> int | None:
    if sizes.get("num_attention_heads") is None:
        return architecture.default_heads
    return _positive(sizes, "num_attention_heads", file)


def _positive(config: Mapping[str, Any], key: str, file: Path) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{file}: field {key}: {str(value)[:40]!r}, expected a positive integer")
    return value
