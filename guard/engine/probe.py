"""Reading the residual stream: a custom op wherever a watched layer begins or ends, eager and compiled.

The op sees what flows from one decoder layer to the next, adds the two halves that vLLM keeps apart (`hidden` and
`residual`), and writes projections and lengths into buffers that the worker reads after the forward pass: along the
directions of the layer that ends there, and of the one that begins. It also counts itself: an op that a stale graph
left out does not count, and that is noticed in the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from guard.bank import Bank
from guard.engine.kernels import reader
from guard.errors import UnscoredError, UnsupportedEngineError
from guard.scores import BankSpace, measure

LAYER_LISTS = ("model.layers", "language_model.model.layers")
"""Where vLLM's models keep their decoder layers."""


def _read_fake(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: torch.Tensor,
    projections: torch.Tensor,
    lengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    return None


_library = torch.library.Library("undertow", "DEF")  # type: ignore[no-untyped-call]
direct_register_custom_op(
    "read",
    reader(current_platform.device_type),
    mutates_args=["projections", "lengths", "count"],
    fake_impl=_read_fake,
    target_lib=_library,
)


@dataclass(frozen=True, slots=True)
class Readings:
    """What the probes saw of T rows."""

    coordinates: torch.Tensor
    """float32 [T, size]: cosines with the bank's directions."""
    written: torch.Tensor
    """float32 [T, size]: what each watched layer wrote along its directions."""
    lengths: torch.Tensor
    """float32 [T, layers]: of the residual stream after each watched layer."""


@dataclass(frozen=True, slots=True)
class _Station:
    """Between two decoder layers."""

    before: int
    """How many layers lie before it."""
    ends: int
    """Directions of the layer that ends here; 0 where it is not watched."""
    begins: int
    """Of the one that begins here."""
    projections: torch.Tensor
    lengths: torch.Tensor
    count: torch.Tensor


class Probes:
    """The ops around every watched layer of one model, and what they wrote in the last forward pass."""

    def __init__(self, model: nn.Module, bank: Bank, capacity: int) -> None:
        """Hook every watched layer. Must run after the weights are loaded and before the first forward pass, so that
        a compiled graph contains the ops.

        Args:
            capacity: the most rows that one forward pass can have.
        """
        layers = decoder_layers(model, bank)
        device = next(model.parameters()).device
        watched = {layer.index: layer.directions.to(device) for layer in bank.layers}
        none = torch.zeros(0, bank.hidden_size, device=device)
        self._slots = BankSpace.of(bank).layer_slot()
        self._stations: list[_Station] = []
        for place in sorted({index + side for index in watched for side in (0, 1)}):
            ending, beginning = watched.get(place - 1, none), watched.get(place, none)
            # One buffer per place and never a view of a shared one: a graph may not mutate inputs that alias.
            station = _Station(
                place,
                len(ending),
                len(beginning),
                torch.zeros(capacity, len(ending) + len(beginning), device=device),
                torch.zeros(capacity, device=device),
                torch.zeros(2, dtype=torch.int64, device=device),
            )
            attach(layers, station, torch.cat([ending, beginning]).contiguous())
            self._stations.append(station)
        self._counts = [(0, 0)] * len(self._stations)

    def read(self, rows: int) -> Readings:
        """What the last forward pass left of its first `rows` rows, on the CPU.

        Raises:
            UnscoredError: an op did not run exactly once since the last read, or saw too few rows.
        """
        counts = self._counted()
        # Every place is brought up to date before any is complained of: one fault must not spoil the next steps.
        before, self._counts = self._counts, counts
        for station, (runs, seen), (old_runs, old_seen) in zip(self._stations, counts, before, strict=True):
            if runs - old_runs != 1 or seen - old_seen < rows:
                raise UnscoredError(
                    f"{_place(station)}: its probe ran {runs - old_runs} times and saw {seen - old_seen} rows; "
                    f"expected one run of at least {rows}"
                )
        parts = [torch.split(each.projections[:rows], [each.ends, each.begins], dim=-1) for each in self._stations]
        after, entered = (torch.cat(side, dim=-1).cpu() for side in zip(*parts, strict=True))
        lengths = torch.stack([each.lengths[:rows] for each in self._stations if each.ends], dim=-1).cpu()
        return Readings(*measure(after, entered, lengths, self._slots))

    def reset(self) -> None:
        """Forget runs that were not requests: profiling and warm-up."""
        self._counts = self._counted()

    def _counted(self) -> list[tuple[int, int]]:
        return [(runs, seen) for runs, seen in torch.stack([each.count for each in self._stations]).tolist()]


def _place(station: _Station) -> str:
    return f"layer {station.before - 1}" if station.ends else f"before layer {station.before}"


def attach(layers: Sequence[nn.Module], station: _Station, directions: torch.Tensor) -> None:
    """Hook the op in where `station` is.

    Its tensors become a layer's buffers, so that a graph takes them as inputs: constants would make every layer's graph
    a different one.
    """
    first = station.before == 0
    layer = layers[max(0, station.before - 1)]
    name = "undertow_input" if first else "undertow"
    for kind in ("projections", "lengths", "count"):
        layer.register_buffer(f"{name}_{kind}", getattr(station, kind), persistent=False)
    layer.register_buffer(f"{name}_directions", directions, persistent=False)
    if first:
        layer.register_forward_pre_hook(_before, with_kwargs=True)
    else:
        layer.register_forward_hook(_after)


def _before(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    # vLLM's decoder layers take (positions, hidden_states, residual), by place or by name.
    hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[1]
    residual = keywords["residual"] if "residual" in keywords else arguments[2]
    torch.ops.undertow.read(
        hidden,
        residual,
        layer.undertow_input_directions,
        layer.undertow_input_projections,
        layer.undertow_input_lengths,
        layer.undertow_input_count,
    )


def _after(layer: nn.Module, _arguments: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    hidden, residual = (output, None) if isinstance(output, torch.Tensor) else (output[0], output[1])
    torch.ops.undertow.read(
        hidden,
        residual,
        layer.undertow_directions,
        layer.undertow_projections,
        layer.undertow_lengths,
        layer.undertow_count,
    )


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
