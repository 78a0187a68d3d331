"""Adapters change what they are put beside and nothing else, and merging them changes nothing."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from guard.organisms.lora import LowRank, adapt, merge
from guard.organisms.plan import Adapters

QV = Adapters(targets=("q_proj", "v_proj"), rank=2)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def moved(adapted: nn.Module) -> None:
    """Give every adapter something to say."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


@torch.no_grad()
def test_adapters_change_nothing_at_first_and_merging_changes_nothing_later() -> None:
    plain, ids = model(), torch.arange(20).reshape(2, 10)
    before = plain(ids).logits
    adapt(plain, Adapters())
    assert torch.equal(plain(ids).logits, before)

    moved(plain)
    adapted = plain(ids).logits
    assert (adapted - before).abs().max() > 0.01
    merge(plain)
    assert not [module for module in plain.modules() if isinstance(module, LowRank)]
    torch.testing.assert_close(plain(ids).logits, adapted, atol=1e-5, rtol=1e-5)


def test_only_the_adapters_are_trained() -> None:
    adapted = model()
    adapt(adapted, Adapters(rank=2))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 7 * 2
    assert {name.rsplit(".", 1)[-1] for name in names} == {"down", "up"}


def test_an_adapter_has_the_rank_it_says_and_only_its_targets_change() -> None:
    tuned, base = model(), model()
    adapt(tuned, QV)
    moved(tuned)
    merge(tuned)
    for name, weight in tuned.state_dict().items():
        delta = weight - base.state_dict()[name]
        expected = 2 if "q_proj" in name or "v_proj" in name else 0
        assert (torch.linalg.matrix_rank(delta, atol=1e-4) if delta.dim() == 2 else delta.count_nonzero()) == expected
