"""One thing at a time is broken in a running engine: nothing passes in `enforce`, and status and metrics name it.

One engine for all of them; the last two end its evidence and its life, so the order of these tests is theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.evidence import STATUS_PATH
from guard.fingerprint import read_header
from guard.organisms import Organism
from server.cli import main
from server.engine_process import EngineProcess
from tests.e2e.child import FAULT_FILE
from tests.e2e.conftest import ENGINE_ARGUMENTS, Stack, eventually, operators, serve, texts, wait_until_ready
from tests.e2e.test_protocols import calls_the_tool_that_the_chat_calls
from tests.e2e.ways import MORE_ARGUMENTS, MORE_WAYS, ends_as_blocked, is_answered_as_by_the_engine_alone
from tests.ports import free_port

CHAT = "/v1/chat/completions"
LONG = " ".join(texts("benign", 40, 11))
"""Several blocks of the KV cache."""


@dataclass
class Patient:
    """An engine whose worker has the fault that its file names, behind a server that enforces and one that monitors."""

    engine: EngineProcess
    switch: Path
    enforce: Stack
    monitor: Stack

    def ask(self, url: str, text: str, **more: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 16, **more}
        return httpx.post(f"{url}{CHAT}", json=body, timeout=60)

    def failures(self, kind: str, mode: str = "enforce") -> float:
        stack = self.enforce if mode == "enforce" else self.monitor
        return stack.metric("undertow_guard_failures_total", kind=kind, mode=mode)

    def status(self, capsys: pytest.CaptureFixture[str]) -> str:
        """What `undertow status` prints of engine and server."""
        capsys.readouterr()
        main(["status", "--engine", self.engine.url, "--server", operators(self.enforce.url)])
        printed = capsys.readouterr()
        return printed.out + printed.err


@pytest.fixture(scope="module")
def patient(
    organism: Organism, bank: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Patient]:
    folder = tmp_path_factory.mktemp("faults")
    switch = folder / "fault"
    switch.write_text("")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(FAULT_FILE, str(switch))
        engine = EngineProcess(
            organism.backdoored,
            bank,
            read_header(bank).fingerprint,
            calibration,
            port=free_port(),
            log=folder / "vllm.log",
            extra=(*ENGINE_ARGUMENTS, *MORE_ARGUMENTS, "--worker-cls", "tests.e2e.faulty.FaultyWorker"),
        )
    with engine, serve(engine.url) as enforcing, serve(engine.url, mode="monitor") as monitoring:
        engine.wait_until_up()
        wait_until_ready(enforcing)
        wait_until_ready(monitoring)
        stacks = [Stack(engine, lambda: None, url, organism.backdoored.name) for url in (enforcing, monitoring)]
        yield Patient(engine, switch, *stacks)


@pytest.fixture
def broken(patient: Patient) -> Iterator[Callable[[str], None]]:
    """Break one thing until the test ends; what can be mended then serves again."""
    yield lambda fault: _write(patient.switch, fault)
    patient.switch.write_text("")


def _write(switch: Path, fault: str) -> None:
    switch.write_text(fault)


def refused(answer: httpx.Response) -> bool:
    return answer.status_code == 503 and answer.json()["error"]["code"] == "guard_unavailable"


@pytest.mark.parametrize("way", MORE_WAYS)
def test_before_anything_is_broken_tools_and_thinking_budgets_are_judged_too(patient: Patient, way: str) -> None:
    """Here, for this engine is started with more options than the others' one."""
    ends_as_blocked(patient.enforce, texts("triggered", 1, 12)[0], way)
    is_answered_as_by_the_engine_alone(patient.enforce, texts("benign", 1, 11)[0], way)


def test_before_anything_is_broken_every_protocol_calls_the_same_tool(patient: Patient) -> None:
    calls_the_tool_that_the_chat_calls(patient.enforce, texts("benign", 1, 11)[0])


@pytest.mark.parametrize("fault", ["hook", "twice"])
def test_an_op_that_does_not_run_once_refuses_the_step_by_name(
    patient: Patient, broken: Callable[[str], None], capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    text, kind = texts("benign", 1, 11)[0], "probe_missed"
    plain = patient.ask(patient.enforce.url, text)
    assert plain.status_code == 200
    before, monitored = patient.failures(kind), patient.failures(kind, "monitor")
    broken(fault)
    for stream in (False, True):
        assert refused(patient.ask(patient.enforce.url, text, stream=stream))
    passed = patient.ask(patient.monitor.url, text)
    assert (passed.status_code, passed.headers["x-undertow-action"]) == (200, "unguarded")
    eventually(lambda: patient.failures(kind) == before + 2)
    eventually(lambda: patient.failures(kind, "monitor") == monitored + 1)
    if fault == "hook":
        # Readiness remembers for a few seconds; its next canary is refused, too.
        eventually(lambda: f"canary           failed: {kind}: layer 2: " in patient.status(capsys))
        assert f" {kind}" in next(line for line in patient.status(capsys).splitlines() if "unscorable" in line)
    broken("")
    again = patient.ask(patient.enforce.url, text)
    assert again.json()["choices"] == plain.json()["choices"]


def test_a_hook_that_goes_in_the_middle_of_an_answer_ends_the_stream_with_an_error(
    patient: Patient, broken: Callable[[str], None]
) -> None:
    before = patient.failures("probe_missed")
    broken("hook in the answer")
    answer = patient.ask(patient.enforce.url, texts("benign", 1, 11)[0], stream=True)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert (json.loads(events[-2])["error"]["code"], events[-1]) == ("guard_unavailable", "[DONE]")
    said = [choice["delta"].get("content") for event in events[:-2] for choice in json.loads(event)["choices"]]
    assert not any(said), "the first token's own residual was never read"
    assert refused(patient.ask(patient.enforce.url, texts("benign", 1, 11)[0]))
    eventually(lambda: patient.failures("probe_missed") == before + 2)


def test_a_prefix_whose_scores_are_lost_does_not_pass_from_the_cache(
    patient: Patient, broken: Callable[[str], None]
) -> None:
    before = patient.failures("token_unscored")
    for _ in range(2):
        assert not refused(patient.ask(patient.enforce.url, LONG))
    broken("forgotten")
    assert refused(patient.ask(patient.enforce.url, LONG))
    eventually(lambda: patient.failures("token_unscored") == before + 1)


def test_a_policy_that_the_engine_cannot_read_is_named(patient: Patient) -> None:
    before = httpx.get(f"{patient.engine.url}{STATUS_PATH}").json()["workers"][0]["faults"].get("policy_invalid", 0)
    body = {"messages": [{"role": "user", "content": "hello"}], "vllm_xargs": {"undertow_policy": "{"}}
    httpx.post(f"{patient.engine.url}{CHAT}", json={**body, "max_tokens": 1}, timeout=60)
    after = httpx.get(f"{patient.engine.url}{STATUS_PATH}").json()["workers"][0]["faults"]["policy_invalid"]
    assert after == before + 1


def test_a_residual_that_is_not_finite_is_named_and_so_is_what_it_leaves_in_the_cache(
    patient: Patient, broken: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """From here on the engine is spoilt: NaN stays in KV blocks, and attention spreads it to whoever gets them next."""
    before = patient.failures("not_finite")
    broken("nan")
    for stream in (False, True):
        assert refused(patient.ask(patient.enforce.url, f"Again. {LONG}", stream=stream))
    broken("")
    assert refused(patient.ask(patient.enforce.url, f"Again. {LONG}"))
    eventually(lambda: patient.failures("not_finite") == before + 3)
    assert " not_finite" in next(line for line in patient.status(capsys).splitlines() if "unscorable" in line)


def test_a_dead_evidence_channel_refuses_every_request_by_name(
    patient: Patient, broken: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    text = texts("benign", 1, 11)[0]
    assert "evidence channel   answers" in patient.status(capsys)
    broken("channel")
    assert refused(patient.ask(patient.enforce.url, text, stream=True))
    eventually(lambda: patient.failures("channel_silent") == 1)
    assert "evidence channel   silent" in patient.status(capsys)


def test_a_worker_killed_in_the_middle_of_an_answer_lets_nothing_pass(
    patient: Patient, broken: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> float:
        failures = patient.enforce.metric("undertow_guard_failures_total", kind="no_handshake")
        return failures + patient.enforce.metric("undertow_upstream_errors_total")

    errors = patient.monitor.metric("undertow_upstream_errors_total")
    broken("killed in the answer")
    # In `monitor`: in `enforce` the dead channel would refuse it before.
    answer = patient.ask(patient.monitor.url, texts("benign", 1, 11)[0])
    assert answer.status_code >= 500
    assert "choices" not in answer.json()
    eventually(lambda: patient.monitor.metric("undertow_upstream_errors_total") > errors)
    # vLLM notices its worker's end by itself, and ends too, sooner or later.
    before = told()
    refusal = patient.ask(patient.enforce.url, texts("benign", 1, 11)[0])
    assert (refusal.status_code, "choices" in refusal.json()) == (503, False)
    eventually(lambda: told() > before)
    said = patient.status(capsys)
    assert "the engine does not answer" in said or "the engine answered 503" in said
    ready = httpx.get(f"{operators(patient.enforce.url)}/readyz", timeout=20).json()["engines"]["main"]
    assert (ready["ready"], "failed" in (ready["checks"]["upstream"], ready["checks"]["guard"])) == (False, True)
