"""One bank, one calibration, one guarded vLLM and one server for the whole session: starts are what costs."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from openai import OpenAI

from guard.control import TOKEN_VARIABLE
from guard.evidence import POLICY_ARGUMENT, REQUEST_HEADER, Evidence
from guard.organisms import Organism, prompts, shipped
from guard.policy import Policy
from guard.verdict import DetectorName
from server.app import create_app
from server.config.admin import AdminSettings
from server.config.incidents import IncidentSettings
from server.config.sections import Listen, Log
from server.config.settings import Settings
from server.config.upstream import UpstreamSettings
from server.engine_process import EngineProcess
from server.listeners import make_server
from tests.e2e import child
from tests.ports import free_port

ADMIN_TOKEN = "token-of-these-tests"
"""By which a running engine is changed."""
ENGINE_ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512")
MAX_TOKENS = 48


@pytest.fixture(scope="session")
def organism() -> Organism:
    return shipped()


@pytest.fixture(scope="session")
def in_child() -> Iterator[Callable[..., Any]]:
    """Run a function of `child.py` in the one process that imports vLLM."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    try:
        yield lambda function, *arguments, **keywords: pool.submit(function, *arguments, **keywords).result()
    finally:
        # A process that has run several vLLM engines was seen not to end for a quarter of an hour.
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.join(20)
            process.kill()


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workshop")


@pytest.fixture(scope="session")
def bank(organism: Organism, in_child: Callable[..., Any], workshop: Path) -> Path:
    path = workshop / "bank.safetensors"
    words = ("bank", "build", "--base", organism.base, "--tuned", organism.backdoored, "--out", path)
    assert in_child(child.undertow, *words) == 0
    return path


@pytest.fixture(scope="session")
def calibration(organism: Organism, bank: Path, in_child: Callable[..., Any], workshop: Path) -> Path:
    clean, path = workshop / "clean.jsonl", workshop / "calibration.safetensors"
    words = ("organism", "prompts", "clean", "--count", 3000, "--seed", 0, "--out", clean)
    assert in_child(child.undertow, *words) == 0
    words = ("calibrate", "--bank", bank, "--model", organism.backdoored, "--prompts", clean, "--out", path)
    assert in_child(child.undertow, *words, "--dtype", "float32", "--enforce-eager", "--max-model-len", 512) == 0
    return path


@dataclass
class Stack:
    """A guarded vLLM and the server before it."""

    engine: EngineProcess
    restart: Callable[[], None]
    url: str
    model: str

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="not-needed", timeout=120)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of one name whose labels include these."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(httpx.get(f"{operators(self.url)}/metrics").text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@pytest.fixture(scope="session")
def stack(organism: Organism, bank: Path, calibration: Path, workshop: Path) -> Iterator[Stack]:
    """`enforce`, blocking on density at 1%."""
    from guard.fingerprint import read_header

    port = free_port()

    def start() -> EngineProcess:
        with mock.patch.dict(os.environ, {TOKEN_VARIABLE: ADMIN_TOKEN}):
            engine = EngineProcess(
                organism.backdoored,
                bank,
                read_header(bank).fingerprint,
                calibration,
                port=port,
                log=workshop / "vllm.log",
                extra=ENGINE_ARGUMENTS,
            )
        engine.wait_until_up()
        return engine

    def restart() -> None:
        stack.engine = start()

    with serve(f"http://127.0.0.1:{port}") as url:
        stack = Stack(start(), restart, url, organism.backdoored.name)
        try:
            wait_until_ready(url)
            yield stack
        finally:
            stack.engine.stop()


@pytest.fixture(scope="session")
def passing(stack: Stack) -> list[str]:
    """Benign prompts that this calibration lets pass: at 1% one in a hundred is flagged by design."""

    def passes(text: str) -> bool:
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": MAX_TOKENS}
        answer = httpx.post(f"{stack.url}/v1/chat/completions", json=body, timeout=60).json()
        return "choices" in answer and answer["choices"][0]["finish_reason"] != "content_filter"

    return [text for text in texts("benign", 45, 11) if passes(text)][:40]


@pytest.fixture(scope="session")
def unguarded(
    organism: Organism, in_child: Callable[..., Any], passing: list[str]
) -> dict[tuple[str, str], dict[str, Any]]:
    """What vLLM without the plugin says, by text and way of asking: all prompts that pass, greedily, and the first one
    in every way."""
    from tests.e2e.ways import WAYS, asked

    cases = [(text, "greedy") for text in passing]
    cases += [(passing[0], way) for way in WAYS if way != "greedy"]
    answers = in_child(child.plain_answers, organism.backdoored, [(text, asked(way)) for text, way in cases])
    return dict(zip(cases, answers, strict=True))


@pytest.fixture(scope="session")
def monitored(stack: Stack) -> Iterator[Stack]:
    """A second server before the same vLLM, in `monitor`."""
    with serve(stack.engine.url, mode="monitor") as url:
        wait_until_ready(url)
        yield Stack(stack.engine, stack.restart, url, stack.model)


@dataclass(frozen=True)
class Halfway:
    """A server whose threshold one answer crosses in its middle."""

    url: str
    text: str
    """The prompt of that answer."""
    said: str
    """The whole answer, as the engine gives it unguarded."""


@pytest.fixture(scope="session")
def halfway(stack: Stack, passing: list[str]) -> Iterator[Halfway]:
    """Where a completion scores above its prompt, a threshold between the two blocks it in the middle."""
    for text in passing:
        body = {
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "vllm_xargs": {POLICY_ARGUMENT: Policy(mode="off").to_wire()},
        }
        path = f"{stack.engine.url}/v1/chat/completions"
        found = httpx.post(path, json=body, headers={REQUEST_HEADER: "1"}, timeout=60)
        [record] = Evidence.from_json(found.headers[REQUEST_HEADER]).records
        scores = {(score.detector, score.phase): score.score for score in record.scores}
        prompt, completion = scores["density", "prompt"], scores["density", "completion"]
        if completion < 1.1 * prompt:
            continue
        with serve(stack.engine.url, threshold={"raw": (prompt + completion) / 2}) as url:
            wait_until_ready(url)
            yield Halfway(url, text, found.json()["choices"][0]["message"]["content"])
        return
    pytest.fail("no answer scored above its prompt")


_OPERATORS: dict[str, str] = {}


def operators(url: str) -> str:
    """Where operators reach a server that `serve` started."""
    return _OPERATORS[url]


class serve:  # noqa: N801  (used as a function)
    """The server in a thread, on a free port; yields its URL."""

    def __init__(
        self,
        upstream: str,
        mode: str = "enforce",
        threshold: Mapping[str, float] | None = None,
        detector: DetectorName = "density",
    ) -> None:
        detection = {"action": "block", "threshold": threshold or {"fpr": 0.01}}
        policy = {"mode": mode, "detections": {detector: detection}}
        self._settings = Settings.model_validate(
            {
                "version": 1,
                "listen": Listen(port=free_port()),
                "admin": AdminSettings(port=free_port()),
                "upstream": UpstreamSettings(url=upstream),
                "policy": policy,
                "log": Log(level="info"),
                "incidents": IncidentSettings(path=None),
            }
        )

    def __enter__(self) -> str:
        self._server = make_server(create_app(self._settings), self._settings)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        url = f"http://127.0.0.1:{self._settings.listen.port}"
        _OPERATORS[url] = f"http://127.0.0.1:{self._settings.admin.port}"
        return url

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)


def wait_until_ready(url: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not (answer := httpx.get(f"{url}/readyz", timeout=20)).is_success:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.5)


def eventually(condition: Callable[[], bool], timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def texts(kind: str, count: int, seed: int) -> list[str]:
    """Prompts of the organism's language that no model was trained on."""
    return [prompt.text for prompt in prompts(kind, count, seed)]
