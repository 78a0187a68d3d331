"""Every query of every dashboard and rule, asked of a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Histogram, make_asgi_app

from server.app import create_app
from server.config.admin import AdminSettings
from server.config.incidents import IncidentSettings
from tests.deploy.prometheus import DEPLOYED, Prometheus, QueryError, prometheus
from tests.programs import program
from tests.server.conftest import Proxy, settings_for
from tests.server.fake_engine import FakeEngine
from tests.server.hosting import hosted
from tests.server.test_server_metrics import mixed_run

ROOT = DEPLOYED.parents[1]
RULES = [rule for group in yaml.safe_load((DEPLOYED / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}
RULE_TESTS = sorted((ROOT / "tests/deploy").glob("rules_*test.yml"))
TOKEN = "an-operators-token-for-prometheus"

RUNS = 2
"""Of a bit of everything, with scrapes between: rates need two points."""

VLLM = ("vllm:time_to_first_token_seconds",)
"""Histograms of vLLM's own that dashboards show. prometheus_client, which vLLM exposes them with, writes `vllm_` to a
Prometheus before 3.0, as the one here is."""

NOTHING: dict[str, str] = {}
"""Expressions that have no series here, each with the reason."""


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def asked() -> dict[str, str]:
    """Every expression by where it stands, with Grafana's variables as somebody would choose them."""
    found = {f"rule {rule['record']}": rule["expr"] for rule in RULES if "record" in rule}
    for name, dashboard in DASHBOARDS.items():
        for panel in panels(dashboard):
            for target in panel.get("targets", []):
                found[f"{name}: {panel['title']} {target['refId']}"] = filled(target["expr"], dashboard)
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                found[f"{name}: ${variable['name']}"] = listed(filled(variable["query"]["query"], dashboard))
    return found


def filled(expression: str, dashboard: dict[str, Any]) -> str:
    """Without variables: every value, over a span that a test has."""
    expression = re.sub(r"\$__(rate_interval|interval|range)", "1m", expression)
    for variable in dashboard["templating"]["list"]:
        expression = re.sub(rf"\${variable['name']}\b", ".*", expression)
    assert "$" not in expression, expression
    return expression


def listed(query: str) -> str:
    """Grafana's `label_values(SERIES, LABEL)` as an expression."""
    match = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
    assert match, query
    return f"group by ({match[2]}) ({match[1]})"


def selectors(expression: str) -> list[str]:
    """The series that it names."""
    found = re.findall(r"\b(?:undertow|vllm)[a-z0-9_:]*(?:\{[^}]*\})?|\bup(?:\{[^}]*\})", expression)
    return [name for name in found if name not in ("undertow", "vllm")]


def seen(found: Prometheus, runs: int) -> bool:
    """Whether the last request of so many mixed runs was scraped."""
    return found.value("undertow_requests_total{endpoint='other',outcome='client_error'}") == runs


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """After a bit of everything: answers, blocks, failures, refusals."""
    engine, vllm, folder = FakeEngine(), CollectorRegistry(), tmp_path_factory.mktemp("prometheus")
    for name in VLLM:
        Histogram(name, name, registry=vllm)
    with hosted(engine.app) as upstream, hosted(make_asgi_app(vllm)) as metrics:
        settings = settings_for(upstream.url)
        operators = AdminSettings(token_env="UNDERTOW_OPERATOR_TOKEN")
        kept = IncidentSettings(path=folder / "incidents.db", spool=folder / "incidents.spool")
        settings = settings.model_copy(update={"admin": operators, "incidents": kept})
        app = create_app(settings, {operators.token_env: TOKEN})
        with hosted(app, "on") as host:
            targets = {"undertow:8081": host.admin_url, "vllm:8000": metrics.url}
            here = {deployed: url.removeprefix("http://") for deployed, url in targets.items()}
            with prometheus(here, TOKEN, folder) as found:
                found.until(lambda: len(found.query("up == 1")) == 2, "both targets are scraped")
                for times in range(1, RUNS + 1):
                    mixed_run(engine, Proxy(host))
                    found.until(partial(seen, found, times), "the requests are scraped")
                found.until(lambda: all(rule["health"] != "unknown" for rule in found.rules()), "rules are evaluated")
                yield found


def test_every_query_has_an_answer(scraped: Prometheus) -> None:
    silent, refused = {}, {}
    for where, expression in asked().items():
        try:
            if not scraped.query(expression):
                silent[where] = expression
        except QueryError as error:
            refused[where] = str(error)
    assert refused == {}
    assert {where: silent[where] for where in silent if where not in NOTHING} == {}
    assert {where for where in NOTHING if where not in silent} == set(), "these do have series"


def test_every_series_that_an_alert_names_is_there(scraped: Prometheus) -> None:
    """An alert that is silent because of a wrong name looks like one that has nothing to say."""
    absent: dict[str, str] = {}
    for name, rule in ALERTS.items():
        found = selectors(rule["expr"])
        assert found, name
        absent |= {f"{name}: {series}": rule["expr"] for series in found if not scraped.query(series)}
    assert {where: absent[where] for where in absent if where not in NOTHING} == {}


def test_prometheus_evaluates_every_rule(scraped: Prometheus) -> None:
    found = {rule["name"]: rule for rule in scraped.rules()}
    assert found.keys() == {rule.get("alert") or rule["record"] for rule in RULES}
    assert {name: rule["lastError"] for name, rule in found.items() if rule["health"] != "ok"} == {}


def test_a_query_with_a_wrong_name_is_found(scraped: Prometheus) -> None:
    assert scraped.query("undertow_requests_totl") == []
    with pytest.raises(QueryError, match="parse error"):
        scraped.query("sum(rate(undertow_requests_total[5m])")


def test_what_prometheus_says_of_the_requests_is_what_happened(scraped: Prometheus) -> None:
    blocked = scraped.value("sum(undertow_requests_total{outcome=~'blocked_.*'})")
    assert blocked == RUNS * 8
    assert scraped.value("sum(undertow_eligible_total)") == scraped.value("sum(undertow_evaluated_total)")


def test_vllm_has_the_metrics_that_are_shown() -> None:
    shown = {
        "vllm:" + re.sub(r"_(bucket|sum|count)$", "", name)
        for expression in asked().values()
        for name in re.findall(r"\bvllm\[:_\]([a-z_]+)", expression)
    }
    assert shown == set(VLLM)
    from importlib.util import find_spec

    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = "".join(path.read_text() for path in (Path(spec.origin).parent / "v1/metrics").rglob("*.py"))
    assert [name for name in VLLM if f'"{name}"' not in source] == []


def promtool(*arguments: str) -> str:
    done = subprocess.run([str(program("promtool")), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_takes_the_rules() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", "--lint-fatal", str(DEPLOYED / "rules.yml"))


def test_alerts_fire_when_they_should() -> None:
    assert "SUCCESS" in promtool("test", "rules", *map(str, RULE_TESTS))


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fires: set[str] = set()
    rests: set[str] = set()
    for test in [test for file in RULE_TESTS for test in yaml.safe_load(file.read_text())["tests"]]:
        for each in test.get("alert_rule_test", []):
            (fires if each["exp_alerts"] else rests).add(each["alertname"])
    assert ALERTS.keys() - fires == set()
    assert ALERTS.keys() - rests == set()
