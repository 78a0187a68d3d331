"""The set-up trusts a finished environment and nothing less."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts/bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder:
    """Stands in for what costs minutes, and keeps what was asked of it."""

    def __init__(self, bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: list[str] = []
        self.fail_at = ""
        for step in ("make_environment", "install_packages", "install_triton", "install_project", "check_environment"):
            monkeypatch.setattr(bootstrap, step, self.step(bootstrap, step))

    def step(self, bootstrap: ModuleType, name: str) -> object:
        def record(*arguments: object) -> list[str]:
            self.did.append(name)
            if name == "make_environment":
                environment = arguments[0]
                assert isinstance(environment, Path)
                (environment / "bin").mkdir(parents=True, exist_ok=True)
                (environment / "bin" / "pip").touch()
            if name == self.fail_at:
                raise bootstrap.SetupError("half-way")
            return []

        return record


@pytest.fixture
def recorder(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(bootstrap, monkeypatch)


EVERYTHING = ["make_environment", "install_packages", "install_triton", "install_project", "check_environment"]


def test_a_second_set_up_does_nothing(bootstrap: ModuleType, recorder: Recorder, tmp_path: Path) -> None:
    bootstrap.set_up(tmp_path / "venv", "cpu")
    assert recorder.did == EVERYTHING
    recorder.did.clear()
    bootstrap.set_up(tmp_path / "venv", "cpu")
    assert recorder.did == []


@pytest.mark.parametrize("step", EVERYTHING)
def test_an_interrupted_set_up_is_done_again_from_the_start(
    bootstrap: ModuleType, recorder: Recorder, tmp_path: Path, step: str
) -> None:
    recorder.fail_at = step
    with pytest.raises(bootstrap.SetupError):
        bootstrap.set_up(tmp_path / "venv", "cpu")
    recorder.fail_at = ""
    recorder.did.clear()
    bootstrap.set_up(tmp_path / "venv", "cpu")
    assert recorder.did == EVERYTHING


def test_an_interrupted_update_does_not_leave_the_old_stamp(
    bootstrap: ModuleType, recorder: Recorder, tmp_path: Path
) -> None:
    bootstrap.set_up(tmp_path / "venv", "cpu")
    recorder.fail_at = "install_packages"
    with pytest.raises(bootstrap.SetupError):
        bootstrap.set_up(tmp_path / "venv", "cuda")
    recorder.fail_at = ""
    recorder.did.clear()
    bootstrap.set_up(tmp_path / "venv", "cpu")
    assert recorder.did == EVERYTHING


def test_a_changed_pyproject_installs_only_the_project(
    bootstrap: ModuleType, recorder: Recorder, tmp_path: Path
) -> None:
    bootstrap.set_up(tmp_path / "venv", "cpu")
    stamp = tmp_path / "venv" / bootstrap.STAMP
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "project": "older"}))
    recorder.did.clear()
    bootstrap.set_up(tmp_path / "venv", "cpu")
    assert recorder.did == ["install_project"]


def test_a_changed_lock_makes_a_new_environment(bootstrap: ModuleType, recorder: Recorder, tmp_path: Path) -> None:
    bootstrap.set_up(tmp_path / "venv", "cpu")
    recorder.did.clear()
    bootstrap.set_up(tmp_path / "venv", "cuda")
    assert recorder.did == [step for step in EVERYTHING if step != "install_triton"]


@pytest.mark.parametrize("stamp", ["", "{", "[]", "null"])
def test_a_torn_stamp_is_no_stamp(bootstrap: ModuleType, recorder: Recorder, tmp_path: Path, stamp: str) -> None:
    bootstrap.set_up(tmp_path / "venv", "cpu")
    (tmp_path / "venv" / bootstrap.STAMP).write_text(stamp)
    recorder.did.clear()
    bootstrap.set_up(tmp_path / "venv", "cpu")
    assert recorder.did == EVERYTHING


@pytest.mark.parametrize(
    ("nvidia_smi", "build"),
    [("echo 580.65.06", "cuda"), ("echo 570.86.10", "cpu"), ("exit 9", "cpu"), ("echo No devices were found", "cpu")],
)
def test_the_gpu_decides_the_build(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nvidia_smi: str, build: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert bootstrap.choose_build("auto", bootstrap.Clock()) == build


def test_without_nvidia_smi_it_is_the_cpu_build(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.choose_build("auto", bootstrap.Clock()) == "cpu"


def test_pytorchs_own_index_is_asked_only_when_torch_is_not_found_otherwise(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], *_: object) -> str:
        commands.append(command)
        if "--extra-index-url" not in command:
            raise bootstrap.SetupError("ERROR: No matching distribution found for torch==2.13.0+cpu")
        return ""

    monkeypatch.setattr(bootstrap, "run", run)
    bootstrap.install_packages(["pip"], "cpu", [ROOT / "requirements/cpu.lock"], tmp_path, bootstrap.Clock())
    assert [command[-1] for command in commands] == [str(ROOT / "requirements/cpu.lock"), bootstrap.TORCH_CPU_INDEX]
    assert all("--require-hashes" in command for command in commands)


def test_triton_stays_out_of_the_environment_that_vllm_runs_in(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(bootstrap, "run", lambda command, *_: commands.append(command))
    bootstrap.install_triton(["pip"], tmp_path, bootstrap.Clock())
    [command] = commands
    assert command[command.index("--target") + 1] == str(tmp_path / "triton")
    assert {"--no-deps", "--require-hashes"} <= set(command)


def test_make_refuses_a_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.13" && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = subprocess.run(
        ["make", "setup", f"PYTHON={old}"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode != 0
    assert f"Undertow needs Python 3.11 to 3.14; {old} is Python 3.10.13" in result.stderr


def test_make_alone_explains_itself() -> None:
    result = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    for target in ("setup", "demo", "test", "lint", "check", "lock", "clean"):
        assert f"\n  {target} " in result.stdout


def test_the_set_up_runs_on_the_standard_library_alone() -> None:
    command = [sys.executable, "-S", "-E", str(ROOT / "scripts/bootstrap.py"), "--help"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
