"""The digest of the guard's own code."""

from __future__ import annotations

from pathlib import Path

from guard.engine.cached import CODE_KEY, digest, stamp
from guard.engine.settings import EngineSettings


def test_any_change_to_a_source_changes_the_digest_and_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    seen = []
    for name, text in (
        ("probe.py", "a"),
        ("deep/op.cpp", "a"),
        ("probe.py", "b"),
        ("deep/op.cpp", "b"),
        ("new.py", ""),
    ):
        (tmp_path / name).write_text(text)
        seen.append(digest(tmp_path))
        (tmp_path / "probe.pyc").write_text(text)
        (tmp_path / "deep" / "built.so").write_text(text)
        assert digest(tmp_path) == seen[-1]
    assert len(set(seen)) == len(seen)


def test_what_moves_from_one_file_to_the_next_changes_the_digest(tmp_path: Path) -> None:
    seen = set()
    for one, other in (("ab", "c"), ("a", "bc")):
        (tmp_path / "one.py").write_text(one)
        (tmp_path / "other.py").write_text(other)
        seen.add(digest(tmp_path))
    assert len(seen) == 2


def test_a_stamp_is_put_beside_what_the_operator_wrote() -> None:
    config = {"undertow": {"bank": "bank", "fingerprint": "sha256:x"}}
    before = EngineSettings.read(config)
    for _ in range(2):
        stamp(config)
        assert EngineSettings.read(config) == before
    assert set(config) == {"undertow", CODE_KEY}
