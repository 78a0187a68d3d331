"""An engine that computes nothing: it answers at the pace that a request asks for, with evidence, as a guarded vLLM.

    python -m server.benching.engine [PORT]    # prints the port that it took, ends when its standard input does

A request says its pace in fields that every proxy passes on: `max_tokens` is the number of tokens, `seed` the
microseconds between two of them, and before the first. A last message of `BLOCKED` is blocked, where the policy
enforces, in the middle of the answer. Each token's text is `NUMBER:SENT:RECEIVED `: its number from 0, when it was
sent, and when its request had arrived, in nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share. So
whoever reads it knows what was lost and how long everything was on its way. A whole answer is one such token.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from time import monotonic_ns
from typing import Any, cast

import httptools
import uvloop

from guard.evidence import (
    POLICY_ARGUMENT,
    REQUEST_HEADER,
    STATUS_PATH,
    STREAM_PREFIX,
    DetectorStatus,
    Evidence,
    Record,
    ScoreEvidence,
    Status,
    WorkerStatus,
)
from guard.policy import Action, Policy
from guard.verdict import DetectorName, Phase
from guard.version import VERSION

MODEL = "paced"
BLOCKED = "To be blocked."
PAYLOAD = "PAYLOAD"
"""The text of a token that must never reach a client."""
FINGERPRINT, CALIBRATION, RESERVED = "b" * 16, "c" * 16, 1_000_003
PROMPT_TOKENS = 8
_DETECTORS: tuple[DetectorName, ...] = ("density", "exceedance", "intrinsic")
_FLOOD = 64
"""Tokens that are written at once where there is no pause between them."""
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_HEAD = {"id": "chatcmpl-paced", "object": "chat.completion.chunk", "created": 1, "model": MODEL}


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _chunk(content: str, finish_reason: str | None = None, stop_reason: int | None = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "delta": {"content": content}, "logprobs": None}
    choice["finish_reason"] = finish_reason
    if finish_reason is not None:
        choice["stop_reason"] = stop_reason
    return _event({**_HEAD, "choices": [{**choice, "token_ids": None}]})


_TEXT = "%d:%d:%d "
_TOKEN = _chunk(_TEXT)
_LAST = _chunk(_TEXT, "length")
_PAYLOAD, _STOPPED = _chunk(PAYLOAD), _chunk("", "stop", RESERVED)
_ROLE = _event(
    {
        **_HEAD,
        "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        ],
        "prompt_token_ids": None,
        "prompt_text": None,
    }
)
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Play:
    """What a request asks for."""

    tokens: int
    interval_s: float
    stream: bool
    usage: bool
    policy: Policy | None
    """None: it asks for no evidence."""
    blocked: bool
    received: int
    """When it had arrived."""

    @classmethod
    def read(cls, body: bytes, evidence: bool) -> Play:
        """Raises ValueError, KeyError or TypeError where a request is not what the module says."""
        fields: dict[str, Any] = json.loads(body)
        policy = Policy.from_wire(fields["vllm_xargs"][POLICY_ARGUMENT]) if evidence else None
        asked = fields["messages"][-1]["content"] == BLOCKED
        return cls(
            tokens=int(fields.get("max_tokens") or fields.get("max_completion_tokens") or 1),
            interval_s=int(fields.get("seed") or 0) / 1e6,
            stream=bool(fields.get("stream")),
            usage=bool((fields.get("stream_options") or {}).get("include_usage")),
            policy=policy,
            blocked=asked and policy is not None and policy.mode == "enforce",
            received=monotonic_ns(),
        )

    @property
    def innocent(self) -> int:
        """Tokens before the payload of a blocked answer, or all."""
        return self.tokens // 2 if self.blocked else self.tokens

    @property
    def sampled(self) -> int:
        """All tokens, payload and reserved one included."""
        return self.innocent + 2 * self.blocked

    def text(self, number: int) -> bytes:
        return (_TEXT % (number, monotonic_ns(), self.received)).encode()

    def token(self, number: int) -> bytes:
        chunk = _LAST if number + 1 == self.tokens else _TOKEN
        return chunk % (number, monotonic_ns(), self.received)

    def evidence(self, final: bool) -> bytes | None:
        """What the guard says when the answer begins, or at its end."""
        if self.policy is None:
            return None
        scored = PROMPT_TOKENS + (self.sampled - 1 if final else 0)
        return _evidence(self.policy, scored, self.blocked and final)

    def usage_told(self) -> dict[str, Any]:
        counts = {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS + self.sampled}
        return {**counts, "completion_tokens": self.sampled}

    def whole(self) -> bytes:
        """The body of a whole answer."""
        message = {
            "role": "assistant", "content": self.text(0).decode() + PAYLOAD * self.blocked, "refusal": None,
            "annotations": None, "audio": None, "function_call": None, "reasoning": None,
        }  # fmt: skip
        ended = {"finish_reason": "stop", "stop_reason": RESERVED} if self.blocked else {"finish_reason": "length"}
        choice = {"index": 0, "message": message, "logprobs": None, "stop_reason": None, **ended}
        body = {
            **_HEAD, "object": "chat.completion", "choices": [{**choice, "token_ids": None, "routed_experts": None}],
            "service_tier": None, "system_fingerprint": None,
            "usage": {**self.usage_told(), "prompt_tokens_details": None, "completion_tokens_details": None},
            "prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None, "kv_transfer_params": None,
            "ec_transfer_params": None, "metrics": None,
        }  # fmt: skip
        return json.dumps(body, separators=(",", ":")).encode()

    def usage_event(self) -> bytes:
        return _event({**_HEAD, "choices": [], "usage": self.usage_told(), "system_fingerprint": "vllm-0.32.0"})


def _evidence(policy: Policy, scored: int, blocked: bool) -> bytes:
    action: Action = "block" if blocked else "allow"

    def score(phase: Phase, exceeds: bool) -> ScoreEvidence:
        return ScoreEvidence(
            detector="density", phase=phase, score=2.5 if exceeds else 0.5, threshold=2.0,
            p_value=0.001 if exceeds else 0.6, position=6, layer=2, direction="L2.o_proj.u0",
        )  # fmt: skip

    record = Record(
        prompt_tokens=PROMPT_TOKENS,
        tokens_scored=scored,
        mode=policy.mode,
        action=action,
        phase="completion" if blocked else None,
        detector="density" if blocked else None,
        reason="density in the completion, p = 0.001" if blocked else "",
        scores=(score("prompt", False), score("completion", blocked)),
    )
    return Evidence(fingerprint=FINGERPRINT, calibration=CALIBRATION, records=(record,)).to_json().encode()


def status() -> bytes:
    """What its worker would guard with."""
    groups = [group for size in range(1, len(_DETECTORS) + 1) for group in combinations(_DETECTORS, size)]
    worker = WorkerStatus(
        rank=0, fingerprint=FINGERPRINT, calibration=CALIBRATION, generation=1, layers=(1, 2),
        reserved_token_id=RESERVED, undertow_version=VERSION, vllm_version="0.32.0", dtype="float32",
        detectors=tuple(DetectorStatus(detectors=group, supported_fpr=len(group) * 0.001) for group in groups),
        requests_judged=0, tokens_scored=0, tokens_recalled=0, tokens_missed=0, unscorable=0,
    )  # fmt: skip
    return Status(workers=(worker,), channel="answers").model_dump_json().encode()


class PacedEngine(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""
        self._wants_evidence = False
        self._transport: asyncio.Transport | None = None
        self._work: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it.

    def connection_lost(self, error: Exception | None) -> None:
        if self._work is not None:
            self._work.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url, self._body, self._wants_evidence = b"", b"", False

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._wants_evidence |= name.lower() == REQUEST_HEADER.encode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._url.startswith(STATUS_PATH.encode()):
            self._whole(status())
        elif self._url.endswith(b"/models"):
            self._whole(json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())
        else:
            play = Play.read(self._body, self._wants_evidence)
            self._work = asyncio.ensure_future(self._stream(play) if play.stream else self._answer(play))

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def _part(self, data: bytes) -> None:
        self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def _comment(self, evidence: bytes | None) -> None:
        if evidence is not None:
            self._part(STREAM_PREFIX.encode() + evidence + b"\n\n")

    def _whole(self, body: bytes, evidence: bytes | None = None) -> None:
        more = b"" if evidence is None else b"%b: %b\r\n" % (REQUEST_HEADER.encode(), evidence)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n" % (len(body), more)
        self._write(head + body)

    async def _answer(self, play: Play) -> None:
        await asyncio.sleep(play.interval_s * play.tokens)
        self._whole(play.whole(), play.evidence(final=True))

    async def _stream(self, play: Play) -> None:
        self._write(_STREAM)
        self._comment(play.evidence(final=False))
        self._part(_ROLE)
        # The moments that tokens are due at do not move with the moments at which this process wakes.
        loop = asyncio.get_running_loop()
        due = loop.time()
        for number in range(play.innocent):
            due += play.interval_s
            if play.interval_s:
                await asyncio.sleep(max(0.0, due - loop.time()))
            elif number % _FLOOD == 0:
                await asyncio.sleep(0)
            await self._writable.wait()
            if number + 1 == play.tokens:
                self._comment(play.evidence(final=True))
            self._part(play.token(number))
        for event in _end(play):
            self._part(event)
        self._write(b"0\r\n\r\n")


def _end(play: Play) -> Iterator[bytes]:
    """What follows the last innocent token."""
    evidence = play.evidence(final=True)
    comment = [] if evidence is None else [STREAM_PREFIX.encode() + evidence + b"\n\n"]
    if play.blocked:
        yield from (_PAYLOAD, *comment, _STOPPED)
    if play.usage:
        yield play.usage_event()
    yield from (*comment, _DONE)


async def serve(port: int = 0) -> None:
    """Listen on loopback, print the port, and end with whoever holds the other side of standard input."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(PacedEngine, "127.0.0.1", port, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201 - whoever started it reads this
    await loop.run_in_executor(None, sys.stdin.buffer.read)
    server.close()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]) if sys.argv[1:] else 0))
