"""The OpenAPI documents: current, and true. Schemathesis asks what they allow and what they forbid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.config import ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.specs.openapi import checks as openapi

from server import cli
from server.app import create_app
from server.config.settings import Settings

from .conftest import Proxy, settings_for
from .fake_engine import FakeEngine, Script
from .hosting import Host, hosted
from .test_server_answers import CHAT, chat_body
from .test_server_failures import eventually

PUBLISHED = Path(__file__).parents[2] / "docs" / "openapi"
CHECKS = [
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
    openapi.response_headers_conformance,
    openapi.negative_data_rejection,
    openapi.unsupported_method,
    openapi.missing_required_header,
]
EXAMPLES = 40
MORE = ("/v1/embeddings", "/tokenize", "/detokenize")
"""Offered where the settings say so."""


@pytest.fixture(scope="module")
def documented(played: tuple[FakeEngine, Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A server that offers all it can, with an incident."""
    folder = tmp_path_factory.mktemp("documented")
    fields = settings_for(played[1].url).model_dump(exclude_unset=True)
    fields |= {
        "incidents": {"path": folder / "incidents.db", "spool": folder / "spool"},
        "endpoints": {"unguarded": ["embeddings", "tokenize", "detokenize"], "template_arguments": ["enable_thinking"]},
    }
    played[0].script = Script(blocked={0: 2})
    with hosted(create_app(Settings.model_validate(fields), {}), "on") as host:
        proxy = Proxy(host)
        assert proxy.post(CHAT, chat_body()).status_code == 200
        played[0].script = Script()
        yield proxy


@pytest.fixture(scope="module")
def schemas(documented: Proxy) -> dict[str, Any]:
    """By port, as a running server tells them."""
    return {
        port: schemathesis.openapi.from_dict(
            documented.admin(f"/openapi/{port}.json").json(),
            config=SchemathesisConfig(projects=ProjectsConfig(default=ProjectConfig(base_url=url))),
        )
        for port, url in (("clients", documented.url), ("operators", documented.host.admin_url))
    }


def operations() -> list[Any]:
    """Of both documents, each with what it allows and with what it does not."""
    found = [("clients", path, "post", True) for path in MORE]
    for port in ("clients", "operators"):
        for path, methods in json.loads((PUBLISHED / f"{port}.json").read_text())["paths"].items():
            for method, operation in methods.items():
                found.append((port, path, method, "requestBody" in operation or "parameters" in operation))
    return [
        pytest.param(port, path, method, mode, id=f"{port}-{path}-{mode.value}")
        for port, path, method, takes in found
        for mode in (GenerationMode if takes else [GenerationMode.POSITIVE])
    ]


@pytest.mark.parametrize(("port", "path", "method", "mode"), operations())
def test_what_is_answered_is_what_the_document_says(
    schemas: dict[str, Any], port: str, path: str, method: str, mode: GenerationMode
) -> None:
    """No fault of the server's, and of what the document forbids nothing is accepted."""

    seen: set[int] = set()

    @given(case=schemas[port][path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    def ask(case: Case) -> None:
        answer = case.call(timeout=20)
        seen.add(answer.status_code)
        # The engine is well, so not even the faults that are declared are due.
        assert answer.status_code < 500, answer.text
        case.validate_response(answer, checks=CHECKS)

    ask()
    if mode is GenerationMode.POSITIVE and "{id}" not in path:
        assert 200 in seen, seen


def test_an_incident_and_its_label_are_what_the_document_says(documented: Proxy, schemas: dict[str, Any]) -> None:
    assert eventually(lambda: documented.admin("/incidents").json()["incidents"] != [])
    place = {"id": documented.admin("/incidents").json()["incidents"][0]["id"]}
    one, label = "/incidents/{id}", "/incidents/{id}/label"
    said = {"label": "true", "by": "a reviewer", "note": "seen"}
    for case in (
        schemas["operators"][label]["post"].Case(path_parameters=place, body=said, media_type="application/json"),
        schemas["operators"][one]["get"].Case(path_parameters=place),
    ):
        answer = case.call(timeout=20)
        assert (answer.status_code, answer.json()["label"]) == (200, "true")
        case.validate_response(answer, checks=CHECKS[:4])
    assert [each["note"] for each in answer.json()["history"]] == ["seen"]


@pytest.mark.parametrize("port", ["clients", "operators"])
def test_the_published_documents_are_current(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["openapi", port]) == 0
    assert capsys.readouterr().out == (PUBLISHED / f"{port}.json").read_text(), f"undertow openapi {port}"


def test_what_the_settings_add_is_in_the_document(documented: Proxy) -> None:
    told, usual = documented.admin("/openapi/clients.json").json(), json.loads((PUBLISHED / "clients.json").read_text())
    assert told["paths"].keys() - usual["paths"].keys() == {"/v1/embeddings", "/tokenize", "/detokenize"}


def test_clients_are_not_told(documented: Proxy) -> None:
    for path in ("/openapi.json", "/openapi/clients.json", "/docs", "/redoc"):
        assert httpx.get(f"{documented.url}{path}").status_code == 404


def test_operators_read_every_error_in_one_shape(documented: Proxy) -> None:
    base, name = documented.host.admin_url, "0" * 32
    answers = [
        httpx.get(f"{base}/nowhere"),
        httpx.delete(f"{base}/incidents"),
        httpx.get(f"{base}/incidents", params={"layer": 2**63}),
        httpx.get(f"{base}/incidents/{name}"),
        httpx.post(f"{base}/incidents/{name}/label", content=b"{", headers={"content-type": "application/json"}),
    ]
    assert [answer.status_code for answer in answers] == [404, 405, 400, 404, 400]
    for answer in answers:
        assert answer.json().keys() == {"error"}
        assert answer.json()["error"]["message"]
