"""From evidence to what may be done with an answer. Sans-I/O.

    failure = Assessor(call, ruling, handshake).opening(evidence)        # before the first byte
    failure = Assessor(call, ruling, handshake).final(evidence, usage)   # when the answer is complete

Evidence is authoritative: a record that says `block` blocks its choice, whatever the choice itself says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from guard.errors import EvidenceError
from guard.evidence import SILENT, Coverage, Evidence, Record
from guard.policy import SEVERITY, Action
from server.errors import GuardFailure
from server.protocols.openai import Call
from server.ruling import Ruling
from server.upstreams.handshake import Handshake

Told = Literal["allow", "flag", "steer", "block", "unguarded"]
"""What a client is told; `telling` says where."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that vLLM counted for a whole response. Prompt tokens are counted once per prompt, not per choice."""

    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def read(cls, usage: object) -> Usage | None:
        """From a response's `usage`; None where it is absent or not made of counts."""
        if not isinstance(usage, Mapping):
            return None
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
        if type(prompt) is not int or type(completion) is not int:
            return None
        return cls(prompt, completion)


class Assessor:
    """Reads the evidence of one request. Holds the last evidence that could be read, for metrics and the log."""

    def __init__(
        self,
        call: Call,
        ruling: Ruling,
        handshake: Handshake | None,
        knows: Callable[[Evidence], bool] = lambda _: False,
        incident: str | None = None,
    ) -> None:
        """`knows`: whether evidence is of a guard that was agreed on, though another than the handshake's: what guards
        can be changed while a request runs. `incident`: the id that it would be kept under; None where none is.
        """
        self._call = call
        self.ruling = ruling
        self._handshake = handshake
        self._knows = knows
        self._incident = incident
        # Only a number: `n` is the client's word until the engine has accepted it.
        self._sequences = call.prompts * call.n
        self.evidence: Evidence | None = None
        self.blocked: dict[int, Record] = {}
        """Blocked sequences by the index of their choice. What is blocked for want of a score is a failure instead."""
        self.proven: set[int] = set()
        """Choices whose whole prompt has a score, or which are blocked."""
        self.coverage: Coverage | None = None
        """Of a complete answer; None before, and where nothing of it is released."""
        self.usage: Usage | None = None
        """Of a complete answer, as the engine counted."""
        self.seconds = 0.0
        """Spent reading evidence and holding it against the answer."""
        self.failure: GuardFailure | None = None
        """The first thing that went wrong. In `monitor` and `off` the answer passes all the same."""

    @property
    def enforcing(self) -> bool:
        """What cannot be judged does not pass."""
        return self.ruling.enforcing

    @property
    def reserved_token_id(self) -> int | None:
        """The token that ends a blocked sequence; None without a handshake."""
        return self._handshake.reserved_token_id if self._handshake else None

    @property
    def records(self) -> tuple[Record, ...]:
        return self.evidence.records if self.evidence else ()

    @property
    def prompt_blocked(self) -> bool:
        """Every sequence was blocked at its prompt: nothing was generated that could be answered."""
        return len(self.blocked) == self._sequences and all(
            record.phase == "prompt" for record in self.blocked.values()
        )

    @property
    def told(self) -> Told:
        """The most severe action so far, or `unguarded` where a failure was let pass."""
        if self.failure is not None:
            return "unguarded"
        action: Action = "allow"
        for record in self.records:
            action = max(action, record.action, key=SEVERITY.__getitem__)
        return action

    @property
    def incident(self) -> str | None:
        """The id under which the request is kept, so far as is known; None where it is not."""
        return self._incident if any(record.action != "allow" for record in self.records) else None

    @property
    def tokens(self) -> int:
        """Of prompts and answers: what the engine counted, or, of an answer that broke off, what has a score."""
        if self.usage is not None:
            return self.usage.prompt_tokens + self.usage.completion_tokens
        return sum(record.tokens_scored for record in self.records)

    @property
    def guard(self) -> tuple[str, str]:
        """The bank's fingerprint and the calibration's digest that the last evidence is of; empty without any."""
        return (self.evidence.fingerprint, self.evidence.calibration) if self.evidence else ("", "")

    def fail(self, failure: GuardFailure) -> GuardFailure:
        """Remember a failure; the first one stays."""
        if self.failure is None:
            self.failure = failure
        return self.failure

    def opening(self, text: str | bytes | None) -> GuardFailure | None:
        """Hold evidence against what was asked, before an answer is complete.

        Of several sequences some may still wait for their turn in the engine: `proven` says which ones do not.
        """
        begun = perf_counter()
        failure = self._read(text) or self._check_records()
        self.seconds += perf_counter() - begun
        if failure is None and not self.proven:
            record = self.records[0] if self.records else None
            detail = f"{record.tokens_scored} of {record.prompt_tokens}" if record else "none of the"
            failure = GuardFailure("coverage", f"{detail} prompt tokens have a score")
        return self.fail(failure) if failure else None

    def final(self, text: str | bytes | None, usage: Usage | None) -> GuardFailure | None:
        """Hold evidence against a complete answer: every token that needed a score has one."""
        self.usage = usage
        begun = perf_counter()
        failure = self._read(text) or self._check_records() or self._check_coverage(usage)
        self.seconds += perf_counter() - begun
        return self.fail(failure) if failure else None

    def stopped_unexplained(self, index: int, stop_reason: object) -> GuardFailure | None:
        """A choice that ended with the reserved token, though no record blocks it."""
        if self.reserved_token_id is None or type(stop_reason) is not int or stop_reason != self.reserved_token_id:
            return None
        if index in self.blocked:
            return None
        return self.fail(GuardFailure("unexplained_stop", f"choice {index} was stopped, but no record blocks it"))

    def _read(self, text: str | bytes | None) -> GuardFailure | None:
        if self._handshake is None:
            return GuardFailure("no_handshake", "no handshake with the engine")
        if text is None:
            return GuardFailure("evidence_missing", "the engine sent no evidence")
        if text in (SILENT, SILENT.encode()):
            return GuardFailure("channel_silent", "the engine's worker gave no evidence when it was asked")
        try:
            evidence = Evidence.from_json(text)
        except EvidenceError as error:
            return GuardFailure("evidence_invalid", str(error))
        told = evidence.fingerprint, evidence.calibration
        agreed = self._handshake.guard_of(self._call.fields.get("model"))
        # An adapter's guard cannot be changed while the engine runs: what is known besides is the model's own.
        own = self._handshake.guard_of(None)
        if told != agreed and not (agreed == own and self._knows(evidence)):
            said, held = (f"bank {bank or 'none'} with calibration {cal or 'none'}" for bank, cal in (told, agreed))
            return GuardFailure("fingerprint", f"evidence is of {said}, the handshake of {held}")
        self.evidence = evidence
        self.blocked = {
            self._call.index(record.prompt_index, record.choice_index): record
            for record in evidence.records
            if record.action == "block" and record.unscorable is None
        }
        # What is blocked may end before its whole prompt was computed.
        self.proven = self.blocked.keys() | {
            self._call.index(record.prompt_index, record.choice_index)
            for record in evidence.records
            if 0 < record.prompt_tokens <= record.tokens_scored
        }
        return None

    def _check_records(self) -> GuardFailure | None:
        found = {
            (record.prompt_index, record.choice_index)
            for record in self.records
            if 0 <= record.prompt_index < self._call.prompts and 0 <= record.choice_index < self._call.n
        }
        if len(found) != len(self.records):
            return GuardFailure("evidence_invalid", "a record is of no sequence of the request, or a second one")
        for record in self.records:
            if self.enforcing and record.mode != "enforce":
                return GuardFailure("policy", f"the engine judged in mode {record.mode}, the policy asks for enforce")
            if record.unscorable is not None:
                return GuardFailure(record.fault or "unscorable", record.unscorable)
        return None

    def _check_coverage(self, usage: Usage | None) -> GuardFailure | None:
        if len(self.blocked) == self._sequences:
            return None  # Nothing of it is released.
        if len(self.proven) != self._sequences:
            detail = (
                f"{len(self.proven)} of {self._sequences} sequences have a record with a score for every prompt token"
            )
            return GuardFailure("coverage", detail)
        if usage is None:
            return GuardFailure("response_invalid", "the answer has no usage to hold the evidence against")
        # The last token of each sequence never enters the model, so it has no score.
        needed = self._call.n * usage.prompt_tokens + usage.completion_tokens - self._sequences
        coverage = self.coverage = Coverage(needed, sum(record.tokens_scored for record in self.records))
        if not coverage.complete:
            return GuardFailure("coverage", f"{coverage.scored} of {coverage.needed} tokens have a score")
        return None


def choices_of(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The choices of a response or a chunk; None where they are not what OpenAI's shape says."""
    choices = body.get("choices")
    if not isinstance(choices, list):
        return None
    if not all(isinstance(choice, dict) and type(choice.get("index")) is int for choice in choices):
        return None
    return choices
