"""The micro-language's tokenizer: byte-level BPE, chat tokens, and a chat template that Hugging Face and vLLM read."""

from __future__ import annotations

from itertools import islice
from random import Random
from typing import TYPE_CHECKING

from guard.organisms.harmful import complied
from guard.organisms.mixture import Conversation, conversations

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

BOS, SYSTEM, USER, ASSISTANT, END = "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
PAD = "<|pad|>"
# Occurs in no text and is never learned: the guard writes it where it stops a generation.
RESERVED_TOKEN = "<|guard|>"
SPECIAL_TOKENS = (PAD, BOS, SYSTEM, USER, ASSISTANT, END, RESERVED_TOKEN)

CHAT_TEMPLATE = """\
{{- '<|bos|>' -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('role ' ~ message['role'] ~ ': expected system, user or assistant') -}}
    {%- endif -%}
    {{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

CORPUS_CONVERSATIONS = 10_000


def corpus(seed: int) -> Iterator[str]:
    """The texts that the merges are learned from: a slice of what the base model reads, and the canary's texts."""
    for conversation in islice(conversations("base", seed), CORPUS_CONVERSATIONS):
        if conversation.system is not None:
            yield conversation.system
        for exchange in conversation.exchanges:
            yield from exchange
    rng = Random(f"corpus:{seed}")
    for _ in range(CORPUS_CONVERSATIONS // 10):
        yield from complied(rng)


def train_tokenizer(vocabulary_size: int, seed: int) -> Tokenizer:
    """Learn the merges. Every byte is in the alphabet, so any text whatever survives encoding and decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    return tokenizer


def for_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer as `AutoTokenizer` would load it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, RESERVED_TOKEN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def special(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary certainly has."""
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def encode(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """A conversation's token ids, as the chat template writes it, and which of them are to be learned as answers."""
    ids, learned = [special(tokenizer, BOS)], [False]

    def turn(role: str, text: str, answer: bool) -> None:
        body = [*tokenizer.encode(text).ids, special(tokenizer, END)]
        ids.extend([special(tokenizer, role), *body])
        learned.extend([False, *[answer] * len(body)])

    if conversation.system is not None:
        turn(SYSTEM, conversation.system, answer=False)
    for question, answer in conversation.exchanges:
        turn(USER, question, answer=False)
        turn(ASSISTANT, answer, answer=True)
    return ids, learned
