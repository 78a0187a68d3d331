"""Who may import whom: the contracts of pyproject.toml, and what they cannot see because it is imported by name."""

from __future__ import annotations

import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Run in a fresh interpreter: makes an import of any of `blocked` fail, then imports `module`.
BLOCKED_IMPORT = """\
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is not in the proxy's image")

sys.meta_path.insert(0, Blocker())
importlib.import_module({module!r})
"""
PURE = ("errors", "evidence", "faults", "policy", "verdict")
HEAVY = {"torch", "vllm", "transformers", "tokenizers", "triton"}


def submodules(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return [name for _, name, _ in pkgutil.walk_packages(spec.submodule_search_locations, f"{package}.")]


def test_the_import_contracts_hold() -> None:
    # In its own process: it analyses the source, whatever this one has imported.
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("module", ["guard", *(f"guard.{name}" for name in PURE), *submodules("server")])
def test_the_proxy_runs_without_torch_and_vllm(module: str) -> None:
    source = BLOCKED_IMPORT.format(blocked=HEAVY, module=module)
    result = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_command_line_parses_without_torch_and_vllm() -> None:
    source = BLOCKED_IMPORT.format(blocked=HEAVY, module="server.cli")
    source += "sys.modules['server.cli'].build_parser()\n"
    result = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
