"""The command line and environment of a guarded vLLM, and what its worker reads of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guard.engine import launch
from guard.engine.settings import EngineSettings
from guard.errors import ConfigError
from guard.policy import Policy

EXTRA = ["--port", "1", "--max-model-len", "64"]


@pytest.fixture(params=[False, True], ids=["CPU", "GPU"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    found = bool(request.param)
    monkeypatch.setattr(launch, "has_gpu", lambda: found)
    return found


def arguments(folder: Path) -> list[str]:
    return launch.serve_arguments(
        folder / "tuned", folder / "bank", "sha256:x", folder / "calibration", "127.0.0.1", 8000, EXTRA
    )


def value(given: list[str], option: str) -> str:
    return given[given.index(option) + 1]


def test_what_cannot_be_scored_is_switched_off_by_name(gpu: bool, tmp_path: Path) -> None:
    given = arguments(tmp_path)
    # What vLLM does by itself stays on.
    assert not [word for word in given if "prefix-caching" in word or "async-scheduling" in word]
    assert value(given, "--worker-cls") == "guard.engine.worker.GuardWorker"
    assert value(given, "--middleware") == "guard.engine.middleware.EvidenceMiddleware"
    assert ("--compilation-config" in given) == gpu
    if gpu:
        assert json.loads(value(given, "--compilation-config")) == {"cudagraph_mode": "NONE"}


def test_the_same_is_switched_off_without_http(gpu: bool) -> None:
    options = launch.engine_options()
    assert options["worker_cls"] == launch.WORKER
    assert not {"enable_prefix_caching", "async_scheduling"} & options.keys()
    assert options.get("compilation_config") == ({"cudagraph_mode": "NONE"} if gpu else None)


def test_what_the_operator_adds_comes_last_and_so_wins(tmp_path: Path) -> None:
    given = arguments(tmp_path)
    assert given[-len(EXTRA) :] == EXTRA
    assert value(given, "--port") == "8000"
    assert value(given, "--served-model-name") == "tuned"


def test_the_environment_keeps_what_is_set_and_adds_what_is_not(gpu: bool) -> None:
    before = {"VLLM_USE_V2_MODEL_RUNNER": "1", "PATH": "/bin"}
    after = launch.engine_environment(before)
    assert after["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    assert after["PATH"] == "/bin"
    assert (after["HF_HUB_OFFLINE"], after["VLLM_NO_USAGE_STATS"]) == ("1", "1")
    assert after.get("VLLM_CPU_KVCACHE_SPACE") == (None if gpu else "1")
    assert launch.engine_environment({})["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert before == {"VLLM_USE_V2_MODEL_RUNNER": "1", "PATH": "/bin"}


def test_the_worker_reads_what_the_launch_writes(tmp_path: Path) -> None:
    settings = EngineSettings.read(json.loads(value(arguments(tmp_path), "--additional-config")))
    assert settings == EngineSettings(
        bank=tmp_path / "bank", fingerprint="sha256:x", calibration=tmp_path / "calibration"
    )
    bare = launch.additional_config(tmp_path, "x", None)["undertow"]
    assert bare.keys() == {"bank", "fingerprint"}
    steering = launch.additional_config(tmp_path, "x", None, steering=True)
    assert not settings.steering
    assert EngineSettings.read(steering).steering


def test_relative_paths_are_made_absolute_for_a_worker_that_starts_elsewhere() -> None:
    written = launch.additional_config(Path("bank"), "x", Path("calibration"))["undertow"]
    assert Path(str(written["bank"])).is_absolute()
    assert Path(str(written["calibration"])).is_absolute()


def test_vllm_is_started_with_this_python() -> None:
    assert launch.serve_command()[1:] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert Path(launch.serve_command()[0]).name.startswith("python")


def test_a_policy_in_the_settings_is_read() -> None:
    detections = {"density": {"action": "flag", "threshold": {"raw": 2}}}
    settings = EngineSettings.read(
        {"undertow": {"bank": "b", "fingerprint": "x", "policy": {"detections": detections}}}
    )
    assert settings.policy == Policy.model_validate({"detections": detections})


GOOD: dict[str, Any] = {"bank": "b", "fingerprint": "x"}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "no key `undertow`"),
        ({"other": GOOD}, "no key `undertow`"),
        ({"undertow": None}, "`undertow`: "),
        ({"undertow": "b"}, "`undertow`: "),
        ({"undertow": {"bank": "b"}}, r"`undertow\.fingerprint`: Field required"),
        ({"undertow": {"fingerprint": "x"}}, r"`undertow\.bank`: Field required"),
        ({"undertow": GOOD | {"bnak": 1}}, r"`undertow\.bnak`: Extra inputs .*, found 1"),
        ({"undertow": GOOD | {"bank": 5}}, r"`undertow\.bank`: .*, found 5"),
        ({"undertow": GOOD | {"reserved_token_id": "high"}}, r"`undertow\.reserved_token_id`: .*, found 'high'"),
        ({"undertow": GOOD | {"policy": {"mode": "x"}}}, r"`undertow\.policy\.mode`: .*, found 'x'"),
        ({"undertow": GOOD | {"policy": {"detections": {}}}}, r"`undertow\.policy`: .* needs at least one detection"),
    ],
)
def test_a_wrong_setting_is_named_with_its_key_and_value(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EngineSettings.read(given)
