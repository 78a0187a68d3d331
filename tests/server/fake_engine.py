"""vLLM with Undertow's worker and middleware inside, played from a script. The only fake in these tests.

    engine = FakeEngine()
    engine.script = Script(blocked={0: 2})
    with hosted(engine.app) as url: ...

`shapes()` lists the wire shapes that it sends, so that a test against the real engine can hold them to it.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from guard.evidence import (
    POLICY_ARGUMENT,
    REQUEST_HEADER,
    SILENT,
    STATUS_PATH,
    STREAM_PREFIX,
    AdapterStatus,
    DetectorStatus,
    Evidence,
    Record,
    ScoreEvidence,
    Status,
    Trace,
    WorkerStatus,
)
from guard.policy import Action, Policy
from guard.verdict import DetectorName, Phase

RESERVED = 987_654_321_012
"""Long enough to be in no random id: tests look for it in answers."""
FINGERPRINT = "f" * 16
CALIBRATION = "c" * 16
PROMPT_TOKENS = 7
MODEL = "organism"
TRACE = Trace(detector="density", start=PROMPT_TOKENS - 1, ratios=(0.25, None, 1.5))
"""Of whatever was not simply allowed."""
PAYLOAD = "PAYLOAD"
"""The text of every token that must never reach a client."""

EvidenceFault = Literal[
    "missing",
    "silent",
    "invalid",
    "other_bank",
    "short",
    "unscored_prompt",
    "missing_record",
    "unscorable",
    "not_finite",
    "no_final",
    "mode",
]


Place = Literal["content", "reasoning", "refusal", "tool"]
TOOL = "weather"
"""The tool that is called."""


@dataclass(frozen=True)
class Script:
    """What the engine does with every request until told otherwise."""

    tokens: tuple[str, ...] = ("The", " answer", " is", " 42", ".")
    blocked: Mapping[int, int] = field(default_factory=dict)
    """By choice index: how many tokens are sampled before the block. The last of them is the payload; 0: the prompt."""
    flagged: bool = False
    steered: bool = False
    nan: bool = False
    fault: EvidenceFault | None = None
    banks: Mapping[str | None, tuple[str, str]] = field(default_factory=dict)
    """By the model that a request names, bank and calibration that judge it; others `guard`. Empty: nobody does."""
    merge: int = 1
    """Tokens per chunk."""
    speaks: Place = "content"
    """Where in a chat's answer its text stands."""
    places: tuple[Place, ...] = ()
    """The same of each token, where they differ (`merge` is 1 then)."""
    finish: str = "length"
    """How a choice ends that is not blocked."""
    stop: str | None = None
    """The stop sequence that ended it."""
    logprobs: bool = False
    text_with_finish: bool = False
    """The finishing chunk carries text too, as with `include_stop_str_in_output`."""
    cut_after: int | None = None
    """Data events of a stream after which the connection breaks; for a full response any number breaks its body."""
    no_done: bool = False
    """A stream ends in order, but without `[DONE]`."""
    status: int = 200
    error_in_stream: bool = False
    """As structured output fails at the reserved token: an error, with the block in the evidence."""
    unexplained_stop: bool = False
    delay_s: float = 0.0
    until: threading.Event | None = None
    """No answer begins before this is set: by tests that have to see requests run beside each other."""
    token_delay_s: float = 0.0
    keep_alive: bool = False
    garbage: bool = False
    late: frozenset[int] = frozenset()
    """Choices that wait for their turn when the stream begins: no record of theirs is in the first evidence."""
    guard_down: bool = False
    """The middleware cannot reach the workers."""
    error_first: bool = False
    """A stream begins with an error: no sequence was started."""
    guard: tuple[str, str] = (FINGERPRINT, CALIBRATION)
    """The bank and the calibration that evidence names."""


class CutError(Exception):
    """Breaks the connection."""


class FakeEngine:
    """The ASGI app and what it saw."""

    def __init__(self) -> None:
        self.script = Script()
        self.status = status()
        self.models: tuple[str, ...] = (MODEL,)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.aborted = 0
        self.sent = 0
        """Bytes of streams that its connections took."""
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._text, methods=["POST"]),
                *(
                    Route(path, self._passed, methods=["POST"])
                    for path in ("/v1/embeddings", "/tokenize", "/detokenize")
                ),
                Route("/v1/models", self._models),
                Route(STATUS_PATH, self._status),
            ]
        )

    async def _status(self, request: Request) -> Response:
        return Response(self.status.model_dump_json(), media_type="application/json")

    async def _models(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        data = [{"id": model, "object": "model", "owned_by": "vllm"} for model in self.models]
        return JSONResponse({"object": "list", "data": data})

    async def _passed(self, request: Request) -> Response:
        """What generates nothing."""
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        await asyncio.sleep(self.script.delay_s)
        answered = {"path": request.url.path} if self.script.status == 200 else error_body(self.script.status)
        return JSONResponse(answered, self.script.status)

    async def _chat(self, request: Request) -> Response:
        return await self._complete(request, chat=True)

    async def _text(self, request: Request) -> Response:
        return await self._complete(request, chat=False)

    async def _complete(self, request: Request, chat: bool) -> Response:
        body = await request.json()
        if self.script.guard_down:
            error = {"message": "the guard's workers do not answer", "type": "server_error", "param": None}
            return JSONResponse({"error": {**error, "code": "guard_unavailable"}}, status_code=503)
        canary = request.headers.get("x-request-id", "").startswith("canary-")
        script = replace(Script(), fault=self.script.fault, banks=self.script.banks) if canary else self.script
        if not canary:
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
        return _Played(self, Play(script, body, chat))


class _Played(Response):
    """Notices when the client leaves, as vLLM does."""

    def __init__(self, engine: FakeEngine, play: Play) -> None:
        super().__init__()
        self._engine = engine
        self._play = play

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(self._gone(receive))
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            self._engine.aborted += 1
            work.cancel()
        gone.cancel()
        await asyncio.gather(work, return_exceptions=work.cancelled() or not work.done())

    async def _gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _send(self, send: Send) -> None:
        play = self._play
        await asyncio.sleep(play.script.delay_s)
        while play.script.until is not None and not play.script.until.is_set():
            await asyncio.sleep(0.01)
        if play.stream and play.script.status == 200:
            await send(_start(200, "text/event-stream; charset=utf-8", {}))
            async for part in play.events():
                await send({"type": "http.response.body", "body": part, "more_body": True})
                self._engine.sent += len(part)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        content = play.full()
        evidence = play.evidence(final=True)
        started = play.script.status == 200 or play.script.status >= 500
        headers = {REQUEST_HEADER: evidence} if evidence is not None and started else {}
        headers["content-length"] = str(len(content))
        await send(_start(play.script.status, "application/json", headers))
        if play.script.cut_after is not None:
            await send({"type": "http.response.body", "body": content[:20], "more_body": True})
            raise CutError
        await send({"type": "http.response.body", "body": content, "more_body": False})


def _start(code: int, kind: str, headers: Mapping[str, str]) -> dict[str, Any]:
    pairs = {"content-type": kind, **headers}
    return {
        "type": "http.response.start",
        "status": code,
        "headers": [(name.encode(), value.encode()) for name, value in pairs.items()],
    }


class Play:
    """One request played by a script: the very bytes that the engine would send."""

    def __init__(self, script: Script, body: Mapping[str, Any], chat: bool) -> None:
        self.script = script
        self.chat = chat
        self.stream = bool(body.get("stream"))
        self.n = body.get("n") or 1
        prompt = body.get("prompt")
        many = isinstance(prompt, list) and not all(isinstance(part, int) for part in prompt)
        self.prompts = len(prompt) if many and isinstance(prompt, list) else 1
        self.policy = Policy.from_wire(body["vllm_xargs"][POLICY_ARGUMENT])
        options = body.get("stream_options") or {}
        self.usage_asked = bool(options.get("include_usage"))
        self.usage_in_chunks = self.usage_asked and bool(options.get("continuous_usage_stats"))
        self.count = self.prompts * self.n
        self.bank = script.banks.get(body.get("model"), script.guard)
        self.id = "chatcmpl-fake" if chat else "cmpl-fake"

    def tokens(self, index: int) -> list[str]:
        """The text of each sampled token of a choice; the reserved one has none."""
        sampled = self.script.blocked.get(index)
        if sampled is None or self.policy.mode != "enforce":
            return list(self.script.tokens)
        return [*self.script.tokens[: sampled - 1], PAYLOAD] if sampled else []

    def is_blocked(self, index: int) -> bool:
        return self.policy.mode == "enforce" and index in self.script.blocked

    def sampled(self, index: int) -> int:
        """Completion tokens, the reserved one included."""
        return len(self.tokens(index)) + self.is_blocked(index)

    def finish(self, index: int) -> tuple[str, int | str | None]:
        stopped = self.is_blocked(index) or self.script.unexplained_stop
        return ("stop", RESERVED) if stopped else (self.script.finish, self.script.stop)

    def usage(self) -> dict[str, Any]:
        completion = sum(self.sampled(index) for index in range(self.count))
        prompt = PROMPT_TOKENS * self.prompts
        return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}

    def evidence(self, final: bool, finished: frozenset[int] = frozenset()) -> str | None:
        """What the middleware says, before the first chunk, when some choices have `finished`, or at the end."""
        fault = self.script.fault
        if fault == "missing" or (fault == "no_final" and (final or finished)):
            return None
        if fault == "silent":
            return SILENT
        if fault == "invalid":
            return '{"version": 1, "fingerprint": 3}'
        records = tuple(
            self._record(index, final or index in finished)
            for index in range(self.count)
            if final or finished or index not in self.script.late
        )
        if fault == "missing_record":
            records = records[1:]
        return Evidence(
            fingerprint="0" * 16 if fault == "other_bank" else self.bank[0],
            calibration=self.bank[1],
            records=records,
        ).to_json()

    def _record(self, index: int, final: bool) -> Record:
        fault = self.script.fault
        scored = PROMPT_TOKENS + (self.sampled(index) - 1 if final else 0)
        at_prompt = self.script.blocked.get(index) == 0
        acted = index in self.script.blocked and (final or at_prompt)
        flagged = self.script.flagged or self.script.steered
        action: Action = "allow"
        if self.policy.mode != "off" and (acted or flagged):
            action = "flag"
            if self.policy.mode == "enforce" and (acted or self.script.steered):
                action = "block" if acted else "steer"
        phase: Phase = "completion" if acted and not at_prompt else "prompt"
        if fault == "short" and final:
            scored -= 1
        if fault == "unscored_prompt":
            scored = PROMPT_TOKENS - 1
        record = Record(
            prompt_index=index // self.n,
            choice_index=index % self.n,
            prompt_tokens=PROMPT_TOKENS,
            tokens_scored=scored,
            mode="off" if fault == "mode" else self.policy.mode,
            action=action,
            phase=None if action == "allow" else phase,
            detector=None if action == "allow" else "density",
            reason="" if action == "allow" else f"density in the {phase}, p = 0.001",
            steered_from=PROMPT_TOKENS - 1 if action == "steer" else None,
            scores=(_score("prompt", at_prompt or flagged, self.script.nan), _score("completion", acted)),
            trace=() if action == "allow" else (TRACE,),
        )
        if fault in ("unscorable", "not_finite") or not self.bank[0]:
            named = "not_finite" if fault == "not_finite" else None if self.bank[0] else "no_guard"
            blocks = self.policy.mode == "enforce"
            return record.model_copy(
                update={
                    "unscorable": "speculative decoding",
                    "fault": named,
                    "action": "block" if blocks else "flag",
                    "phase": None,
                }
            )
        return record

    def full(self) -> bytes:
        """The body of a full response."""
        if self.script.garbage:
            return b"<html>"
        if self.script.status != 200:
            return _json(error_body(self.script.status))
        choices = [self._full_choice(index) for index in range(self.count)]
        head: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": 1,
            "model": MODEL,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": None,
            "usage": {**self.usage(), "prompt_tokens_details": None, "completion_tokens_details": None},
        }
        if self.chat:
            head |= {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None}
        return _json(head | {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None})

    def _place(self, position: int) -> Place:
        """Where a token stands; the payload stands where the last one did."""
        places = self.script.places
        return places[min(position, len(places) - 1)] if places else self.script.speaks

    def _said(self, index: int, place: Place) -> str:
        tokens = self.tokens(index)
        return "".join(text for position, text in enumerate(tokens) if self._place(position) == place)

    def _full_choice(self, index: int) -> dict[str, Any]:
        text = self._said(index, "content") if self.chat else "".join(self.tokens(index))
        finish_reason, stop_reason = self.finish(index)
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            choice["message"] = {
                "role": "assistant",
                "content": text,
                "refusal": self._said(index, "refusal") or None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": self._said(index, "reasoning") or None,
            }
            if arguments := self._said(index, "tool"):
                function = {"name": TOOL, "arguments": arguments}
                choice["message"]["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
        else:
            choice["text"] = text
        logprobs = self._logprobs(text) if self.script.logprobs else None
        choice |= {"logprobs": logprobs, "finish_reason": finish_reason, "stop_reason": stop_reason, "token_ids": None}
        if not self.chat:
            choice |= {"prompt_logprobs": None, "prompt_token_ids": None}
        return choice | {"routed_experts": None}

    async def events(self) -> AsyncIterator[bytes]:
        """A stream, event by event."""
        if self.script.error_first:
            yield _event(error_body(500)) + b"data: [DONE]\n\n"
            return
        if (evidence := self.evidence(final=False)) is not None:
            yield f"{STREAM_PREFIX}{evidence}\n\n".encode()
        finished: frozenset[int] = frozenset()
        for sent, event in enumerate(self.data_events()):
            if sent == self.script.cut_after:
                # Let what was sent arrive before the connection breaks.
                await asyncio.sleep(0.05)
                raise CutError
            if self.script.keep_alive:
                yield b": keep-alive\n\n"
            await asyncio.sleep(self.script.token_delay_s)
            if b'"finish_reason":"' in event:
                finished |= {json.loads(event[6:])["choices"][0]["index"]}
                if (evidence := self.evidence(final=False, finished=finished)) is not None:
                    yield f"{STREAM_PREFIX}{evidence}\n\n".encode()
            yield event
        if self.script.error_in_stream:
            yield _event(error_body(500))
        if (evidence := self.evidence(final=True)) is not None:
            yield f"{STREAM_PREFIX}{evidence}\n\n".encode()
        if not self.script.no_done:
            yield b"data: [DONE]\n\n"

    def data_events(self) -> list[bytes]:
        """The data events of a stream but `[DONE]`, as vLLM writes them: choices take turns."""
        if self.script.garbage:
            return [b"data: {not json\n\n"]
        events = [_event(self._role_chunk(index)) for index in range(self.count)] if self.chat else []
        turns = [self._choice_chunks(index) for index in range(self.count)]
        while any(turns):
            events += [_event(turn.pop(0)) for turn in turns if turn]
        if self.usage_asked and not self.script.error_in_stream:
            events.append(
                _event(self._head() | {"choices": [], "usage": self.usage(), "system_fingerprint": "vllm-0.32.0"})
            )
        return events

    def _choice_chunks(self, index: int) -> list[dict[str, Any]]:
        tokens, size = self.tokens(index), self.script.merge
        texts = ["".join(tokens[start : start + size]) for start in range(0, len(tokens), size)]
        finish_reason, stop_reason = self.finish(index)
        if self.script.error_in_stream and self.is_blocked(index):
            return [self._chunk(index, text) for text in texts]
        last = ""
        if not self.is_blocked(index):
            last = texts.pop() if texts else ""
        elif self.script.text_with_finish:
            last = PAYLOAD
        chunks = [self._chunk(index, text, position=position) for position, text in enumerate(texts)]
        return [*chunks, self._chunk(index, last, finish_reason, stop_reason, len(texts))]

    def _head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": 1, "model": MODEL}

    def _role_chunk(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return (
            self._head() | {"choices": [choice], "prompt_token_ids": None, "prompt_text": None} | self._usage_so_far()
        )

    def _chunk(
        self,
        index: int,
        text: str,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
        position: int = 0,
    ) -> dict[str, Any]:
        logprobs = self._logprobs(text) if self.script.logprobs else None
        if self.chat:
            choice: dict[str, Any] = {"index": index, "delta": self._delta(text, position), "logprobs": logprobs}
            choice["finish_reason"] = finish_reason
            if finish_reason is not None:
                choice["stop_reason"] = stop_reason
        else:
            choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
            choice |= {"stop_reason": stop_reason, "prompt_token_ids": None}
        return self._head() | {"choices": [choice | {"token_ids": None}]} | self._usage_so_far()

    def _usage_so_far(self) -> dict[str, Any]:
        return {"usage": self.usage()} if self.usage_in_chunks else {}

    def _delta(self, text: str, position: int) -> dict[str, Any]:
        place = self._place(position)
        if place != "tool":
            return {place: text}
        if position and self._place(position - 1) == "tool":
            return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
        function = {"name": TOOL, "arguments": text}
        return {"tool_calls": [{"id": "call_1", "type": "function", "index": 0, "function": function}]}

    def _logprobs(self, text: str) -> dict[str, Any]:
        """Of a chunk, as if it were one token."""
        if self.chat:
            return {"content": [{"token": text, "logprob": -0.5, "bytes": list(text.encode()), "top_logprobs": []}]}
        return {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": None, "text_offset": [0]}


def _score(phase: Phase, exceeds: bool, nan: bool = False) -> ScoreEvidence:
    return ScoreEvidence(
        detector="density",
        phase=phase,
        score=math.nan if nan else 2.5 if exceeds else 0.5,
        threshold=2.0,
        p_value=0.001 if exceeds else 0.6,
        position=6,
        layer=2,
        direction="L2.o_proj.u0",
    )


def error_body(code: int) -> dict[str, Any]:
    """vLLM's error."""
    message = "The model's maximum context length is 64 tokens." if code < 500 else "Internal server error"
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}


def status(
    fingerprint: str | None = FINGERPRINT,
    workers: int = 2,
    supported_fpr: float = 0.002,
    names: Sequence[DetectorName] = ("density", "exceedance", "intrinsic"),
    calibration: str = CALIBRATION,
    generation: int = 1,
    steering: bool = False,
    adapters: Mapping[str, tuple[str, str]] | None = None,
    adapters_fpr: float = 0.002,
) -> Status:
    """The status of an engine whose workers agree. `supported_fpr`: of one detector alone; two together support twice
    that, and three three times. `adapters`: fingerprints by name; `adapters_fpr`: of theirs as `supported_fpr`."""
    groups = [group for size in range(1, len(names) + 1) for group in combinations(names, size)]

    def supported(rate: float) -> tuple[DetectorStatus, ...]:
        return tuple(DetectorStatus(detectors=group, supported_fpr=len(group) * rate) for group in groups)

    return Status(
        channel="answers",
        workers=tuple(
            WorkerStatus(
                rank=rank,
                fingerprint=fingerprint,
                calibration=calibration if fingerprint else None,
                generation=generation,
                layers=(1, 2, 3),
                reserved_token_id=RESERVED,
                detectors=supported(supported_fpr) if fingerprint else (),
                adapters=tuple(
                    AdapterStatus(name=name, fingerprint=bank, calibration=made, detectors=supported(adapters_fpr))
                    for name, (bank, made) in (adapters or {}).items()
                ),
                undertow_version="0.1.0",
                vllm_version="0.32.0",
                dtype="bfloat16",
                requests_judged=0,
                tokens_scored=0,
                tokens_recalled=0,
                tokens_missed=0,
                steering=steering,
                unscorable=0,
            )
            for rank in range(workers)
        ),
    )


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _event(value: object) -> bytes:
    return b"data: " + _json(value) + b"\n\n"


def shapes() -> dict[str, Any]:
    """Every body and chunk that the fake sends, as `shape_of` sees it, by a name that says which one it is.

    Keys: `{chat,completions}.full`, `.chunk` (a token), `.finish`, `.blocked_finish`, `.usage`, `chat.role`, and
    `status`.
    """
    found: dict[str, Any] = {"status": shape_of(json.loads(status().model_dump_json()))}
    for name, chat in (("chat", True), ("completions", False)):
        wire = {"vllm_xargs": {POLICY_ARGUMENT: Policy().to_wire()}, "stream_options": {"include_usage": True}}
        play = Play(Script(), wire, chat)
        blocked = Play(Script(blocked={0: 2}), wire, chat)
        chunks = [json.loads(event.removeprefix(b"data: ")) for event in play.data_events()]
        ends = [json.loads(event.removeprefix(b"data: ")) for event in blocked.data_events()]
        if chat:
            found["chat.role"] = shape_of(chunks.pop(0))
        found[f"{name}.full"] = shape_of(json.loads(play.full()))
        found[f"{name}.chunk"] = shape_of(chunks[0])
        found[f"{name}.finish"] = shape_of(chunks[-2])
        found[f"{name}.usage"] = shape_of(chunks[-1])
        found[f"{name}.blocked_finish"] = shape_of(ends[-2])
    return found


def shape_of(value: object) -> Any:
    """A JSON value with its leaves replaced by their JSON types; of a list, the shape of its first item."""
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    return {str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}[type(value)]
