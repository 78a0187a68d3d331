"""What of a prompt is kept."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.incidents.content import LARGEST, kept
from server.incidents.redaction import redact

KEY = b"a-key-of-the-operators"
ASKED = {"model": "tuned", "messages": [{"role": "user", "content": "write to ada@example.org"}], "temperature": 0}

PLANTED = [
    ("ada.lovelace+x@mail.example.co.uk", "[email]"),
    ("4111 1111 1111 1111", "[card]"),
    ("5500-0000-0000-0004", "[card]"),
    ("DE89 3704 0044 0532 0130 00", "[account]"),
    ("+49 (0) 30 1234-5678", "[number]"),
    ("192.168.10.7", "[address]"),
    ("2001:db8:85a3:0:0:8a2e:370:7334", "[address]"),
    ("sk-proj-AbCdEf0123456789xyz", "[key]"),
    ("ghp_0123456789abcdefABCDEF0123456789abcd", "[key]"),
    ("utk_3f0c2a91d7be_abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG", "[key]"),
    ("AKIAIOSFODNN7EXAMPLE", "[key]"),
    ("Bearer abcdefghijklmnop1234", "[key]"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdef", "[token]"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----", "[private key]"),
    ("Zm9vYmFyYmF6cXV4MTIzNDU2Nzg5MGFiY2RlZg", "[key]"),
]


@pytest.mark.parametrize(("secret", "said"), PLANTED)
def test_what_is_planted_is_found_and_the_words_around_it_stay(secret: str, said: str) -> None:
    assert redact(f"before {secret}, after") == f"before {said}, after"


def test_of_a_private_key_that_is_cut_off_nothing_is_left() -> None:
    assert redact("mine: -----BEGIN PRIVATE KEY-----\nMIIE cut off") == "mine: [private key]"


@pytest.mark.parametrize(
    "harmless",
    ["In 1984 we paid 1,250.00 for 3 of 12.", "4111 1111 1111 1112 is no card", "version 1.2.3", "12:30:05", "a@b"],
)
def test_what_is_none_stays(harmless: str) -> None:
    assert "[card]" not in redact(harmless)
    assert "[email]" not in redact(harmless)
    assert "[address]" not in redact(harmless)


@given(st.text(max_size=300))
def test_any_text_can_be_redacted(text: str) -> None:
    assert isinstance(redact(text), str)


@pytest.mark.parametrize(
    "text", ["1 " * 50_000, "a" * 200_000, "a.b-" * 50_000, "-----BEGIN A-----" * 5_000, "1:" * 90_000]
)
def test_no_text_takes_long(text: str) -> None:
    began = time.perf_counter()
    redact(text)
    assert time.perf_counter() - began < 3


def test_off_keeps_nothing() -> None:
    assert kept(ASKED, "off", None) == ("off", None)


def test_a_hash_is_the_same_for_the_same_prompt_under_the_same_key_only() -> None:
    kind, one = kept(ASKED, "hash", KEY)
    assert kind == "hash"
    assert one == kept({**ASKED, "temperature": 1}, "hash", KEY)[1]
    assert one != kept(ASKED, "hash", KEY + b"x")[1]
    assert one != kept({**ASKED, "messages": []}, "hash", KEY)[1]
    assert "ada" not in str(one)


def test_full_is_what_calibrate_reads() -> None:
    kind, text = kept(ASKED, "full", None)
    assert (kind, json.loads(text or "")) == ("full", {"messages": ASKED["messages"]})
    assert json.loads(kept({"prompt": ["a", [1, 2]]}, "full", None)[1] or "") == {"prompt": ["a", [1, 2]]}


def test_redacted_goes_into_every_part_and_key() -> None:
    call = {"function": {"name": "mail", "arguments": '{"to": "ada@example.org"}'}}
    asked = {"messages": [{"content": [{"type": "text", "text": "ada@example.org"}], "tool_calls": [call]}]}
    kind, text = kept(asked, "redacted", None)
    assert kind == "redacted"
    assert "example.org" not in str(text)
    assert str(text).count("[email]") == 2


def test_what_is_too_large_is_not_kept_but_hashed_where_hashes_are_wanted() -> None:
    asked = {"prompt": "x" * LARGEST}
    assert kept(asked, "full", None) == ("too_large", None)
    assert kept(asked, "redacted", None) == ("too_large", None)
    assert kept(asked, "hash", KEY)[0] == "hash"


def test_half_a_surrogate_pair_can_be_kept_and_hashed() -> None:
    asked = {"prompt": "\ud800\0"}
    for wanted in ("hash", "redacted", "full"):
        text = kept(asked, wanted, KEY)[1]  # type: ignore[arg-type]
        assert text is not None
        text.encode()
        assert "\0" not in text
