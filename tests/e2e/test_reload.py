"""A calibration and a bank change while a real engine serves: at once, for every request, and without losing one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from guard.bank import Bank
from guard.calibration import Calibration
from guard.control import RELOAD_PATH, TOKEN_VARIABLE, Loaded, Wanted
from guard.evidence import POLICY_ARGUMENT, REQUEST_HEADER, Evidence, Record, Status, WorkerStatus
from guard.policy import Policy
from guard.scores import BankSpace, Moments
from server import cli
from tests.e2e.conftest import ADMIN_TOKEN, Stack, operators, serve, texts, wait_until_ready

MAX_TOKENS = 48
CHAT = "/v1/chat/completions"


@dataclass
class Files:
    """The files that the engine was started with, and the command that has it read them again."""

    stack: Stack
    bank: Path
    calibration: Path
    capsys: pytest.CaptureFixture[str]

    def put(self, bank: Bank | None = None, calibration: Calibration | None = None) -> tuple[int, str]:
        """Exit code and output of `undertow reload`, with these in the files' places."""
        if bank is not None:
            bank.save(self.bank)
        if calibration is not None:
            calibration.save(self.calibration)
        return self.reload()

    def post(self, calibration: Calibration) -> Loaded:
        """The same without the command."""
        url, secret = f"{self.stack.engine.url}{RELOAD_PATH}", {"authorization": f"Bearer {ADMIN_TOKEN}"}
        wanted = Wanted(fingerprint=calibration.fingerprint, calibration=calibration.digest())
        return Loaded.model_validate_json(httpx.post(url, json=wanted.model_dump(), headers=secret, timeout=60).content)

    def reload(self, *more: object) -> tuple[int, str]:
        words = ("reload", "--calibration", self.calibration, "--bank", self.bank, "--engine", self.stack.engine.url)
        self.capsys.readouterr()
        code = cli.main([str(word) for word in (*words, *more)])
        out, err = self.capsys.readouterr()
        return code, out + err


@pytest.fixture
def files(
    stack: Stack,
    bank: Path,
    calibration: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Files]:
    """Put back as they were, and so is the engine."""
    monkeypatch.setenv(TOKEN_VARIABLE, ADMIN_TOKEN)
    before = bank.read_bytes(), calibration.read_bytes()
    yield (files := Files(stack, bank, calibration, capsys))
    bank.write_bytes(before[0])
    calibration.write_bytes(before[1])
    code, said = files.reload()
    assert code == 0, said


def worker(stack: Stack) -> WorkerStatus:
    (only,) = Status.from_json(httpx.get(f"{stack.engine.url}/undertow/status").content).workers
    return only


def said_of(stack: Stack, text: str, max_tokens: int = MAX_TOKENS) -> Record:
    """What the engine says of one request, scored and let pass."""
    response = httpx.post(
        f"{stack.engine.url}{CHAT}",
        json={
            "model": stack.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "vllm_xargs": {POLICY_ARGUMENT: Policy(mode="off").to_wire()},
        },
        headers={REQUEST_HEADER: "1"},
        timeout=60,
    )
    return Evidence.from_json(response.headers[REQUEST_HEADER]).records[0]


def ask(stack: Stack, text: str, **more: Any) -> httpx.Response:
    body = {"model": stack.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
    return httpx.post(f"{stack.url}{CHAT}", json={**body, "max_tokens": MAX_TOKENS, **more}, timeout=60)


@dataclass
class Load:
    """Requests without a pause, through the server and beside it."""

    stack: Stack
    answers: list[httpx.Response] = field(default_factory=list)
    records: list[tuple[float, float, Record]] = field(default_factory=list)
    """When it was asked, when it was answered, and what the engine said of it."""
    errors: list[Exception] = field(default_factory=list)

    @contextmanager
    def running(self, texts: list[str]) -> Iterator[None]:
        ending = threading.Event()

        def forever(work: Callable[[str], None]) -> None:
            for number in range(10_000):
                if ending.is_set():
                    return
                try:
                    work(texts[number % len(texts)])
                except Exception as error:  # noqa: BLE001  (of a thread, told when it has ended)
                    self.errors.append(error)
                    return

        def beside(text: str) -> None:
            asked = time.monotonic()
            record = said_of(self.stack, text, 16)
            self.records.append((asked, time.monotonic(), record))

        works: list[Callable[[str], None]] = [
            *[lambda text: self.answers.append(ask(self.stack, text))] * 3,
            *[lambda text: self.answers.append(ask(self.stack, text, stream=True))] * 3,
            beside,
        ]
        threads = [threading.Thread(target=forever, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ending.set()
            for thread in threads:
                thread.join(timeout=60)


@pytest.fixture
def lenient(stack: Stack) -> Iterator[Stack]:
    """A server that refuses nothing but what could not be judged."""
    with serve(stack.engine.url, threshold={"raw": 1e30}) as url:
        wait_until_ready(url)
        yield Stack(stack.engine, stack.restart, url, stack.model)


def test_under_load_no_request_is_lost_and_the_next_one_is_judged_by_the_new_guard(
    lenient: Stack, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    original = Calibration.load(files.calibration)
    # Longer than a block of the KV cache, so that vLLM takes the beginning from its prefix cache.
    asked = [" ".join([*texts("benign", 20, 11), text]) for text in texts("benign", 3, 12)]
    before, load = worker(lenient), Load(lenient)
    made = [replace(original, target_fpr=target) for target in (0.02, 0.03, original.target_fpr)]
    changes = []
    with load.running(asked):
        time.sleep(1.0)
        for number, calibration in enumerate(made, 1):
            calibration.save(files.calibration)
            began = time.monotonic()
            loaded = files.post(calibration)
            changes.append((began, time.monotonic(), loaded.generation))
            assert loaded.generation == before.generation + number
            # Of a change itself, not of the machine's other work: no step waits longer than for these two.
            assert loaded.prepared_s + loaded.paused_s < 1
            time.sleep(1.0)
    assert load.errors == []
    # Why, where there is one.
    assert [line.__dict__.get("fields") for line in caplog.records if line.levelname in ("ERROR", "CRITICAL")] == []
    assert {answer.status_code for answer in load.answers} == {200}
    assert not [answer.text for answer in load.answers if '"error"' in answer.text or "content_filter" in answer.text]
    assert [record.unscorable for _, _, record in load.records] == [None] * len(load.records)
    assert lenient.metric("undertow_guard_failures_total") == 0
    after = worker(lenient)
    # Prefixes were taken from the cache before, between and after: none of them was a stranger's.
    assert after.tokens_recalled > before.tokens_recalled
    assert (after.unscorable, after.tokens_missed) == (before.unscorable, before.tokens_missed)
    for _, done, generation in changes:
        # A request that is sent once the change was answered is judged by the new guard, and by nothing else.
        first = next(record for sent, _, record in load.records if sent > done)
        assert first.generation >= generation
        assert {score.generation for score in first.scores} == {first.generation}


def test_new_thresholds_are_in_force_at_once(stack: Stack, files: Files) -> None:
    text = texts("benign", 1, 11)[0]
    before = said_of(stack, text)
    original = Calibration.load(files.calibration)
    # Of clean requests that scored a tenth as much, this one is none.
    strict = replace(
        original, clean={key: tuple(0.1 * score for score in each) for key, each in original.clean.items()}
    )
    assert ask(stack, text).status_code == 200
    assert files.put(calibration=strict)[0] == 0
    assert ask(stack, text).json()["error"]["code"] == "content_filter"
    after = said_of(stack, text)
    for old, new in zip(before.scores, after.scores, strict=True):
        assert new.score == pytest.approx(old.score, abs=1e-4)
        if new.detector == "density":
            assert new.threshold == pytest.approx(0.1 * old.threshold)
            assert new.first is not None
            assert new.first <= new.position
    assert files.put(calibration=original)[0] == 0
    assert ask(stack, text).status_code == 200


def mirrored(bank: Bank, calibration: Calibration) -> tuple[Bank, Calibration]:
    """Every second direction turned round: another bank, in which the same requests look the same from behind."""
    layers, signs = [], []
    for layer in bank.layers:
        sign = torch.tensor([(-1.0) ** place for place in range(len(layer.names))])
        layers.append(replace(layer, directions=layer.directions * sign[:, None]))
        signs.append(sign)
    sign = torch.cat(signs)
    header = bank.header()
    other = Bank.sealed(
        base_digest=bank.base_digest,
        tuned_digest=bank.tuned_digest,
        method=bank.method,
        k=bank.k,
        model_class=bank.model_class,
        hidden_size=bank.hidden_size,
        num_layers=bank.num_layers,
        layers=layers,
        delta=header.delta,
    )
    shape, both = calibration.shape, torch.cat([sign, sign]).double()
    turned = sign < 0
    made = replace(
        calibration,
        fingerprint=other.fingerprint,
        space=BankSpace.of(other),
        shape=replace(
            shape,
            low=torch.where(turned, -shape.high, shape.low),
            high=torch.where(turned, -shape.low, shape.high),
            decisions=tuple(
                Moments(each.count, each.mean * both, each.covariance * both.outer(both)) for each in shape.decisions
            ),
        ),
    )
    return other, made


def test_another_bank_of_the_same_shape_reads_the_running_model(stack: Stack, files: Files) -> None:
    bank, calibration = mirrored(Bank.load(files.bank), Calibration.load(files.calibration))
    asked = [*texts("benign", 4, 11), *texts("triggered", 4, 12)]
    before = [said_of(stack, text) for text in asked]
    code, said = files.put(bank, calibration)
    assert code == 0, said
    status = worker(stack)
    assert (status.fingerprint, status.calibration) == (bank.fingerprint, calibration.digest())
    for text, old in zip(asked, before, strict=True):
        new = said_of(stack, text)
        assert new.unscorable is None
        assert new.generation == status.generation
        # Along the old directions nearly half of all cosines would have the wrong sign.
        for one, other in zip(old.scores, new.scores, strict=True):
            assert other.score == pytest.approx(one.score, rel=1e-3, abs=1e-4)
            assert (other.position, other.first) == (one.position, one.first)
    # The server was given no fingerprint to insist on, and follows.
    assert [ask(stack, text).status_code for text in asked] == [200] * 4 + [400] * 4
    assert stack.metric("undertow_guard_failures_total", kind="fingerprint") == 0


def narrower(bank: Bank) -> Bank:
    """Without the last direction of its first layer."""
    first, *others = bank.layers
    less = replace(
        first,
        directions=first.directions[:-1],
        names=first.names[:-1],
        singular_values=first.singular_values[:-1],
        energies=(),
    )
    layers = [less, *others]
    fields = {name: getattr(bank, name) for name in ("base_digest", "tuned_digest", "method", "k", "model_class")}
    return Bank.sealed(**fields, hidden_size=bank.hidden_size, num_layers=bank.num_layers, layers=layers)


def test_what_cannot_be_taken_is_refused_by_name_and_the_old_guards_on(stack: Stack, files: Files) -> None:
    bank, calibration = Bank.load(files.bank), Calibration.load(files.calibration)
    before, text = worker(stack), texts("triggered", 1, 12)[0]
    url, secret = f"{stack.engine.url}{RELOAD_PATH}", {"authorization": f"Bearer {ADMIN_TOKEN}"}
    wanted = {"fingerprint": bank.fingerprint, "calibration": "sha256:" + "0" * 64}

    def refused(status: int, *said: str) -> None:
        answer = httpx.post(url, json=wanted, headers=secret)
        assert answer.status_code == status
        assert all(each in answer.json()["error"] for each in said), answer.text

    # Not what was named.
    refused(409, str(files.calibration), f"its digest is {calibration.digest()}, asked for is {wanted['calibration']}")
    # Not a file.
    whole = files.calibration.read_bytes()
    files.calibration.write_bytes(whole[: len(whole) // 2])
    refused(409, str(files.calibration), "not a calibration file")
    # For another dtype, and then for another bank, though it is what was named.
    other = replace(calibration, facts={**calibration.facts, "dtype": "bfloat16"})
    other.save(files.calibration)
    wanted["calibration"] = other.digest()
    refused(409, "made with dtype bfloat16, this engine runs float32")
    _, turned = mirrored(bank, calibration)
    turned.save(files.calibration)
    wanted["calibration"] = turned.digest()
    refused(409, f"made for the bank {turned.fingerprint}")
    # A bank that was changed, and one of another shape.
    spoilt = bytearray(files.bank.read_bytes())
    spoilt[-5] ^= 1
    files.bank.write_bytes(spoilt)
    wanted["fingerprint"] = turned.fingerprint
    refused(409, "the file was changed after it was built")
    less = narrower(bank)
    less.save(files.bank)
    wanted["fingerprint"] = less.fingerprint
    refused(409, "cannot take the place", f"layer {bank.layers[0].index} has ", "of the model's own matrices, expected")
    # By whom it should not be.
    assert httpx.post(url, json=wanted).status_code == 401
    assert httpx.get(url, headers=secret).status_code == 404
    assert httpx.post(f"{stack.url}{RELOAD_PATH}", json=wanted, headers=secret).status_code == 404
    after = worker(stack)
    assert (after.fingerprint, after.calibration, after.generation) == (
        before.fingerprint,
        before.calibration,
        before.generation,
    )
    assert ask(stack, text).json()["error"]["code"] == "content_filter"


def test_status_tells_generation_coverage_and_the_last_canary(
    stack: Stack, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.put(calibration=replace(Calibration.load(files.calibration), target_fpr=0.02))[0] == 0
    # What changed is in the engine's log.
    assert worker(stack).calibration in (files.calibration.parent / "vllm.log").read_text()
    assert cli.main(["status", "--engine", stack.engine.url, "--server", operators(stack.url)]) == 0
    out = capsys.readouterr().out
    found = worker(stack)
    assert f"generation         {found.generation}\n" in out
    assert "coverage           " in out
    assert "tokens (100%)" in out
    assert "last canary      20" in out
    assert ", scored, " in out
