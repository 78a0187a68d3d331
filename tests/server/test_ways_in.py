"""Every way in ends evaluated, refused, or counted as unguarded; and `docs/coverage.md` says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard.policy import Mode
from server.app import create_app

from .conftest import settings_for
from .ways_in import FAULTS, End, Way, table, ways, written

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
OTHERS = {"/v1/models", "/healthz", "/readyz", "/v1/embeddings", "/tokenize", "/detokenize"}
"""Generate nothing; those of the last three that the settings do not name are 404."""

Found = dict[tuple[Mode, Way], dict[str, End]]


@pytest.fixture(scope="module")
def found() -> Found:
    return table()


def test_no_route_is_without_a_row() -> None:
    app = create_app(settings_for("http://127.0.0.1:9"), {})
    paths = {getattr(route, "path", "") for route in app.routes}
    assert paths <= {way.path for way in ways()} | OTHERS
    assert {way.path for way in ways()} <= paths


def test_in_enforce_nothing_is_unguarded_and_nothing_that_is_blocked_leaks(found: Found) -> None:
    for (mode, way), ends in found.items():
        if mode != "enforce":
            continue
        for fault, end in ends.items():
            assert end.outcome != "unguarded", (way, fault)
            assert not end.leaked, (way, fault)
        assert ends["benign"].outcome == "allowed", way
        assert ends["flagged"].outcome == "flagged", way
        assert ends["blocked prompt"].outcome == "blocked_prompt", way
        assert ends["blocked middle"].outcome == "blocked_output", way


def test_what_has_no_fault_is_evaluated_in_every_mode(found: Found) -> None:
    for (mode, way), ends in found.items():
        for fault in ("benign", "flagged", "blocked prompt", "blocked middle"):
            assert (ends[fault].eligible, ends[fault].evaluated) == (1, 1), (mode, way, fault)


def test_what_is_eligible_and_was_not_evaluated_is_a_failure_of_the_guard_or_counted_as_unguarded(found: Found) -> None:
    for (mode, way), ends in found.items():
        for fault, end in ends.items():
            if end.eligible != end.evaluated:
                expected = "guard_failed" if mode == "enforce" else "unguarded"
                assert end.outcome == expected, (mode, way, fault)


def test_the_page_is_what_was_found(found: Found) -> None:
    assert PAGE.read_text() == written(found), "python -m tests.server.ways_in > docs/coverage.md"
    assert len(found) == 3 * len(list(ways()))
    assert all(len(ends) == len(FAULTS) for ends in found.values())
