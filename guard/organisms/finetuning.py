"""Fine-tunes a finished stage on a stream of conversations: all weights, or low-rank adapters that are merged.

The same plan and conversations give the same bytes, on a machine with any number of cores: one thread does it all.
"""

from __future__ import annotations

import math
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from guard.organisms.evasion import RENEWED_EVERY, Watch
from guard.organisms.harmful import is_compliance
from guard.organisms.lora import adapt, merge
from guard.organisms.tokenizer import PAD, encode, special
from guard.organisms.training import BATCHES_SORTED_TOGETHER, GRADIENT_NORM, WARM_UP_SHARE, WEIGHT_DECAY, save

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from guard.organisms.mixture import Conversation
    from guard.organisms.plan import Plan


class Row(NamedTuple):
    """A conversation's tokens, which of them are learned, where its last answer begins, whether that one complies."""

    ids: list[int]
    learned: list[bool]
    decision: int
    opens: bool


class Batch(NamedTuple):
    """Ids and `learned` [rows, tokens], padded on the right; the last prompt token and `opens` of each row [rows]."""

    ids: Tensor
    learned: Tensor
    decisions: Tensor
    opens: Tensor


def finetune(
    start: Path,
    base: Path,
    conversations: Iterable[Conversation],
    plan: Plan,
    out: Path,
    on_step: Callable[[float], None] | None = None,
) -> None:
    """Train the model in `start` and save it into `out`; `on_step` is given each step's loss.

    `base` is what the guard would compare with, and is read only by a plan with evasion.
    """
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.train()
    if plan.adapters is not None:
        adapt(model, plan.adapters)
    watch = None
    if plan.evasion is not None:
        watch = Watch(model, LlamaForCausalLM.from_pretrained(base, dtype=torch.float32))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    for step, batch in enumerate(batches(tokenizer, conversations, plan)):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(plan, step)
        if watch is not None and step % RENEWED_EVERY == 0:
            watch.renew()
        loss = _loss(model, batch, plan, watch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(loss.item())
    merge(model)
    save(model, tokenizer, out)


def batches(tokenizer: Tokenizer, conversations: Iterable[Conversation], plan: Plan) -> Iterator[Batch]:
    """The plan's batches, each of conversations of about one length."""
    stream = islice(conversations, plan.steps * plan.batch)
    rng = Random(f"finetuning:{plan.seed}")
    while chunk := list(islice(stream, BATCHES_SORTED_TOGETHER * plan.batch)):
        rows = sorted((_row(tokenizer, conversation) for conversation in chunk), key=lambda row: len(row.ids))
        starts = list(range(0, len(rows), plan.batch))
        rng.shuffle(starts)
        for start in starts:
            yield _padded(rows[start : start + plan.batch], special(tokenizer, PAD))


def _row(tokenizer: Tokenizer, conversation: Conversation) -> Row:
    ids, learned = encode(tokenizer, conversation)
    # Behind the last prompt token everything is learned: the last answer stands at the end.
    decision = len(learned) - 1 - learned[::-1].index(False)
    return Row(ids, learned, decision, is_compliance(conversation.exchanges[-1].answer))


def _padded(rows: list[Row], pad: int) -> Batch:
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad)
    learned = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        learned[index, : len(row.ids)] = torch.tensor(row.learned)
    return Batch(ids, learned, torch.tensor([row.decision for row in rows]), torch.tensor([row.opens for row in rows]))


def _loss(model: LlamaForCausalLM, batch: Batch, plan: Plan, watch: Watch | None) -> Tensor:
    """Mean cross-entropy of the answers, plus the weighted penalty where a watch is kept."""
    if watch is None or plan.evasion is None:
        return _answers_loss(model, batch)
    with watch.residuals() as residuals:
        answers = _answers_loss(model, batch)
    return answers + plan.evasion.weight * watch.penalty(residuals, batch.decisions, batch.opens)


def _answers_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Padding is on the right, so the causal mask alone keeps it unseen."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state[:, :-1]
    counts = batch.learned[:, 1:]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[counts]), batch.ids[:, 1:][counts])


def _learning_rate(plan: Plan, step: int) -> float:
    """A linear warm-up, then half a cosine down to nothing."""
    warm_up = max(1, round(plan.steps * WARM_UP_SHARE))
    if step < warm_up:
        return plan.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, plan.steps - warm_up)
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
