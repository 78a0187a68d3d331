"""Prompts in a file: one per line, as JSON or as plain text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard.errors import PromptsError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation to be put through the model's chat template, or a raw text. Exactly one is set."""

    messages: tuple[dict[str, Any], ...] | None
    text: str | None


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of prompts, in order; blank lines are skipped.

    A line that starts with `{` is JSON: `{"messages": [...]}` (OpenAI chat) or `{"prompt": "raw text"}`; other keys are
    ignored. Any other line is the text of one user message.

    Raises:
        PromptsError: names the file, the line and what was expected.
    """
    try:
        # -sig: an editor's byte order mark would turn a first line of JSON into plain text.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptsError(f"{path}: not UTF-8 at byte {error.start}") from error
    lines = text.split("\n")
    prompts = [_read_line(line.strip(), f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise PromptsError(f"{path}: holds no prompts")
    return prompts


def read_reviewed(path: Path) -> list[Prompt]:
    """Read prompts that a person has looked at: every line is JSON with `"label": "clean"` beside the prompt.

    Raises:
        PromptsError: as `read_prompts`, and for a line without that label: what nobody called clean must not become
            what is normal.
    """
    prompts = read_prompts(path)
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        value = json.loads(line) if line.strip().startswith("{") else {}
        if value.get("label") != "clean":
            raise PromptsError(f'{path}:{number}: label is {value.get("label")!r}, expected "clean" on every line')
    return prompts


def _read_line(line: str, where: str) -> Prompt:
    if not line.startswith("{"):
        return Prompt(({"role": "user", "content": line},), None)
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptsError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise PromptsError(f"{where}: JSON with a number too long or nested too deep") from error
    if "messages" in value:
        return Prompt(_messages(value["messages"], where), None)
    if isinstance(value.get("prompt"), str) and value["prompt"]:
        return Prompt(None, value["prompt"])
    raise PromptsError(f"{where}: expected a key `messages` (a list) or `prompt` (a text), found {sorted(value)}")


def _messages(value: object, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise PromptsError(f"{where}: `messages` must be a list of at least one message")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise PromptsError(f"{where}: `messages[{index}]` must be an object with `role` and `content`")
    return tuple(value)
