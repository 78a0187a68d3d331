"""Evidence from the worker to the API process of one vLLM, over a local socket.

The worker answers from a thread of its own, so that asking never waits for a step and never delays one. Messages are
the key of an HTTP request one way and `Evidence` as JSON the other. The socket lies in a folder that only its owner can
read.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable

import zmq
import zmq.asyncio

from guard.errors import EvidenceError
from guard.evidence import Evidence

# Under vLLM's own logger: its API process shows no other.
log = logging.getLogger("vllm.undertow")


class EvidenceServer:
    """The worker's end. `address` is where the other end finds it."""

    def __init__(self, answer: Callable[[str], Evidence]) -> None:
        self._answer = answer
        self._folder = tempfile.mkdtemp(prefix="undertow-")  # mode 0700
        self.address = f"ipc://{self._folder}/evidence"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.address)
        self._thread = threading.Thread(target=self._serve, name="undertow-evidence", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and remove the socket."""
        # The socket is the thread's: closing it from here can abort the process. The end of the context wakes the
        # thread, which closes it, and `term` returns.
        self._context.term()
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _serve(self) -> None:
        while True:
            try:
                sender, number, key = self._socket.recv_multipart()
                self._socket.send_multipart([sender, number, self._answer(key.decode()).to_json().encode()])
            except zmq.ContextTerminated:
                self._socket.close(linger=0)
                return
            except Exception as error:  # noqa: BLE001  (one bad question must not leave every later one unanswered)
                # Whoever asked times out and fails closed.
                log.error("evidence channel: a message was not answered: %s: %s", type(error).__name__, error)


class EvidenceClient:
    """The API process's end. Safe for many requests at once; one event loop."""

    def __init__(self, address: str, timeout_s: float = 5.0) -> None:
        self._timeout = timeout_s
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(address)
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._next = 0
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def ask(self, key: str) -> Evidence:
        """What the worker knows of one HTTP request.

        Raises:
            EvidenceError: no answer in time, or one that cannot be read.
        """
        self._next += 1
        number = self._next.to_bytes(8, "big")
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            # Sending waits too, once zmq holds as many messages for a dead worker as it will.
            async with asyncio.timeout(self._timeout):
                await self._socket.send_multipart([number, key.encode()])
                answer = await future
            return Evidence.from_json(answer)
        except TimeoutError as error:
            raise EvidenceError(f"the worker gave no evidence within {self._timeout:g} s") from error
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        self._reader.cancel()
        self._context.destroy(linger=0)

    async def _read(self) -> None:
        while True:
            number, answer = await self._socket.recv_multipart()
            future = self._waiting.get(number)
            if future is not None and not future.done():
                future.set_result(answer)
