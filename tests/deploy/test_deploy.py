"""What docker/ and deploy/ promise, as far as it can be told without a container engine."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
RULES: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
PROMETHEUS: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
DASHBOARDS = {path.name: json.loads(path.read_text()) for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, rest) per instruction, continued lines joined, comments dropped."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def pinned(image: str) -> bool:
    """Whether the image names a version that cannot move to the next minor by itself."""
    return re.search(r":v?\d+\.\d+\.\d+", image) is not None


def rule_expressions() -> dict[str, str]:
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    return {rule.get("alert") or rule["record"]: rule["expr"] for rule in rules}


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def dashboard_expressions() -> dict[str, str]:
    return {
        f"{name}: {panel['title']} {target['refId']}": target["expr"]
        for name, dashboard in DASHBOARDS.items()
        for panel in panels(dashboard)
        for target in panel.get("targets", [])
    }


EXPRESSIONS = {**rule_expressions(), **dashboard_expressions()}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
class TestDockerfile:
    def test_the_last_user_is_a_number_and_not_root(self, dockerfile: Path) -> None:
        users = [rest for word, rest in instructions(dockerfile) if word == "USER"]
        assert users
        assert users[-1].split(":")[0].isdigit()
        assert int(users[-1].split(":")[0]) > 0

    def test_the_base_image_is_pinned(self, dockerfile: Path) -> None:
        bases = [rest.split()[0] for word, rest in instructions(dockerfile) if word == "FROM"]
        assert bases
        assert [base for base in bases if not pinned(base)] == []

    def test_it_says_whether_it_is_healthy(self, dockerfile: Path) -> None:
        assert [rest for word, rest in instructions(dockerfile) if word == "HEALTHCHECK" and rest != "NONE"]

    def test_what_it_copies_exists_and_reaches_the_build(self, dockerfile: Path) -> None:
        ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
        for word, rest in instructions(dockerfile):
            if word != "COPY" or rest.startswith("--from"):
                continue
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(Path(source).match(line.removeprefix("!")) for line in ignored), source

    def test_nothing_is_installed_without_a_pin(self, dockerfile: Path) -> None:
        for word, rest in instructions(dockerfile):
            if word == "RUN":
                for command in re.findall(r"pip (?:install|wheel)[^&]*", rest):
                    assert "--no-deps" in command, command
                    assert "--require-hashes" in command or "--no-index" in command or command.split()[-1] == ".", (
                        command
                    )


def test_the_proxy_image_holds_no_torch_and_no_vllm() -> None:
    lock = (ROOT / "requirements/server.lock").read_text()
    names = set(re.findall(r"^([a-z0-9.-]+)==", lock, re.MULTILINE))
    assert "fastapi" in names
    assert not {name for name in names if re.match(r"torch|vllm|nvidia|triton|transformers", name)}


@pytest.mark.parametrize("name", SERVICES)
class TestService:
    def test_it_cannot_gain_privileges(self, name: str) -> None:
        service = SERVICES[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        assert not service.get("privileged")
        assert "cap_add" not in service
        # Where the Dockerfile is ours it names the user; elsewhere compose does.
        assert "build" in service or int(service["user"].split(":")[0]) > 0

    def test_its_image_is_pinned(self, name: str) -> None:
        assert pinned(SERVICES[name]["image"])

    def test_it_says_whether_it_is_healthy(self, name: str) -> None:
        assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"

    def test_what_it_mounts_from_the_repository_is_read_only_and_exists(self, name: str) -> None:
        for volume in SERVICES[name].get("volumes", []):
            source, mode = volume.partition(":")[0], volume.rpartition(":")[2]
            if source.startswith("."):
                assert mode == "ro", volume
                # ./data holds the operator's model, bank and calibration; ./secrets the operators' token.
                assert source in ("./data", "./secrets") or (ROOT / "docker" / source).exists(), volume
            else:
                assert source in COMPOSE["volumes"], volume

    def test_no_secret_is_written_into_the_file(self, name: str) -> None:
        for key, value in SERVICES[name].get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|API_KEY", key):
                # In a variable of the shell, or in a file that is mounted.
                assert str(value).startswith("${") or (key.endswith("_FILE") and value.startswith("/run/")), key


def test_nobody_walks_around_the_guard() -> None:
    vllm = SERVICES["vllm"]
    assert "ports" not in vllm
    assert all(COMPOSE["networks"][network]["internal"] for network in vllm["networks"])
    neighbours = {name for name, service in SERVICES.items() if set(service["networks"]) & set(vllm["networks"])}
    assert neighbours == {"vllm", "undertow", "prometheus"}


def test_vllm_is_started_as_undertow_itself_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from guard.engine import launch
    from guard.engine.settings import EngineSettings

    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    data = Path("/data")
    ours = launch.serve_arguments(
        data / "model", data / "bank.safetensors", "F", data / "calibration.safetensors", "0.0.0.0", 8000
    )
    command = [option.replace("=", " ", 1) for option in SERVICES["vllm"]["command"]]
    pairs = [f"{option} {value}" for option, value in itertools.pairwise(ours) if option.startswith("--")]
    for option in ("--worker-cls", "--scheduler-cls", "--middleware", "--compilation-config"):
        assert next(pair for pair in pairs if pair.startswith(option)) in command
    assert {option for option in ours if option.startswith("--no-")} <= set(command)
    config = next(option for option in command if option.startswith("--additional-config")).partition(" ")[2]
    settings = EngineSettings.read(json.loads(re.sub(r"\$\{UNDERTOW_FINGERPRINT:\?[^}]*\}", "F", config)))
    assert settings == EngineSettings.read(launch.additional_config(settings.bank, "F", settings.calibration))


def test_the_image_and_the_lock_have_the_same_vllm() -> None:
    base = next(rest for word, rest in instructions(ROOT / "docker/vllm.Dockerfile") if word == "FROM")
    locked = re.search(r"^vllm==(\S+)", (ROOT / "requirements/cuda.lock").read_text(), re.MULTILINE)
    assert locked
    assert base == f"vllm/vllm-openai:v{locked[1]}"


def test_the_proxy_listens_to_the_outside_and_asks_the_vllm_next_to_it() -> None:
    from server.config.settings import load

    environment = {key: str(value) for key, value in SERVICES["undertow"]["environment"].items()}
    mount = next(volume for volume in SERVICES["undertow"]["volumes"] if ":/etc/undertow/undertow.yaml:" in volume)
    settings = load(ROOT / "docker" / mount.split(":")[0], environment)
    assert (settings.listen.host, settings.listen.port) == ("0.0.0.0", 8080)
    assert settings.upstream.url == "http://vllm:8000"
    assert settings.policy.mode == "enforce"


def test_the_health_check_asks_for_a_path_that_the_proxy_has() -> None:
    asked = re.search(r"127\.0\.0\.1:8080(/\w+)", " ".join(SERVICES["undertow"]["healthcheck"]["test"]))
    assert asked
    assert any(f'"{asked[1]}"' in path.read_text() for path in (ROOT / "server").glob("*.py"))


def test_prometheus_scrapes_what_compose_runs() -> None:
    targets = {
        tuple(target.split(":"))
        for job in PROMETHEUS["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    }
    assert targets == {("undertow", str(Settings(version=1).admin.port)), ("vllm", "8000")}
    assert {name for name, _ in targets} <= SERVICES.keys()
    assert all((ROOT / "deploy/prometheus" / name).exists() for name in PROMETHEUS["rule_files"])


def test_prometheus_and_the_proxy_read_the_same_operators_token() -> None:
    (job,) = [job for job in PROMETHEUS["scrape_configs"] if job["job_name"] == "undertow"]
    undertow = SERVICES["undertow"]
    assert undertow["environment"]["UNDERTOW_ADMIN_HOST"] == "0.0.0.0"
    variable = f"{Settings(version=1).admin.token_env}_FILE"
    assert undertow["environment"][variable] == job["authorization"]["credentials_file"]
    mounted = [set(SERVICES[name]["volumes"]) for name in ("undertow", "prometheus")]
    (shared,) = mounted[0] & mounted[1]
    assert job["authorization"]["credentials_file"].startswith(shared.split(":")[1] + "/")
    assert not any("8081" in port for port in undertow["ports"])


def test_every_alert_says_who_wakes_up_and_where_to_look() -> None:
    titles = {panel["title"] for dashboard in DASHBOARDS.values() for panel in panels(dashboard)}
    alerts = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "ticket"), alert["alert"]
        assert alert["annotations"]["summary"]
        assert alert["annotations"]["description"]
        assert alert["annotations"]["dashboard_panel"] in titles, alert["alert"]


def test_every_dashboard_fits_its_data_source() -> None:
    provisioned = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text())
    uids = {source["uid"] for source in provisioned["datasources"]}
    assert DASHBOARDS
    for dashboard in DASHBOARDS.values():
        identifiers = [panel["id"] for panel in panels(dashboard)]
        assert len(identifiers) == len(set(identifiers))
        for panel in panels(dashboard):
            assert panel["datasource"]["uid"] in uids
            assert panel["description"], panel["title"]


def test_every_metric_is_one_that_exists() -> None:
    from server.telemetry.metrics import METRIC_NAMES

    recorded = {name for name in rule_expressions() if ":" in name}
    unknown = set()
    for where, expression in EXPRESSIONS.items():
        for name in re.findall(r"\bundertow[a-z0-9_]*(?::[a-z0-9_:]+)?", re.sub(r'"[^"]*"', "", expression)):
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            if not {name, family} & (recorded | METRIC_NAMES):
                unknown.add(f"{where}: {name}")
    assert not unknown
