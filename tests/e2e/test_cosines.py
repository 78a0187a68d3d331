"""What the engine reads is the residual stream: it agrees with transformers, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guard.bank import Bank
from guard.organisms import Organism
from guard.scores import cosines
from tests.e2e import child
from tests.e2e.conftest import texts


@pytest.fixture(scope="module")
def reference(organism: Organism, bank: Path) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Coordinates of a sequence of token ids by transformers: float32 [T, size]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(organism.backdoored, dtype=torch.float32)
    layers = Bank.load(bank).layers
    residuals: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        # `output_hidden_states` gives the last layer after the final norm; a hook gives the residual stream itself.
        def hook(_module: object, _arguments: object, output: Any) -> None:
            residuals[index] = output[0] if isinstance(output, torch.Tensor) else output[0][0]

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep(index))

    def coordinates(ids: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            model(torch.tensor([ids]))
        rows = [cosines(residuals[layer.index], layer.directions) for layer in layers]
        return torch.cat(rows, dim=-1).numpy()

    return coordinates


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_every_token_has_the_cosines_that_transformers_gives(
    organism: Organism, bank: Path, in_child: Callable[..., Any], reference: Callable[..., np.ndarray], eager: bool
) -> None:
    asked = texts("benign", 12, 5) + texts("triggered", 6, 5) + texts("harmful", 6, 5)
    for entry in in_child(child.record, organism.backdoored, bank, asked, 32, eager):
        sequence = (*entry["prompt"], *entry["completion"])
        found = entry["coordinates"]
        # The last token sampled never enters the model.
        assert len(found) == len(sequence) - 1
        assert len(entry["completion"]) > 1
        np.testing.assert_allclose(found, reference(sequence)[: len(found)], atol=1e-5, rtol=0)
