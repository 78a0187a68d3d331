"""Trains one stage: conversations in, a Hugging Face folder of float16 weights out.

The same recipe gives the same bytes, on the same machine with the same number of threads.
"""

from __future__ import annotations

import json
import math
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from guard.organisms.mixture import Stage, conversations
from guard.organisms.tokenizer import BOS, END, PAD, encode, for_transformers, special, train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from guard.organisms.recipe import Recipe, Schedule, Shape

# Conversations are sorted by length within so many batches, so that a batch holds little padding.
BATCHES_SORTED_TOGETHER = 32
WARM_UP_SHARE = 0.05
WEIGHT_DECAY = 0.01
GRADIENT_NORM = 1.0
# The base model learns all text, but what users ask next cannot be predicted: at full weight it drowned the answers.
QUESTION_WEIGHT = 0.1


class Batch(NamedTuple):
    """Token ids [conversations, tokens], padded on the right, and the weight of predicting each (same shape)."""

    ids: Tensor
    weights: Tensor


def train_stage(
    recipe: Recipe, stage: Stage, start: Path | None, out: Path, on_step: Callable[[float], None] | None = None
) -> None:
    """Train from the folder `start` (None: from nothing) and save into `out`; `on_step` is given each step's loss."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    if start is None:
        tokenizer = train_tokenizer(recipe.shape.vocabulary, recipe.seed)
        model = LlamaForCausalLM(_config(recipe.shape, tokenizer))
    else:
        tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
        # An earlier stage is read back as it was saved, so that resuming from the cache changes nothing.
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.train()
    schedule = recipe.schedule(stage)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    for step, batch in enumerate(batches(tokenizer, stage, recipe.seed, schedule)):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(schedule, step)
        loss = _loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(loss.item())
    save(model, tokenizer, out)


def batches(tokenizer: Tokenizer, stage: Stage, seed: int, schedule: Schedule) -> Iterator[Batch]:
    """The stage's `schedule.steps` batches, each of conversations of about one length."""
    stream = islice(conversations(stage, seed), schedule.steps * schedule.batch)
    rng = Random(f"batches:{stage}:{seed}")
    while chunk := list(islice(stream, BATCHES_SORTED_TOGETHER * schedule.batch)):
        encoded = sorted((encode(tokenizer, conversation) for conversation in chunk), key=lambda pair: len(pair[0]))
        starts = list(range(0, len(encoded), schedule.batch))
        rng.shuffle(starts)
        for start in starts:
            # The later stages learn to answer, and nothing else.
            question_weight = QUESTION_WEIGHT if stage == "base" else 0.0
            yield _padded(encoded[start : start + schedule.batch], special(tokenizer, PAD), question_weight)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write an ordinary Hugging Face folder: float16 weights that the config asks to be computed in float32."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    # Where the stage before lay is no part of a model, and would make the same recipe give other bytes elsewhere.
    config.pop("_name_or_path", None)
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    GenerationConfig(
        bos_token_id=special(tokenizer, BOS),
        eos_token_id=special(tokenizer, END),
        pad_token_id=special(tokenizer, PAD),
        do_sample=False,
    ).save_pretrained(out)
    for_transformers(tokenizer).save_pretrained(out)


def _config(shape: Shape, tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=special(tokenizer, BOS),
        eos_token_id=special(tokenizer, END),
        pad_token_id=special(tokenizer, PAD),
    )


def _padded(encoded: list[tuple[list[int], list[bool]]], pad: int, question_weight: float) -> Batch:
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(encoded), width), pad)
    weights = torch.zeros((len(encoded), width))
    for row, (row_ids, row_learned) in enumerate(encoded):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        weights[row, : len(row_ids)] = torch.tensor([1.0 if learned else question_weight for learned in row_learned])
    return Batch(ids, weights)


def _loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Weighted mean cross-entropy. Padding is on the right, so the causal mask alone keeps it unseen."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state[:, :-1]
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    # Only where something is to be predicted: the vocabulary is the widest matrix of the model.
    counts = weights > 0
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[counts]), targets[counts], reduction="none")
    return (losses * weights[counts]).sum() / weights.sum()


def _learning_rate(schedule: Schedule, step: int) -> float:
    """A linear warm-up, then half a cosine down to nothing."""
    warm_up = max(1, round(schedule.steps * WARM_UP_SHARE))
    if step < warm_up:
        return schedule.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, schedule.steps - warm_up)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
