"""What signals do to a command."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that whatever is open (an engine process) is cleaned up. So
    does SIGHUP, unless somebody saw to it that it is ignored, as `nohup` does."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def hangup_as(asked: Callable[[], None]) -> Iterator[None]:
    """SIGHUP calls `asked`, as daemons read their settings again. Where it comes because the terminal that this process
    was started from is gone, it ends the process in order, as it does without this."""
    attached = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()

    def hung_up(number: int, frame: object) -> None:
        if attached and not _has_terminal():
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            asked()

    before = signal.signal(signal.SIGHUP, hung_up)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
