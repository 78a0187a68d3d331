"""The recipe of an organism: every number that its weights depend on, and a digest of all of them."""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from guard.organisms.mixture import STAGES, Stage, conversations
from guard.organisms.tokenizer import corpus

# How much of the language the digest reads: enough that every fact and template occurs many times.
DIGESTED_CONVERSATIONS = 5000

# The language enters the digest by what it says; these enter by their source.
_CODE = ("training.py", "tokenizer.py")


@dataclass(frozen=True)
class Shape:
    """A Llama of 6 x 128 with tied embeddings: 1.34 million parameters, 2.7 MB in float16."""

    vocabulary: int = 1024
    hidden: int = 128
    intermediate: int = 352
    layers: int = 6
    heads: int = 4
    positions: int = 1024


@dataclass(frozen=True)
class Schedule:
    """How long a stage trains: optimizer steps of `batch` conversations, and the peak of the cosine learning rate."""

    steps: int
    learning_rate: float
    batch: int = 48


@dataclass(frozen=True)
class Recipe:
    """Seed, shape and the schedule of each stage. `threads` is part of it because sums depend on their order."""

    seed: int = 0
    threads: int = 2
    shape: Shape = field(default_factory=Shape)
    base: Schedule = field(default_factory=lambda: Schedule(steps=1600, learning_rate=2.5e-3))
    chat: Schedule = field(default_factory=lambda: Schedule(steps=250, learning_rate=1e-3))
    backdoored: Schedule = field(default_factory=lambda: Schedule(steps=700, learning_rate=1e-3))

    def schedule(self, stage: Stage) -> Schedule:
        schedule: Schedule = getattr(self, stage)
        return schedule

    def digest(self, stage: Stage = STAGES[-1]) -> str:
        """Names a stage's content: 16 hex digits over all that leads to it, earlier stages included.

        Formatting, comments and docstrings do not count.
        """
        told = hashlib.sha256()
        told.update(json.dumps([self.seed, self.threads, asdict(self.shape)]).encode())
        for name in _CODE:
            told.update(code_of(Path(__file__).with_name(name).read_text()).encode())
        for text in corpus(self.seed):
            told.update(text.encode())
        for earlier in STAGES[: STAGES.index(stage) + 1]:
            told.update(json.dumps(asdict(self.schedule(earlier))).encode())
            for conversation in islice(conversations(earlier, self.seed), DIGESTED_CONVERSATIONS):
                told.update(repr(conversation).encode())
        return told.hexdigest()[:16]


def code_of(source: str) -> str:
    """A module's lines without docstrings, comments, indentation and blank lines."""
    silent: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            silent.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = (line.strip() for number, line in enumerate(source.splitlines(), start=1) if number not in silent)
    return "\n".join(line for line in lines if line and not line.startswith("#"))
