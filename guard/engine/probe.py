"""Reading the residual stream: one custom op per watched decoder layer, eager and compiled.

The op sees a layer's output, adds the two halves that vLLM keeps apart (`hidden` and `residual`), and writes the row's
cosines with the layer's directions, and its length, into a buffer that the worker reads after the forward pass. It also
counts itself: an op that a stale graph left out does not count, and that is noticed in the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from vllm.utils.torch_utils import direct_register_custom_op

from guard.bank import Bank
from guard.errors import UnscoredError, UnsupportedEngineError
from guard.scores import measure

LAYER_LISTS = ("model.layers", "language_model.model.layers")
"""Where vLLM's models keep their decoder layers."""


def _probe(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: torch.Tensor,
    readings: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """hidden, residual [T, H]; directions float32 [K, H]; readings float32 [capacity, K + 1] gets T rows; count int64
    [2] gets one more run and the rows of this one."""
    rows = hidden.float() if residual is None else hidden.float() + residual.float()
    readings[: rows.shape[0]] = measure(rows, directions)
    count[0] += 1
    count[1] = rows.shape[0]


def _probe_fake(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: torch.Tensor,
    readings: torch.Tensor,
    count: torch.Tensor,
) -> None:
    return None


_library = torch.library.Library("undertow", "DEF")  # type: ignore[no-untyped-call]
direct_register_custom_op(
    "probe", _probe, mutates_args=["readings", "count"], fake_impl=_probe_fake, target_lib=_library
)


@dataclass(frozen=True, slots=True)
class Readings:
    """What the probes saw of T rows."""

    coordinates: torch.Tensor
    """float32 [T, size]: cosines with the bank's directions."""
    lengths: torch.Tensor
    """float32 [T, layers]: of the residual stream after each watched layer."""


class Probes:
    """The probes of every watched layer of one model, and what they wrote in the last forward pass."""

    def __init__(self, model: nn.Module, bank: Bank, capacity: int) -> None:
        """Hook every watched layer. Must run after the weights are loaded and before the first forward pass, so that
        a compiled graph contains the op.

        Args:
            capacity: the most rows that one forward pass can have.
        """
        layers = decoder_layers(model, bank)
        device = next(model.parameters()).device
        self._readings: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        self._layers = tuple(layer.index for layer in bank.layers)
        self._runs = [0] * len(self._layers)
        for layer in bank.layers:
            # One buffer per layer and never a view of a shared one: a graph may not mutate inputs that alias.
            readings = torch.zeros(capacity, len(layer.names) + 1, device=device)
            count = torch.zeros(2, dtype=torch.int64, device=device)
            attach(layers[layer.index], layer.directions.to(device).contiguous(), readings, count)
            self._readings.append(readings)
            self._counts.append(count)

    def read(self, rows: int) -> Readings:
        """What the last forward pass left of its first `rows` rows, on the CPU.

        Raises:
            UnscoredError: a watched layer's op did not run exactly once since the last read, or saw too few rows.
        """
        counts = torch.stack(self._counts).tolist()
        # Every layer is brought up to date before any is complained of: one fault must not spoil the next steps.
        before, self._runs = self._runs, [runs for runs, _ in counts]
        for slot, (runs, seen) in enumerate(counts):
            expected = before[slot] + 1
            if runs != expected or seen < rows:
                raise UnscoredError(
                    f"layer {self._layers[slot]}: its probe ran {runs - expected + 1} times and saw {seen} rows; "
                    f"expected one run of at least {rows}"
                )
        whole = torch.cat([readings[:rows, :-1] for readings in self._readings], dim=-1).cpu()
        return Readings(whole, torch.stack([readings[:rows, -1] for readings in self._readings], dim=-1).cpu())

    def reset(self) -> None:
        """Forget runs that were not requests: profiling and warm-up."""
        self._runs = [int(count[0]) for count in self._counts]


def attach(layer: nn.Module, directions: torch.Tensor, readings: torch.Tensor, count: torch.Tensor) -> None:
    """Hook one decoder layer's output into a probe.

    The tensors become the layer's buffers, so that a graph takes them as inputs: constants would make every layer's
    graph a different one.
    """
    layer.register_buffer("undertow_directions", directions, persistent=False)
    layer.register_buffer("undertow_readings", readings, persistent=False)
    layer.register_buffer("undertow_count", count, persistent=False)
    layer.register_forward_hook(_hook)


def _hook(layer: nn.Module, _arguments: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    hidden, residual = (output, None) if isinstance(output, torch.Tensor) else (output[0], output[1])
    torch.ops.undertow.probe(hidden, residual, layer.undertow_directions, layer.undertow_readings, layer.undertow_count)


def decoder_layers(model: nn.Module, bank: Bank) -> Sequence[nn.Module]:
    """The model's decoder layers, in order.

    Raises:
        UnsupportedEngineError: the model keeps them nowhere that is known, or has another number of them than the bank.
    """
    for path in LAYER_LISTS:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            if len(found) != bank.num_layers:
                raise UnsupportedEngineError(f"the model has {len(found)} layers, the bank is for {bank.num_layers}")
            return list(found)
    raise UnsupportedEngineError(f"{type(model).__name__}: no decoder layers at {' or '.join(LAYER_LISTS)}")
