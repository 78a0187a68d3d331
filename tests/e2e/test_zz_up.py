"""`undertow up`: vLLM and the server by one command, and one Ctrl-C that ends both.

Named to run late: it is a second engine.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from sqlalchemy import URL

from guard.organisms import Organism
from server.incidents.database import Database
from server.incidents.store import Filter, Store
from tests.e2e.conftest import ENGINE_ARGUMENTS, texts
from tests.ports import free_port


def test_one_command_starts_both_and_one_interrupt_ends_both(
    organism: Organism, bank: Path, calibration: Path, workshop: Path
) -> None:
    port, vllm_port = free_port(), free_port()
    words = [sys.executable, "-m", "server.cli", "up", organism.backdoored, "--bank", bank]
    words += ["--calibration", calibration, "--port", port, "--vllm-port", vllm_port]
    words += ["--admin-port", free_port(), "--vllm-log", workshop / "up.log", "--", *ENGINE_ARGUMENTS]
    with (workshop / "up.out").open("wb") as output:
        up = subprocess.Popen([str(word) for word in words], stdout=output, stderr=subprocess.STDOUT, cwd=workshop)
    try:
        wait_for(f"http://127.0.0.1:{port}/readyz", up, output=workshop / "up.out")
        body = {"model": "backdoored", "messages": [{"role": "user", "content": texts("triggered", 1, 12)[0]}]}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
        assert '"content_filter"' in answer.text
        up.send_signal(signal.SIGINT)
        assert up.wait(timeout=60) == 0
        kept = Database(URL.create("sqlite", database=str(workshop / "undertow-incidents.db")))
        assert [each.incident.action for each in Store(kept).all(Filter())] == ["block"]
        kept.close()
    finally:
        # A group would be simpler to end, but then nobody would see whether `up` itself leaves its engine behind.
        up.terminate()
        try:
            up.wait(timeout=30)
        except subprocess.TimeoutExpired:
            up.kill()
            up.wait()
    for url in (f"http://127.0.0.1:{port}/healthz", f"http://127.0.0.1:{vllm_port}/health"):
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


def wait_for(url: str, process: subprocess.Popen[bytes], output: Path, timeout_s: float = 180) -> None:
    last = "nobody listened"
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, f"it ended: {output.read_text()[-2000:]}"
        try:
            answer = httpx.get(url, timeout=20)
            if answer.is_success:
                return
            last = answer.text
        except httpx.TransportError as error:
            last = repr(error)
        time.sleep(0.5)
    pytest.fail(f"{url} did not answer well within {timeout_s:g} s: {last}; `up` said: {output.read_text()[-2000:]}")
