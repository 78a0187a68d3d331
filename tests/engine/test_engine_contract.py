"""vLLM's source has what the guard relies on: the installed release, and each that was read."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.engine import contract

RECORDS = Path(__file__).parent / "contracts"
SUPPORT = Path(__file__).resolve().parents[2] / "guard/engine/support.py"


@pytest.fixture(scope="module")
def installed() -> Path:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def test_the_installed_vllm_has_all_that_the_guard_relies_on(installed: Path) -> None:
    assert contract.faults(installed) == []


def test_every_release_that_is_supported_was_held_against_the_contract_as_it_is_now() -> None:
    # Not imported: pytest's own process does not import vLLM.
    lines = re.findall(r"^(?:SUPPORTED|READ)_VLLM = (.*)$", SUPPORT.read_text(), re.M)
    supported = re.findall(r'"([\d.]+)"', " ".join(lines))
    assert set(supported) >= {"0.32", "0.33"}
    for release in supported:
        record = json.loads((RECORDS / f"vllm-{release}.json").read_text())
        assert record == {"contract": contract.digest(), "faults": []}, release


def changed(installed: Path, target: Path, file: str, old: str, new: str) -> Path:
    """The installed package with one file changed: the files that the contract looks into, and nothing else."""
    for place in (*contract.MEMBERS, *contract.PARAMETERS, *contract.CALLS):
        path = target / place.split(":")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():
            path.symlink_to(installed / place.split(":")[0])
    text = (target / file).read_text()
    assert old in text
    (target / file).unlink()
    (target / file).write_text(text.replace(old, new))
    return target


@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        ("v1/worker/gpu/input_batch.py", "    prefill_len_np:", "    prefill_lengths:", "no `prefill_len_np`"),
        ("v1/worker/gpu_input_batch.py", "self.num_tokens_no_spec ", "self.num_tokens ", "no `num_tokens_no_spec`"),
        ("v1/worker/gpu/model_runner.py", "def _dummy_run(", "def _dry_run(", "no `_dummy_run`"),
        ("v1/worker/gpu/model_runner.py", "self.prepare_inputs(", "prepare(", "does not call self.prepare_inputs"),
        ("v1/worker/gpu/sample/sampler.py", "self.sample(", "self.draw(", "does not call self.sample"),
        ("v1/worker/gpu/sample/sampler.py", "class Sampler:", "class Drawer:", "no such class"),
        (
            "model_executor/models/llama.py",
            "        positions: torch.Tensor,\n        hidden_states: torch.Tensor,\n        residual",
            "        hidden_states: torch.Tensor,\n        positions: torch.Tensor,\n        residual",
            "takes self hidden_states positions residual",
        ),
        (
            "v1/outputs.py",
            "    @abstractmethod\n    def get_output(self)",
            "    @abstractmethod\n    def wait(self): ...\n    @abstractmethod\n    def get_output(self)",
            "`wait` is abstract",
        ),
    ],
)
def test_a_release_that_changed_what_the_guard_relies_on_is_told_by_name(
    installed: Path, tmp_path: Path, file: str, old: str, new: str, fault: str
) -> None:
    found = contract.faults(changed(installed, tmp_path, file, old, new))
    assert any(fault in each and each.startswith(file) for each in found)
