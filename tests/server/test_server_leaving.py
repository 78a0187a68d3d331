"""Clients that leave, and clients that stop reading: what the engine sees of them, over sockets."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx
import pytest

from .conftest import Proxy
from .fake_engine import FakeEngine, Script
from .hosting import Host
from .test_server_answers import CHAT, TEXT, chat_body, text_body
from .test_server_failures import eventually

LONG = tuple(f"{number:06} " + "x" * 16_000 for number in range(2_500))
"""An answer of 40 MB: more than the system buffers between an engine and a client that does not read (here 12 MB)."""

Farewell = Literal["closes", "resets"]


@dataclass(frozen=True)
class Client:
    """A client of bare sockets, which reads no byte that it is not told to."""

    connection: socket.socket

    @classmethod
    def of(cls, url: str, path: str, body: object) -> Client:
        """Connected, the request sent."""
        address = urlsplit(url)
        assert address.hostname is not None
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        connection.settimeout(20)
        connection.connect((address.hostname, address.port))
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        return cls(connection)

    def read(self, until: bytes) -> bytes:
        """All that comes, up to the first `until` or the end."""
        received = bytearray()
        while until not in received[-2 * 65536 :] and (part := self.connection.recv(65536)):
            received += part
        return bytes(received)

    def leave(self, farewell: Farewell) -> None:
        if farewell == "resets":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@pytest.mark.parametrize("farewell", ["closes", "resets"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body), (TEXT, text_body)])
def test_a_client_that_leaves_ends_the_engines_work_within_a_second(
    engine: FakeEngine,
    enforce: Proxy,
    path: str,
    body: Callable[..., dict[str, object]],
    stream: bool,
    farewell: Farewell,
) -> None:
    engine.script = Script(delay_s=0 if stream else 5, token_delay_s=0.6)
    client = Client.of(enforce.url, path, body(stream=stream))
    if stream and path == CHAT:
        client.read(b'"role"')
    assert eventually(lambda: len(engine.bodies) == 1)
    client.leave(farewell)
    assert eventually(lambda: engine.aborted == 1)


@pytest.mark.parametrize("farewell", ["closes", "resets"])
def test_a_client_that_does_not_read_and_leaves_ends_the_engines_work_within_a_second(
    engine: FakeEngine, enforce: Proxy, farewell: Farewell
) -> None:
    engine.script = Script(tokens=LONG)
    client = Client.of(enforce.url, CHAT, chat_body(stream=True))
    stalled(engine)
    client.leave(farewell)
    assert eventually(lambda: engine.aborted == 1)


@pytest.mark.parametrize("mode", ["enforce", "monitor"])
def test_a_reader_that_stops_pauses_the_engine_and_nobody_else_and_loses_nothing(
    engine: FakeEngine, request: pytest.FixtureRequest, mode: str
) -> None:
    proxy: Proxy = request.getfixturevalue(mode)
    engine.script = Script(tokens=LONG)
    client = Client.of(proxy.url, CHAT, chat_body(stream=True))
    sent = stalled(engine)
    assert sent < sum(map(len, LONG)) * 0.6
    engine.script = Script()
    assert proxy.post(CHAT, chat_body()).status_code == 200
    assert engine.sent == sent
    received = client.read(b"data: [DONE]\n\n")
    client.leave("closes")
    assert re.findall(rb"(\d{6}) x", received) == [b"%06d" % number for number in range(len(LONG))]
    assert engine.aborted == 0


@pytest.fixture
def process(engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path) -> Iterator[tuple[str, int]]:
    """The server as a process: its URL and its id."""
    config = tmp_path / "undertow.yaml"
    config.write_text("version: 1\nincidents: {path: null}\n")
    line = [sys.executable, "-m", "server.cli", "serve", "--config", str(config), "--port", "0", "--admin-port", "0"]
    environ = {**os.environ, "PYTHONPATH": "."}
    with (
        subprocess.Popen(
            [*line, "--upstream", played[1].url], stderr=subprocess.PIPE, text=True, env=environ
        ) as server,
        ExitStack() as stack,
    ):
        stack.callback(server.kill)
        assert server.stderr is not None
        found = re.search(r"listening on (http://127\.0\.0\.1:\d+)/v1", server.stderr.readline())
        assert found
        assert httpx.post(found[1] + CHAT, json=chat_body()).status_code == 200
        yield found[1], server.pid
        server.terminate()
        server.communicate(timeout=10)


def test_readers_that_stop_cost_the_server_no_memory(engine: FakeEngine, process: tuple[str, int]) -> None:
    url, pid = process
    engine.script = Script(tokens=LONG)
    before = resident_bytes(pid)
    with ExitStack() as stack:
        for _ in range(2):
            client = Client.of(url, CHAT, chat_body(stream=True))
            stack.callback(client.leave, "closes")
        stalled(engine)
        grown = resident_bytes(pid) - before
    # What is read ahead of each, and what is still to be written; the allocator keeps its own.
    assert grown < 8_000_000


def stalled(engine: FakeEngine) -> int:
    """Wait until the engine can send no more; returns how many bytes it sent."""
    # So much always fits between it and a reader: what the server keeps, and what the kernel does.
    assert eventually(lambda: engine.sent > 128 * 1024, within_s=20)
    while True:
        sent = engine.sent
        time.sleep(0.5)
        if engine.sent == sent:
            return sent


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
