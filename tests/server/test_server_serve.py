"""`undertow serve` as a process: it prints its URL, serves, and ends in order."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from server.commands.serve import run_server
from server.config.settings import Settings

from .fake_engine import FakeEngine, Script
from .hosting import Host
from .test_server_answers import CHAT, chat_body


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_prints_its_url_and_ends_cleanly_on_a_signal(
    engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path, number: signal.Signals
) -> None:
    config = tmp_path / "undertow.yaml"
    config.write_text("version: 1\nincidents: {path: null}\n")
    engine.script = Script(blocked={0: 3})
    line = [sys.executable, "-m", "server.cli", "serve", "--config", str(config), "--port", "0", "--admin-port", "0"]
    with subprocess.Popen(
        [*line, "--upstream", played[1].url], stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}
    ) as process:
        assert process.stderr is not None
        found = re.search(r"listening on (http://127\.0\.0\.1:\d+)/v1", process.stderr.readline())
        assert found
        assert "metrics and status on http://127.0.0.1:" in process.stderr.readline()
        with httpx.Client(base_url=found[1], timeout=10) as client:
            body = chat_body(model="evil\nmodel\x1b[31m", messages=[{"role": "user", "content": "my secret prompt"}])
            answer = client.post(CHAT, json=body, headers={"authorization": "Bearer sk-canary-7", "x-request-id": "me"})
            assert answer.json()["choices"][0]["finish_reason"] == "content_filter"
        process.send_signal(number)
        _, log = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "Traceback" not in log
    lines = [json.loads(line) for line in log.splitlines()]
    (incident,) = [line for line in lines if line["message"] == "incident"]
    assert (incident["request_id"], incident["phase"], incident["detector"]) == ("me", "completion", "density")
    assert (incident["layer"], incident["direction"], incident["position"]) == (2, "L2.o_proj.u0", 6)
    assert incident["p_value"] == 0.001
    assert incident["model"] == "evil\nmodel\x1b[31m"
    assert "\x1b" not in log
    assert "my secret prompt" not in log
    assert "sk-canary-7" not in log


def test_the_garbage_collector_leaves_alone_what_is_there_when_serving_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []

    class Recorded:
        def run(self, sockets: list[socket.socket]) -> None:
            frozen.append(gc.get_freeze_count())

    monkeypatch.setattr("server.listeners.make_server", lambda *_: Recorded())
    anywhere = {"host": "127.0.0.1", "port": 0}
    before = gc.get_freeze_count()
    try:
        # Nobody ends this server's app, which would hold its files.
        fields = {"version": 1, "listen": anywhere, "admin": anywhere, "incidents": {"path": None}}
        assert run_server(Settings.model_validate(fields)) == 0
    finally:
        gc.unfreeze()
    assert frozen[0] > before + 10_000
