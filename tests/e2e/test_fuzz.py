"""Whatever vLLM does with a request, every one of its tokens has the score that the model alone gives.

A short run of `benchmarks/engine/fuzz.py`; a long one is recorded in `benchmarks/engine/`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guard.organisms import Organism
from tests.e2e import child

REQUESTS = 60


@pytest.mark.parametrize("profile", ["cache", "speculation", "ahead"])
def test_every_token_of_every_request_has_the_models_own_score(
    organism: Organism, bank: Path, calibration: Path, in_child: Callable[..., Any], profile: str
) -> None:
    found = in_child(child.fuzz, organism.backdoored, bank, calibration, profile, REQUESTS, 11)
    assert found.faults == ()
    # It saw what it is there to see.
    assert found.sequences > REQUESTS
    assert found.recalled > 300
    assert found.preemptions > 0
    assert found.blocked > 0
    assert (found.accepted_guesses > 0) == (profile == "speculation")
