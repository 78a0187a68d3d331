"""Raises several members at a time, each in a process of its own; whoever watches hears of every step.

Stopping the crew stops its workers and waits for them, so that nothing half-written stays behind.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from guard.errors import OrganismError, UndertowError
from guard.organisms.raising import raise_member
from guard.organisms.standards import PROMPTS_PER_MEASURE

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from guard.organisms.suite import Member

OnStep = Callable[["Member", float], None]


@dataclass(frozen=True)
class _Worker:
    member: Member
    process: SpawnProcess


def raise_members(
    members: Sequence[Member], jobs: int, on_step: OnStep, prompts_per_measure: int = PROMPTS_PER_MEASURE
) -> Iterator[tuple[Member, dict[str, Any]]]:
    """Each member with its manifest, in the order in which they are done; `on_step` is given each step's loss.

    With one job all happens in this process. The first error ends it all.
    """
    if jobs == 1:
        for member in members:
            yield member, raise_member(member, partial(on_step, member), prompts_per_measure)
        return
    waiting = deque(members)
    at_work: dict[Connection, _Worker] = {}
    try:
        while waiting or at_work:
            while waiting and len(at_work) < jobs:
                inbox, worker = _started(waiting.popleft(), prompts_per_measure)
                at_work[inbox] = worker
            ready = wait(list(at_work))
            for inbox, worker in [each for each in at_work.items() if each[0] in ready]:
                told = _heard(inbox, worker)
                if isinstance(told, float):
                    on_step(worker.member, told)
                    continue
                worker.process.join()
                del at_work[inbox]
                yield worker.member, told
    finally:
        for worker in at_work.values():
            worker.process.terminate()
        for worker in at_work.values():
            worker.process.join()


def _started(member: Member, prompts_per_measure: int) -> tuple[Connection, _Worker]:
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(member, prompts_per_measure, outbox), daemon=True)
    process.start()
    # The worker's copy is the last one then: when it dies, the inbox says so.
    outbox.close()
    return inbox, _Worker(member, process)


def _heard(inbox: Connection, worker: _Worker) -> float | dict[str, Any]:
    try:
        told: float | dict[str, Any] | UndertowError = inbox.recv()
    except EOFError:
        worker.process.join()
        name, code = worker.member.name, worker.process.exitcode
        raise OrganismError(f"the process that trained {name!r} ended with code {code}, expected a manifest") from None
    if isinstance(told, UndertowError):
        raise told
    return told


def _work(member: Member, prompts_per_measure: int, outbox: Connection) -> None:
    from transformers.utils.logging import disable_progress_bar

    # Ctrl-C reaches every process of the terminal; the crew's end is what ends a worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)
    # The terminal belongs to whoever watches the crew.
    disable_progress_bar()
    with suppress(KeyboardInterrupt, BrokenPipeError):
        try:
            outbox.send(raise_member(member, outbox.send, prompts_per_measure))
        except UndertowError as error:
            outbox.send(error)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
