"""`/v1/models` of several engines as one answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from server.errors import UpstreamError
from server.upstreams.engine import Engine, model_entries
from server.upstreams.upstream import SmallAnswer


@dataclass(frozen=True, slots=True)
class Listing:
    """An answer to `/v1/models`."""

    status: int
    content: bytes
    content_type: str


async def list_models(engines: Collection[Engine], authorization: str | None) -> Listing:
    """What the engines serve, those that answer. The only engine's own answer passes as it is.

    Raises UpstreamError where none answers.
    """
    answers = await asyncio.gather(*(_ask(engine, authorization) for engine in engines))
    heard = [
        (engine, answer) for engine, answer in zip(engines, answers, strict=True) if isinstance(answer, SmallAnswer)
    ]
    good = [(engine, answer.content) for engine, answer in heard if answer.status_code == 200]
    if not heard:
        raise next(error for error in answers if isinstance(error, UpstreamError))
    if not good or (len(engines) == 1 and not good[0][0].chosen):
        _, answer = heard[0]
        return Listing(answer.status_code, answer.content, answer.content_type)
    return Listing(200, _union(good), "application/json")


async def _ask(engine: Engine, authorization: str | None) -> SmallAnswer | UpstreamError:
    try:
        return await engine.ask_models(authorization)
    except UpstreamError as error:
        return error


def _union(answers: Iterable[tuple[Engine, bytes]]) -> bytes:
    """Every model once, as the first engine that serves it describes it; of an engine that the settings choose models
    for, those alone."""
    found: dict[str, object] = {}
    for engine, content in answers:
        for entry in model_entries(content) or []:
            if not engine.chosen or entry["id"] in (engine.models or ()):
                found.setdefault(entry["id"], entry)
    return json.dumps({"object": "list", "data": list(found.values())}).encode()
