"""Taking directions out of the residual stream: a custom op behind every watched layer, eager and compiled.

vLLM's decoder layers return two halves, `hidden` and `residual`, that the next layer adds. The op changes `hidden`, in
place and in the chosen rows only, so that the sum has nothing left along a set of directions. They are not orthogonal
to each other, so each set is an orthonormal basis of what they span: one after another would put back along the first
what it takes along the second.

Which rows, and which set for each, stands in buffers that the worker writes before a pass. A graph takes them as
inputs, so that nothing is compiled anew. The op runs behind the one that reads (`probe.py`): the guard sees what the
layer wrote, not what was left of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from vllm.utils.torch_utils import direct_register_custom_op

from guard.bank import Bank
from guard.engine.probe import decoder_layers
from guard.errors import UnscoredError

SETS = 32
"""Different sets of directions that one forward pass can take out."""
WIDEST = 6
"""Directions of one set: one per detector and phase."""
NUMERICALLY_ZERO = 1e-6
"""Times the largest singular value: what lies below is no direction of its own."""

Directions = frozenset[tuple[int, int]]
"""Some of a bank's: the layer's index, and which of its directions."""


def orthonormal(directions: torch.Tensor) -> torch.Tensor:
    """A basis float32 [r, H] of what directions [K, H] span; r is below K where they do not span K dimensions."""
    _, values, basis = torch.linalg.svd(directions.double(), full_matrices=False)
    found: torch.Tensor = basis[values > NUMERICALLY_ZERO * values[0]].float()
    return found


def without(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """What rows float32 [T, H] have along an orthonormal basis [r, H], to be subtracted: float32 [T, H]."""
    return (rows @ basis.T) @ basis


def _steer(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    sets: torch.Tensor,
    chosen: torch.Tensor,
    bases: torch.Tensor,
    ranks: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """hidden, residual [T, H]. Of the first `chosen` (int64 [1], on the CPU) entries, `rows` and `sets` (int64
    [capacity], on the CPU) say which row loses which set: bases float32 [SETS, WIDEST, H] of `ranks` (int64 [SETS], on
    the CPU) directions. count int64 [2], on the CPU, grows by one run and by the rows chosen."""
    number = int(chosen)
    count[0] += 1
    if number == 0:
        return
    count[1] += number
    each = sets[:number]
    for place in sorted(set(each.tolist())):
        basis = bases[place, : int(ranks[place])]
        if not len(basis):
            continue  # of another layer
        own = rows[:number][each == place].to(hidden.device)
        half = hidden[own].float()
        whole = half if residual is None else half + residual[own].float()
        hidden[own] = (half - without(whole, basis)).to(hidden.dtype)


def _steer_fake(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    sets: torch.Tensor,
    chosen: torch.Tensor,
    bases: torch.Tensor,
    ranks: torch.Tensor,
    count: torch.Tensor,
) -> None:
    return None


_library = torch.library.Library("undertow", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op(
    "steer",
    _steer,
    mutates_args=["hidden", "count"],
    fake_impl=_steer_fake,
    target_lib=_library,
)


@dataclass(frozen=True, slots=True)
class Steered:
    """Rows of one pass that lose one set of directions."""

    rows: torch.Tensor
    """int64 [R]."""
    directions: Directions


@dataclass(frozen=True, slots=True)
class _Place:
    """What is taken out behind one layer."""

    index: int
    directions: torch.Tensor
    """float32 [K, H]: the bank's, on the CPU."""
    bases: torch.Tensor
    ranks: torch.Tensor
    count: torch.Tensor


class Projection:
    """The ops behind every watched layer of one model."""

    def __init__(self, model: nn.Module, bank: Bank, capacity: int) -> None:
        """Hook every watched layer. Must run after `Probes` has hooked the same ones, and before the first forward
        pass.

        Args:
            capacity: the most rows that one forward pass can have.
        """
        layers = decoder_layers(model, bank)
        device = next(model.parameters()).device
        self._rows = torch.zeros(capacity, dtype=torch.int64)
        self._sets = torch.zeros(capacity, dtype=torch.int64)
        self._chosen = torch.zeros(1, dtype=torch.int64)
        self._known: dict[Directions, int] = {}
        self._places: list[_Place] = []
        for layer in bank.layers:
            place = _Place(
                layer.index,
                layer.directions.cpu().clone(),
                torch.zeros(SETS, WIDEST, bank.hidden_size, device=device),
                torch.zeros(SETS, dtype=torch.int64),
                torch.zeros(2, dtype=torch.int64),
            )
            self._attach(layers[layer.index], place)
            self._places.append(place)
        self._counts = self._counted()

    def _attach(self, layer: nn.Module, place: _Place) -> None:
        tensors = {
            "rows": self._rows,
            "sets": self._sets,
            "chosen": self._chosen,
            "bases": place.bases,
            "ranks": place.ranks,
            "count": place.count,
        }
        for kind, tensor in tensors.items():
            layer.register_buffer(f"undertow_steer_{kind}", tensor, persistent=False)
        layer.register_forward_hook(_after)

    def replace(self, bank: Bank) -> None:
        """Take directions from another bank, that has as many on the same layers."""
        for place, layer in zip(self._places, bank.layers, strict=True):
            place.directions.copy_(layer.directions)
        self._known.clear()

    def aim(self, steered: Iterable[Steered]) -> int:
        """What the next forward pass takes out of which rows, in place of what the last one did; says how many rows.

        Raises UnscoredError, and then nothing is taken out, where more sets are wanted than there is room for.
        """
        self._chosen.zero_()
        # Runs before this one were nobody's concern: those of profiling and warm-up.
        self._counts = self._counted()
        plan = [part for part in steered if len(part.rows)]
        places = self._placed({part.directions for part in plan})
        first = 0
        for part in plan:
            last = first + len(part.rows)
            self._rows[first:last] = part.rows
            self._sets[first:last] = places[part.directions]
            first = last
        self._chosen.fill_(first)
        return first

    def check(self, rows: int) -> None:
        """Raise UnscoredError unless every op ran once since the last `aim`, and on so many rows."""
        for place, (runs, seen), (old_runs, old_seen) in zip(self._places, self._counted(), self._counts, strict=True):
            if (runs - old_runs, seen - old_seen) != (1, rows):
                raise UnscoredError(
                    f"layer {place.index}: its steering ran {runs - old_runs} times on {seen - old_seen} rows; "
                    f"expected one run on {rows}"
                )

    def _placed(self, wanted: set[Directions]) -> dict[Directions, int]:
        """Where in the buffers each set stands; what is not wanted makes room."""
        if len(wanted) > SETS:
            raise UnscoredError(
                f"{len(wanted)} sets of directions to be taken out in one pass; there is room for {SETS}"
            )
        for directions in sorted(wanted - self._known.keys(), key=sorted):
            if len(self._known) < SETS:
                place = len(self._known)
            else:
                place = self._known.pop(next(known for known in self._known if known not in wanted))
            self._write(place, directions)
            self._known[directions] = place
        return self._known

    def _write(self, place: int, directions: Directions) -> None:
        for layer in self._places:
            own = sorted(number for index, number in directions if index == layer.index)
            basis = orthonormal(layer.directions[own]) if own else layer.directions[:0]
            layer.ranks[place] = len(basis)
            layer.bases[place, : len(basis)] = basis.to(layer.bases.device)

    def _counted(self) -> list[tuple[int, int]]:
        return [(int(place.count[0]), int(place.count[1])) for place in self._places]


def _after(layer: nn.Module, _arguments: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    hidden, residual = (output, None) if isinstance(output, torch.Tensor) else (output[0], output[1])
    torch.ops.undertow.steer(
        hidden,
        residual,
        layer.undertow_steer_rows,
        layer.undertow_steer_sets,
        layer.undertow_steer_chosen,
        layer.undertow_steer_bases,
        layer.undertow_steer_ranks,
        layer.undertow_steer_count,
    )
