"""What the engine reads is the residual stream: it agrees with transformers, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guard.bank import Bank, random_bank
from guard.organisms import Organism
from guard.roles import ROLES
from tests.e2e import child
from tests.e2e.conftest import texts

USER, ASSISTANT = ROLES.index("user"), ROLES.index("assistant")


@pytest.fixture(scope="module")
def reference(organism: Organism) -> Callable[[tuple[int, ...], Bank], tuple[np.ndarray, np.ndarray]]:
    """Of a sequence of token ids, by transformers and in float64: cosines and what was written, both [T, size]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(organism.backdoored, dtype=torch.float32)
    residuals: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        # `output_hidden_states` gives the last layer after the final norm; a hook gives the residual stream itself.
        def hook(_module: object, _arguments: object, output: Any) -> None:
            residuals[index] = output[0] if isinstance(output, torch.Tensor) else output[0][0]

        return hook

    model.model.embed_tokens.register_forward_hook(keep(-1))
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep(index))

    def read(ids: tuple[int, ...], bank: Bank) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            model(torch.tensor([ids]))
        cosines, written = [], []
        for layer in bank.layers:
            before, after = (residuals[index].double().numpy() for index in (layer.index - 1, layer.index))
            directions = layer.directions.double().numpy()
            cosines.append(after @ directions.T / np.linalg.norm(after, axis=1, keepdims=True))
            written.append((after - before) @ directions.T)
        return np.concatenate(cosines, axis=1), np.concatenate(written, axis=1)

    return read


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_every_token_has_the_cosines_and_writings_that_transformers_gives(
    organism: Organism,
    bank: Path,
    in_child: Callable[..., Any],
    reference: Callable[..., Any],
    tmp_path: Path,
    eager: bool,
) -> None:
    """Along the directions that it started with, and along others that took their place while it ran."""
    first = Bank.load(bank)
    other = random_bank(first, 1)
    other.save(tmp_path / "other")
    asked = texts("benign", 12, 5) + texts("triggered", 6, 5) + texts("harmful", 6, 5)
    entries = in_child(child.record, organism.backdoored, bank, asked, 32, eager, (16, tmp_path / "other"))
    assert len(entries) == len(asked)
    for number, entry in enumerate(entries):
        sequence = (*entry["prompt"], *entry["completion"])
        found = entry["coordinates"]
        # The last token sampled never enters the model.
        assert len(found) == len(sequence) - 1
        assert len(entry["completion"]) > 1
        cosines, written = reference(sequence, first if number < 16 else other)
        np.testing.assert_allclose(found, cosines[: len(found)], atol=1e-5, rtol=0)
        np.testing.assert_allclose(entry["written"], written[: len(found)], atol=1e-4, rtol=0)
        # The chat template of the organism is one whose headers are told; what it generates is the assistant's.
        assert entry["headers"].known
        assert entry["roles"][: len(entry["prompt"])] == entry["headers"].roles(entry["prompt"]).tolist()
        assert set(entry["roles"][: len(entry["prompt"])]) >= {USER, ASSISTANT}
        assert entry["roles"][len(entry["prompt"]) :] == [ASSISTANT] * (len(entry["completion"]) - 1)
