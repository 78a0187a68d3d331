"""The command line and environment of a guarded vLLM, and what its worker reads of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guard.engine import launch
from guard.engine.settings import EngineSettings
from guard.errors import CheckpointError, ConfigError
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
    # Without Triton vLLM would take V1 too, and warn of it.
    assert launch.engine_environment({}).get("VLLM_USE_V2_MODEL_RUNNER") == (None if gpu else "0")
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


ADAPTERS = [
    launch.GuardedAdapter(name, Path(f"/{name}"), Path("bank"), f"sha256:{name}", Path("cal"))
    for name in ("red", "blue")
]


@pytest.mark.parametrize("base", [True, False])
def test_adapters_are_written_as_the_worker_and_vllm_read_them(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, base: bool
) -> None:
    monkeypatch.setattr(launch, "lora_rank", lambda folder: 16)
    own = (Path("own"), "sha256:own", Path("own.cal")) if base else (None, None, None)
    given = launch.serve_arguments(Path("/models/tuned"), *own, "h", 1, adapters=ADAPTERS)
    settings = EngineSettings.read(json.loads(value(given, "--additional-config")))
    assert list(settings.files()) == ([""] if base else []) + ["red", "blue"]
    assert settings.adapters["blue"].fingerprint == "sha256:blue"
    place = given.index("--lora-modules")
    assert given[place + 1 : place + 3] == ["red=/red", "blue=/blue"]
    assert "--enable-lora" in given
    # On a CPU a slot stays empty.
    assert value(given, "--max-loras") == ("2" if gpu else "3")
    assert value(given, "--max-lora-rank") == "16"


@pytest.mark.parametrize(
    ("config", "rank"),
    [({"r": 8}, 8), ({"r": 9}, 16), ({"r": 4, "rank_pattern": {"o_proj": 33}}, 64), ({"r": 512}, 512)],
)
def test_the_rank_that_vllm_is_given_fits_the_adapter(tmp_path: Path, config: dict[str, Any], rank: int) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert launch.lora_rank(tmp_path) == rank


@pytest.mark.parametrize("config", [{}, {"r": "8"}, {"r": 513}, {"r": 4, "rank_pattern": {"q": 1024}}])
def test_an_adapter_whose_rank_vllm_does_not_take_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected whole numbers up to 512"):
        launch.lora_rank(tmp_path)


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
        ({"undertow": {"bank": "b"}}, r"`undertow`: .*`fingerprint` is missing"),
        ({"undertow": {"fingerprint": "x"}}, r"`undertow`: .*`bank` is missing"),
        ({"undertow": {}}, "`undertow`: .*expected a `bank`, or `adapters` with theirs"),
        ({"undertow": {"adapters": {"red": GOOD}, "calibration": "c"}}, "`calibration` needs the `bank`"),
        ({"undertow": GOOD | {"adapters": {"red": {"bank": "b"}}}}, r"`undertow\.adapters\.red\.fingerprint`: Field"),
        ({"undertow": GOOD | {"adapters": {"": GOOD}}}, r"`undertow\.adapters"),
        (
            {"undertow": GOOD | {"adapters": {"red": GOOD | {"calibration": "c"}}}},
            "no `calibration` for the base model: expected one for every bank, or none",
        ),
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
