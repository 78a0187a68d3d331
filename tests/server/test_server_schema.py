"""The JSON Schema of the settings: it is current, explains every key, and refuses what the loader refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from guard.errors import ConfigError
from server import cli
from server.config.schema import schema
from server.config.settings import parse

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "configs" / "schema.json"
SETTINGS = sorted((ROOT / "configs").glob("*.yaml"))
SHIPPED = [*SETTINGS, *sorted((ROOT / "deploy" / "kubernetes").rglob("undertow.yaml"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "docker").glob("*.md"))]


@pytest.fixture(scope="module")
def checker() -> Any:
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def loads(text: str) -> bool:
    try:
        parse(text, "f", {})
    except ConfigError:
        return False
    return True


def test_the_published_schema_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "schema"]) == 0
    assert capsys.readouterr().out == PUBLISHED.read_text(), "undertow config schema > configs/schema.json"


def test_editors_find_it_from_the_shipped_settings() -> None:
    for path in SETTINGS:
        hint = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
        assert hint
        assert path.parent / hint[1] == PUBLISHED


def test_every_key_is_explained() -> None:
    made = schema()
    sections = {"": made, **made["$defs"]}
    keys = [(name, key, said) for name, each in sections.items() for key, said in each.get("properties", {}).items()]
    assert len(keys) > 60
    for name, key, said in keys:
        meant = sections[said["$ref"].rsplit("/", 1)[-1]] if "$ref" in said else {}
        assert said.get("description") or meant.get("description"), f"{name}.{key}"


def examples() -> Iterator[tuple[str, str]]:
    """Settings in pages, and those in comments of settings: indented lines that begin with a key."""
    for page in PAGES:
        for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)):
            if not re.search(r"^apiVersion:", block, re.M):
                yield f"{page.name} {number}", block
    for path in SETTINGS:
        for number, block in enumerate(re.findall(r"(?:^#   .*\n)+", path.read_text(), re.M)):
            text = re.sub(r"^#   ", "", block, flags=re.M)
            if re.match(r"[a-z]+:\n", text):
                yield f"{path.name} {number}", text


EXAMPLES = dict(examples())


def test_there_are_examples() -> None:
    assert {"README.md 0", "operations.md 0", "undertow.yaml 1"} <= EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_right(checker: Any, name: str) -> None:
    text = EXAMPLES[name]
    whole = text if re.search(r"^version:", text, re.M) else f"version: 1\n{text}"
    parse(whole, name, {})
    checker.validate(yaml.safe_load(whole))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_file_is_right(checker: Any, path: Path) -> None:
    parse(path.read_text(), path.name, {})
    checker.validate(yaml.safe_load(path.read_text()))


FLAG = "detections: {density: {action: flag}}"
GOOD = [
    "policy: {mode: 'off', detections: {}}",
    f"policy: {{{FLAG}, on_error: open}}",
    "policy: {detections: {}, mode: 'off', shadow: {}}",
    "policy: {shadow: {density: {fpr: 0.5}}}",
    "policy: {detections: {intrinsic: {action: flag, threshold: {fpr: 0.1}}}, shadow: {intrinsic: {fpr: 0.2}}}",
    "policy: {detections: {density: {action: flag, threshold: {raw: null, fpr: 0.1}}}}",
    "",
    "policy: {hold_back: {window: 3}}",
    f"policies: {{one: {{{FLAG}}}}}\nrules: [{{match: {{model: 'a*', tenant: null}}, policy: one}}]",
    "rules: [{match: {model: a}, override: {mode: monitor}}]",
    "upstreams: {a: {}}",
    "upstream: {}\nupstreams: {}",
    "upstream: {url: 'https://gpu:8000/'}",
    "access: {keys_file: keys.json, tenants: {lab: {requests_per_minute: 1}}}",
    "endpoints: {template_arguments: [enable_thinking], unguarded: [embeddings]}",
    "reload: {every_s: 0}",
]
BAD = [
    "upstreem: {}",
    "listen: {port: 99999}",
    "listen: {host: ''}",
    "listen: 3",
    "admin: {token_env: lower}",
    "reload: {every_s: -1}",
    "policy: {mode: loud}",
    "policy: {detections: {}}",
    "policy: {detections: {densty: {action: block}}}",
    "policy: {detections: {density: {}}}",
    "policy: {detections: {density: {action: allow}}}",
    "policy: {detections: {density: {action: block, threshold: {fpr: 1}}}}",
    "policy: {detections: {density: {action: block, threshold: {}}}}",
    "policy: {detections: {density: {action: block, threshold: {fpr: 0.1, raw: 1}}}}",
    "policy: {detections: {density: {action: block, threshold: {fpr: null}}}}",
    "policy: {on_error: open}",
    "policy: {on_error: open, detections: {density: {action: block}}}",
    f"policy: {{on_error: open, {FLAG[:-1]}, exceedance: {{action: steer}}}}}}",
    "policy: {shadow: {intrinsic: {fpr: 0.5}}}",
    f"policy: {{shadow: {{intrinsic: {{fpr: 0.5}}}}, {FLAG}}}",
    "policy: {shadow: {density: {fpr: 0.5}}, detections: {density: {action: block, threshold: {raw: 1}}}}",
    "policy: {hold_back: {window: 0}}",
    "policy: {hold_back: two}",
    "policy: {refusal: ''}",
    "policy: {steered_roles: []}",
    "policies: {default: {}}",
    "policies: {Not a name: {}}",
    "policies: {one: {on_error: open}}",
    "rules: [{match: {}}]",
    "rules: [{match: {model: null}}]",
    "rules: [{match: {endpoint: models}}]",
    "rules: [{match: {model: a}, override: {}}]",
    "rules: [{match: {model: a}, override: {shadow: {}}}]",
    "rules: [{policy: default}]",
    "upstream: {}\nupstreams: {a: {}}",
    "upstreams: {'a b': {}}",
    "upstream: {url: ftp://x}",
    "upstream: {url: 'http://x/v1'}",
    "upstream: {url: 'http://user:password@x'}",
    "upstream: {api_key_env: sk-1}",
    "upstream: {models: []}",
    "access: {tenants: {lab: {}}}",
    "access: {limits: {requests_per_minute: 1}}",
    "access: {keys_file: keys.json, limits: {requests_per_minute: 0}}",
    "endpoints: {template_arguments: [chat_template]}",
    "endpoints: {template_arguments: ['a b']}",
    "endpoints: {unguarded: [chat]}",
    "limits: {max_sequences: 0}",
    "log: {level: loud}",
]


@pytest.mark.parametrize("text", GOOD)
def test_what_is_right_is_right_for_both(checker: Any, text: str) -> None:
    assert loads(f"version: 1\n{text}")
    checker.validate(yaml.safe_load(f"version: 1\n{text}"))


@pytest.mark.parametrize("text", BAD)
def test_what_the_loader_refuses_the_schema_refuses(checker: Any, text: str) -> None:
    assert not loads(f"version: 1\n{text}")
    assert not checker.is_valid(yaml.safe_load(f"version: 1\n{text}"))


def test_a_file_without_a_version_is_refused_by_both(checker: Any) -> None:
    assert not loads("listen: {}")
    assert not checker.is_valid({"listen": {}})
    assert json.loads(PUBLISHED.read_text())["$schema"] == "https://json-schema.org/draft/2020-12/schema"
