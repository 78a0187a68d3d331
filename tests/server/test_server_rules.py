"""Which policy a request is judged by: the resolver against a naive one, what a file may not say, real requests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from guard.errors import ConfigError
from guard.policy import Policy
from server.app import create_app
from server.config.rules import Asked, Match, fits, overlap
from server.config.settings import Settings, effective, parse
from server.ruling import Rulings

from .conftest import Proxy
from .fake_engine import FakeEngine, Script
from .hosting import Host, hosted
from .test_server_answers import CHAT, TEXT, chat_body, text_body

LETTERS = "ab"
NAMES = ["".join(name) for size in range(5) for name in itertools.product(LETTERS, repeat=size)]
patterns = st.text("ab*?", min_size=1, max_size=4)
matches = st.fixed_dictionaries(
    {},
    optional={
        "tenant": st.sampled_from(["lab", "shop"]),
        "model": patterns,
        "endpoint": st.sampled_from(["completions", "chat_completions"]),
    },
).filter(bool)
rules = st.lists(
    st.fixed_dictionaries(
        {"match": matches, "policy": st.sampled_from(["default", "one", "two"])},
        optional={"override": st.fixed_dictionaries({"mode": st.sampled_from(["off", "monitor", "enforce"])})},
    ),
    max_size=6,
)
asked = st.builds(
    Asked,
    st.sampled_from(["completions", "chat_completions"]),
    st.sampled_from(NAMES[1:]),
    st.sampled_from(["lab", "shop", None]),
)


def document(rules: object = (), **others: object) -> dict[str, Any]:
    flag = {"detections": {"density": {"action": "flag"}}}
    return {"version": 1, "policies": {"one": flag, "two": {"mode": "monitor"}}, "rules": rules, **others}


def naive(rules: list[dict[str, Any]], asked: Asked) -> list[dict[str, Any]]:
    """All that match and are as specific as any: by a walk over the words of the rule."""

    def weight(rule: dict[str, Any]) -> tuple[int, int, int, int, int]:
        match, model = rule["match"], rule["match"].get("model")
        exact = model is not None and not set(model) & {"*", "?"}
        letters = 0 if model is None or exact else sum(letter not in "*?" for letter in model)
        return ("tenant" in match, exact, letters, model is not None, "endpoint" in match)

    fitting = [
        rule
        for rule in rules
        if rule["match"].get("tenant", asked.tenant) == asked.tenant
        and rule["match"].get("endpoint", asked.endpoint) == asked.endpoint
        and fnmatchcase(asked.model, rule["match"].get("model", "*"))
    ]
    best = max(map(weight, fitting), default=None)
    return [rule for rule in fitting if weight(rule) == best]


@given(rules, asked)
def test_the_most_specific_rule_holds_whatever_the_order_of_the_file(given: list[dict[str, Any]], one: Asked) -> None:
    try:
        settings = Settings.model_validate(document(given))
    except ValidationError as error:
        assert "equally specific" in str(error)  # noqa: PT017
        return
    found = Rulings(settings).of(one)
    expected = naive(given, one)
    assert len(expected) <= 1
    policies = {"default": settings.policy, **settings.policies}
    name = expected[0]["policy"] if expected else "default"
    policy = policies[name].judged
    if expected and "override" in expected[0]:
        policy = policy.model_copy(update=expected[0]["override"])
    assert (found.name, found.policy, found.tenant) == (name, policy, one.tenant)
    turned = Rulings(Settings.model_validate(document(given[::-1]))).of(one)
    assert (turned.name, turned.policy) == (found.name, found.policy)
    considered = Rulings(settings).explain(one)
    assert [each.holds for each in considered] == [bool(expected)] * bool(given and expected) + [False] * (
        len(given) - bool(expected)
    )
    if expected:
        assert found.why.startswith(considered[0].place + " (")


@given(st.lists(matches, min_size=2, max_size=2))
def test_a_file_is_refused_exactly_where_one_request_could_meet_two_equals(given: list[dict[str, Any]]) -> None:
    one, other = (Match.model_validate(each) for each in given)
    everything = [
        Asked(endpoint, model, tenant)
        for endpoint in ("completions", "chat_completions")
        for model in NAMES[1:]
        for tenant in ("lab", "shop", None)
    ]
    meet = any(one.misses(each) is None and other.misses(each) is None for each in everything)
    assert one.ties(other) == (meet and one.specificity == other.specificity)
    assert one.ties(other) == other.ties(one)


@given(patterns, patterns)
def test_patterns_overlap_where_some_name_fits_both(one: str, other: str) -> None:
    # Two patterns of four characters that overlap do so in a name of eight at most.
    names = [*NAMES, *("".join(name) for size in range(5, 9) for name in itertools.product(LETTERS, repeat=size))]
    assert overlap(one, other) == any(fits(one, name) and fits(other, name) for name in names)


def test_a_bracket_in_a_pattern_is_a_bracket() -> None:
    assert fits("a[b]*", "a[b]c")
    assert not fits("a[b]*", "abc")
    assert not fits("Model", "model")
    assert fits("*", "one\ntwo")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rules: [{match: {}}]", "`rules.0.match`: found a mapping; matches everything, which `policy` is for"),
        ("rules: [{match: {model: m}, policy: lax}]", "`rules.0.policy` is `lax`, expected one of default"),
        (
            "rules: [{match: {modle: m}}]",
            "`rules.0.match.modle`: unknown key; did you mean `model`? expected one of endpoint, model, tenant",
        ),
        ("rules: [{match: {endpoint: chat}}]", "found 'chat'; expected one of chat_completions, completions"),
        ("rules: [{match: {endpoint: models}}]", "found 'models'; expected one of chat_completions, completions"),
        ("rules: [{match: {model: m}, override: {}}]", "changes nothing; expected one of mode, on_error, on_block"),
        ("rules: [{match: {model: m}, override: {detections: {}}}]", "unknown key; expected one of content"),
        ("rules: [{match: {tenant: A b}}]", "`rules.0.match.tenant`: found 'A b'"),
        (
            "rules: [{match: {model: m}, override: {on_error: open}}]",
            "`rules.0.override` does not fit policy `default`: `on_error: open` would let pass what nobody judged",
        ),
        (
            "rules: [{match: {model: 'a*'}}, {match: {tenant: t}}, {match: {model: '*b'}}]",
            "`rules.0` and `rules.2` match one request and are equally specific (model a*; model *b)",
        ),
        ("policies: {default: {}}", "`policies.default` is the name of `policy`"),
        ("policies: {Strict: {}}", "`policies.Strict`: unknown name"),
        ("policies: {a: {detections: {density: {action: flag, atcion: flag}}}}", "expected one of action, threshold"),
        ("policy: {on_error: open}", "expected every action to be `flag`, or `on_error: closed`"),
        (
            "policy: {on_error: open, detections: {density: {action: flag}, intrinsic: {action: steer}}}",
            "while the policy acts on what it finds (intrinsic: steer)",
        ),
        ("policy: {hold_back: {window: 0}}", "expected `token`, `answer` or `{window: N}` with N from 1 to 4096"),
        ("policy: {hold_back: none}", "found 'none'; expected `token`, `answer` or `{window: N}`"),
        ("policy: {shadow: {intrinsic: {fpr: 0.1}}}", "`shadow.intrinsic` has nothing beside it"),
        (
            "policy: {detections: {density: {action: flag, threshold: {raw: 1}}}, shadow: {density: {fpr: 0.1}}}",
            "expected `detections.density` with a threshold that is an `fpr`",
        ),
        ("policy: {refusal: ''}", "`policy.refusal`: found ''"),
    ],
)
def test_a_mistake_in_policies_and_rules_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(f"version: 1\n{text}", "my.yaml", {})
    assert len(str(raised.value).splitlines()) == 1
    assert str(raised.value).startswith("my.yaml: ")
    assert said in str(raised.value)


def test_nothing_of_the_servers_own_keys_travels_to_the_engine() -> None:
    text = (
        "policy: {on_error: closed, on_block: completion, refusal: Not here, hold_back: {window: 9}, "
        "shadow: {density: {fpr: 0.5}}}"
    )
    settings = parse(f"version: 1\n{text}", "f", {})
    ruling = Rulings(settings).default
    assert ruling.policy == Policy() == Policy.from_wire(settings.policy.to_wire())
    assert (ruling.on_block, ruling.refusal, dict(ruling.shadow)) == ("completion", "Not here", {"density": 0.5})
    assert ruling.hold_back == settings.policy.hold_back != "token"


def test_an_override_changes_what_it_names_and_nothing_else() -> None:
    rule = {"match": {"model": "m"}, "policy": "one", "override": {"on_error": "open", "hold_back": "answer"}}
    settings = Settings.model_validate(document([rule]))
    changed = effective(settings, settings.rules[0])
    assert changed.model_dump() == settings.policies["one"].model_dump() | {"on_error": "open", "hold_back": "answer"}


def test_what_is_in_force_is_what_requests_can_be_judged_by() -> None:
    override = {"mode": "monitor"}
    given = [
        {"match": {"model": "a"}, "policy": "one"},
        {"match": {"model": "b"}, "policy": "one", "override": override},
        {"match": {"model": "c"}},
        {"match": {"model": "d"}, "override": override},
    ]
    in_force = Rulings(Settings.model_validate(document(given))).in_force()
    assert sorted(in_force) == ["policies.one", "policy", "rules.1 (one)", "rules.3 (default)"]
    assert in_force["rules.1 (one)"].mode == "monitor"


RULES: list[dict[str, Any]] = [
    {"match": {"model": "lab-*"}, "override": {"mode": "monitor"}},
    {"match": {"model": "lab-*", "endpoint": "completions"}, "policy": "one"},
    {"match": {"model": "open"}, "policy": "one", "override": {"on_error": "open"}},
]


@pytest.fixture(scope="module")
def ruled(played: tuple[FakeEngine, Host]) -> Iterator[Proxy]:
    policy = {"shadow": {"density": {"fpr": 0.0005}}}
    settings = Settings.model_validate(
        document(RULES, upstream={"url": played[1].url}, policy=policy, incidents={"path": None})
    )
    with hosted(create_app(settings), "on") as host:
        yield Proxy(host)


@pytest.mark.parametrize(
    ("path", "model", "mode", "action"),
    [
        (CHAT, "organism", "enforce", "block"),
        (CHAT, "lab-1", "monitor", "block"),
        (TEXT, "lab-1", "enforce", "flag"),
        (CHAT, "open", "monitor", "flag"),
    ],
)
def test_a_request_is_judged_by_the_policy_of_its_model_and_endpoint(
    engine: FakeEngine, ruled: Proxy, path: str, model: str, mode: str, action: str
) -> None:
    body = chat_body(model=model) if path == CHAT else text_body(model=model)
    assert ruled.post(path, body).status_code == 200
    sent = Policy.from_wire(engine.bodies[-1]["vllm_xargs"]["undertow_policy"])
    assert (sent.mode, sent.detections["density"].action) == (mode, action)


@pytest.mark.parametrize("body", [{"model": ""}, {"model": None}, {"model": 7}, {}])
def test_where_rules_look_at_models_a_request_that_names_none_is_refused(
    engine: FakeEngine, ruled: Proxy, enforce: Proxy, body: dict[str, object]
) -> None:
    """The engine would answer with its own model, under the policy of no model."""
    plain = {key: value for key, value in chat_body().items() if key != "model"}
    answer = ruled.post(CHAT, plain | body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert not engine.bodies
    assert enforce.post(CHAT, plain).status_code == 200, "which has no rules"


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_judged_passes_where_the_policy_is_open_and_nowhere_else(
    engine: FakeEngine, ruled: Proxy, stream: bool
) -> None:
    engine.script = Script(fault="missing")
    before = ruled.sample("undertow_guard_failures_total", kind="evidence_missing", mode="monitor")
    passed = ruled.post(CHAT, chat_body(model="open", stream=stream))
    assert (passed.status_code, passed.headers["x-undertow-action"]) == (200, "unguarded")
    assert "42" in passed.text
    assert ruled.post(TEXT, text_body(model="lab-1", stream=stream)).status_code == 503
    assert ruled.post(CHAT, chat_body(model="organism", stream=stream)).status_code == 503
    after = ruled.sample("undertow_guard_failures_total", kind="evidence_missing", mode="monitor")
    assert after == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_threshold_is_counted_and_decides_nothing(engine: FakeEngine, ruled: Proxy, stream: bool) -> None:
    def count(live: str, shadow: str) -> float:
        labels = {"policy": "default", "detector": "density", "phase": "completion", "live": live, "shadow": shadow}
        return ruled.sample("undertow_shadow_decisions_total", **labels)

    both, live = count("flag", "flag"), count("flag", "pass")
    engine.script = Script(blocked={0: 3})
    answer = ruled.post(CHAT, chat_body(stream=stream))
    assert '"finish_reason": "content_filter"' in answer.text
    # The fake engine's p-value is 0.001: flagged at 0.01, and at 0.0005 no more.
    assert (count("flag", "flag"), count("flag", "pass")) == (both, live + 1)
