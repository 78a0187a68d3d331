"""Flaws of other gateways and of vLLM that became advisories, each tried here. The list is that of LiteLLM's and vLLM's
published ones up to November 2026, as far as this server has what they are about."""

from __future__ import annotations

import ast
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.errors import ConfigError
from server import cli
from server.access.keys import KeyRefused, Keys, read_keys
from server.app import create_app
from server.config.settings import Settings, parse

from .conftest import Proxy, settings_for
from .fake_engine import FakeEngine, Script
from .hosting import Host, hosted
from .test_server_answers import CHAT, TEXT, chat_body, text_body
from .ways_in import ways

ROOT = Path(__file__).parents[2]
ELSEWHERE = "http://127.0.0.1:9/"
SOURCES = [path for name in ("server", "guard") for path in (ROOT / name).rglob("*.py")]


@pytest.fixture
def keyed(
    played: tuple[FakeEngine, Host], engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[tuple[Proxy, str]]:
    assert cli.main(["keys", "create", "--file", str(tmp_path / "keys.json"), "--tenant", "lab"]) == 0
    key = capsys.readouterr().out.strip()
    fields = settings_for(played[1].url).model_dump(exclude_unset=True)
    settings = Settings.model_validate({**fields, "access": {"keys_file": tmp_path / "keys.json"}})
    with hosted(create_app(settings), "on") as host:
        yield Proxy(host), key


@pytest.mark.parametrize("field", ["api_base", "base_url", "api_key", "url", "host", "upstream", "custom_llm_provider"])
def test_cve_2024_6587_a_body_never_chooses_the_upstream(engine: FakeEngine, enforce: Proxy, field: str) -> None:
    """LiteLLM: `api_base` in a body sent the request, with the operator's key, wherever a client liked."""
    for path, body in ((CHAT, chat_body), (TEXT, text_body)):
        answer = enforce.post(path, body(**{field: ELSEWHERE}))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
    assert engine.bodies == []


@pytest.mark.parametrize(
    "nested",
    [
        {"user_config": {"model_list": [{"litellm_params": {"api_base": ELSEWHERE}}]}},
        {"metadata": {"user_config": {"api_base": ELSEWHERE}}},
        {"extra_body": {"api_base": ELSEWHERE}},
        {"stream_options": {"api_base": ELSEWHERE}},
        {"response_format": {"type": "text", "api_base": ELSEWHERE}},
        {"messages": [{"role": "user", "content": "x", "api_base": ELSEWHERE}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "url": ELSEWHERE}]}]},
        {"tools": [{"type": "mcp", "server_url": ELSEWHERE}]},
    ],
)
def test_pysec_2026_4070_nor_does_anything_nested_in_it(
    engine: FakeEngine, enforce: Proxy, nested: dict[str, Any]
) -> None:
    """LiteLLM: the same, one level down."""
    answer = enforce.post(CHAT, {**chat_body(stream=False), **nested})
    assert answer.status_code == 400 or ELSEWHERE not in json.dumps(engine.bodies[-1])


@pytest.mark.parametrize(
    "field",
    [
        {"chat_template": "{{ ''.__class__.__mro__ }}"},
        {"chat_template_kwargs": {"chat_template": "{{ 7*7 }}"}},
        {"chat_template_kwargs": {"anything": 1}},
        {"prompt_template": "{{ 7*7 }}"},
    ],
)
def test_pysec_2026_387_no_client_brings_a_template(engine: FakeEngine, enforce: Proxy, field: dict[str, Any]) -> None:
    """LiteLLM: a chat template in the body was rendered on the server. vLLM: one could block it for hours."""
    assert enforce.post(CHAT, chat_body(**field)).status_code == 400
    assert engine.bodies == []


def test_cve_2026_42203_the_server_renders_no_template() -> None:
    """LiteLLM: /prompts/test rendered what a client sent."""
    for path in (ROOT / "server").rglob("*.py"):
        assert not re.search(r"^\s*(?:import|from) (?:jinja2|mako)\b", path.read_text(), re.M), path


def test_cve_2026_42208_no_key_reaches_a_database(keyed: tuple[Proxy, str], engine: FakeEngine) -> None:
    """LiteLLM: SQL injection where keys are checked, before anybody was known."""
    proxy, key = keyed
    for said in ("' OR 1=1 --", f"{key}' OR '1'='1", '"; DROP TABLE incidents; --', "utk_%", "utk_" + "_" * 56):
        assert proxy.post(CHAT, chat_body(), {"authorization": f"Bearer {said}"}).status_code == 401
    assert engine.bodies == []
    for path in (ROOT / "server" / "access").glob("*.py"):
        assert "sqlalchemy" not in path.read_text(), path


def test_cve_2026_42271_no_request_starts_a_process() -> None:
    """LiteLLM: an endpoint that tested MCP servers ran the command in its body. Only our commands start programs."""
    starting = {"subprocess", "pty", "multiprocessing"}
    allowed = {"server/engine_process.py", "server/commands/demo.py", "server/benching/processes.py"}
    found = set()
    for path in (ROOT / "server").rglob("*.py"):
        imported = {name for names in _imports(path) for name in names}
        if imported & starting or re.search(r"\bos\.(?:system|popen|exec\w+|spawn\w+|posix_spawn)\(", path.read_text()):
            found.add(str(path.relative_to(ROOT)))
    assert found <= allowed


def test_cve_2026_40217_settings_hold_no_code() -> None:
    """LiteLLM: a guardrail's code came over HTTP. Nothing here evaluates text, and YAML is read by the safe loader."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"unsafe_load", "full_load", "UnsafeLoader", "FullLoader"}, path
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        parse("version: 1\nlog: !!python/object/apply:os.system ['true']", "x", {})


def test_cve_2026_35030_a_key_is_known_by_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LiteLLM: a cache of good keys was looked up by the first 20 letters."""
    from datetime import UTC, datetime

    assert cli.main(["keys", "create", "--file", str(tmp_path / "keys.json"), "--tenant", "lab"]) == 0
    key = capsys.readouterr().out.strip()
    keys = Keys(read_keys(tmp_path / "keys.json"))
    now = datetime.now(UTC)
    assert keys.holder(key, now)
    for place in range(len(key)):
        other = "A" if key[place] != "A" else "B"
        with pytest.raises(KeyRefused):
            keys.holder(key[:place] + other + key[place + 1 :], now)


def test_ghsa_69x8_hrgq_fjj8_what_is_kept_of_a_key_opens_nothing(keyed: tuple[Proxy, str], tmp_path: Path) -> None:
    """LiteLLM: password hashes were shown, and could be used in the place of passwords."""
    proxy, key = keyed
    (record,) = read_keys(tmp_path / "keys.json")
    for said in (record.sha256, f"utk_{record.id}_{record.sha256[:43]}", f"{key.rpartition('_')[0]}_{record.sha256}"):
        assert proxy.post(CHAT, chat_body(), {"authorization": f"Bearer {said}"}).status_code == 401
    shown = proxy.admin("/metrics").text + proxy.admin("/readyz").text
    assert record.sha256 not in shown


@pytest.mark.parametrize("host", ["127.0.0.1:8081", "undertow-admin", "evil.example", "x/v1/models?"])
def test_cve_2026_49468_the_host_header_opens_no_route(keyed: tuple[Proxy, str], host: str) -> None:
    """LiteLLM: who may do what was decided by a URL that the Host header was part of."""
    proxy, key = keyed
    with httpx.Client(base_url=proxy.url) as client:
        assert client.post(CHAT, json=chat_body(), headers={"host": host}).status_code == 401
        assert client.get("/metrics", headers={"host": host, "authorization": f"Bearer {key}"}).status_code == 404
        for name in ("x-forwarded-prefix", "x-original-url", "x-rewrite-url", "x-forwarded-path"):
            assert client.post(CHAT, json=chat_body(), headers={name: "/healthz"}).status_code == 401


@pytest.mark.parametrize("way", list(ways()), ids=lambda way: f"{way.path} {way.form} {way.stream}")
def test_pysec_2026_4074_every_endpoint_has_the_same_guard(engine: FakeEngine, enforce: Proxy, way: Any) -> None:
    """LiteLLM: a guardrail ran for one name of a call's type, and the same call came under another."""
    engine.script = Script(blocked={0: 0, 1: 0})
    answer = enforce.post(way.path, way.body)
    assert "42" not in answer.text
    engine.script = Script(fault="missing")
    assert enforce.post(way.path, way.body).status_code == 503


def test_litellm_1_82_7_what_is_installed_is_pinned_by_hash_and_litellm_is_not() -> None:
    """A stolen release of LiteLLM read credentials for some hours: locks name every file by its hash."""
    for lock in (ROOT / "requirements").glob("*.lock"):
        text = lock.read_text()
        assert not re.search(r"^litellm", text, re.M), lock
        pinned = re.findall(r"^[a-zA-Z0-9][^\n]*==", text, re.M)
        assert len(pinned) <= text.count("--hash=sha256:"), lock


@pytest.mark.parametrize("given", ["http://127.0.0.1:9/", "a\tb", "x" * 65, "../../etc", "${jndi:ldap://x}"])
def test_cve_2026_116176_a_request_id_is_only_ever_a_plain_word(engine: FakeEngine, enforce: Proxy, given: str) -> None:
    """vLLM: X-Request-Id made the engine send requests of its own."""
    answer = enforce.post(CHAT, chat_body(), {"x-request-id": given})
    assert answer.status_code == 200
    assert re.fullmatch(r"[A-Za-z0-9-]{1,64}", answer.headers["x-request-id"])
    assert given not in answer.headers["x-request-id"]
    assert given not in json.dumps(dict(engine.headers[-1]))


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file", "audio_url", "image_embeds"])
def test_cve_2026_24779_no_media_are_fetched(engine: FakeEngine, enforce: Proxy, kind: str) -> None:
    """vLLM: a media URL made the engine ask any address. Only text parts are let through."""
    part = {"type": kind, kind: {"url": ELSEWHERE, "data": "x"}}
    answer = enforce.post(CHAT, chat_body(messages=[{"role": "user", "content": [part]}]))
    assert answer.status_code == 400
    assert engine.bodies == []


@pytest.mark.parametrize("flaw", ["CVE-2025-32444", "CVE-2026-115912"])
def test_pickle_is_read_from_nobody(flaw: str) -> None:
    """vLLM: pickles over ZMQ, and in shared memory's handles, ran their sender's code."""
    for path in SOURCES:
        for names in _imports(path):
            assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve"} & set(names), path


@pytest.mark.parametrize("field", ["prompt_embeds", "kv_transfer_params", "mm_processor_kwargs", "logits_processors"])
def test_pysec_2026_2303_what_crashes_or_steers_the_engine_is_refused(
    engine: FakeEngine, enforce: Proxy, field: str
) -> None:
    """vLLM: prompt embeddings of a bad shape crashed it."""
    for path, body in ((CHAT, chat_body), (TEXT, text_body)):
        answer = enforce.post(path, body(**{field: {"a": [1]}}))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert engine.bodies == []


def test_cve_2025_62727_no_file_is_served_to_clients(enforce: Proxy) -> None:
    """Starlette: a Range header cost a file's server quadratic time. The clients' port has no files at all."""
    headers = {"range": "bytes=" + ",".join(f"{each}-{each}" for each in range(500))}
    with httpx.Client(base_url=enforce.url) as client:
        for path in ("/", "/page/incidents.js", "/static/x", "/openapi.json", "/docs"):
            assert client.get(path, headers=headers).status_code == 404


def test_pysec_2026_1942_a_compressed_body_is_not_opened(engine: FakeEngine, enforce: Proxy) -> None:
    """aiohttp: a small body became a very large one. Here bodies are read as they come."""
    import gzip

    bomb = gzip.compress(b'{"messages": "' + b" " * 10_000_000)
    with httpx.Client(base_url=enforce.url) as client:
        headers = {"content-encoding": "gzip", "content-type": "application/json"}
        assert client.post(CHAT, content=bomb, headers=headers).status_code == 400
    assert engine.bodies == []


@pytest.mark.parametrize(
    "head",
    [
        "content-length: 5\r\ntransfer-encoding: chunked\r\n",
        "content-length: 5\r\ncontent-length: 6\r\n",
        "transfer-encoding: xchunked\r\n",
        "x-a: b\r\n c: folded\r\n",
        "x-a : b\r\n",
        "x-a: b\x00c\r\n",
        "x\ra: b\r\n",
    ],
)
def test_smuggled_and_broken_headers_are_refused(engine: FakeEngine, enforce: Proxy, head: str) -> None:
    """aiohttp and others: two readers of one connection saw two different requests."""
    body = json.dumps(chat_body()).encode()
    with socket.create_connection(("127.0.0.1", enforce.host.port), timeout=5) as wire:
        start = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{head}\r\n"
        wire.sendall(start.encode("latin-1") + body)
        wire.settimeout(3)
        try:
            answer = wire.recv(65536)
        except (ConnectionResetError, TimeoutError):
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 200"), answer[:200]
    assert engine.bodies == []


def _imports(path: Path) -> Iterator[list[str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield [node.module.partition(".")[0]]
