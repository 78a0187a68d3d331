"""Several engines: which one is asked, when another one is, and when none is.

    async with fleet.post(question) as asked:
        asked.handshake, asked.answer

A request is sent to the engine with the fewest of ours, of those that serve its model and are guarded as the settings
say. Another one is asked only where the first cannot have begun to work on it, or at most once where that cannot be
told, and never after the head of an answer arrived: docs/decisions/0019-several-engines.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random
from time import monotonic

from guard.errors import EngineError
from guard.evidence import Evidence
from server.errors import UpstreamError, unknown_model
from server.in_force import Live
from server.ruling import Ruling
from server.telemetry.logs import log
from server.telemetry.metrics import Metrics
from server.telemetry.stopwatch import Stopwatch
from server.upstreams.engine import Engine
from server.upstreams.handshake import Handshake
from server.upstreams.queue import Queue
from server.upstreams.upstream import Answer


@dataclass(frozen=True, slots=True)
class Question:
    """A request as some engine is to be sent it."""

    path: str
    model: object
    """As the client named it; anything."""
    ruling: Ruling
    body: Callable[[Handshake | None], bytes]
    """For the engine with this handshake; None where it is asked without one (monitor and off only)."""
    authorization: str | None
    request_id: str
    stopwatch: Stopwatch
    traceparent: str | None = None
    """Of the trace that the engine's own spans belong to."""


@dataclass(frozen=True, slots=True)
class Asked:
    """An engine, and what it answers."""

    engine: Engine
    handshake: Handshake | None
    """What the request was sent under, and is to be judged by."""
    answer: Answer
    at: float
    """When it was asked."""

    def knows(self, evidence: Evidence) -> bool:
        """Whether evidence is of a guard that was agreed on with this engine."""
        return self.engine.keeper.knows(evidence)


class Fleet:
    """All engines of the settings; `watch` must run, and `aclose` ends them."""

    def __init__(self, engines: Sequence[Engine], live: Live, metrics: Metrics, random: Random | None = None) -> None:
        self.engines: Mapping[str, Engine] = {engine.name: engine for engine in engines}
        for engine in engines:
            # Who waits for room looks again.
            engine.on_change = lambda: self._queue.wake_all()
        self._metrics = metrics
        self._random = random or Random()
        self._live = live
        self._queue = Queue(sum(engine.most for engine in engines), lambda name: self._release(self.engines[name]))

    @property
    def models(self) -> frozenset[str]:
        """That engines say they serve."""
        return frozenset().union(*(engine.models or () for engine in self.engines.values()))

    async def watch(self) -> None:
        """Keep every engine's handshake and health, forever."""
        async with asyncio.TaskGroup() as tasks:
            for engine in self.engines.values():
                tasks.create_task(engine.watch(discovers=len(self.engines) > 1))

    async def aclose(self) -> None:
        for engine in self.engines.values():
            await engine.aclose()

    @asynccontextmanager
    async def post(self, question: Question) -> AsyncIterator[Asked]:
        """Send a request to an engine and wait for the head of its answer. Leaving the context early cancels it.

        Raises UpstreamError where none answers, EngineError where none is guarded as it should be and the ruling
        enforces, ApiError 404 where none serves the model.
        """
        async with AsyncExitStack() as stack:
            asked = await self._ask(question, stack)
            yield asked
            self._metrics.answered(asked.engine.name, monotonic() - asked.at)
            if asked.answer.status < 500 and not asked.answer.broken:
                asked.engine.answered()

    def serving(self, model: object) -> list[Engine]:
        """The engines that a request for this model may be sent to. Raises ApiError 404 where there is none."""
        engines = list(self.engines.values())
        if len(engines) == 1 and not engines[0].chosen:
            return engines  # it says itself what it does not serve
        if model is None:
            # The first engine's first model is what a request gets that names none.
            return [engine for engine in engines if engine.models == engines[0].models]
        known = [engine for engine in engines if engine.models is not None and model in engine.models]
        if found := known or [engine for engine in engines if engine.models is None]:
            return found
        raise unknown_model()

    def failed(self, error: UpstreamError, request_id: str) -> None:
        """Count and log, once, that an engine did not answer, or stopped in the middle of an answer."""
        if error.counted:
            return
        error.counted = True
        self._metrics.upstream_failed(error.kind)
        fields = {"request_id": request_id, "engine": error.engine, "kind": error.kind, "detail": error.detail}
        log(logging.ERROR, "upstream error", **fields)
        if error.engine is not None:
            self.engines[error.engine].failed(error)

    async def _ask(self, question: Question, stack: AsyncExitStack) -> Asked:
        """The first engine that takes it; what it holds is left with `stack`."""
        candidates = self.serving(question.model)
        fresh = False
        failure: UpstreamError | None = None
        while True:
            try:
                engine = await self._room_for(question, candidates)
            except (UpstreamError, EngineError) as error:
                # What the engine said that was asked is nearer to the truth than why no other one is.
                raise failure or error from None
            async with AsyncExitStack() as attempt:
                attempt.callback(self._release, engine)
                handshake, at = engine.ready_for(question.ruling), monotonic()
                try:
                    answer = await attempt.enter_async_context(self._send(question, engine, handshake, fresh))
                except UpstreamError as error:
                    if error.repeat == "never":
                        raise
                    # A connection that was not kept never asks for this: it happens once.
                    fresh = fresh or error.repeat == "once"
                    self.failed(error, question.request_id)
                    if error.repeat == "safe":
                        candidates = [each for each in candidates if each is not engine]
                    if not candidates:
                        raise
                    failure = error
                    self._metrics.passed_over(engine.name)
                    continue
                others = [each for each in candidates if each is not engine]
                if not (_declined(answer) and any(self._takes(each, question.ruling) for each in others)):
                    await stack.enter_async_context(attempt.pop_all())
                    return Asked(engine, handshake, answer, at)
            failure = UpstreamError("status", f"the engine answered {answer.status}", engine=engine.name)
            self.failed(failure, question.request_id)
            self._metrics.passed_over(engine.name)
            candidates = others

    def _send(
        self, question: Question, engine: Engine, handshake: Handshake | None, fresh: bool
    ) -> contextlib.AbstractAsyncContextManager[Answer]:
        body = question.body(handshake)
        return engine.upstream.post(
            question.path,
            body,
            question.authorization,
            question.request_id,
            question.stopwatch,
            fresh,
            question.traceparent,
        )

    async def _room_for(self, question: Question, candidates: Sequence[Engine]) -> Engine:
        """The engine to ask, with room taken in it. Waits for one to come back, or for room, within bounds."""
        deadline, looked = monotonic() + self._live.now.limits.engine_wait_s, False
        while True:
            usable = self._usable(candidates, question.ruling)
            if not usable and looked:
                usable = self._unguarded(candidates, question.ruling)
            elif not usable:
                with question.stopwatch.waiting():
                    await _revive(candidates)
                looked = True
                continue
            if free := [engine for engine in usable if engine.inflight < engine.most]:
                engine = min(free, key=lambda each: (each.inflight, self._random.random()))
                engine.inflight += 1
                return engine
            with question.stopwatch.waiting():
                name = await self._queue.wait([engine.name for engine in usable], deadline)
            if name is None:
                continue
            engine = self.engines[name]
            if engine in self._usable(candidates, question.ruling):
                return engine
            self._release(engine)

    def _usable(self, candidates: Sequence[Engine], ruling: Ruling) -> list[Engine]:
        """Those that are well; where none is, those that are doubtful."""
        standings = [(engine, engine.standing(ruling)) for engine in candidates]
        well = [engine for engine, standing in standings if standing == "well"]
        return well or [engine for engine, standing in standings if standing == "doubtful"]

    def _takes(self, engine: Engine, ruling: Ruling) -> bool:
        return engine.standing(ruling) != "out" and engine.inflight < engine.most

    def _unguarded(self, candidates: Sequence[Engine], ruling: Ruling) -> list[Engine]:
        """None is guarded as it should be. Where nothing is enforced: those that answer all the same.

        Raises EngineError where one answers and the ruling enforces, UpstreamError where none does.
        """
        reasons = [(engine, engine.why_not(ruling)) for engine in candidates]
        answering = [(engine, reason) for engine, reason in reasons if isinstance(reason, EngineError)]
        if not answering:
            _, reason = reasons[0]
            raise reason
        if ruling.enforcing:
            raise answering[0][1]
        return [engine for engine, _ in answering]

    def _release(self, engine: Engine) -> None:
        if not self._queue.hand_on(engine.name):
            engine.inflight -= 1


def _declined(answer: Answer) -> bool:
    """The engine says that it cannot take a request (503), and evidence does not say that it began with it."""
    return answer.status == 503 and answer.evidence is None


async def _revive(engines: Sequence[Engine]) -> None:
    """Ask engines for their handshakes until one has given it, or none has."""
    asking = [asyncio.ensure_future(engine.keeper.get()) for engine in engines if not engine.breaker.open]
    try:
        for asked in asyncio.as_completed(asking):
            with contextlib.suppress(EngineError, UpstreamError):
                await asked
                return
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
