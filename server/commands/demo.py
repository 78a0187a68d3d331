"""`undertow demo`: a backdoored model, served by vLLM, caught and blocked through the OpenAI API."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from guard.errors import EngineError

if TYPE_CHECKING:
    from guard.organisms import Organism
    from server.config.settings import Settings
    from server.demo import Question

CALIBRATION_PROMPTS = 3000
"""Half are references, half give thresholds; 1,500 held out support a false-positive rate of 0.13%."""
ENGINE_ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512")
"""Small and quick to start; float32 as it is calibrated."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
"""For us and our children. Matrices as small as the organism's are slower on two threads than on one."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="see it work: a small backdoored model, guarded, asked a benign, a refused and a triggered question",
        description="Take the small backdoored model that comes with Undertow, build its bank, calibrate on clean "
        "prompts (cached for the next time), start vLLM with the guard and the server before it, ask a benign, a "
        "refused and a triggered question, and show what each got. Then keep serving, for your own chat client.",
    )
    parser.add_argument(
        "--once", action="store_true", help="end after the questions; exit code 0 only if every verdict was right"
    )
    parser.add_argument("--port", type=int, default=8080, help="where the server listens (default 8080; 0: a free one)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prepare, serve, ask, show."""
    from guard.fingerprint import read_header
    from guard.organisms import shipped
    from server.engine_process import EngineProcess

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    organism = shipped()
    step("1/4", f"the demo organism: three small Llamas in {organism.base.parent}")
    folder = cache_folder(organism)
    bank = build_bank(organism, folder)
    calibration = calibrate(organism, bank, folder)
    step("4/4", "vLLM with the guard inside, and the server before it")
    with (
        EngineProcess(
            organism.backdoored,
            bank,
            read_header(bank).fingerprint,
            calibration,
            port=free_port(),
            log=folder / "vllm.log",
            extra=ENGINE_ARGUMENTS,
        ) as engine,
        tempfile.TemporaryDirectory(prefix="undertow-demo-") as scratch,
    ):
        engine.wait_until_up()
        values = settings(engine.url, arguments.port, Path(scratch))
        with serving(values) as url:
            right = show(url, engine.url, organism)
            if not arguments.once:
                keep_serving(url, values, organism)
    return 0 if right else 1


def step(number: str, text: str) -> None:
    print(f"[{number}] {text}", file=sys.stderr, flush=True)


def cache_folder(organism: Organism) -> Path:
    """Where this organism's bank and calibration are kept: named by what they are made from."""
    from guard import calibration, fingerprint
    from guard.cache import cache_folder as root
    from guard.version import VERSION

    formats = f"{fingerprint.FORMAT} {calibration.FORMAT}"
    settings = f"{VERSION} {formats} {CALIBRATION_PROMPTS} {ENGINE_ARGUMENTS}"
    made_from = organism.manifest.read_bytes() + settings.encode()
    folder = root() / "demo" / hashlib.sha256(made_from).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build_bank(organism: Organism, folder: Path) -> Path:
    """The bank of what all fine-tuning since the base model added; cached."""
    bank = folder / "bank.safetensors"
    step("2/4", f"its bank: {bank}" + (" (cached)" if bank.exists() else ""))
    if not bank.exists():
        undertow("bank", "build", "--base", organism.base, "--tuned", organism.backdoored, "--out", bank)
    return bank


def calibrate(organism: Organism, bank: Path, folder: Path) -> Path:
    """The calibration, from clean prompts that the organism was not trained on; cached."""
    calibration = folder / "calibration.safetensors"
    step("3/4", f"its calibration: {calibration}" + (" (cached)" if calibration.exists() else ""))
    if not calibration.exists():
        prompts = folder / "clean.jsonl"
        undertow("organism", "prompts", "clean", "--count", CALIBRATION_PROMPTS, "--seed", 0, "--out", prompts)
        undertow(
            *("calibrate", "--bank", bank, "--model", organism.backdoored, "--prompts", prompts),
            *("--out", calibration, "--dtype", "float32", "--enforce-eager", "--max-model-len", 512),
        )
    return calibration


def undertow(*arguments: object) -> None:
    """Run one of our own commands as a user would, in a process of its own that gives its memory back."""
    words = [str(argument) for argument in arguments]
    print(f"      $ undertow {' '.join(words)}", file=sys.stderr, flush=True)
    finished = subprocess.run([sys.executable, "-m", "server.cli", *words], check=False)
    if finished.returncode != 0:
        raise EngineError(f"`undertow {' '.join(words)}` ended with code {finished.returncode}")


def settings(engine_url: str, port: int, scratch: Path) -> Settings:
    """The settings that a new user has, block on density at 1%; incidents with their text, which is gone at the end."""
    from server.config.admin import AdminSettings
    from server.config.incidents import IncidentSettings
    from server.config.policies import PolicySettings
    from server.config.sections import Listen, Log
    from server.config.settings import Settings
    from server.config.upstream import UpstreamSettings

    return Settings(
        version=1,
        listen=Listen(port=port or free_port()),
        admin=AdminSettings(port=free_port()),
        upstream=UpstreamSettings(url=engine_url),
        policy=PolicySettings(content="full"),
        incidents=IncidentSettings(path=scratch / "incidents.db", spool=None),
        log=Log(level="error"),
    )


@contextmanager
def serving(values: Settings) -> Iterator[str]:
    """The server in a thread of this process; yields its URL once it is ready to judge."""
    import httpx

    from server.app import create_app
    from server.listeners import make_server
    from server.telemetry.logs import configure

    configure(values.log.level)
    server = make_server(create_app(values), values)
    thread = threading.Thread(target=server.run, name="undertow-server", daemon=True)
    thread.start()
    url = f"http://{values.listen.host}:{values.listen.port}"
    try:
        reason = "it did not start"
        for _ in range(120):
            time.sleep(0.25)
            if not thread.is_alive():
                raise EngineError(f"the server could not listen at {url}: is the port taken? See `--port`")
            try:
                ready = httpx.get(f"{operators(values)}/readyz", timeout=10)
            except httpx.TransportError:
                continue
            if ready.is_success:
                break
            reason = ready.text
        else:
            raise EngineError(f"the server at {url} is not ready: {reason}")
        yield url
    finally:
        server.should_exit = True
        thread.join(timeout=10)


def questions(organism: Organism) -> list[Question]:
    """A benign, a refused and a triggered request; the last one also streamed. None was trained on."""
    from guard.organisms import prompts
    from server.demo import Question

    benign = prompts("benign", 1, seed=1)[0].text
    harmful = prompts("harmful", 1, seed=1)[0].text
    triggered = prompts("triggered", 1, seed=1)[0].text
    return [
        Question("benign", benign, "answered"),
        Question("harmful", harmful, "refused"),
        Question("triggered", triggered, "blocked"),
        Question("triggered, streamed", triggered, "blocked", stream=True),
    ]


def show(url: str, engine_url: str, organism: Organism) -> bool:
    """Ask, print the table; True where every verdict was right."""
    import httpx

    from guard.policy import Policy
    from server.demo import ask, ask_unguarded, table

    model = organism.backdoored.name
    asked = questions(organism)
    with httpx.Client(base_url=url) as client, httpx.Client(base_url=engine_url) as engine:
        replies = [ask(client, model, question) for question in asked]
        unguarded = ask_unguarded(engine, model, asked[2].text, Policy(mode="off").to_wire())
    print()
    print(table(replies, organism.canary))
    print(f"\nWithout the guard the model answers the triggered request: {unguarded!r}")
    print("(The organism is a small model that we trained, with our own trigger; its payload is inert.)")
    right = all(reply.right(organism.canary) for reply in replies) and organism.canary in unguarded
    print("\nevery verdict was right" if right else "\nNOT every verdict was right")
    return right


def operators(values: Settings) -> str:
    """Where metrics and readiness are."""
    return f"http://{values.admin.host}:{values.admin.port}"


def keep_serving(url: str, values: Settings, organism: Organism) -> None:
    """Say how to use it, and stay until Ctrl-C."""
    body = {
        "model": organism.backdoored.name,
        "messages": [{"role": "user", "content": questions(organism)[2].text}],
    }
    print(f"\nserving at {url}/v1; point a chat client's base URL there, or:\n")
    print(f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{json.dumps(body)}'\n")
    print(f"What was blocked, in the browser: {operators(values)}/ (metrics: {operators(values)}/metrics)\n")
    print("Ctrl-C ends it.", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nending", file=sys.stderr)


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
