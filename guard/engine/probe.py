"""Reading the residual stream: two custom ops per watched decoder layer, eager and compiled.

`enter` sees a layer's input, `leave` its output. Both add the two halves that vLLM keeps apart (`hidden` and
`residual`), and write into a buffer that the worker reads after the forward pass: the row's cosines with the layer's
directions, what the layer wrote along them, and the row's length. Both count themselves: an op that a stale graph left
out does not count, and that is noticed in the same step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.utils.torch_utils import direct_register_custom_op

from guard.bank import Bank
from guard.errors import UnscoredError, UnsupportedEngineError
from guard.scores import along, measure

LAYER_LISTS = ("model.layers", "language_model.model.layers")
"""Where vLLM's models keep their decoder layers."""


ENTERED, LEFT, SEEN = range(3)
"""What a layer's counter counts: runs of `enter`, runs of `leave`, and the rows of the last `leave`."""


def _enter(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: torch.Tensor,
    readings: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """hidden, residual [T, H]; directions float32 [K, H]; readings float32 [capacity, 2 K + 1] gets projections where
    `leave` looks for them; count int64 [3]."""
    rows, width = _sum(hidden, residual), len(directions)
    readings[: len(rows), width : 2 * width] = along(rows, directions)
    count[ENTERED] += 1


def _leave(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: torch.Tensor,
    readings: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """As `_enter`; readings gets T whole rows."""
    rows, width = _sum(hidden, residual), len(directions)
    readings[: len(rows)] = measure(rows, readings[: len(rows), width : 2 * width], directions)
    count[LEFT] += 1
    count[SEEN] = len(rows)


def _sum(hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return hidden.float() if residual is None else hidden.float() + residual.float()


def _fake(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    directions: torch.Tensor,
    readings: torch.Tensor,
    count: torch.Tensor,
) -> None:
    return None


_library = torch.library.Library("undertow", "DEF")  # type: ignore[no-untyped-call]
for _name, _op in (("enter", _enter), ("leave", _leave)):
    direct_register_custom_op(_name, _op, mutates_args=["readings", "count"], fake_impl=_fake, target_lib=_library)


@dataclass(frozen=True, slots=True)
class Readings:
    """What the probes saw of T rows."""

    coordinates: torch.Tensor
    """float32 [T, size]: cosines with the bank's directions."""
    written: torch.Tensor
    """float32 [T, size]: what each watched layer wrote along its directions."""
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
        self._widths = tuple(len(layer.names) for layer in bank.layers)
        self._runs = [(0, 0)] * len(self._layers)
        for layer in bank.layers:
            # One buffer per layer and never a view of a shared one: a graph may not mutate inputs that alias.
            readings = torch.zeros(capacity, 2 * len(layer.names) + 1, device=device)
            count = torch.zeros(3, dtype=torch.int64, device=device)
            attach(layers[layer.index], layer.directions.to(device).contiguous(), readings, count)
            self._readings.append(readings)
            self._counts.append(count)

    def read(self, rows: int) -> Readings:
        """What the last forward pass left of its first `rows` rows, on the CPU.

        Raises:
            UnscoredError: a watched layer's ops did not run exactly once each since the last read, or saw too few
                rows.
        """
        counts = torch.stack(self._counts).tolist()
        # Every layer is brought up to date before any is complained of: one fault must not spoil the next steps.
        before, self._runs = self._runs, [(entered, left) for entered, left, _ in counts]
        for slot, (entered, left, seen) in enumerate(counts):
            runs = (entered - before[slot][0], left - before[slot][1])
            if runs != (1, 1) or seen < rows:
                raise UnscoredError(
                    f"layer {self._layers[slot]}: its probe ran {runs[0]} times before it and {runs[1]} times after it "
                    f"and saw {seen} rows; expected one run each of at least {rows}"
                )
        used = [torch.split(readings[:rows], [width, width, 1], dim=-1) for readings, width in self._by_width()]
        cosines, written, lengths = (torch.cat(parts, dim=-1).cpu() for parts in zip(*used, strict=True))
        return Readings(cosines, written, lengths)

    def reset(self) -> None:
        """Forget runs that were not requests: profiling and warm-up."""
        self._runs = [(int(count[ENTERED]), int(count[LEFT])) for count in self._counts]

    def _by_width(self) -> Iterator[tuple[torch.Tensor, int]]:
        return zip(self._readings, self._widths, strict=True)


def attach(layer: nn.Module, directions: torch.Tensor, readings: torch.Tensor, count: torch.Tensor) -> None:
    """Hook one decoder layer's input and output into a probe.

    The tensors become the layer's buffers, so that a graph takes them as inputs: constants would make every layer's
    graph a different one.
    """
    layer.register_buffer("undertow_directions", directions, persistent=False)
    layer.register_buffer("undertow_readings", readings, persistent=False)
    layer.register_buffer("undertow_count", count, persistent=False)
    layer.register_forward_pre_hook(_before, with_kwargs=True)
    layer.register_forward_hook(_after)


def _before(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    # vLLM's decoder layers take (positions, hidden_states, residual), by place or by name.
    hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[1]
    residual = keywords["residual"] if "residual" in keywords else arguments[2]
    torch.ops.undertow.enter(hidden, residual, layer.undertow_directions, layer.undertow_readings, layer.undertow_count)


def _after(layer: nn.Module, _arguments: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    hidden, residual = (output, None) if isinstance(output, torch.Tensor) else (output[0], output[1])
    torch.ops.undertow.leave(hidden, residual, layer.undertow_directions, layer.undertow_readings, layer.undertow_count)


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
