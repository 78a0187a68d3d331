"""From what guards to what is wanted next, in two phases. The worker's half.

Answers are JSON, refusals included: where one worker raises, vLLM leaves the answers of the others unread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from guard.control import Wanted
from guard.errors import UndertowError

Next = TypeVar("Next")


@dataclass(frozen=True, slots=True)
class Prepared(Generic[Next]):
    """What waits to be taken."""

    ticket: str
    """Of the change that asked for it: no other one can have it taken."""
    next: Next | None
    """None where it guards already."""


class Handover(Generic[Next]):
    """One worker's part in a change."""

    def __init__(
        self, read: Callable[[Wanted], Next | None], take: Callable[[Next], None], generation: Callable[[], int]
    ) -> None:
        """`read` may raise, and changes nothing; None: what is wanted guards already. `take` may not raise."""
        self._read, self._take, self._generation = read, take, generation
        self._prepared: Prepared[Next] | None = None

    def prepare(self, ticket: str, wanted: str) -> str:
        """Read and check what is wanted (`Wanted` as JSON), in place of anything prepared before."""
        self._prepared = None
        try:
            following = self._read(Wanted.model_validate_json(wanted))
        except UndertowError as error:
            return self._answer(refusal=str(error))
        except Exception as error:  # noqa: BLE001  (an answer from every worker, whatever went wrong in one)
            return self._answer(refusal=f"{type(error).__name__}: {error}")
        self._prepared = Prepared(ticket, following)
        return self._answer(changes=following is not None)

    def commit(self, ticket: str) -> str:
        """Guard by what was prepared under this ticket from now on."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared.ticket != ticket:
            return self._answer(refusal="nothing was prepared for this change, or another one came between")
        if prepared.next is not None:
            self._take(prepared.next)
        return self._answer()

    def abandon(self, ticket: str) -> str:
        """Forget what was prepared under this ticket."""
        if self._prepared is not None and self._prepared.ticket == ticket:
            self._prepared = None
        return self._answer()

    def _answer(self, refusal: str | None = None, changes: bool = False) -> str:
        return json.dumps({"refusal": refusal, "changes": changes, "generation": self._generation()})
