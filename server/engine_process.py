"""vLLM as a child process: started with the guard inside, waited for, ended with everything it started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

import guard.errors
from guard.engine.launch import GuardedAdapter, engine_environment, serve_arguments, serve_command
from guard.errors import EngineError, InputError, UndertowError

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
HINTS = {
    "Not enough allowed NUMA nodes": "on a CPU, say which cores each rank may use: VLLM_CPU_OMP_THREADS_BIND='0-3|4-7' "
    "for two ranks, or `nobind`",
}
"""What vLLM says where it does not say what to do about it."""


class EngineProcess:
    """A guarded vLLM. Use as a context manager: leaving ends it, and whatever it started."""

    def __init__(
        self,
        model: Path,
        bank: Path | None,
        fingerprint: str | None,
        calibration: Path | None,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        log: Path,
        extra: Sequence[str] = (),
        steering: bool = False,
        adapters: Sequence[GuardedAdapter] = (),
    ) -> None:
        """`log` receives what vLLM prints. `extra` are further arguments of `vllm serve`. `steering`: policies may
        steer. For the others see `launch.additional_config`."""
        self.url = f"http://{host}:{port}"
        self._log = log
        arguments = serve_arguments(model, bank, fingerprint, calibration, host, port, extra, steering, adapters)
        command = [*serve_command(), *arguments]
        with log.open("wb") as output:
            # A session of its own: Ctrl-C in the terminal reaches us alone, and we end the engine in good order.
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=engine_environment(),
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of vLLM's API process, which its other processes descend from."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait_until_up(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until vLLM answers, saying how long it has taken.

        Raises:
            InputError, EngineError: the worker refused to start; its own words. EngineError: it died or took too long.
        """
        started = time.monotonic()
        while (elapsed := time.monotonic() - started) < timeout_s:
            if self.returncode is not None:
                _end_line()
                raise self._failure()
            if self._answers():
                _say(f"vLLM is up after {elapsed:.0f} s")
                _end_line()
                return
            _say(f"starting vLLM with the guard inside: {elapsed:.0f} s (30-100 s are usual; log: {self._log})")
            time.sleep(0.5)
        _end_line()
        raise EngineError(f"vLLM did not answer within {timeout_s:.0f} s; its log is {self._log}")

    def kill(self) -> None:
        """End it without ceremony, with everything it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """End it in good order, by force after a while."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # all of it is gone

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).is_success
        except httpx.TransportError:
            return False

    def _failure(self) -> UndertowError:
        """Why it ended, in the guard's own words where it was the guard that refused."""
        text = self._log.read_text(errors="replace")
        told = re.findall(r"guard\.errors\.(\w+): (.+)", text)
        if told:
            name, message = told[0]
            kind = getattr(guard.errors, name, EngineError)
            return kind(message) if issubclass(kind, InputError) else EngineError(message)
        lines = [line for line in text.splitlines() if line.strip()]
        tail = "\n".join(lines[-5:])
        hints = [f"; {hint}" for words, hint in HINTS.items() if words in text]
        return EngineError(f"vLLM ended with code {self.returncode}{''.join(hints)}; the end of {self._log}:\n{tail}")


def _say(text: str) -> None:
    """A line that the next one overwrites, where there is a terminal to do so; else only the last one matters."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
    elif text.startswith("vLLM is up"):
        sys.stderr.write(text)


def _end_line() -> None:
    sys.stderr.write("\n")
