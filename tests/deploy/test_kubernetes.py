"""What deploy/kubernetes promises: it renders, Kubernetes' schemas take it, and all that it names is there.

No cluster is needed: kustomize renders, and Kubernetes' own schemas lie beside this file.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.programs import program

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SCHEMAS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in (ROOT / "tests/deploy/kubernetes").glob("*.json")
}
"""By version of Kubernetes, the oldest and the newest that is looked at: see scripts/kubernetes_schemas.py."""
OPERATOR_KINDS = {"ServiceMonitor", "PrometheusRule"}
"""Of the Prometheus Operator; Kubernetes has no schema for them."""
SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET")

Manifest = dict[str, Any]

SEVERAL_NODES = """\
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [deploy/kubernetes/base]
components: [deploy/kubernetes/components/several-nodes]
"""


@cache
def rendered(name: str) -> tuple[Manifest, ...]:
    """Every manifest of `base` or `example`, as a cluster gets them."""
    return render(KUBERNETES / name)


def render(folder: Path) -> tuple[Manifest, ...]:
    command = [str(program("kustomize")), "build", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def several_nodes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, ...]:
    """The base with the component that needs Ray."""
    folder = tmp_path_factory.mktemp("ray")
    shutil.copytree(KUBERNETES, folder / "deploy/kubernetes")
    (folder / "kustomization.yaml").write_text(SEVERAL_NODES)
    return render(folder)


def of_kind(manifests: tuple[Manifest, ...], kind: str, name: str | None = None) -> list[Manifest]:
    return [each for each in manifests if each["kind"] == kind and name in (None, each["metadata"]["name"])]


def the(manifests: tuple[Manifest, ...], kind: str, name: str) -> Manifest:
    (found,) = of_kind(manifests, kind, name)
    return found


def pods(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    """Name and template of whatever starts pods."""
    for kind in ("Deployment", "StatefulSet"):
        for manifest in of_kind(manifests, kind):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]


def container(manifests: tuple[Manifest, ...], kind: str, name: str) -> Manifest:
    (found,) = the(manifests, kind, name)["spec"]["template"]["spec"]["containers"]
    return dict(found)


def labels(manifests: tuple[Manifest, ...], name: str) -> dict[str, str]:
    return dict(next(template["metadata"]["labels"] for each, template in pods(manifests) if each == name))


def config(manifests: tuple[Manifest, ...], prefix: str) -> dict[str, str]:
    return next(
        dict(each["data"]) for each in of_kind(manifests, "ConfigMap") if each["metadata"]["name"].startswith(prefix)
    )


# -- shape ------------------------------------------------------------------------------------------------------------


def check(manifest: Manifest, version: str) -> None:
    """Raise ValidationError where Kubernetes would refuse it."""
    schema = SCHEMAS[version]
    kind = schema["kinds"][f"{manifest['apiVersion']} {manifest['kind']}"]
    # Not `jsonschema.validate`, which checks the whole schema first, every time.
    jsonschema.Draft202012Validator({**kind, "$defs": schema["$defs"]}).validate(manifest)


@pytest.mark.parametrize("version", SCHEMAS)
@pytest.mark.parametrize("name", ["base", "example"])
def test_kubernetes_takes_every_manifest(name: str, version: str) -> None:
    kinds = set()
    for manifest in rendered(name):
        kinds.add(manifest["kind"])
        if manifest["kind"] not in OPERATOR_KINDS:
            check(manifest, version)
    assert {"Deployment", "StatefulSet", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"} <= kinds


def test_kubernetes_takes_the_manifests_for_several_nodes(several_nodes: tuple[Manifest, ...]) -> None:
    for manifest in several_nodes:
        for version in SCHEMAS:
            check(manifest, version)


@pytest.mark.parametrize("version", SCHEMAS)
def test_a_key_that_kubernetes_does_not_have_is_found(version: str) -> None:
    manifest = json.loads(json.dumps(the(rendered("base"), "Deployment", "undertow")))
    manifest["spec"]["template"]["spec"]["containers"][0]["readOnly"] = True
    with pytest.raises(jsonschema.ValidationError, match="readOnly"):
        check(manifest, version)


@pytest.mark.parametrize("name", ["base", "example"])
def test_what_selects_selects_something(name: str) -> None:
    manifests = rendered(name)
    templates = {each: template["metadata"]["labels"] for each, template in pods(manifests)}
    selectors = [each["spec"]["selector"] for each in of_kind(manifests, "Service")]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in of_kind(manifests, "PodDisruptionBudget")]
    selectors += [each["spec"]["podSelector"].get("matchLabels", {}) for each in of_kind(manifests, "NetworkPolicy")]
    for selector in selectors:
        assert any(selector.items() <= found.items() for found in templates.values()), selector
    scaled = the(manifests, "HorizontalPodAutoscaler", "undertow")["spec"]
    assert of_kind(manifests, scaled["scaleTargetRef"]["kind"], scaled["scaleTargetRef"]["name"])
    assert scaled["minReplicas"] >= 2
    assert "replicas" not in the(manifests, "Deployment", "undertow")["spec"], "the autoscaler has them"
    for monitor in of_kind(manifests, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        (service,) = [
            each for each in of_kind(manifests, "Service") if wanted.items() <= each["metadata"]["labels"].items()
        ]
        ports = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports


# -- what the product has ---------------------------------------------------------------------------------------------


def environment(manifests: tuple[Manifest, ...], kind: str, name: str) -> dict[str, str]:
    """Of a container; secrets by placeholders."""
    one = container(manifests, kind, name)
    found: dict[str, str] = {}
    for source in one.get("envFrom", []):
        found |= config(manifests, source["configMapRef"]["name"])
    return found | {each["name"]: each.get("value", "placeholder-of-a-secret") for each in one.get("env", [])}


def test_the_settings_are_ones_that_the_server_reads(tmp_path: Path) -> None:
    from server.app import create_app
    from server.config.settings import load

    manifests = rendered("base")
    one = container(manifests, "Deployment", "undertow")
    assert one["args"] == ["serve", "--config", "/etc/undertow/undertow.yaml"]
    (mounted,) = [mount for mount in one["volumeMounts"] if mount["name"] == "settings"]
    assert (mounted["mountPath"], mounted["readOnly"]) == ("/etc/undertow", True)
    mounts = {mount["name"]: mount for mount in one["volumeMounts"]}
    keys = Path(mounts["client-keys"]["mountPath"]) / "keys.json"
    assert mounts["client-keys"]["readOnly"] is True
    assert "subPath" not in mounts["client-keys"], "a new key would never arrive"
    text = config(manifests, "undertow-settings")["undertow.yaml"]
    assert f"keys_file: {keys} " in text
    file = tmp_path / "undertow.yaml"
    state = mounts["incidents"]["mountPath"]
    assert text.count(f"{state}/") == 2, "what is written lies on a volume"
    file.write_text(text.replace(str(keys), str(tmp_path / "keys.json")).replace(f"{state}/", f"{tmp_path}/"))
    (tmp_path / "keys.json").write_text('{"version": 1, "keys": []}')
    environ = environment(manifests, "Deployment", "undertow")
    settings = load(file, environ)
    assert create_app(settings, environ), "every key that the settings name is in the environment"
    assert (settings.policy.mode, settings.listen.host, settings.admin.host) == ("enforce", "0.0.0.0", "0.0.0.0")
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    assert ports == {"http": settings.listen.port, "admin": settings.admin.port}

    grace = the(manifests, "Deployment", "undertow")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= settings.shutdown.delay_s + settings.shutdown.grace_s + 5
    assert settings.shutdown.delay_s >= 5, "a Service has to forget the pod first"

    engines = the(manifests, "StatefulSet", "vllm")
    port = engines["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]
    service = engines["spec"]["serviceName"]
    names = [f"vllm-{index}" for index in range(engines["spec"]["replicas"])]
    assert {name: each.url for name, each in settings.upstreams.items()} == {
        name: f"http://{name}.{service}:{port}" for name in names
    }
    assert the(manifests, "Service", service)["spec"]["clusterIP"] == "None"
    pinned = config(manifests, "undertow-engine")["UNDERTOW_FINGERPRINT"]
    assert {each.fingerprint for each in settings.upstreams.values()} == {pinned}


def test_probes_ask_for_what_the_server_has_without_a_token(tmp_path: Path) -> None:
    from server.app import create_app
    from server.config.incidents import IncidentSettings
    from server.config.settings import Settings

    paths = {
        getattr(route, "path", "")
        for route in create_app(Settings(version=1, incidents=IncidentSettings(path=None)), {}).routes
    }
    one = container(rendered("base"), "Deployment", "undertow")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert one[probe]["httpGet"]["port"] == "http"
        assert one[probe]["httpGet"]["path"] in paths
    assert one["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert one["livenessProbe"]["httpGet"]["path"] == "/healthz", "an engine that is gone is no reason to restart"


def arguments(manifests: tuple[Manifest, ...]) -> list[str]:
    """Of vLLM, as the kubelet starts it."""
    known = environment(manifests, "StatefulSet", "vllm")
    given = container(manifests, "StatefulSet", "vllm")["args"]
    return [re.sub(r"\$\((\w+)\)", lambda name: known[name[1]], each) for each in given]


def options(words: list[str]) -> dict[str, str]:
    """By name, whichever of `--name value` and `--name=value` is written."""
    joined = [word for each in words for word in (each.split("=", 1) if each.startswith("--") else [each])]
    return {name: value for name, value in pairwise(joined) if name.startswith("--")}


@pytest.mark.parametrize("name", ["base", "example"])
def test_vllm_is_started_as_undertow_itself_starts_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from guard.engine import launch
    from guard.engine.settings import EngineSettings

    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    given = arguments(rendered(name))
    told = options(given)
    known = config(rendered(name), "undertow-engine")
    files = (Path("/data/bank.safetensors"), known["UNDERTOW_FINGERPRINT"], Path("/data/calibration.safetensors"))
    ours = options(launch.serve_arguments(Path("/data/model"), *files, "0.0.0.0", 8000))
    assert given[0] == ours.pop("--model")
    assert told.pop("--served-model-name") == known["UNDERTOW_MODEL_NAME"]
    del ours["--served-model-name"]
    for option in ("--additional-config", "--compilation-config"):
        assert json.loads(told.pop(option)) == json.loads(ours.pop(option))
    parallel = {"--tensor-parallel-size", "--distributed-executor-backend"} if name == "example" else set()
    assert {option: value for option, value in told.items() if option not in parallel} == ours
    settings = EngineSettings.read(launch.additional_config(*files))
    assert settings.fingerprint == known["UNDERTOW_FINGERPRINT"]
    mounts = {mount["mountPath"]: mount for mount in container(rendered(name), "StatefulSet", "vllm")["volumeMounts"]}
    assert mounts["/data"]["readOnly"] is True


def test_vllm_has_every_option_and_the_guard_refuses_ray(several_nodes: tuple[Manifest, ...]) -> None:
    """vLLM's own parser, in a process of its own: it is slow to import. When the guard takes Ray, say so in the
    documents that say `NOT SERVED YET`, and run it."""
    lines = [arguments(manifests) for manifests in (rendered("base"), rendered("example"), several_nodes)]
    code = (
        "import json, sys\n"
        "from guard.engine.support import EXECUTORS\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    make_arg_parser(FlexibleArgumentParser()).parse_args(line)\n"
        "assert 'ray' not in EXECUTORS\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_gpus_are_as_many_as_ranks() -> None:
    one = container(rendered("example"), "StatefulSet", "vllm")
    told = options(one["args"])
    assert int(told["--tensor-parallel-size"]) == one["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container(rendered("base"), "StatefulSet", "vllm")["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_several_nodes_have_a_gpu_a_rank_and_are_said_not_to_be_served(several_nodes: tuple[Manifest, ...]) -> None:
    told = options(container(several_nodes, "StatefulSet", "vllm")["args"])
    assert told["--distributed-executor-backend"] == "ray"
    assert "--pipeline-parallel-size" not in told
    gpus = sum(
        each["spec"]["replicas"]
        * container(several_nodes, "StatefulSet", each["metadata"]["name"])["resources"]["limits"]["nvidia.com/gpu"]
        for each in of_kind(several_nodes, "StatefulSet")
    )
    assert int(told["--tensor-parallel-size"]) == gpus
    for document in ("README.md", "components/several-nodes/kustomization.yaml"):
        assert "NOT SERVED YET" in (KUBERNETES / document).read_text()


def test_images_are_those_of_compose() -> None:
    for kind, name, service in (("Deployment", "undertow", "undertow"), ("StatefulSet", "vllm", "vllm")):
        assert container(rendered("base"), kind, name)["image"] == COMPOSE["services"][service]["image"]


def test_the_operators_rules_are_those_of_prometheus() -> None:
    from scripts.prometheus_rule import RULES, prometheus_rule

    file = KUBERNETES / "components/prometheus-operator/rules.yaml"
    assert file.read_text() == prometheus_rule(RULES.read_text()), f"run: python scripts/prometheus_rule.py > {file}"


def test_the_jobs_are_named_as_the_rules_name_them() -> None:
    manifests = rendered("example")
    jobs = set()
    for monitor in of_kind(manifests, "ServiceMonitor"):
        assert monitor["spec"]["jobLabel"] == "app.kubernetes.io/name"
        jobs.add(monitor["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"])
    named = set(re.findall(r'up\{job="(\w+)"\}', (ROOT / "deploy/prometheus/rules.yml").read_text()))
    assert jobs == named == {"undertow", "vllm"}


# -- what is locked down ----------------------------------------------------------------------------------------------


def all_pods(several: tuple[Manifest, ...]) -> list[tuple[str, Manifest]]:
    return [*pods(rendered("base")), *pods(rendered("example")), *pods(several)]


def test_no_pod_can_gain_privileges(several_nodes: tuple[Manifest, ...]) -> None:
    for name, template in all_pods(several_nodes):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for one in spec["containers"]:
            assert one["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= one["resources"]["requests"].keys()
            assert "memory" in one["resources"]["limits"]
    enforced = the(rendered("base"), "Namespace", "undertow")["metadata"]["labels"]
    assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"


def test_secrets_come_by_reference_and_none_is_written_down(several_nodes: tuple[Manifest, ...]) -> None:
    assert not of_kind(rendered("example"), "Secret")
    for name, template in all_pods(several_nodes):
        for one in template["spec"]["containers"]:
            for variable in one.get("env", []):
                if SECRET.search(variable["name"]):
                    assert variable["valueFrom"]["secretKeyRef"]["name"] == "undertow-keys", (name, variable["name"])


def ways_in(manifests: tuple[Manifest, ...], name: str) -> dict[int, list[Manifest]]:
    """Who may reach a pod, by port, as its network policies say together."""
    found: dict[int, list[Manifest]] = {}
    own = labels(manifests, name)
    for policy in of_kind(manifests, "NetworkPolicy"):
        if policy["spec"]["podSelector"].get("matchLabels", {}).items() <= own.items():
            for rule in policy["spec"].get("ingress", []):
                for port in rule["ports"]:
                    found.setdefault(port["port"], []).extend(rule["from"])
    return found


def test_only_the_server_reaches_vllm_and_only_prometheus_the_admin_port() -> None:
    manifests = rendered("base")
    closed = the(manifests, "NetworkPolicy", "nothing-by-default")["spec"]
    assert (closed["podSelector"], closed["policyTypes"]) == ({}, ["Ingress", "Egress"])
    assert ways_in(manifests, "vllm") == {8000: [{"podSelector": {"matchLabels": labels_of_server()}}]}
    server = ways_in(manifests, "undertow")
    assert server.keys() == {8080, 8081}
    (prometheus,) = server[8081]
    assert prometheus["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    assert prometheus["namespaceSelector"]
    # Beside it, with the operator, the scraper of vLLM's metrics, which are on the port that vLLM serves on.
    assert prometheus in ways_in(rendered("example"), "vllm")[8000]
    assert len(ways_in(rendered("example"), "vllm")[8000]) == 2
    assert "egress" not in the(manifests, "NetworkPolicy", "vllm")["spec"], "vLLM asks nobody"


def labels_of_server() -> dict[str, str]:
    return {"app.kubernetes.io/name": "undertow"}


def test_vllm_asks_for_a_key_that_only_the_server_has() -> None:
    for kind, name in (("Deployment", "undertow"), ("StatefulSet", "vllm")):
        (key,) = [each for each in container(rendered("base"), kind, name)["env"] if each["name"] == "VLLM_API_KEY"]
        assert key["valueFrom"]["secretKeyRef"] == {"name": "undertow-keys", "key": "vllm-api-key"}
