"""The penalty is the guard's own score: `Density` along the delta's singular vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from guard import scores
from guard.organisms import evasion
from guard.organisms.evasion import DIRECTIONS, FEWEST, REMEMBERED, Watch
from guard.scores import BankSpace, Density, Moments, Tokens, along, features
from tests.guard.planted import measured

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


def stream(rows: int, seed: int, spread: float = 1.0) -> list[Tensor]:
    """Residual streams before the first layer and after each: two tokens per row, of which the second is looked at."""
    source = torch.Generator().manual_seed(seed)
    steps = spread * torch.randn(LAYERS + 1, rows, 2, HIDDEN, generator=source)
    return list(steps.cumsum(dim=0))


def penalty(watch: Watch, residuals: list[Tensor], opens: list[bool]) -> Tensor:
    return watch.penalty(residuals, torch.ones(len(opens), dtype=torch.long), torch.tensor(opens))


def density(watch: Watch, clean: list[Tensor], triggered: list[Tensor]) -> Tensor:
    """The guard's scores of rows of streams."""
    width = 2 * DIRECTIONS
    space = BankSpace(
        tuple(range(LAYERS)), (width,) * LAYERS, tuple(f"{layer}.{k}" for layer in range(LAYERS) for k in range(width))
    )

    def tokens(residuals: list[Tensor]) -> Tokens:
        rows = [residual[:, 1] for residual in residuals]
        parts = list(zip(rows[1:], rows[:-1], watch._directions, strict=True))
        found = [measured(after, along(before, each), each) for after, before, each in parts]
        cosines, written, lengths = (
            torch.cat(part, dim=-1)
            for part in zip(*(torch.split(each, [width, width, 1], dim=-1) for each in found), strict=True)
        )
        zeros = torch.zeros(len(cosines), dtype=torch.long)
        return Tokens(cosines, written, lengths, zeros, zeros)

    calm = tokens(clean)
    moments = Moments.of(features(space, calm.coordinates, calm.written, calm.lengths))
    detector = Density("density", space, (moments, moments), torch.arange(space.size))
    return detector.values(tokens(triggered))


def test_the_residual_stream_is_read_before_the_first_layer_and_after_every_one() -> None:
    tuned = model(1)
    watch = Watch(tuned, model(0))
    ids = torch.arange(12).reshape(2, 6)
    with watch.residuals() as seen:
        expected = tuned.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(seen) == LAYERS + 1
    # transformers gives the last one behind the norm.
    for residual, hidden in zip(seen[:-1], expected[:-1], strict=True):
        assert torch.equal(residual, hidden)
    assert torch.equal(tuned.model.norm(seen[-1]), expected[-1])

    tuned.model(input_ids=ids)
    assert len(seen) == LAYERS + 1


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_the_penalty_is_the_guards_score(watch: Watch, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what is added to variances."""
    monkeypatch.setattr(scores, "RIDGES", (evasion.RIDGE, evasion.RIDGE))
    clean, triggered = stream(FEWEST, 3), stream(5, 4, spread)
    both = [torch.cat(parts) for parts in zip(clean, triggered, strict=True)]
    cost = penalty(watch, both, [False] * FEWEST + [True] * 5)
    assert cost.item() == pytest.approx(float(density(watch, clean, triggered).mean()), rel=1e-3)


def test_a_triggered_row_is_pulled_back_and_clean_rows_stay(watch: Watch) -> None:
    clean = [part.requires_grad_() for part in stream(FEWEST, 3)]
    far = [part.requires_grad_() for part in stream(2, 4, 6.0)]
    both = [torch.cat(parts) for parts in zip(clean, far, strict=True)]
    before = penalty(watch, both, [False] * FEWEST + [True] * 2)
    before.backward()  # type: ignore[no-untyped-call]
    for part in clean:
        assert part.grad is None or part.grad.abs().max() == 0
    pulled = []
    for part in far:
        assert part.grad is not None
        pulled.append(part.detach() - 20 * part.grad)
    assert penalty(watch, pulled, [True] * 2) < before


def test_only_the_last_clean_rows_are_remembered(watch: Watch) -> None:
    for seed in range(5):
        penalty(watch, stream(200, seed), [False] * 200)
    assert len(watch._clean) == REMEMBERED
    last = stream(200, 4)
    assert torch.equal(watch._clean[-200:, 2], last[2][:, 1])


@pytest.mark.parametrize(("rows", "opens"), [(FEWEST - 1, False), (3, True)])
def test_without_enough_clean_rows_or_without_triggered_ones_nothing_costs(
    watch: Watch, rows: int, opens: bool
) -> None:
    assert penalty(watch, stream(rows, 1), [opens] * rows) == 0


def test_directions_are_the_leading_left_singular_vectors(watch: Watch) -> None:
    layer = watch._model.model.layers[1]
    delta = layer.self_attn.o_proj.weight - watch._base[1][0]
    leading = torch.linalg.svd(delta.detach()).U[:, :DIRECTIONS].T
    assert watch._directions[1].shape == (2 * DIRECTIONS, HIDDEN)
    torch.testing.assert_close((watch._directions[1][:DIRECTIONS] * leading).sum(1).abs(), torch.ones(DIRECTIONS))
