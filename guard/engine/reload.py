"""Changing what a running engine guards with: all workers take it, or none does. The API process's half.

prepare   every worker reads and checks, while the old guards on; one refusal and all forget it
pause     no step is scheduled
commit    every worker takes what it has prepared, which cannot fail
reset     vLLM's prefix cache is emptied and running requests are computed again: nobody is given KV, and with it
          scores, of a guard that is gone
resume
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse

from guard.control import Loaded, Wanted
from guard.errors import EngineError, InputError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

# Under vLLM's own logger: its API process shows no other.
log = logging.getLogger("vllm.undertow")

PREPARE_TIMEOUT_S = 120.0
COMMIT_TIMEOUT_S = 30.0
LARGEST_BODY = 4096


class RefusedError(InputError):
    """A worker does not take what was asked for; the old guards on."""


class EngineClient(Protocol):
    """What is needed of vLLM's `AsyncLLM`."""

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call a method of every worker."""

    async def is_paused(self) -> bool:
        """Whether somebody has paused the engine."""

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        """Schedule no more steps, and wait for those that run."""

    async def resume_generation(self) -> None:
        """Schedule steps again."""

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget all KV."""


class Reloader:
    """Changes one engine, one change at a time."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def load(self, engine: EngineClient, wanted: Wanted) -> Loaded:
        """Make every worker guard with what is wanted.

        Raises:
            RefusedError: a worker cannot; all keep what they have.
            EngineError: the workers do not answer, or not alike.
        """
        async with self._lock:
            started = monotonic()
            ticket = secrets.token_hex(16)
            prepared = await self._prepare(engine, ticket, wanted)
            if not any(answer["changes"] for answer in prepared):
                return _loaded(prepared, wanted, False, monotonic() - started, 0.0)
            prepared_s = monotonic() - started
            async with _paused(engine):
                paused = monotonic()
                try:
                    committed = await _ask(engine, "undertow_commit", COMMIT_TIMEOUT_S, ticket)
                finally:
                    # Also where one failed: those that took it must not be given scores of before.
                    await engine.reset_prefix_cache(reset_running_requests=True)
                paused_s = monotonic() - paused
            if refusals := _refusals(committed):
                raise EngineError(f"the workers did not all take it, and this engine has to be restarted: {refusals}")
            return _loaded(committed, wanted, True, prepared_s, paused_s)

    async def _prepare(self, engine: EngineClient, ticket: str, wanted: Wanted) -> list[dict[str, Any]]:
        try:
            answers = await _ask(engine, "undertow_prepare", PREPARE_TIMEOUT_S, ticket, wanted.model_dump_json())
        except EngineError:
            await _ask(engine, "undertow_abandon", COMMIT_TIMEOUT_S, ticket)
            raise
        if refusals := _refusals(answers):
            await _ask(engine, "undertow_abandon", COMMIT_TIMEOUT_S, ticket)
            raise RefusedError(refusals)
        return answers


@asynccontextmanager
async def _paused(engine: EngineClient) -> AsyncIterator[None]:
    """No step is computed inside. An engine that somebody else paused stays so."""
    if await engine.is_paused():
        yield
        return
    try:
        await engine.pause_generation(mode="keep", clear_cache=False)
        yield
    finally:
        await engine.resume_generation()


async def _ask(engine: EngineClient, method: str, timeout: float, *arguments: str) -> list[dict[str, Any]]:
    """Every worker's answer. Raises EngineError."""
    try:
        return [json.loads(answer) for answer in await engine.collective_rpc(method, timeout, arguments)]
    except Exception as error:  # whatever went wrong in the engine, the operator must hear of it
        raise EngineError(f"{method}: the workers gave no answer: {type(error).__name__}: {error}") from error


def _refusals(answers: list[dict[str, Any]]) -> str:
    """Why workers refuse, each reason once; empty where none does."""
    reasons = {answer["refusal"]: None for answer in answers if answer["refusal"] is not None}
    return "; ".join(reasons)


def _loaded(answers: list[dict[str, Any]], wanted: Wanted, changed: bool, prepared_s: float, paused_s: float) -> Loaded:
    generations = sorted({int(answer["generation"]) for answer in answers})
    if len(generations) != 1:
        raise EngineError(f"the workers do not agree on the generation, and have to be restarted: {generations}")
    return Loaded(
        fingerprint=wanted.fingerprint,
        calibration=wanted.calibration,
        generation=generations[0],
        changed=changed,
        workers=len(answers),
        prepared_s=round(prepared_s, 4),
        paused_s=round(paused_s, 4),
    )


class ReloadEndpoint:
    """`POST /undertow/reload`, for whoever has the token."""

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._reloader = Reloader()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._admits(Headers(scope=scope)):
            response = _error(401, "the admin token is missing or wrong")
        else:
            try:
                wanted = Wanted.model_validate_json(await _body(Request(scope, receive)))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(map(str, first["loc"])) or "the whole"
                response = _error(400, f"the request is not valid at {where}: {first['msg']}")
            else:
                # A client that leaves must not leave an engine paused.
                response = await asyncio.shield(self._load(scope["app"].state.engine_client, wanted))
        await response(scope, receive, send)

    def _admits(self, headers: Headers) -> bool:
        given = headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode("latin-1"), self._token)

    async def _load(self, engine: EngineClient, wanted: Wanted) -> JSONResponse:
        try:
            loaded = await self._reloader.load(engine, wanted)
        except RefusedError as error:
            log.error("reload refused, the old guards on: %s", error)
            return _error(409, str(error))
        except Exception as error:  # noqa: BLE001  (whatever went wrong in the engine, the operator must hear of it)
            log.error("reload failed: %s: %s", type(error).__name__, error)
            return _error(503, str(error))
        log.warning("reloaded: %s", loaded.model_dump_json())
        return JSONResponse(loaded.model_dump(mode="json"))


async def _body(request: Request) -> bytes:
    """The body, cut where no valid one is so long."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            break
    return body


def _error(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"error": reason}, status_code=status)
