"""Errors as an OpenAI client sees them.

    ApiError                      any refusal, with its HTTP status and its OpenAI error body
    GuardFailure                  why a request could not be judged; in `enforce` it becomes `guard_unavailable`
    UpstreamError                 the engine did not answer, or stopped answering

What the client may do about an error is said by its `code`; `docs/http.md` lists them. Messages never hold scores (an
oracle for attackers), prompts or secrets.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from guard.errors import UndertowError
from guard.faults import FAULTS, Fault

ServerFailure = Literal[
    "no_handshake",
    "evidence_missing",
    "evidence_invalid",
    "channel_silent",
    "fingerprint",
    "policy",
    "coverage",
    "unexplained_stop",
    "response_invalid",
    "internal",
]
FailureKind = ServerFailure | Fault
"""Why a request counts as not judged: the engine could not score it (`Fault`), or what it says does not hold here.
`docs/metrics.md` says what each one means."""

FAILURE_KINDS: tuple[FailureKind, ...] = (*get_args(ServerFailure), *FAULTS)

UpstreamKind = Literal["connect", "timeout", "cut", "status", "protocol", "busy"]
UPSTREAM_KINDS: tuple[UpstreamKind, ...] = ("connect", "timeout", "cut", "status", "protocol", "busy")

LimitName = Literal["requests_per_minute", "tokens_per_minute", "concurrent_requests", "concurrent_streams"]
LIMITS: tuple[LimitName, ...] = (
    "requests_per_minute",
    "tokens_per_minute",
    "concurrent_requests",
    "concurrent_streams",
)
"""What of a key's quota can be used up."""

Repeat = Literal["safe", "once", "never"]
"""Whether a request that failed may be sent again. safe: the engine cannot have begun to work on it. once: a kept
connection closed under it without a byte of answer, which an engine does that ends, and hardly one that began."""

_RETRY_AFTER = {"retry-after": "1"}
"""Seconds: another replica, or a pod in the place of this one, is there soon."""


@dataclass(frozen=True, slots=True)
class GuardFailure:
    """Why a request could not be judged. A value, not an exception: in `monitor` it is counted and let pass."""

    kind: FailureKind
    detail: str
    """For the operator's log: names what was found and what was expected, never a prompt."""


class UpstreamError(UndertowError):
    """The engine cannot be reached, timed out, or stopped in the middle of an answer."""

    def __init__(self, kind: UpstreamKind, detail: str, *, engine: str | None = None, repeat: Repeat = "never") -> None:
        """`engine`: its name in the settings; None where none was chosen."""
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.engine = engine
        self.repeat = repeat
        self.counted = False
        """Whether metrics and log have it."""


class ApiError(UndertowError):
    """A request is answered with an error, in the shape that OpenAI's clients read."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.headers = headers or {}

    def payload(self) -> dict[str, Any]:
        """The body, before it is JSON."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """The body of a plain response."""
        return json.dumps(self.payload()).encode()

    def sse(self) -> bytes:
        """The same as one event of a stream that has already begun."""
        return b"data: " + self.body() + b"\n\n"


class ShuttingDown(ApiError):  # noqa: N818 - it is an event, not a fault
    """503, or the last event of a stream: the server ends, and has waited as long as it may."""

    def __init__(self) -> None:
        super().__init__(
            503, "The server is shutting down.", type="server_error", code="shutting_down", headers=_RETRY_AFTER
        )


class RateLimited(ApiError):  # noqa: N818 - an answer, not a fault
    """429: later the same request may be answered."""

    def __init__(self, limit: LimitName, allowed: int, wait_s: float, headers: dict[str, str]) -> None:
        super().__init__(
            429,
            f"The limit of {allowed:,} {limit.replace('_', ' ')} of this API key is reached. Try again in "
            f"{math.ceil(wait_s)} s.",
            type="requests" if limit != "tokens_per_minute" else "tokens",
            code="rate_limit_exceeded",
            headers={**headers, "retry-after": str(max(1, math.ceil(wait_s)))},
        )
        self.limit = limit


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the client can mend it."""
    return ApiError(400, message, param=param, code=code)


def unauthorized(message: str) -> ApiError:
    """401: no key, or one that opens nothing."""
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def blocked_prompt(param: str) -> ApiError:
    """400 `content_filter`, as Azure and OpenAI answer a filtered prompt. Asking again would not help."""
    return ApiError(
        400,
        "The prompt was blocked by the content filter.",
        param=param,
        code="content_filter",
        headers={"x-should-retry": "false"},
    )


def guard_unavailable() -> ApiError:
    """503: the request could not be judged, and in `enforce` what was not judged does not pass."""
    return ApiError(
        503, "The content filter could not judge this request.", type="server_error", code="guard_unavailable"
    )


def upstream_unavailable(error: UpstreamError) -> ApiError:
    """503 where no engine can be reached or every one has its hands full, 504 where it was silent for too long."""
    if error.kind == "timeout":
        return ApiError(504, "The model did not answer in time.", type="server_error", code="upstream_timeout")
    if error.kind == "busy":
        said, code = "The model has more requests than it can take.", "upstream_busy"
    else:
        said, code = "The model cannot be reached.", "upstream_unavailable"
    return ApiError(503, said, type="server_error", code=code, headers=_RETRY_AFTER)


def unknown_model() -> ApiError:
    """404, as OpenAI answers: no engine serves what the request names."""
    return ApiError(404, "The model does not exist.", param="model", code="model_not_found")


def upstream_cut() -> ApiError:
    """Mid-stream: the engine stopped answering. Status is only for the log; the stream already said 200."""
    return ApiError(502, "The model stopped answering.", type="server_error", code="upstream_cut")
