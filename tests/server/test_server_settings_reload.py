"""Settings that change while requests run: all of a file or nothing of it, whoever asks and however it was written."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import itertools
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from guard.errors import ConfigError
from guard.policy import Policy
from server import cli
from server.app import Undertow, create_app
from server.commands import up
from server.config.file import look
from server.config.fixed import moved
from server.config.origin import open_settings
from server.config.settings import Settings, parse
from tests.ports import free_port

from .conftest import Proxy
from .fake_engine import MODEL, FakeEngine, Script
from .fake_engine import status as engine_status
from .fleet import eventually
from .hosting import Host, hosted
from .test_server_answers import CHAT, chat_body
from .test_server_keys import make_key

BLOCK = {"mode": "enforce", "detections": {"density": {"action": "block", "threshold": {"fpr": 0.01}}}}
SECRET = "sk-planted-77aa"


@dataclass
class Run:
    """A proxy whose settings are a file."""

    path: Path
    engine: FakeEngine
    upstream: str
    app: Undertow = field(init=False)
    proxy: Proxy = field(init=False)

    def text(self, **sections: Any) -> str:
        document = {
            "version": 1,
            "upstream": {"url": self.upstream},
            "reload": {"every_s": 0.05},
            "incidents": {"path": None},
            **sections,
        }
        return yaml.safe_dump(document)

    def write(self, text: str) -> None:
        """Whole, as `mv` does."""
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.rename(self.path)

    @property
    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = self.proxy.admin("/readyz").json()["settings"]
        return told

    @property
    def holds(self) -> bool:
        return self.proxy.sample("undertow_config_last_reload_success") == 1

    def taken(self, text: str) -> None:
        """Waits until this is what holds."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        eventually(lambda: (self.told["sha256"], self.told["refused"]) == (digest, None))
        assert self.holds
        assert self.proxy.sample("undertow_config_info", sha256=digest) == 1

    def refused(self, said: str) -> None:
        eventually(lambda: said in (self.told["refused"] or ""))
        assert not self.holds

    def sent(self) -> Policy:
        """What the engine is told to judge a request by."""
        assert self.proxy.post(CHAT, chat_body()).status_code == 200
        return Policy.from_wire(self.engine.bodies[-1]["vllm_xargs"]["undertow_policy"])


@pytest.fixture
def run(engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path / "undertow.yaml", engine, played[1].url)
    run.path.write_text(run.text())
    settings, origin = open_settings(run.path, lambda text: parse(text, str(run.path), {}))
    run.app = create_app(settings, {}, origin)
    with hosted(run.app, "on") as host:
        run.proxy = Proxy(host)
        eventually(lambda: run.proxy.get("/readyz").status_code == 200)
        yield run


def test_a_file_that_changes_is_taken(run: Run) -> None:
    began = run.proxy.sample("undertow_config_last_reload_timestamp_seconds")
    assert run.told["sha256"] == hashlib.sha256(run.path.read_bytes()).hexdigest()
    assert run.sent().mode == "enforce"
    text = run.text(policy={"mode": "monitor"}, limits={"max_sequences": 2})
    run.write(text)
    run.taken(text)
    assert run.sent().mode == "monitor"
    assert run.proxy.post(CHAT, chat_body(n=3)).status_code == 400
    assert began < run.proxy.sample("undertow_config_last_reload_timestamp_seconds") <= time.time()


def test_of_a_thousand_requests_each_is_judged_wholly_by_one_file_or_the_other(run: Run) -> None:
    """Both differ in what the engine is told, in what the server does, and in what it counts."""
    one = run.text(policy={"mode": "monitor"}, limits={"max_sequences": 4})
    two = run.text(
        policies={"strict": BLOCK},
        rules=[{"match": {"model": MODEL}, "policy": "strict"}],
        limits={"max_sequences": 2},
        endpoints={"template_arguments": ["enable_thinking"]},
    )
    run.write(one)
    run.taken(one)
    run.engine.script = Script(blocked={0: 2})
    ending = threading.Event()

    def flip() -> int:
        for count, text in enumerate(itertools.cycle((two, one)), start=1):
            if ending.is_set():
                return count
            run.write(text)
            digest = hashlib.sha256(text.encode()).hexdigest()
            eventually(lambda: run.app.reload.report.sha256 == digest)  # noqa: B023 - called at once
        raise AssertionError

    def ask(number: int) -> str:
        body = chat_body(stream=bool(number % 2), n=3 if number % 3 == 0 else 1)
        if number % 3 == 1:
            body["chat_template_kwargs"] = {"enable_thinking": True}
        answer = client.post(CHAT, json=body)
        if answer.status_code == 400:
            assert number % 3 in (0, 1)
            return "two" if answer.json()["error"]["param"] == "n" else "one"
        assert answer.status_code == 200, answer.text
        return "two" if answer.text.count("content_filter") else "one"

    with (
        httpx.Client(base_url=run.proxy.url, timeout=20, verify=False) as client,
        ThreadPoolExecutor(9) as pool,
    ):
        flipping = pool.submit(flip)
        answers = list(pool.map(ask, range(1000)))
        ending.set()
        flips = flipping.result()
    assert flips > 3
    assert len(answers) == 1000
    assert min(answers.count("one"), answers.count("two")) > 50
    # What the engine was told is one policy or the other, and no third.
    wires = {body["vllm_xargs"]["undertow_policy"] for body in run.engine.bodies if "messages" in body}
    assert {Policy.from_wire(wire).mode for wire in wires} == {"monitor", "enforce"}
    assert len(wires) == 2
    assert all(
        ("chat_template_kwargs" in body) <= (Policy.from_wire(body["vllm_xargs"]["undertow_policy"]).mode == "enforce")
        for body in run.engine.bodies
        if "messages" in body
    )
    evaluated = run.proxy.sample("undertow_evaluated_total", endpoint="chat_completions")
    assert evaluated == run.proxy.sample("undertow_eligible_total", endpoint="chat_completions") > 500


def test_a_request_ends_under_what_it_began_with(run: Run) -> None:
    run.engine.script = Script(blocked={0: 5}, tokens=("a",) * 5, token_delay_s=0.2)
    text = run.text(policy={"mode": "monitor"})
    with run.proxy.openai(max_retries=0).chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], stream=True
    ) as stream:
        next(stream)
        run.write(text)
        run.taken(text)
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
    assert reasons[-1] == "content_filter"
    run.engine.script = Script(blocked={0: 5})
    assert run.proxy.post(CHAT, chat_body()).headers["x-undertow-action"] == "flag"


BAD = [
    ("version: 1\npolicy: {mode: block}", "`policy.mode`: found 'block'; expected 'off', 'monitor' or 'enforce'"),
    ("version: 1\npolice: {}", "`police`: unknown key; did you mean `policies`? expected one of"),
    ("", "expected a mapping of settings, found nothing"),
    ("version: 1\npolicy: {mode: monitor", "line 2"),
    ("version: 1\nlimits: {max_sequences: 0}\npolicy: {mode: monitor}", "`limits.max_sequences`: found 0"),
    (f"version: 1\nupstream: {{api_key: {SECRET}}}", "`upstream.api_key`: unknown key; did you mean `api_key_env`?"),
    ("[" * 5000, "nested too deep"),
]


def reasons(caplog: pytest.LogCaptureFixture) -> list[object]:
    """Why the log says that settings were not taken."""
    refusals = [record for record in caplog.records if record.getMessage().startswith("settings not taken")]
    return [record.__dict__["fields"]["reason"] for record in refusals]


def test_a_bad_file_changes_nothing_and_says_what_validate_says(
    run: Run, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = run.told
    for text, said in BAD:
        run.write(text)
        run.refused(said)
        assert cli.main(["config", "validate", str(run.path)]) == 2
        assert run.told["refused"] == capsys.readouterr().err.removeprefix("undertow: ").rstrip("\n")
        assert run.told["refused"] == reasons(caplog)[-1]
        assert (run.told["sha256"], run.told["since"]) == (before["sha256"], before["since"])
        assert run.sent().mode == "enforce"
        assert run.proxy.get("/readyz").status_code == 200, "what held before holds on"
    said_of_it = [str(record.__dict__) for record in caplog.records]
    assert SECRET not in "".join([*said_of_it, run.proxy.admin("/metrics").text, str(run.told)])
    text = run.text()
    run.write(text)
    run.taken(text)


def test_a_missing_file_changes_nothing_and_is_taken_when_it_is_back(run: Run) -> None:
    run.path.unlink()
    run.refused("undertow.yaml: cannot be read: No such file or directory")
    assert run.sent().mode == "enforce"
    text = run.text()
    run.path.write_text(text)
    run.taken(text)


def test_what_cannot_change_is_named_and_nothing_of_the_file_is_taken(run: Run) -> None:
    wanted = run.text(
        policy={"mode": "monitor"},
        listen={"port": 9},
        upstream={"url": "http://elsewhere:1"},
    )
    run.write(wanted)
    run.refused("`listen.port`: found 9; expected 8080, as the server was started with: it cannot change while it runs")
    assert f"`upstream.url`: found 'http://elsewhere:1'; expected '{run.upstream}'" in run.told["refused"]
    assert run.sent().mode == "enforce"


def test_keys_that_are_made_or_revoked_are_known_without_a_restart(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"

    def status(key: str) -> int:
        return run.proxy.post(CHAT, chat_body(), {"authorization": f"Bearer {key}"}).status_code

    lab = make_key(file, "lab", capsys)
    assert status(lab) == 200, "nobody asks for one"
    text = run.text(access={"keys_file": str(file)})
    run.write(text)
    run.taken(text)
    assert (status(lab), status("utk_other")) == (200, 401)
    shop = make_key(file, "shop", capsys)
    eventually(lambda: status(shop) == 200)
    assert cli.main(["keys", "revoke", "--file", str(file), lab.split("_")[1]]) == 0
    eventually(lambda: status(lab) == 401)
    assert status(shop) == 200
    whole = file.read_text()
    file.write_text(whole[:-40])
    run.refused(f"{file}: ")
    assert (status(lab), status(shop)) == (401, 200)
    file.write_text(whole)
    eventually(lambda: run.holds)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"admin": {"port": 1}}, "admin.port"),
        ({"shutdown": {"grace_s": 1}}, "shutdown.grace_s"),
        ({"upstream": {"models": ["a"]}}, "upstream.models"),
        ({"upstreams": {"a": {}}}, "upstreams.a"),
        ({"limits": {"max_connections": 5, "max_body_bytes": 5}}, "limits.max_connections"),
    ],
)
def test_whatever_is_opened_once_cannot_change(section: dict[str, Any], named: str) -> None:
    held, wanted = Settings(version=1), Settings.model_validate({"version": 1, **section})
    assert [line.split("`")[1] for line in moved(held, wanted)] == [named]
    assert [line.split("`")[1] for line in moved(wanted, held)] == [named]
    assert moved(wanted, wanted) == []


def test_links_that_are_swapped_as_kubernetes_does_are_followed(
    engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path
) -> None:
    """A ConfigMap: FILE -> ..data/FILE, ..data -> a folder with a date in its name, and the middle one is replaced."""
    run = Run(tmp_path / "undertow.yaml", engine, played[1].url)

    def publish(name: str, text: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "undertow.yaml").write_text(text)
        (tmp_path / "..data_tmp").symlink_to(name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("..2026_01", run.text())
    run.path.symlink_to(Path("..data", "undertow.yaml"))
    settings, origin = open_settings(run.path, lambda text: parse(text, str(run.path), {}))
    with hosted(create_app(settings, {}, origin), "on") as host:
        run.proxy = Proxy(host)
        eventually(lambda: run.proxy.get("/readyz").status_code == 200)
        text = run.text(policy={"mode": "monitor"})
        publish("..2026_02", text)
        (tmp_path / "..2026_01" / "undertow.yaml").unlink()
        run.taken(text)
        assert run.sent().mode == "monitor"


def test_a_file_that_is_still_written_is_never_taken(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Each part of it is a settings file by itself, and the first a laxer one than the whole."""
    caplog.set_level("INFO", "undertow.server")
    parts = [
        run.text(policy={"mode": "monitor"}),
        *(f"# {number}\n" for number in range(30)),
        "limits: {max_sequences: 1}\n",
    ]
    with run.path.open("w") as file:
        for part in parts:
            file.write(part)
            file.flush()
            time.sleep(0.03)
    run.taken("".join(parts))
    assert [record.fields["sha256"] for record in caplog.records if record.message == "settings taken"] == [
        hashlib.sha256("".join(parts).encode()).hexdigest()
    ]


def test_a_file_that_changes_while_it_is_read_is_refused_until_it_stands_still(run: Run) -> None:
    run.write(run.text(reload={"every_s": 0}))
    run.taken(run.path.read_text())
    ending = threading.Event()

    def write() -> None:
        for number in itertools.count():
            if ending.is_set():
                return
            run.write(run.text(policy={"mode": "monitor"}) + f"# {number}\n")
            time.sleep(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        run.app.reload.ask()
        run.refused("changes while it is read; expected a file that stands still")
        assert run.sent().mode == "enforce"
    finally:
        ending.set()
        writer.join()
    run.app.reload.ask()
    run.taken(run.path.read_text())


def test_a_policy_that_the_engine_cannot_judge_by_is_refused_until_it_can(run: Run) -> None:
    """And it is the handshake's own word, before anything is judged by it."""
    asked = {
        "policies": {"fine": {**BLOCK, "detections": {"density": {"action": "block", "threshold": {"fpr": 1e-5}}}}}
    }
    text = run.text(**asked, rules=[{"match": {"model": "x"}, "policy": "fine"}])
    run.write(text)
    run.refused(
        "engine main: `policies.fine.detections.density.threshold.fpr` is 1e-05, but the calibration of worker 0"
    )
    assert run.proxy.get("/readyz").status_code == 200, "which it would not be, had it been taken"
    assert run.sent().mode == "enforce"


def test_a_policy_is_taken_once_the_engine_can_judge_by_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.reload._AGAIN_S", 0.1)
    text = run.text(policy={"detections": {"density": {"action": "steer"}}})
    run.write(text)
    run.refused("steers, but worker 0 was started without `undertow.steering`")
    before = run.engine.status
    try:
        run.engine.status = engine_status(steering=True)
        run.taken(text)
    finally:
        run.engine.status = before


def test_without_an_engine_a_new_policy_waits_and_an_old_one_does_not(
    tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.reload._AGAIN_S", 0.1)
    run = Run(tmp_path / "undertow.yaml", engine, f"http://127.0.0.1:{free_port()}")
    run.path.write_text(run.text())
    settings, origin = open_settings(run.path, lambda text: parse(text, str(run.path), {}))
    with hosted(create_app(settings, {}, origin), "on") as host:
        run.proxy = Proxy(host)
        text = run.text(policy={"on_block": "completion"}, limits={"max_sequences": 3})
        run.write(text)
        run.taken(text)
        run.write(run.text(policy={"mode": "monitor"}))
        run.refused("no engine answers, so nobody says whether it can judge by `policy`")


def test_what_an_engine_said_before_it_went_away_counts_no_more(engine: FakeEngine, tmp_path: Path) -> None:
    """It may come back with another calibration."""
    run = Run(tmp_path / "undertow.yaml", engine, "")
    with hosted(engine.app) as upstream:
        run.upstream = upstream.url
        run.path.write_text(run.text())
        settings, origin = open_settings(run.path, lambda text: parse(text, str(run.path), {}))
        with hosted(create_app(settings, {}, origin), "on") as host:
            run.proxy = Proxy(host)
            eventually(lambda: run.proxy.get("/readyz").status_code == 200)
            upstream.stop()
            eventually(lambda: run.proxy.sample("undertow_engine_ready", engine="main") == 0)
            run.write(run.text(policy={"mode": "monitor"}))
            run.refused("no engine answers")


def test_settings_that_nobody_could_use_can_be_put_right_while_the_server_runs(
    engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path
) -> None:
    """The server starts, refuses everything, and says why: the file that is right is taken, though no handshake is."""
    run = Run(tmp_path / "undertow.yaml", engine, played[1].url)
    run.path.write_text(run.text(policy={"detections": {"density": {"action": "block", "threshold": {"fpr": 1e-5}}}}))
    settings, origin = open_settings(run.path, lambda text: parse(text, str(run.path), {}))
    with hosted(create_app(settings, {}, origin), "on") as host:
        run.proxy = Proxy(host)
        assert run.proxy.post(CHAT, chat_body()).status_code == 503
        text = run.text()
        run.write(text)
        run.taken(text)
        eventually(lambda: run.proxy.get("/readyz").status_code == 200)
        assert run.sent().mode == "enforce"


def test_a_fault_while_settings_are_taken_leaves_those_that_hold(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.in_force.InForce.of", lambda *_: 1 / 0)
    run.write(run.text(policy={"mode": "monitor"}))
    run.refused("a fault in the server")
    assert run.sent().mode == "enforce"


def test_status_says_which_settings_hold_and_why_others_do_not(
    run: Run, played: tuple[FakeEngine, Host], capsys: pytest.CaptureFixture[str]
) -> None:
    digest = hashlib.sha256(run.path.read_bytes()).hexdigest()
    line = ["status", "--engine", played[1].url, "--server", run.proxy.host.admin_url]
    assert cli.main(line) == 0
    out = capsys.readouterr().out
    assert f"  settings           {digest}, since 20" in out
    assert "refused" not in out
    run.write("version: 1\nlisten: {port: -1}\nlog: {level: loud}\n")
    run.refused("`listen.port`")
    assert cli.main(line) == 0, "the server judges on"
    out = capsys.readouterr().out
    assert f"  refused            {run.path}: `listen.port`: found -1" in out
    assert f"                     {run.path}: `log.level`: found 'loud'" in out


# -- as a process -----------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """`undertow serve`, and what it wrote."""

    process: subprocess.Popen[str]
    url: str
    admin: str
    log: list[str] = field(default_factory=list)

    reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()))
        self.reader.start()

    def ended(self) -> int:
        code = self.process.wait(20)
        self.reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    def says(self, text: str) -> Callable[[], bool]:
        return lambda: any(text in line for line in self.log)


@contextmanager
def serve(run_text: str, path: Path, config: str | None = None, **options: Any) -> Iterator[Served]:
    """Runs it, and sees that it ends in order."""
    path.write_text(run_text)
    line = [sys.executable, "-m", "server.cli", "serve", "--config", config or str(path)]
    process = subprocess.Popen(
        [*line, "--port", "0", "--admin-port", "0"], stderr=subprocess.PIPE, text=True, **options
    )
    try:
        assert process.stderr is not None
        urls = [re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline()) for _ in range(2)]
        assert urls[0]
        assert urls[1]
        served = Served(process, urls[0][0], urls[1][0])
        yield served
        process.terminate()
        assert served.ended() == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def written(engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path) -> Run:
    return Run(tmp_path / "undertow.yaml", engine, played[1].url)


def test_sighup_reads_the_file_and_ends_nothing(written: Run) -> None:
    with serve(written.text(reload={"every_s": 0}), written.path) as served:
        written.engine.script = Script(blocked={0: 5}, tokens=("a",) * 5, token_delay_s=0.2)
        with httpx.stream("POST", f"{served.url}{CHAT}", json=chat_body(stream=True), timeout=20) as answer:
            written.write(written.text(reload={"every_s": 0}, policy={"mode": "monitor"}, log={"level": "debug"}))
            time.sleep(0.3)
            assert not served.says("settings taken")(), "nobody asked"
            served.process.send_signal(signal.SIGHUP)
            eventually(served.says("settings taken"))
            assert "content_filter" in answer.read().decode()
        answer = httpx.post(f"{served.url}{CHAT}", json=chat_body(), timeout=20)
        assert answer.headers["x-undertow-action"] == "flag"
        written.write("version: 2")
        served.process.send_signal(signal.SIGHUP)
        eventually(served.says("`version`: found 2; expected 1"))
        assert httpx.get(f"{served.admin}/readyz", timeout=20).json()["ready"]


def test_a_terminal_that_closes_ends_the_server_in_order(written: Run) -> None:
    leader, follower = pty.openpty()

    def attach() -> None:
        os.setsid()
        fcntl.ioctl(follower, termios.TIOCSCTTY, 0)

    with serve(written.text(), written.path, stdin=follower, preexec_fn=attach) as served:
        os.close(follower)
        served.process.send_signal(signal.SIGHUP)
        eventually(served.says("settings taken"))
        assert served.process.poll() is None
        os.close(leader)
        assert served.process.wait(20) == 0


def test_settings_from_a_pipe_are_for_good(written: Run) -> None:
    source, sink = os.pipe()
    os.write(sink, written.text().encode())
    os.close(sink)
    with serve("", written.path, f"/dev/fd/{source}", pass_fds=(source,)) as served:
        os.close(source)
        served.process.send_signal(signal.SIGHUP)
        eventually(served.says("came from no file that can be read again"))


def test_a_pipe_in_the_place_of_the_file_is_refused_and_nobody_waits_for_it(run: Run) -> None:
    run.path.unlink()
    os.mkfifo(run.path)
    run.refused("is no regular file")
    assert look([run.path]) == ("special",)
    text = run.text()
    run.write(text)
    run.taken(text)


def test_a_change_between_reading_the_file_and_serving_it_is_not_missed(written: Run) -> None:
    written.path.write_text(written.text())
    settings, origin = open_settings(written.path, lambda text: parse(text, str(written.path), {}))
    text = written.text(policy={"mode": "monitor"})
    written.write(text)
    with hosted(create_app(settings, {}, origin), "on") as host:
        written.proxy = Proxy(host)
        written.taken(text)


def test_up_reads_its_settings_again_with_its_own_engine_and_flags_in_them(tmp_path: Path) -> None:
    path = tmp_path / "undertow.yaml"
    path.write_text("version: 1\n")
    arguments = argparse.Namespace(config=path, host="127.0.0.2", port=9, admin_port=7)
    settings, origin = up._settings(arguments, "http://127.0.0.1:1", "sha256:started")
    assert origin
    path.write_text("version: 1\npolicy: { mode: monitor }\n")
    again, _ = origin.read()
    assert (settings.policy.mode, again.policy.mode) == ("enforce", "monitor")
    assert moved(settings, again) == []
    path.write_text("version: 1\nupstreams: { a: {} }\n")
    with pytest.raises(ConfigError, match="`upstreams` names engines that run already"):
        origin.read()


def test_a_file_that_is_no_settings_file_by_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.write_bytes(b"#" * (5 * 2**20))
    with pytest.raises(ConfigError, match=r"huge: more than \d+ bytes"):
        open_settings(path, lambda text: parse(text, "huge", {}))
