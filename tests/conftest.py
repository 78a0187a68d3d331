"""Settings for every test, and which tests one process runs when several run beside each other."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Two cores and many small tensors: idle OpenMP threads would only spin. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The same examples in every run, on every machine: what is red is red for everybody, and a busy machine is no failure.
hypothesis.settings.register_profile("undertow", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("undertow")

LONGEST = "e2e"
SHARED = (LONGEST, "deploy", "incidents")
"""Folders whose tests share what is dear to start (an engine, Prometheus, databases): one process runs them all."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: then no process is idle while it ends."""
    items.sort(key=lambda item: group(item.nodeid) != LONGEST)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Where tests run in several processes (`make test`)."""
    return Groups(config, log)


class Groups(LoadScopeScheduling):
    """One process runs all tests of a group, in their order."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def group(nodeid: str) -> str:
    """A folder that shares something, else the test's own file."""
    _, folder, *_ = parts = PurePosixPath(nodeid.partition("::")[0]).parts
    return folder if folder in SHARED else "/".join(parts)
