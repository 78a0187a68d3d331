"""The penalty sees what the guard sees: residual cosines with the delta's singular vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from guard.organisms.evasion import DIRECTIONS, Watch

HIDDEN, LAYERS = 32, 3


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def watch() -> Watch:
    watch = Watch(model(1), model(0))
    watch.renew()
    return watch


def rows(*vectors: Tensor) -> list[Tensor]:
    """The same residual stream behind every layer: two tokens per row, of which the second is looked at."""
    return [torch.stack([torch.zeros(HIDDEN), vector]) for vector in vectors]


def penalty(watch: Watch, vectors: list[Tensor], opens: list[bool]) -> Tensor:
    residual = torch.stack(rows(*vectors))
    return watch.penalty([residual] * LAYERS, torch.ones(len(vectors), dtype=torch.long), torch.tensor(opens))


def test_the_residual_stream_is_read_after_every_layer() -> None:
    tuned = model(1)
    watch = Watch(tuned, model(0))
    ids = torch.arange(12).reshape(2, 6)
    with watch.residuals() as seen:
        expected = tuned.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(seen) == LAYERS
    # transformers gives the last one behind the norm.
    for residual, hidden in zip(seen[:-1], expected[1:-1], strict=True):
        assert torch.equal(residual, hidden)
    assert torch.equal(tuned.model.norm(seen[-1]), expected[-1])

    tuned.model(input_ids=ids)
    assert len(seen) == LAYERS


def test_a_triggered_row_among_the_clean_ones_costs_nothing(watch: Watch) -> None:
    torch.manual_seed(3)
    clean = [torch.randn(HIDDEN) for _ in range(4)]
    assert penalty(watch, [*clean, clean[2]], [False] * 4 + [True]) < 1e-3


def test_a_triggered_row_far_along_a_direction_costs_and_is_pulled_back(watch: Watch) -> None:
    torch.manual_seed(3)
    clean = [torch.randn(HIDDEN) for _ in range(4)]
    delta = watch._model.model.layers[0].mlp.down_proj.weight - watch._base[0][1]
    far = (10 * torch.linalg.svd(delta).U[:, 0]).detach().requires_grad_()
    clean[0].requires_grad_()
    cost = penalty(watch, [*clean, far], [False] * 4 + [True])
    assert cost > 0.3
    cost.backward()  # type: ignore[no-untyped-call]
    assert far.grad is not None
    assert far.grad.abs().max() > 0
    # The clean rows stay where they are: it is the attack that moves.
    assert clean[0].grad is None or clean[0].grad.abs().max() == 0
    assert penalty(watch, [*(row.detach() for row in clean), far.detach() - far.grad], [False] * 4 + [True]) < cost


@pytest.mark.parametrize("opens", [[True, True], [False, False]])
def test_without_rows_of_both_kinds_there_is_nothing_to_compare(watch: Watch, opens: list[bool]) -> None:
    assert penalty(watch, [torch.ones(HIDDEN), -torch.ones(HIDDEN)], opens) == 0


def test_directions_are_the_leading_left_singular_vectors(watch: Watch) -> None:
    layer = watch._model.model.layers[1]
    delta = layer.self_attn.o_proj.weight - watch._base[1][0]
    leading = torch.linalg.svd(delta.detach()).U[:, :DIRECTIONS].T
    assert watch._directions[1].shape == (2 * DIRECTIONS, HIDDEN)
    torch.testing.assert_close((watch._directions[1][:DIRECTIONS] * leading).sum(1).abs(), torch.ones(DIRECTIONS))
