"""The settings file: every mistake is named by file, key, value and what was expected."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import yaml

from guard.errors import ConfigError
from server.app import create_app
from server.commands import config as config_command
from server.commands import serve as serve_command
from server.config.settings import ENVIRONMENT, Settings, load, parse
from server.listeners import listen

SHIPPED = Path(__file__).parents[2] / "configs" / "undertow.yaml"


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    config_command.add_parser(subparsers)
    serve_command.add_parser(subparsers)
    arguments = parser.parse_args(words)
    code: int = arguments.run(arguments)
    return code


def test_the_shipped_file_says_the_defaults() -> None:
    assert load(SHIPPED, {}) == Settings(version=1)


def test_the_shipped_file_names_every_variable_that_overrides_it() -> None:
    text = SHIPPED.read_text()
    assert all(variable in text for variable in ENVIRONMENT)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version: 2", "`version`: found 2; expected 1"),
        ("listen: {}", "`version`: missing; expected 1"),
        ("version: 1\nlisten: {port: 99999}", "`listen.port`: found 99999; expected less than or equal to 65535"),
        (
            "version: 1\nupstreem: {}",
            "`upstreem`: unknown key; did you mean `upstream`? expected one of ",
        ),
        ("version: 1\nupstream: {uri: x}", "`upstream.uri`: unknown key; did you mean `url`? expected one of api_"),
        ("version: 1\nupstream: {url: 'ftp://x'}", "`upstream.url`: found 'ftp://x'; expected http://HOST:PORT"),
        ("version: 1\nupstream: {url: 'http://x/v1'}", "expected no path"),
        ("version: 1\nupstream: {url: 'http://x:y'}", "expected http://HOST:PORT"),
        ("version: 1\nupstream: 3", "`upstream`: found 3; expected a valid dictionary"),
        ("version: 1\npolicy: {mode: on}", "`policy.mode`: found 'on'; expected 'off', 'monitor' or 'enforce'"),
        ("version: 1\npolicy: {detections: {}}", "mode `enforce` needs at least one detection"),
        (
            "version: 1\npolicy: {detections: {densty: {action: block}}}",
            "`policy.detections.densty`: unknown name; expected 'density', 'intrinsic' or 'exceedance'",
        ),
        (
            "version: 1\npolicy: {detections: {density: {action: allow}}}",
            "`policy.detections.density.action`: found 'allow'; expected 'flag', 'steer' or 'block'",
        ),
        (
            "version: 1\npolicy: {detections: {density: {action: block, threshold: {fpr: 2}}}}",
            "`policy.detections.density.threshold.fpr`: found 2; expected less than 1",
        ),
        (
            "version: 1\npolicy: {detections: {density: {action: block, threshold: {}}}}",
            "give exactly one of `fpr` and `raw`",
        ),
        (
            "version: 1\npolicy: {detections: {density: {action: block, threshold: {frp: 1}}}}",
            "`policy.detections.density.threshold.frp`: unknown key; did you mean `fpr`? expected one of fpr, raw",
        ),
        ("version: 1\nlog: {level: info}\nlog: {level: debug}", "line 3, column 1: duplicate key `log`"),
        ("version: 1\nlisten: {port: 1, port: 2}", "line 2, column 19: duplicate key `port`"),
        ("version: 1\nlisten: [", "line 2"),
        ("version: 1\nlisten: !!python/object:os.system {}", "line 2"),
        ("", "expected a mapping of settings, found nothing"),
        ("- 1", "expected a mapping of settings, found a list"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_was_expected(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text, "my.yaml", {})
    message = str(raised.value)
    assert message.startswith("my.yaml: ")
    assert said in message


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        parse("version: 1\nlisten: {port: -1}\nlog: {level: loud}", "f", {})
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nupstream: {api_key: sk-secret-1}",
        "version: 1\nupstream: {api_key_env: sk-secret-1}",
        "version: 1\nupstream: {url: 'http://user:sk-secret-1@host'}",
    ],
)
def test_a_secret_in_the_file_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text, "my.yaml", {})
    assert "sk-secret-1" not in str(raised.value)


def test_the_environment_wins_over_the_file() -> None:
    settings = parse(
        "version: 1\nlisten: {port: 1}",
        "f",
        {"UNDERTOW_LISTEN_PORT": "9", "UNDERTOW_POLICY_MODE": "monitor", "UNDERTOW_UPSTREAM_URL": "http://vllm:1/"},
    )
    assert (settings.listen.port, settings.policy.mode, settings.upstream.url) == (9, "monitor", "http://vllm:1")


def test_a_mistake_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"^UNDERTOW_LISTEN_PORT \(for `listen.port`\): found 'x'"):
        parse("version: 1", "f", {"UNDERTOW_LISTEN_PORT": "x"})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load(tmp_path / "absent.yaml", {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "binary.yaml", {})


@pytest.mark.parametrize("word", ["off", "'off'", "monitor"])
def test_off_is_a_word(word: str) -> None:
    assert parse(f"version: 1\npolicy: {{mode: {word}}}", "f", {}).policy.mode == word.strip("'")
    assert parse("version: 1\npolicies: {yes: {}, 'no': {}}", "f", {}).policies.keys() == {"yes", "no"}


def test_a_key_variable_that_is_not_set_is_named() -> None:
    settings = parse("version: 1\nupstream: {api_key_env: ENGINE_KEY}", "f", {})
    with pytest.raises(ConfigError, match="ENGINE_KEY, which is not set"):
        create_app(settings, {})


def test_validate_prints_settings_that_validate_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERTOW_LOG_LEVEL", "debug")
    assert run("config", "validate", str(SHIPPED)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# UNDERTOW_LOG_LEVEL overrides log.level\n")
    assert Settings.model_validate(yaml.safe_load(printed)).log.level == "debug"


def test_schema_knows_every_key_of_the_shipped_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"].keys() == yaml.safe_load(SHIPPED.read_text()).keys()
    assert schema["additionalProperties"] is False


def test_serve_names_a_port_that_is_taken(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on http://127.0.0.1:{port}"):
            listen("127.0.0.1", port, "listen")
