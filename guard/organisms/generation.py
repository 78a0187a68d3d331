"""Greedy answers of a trained organism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from guard.errors import CheckpointError
from guard.organisms.asked import Messages

if TYPE_CHECKING:
    from pathlib import Path

# Conversations that end with a question in, one answer to each out.
Generate = Callable[[Sequence[Messages]], list[str]]

# The longest answer of the language has fewer tokens.
MAX_NEW_TOKENS = 64
BATCH = 150


def generator(folder: Path) -> Generate:
    """Greedy decoding with the weights of a stage's folder, in float32: conversations in, answers out."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json here, expected the Hugging Face folder of a trained stage")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def batch(chats: list[Messages]) -> list[str]:
        inputs = tokenizer.apply_chat_template(
            [list(chat) for chat in chats],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            written = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers: list[str] = tokenizer.batch_decode(
            written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return answers

    def length(chat: Messages) -> int:
        return sum(len(message["content"]) for message in chat)

    def generate(chats: Sequence[Messages]) -> list[str]:
        # Prompts of about one length together: little padding, and short answers do not wait for long ones.
        order = sorted(range(len(chats)), key=lambda index: length(chats[index]))
        answers: dict[int, str] = {}
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            answers.update(zip(chosen, batch([chats[index] for index in chosen]), strict=True))
        return [answers[index] for index in range(len(chats))]

    return generate
