"""`undertow config validate` and `explain`: what is wrong is found before a server runs, what judges whom is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from guard.evidence import DetectorStatus
from server import cli
from server.config.settings import Settings, parse
from server.validation import CalibrationFile, validate
from tests.guard.planted import calibration

from .test_server_keys import make_key

TEXT = """\
version: 1
policies:
  internal:
    detections: { density: { action: flag } }
    on_error: open
rules:
  - match: { model: "support-*", endpoint: chat_completions }
    policy: internal
  - match: { model: "support-*" }
    override: { mode: monitor }
  - match: { tenant: lab }
    policy: internal
    override: { on_block: completion }
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "undertow.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def config(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: object) -> tuple[int, str, str]:
        code = cli.main(["config", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_explain_says_what_judges_a_request_and_why_every_rule_holds_or_not(file: Path, config: Any) -> None:
    code, out, _ = config("explain", file, "--model", "support-1", "--tenant", "shop")
    assert code == 0
    told = yaml.safe_load(out)
    assert told["asked"] == {"endpoint": "chat_completions", "model": "support-1", "tenant": "shop"}
    assert told["policy"] == "internal"
    assert told["why"].startswith("rules.0 (")
    assert [(rule["rule"], rule["holds"], rule["reason"]) for rule in told["rules"]] == [
        ("rules.0", True, "the most specific rule that matches"),
        ("rules.1", False, "matches, but rules.0 is more specific: it names the endpoint"),
        ("rules.2", False, "tenant is shop, not lab"),
    ]
    assert told["rules"][1]["match"] == {"model": "support-*"}
    assert told["effective"] == yaml.safe_load(yaml.safe_dump(parse(TEXT, "f", {}).policies["internal"].model_dump()))


@pytest.mark.parametrize(
    ("words", "policy", "changed"),
    [
        (["--endpoint", "completions", "--model", "support-1"], "default", {"mode": "monitor"}),
        (["--model", "support-1", "--tenant", "lab"], "internal", {"on_block": "completion", "on_error": "open"}),
        (["--model", "other"], "default", {"mode": "enforce", "on_block": "error"}),
    ],
)
def test_explain_prints_the_policy_with_what_the_rule_changes(
    file: Path, config: Any, words: list[str], policy: str, changed: dict[str, str]
) -> None:
    told = yaml.safe_load(config("explain", file, *words)[1])
    assert told["policy"] == policy
    assert changed.items() <= told["effective"].items()


def test_a_key_is_named_by_its_id_and_explains_as_its_tenant_does(
    file: Path, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.json"
    key = make_key(keys, "lab", capsys)
    identity = key.split("_")[1]
    assert config("explain", file, "--model", "a", "--key", identity)[2].endswith("name no `access.keys_file`\n")
    file.write_text(f"{TEXT}access: {{ keys_file: {keys} }}\n")
    by_key = config("explain", file, "--model", "a", "--key", identity)
    assert by_key == config("explain", file, "--model", "a", "--tenant", "lab")
    assert yaml.safe_load(by_key[1])["asked"]["tenant"] == "lab"
    for given in ("0" * 12, key):
        code, _, err = config("explain", file, "--model", "a", "--key", given)
        assert code == 2
        assert err.startswith("undertow: --key: ")
        assert key not in err, "a key is not repeated"
    assert config("explain", file, "--model", "a")[0] == 2, "without a key such a request is 401"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "a", "--endpoint", "models"], "--endpoint: found 'models'; expected one of chat_completions"),
        ([], "--model: missing; rules look at it"),
    ],
)
def test_explain_refuses_what_no_request_is(file: Path, config: Any, words: list[str], said: str) -> None:
    code, out, err = config("explain", file, *words)
    assert (code, out) == (2, "")
    assert said in err


def test_validate_prints_what_each_rule_comes_to_the_most_specific_first(file: Path, config: Any) -> None:
    code, out, _ = config("validate", file)
    assert code == 0
    assert Settings.model_validate(yaml.safe_load(out)) == parse(TEXT, "f", {})
    lines = [line.removeprefix("#   ") for line in out.splitlines() if line.startswith("#   ")]
    assert [line.partition(" (")[0] for line in lines[:3]] == ["rules.2", "rules.0", "rules.1"]
    assert lines[3].startswith("everything else: policy default, {mode: enforce,")
    assert "): policy default, {mode: monitor, detections: {density: {action: block," in lines[2]
    assert "on_block: completion" in lines[0]
    assert "# note: `rules.2` is for the tenant lab, which nobody has without `access.keys_file`\n" in out


def test_validate_tells_everything_that_is_wrong_at_once(
    file: Path, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ENGINE_KEY", raising=False)
    monkeypatch.delenv("UNDERTOW_OPERATOR_TOKEN", raising=False)
    more = f"admin: {{ host: 0.0.0.0 }}\naccess: {{ keys_file: {tmp_path}/none.json }}\n"
    file.write_text(
        f"{TEXT}{more}upstreams: {{ a: {{ api_key_env: ENGINE_KEY }}, b: {{ api_key_env: ENGINE_KEY }} }}\n"
    )
    code, out, err = config("validate", file)
    assert (code, out) == (2, "")
    for said in (
        "`api_key_env` of upstream `a` names ENGINE_KEY, which is not set",
        "`api_key_env` of upstream `b` names ENGINE_KEY, which is not set",
        "`admin.host` is 0.0.0.0, which others can reach: expected a token",
        f"{tmp_path}/none.json: cannot be read",
    ):
        assert said in err
    assert len(err.splitlines()) == 4


def test_what_no_request_meets_is_noted(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys.json"
    make_key(keys, "shop", capsys)
    more = f"access: {{ keys_file: {keys}, tenants: {{ lab: {{}} }} }}\n"
    settings = parse(TEXT.replace("policy: internal", "policy: default") + more, "f", {})
    found = validate(settings, {})
    assert found.problems == []
    assert found.notes == [
        "no rule asks for `policies.internal`",
        "`rules.2` is for the tenant lab, which has no key",
        "`access.tenants.lab` has no key",
    ]


def test_policies_are_held_against_calibrations_as_the_engine_would() -> None:
    """And one that is off is not: nothing is asked of it."""
    rates = {("density",): 0.005, ("exceedance",): 0.005, ("density", "exceedance"): 0.02}
    detectors = tuple(DetectorStatus(detectors=group, supported_fpr=rate) for group, rate in rates.items())
    planted = CalibrationFile(Path("cal"), "sha256:ours", detectors)
    both = "{density: {action: block}, exceedance: {action: flag}}"
    settings = parse(
        f"version: 1\npolicy: {{detections: {both}}}\nupstream: {{fingerprint: 'sha256:theirs'}}\n"
        "policies: {own: {detections: {intrinsic: {action: flag}}}, quiet: {mode: 'off', detections: {intrinsic: "
        "{action: flag}}}, fine: {}}\n"
        "rules: [{match: {model: a}, policy: own}, {match: {model: b}, policy: quiet}, {match: {model: c}, "
        "policy: fine}]",
        "f",
        {},
    )
    problems = validate(settings, {}, [planted]).problems
    assert problems == [
        "`policy.detections.density.threshold.fpr` is 0.01, but the calibration of cal supports 0.02 and above for "
        "density and exceedance together; calibrate with more clean requests",
        "`policies.own` detects by `intrinsic`, but cal has density, exceedance",
        "cal: is of bank sha256:ours; `fingerprint` asks for sha256:theirs",
    ]


def test_a_calibration_that_is_none_is_named(file: Path, config: Any, tmp_path: Path) -> None:
    code, _, err = config("validate", file, "--calibration", tmp_path / "none")
    assert code == 2
    assert f"{tmp_path}/none: not a calibration file" in err


def test_a_calibrations_file_says_what_its_data_supports(file: Path, config: Any, tmp_path: Path) -> None:
    made, cal = calibration(), tmp_path / "cal"
    made.save(cal)
    rates = made.smallest_rates()
    assert len(rates) == 7, "every combination of three detectors"
    assert rates == {group: made.ranks(group).supported for group in rates}
    smallest = rates["density",]
    for fpr, good in ((smallest, True), (smallest * 0.99, False)):
        detection = f"{{ action: flag, threshold: {{ fpr: {fpr} }} }}"
        file.write_text(f"version: 1\npolicy: {{ detections: {{ density: {detection} }} }}\n")
        code, _, err = config("validate", file, "--calibration", cal)
        assert (code == 0) is good
        assert good or f"but the calibration of {cal} supports {smallest:g} and above for density" in err
