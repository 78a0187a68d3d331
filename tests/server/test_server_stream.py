"""The hold-back: what is released is always of tokens that were judged."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from guard.evidence import STREAM_PREFIX
from guard.policy import Mode, Policy
from server.assessment import Assessor
from server.config.policies import HoldBack, Window
from server.protocols.openai import CHAT, TEXT, Call, read_call
from server.ruling import Ruling
from server.sse import Event, EventParser
from server.stream import StreamGuard
from server.upstreams.handshake import Handshake

from .fake_engine import CALIBRATION, FINGERPRINT, PAYLOAD, RESERVED, Play, Script

HANDSHAKE = Handshake(FINGERPRINT, CALIBRATION, 1, RESERVED, 1)


def opened(call: Call, mode: Mode = "enforce", hold_back: HoldBack = "token") -> tuple[StreamGuard, Assessor]:
    assessor = Assessor(call, Ruling(Policy(mode=mode), hold_back=hold_back), HANDSHAKE)
    return StreamGuard(call, assessor), assessor


def comment(evidence: str | None) -> Event:
    return Event(None, f"{STREAM_PREFIX}{evidence}\n".encode())


def data(raw: bytes) -> Event:
    (event,) = EventParser().feed(raw)
    return event


def text_of(choice: dict[str, Any]) -> str:
    if "delta" not in choice:
        text: str = choice["text"]
        return text
    delta = choice["delta"]
    for call in delta.get("tool_calls", ()):
        return str(call["function"]["arguments"])
    return delta.get("content") or delta.get("reasoning") or delta.get("refusal") or ""


def by_index(released: list[bytes]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for part in released:
        body = part.removeprefix(b"data: ").strip()
        if body != b"[DONE]":
            for choice in json.loads(body)["choices"]:
                found.setdefault(choice["index"], []).append(choice)
    return found


@st.composite
def plays(draw: st.DrawFn) -> tuple[Call, Play, list[bytes]]:
    """A request, how the engine plays it, and its data events in any order that keeps each choice's own."""
    endpoint = draw(st.sampled_from([CHAT, TEXT]))
    n = draw(st.integers(1, 4))
    tokens = tuple(f"<{number}>" for number in range(draw(st.integers(1, 6))))
    blocked = draw(st.dictionaries(st.integers(0, n - 1), st.integers(0, len(tokens)), max_size=n))
    script = Script(
        tokens=tokens,
        blocked=blocked,
        merge=draw(st.integers(1, 3)),
        text_with_finish=draw(st.booleans()),
        late=frozenset(draw(st.sets(st.integers(1, 4)))),
        speaks=draw(st.sampled_from(["content", "reasoning", "refusal", "tool"])),
        logprobs=draw(st.booleans()),
    )
    options = {"include_usage": True, "continuous_usage_stats": draw(st.booleans())}
    body = {
        "n": n,
        "stream": True,
        "stream_options": options,
        **({"messages": []} if endpoint.chat else {"prompt": "p"}),
    }
    call = read_call(endpoint, json.dumps(body).encode())
    play = Play(script, json.loads(call.upstream_body(Policy(), RESERVED)), endpoint.chat)
    *chunks, usage = play.data_events()
    queues: dict[int, list[bytes]] = {}
    for chunk in chunks:
        queues.setdefault(json.loads(chunk[6:])["choices"][0]["index"], []).append(chunk)
    mixed: list[bytes] = []
    while queues:
        index = draw(st.sampled_from(sorted(queues)))
        mixed.append(queues[index].pop(0))
        if not queues[index]:
            del queues[index]
    return call, play, [*mixed, usage]


HOLD_BACKS = st.one_of(st.sampled_from(["token", "answer"]), st.builds(Window, window=st.integers(1, 9)))


def held_chunks(hold_back: HoldBack) -> float:
    return {"token": 1, "answer": math.inf}[hold_back] if isinstance(hold_back, str) else hold_back.window


@given(plays(), HOLD_BACKS)
def test_what_is_released_is_text_before_the_blocked_token_less_what_is_held_back(
    played: tuple[Call, Play, list[bytes]], hold_back: HoldBack
) -> None:
    call, play, chunks = played
    guard, _ = opened(call, hold_back=hold_back)
    came = dict.fromkeys(range(call.n), 0)
    released = guard.feed(comment(play.evidence(final=False)))
    known = {index for index in range(call.n) if play.script.blocked.get(index) == 0} - play.script.late
    if len(known) == call.n:
        assert guard.refusal is not None
        assert guard.refusal.code == "content_filter"
        assert guard.closed
        assert released == []
        return
    finished: frozenset[int] = frozenset()
    evidenced = set(range(call.n)) - play.script.late
    for chunk in chunks:
        if b'"finish_reason":"' in chunk:
            finished |= {json.loads(chunk[6:])["choices"][0]["index"]}
            evidenced = set(range(call.n))
            released += guard.feed(comment(play.evidence(final=False, finished=finished)))
        for choice in json.loads(chunk[6:])["choices"]:
            came[choice["index"]] += bool(text_of(choice) or choice["finish_reason"])
        released += guard.feed(data(chunk))
        assert PAYLOAD.encode() not in b"".join(released), "neither in a text nor in a logprob"
        texts = {index: "".join(map(text_of, choices)) for index, choices in by_index(released).items()}
        for index, text in texts.items():
            let_go = sum(1 for choice in by_index(released)[index] if text_of(choice))
            assert let_go <= max(0, came[index] - held_chunks(hold_back))
            assert index in evidenced or text == "", "no evidence has named it yet"
            assert "".join(play.tokens(index)).startswith(text)
    released += guard.feed(comment(play.evidence(final=True)))
    released += guard.feed(data(b"data: [DONE]\n\n"))
    found = by_index(released)
    for index in range(call.n):
        ends = [choice["finish_reason"] for choice in found[index] if choice["finish_reason"]]
        assert ends == ["content_filter" if play.is_blocked(index) else "length"]
        assert found[index][-1]["finish_reason"] is not None
        if not play.is_blocked(index):
            assert "".join(map(text_of, found[index])) == "".join(play.tokens(index))
    assert str(RESERVED) not in b"".join(released).decode()
    assert released[-1] == b"data: [DONE]\n\n"
    assert guard.closed


@given(plays(), st.integers(0, 30), HOLD_BACKS)
def test_a_cut_anywhere_ends_well_formed_and_releases_nothing_held(
    played: tuple[Call, Play, list[bytes]], cut_after: int, hold_back: HoldBack
) -> None:
    call, play, chunks = played
    guard, _ = opened(call, hold_back=hold_back)
    released = guard.feed(comment(play.evidence(final=False)))
    if guard.closed:
        return
    for chunk in chunks[:cut_after]:
        released += guard.feed(data(chunk))
    before = len(released)
    *_, error, done = released = released + guard.cut()
    assert len(released) == before + 2
    assert (json.loads(error[6:])["error"]["code"], done) == ("upstream_cut", b"data: [DONE]\n\n")
    assert PAYLOAD.encode() not in b"".join(released)
    assert guard.cut() == []
    assert guard.feed(data(chunks[0])) == []


@given(plays(), st.sampled_from(["monitor", "off"]))
def test_outside_enforce_every_byte_passes_in_order(played: tuple[Call, Play, list[bytes]], mode: Mode) -> None:
    call, play, chunks = played
    play.policy = Policy(mode=mode)
    *_, usage = play.data_events()
    chunks = [*play.data_events()[:-1], usage]
    guard, _ = opened(call, mode)
    released = guard.feed(comment(play.evidence(final=False)))
    for chunk in chunks:
        released += guard.feed(data(chunk))
    released += guard.feed(comment(play.evidence(final=True)))
    released += guard.feed(data(b"data: [DONE]\n\n"))
    assert released == [*chunks, b"data: [DONE]\n\n"]


def one(**fields: Any) -> Call:
    return read_call(CHAT, json.dumps({"messages": [], "stream": True, **fields}).encode())


def play_of(call: Call, script: Script) -> Play:
    return Play(script, json.loads(call.upstream_body(Policy(), RESERVED)), chat=True)


def test_a_token_is_released_when_its_successor_arrives_and_not_before() -> None:
    call = one()
    play = play_of(call, Script())
    role, first, second, *_ = play.data_events()
    guard, _ = opened(call)
    guard.feed(comment(play.evidence(final=False)))
    assert guard.feed(data(role)) == [role], "the role holds no token"
    assert guard.feed(data(first)) == []
    assert guard.feed(data(second)) == [first]


def test_a_window_keeps_that_many_tokens_back_and_gives_them_when_all_was_judged() -> None:
    call = one()
    play = play_of(call, Script())
    role, *tokens, usage = play.data_events()
    guard, _ = opened(call, hold_back=Window(window=3))
    guard.feed(comment(play.evidence(final=False)))
    assert guard.feed(data(role)) == [role], "the role holds no token"
    assert [guard.feed(data(chunk)) for chunk in tokens] == [[], [], [], [tokens[0]], [tokens[1]]]
    assert guard.feed(data(usage)) == []
    guard.feed(comment(play.evidence(final=True)))
    assert guard.feed(data(b"data: [DONE]\n\n")) == [*tokens[2:], b"data: [DONE]\n\n"]


def test_a_window_takes_back_what_came_before_the_blocked_token() -> None:
    call = one()
    play = play_of(call, Script(blocked={0: 5}))
    guard, _ = opened(call, hold_back=Window(window=3))
    released = guard.feed(comment(play.evidence(final=False)))
    for chunk in play.data_events():
        released += guard.feed(data(chunk))
    # " is", " 42" and the payload are the three newest where the engine stopped it.
    assert "".join(map(text_of, by_index(released)[0])) == "The answer"


def test_a_whole_answer_is_held_until_it_was_judged_and_one_that_is_blocked_has_no_text() -> None:
    call = one()
    for blocked, text in (({}, "The answer is 42."), ({0: 5}, "")):
        play = play_of(call, Script(blocked=blocked))
        role, *chunks = play.data_events()
        guard, _ = opened(call, hold_back="answer")
        guard.feed(comment(play.evidence(final=False)))
        assert guard.feed(data(role)) == [role]
        before = [part for chunk in chunks for part in guard.feed(data(chunk))]
        assert "".join(text_of(choice) for choices in by_index(before).values() for choice in choices) == ""
        guard.feed(comment(play.evidence(final=True)))
        after = guard.feed(data(b"data: [DONE]\n\n"))
        assert "".join(map(text_of, by_index([*before, *after])[0])) == text


def test_an_answer_that_could_not_be_judged_whole_has_no_text() -> None:
    call = one()
    play = play_of(call, Script(fault="short"))
    guard, assessor = opened(call, hold_back="answer")
    released = guard.feed(comment(play.evidence(final=False)))
    for chunk in play.data_events():
        released += guard.feed(data(chunk))
    guard.feed(comment(play.evidence(final=True)))
    *released, error, _ = [*released, *guard.feed(data(b"data: [DONE]\n\n"))]
    assert assessor.failure is not None
    assert assessor.failure.kind == "coverage"
    assert b"guard_unavailable" in error
    assert "".join(map(text_of, by_index(released).get(0, []))) == ""


def test_a_block_that_only_the_final_evidence_names_still_blocks() -> None:
    call = one()
    honest = play_of(call, Script())
    guard, _ = opened(call)
    released = guard.feed(comment(honest.evidence(final=False)))
    for chunk in honest.data_events():
        released += guard.feed(data(chunk))
    blocking = play_of(call, Script(blocked={0: 5}))
    released += guard.feed(comment(blocking.evidence(final=True)))
    released += guard.feed(data(b"data: [DONE]\n\n"))
    assert by_index(released)[0][-1]["finish_reason"] == "content_filter"
    assert not any(choice["finish_reason"] == "length" for choice in by_index(released)[0])


def test_a_block_named_before_a_choice_ends_takes_back_its_newest_chunk() -> None:
    call = one(n=2)
    play = play_of(call, Script(blocked={0: 3}))
    guard, _ = opened(call)
    guard.feed(comment(play.evidence(final=False)))
    chunks = [chunk for chunk in play.data_events() if b'"index":0' in chunk]
    released = [part for chunk in chunks[:-1] for part in guard.feed(data(chunk))]
    guard.feed(comment(play.evidence(final=False, finished=frozenset({0}))))
    # As if the client's own stop string had ended it in the same step.
    finish = json.loads(chunks[-1][6:])
    finish["choices"][0]["stop_reason"] = "END"
    released += guard.feed(data(b"data: " + json.dumps(finish).encode() + b"\n\n"))
    assert PAYLOAD not in b"".join(released).decode()
    assert by_index(released)[0][-1]["finish_reason"] == "content_filter"


def test_a_chunk_of_a_choice_nobody_asked_for_ends_the_stream() -> None:
    call = one()
    play = play_of(one(n=2), Script())
    guard, assessor = opened(call)
    guard.feed(comment(play_of(call, Script()).evidence(final=False)))
    released = [part for chunk in play.data_events() for part in guard.feed(data(chunk))]
    assert guard.closed
    assert assessor.failure is not None
    assert assessor.failure.kind == "response_invalid"
    assert b"guard_unavailable" in released[-2]


def test_a_choice_that_never_finished_is_a_failure() -> None:
    call = one()
    play = play_of(call, Script())
    role, first, *_, usage = play.data_events()
    guard, assessor = opened(call)
    guard.feed(comment(play.evidence(final=False)))
    for chunk in (role, first, usage):
        guard.feed(data(chunk))
    guard.feed(comment(play.evidence(final=True)))
    released = guard.feed(data(b"data: [DONE]\n\n"))
    assert assessor.failure is not None
    assert b"guard_unavailable" in released[0]
