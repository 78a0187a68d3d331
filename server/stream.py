"""What of a stream may be released, and when. Sans-I/O.

    guard = StreamGuard(call, assessor)
    for event in parser.feed(received):
        send(guard.feed(event))
    guard.refusal                      # before the first byte: answer with this error instead of a stream

A token's own residual is read one step after the token was sampled. So in `enforce` at least the newest chunk of each
choice is held until the next one arrives, and as many more as the policy's `hold_back` says; what is held when a choice
ends is held until the final evidence has been judged. Where a request has several sequences, all chunks of a choice are
held until evidence has named it. What is let pass is released as the very bytes that came. In `monitor` and `off`
nothing is held.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from guard.evidence import STREAM_PREFIX
from guard.faults import FAULTS
from server.assessment import Assessor, Usage, choices_of
from server.errors import ApiError, GuardFailure, blocked_prompt, guard_unavailable, upstream_cut
from server.hold_back import Held, kept
from server.protocols.openai import Call, blocked_chunk, new_head
from server.sse import DONE, Event
from server.telling import last_chunk

_EVIDENCE = STREAM_PREFIX.encode()
_DONE_EVENT = b"data: " + DONE + b"\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


def evidence_of(event: Event) -> bytes | None:
    """The text of an evidence comment; None for any other event."""
    comment = event.comment
    return comment.removeprefix(_EVIDENCE) if comment is not None and comment.startswith(_EVIDENCE) else None


@dataclass(frozen=True, slots=True)
class _Finish:
    """A choice that ended, waiting for the final evidence."""

    index: int
    held: Held
    """Its last chunk, and those before it that are not released yet."""
    chunk: Mapping[str, Any]
    """The last one."""


class StreamGuard:
    """One stream: events of the engine in, bytes for the client out. Mutates the assessor it is given."""

    def __init__(self, call: Call, assessor: Assessor) -> None:
        self._call = call
        self._assessor = assessor
        self._kept = kept(assessor.ruling.hold_back)
        self._held: dict[int, Held] = {}
        self._read: set[int] = set()
        """Choices of which something was released."""
        self._finishing: list[_Finish] = []
        self._finished: set[int] = set()
        self._stopped: dict[int, object] = {}
        """Choices that ended with the reserved token, which evidence must explain."""
        self._tail: list[bytes] = []
        """Chunks without choices (usage), if the client asked for them."""
        self._usage: Usage | None = None
        self._head: Mapping[str, Any] = {}
        self._evidence: bytes | None = None
        self._engine_error: bytes | None = None
        self.opened = False
        """The first evidence was judged: status and headers can be sent, unless there is a refusal."""
        self.refusal: ApiError | None = None
        self.closed = False
        """Nothing more comes out."""
        self.broken = False
        """The engine reported an error, or went away, in the middle of its answer."""

    @property
    def holding(self) -> bool:
        """Some choice's output was kept back."""
        return bool(self._held or self._finishing)

    @property
    def let_go(self) -> bool:
        """Some of what was kept back was released, or there is nothing more to come."""
        return bool(self._read) or self.closed

    def feed(self, event: Event) -> list[bytes]:
        """Take one event of the engine; returns what may now be sent."""
        if self.closed:
            return []
        if event.data is None:
            return self._comment(evidence_of(event))
        if event.data == DONE:
            self._open_unproven()
            return [] if self.closed else self._done(event.raw)
        try:
            chunk = json.loads(event.data.decode())
        except (ValueError, RecursionError):
            chunk = None
        if isinstance(chunk, dict) and "error" in chunk:
            return self._error(chunk["error"], event.raw)
        self._open_unproven()
        return [] if self.closed else self._chunk(chunk, event.raw)

    def cut(self) -> list[bytes]:
        """The engine went away without `[DONE]`. What is held stays held."""
        if self.closed:
            return []
        self.broken = True
        return self._close(upstream_cut())

    def _close(self, error: ApiError) -> list[bytes]:
        self.closed = True
        self._held.clear()
        self._finishing.clear()
        return [error.sse(), _DONE_EVENT]

    def _comment(self, text: bytes | None) -> list[bytes]:
        if text is None:
            return [_KEEP_ALIVE] if self.opened else []
        if not self.opened:
            self._open(text)
            return []
        # Before each chunk that ends a choice, and before `[DONE]`: only the last one is of the whole answer, but a
        # block or a failure that an earlier one names is acted on at once.
        self._evidence = text
        failure = self._assessor.opening(text)
        if failure is not None and self._assessor.enforcing:
            return self._close(guard_unavailable())
        return [part for index in self._held for part in self._release(index)]

    def _open(self, evidence: bytes | None) -> None:
        self.opened = True
        failure = self._assessor.opening(evidence)
        if failure is not None and self._assessor.enforcing:
            self.refusal = guard_unavailable()
        elif self._assessor.prompt_blocked and self._assessor.ruling.told is None:
            self.refusal = blocked_prompt(self._call.endpoint.prompt_field)
        self.closed = self.refusal is not None

    def _open_unproven(self) -> None:
        """An event came before any evidence."""
        if not self.opened:
            self._open(None)

    def _error(self, error: object, raw: bytes) -> list[bytes]:
        if self.opened:
            self._engine_error = raw
        else:
            # No sequence was started: the error is the whole answer.
            self.refusal = _passed_on(error)
            self.broken = self.closed = True
        return []

    def _chunk(self, chunk: object, raw: bytes) -> list[bytes]:
        choices = choices_of(chunk) if isinstance(chunk, dict) else None
        if not isinstance(chunk, dict) or choices is None or len(choices) > 1:
            return self._unreadable("a chunk is not of one choice", raw)
        if not choices:
            self._usage = Usage.read(chunk.get("usage")) or self._usage
            if self._call.wants_usage:
                self._tail.append(raw)
            return []
        self._head = chunk
        return self._choice(choices[0], chunk, raw)

    def _choice(self, choice: Mapping[str, Any], chunk: Mapping[str, Any], raw: bytes) -> list[bytes]:
        index = choice["index"]
        if index in self._finished or not 0 <= index < self._call.prompts * self._call.n:
            return self._unreadable(f"a chunk of choice {index} was not expected", raw)
        if choice.get("finish_reason") is not None:
            return self._finish(index, choice, chunk, raw)
        if index in self._assessor.blocked:
            return []
        if not self._assessor.enforcing:
            return [raw]
        if index not in self._held and _without_tokens(choice):
            return [raw]
        self._hold(index, raw)
        return self._release(index)

    def _hold(self, index: int, raw: bytes) -> None:
        if index not in self._held:
            self._held[index] = Held(self._kept)
        self._held[index].push(raw)

    def _release(self, index: int) -> list[bytes]:
        """All that the policy does not keep back, of a choice that evidence has named."""
        if index not in self._assessor.proven or index in self._assessor.blocked:
            return []
        released = self._held[index].release()
        if released:
            self._read.add(index)
        return released

    def _finish(self, index: int, choice: Mapping[str, Any], chunk: Mapping[str, Any], raw: bytes) -> list[bytes]:
        self._finished.add(index)
        stop_reason = choice.get("stop_reason")
        stopped = stop_reason is not None and stop_reason == self._assessor.reserved_token_id
        if stopped:
            self._stopped[index] = stop_reason
        if stopped or index in self._assessor.blocked:
            self._held.pop(index, None)
            return [self._blocked(index, chunk)]
        if not self._assessor.enforcing:
            return [raw]
        self._hold(index, raw)
        released = self._release(index)
        self._finishing.append(_Finish(index, self._held.pop(index), chunk))
        return released

    def _done(self, raw: bytes) -> list[bytes]:
        if self._engine_error is not None:
            return self._done_with_error(self._engine_error, raw)
        failure = self._judge()
        if failure is not None and self._assessor.enforcing:
            return self._close(guard_unavailable())
        self.closed = True
        released: list[bytes] = []
        for finish in self._finishing:
            if finish.index in self._assessor.blocked:
                released.append(self._blocked(finish.index, finish.chunk))
            else:
                released += finish.held.release_all()
        released += self._block(index for index in self._assessor.blocked if index not in self._finished)
        return [*released, *self._tail, *self._told(), raw]

    def _judge(self) -> GuardFailure | None:
        failure = self._assessor.final(self._evidence, self._usage)
        for index, stop_reason in self._stopped.items():
            failure = failure or self._assessor.stopped_unexplained(index, stop_reason)
        expected = self._call.prompts * self._call.n
        if failure is None and len(self._finished | self._assessor.blocked.keys()) < expected:
            failure = self._assessor.fail(GuardFailure("response_invalid", "a choice of the stream never finished"))
        return failure

    def _done_with_error(self, error: bytes, raw: bytes) -> list[bytes]:
        """The engine gave up. Where a block made it (a grammar cannot take the reserved token), that is the answer."""
        failure = self._assessor.opening(self._evidence) if self._evidence is not None else None
        if failure is not None and failure.kind in FAULTS and self._assessor.enforcing:
            return self._close(guard_unavailable())
        self.closed = True
        if self._assessor.blocked:
            unfinished = set(range(self._call.prompts * self._call.n)) - self._finished
            unfinished |= {finish.index for finish in self._finishing}
            return [*self._block(sorted(unfinished)), *self._tail, *self._told(), raw]
        self.broken = True
        return [error, raw]

    def _told(self) -> list[bytes]:
        # Other protocols have no place for it.
        return [] if self._call.asked else last_chunk(self._call, self._assessor, self._head)

    def _block(self, indices: Iterable[int]) -> list[bytes]:
        head = {key: value for key, value in self._head.items() if key != "usage"} or new_head(self._call)
        return [self._blocked(index, head) for index in indices]

    def _blocked(self, index: int, head: Mapping[str, Any]) -> bytes:
        """The end of a blocked choice; what its client is told stands apart from what it has read."""
        told = self._assessor.ruling.told
        if told is not None and index in self._read:
            told = f"\n\n{told}"
        return blocked_chunk(self._call.endpoint, index, head, told)

    def _unreadable(self, detail: str, raw: bytes) -> list[bytes]:
        self._assessor.fail(GuardFailure("response_invalid", detail))
        return self._close(guard_unavailable()) if self._assessor.enforcing else [raw]


def _passed_on(error: object) -> ApiError:
    """The engine's error event as a plain answer."""
    fields = error if isinstance(error, dict) else {}
    code = fields.get("code")
    status = code if type(code) is int and 400 <= code < 600 else 500
    return ApiError(
        status,
        str(fields.get("message", "The model failed.")),
        type=str(fields.get("type", "server_error")),
        code=None if code is None else str(code),
        param=None if fields.get("param") is None else str(fields["param"]),
    )


def _without_tokens(choice: Mapping[str, Any]) -> bool:
    """True for the chunk that only names the role: there is nothing in it that a guard could still take back."""
    delta = choice.get("delta")
    if not isinstance(delta, dict) or choice.get("logprobs") or choice.get("token_ids"):
        return False
    return delta.get("role") is not None and not any(value for key, value in delta.items() if key != "role")
