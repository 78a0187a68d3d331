"""Reading the residual stream: a custom op wherever a watched layer begins or ends, eager and compiled.

The op sees what flows from one decoder layer to the next, adds the two halves that vLLM keeps apart (`hidden` and
`residual`), and writes what detectors read of it into buffers that the worker takes after the forward pass. Most
detectors read only rows whose logits are sampled, so only these are read in full; the worker says which they are
before each pass. The op also counts itself: an op that a stale graph left out does not count, and that is noticed in
the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from guard.bank import Bank
from guard.engine.kernels import ops
from guard.engine.readings import Readings
from guard.errors import UnscoredError, UnsupportedEngineError
from guard.scores import BankSpace

LAYER_LISTS = ("model.layers", "language_model.model.layers")
"""Where vLLM's models keep their decoder layers."""


@dataclass(frozen=True, slots=True)
class _Station:
    """Between two decoder layers. What the op does with these is said in `kernels/reference.py`."""

    before: int
    """How many layers lie before it."""
    directions: torch.Tensor
    """float32 [K, H], of the layer that ends here, those that are read at every token first; K is 0 where it is not
    watched."""
    cosines: torch.Tensor
    full: torch.Tensor
    lengths: torch.Tensor
    count: torch.Tensor

    @property
    def ends(self) -> bool:
        """Whether a watched layer ends here."""
        return len(self.directions) > 0


class Probes:
    """The ops around every watched layer of one model, and what they wrote in the last forward pass."""

    def __init__(self, model: nn.Module, bank: Bank, capacity: int) -> None:
        """Hook every watched layer. Must run after the weights are loaded and before the first forward pass, so that
        a compiled graph contains the ops.

        Args:
            capacity: the most rows that one forward pass can have.
        """
        self.kernels = ops.install()
        layers = decoder_layers(model, bank)
        device = next(model.parameters()).device
        watched = {
            layer.index: (layer.directions, every) for layer, every in zip(bank.layers, _every(bank), strict=True)
        }
        none = (torch.zeros(0, bank.hidden_size), 0)
        # Which rows to read in full, and their residual at the last place: every op reads the one and moves the other.
        self._decisions = torch.zeros(capacity + 1, dtype=torch.int64, device=device)
        self._previous = torch.zeros(capacity, bank.hidden_size, device=device)
        self._expected = torch.zeros(0, dtype=torch.int64)
        self._stations: list[_Station] = []
        for place in sorted({index + side for index in watched for side in (0, 1)}):
            directions, every = watched.get(place - 1, none)
            # One buffer per place and never a view of a shared one: a graph may not mutate inputs that alias.
            station = _Station(
                place,
                directions.to(device, copy=True).contiguous(),
                torch.zeros(capacity, every, device=device),
                torch.zeros(2, capacity, len(directions), device=device),
                torch.zeros(capacity, 1, device=device),
                torch.zeros(2, dtype=torch.int64, device=device),
            )
            attach(layers, station, self._decisions, self._previous)
            self._stations.append(station)
        ending = [station for station in self._stations if station.ends]
        self._cosines = [station.cosines for station in ending]
        self._features = [station.full[half] for half in (0, 1) for station in ending]
        self._lengths = [station.lengths for station in ending]
        self._counts = [(0, 0)] * len(self._stations)

    def replace(self, bank: Bank) -> None:
        """Read along the directions of another bank from the next forward pass on: one that `candidate.py` says can
        take the place of the first. In place, so that compiled graphs read them too."""
        directions = {layer.index + 1: layer.directions for layer in bank.layers}
        for station in self._stations:
            if station.ends:
                station.directions.copy_(directions[station.before])

    def expect(self, decisions: Sequence[int]) -> None:
        """The rows of the next forward pass that are to be read in full, ascending."""
        told = torch.tensor([len(decisions), *decisions])
        self._expected = told[1:]
        self._decisions[: len(told)] = told

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
                    f"expected one run of at least {rows}",
                    "probe_missed",
                )
        gather = torch.ops.undertow.gather
        return Readings(
            gather(self._cosines, rows).cpu(),
            gather(self._lengths, rows).cpu(),
            self._expected,
            gather(self._features, len(self._expected)).cpu(),
        )

    def reset(self) -> None:
        """Forget runs that were not requests: profiling and warm-up."""
        self._counts = self._counted()

    def _counted(self) -> list[tuple[int, int]]:
        return [(runs, seen) for runs, seen in torch.stack([each.count for each in self._stations]).tolist()]


def _every(bank: Bank) -> list[int]:
    """How many of each watched layer's directions, the first, are read at every token."""
    space = BankSpace.of(bank)
    chosen = space.of_every_token()
    counts = torch.bincount(space.layer_slot()[chosen], minlength=len(space.layers)).tolist()
    starts = torch.tensor(space.widths).cumsum(dim=0) - torch.tensor(space.widths)
    first = [int(start) + place for start, count in zip(starts, counts, strict=True) for place in range(count)]
    if chosen.tolist() != first:
        raise UnsupportedEngineError(
            "the bank's directions of a layer are not those of the delta, then the model's own"
        )
    return [int(count) for count in counts]


def _place(station: _Station) -> str:
    return f"layer {station.before - 1}" if station.ends else f"before layer {station.before}"


BUFFERS = ("directions", "decisions", "previous", "cosines", "full", "lengths", "count")
"""What `undertow::read` takes after the two halves of the residual, in order."""


def attach(layers: Sequence[nn.Module], station: _Station, decisions: torch.Tensor, previous: torch.Tensor) -> None:
    """Hook the op in where `station` is.

    Its tensors become a layer's buffers, so that a graph takes them as inputs: constants would make every layer's graph
    a different one.
    """
    first = station.before == 0
    layer = layers[max(0, station.before - 1)]
    shared = {"decisions": decisions, "previous": previous}
    for kind in BUFFERS:
        tensor = shared[kind] if kind in shared else getattr(station, kind)
        layer.register_buffer(("undertow_input_" if first else "undertow_") + kind, tensor, persistent=False)
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
        layer.undertow_input_decisions,
        layer.undertow_input_previous,
        layer.undertow_input_cosines,
        layer.undertow_input_full,
        layer.undertow_input_lengths,
        layer.undertow_input_count,
    )


def _after(layer: nn.Module, _arguments: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    hidden, residual = (output, None) if isinstance(output, torch.Tensor) else (output[0], output[1])
    torch.ops.undertow.read(
        hidden,
        residual,
        layer.undertow_directions,
        layer.undertow_decisions,
        layer.undertow_previous,
        layer.undertow_cosines,
        layer.undertow_full,
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
