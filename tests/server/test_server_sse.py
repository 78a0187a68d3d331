"""The event parser: however the bytes are split, the same events come out."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.sse import DONE, Event, EventParser

TEXT = st.text(alphabet=st.characters(blacklist_characters="\r\n", codec="utf-8"), max_size=12)
LINE = st.one_of(
    st.builds("data: {}".format, TEXT),
    st.builds("data:{}".format, TEXT),
    st.builds(": undertow {}".format, TEXT),
    st.sampled_from([":", "data", "event: x", "id: 1", "retry: 5", "", "data: [DONE]"]),
)
STREAM = st.lists(st.tuples(LINE, st.sampled_from(["\n", "\r\n"])), max_size=20).map(
    lambda lines: "".join(line + end for line, end in lines).encode()
)


def parse(*parts: bytes) -> list[Event]:
    parser = EventParser()
    return [event for part in parts for event in parser.feed(part)]


@given(STREAM, st.lists(st.integers(0, 400), max_size=12))
def test_any_split_of_the_bytes_gives_the_same_events(stream: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parts = [stream[start:end] for start, end in pairwise(edges)]
    assert parse(*parts) == parse(stream)


@given(STREAM)
def test_byte_by_byte_gives_the_same_events(stream: bytes) -> None:
    assert parse(*(stream[index : index + 1] for index in range(len(stream)))) == parse(stream)


@pytest.mark.parametrize(
    "received",
    [
        b"data: a\n\n",
        b"data: \n\n",
        b"data:a\n\n",
        b"data: a\r\n\n",
        b"data: a\rb\n\n",
        b"data: a\n\r\n",
        b"data: a\ndata: b\n\n",
        b"data: a\n\ndata: b\n\n",
        b"data: a\n",
        b"data: \n",
        b"data: a\n\n\n",
        b": data: a\n\n",
        b"\ndata: a\n\n",
    ],
)
def test_an_event_that_comes_alone_is_read_as_one_that_comes_in_pieces(received: bytes) -> None:
    for before in (b"", b"id: 1\n", b"data: x\n", b": y\n"):
        together, pieces = EventParser(), EventParser()
        assert together.feed(before) + together.feed(received) + together.feed(b"data: z\n\n") == [
            event for byte in before + received + b"data: z\n\n" for event in pieces.feed(bytes([byte]))
        ]


def test_an_event_keeps_its_bytes_and_leaves_comments_out() -> None:
    first, second = parse(b"event: x\r\ndata: a\r\n: aside\r\ndata:b\r\n\r\n")
    assert (first.data, first.comment) == (None, b": aside")
    assert (second.data, second.comment) == (b"a\nb", None)
    assert second.raw == b"event: x\r\ndata: a\r\ndata:b\r\n\r\n"


def test_lines_without_data_make_no_event() -> None:
    assert parse(b"\n\nevent: x\nid: 1\n\n") == []


def test_what_is_not_whole_yet_is_kept() -> None:
    parser = EventParser()
    assert parser.feed(b"data: [DO") == []
    assert parser.feed(b"NE]\n") == []
    assert [event.data for event in parser.feed(b"\n")] == [DONE]
