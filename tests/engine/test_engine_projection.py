"""Chosen rows lose what they have along their directions, whatever the angles between these; all others keep every
bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from guard.bank import Bank, LayerBank
from guard.engine.projection import SETS, Directions, Projection, Steered, orthonormal, without
from guard.errors import UnscoredError

HIDDEN = 32
ROWS = 12
ALL: Directions = frozenset({(1, 0), (1, 1), (1, 2)})


class Layer(nn.Module):
    """As vLLM's decoder layers: two halves in, two halves out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN), requires_grad=False)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole = hidden + residual
        return whole * 0.5 * self.weight, whole


class Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        for layer in self.model.layers:
            hidden, residual = layer(hidden, residual)
        return torch.stack([hidden, residual])


def a_bank(watched: dict[int, torch.Tensor]) -> Bank:
    """Of a model of three layers."""
    return Bank.sealed(
        base_digest="",
        tuned_digest="",
        method="delta-svd",
        k=3,
        model_class="LlamaForCausalLM",
        hidden_size=HIDDEN,
        num_layers=3,
        layers=[
            LayerBank(index, each, tuple(f"L{index}.o_proj.u{place}" for place in range(len(each))), (1.0,) * len(each))
            for index, each in watched.items()
        ],
    )


@pytest.fixture
def bank() -> Bank:
    return a_bank({1: oblique(1), 2: oblique(2)})


def oblique(seed: int, count: int = 3) -> torch.Tensor:
    """Unit vectors [count, HIDDEN] far from orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(HIDDEN, generator=generator)
    directions = common + 0.7 * torch.randn(count, HIDDEN, generator=generator)
    return directions / directions.norm(dim=-1, keepdim=True)


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, HIDDEN, generator=generator) * 5, torch.randn(ROWS, HIDDEN, generator=generator) * 5


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def plain(model: nn.Module) -> Callable[..., torch.Tensor]:
    return model


def compiled(model: nn.Module) -> Callable[..., torch.Tensor]:
    """Traced and made functional as for a compiled engine, without the wait for a C++ compiler."""
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("runs", [plain, compiled])
def test_a_steered_row_has_nothing_left_and_no_other_row_changes_a_bit(
    bank: Bank, runs: Callable[[nn.Module], Callable[..., torch.Tensor]]
) -> None:
    """Held against float64; the others hold NaN, infinity and negative zero."""
    hidden, residual = rows()
    hidden[0], hidden[1, :3], residual[1, :3], hidden[2] = torch.nan, -0.0, -0.0, torch.inf
    before = Model()(hidden.clone(), residual.clone())
    model = Model()
    steering = Projection(model, bank, ROWS)
    run = runs(model)
    with torch.inference_mode():
        steering.aim([])
        assert torch.equal(bits(run(hidden.clone(), residual.clone())), bits(before))
        steering.check(0)
        steered = torch.tensor([3, 7, 8])
        steering.aim([Steered(steered, frozenset({(2, 0), (2, 1), (2, 2)}))])
        after = run(hidden.clone(), residual.clone())
        steering.check(3)
    others = [row for row in range(ROWS) if row not in steered.tolist()]
    assert torch.equal(bits(after[:, others]), bits(before[:, others]))
    left = after.double().sum(dim=0)[steered] @ bank.layers[1].directions.double().T
    assert left.abs().max() < 1e-5
    assert torch.equal(bits(after[1]), bits(before[1])), "the residual that the layer took stays"


def test_what_is_taken_out_is_the_least_that_leaves_nothing() -> None:
    """The exact solution by least squares, in float64. One direction after another leaves something, and takes more."""
    directions, (whole, _) = oblique(5), rows(1)
    taken = without(whole, orthonormal(directions)).double()
    exact = torch.linalg.lstsq(directions.double().T, whole.double().T).solution.T @ directions.double()
    assert (taken - exact).abs().max() < 1e-5
    one_by_one = whole.double()
    for direction in directions.double():
        one_by_one = one_by_one - (one_by_one @ direction)[:, None] * direction
    assert (one_by_one @ directions.double().T).abs().max() > 0.1, "these directions would not tell the two apart"


def test_a_direction_twice_is_a_direction_once() -> None:
    directions = oblique(6)
    assert len(orthonormal(torch.cat([directions, directions[:1], -directions[1:2]]))) == 3


def test_each_row_loses_its_own_set_at_its_own_layers(bank: Bank) -> None:
    hidden, residual = rows(2)
    model = Model()
    seen: list[torch.Tensor] = []
    steering = Projection(model, bank, ROWS)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _layer, _arguments, output: seen.append(output[0] + output[1]))
    first, second, both = frozenset({(1, 0)}), frozenset({(2, 1)}), frozenset({(1, 0), (2, 1)})
    steering.aim(
        [
            Steered(torch.tensor([0]), first),
            Steered(torch.tensor([4, 5]), second),
            Steered(torch.tensor([9]), both),
        ]
    )
    model(hidden, residual)
    along_first = (seen[1] @ bank.layers[0].directions[0]).abs() < 1e-4
    along_second = (seen[2] @ bank.layers[1].directions[1]).abs() < 1e-4
    assert along_first.nonzero().flatten().tolist() == [0, 9]
    assert along_second.nonzero().flatten().tolist() == [4, 5, 9]


def test_a_layer_that_returns_the_whole_residual_is_steered_too(bank: Bank) -> None:
    class Whole(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden * 2

    model = Model()
    model.model.layers = nn.ModuleList(Whole() for _ in range(3))
    model.weight = nn.Parameter(torch.zeros(1))
    Projection(model, bank, ROWS).aim([Steered(torch.arange(ROWS), ALL)])
    found = model.model.layers[1](rows(3)[0])
    assert (found @ bank.layers[0].directions.T).abs().max() < 1e-4


def test_half_precision_stays_what_it_is(bank: Bank) -> None:
    model = Model().to(torch.bfloat16)
    Projection(model, bank, ROWS).aim([Steered(torch.arange(ROWS), ALL)])
    hidden, residual = (half.to(torch.bfloat16) for half in rows(4))
    steered = model.model.layers[1](hidden, residual)
    assert steered[0].dtype == torch.bfloat16
    left = (steered[0].float() + steered[1].float()) @ bank.layers[0].directions.T
    assert left.abs().max() < 0.02 * (hidden + residual).float().norm(dim=-1).max()


def test_sets_that_are_not_wanted_make_room_and_too_many_at_once_are_refused(bank: Bank) -> None:
    wide = a_bank({1: oblique(8, SETS + 1)})
    model = Model()
    steering = Projection(model, wide, SETS + 1)
    each = [Steered(torch.tensor([row]), frozenset({(1, row)})) for row in range(SETS + 1)]
    assert steering.aim(each[:-1]) == SETS
    assert steering.aim(each[1:]) == SETS
    hidden, residual = torch.randn(SETS + 1, HIDDEN), torch.randn(SETS + 1, HIDDEN)
    seen: list[torch.Tensor] = []
    model.model.layers[1].register_forward_hook(lambda _layer, _arguments, output: seen.append(output[0] + output[1]))
    model(hidden, residual)
    left = (seen[0] * wide.layers[0].directions).sum(dim=-1).abs()
    assert (left < 1e-4).nonzero().flatten().tolist() == list(range(1, SETS + 1))
    with pytest.raises(UnscoredError, match=f"{SETS + 1} sets of directions"):
        steering.aim(each)
    model(hidden, residual)
    steering.check(0)


def test_an_op_that_does_not_run_is_named(bank: Bank) -> None:
    model: Any = Model()
    steering = Projection(model, bank, ROWS)
    model.model.layers[2]._forward_hooks.clear()
    steering.aim([Steered(torch.tensor([1]), ALL)])
    model(*rows())
    with pytest.raises(UnscoredError, match="layer 2: its steering ran 0 times on 0 rows; expected one run on 1"):
        steering.check(1)


def test_a_pass_that_ran_twice_or_not_at_all_is_noticed(bank: Bank) -> None:
    model = Model()
    steering = Projection(model, bank, ROWS)
    steering.aim([Steered(torch.tensor([1]), ALL)])
    with pytest.raises(UnscoredError, match="ran 0 times"):
        steering.check(1)
    model(*rows())
    steering.check(1)
    model(*rows())
    with pytest.raises(UnscoredError, match="ran 2 times"):
        steering.check(1)
