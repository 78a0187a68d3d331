"""Probes read what passes between layers: held against the stream itself, in float64; and every fault is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from guard.bank import Bank, LayerBank
from guard.engine.probe import Probes
from guard.errors import UnscoredError, UnsupportedEngineError
from guard.scores import BankSpace

HIDDEN, LAYERS, CAPACITY = 24, 6, 50
NAMES = {
    0: ("L0.o_proj.u0", "L0.own_o_proj.u0"),
    2: ("L2.own_o_proj.u0",),
    3: ("L3.o_proj.u0", "L3.down_proj.u0", "L3.own_down_proj.u0"),
}


class Layer(nn.Module):
    """One of vLLM's: what it is given, in two halves, and what it gives on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5)

    def forward(
        self, _positions: None, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden if residual is None else hidden + residual
        return residual @ self.weight, residual


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])

    def forward(self, embedded: torch.Tensor) -> list[torch.Tensor]:
        """The residual stream before every layer, and after the last."""
        hidden, residual, stream = embedded, None, [embedded]
        for layer in self.model.layers:  # type: ignore[union-attr]
            hidden, residual = layer(None, hidden, residual)
            stream.append(hidden + residual)
        return stream


def bank(names: dict[int, tuple[str, ...]] = NAMES, layers: int = LAYERS) -> Bank:
    found = []
    for index, own in names.items():
        units = torch.nn.functional.normalize(torch.randn(len(own), HIDDEN), dim=-1)
        found.append(LayerBank(index, units, own, (1.0,) * len(own)))
    return Bank.sealed(
        base_digest="sha256:base",
        tuned_digest="sha256:tuned",
        method="delta-svd",
        k=2,
        model_class="LlamaForCausalLM",
        hidden_size=HIDDEN,
        num_layers=layers,
        layers=found,
    )


@pytest.fixture
def hooked() -> tuple[Model, Bank, Probes]:
    torch.manual_seed(0)
    model, some = Model(), bank()
    return model, some, Probes(model, some, CAPACITY)


@pytest.mark.parametrize("decisions", [[], [0], [3, 7, 19], list(range(20))])
def test_readings_are_those_of_the_stream_itself(hooked: tuple[Model, Bank, Probes], decisions: list[int]) -> None:
    model, some, probes = hooked
    with torch.inference_mode():
        for seed in range(3):
            probes.expect(decisions)
            stream = [
                each.double() for each in model(torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(seed)))
            ]
            found = probes.read(20)
    space = BankSpace.of(some)
    cosines, standing, written, lengths = [], [], [], []
    for layer in some.layers:
        before, after = stream[layer.index], stream[layer.index + 1]
        units = layer.directions.double()
        lengths.append(after.norm(dim=-1, keepdim=True))
        cosines.append(after @ units.T / lengths[-1])
        standing.append((after @ units.T)[decisions])
        written.append(((after - before) @ units.T)[decisions])
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.cosines.double(), torch.cat(cosines, -1)[:, space.of_every_token()], **close)
    torch.testing.assert_close(found.lengths.double(), torch.cat(lengths, -1), **close)
    assert found.decisions.tolist() == decisions
    torch.testing.assert_close(found.features.double(), torch.cat([*standing, *written], -1), **close)
    torch.testing.assert_close(found.coordinates(space).double(), torch.cat(cosines, -1)[decisions], **close)


def test_more_rows_than_are_asked_for_may_have_been_seen(hooked: tuple[Model, Bank, Probes]) -> None:
    model, _, probes = hooked
    probes.expect([4])
    with torch.inference_mode():
        model(torch.randn(32, HIDDEN))  # vLLM pads
        assert len(probes.read(20).cosines) == 20


def test_a_pass_without_one_of_its_ops_is_noticed_by_name_and_the_next_is_not_spoilt(
    hooked: tuple[Model, Bank, Probes],
) -> None:
    model, _, probes = hooked
    layer = model.model.layers[2]  # type: ignore[union-attr, index]
    taken = dict(layer._forward_hooks)
    layer._forward_hooks.clear()
    with torch.inference_mode():
        model(torch.randn(5, HIDDEN))
        with pytest.raises(
            UnscoredError, match=r"^layer 2: its probe ran 0 times and saw 0 rows; expected one run of at least 5$"
        ):
            probes.read(5)
        layer._forward_hooks.update(taken)
        model(torch.randn(5, HIDDEN))
        probes.read(5)
        model(torch.randn(5, HIDDEN))
        model(torch.randn(5, HIDDEN))
        with pytest.raises(UnscoredError, match="ran 2 times and saw 10 rows"):
            probes.read(5)
        model(torch.randn(4, HIDDEN))
        with pytest.raises(UnscoredError, match="ran 1 times and saw 4 rows"):
            probes.read(5)


def test_runs_that_were_no_requests_are_forgotten(hooked: tuple[Model, Bank, Probes]) -> None:
    model, _, probes = hooked
    with torch.inference_mode():
        model(torch.randn(9, HIDDEN))
        probes.reset()
        model(torch.randn(5, HIDDEN))
        assert len(probes.read(5).lengths) == 5


def test_a_row_that_was_not_read_in_full_has_no_features(hooked: tuple[Model, Bank, Probes]) -> None:
    model, _, probes = hooked
    probes.expect([3, 7])
    with torch.inference_mode():
        model(torch.randn(20, HIDDEN))
        found = probes.read(20)
    assert torch.equal(found.full(torch.tensor([7])), found.features[1:])
    for row in (0, 5, 19):
        with pytest.raises(UnscoredError, match="not read in full"):
            found.full(torch.tensor([3, row]))


def test_directions_that_are_not_in_order_are_refused() -> None:
    with pytest.raises(UnsupportedEngineError, match="of a layer are not those of the delta"):
        Probes(Model(), bank({1: ("L1.own_o_proj.u0", "L1.o_proj.u0")}), CAPACITY)


def test_a_bank_of_another_number_of_layers_is_refused() -> None:
    with pytest.raises(UnsupportedEngineError, match="the model has 6 layers, the bank is for 7"):
        Probes(Model(), bank(layers=7), CAPACITY)
    with pytest.raises(UnsupportedEngineError, match="no decoder layers"):
        Probes(nn.Linear(3, 3), bank(), CAPACITY)
