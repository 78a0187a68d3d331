"""A server that is told to end: not ready first, then no new requests, then what still runs is cut off in shape."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from .fake_engine import MODEL, FakeEngine, Script
from .fleet import eventually
from .hosting import Host
from .test_server_answers import CHAT, MESSAGES, chat_body, events
from .test_server_failures import error_code


class Served:
    """`undertow serve` as a process."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.log = ""

    def post(self, **fields: object) -> httpx.Response:
        return httpx.post(f"{self.url}{CHAT}", json=chat_body(**fields), timeout=20)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> tuple[int, float]:
        """Exit code, and how long it took from now."""
        began = time.monotonic()
        _, self.log = self.process.communicate(timeout=20)
        return self.process.returncode, time.monotonic() - began

    def requests(self) -> list[dict[str, object]]:
        """What the log says of every request."""
        lines = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in lines if line["message"] == "request"]


@contextmanager
def served(folder: Path, upstream: str, shutdown: str) -> Iterator[Served]:
    config = folder / "undertow.yaml"
    config.write_text(f"version: 1\nincidents: {{path: null}}\nshutdown: {shutdown}\n")
    line = [sys.executable, "-m", "server.cli", "serve", "--config", str(config), "--port", "0", "--admin-port", "0"]
    line += ["--upstream", upstream]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"listening on (http://127\.0\.0\.1:\d+)/v1", process.stderr.readline())
            assert found
            yield Served(process, found[1])
        finally:
            process.kill()


@pytest.fixture
def streaming(engine: FakeEngine) -> FakeEngine:
    """An engine that takes a second and a half for an answer."""
    engine.script = Script(tokens=("and",) * 15, token_delay_s=0.1)
    return engine


def started(engine: FakeEngine, count: int = 1) -> None:
    eventually(lambda: len(engine.bodies) == count)


def test_running_requests_end_whole_and_new_ones_are_not_taken(
    streaming: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path
) -> None:
    with served(tmp_path, played[1].url, "{grace_s: 30}") as server, ThreadPoolExecutor(2) as pool:
        streaming.script = Script(tokens=("and",) * 15, token_delay_s=0.1, delay_s=0.2)
        answers: list[Future[httpx.Response]] = [pool.submit(server.post, stream=stream) for stream in (True, False)]
        started(streaming, 2)
        server.terminate()
        eventually(lambda: refused(server))
        code, took = server.end()
        stream, whole = (answer.result() for answer in answers)
        assert code == 0
        assert took < 15, "it does not wait longer than its requests need"
        assert (stream.status_code, events(stream.content)[-1]) == (200, b"data: [DONE]\n\n")
        assert b'"error"' not in stream.content
        assert (whole.status_code, whole.json()["choices"][0]["finish_reason"]) == (200, "length")
        assert "Traceback" not in server.log
        assert {line["outcome"] for line in server.requests()} == {"allowed"}


def refused(server: Served) -> bool:
    try:
        httpx.get(f"{server.url}/healthz", timeout=2)
    except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError):
        # Not taken, or taken by the kernel when the server listened no more.
        return True
    return False


def test_what_runs_longer_than_the_grace_period_is_cut_off_in_a_shape_that_clients_read(
    streaming: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path
) -> None:
    with served(tmp_path, played[1].url, "{grace_s: 0.5}") as server, ThreadPoolExecutor(3) as pool:
        streaming.script = Script(tokens=("and",) * 200, token_delay_s=0.1)
        stream = pool.submit(server.post, stream=True)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)

        def read() -> None:
            with client, client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True) as chunks:
                list(chunks)

        reading = pool.submit(read)
        started(streaming, 2)
        streaming.script = Script(delay_s=20)
        whole = pool.submit(server.post)
        started(streaming, 3)
        server.terminate()
        code, took = server.end()
        assert code == 0
        assert took < 15
        *released, error, done = events(stream.result().content)
        assert released
        assert (error_code(error), done) == ("shutting_down", b"data: [DONE]\n\n")
        with pytest.raises(openai.APIError, match="shutting down"):
            reading.result()
        answer = whole.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert answer.headers["retry-after"] == "1"
        assert "Traceback" not in server.log
        assert [line["outcome"] for line in server.requests()] == ["shut_down"] * 3
    eventually(lambda: streaming.aborted == 3)


def test_it_says_that_it_is_not_ready_before_it_refuses(
    engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path
) -> None:
    with served(tmp_path, played[1].url, "{delay_s: 3, grace_s: 1}") as server:
        eventually(lambda: httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200)
        server.terminate()
        began = time.monotonic()
        eventually(lambda: httpx.get(f"{server.url}/readyz", timeout=5).status_code == 503)
        assert httpx.get(f"{server.url}/healthz", timeout=5).status_code == 200
        assert server.post().status_code == 200, "until load balancers know, it serves"
        assert server.end()[0] == 0
        assert time.monotonic() - began >= 2.9


def test_told_twice_it_ends_at_once(streaming: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path) -> None:
    with served(tmp_path, played[1].url, "{delay_s: 30, grace_s: 30}") as server:
        streaming.script = Script(tokens=("and",) * 200, token_delay_s=0.1)

        def ask() -> None:
            with pytest.raises(httpx.HTTPError):
                server.post(stream=True)

        gone = threading.Thread(target=ask)
        gone.start()
        started(streaming)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        _, took = server.end()
        assert took < 15
        gone.join()
