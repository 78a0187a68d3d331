"""When a changed file is read: looks at it, held against a naive account of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.settled import Settled


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_what_two_looks_in_a_row_find_changed_is_read_once(looks: list[str]) -> None:
    settled = Settled("a")
    read, last = "a", "a"
    for seen in looks:
        expected = seen == last and seen != read
        assert settled.see(seen) is expected
        read, last = seen if expected else read, seen


def test_what_changes_at_every_look_is_never_read() -> None:
    settled = Settled(0)
    assert not any(settled.see(number) for number in range(1, 50))


def test_what_was_read_at_another_time_is_not_read_again() -> None:
    settled = Settled("a")
    settled.see("b")
    settled.read("b")
    assert not settled.see("b")
    assert not settled.see("a")
    assert settled.see("a"), "and it is when it comes back"
