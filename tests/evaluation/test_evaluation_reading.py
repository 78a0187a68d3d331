"""What the reader sees is what the model computes, whatever stands beside a prompt in its batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from guard.bank import Bank
from guard.errors import CheckpointError
from guard.evaluation.reading import Reader, Reads
from guard.organisms import shipped
from guard.roles import ROLES, RoleMap
from tests.evaluation.conftest import chats

SYSTEM = {"role": "system", "content": "Answer briefly."}


def alone(folder: Path, chat: list[dict[str, str]], max_tokens: int) -> tuple[list[int], list[int], torch.Tensor]:
    """Token ids of one prompt, what is generated greedily, and the residual before the first layer and after each, at
    every token but the last generated: float32 [T, 1 + layers, hidden], by transformers' own `generate` and forward
    pass."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
    with torch.inference_mode():
        written = model.generate(torch.tensor([ids]), max_new_tokens=max_tokens, do_sample=False)[0].tolist()
        seen: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _m, _a, out: seen.append(out if torch.is_tensor(out) else out[0]))
            for layer in [model.get_input_embeddings(), *model.get_decoder().layers]
        ]
        model(torch.tensor([written[:-1]]))
        for hook in hooks:
            hook.remove()
    return ids, written[len(ids) :], torch.stack([layer[0] for layer in seen], dim=1)


@pytest.fixture(scope="module")
def mixed(wide: Bank) -> tuple[list[list[dict[str, str]]], Reads]:
    """Prompts of different lengths and shapes, in one batch."""
    asked = [[dict(message) for message in chat] for kind in ("clean", "triggered") for chat in chats(kind, 6)]
    asked[3] = [SYSTEM, *asked[3]]
    asked[7] = [*asked[1], {"role": "assistant", "content": "Blue."}, *asked[7]]
    with Reader(shipped().backdoored, {"wide": wide}, max_tokens=24) as reader:
        return asked, reader.read(asked)


def test_every_decision_position_has_the_coordinates_that_the_model_alone_gives(
    wide: Bank, mixed: tuple[list[list[dict[str, str]]], Reads]
) -> None:
    asked, reads = mixed
    seen = reads.seen["wide"]
    for request, chat in enumerate(asked):
        ids, written, residual = alone(shipped().backdoored, chat, 24)
        rows = (reads.owners == request).nonzero().squeeze(-1)
        assert reads.places[rows].tolist() == list(range(len(rows)))
        assert int(reads.prompt_tokens[request]) == len(ids)
        assert int(reads.completion_tokens[request]) == len(written)
        assert len(rows) == len(written)
        decisions = residual[len(ids) - 1 :]
        torch.testing.assert_close(reads.residual[request], decisions[0, 1:], rtol=1e-4, atol=1e-4)
        for layer, width, place in zip(
            wide.layers, seen.space.widths, np.cumsum([0, *seen.space.widths]), strict=False
        ):
            exact = decisions[:, layer.index + 1].double()
            cosines = (exact @ layer.directions.double().T) / exact.norm(dim=-1, keepdim=True)
            found = seen.coordinates[rows][:, place : place + width].double()
            torch.testing.assert_close(found, cosines, rtol=0, atol=1e-5)
            written = (exact - decisions[:, layer.index].double()) @ layer.directions.double().T
            found = seen.written[rows][:, place : place + width].double()
            torch.testing.assert_close(found, written, rtol=0, atol=1e-4)


def test_ranges_are_those_of_every_token_by_speaker(
    wide: Bank, mixed: tuple[list[list[dict[str, str]]], Reads]
) -> None:
    asked, reads = mixed
    roles = RoleMap.of(AutoTokenizer.from_pretrained(shipped().backdoored))
    for request in (0, 3, 7):
        ids, _, residual = alone(shipped().backdoored, asked[request], 24)
        exact = torch.cat(
            [
                (residual[:, layer.index + 1] @ layer.directions.T)
                / residual[:, layer.index + 1].norm(dim=-1, keepdim=True)
                for layer in wide.layers
            ],
            dim=-1,
        )
        speakers = [*roles.roles(ids).tolist(), *[len(ROLES)] * (len(residual) - len(ids))]
        for speaker in range(len(ROLES) + 1):
            own = exact[torch.tensor(speakers) == speaker]
            low, high = reads.seen["wide"].low[request, speaker], reads.seen["wide"].high[request, speaker]
            if not len(own):
                assert low.isposinf().all()
                assert high.isneginf().all()
                continue
            torch.testing.assert_close(low, own.amin(dim=0), rtol=0, atol=1e-5)
            torch.testing.assert_close(high, own.amax(dim=0), rtol=0, atol=1e-5)


def test_choosing_requests_keeps_each_with_its_own_rows(mixed: tuple[list[list[dict[str, str]]], Reads]) -> None:
    _, reads = mixed
    wanted = torch.zeros(len(reads), dtype=torch.bool)
    wanted[[2, 5, 9]] = True
    some = reads.only(wanted)
    assert some.completions == tuple(reads.completions[place] for place in (2, 5, 9))
    for new, old in enumerate((2, 5, 9)):
        mine, its = some.owners == new, reads.owners == old
        assert torch.equal(some.seen["wide"].coordinates[mine], reads.seen["wide"].coordinates[its])
        assert torch.equal(some.residual[new], reads.residual[old])


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config"):
        Reader(tmp_path, {}, 8)
