"""The processes of a measurement: the paced engine, the server, another proxy, the clients. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

import server
from guard.errors import UndertowError
from server.benching.engine import MODEL
from server.benching.turns import Flood, Outcome, Times, Turn

_START_S = 120.0
_STOP_S = 10.0
_SET_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
TICKS = os.sysconf("SC_CLK_TCK")


_libc = ctypes.CDLL(None)


class BenchError(UndertowError):
    """A process of the measurement did not come up, or ended."""


class Child:
    """A process that ends with its context, with what it printed in a file."""

    def __init__(
        self,
        name: str,
        line: Sequence[str],
        folder: Path,
        environ: Mapping[str, str] | None = None,
        piped: bool = False,
    ) -> None:
        """`piped`: it is talked to over its standard streams, and ends when they do."""
        self.name = name
        self.log = folder / f"{name}.log"
        root = str(Path(server.__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._line, self._piped = line, piped
        self._environ = {**os.environ, "PYTHONPATH": path, **(environ or {})}
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal reaches us alone, and we end it in good order.
            return subprocess.Popen(
                self._line,
                stdin=subprocess.PIPE if self._piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._piped else log,
                stderr=log,
                env=self._environ,
                cwd=self.log.parent,
                start_new_session=True,
                # A session of its own would outlive us, too, where nobody lets us end it.
                preexec_fn=_die_with_parent,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End it in good order, by force after a while."""
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()

    def cpu_s(self) -> float:
        """Processor time so far, of it and of what it started."""
        fields = [told.rpartition(")")[2].split() for told in self._read("stat")]
        return sum(int(each[11]) + int(each[12]) for each in fields) / TICKS

    def resident_bytes(self) -> int:
        """Memory that it holds, with what it started."""
        return sum(int(told.split()[1]) for told in self._read("statm")) * os.sysconf("SC_PAGE_SIZE")

    def wait_for(self, true: Callable[[], bool]) -> None:
        """Raises BenchError, with the end of its log, where that does not come true in time, or it ends."""
        deadline = time.monotonic() + _START_S
        while not true():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise self.failure()
            time.sleep(0.05)

    def failure(self) -> BenchError:
        code = self.process.poll()
        what = "did not come up" if code is None else f"ended with code {code}"
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])
        return BenchError(f"{self.name} {what}; the end of what it printed:\n{tail}")

    def _read(self, name: str) -> list[str]:
        """A file of /proc, of the process and of all that descend from it."""
        found, waiting = [], [self.process.pid]
        while waiting:
            process = Path("/proc") / str(waiting.pop())
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may end just now
                found.append((process / name).read_text())
                for task in (process / "task").iterdir():
                    waiting += map(int, (task / "children").read_text().split())
        return found

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return  # all of it is gone


def _die_with_parent() -> None:
    """In the child, before it becomes another program: the kernel kills it when we are gone, however we went."""
    _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


class Engine(Child):
    """The paced engine."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        """`port` 0: any that is free. Raises BenchError where it cannot be taken."""
        super().__init__("engine", [sys.executable, "-m", "server.benching.engine", str(port)], folder, piped=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            failure = self.failure()
            self.close()
            raise failure
        self.port = int(line)


class Server(Child):
    """`undertow serve`, in enforce with default settings, before an engine."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        config = folder / "undertow.yaml"
        config.write_text(json.dumps(settings(engine.port, folder)))
        super().__init__("server", [sys.executable, "-m", "server.cli", "serve", "--config", str(config)], folder)
        self.port = 0

    def wait(self) -> None:
        """Until it serves."""
        self.wait_for(self._listens)
        self.wait_for(lambda: answers(self.port))

    def _listens(self) -> bool:
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)/", self.log.read_text())
        self.port = int(found[1]) if found else 0
        return found is not None


def settings(engine_port: int, folder: Path) -> dict[str, Any]:
    """Of the measured server: what stands in no file of settings, but for addresses and places."""
    return {
        "version": 1,
        "listen": {"host": "127.0.0.1", "port": 0},
        "admin": {"host": "127.0.0.1", "port": 0},
        "upstream": {"url": f"http://127.0.0.1:{engine_port}"},
        "incidents": {"path": str(folder / "incidents.db"), "spool": str(folder / "incidents.spool")},
    }


class LiteLLM(Child):
    """LiteLLM's proxy, one worker, before an engine. From an environment of its own."""

    def __init__(self, command: Path, folder: Path, engine: Engine) -> None:
        model = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{engine.port}/v1", "api_key": "none"}
        config = folder / "litellm.yaml"
        config.write_text(json.dumps({"model_list": [{"model_name": MODEL, "litellm_params": model}]}))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        line = [str(command), "--config", str(config), "--host", "127.0.0.1", "--port", str(self.port)]
        environ = {
            "PYTHONPATH": "",
            # It asks the internet for prices when it starts, and nobody here needs them.
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            # Without keys, as the server that it is held against; loopback alone reaches it.
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
            "LITELLM_LOG": "ERROR",
        }
        super().__init__("litellm", [*line, "--num_workers", "1", "--telemetry", "False"], folder, environ)

    def wait(self) -> None:
        """Until it serves."""
        self.wait_for(lambda: answers(self.port))

    def restart(self) -> None:
        """End it, with all that it has not done yet, and begin anew."""
        self.close()
        self.process = self._start()
        self.wait()


class Load(Child):
    """The clients."""

    def __init__(self, folder: Path) -> None:
        super().__init__("clients", [sys.executable, "-m", "server.benching.load"], folder, piped=True)

    def take(self, turn: Turn | Flood, port: int, every_second: Callable[[], None] = lambda: None) -> Outcome:
        """Have a turn taken. `every_second` is called while it lasts, where the turn is told. Raises BenchError."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        kind = "flood" if isinstance(turn, Flood) else "turn"
        stdin.write(json.dumps({kind: asdict(turn), "port": port}) + "\n")
        stdin.flush()
        for line in stdout:
            said = json.loads(line)
            if "outcome" in said:
                times = {name: Times(**values) for name, values in said["outcome"].pop("times").items()}
                return Outcome(**said["outcome"], times=times)
            every_second()
        self.process.wait()
        raise self.failure()


def answers(port: int) -> bool:
    """Whether a chat completion comes through."""
    body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "Are you there?"}]}
    try:
        # Nothing is encrypted here, and a client that verifies reads every certificate authority first.
        return httpx.post(
            f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=5, verify=False, trust_env=False
        ).is_success
    except httpx.TransportError:
        return False
